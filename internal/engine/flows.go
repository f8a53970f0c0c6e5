package engine

import "mesh/control/wire"

// NoteFlows says whether to note which connections peers attempt, for Flows.
// It is off at first.
func (e *Engine) NoteFlows(on bool) { e.filter.NoteAttempts(on) }

// Flows returns the connection attempts that were noted since the last call.
func (e *Engine) Flows() []wire.Flow {
	noted := e.filter.Attempts()
	if len(noted) == 0 {
		return nil
	}
	out := make([]wire.Flow, 0, min(len(noted), wire.MaxFlows))
	for _, a := range noted[:cap(out)] {
		out = append(out, wire.Flow{Src: a.Src, Dst: a.Dst, Proto: int(a.Proto), Port: a.Port, Allowed: a.Allowed, Denied: a.Denied})
	}
	return out
}
