package control

import (
	"context"
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
	signal(s.flows)
}

// reportFlows sends reports of flows for as long as the control server asks for
// them.
func (s *Session) reportFlows(ctx context.Context) {
	for {
		s.mu.Lock()
		every := s.flowsEvery
		s.mu.Unlock()
		var due <-chan time.Time
		if every > 0 {
			due = time.After(every)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.flows:
			continue
		case <-due:
		}
		flows := s.cfg.Flows()
		if len(flows) == 0 {
			continue
		}
		r, _ := s.request()
		if r.DiscoKey.IsZero() {
			continue
		}
		// What does not arrive is lost: it is a sample anyway.
		if r.MeshFlows = flows[:min(len(flows), wire.MaxFlows)]; s.c.Update(ctx, r) != nil {
			s.c.log.Debug("report of flows failed", zap.Int("flows", len(flows)))
		}
	}
}
