package filter

import "net/netip"

// maxAttempts bounds what is noted between two calls of Attempts; what finds no
// room is lost.
const maxAttempts = 256

// Attempt are connections or flows that peers began, or tried to begin, to one
// port of this node.
type Attempt struct {
	Src, Dst        netip.Addr
	Proto           uint8
	Port            uint16 // of Dst, 0 for protocols without ports
	Allowed, Denied int64  // how many were let in, and how many packets were not
}

type attemptKey struct {
	src, dst netip.Addr
	proto    uint8
	port     uint16
}

// attempts counts judgements of what belongs to no known flow.
type attempts map[attemptKey]*Attempt

func (a attempts) note(p *Packet, allowed bool) {
	k := attemptKey{src: p.Src.Addr(), dst: p.Dst.Addr(), proto: p.Proto}
	switch p.Proto {
	case ProtoTCP, ProtoUDP, ProtoSCTP:
		k.port = p.Dst.Port()
	}
	e := a[k]
	if e == nil {
		if len(a) == maxAttempts {
			return
		}
		e = &Attempt{Src: k.src, Dst: k.dst, Proto: k.proto, Port: k.port}
		a[k] = e
	}
	if allowed {
		e.Allowed++
	} else {
		e.Denied++
	}
}

// NoteAttempts says whether to note connection attempts of peers for Attempts,
// which is off at first. It costs nothing for packets of known flows.
func (f *Filter) NoteAttempts(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !on:
		f.attempts = nil
	case f.attempts == nil:
		f.attempts = make(attempts)
	}
}

// Attempts returns what was noted since the last call, in no order, and begins
// anew.
func (f *Filter) Attempts() []Attempt {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.attempts) == 0 {
		return nil
	}
	out := make([]Attempt, 0, len(f.attempts))
	for _, e := range f.attempts {
		out = append(out, *e)
	}
	f.attempts = make(attempts)
	return out
}
