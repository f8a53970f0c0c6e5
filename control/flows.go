package control

import (
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
)

// maxFlowInterval is the longest time between two reports of flows that a
// server may ask for, so that what it asks fits a duration.
const maxFlowInterval = 3600 // seconds

// askFlows follows what the control server says about reports of flows; nil is
// nothing. It is called by the map poll.
func (s *Session) askFlows(every *int) {
	if every == nil || s.cfg.NoteFlows == nil {
		return
	}
	d := time.Duration(min(max(*every, 0), maxFlowInterval)) * time.Second
	s.mu.Lock()
	had := s.flowsEvery
	s.flowsEvery = d
	s.mu.Unlock()
	if had == d {
		return
	}
	s.cfg.NoteFlows(d > 0)
	s.nextFlows()
}

// nextFlows has flows reported when that is due.
func (s *Session) nextFlows() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.flowTimer != nil && s.flowsEvery > 0:
		s.flowTimer.Reset(s.flowsEvery)
	case s.flowTimer != nil:
		s.flowTimer.Stop()
	case s.flowsEvery > 0:
		s.flowTimer = time.AfterFunc(s.flowsEvery, s.flowing.Ask)
	}
}

// reportFlows sends a report of flows, if the control server still asks for them.
func (s *Session) reportFlows() {
	s.mu.Lock()
	ctx, wanted := s.ctx, s.flowsEvery > 0
	s.mu.Unlock()
	if !wanted || ctx.Err() != nil {
		return
	}
	defer s.nextFlows()
	flows := s.cfg.Flows()
	if len(flows) == 0 {
		return
	}
	r, _ := s.request()
	if r.DiscoKey.IsZero() {
		return
	}
	// What does not arrive is lost: it is a sample anyway.
	if r.MeshFlows = flows[:min(len(flows), wire.MaxFlows)]; s.c.Update(ctx, r) != nil {
		s.c.log.Debug("report of flows failed", zap.Int("flows", len(flows)))
	}
}
