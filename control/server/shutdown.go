package server

import (
	"context"
	"time"
)

// Nodes are spread over so much time when they have to connect again at once.
const (
	spreadPerNode = time.Millisecond / 2
	minSpread     = 250 * time.Millisecond
	maxSpread     = 10 * time.Second
)

// Shutdown prepares for Close: no new request is taken, map streams end with the
// advice to come back within a while, each node at a moment of its own, and
// requests that are being served are answered. It returns when they are, or with
// ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.transport.refuseNew()
	s.left.Do(func() { close(s.leaving) })
	s.mu.Lock()
	connected := 0
	for _, n := range s.nodes.byID {
		if n.stream != nil {
			connected++
		}
	}
	spread := min(max(time.Duration(connected)*spreadPerNode, minSpread), maxSpread)
	for _, n := range s.nodes.byID {
		if n.stream != nil {
			n.stream.pending.spread = spread
			n.stream.end("")
		}
	}
	for _, r := range s.relays.known {
		r.end("")
	}
	s.mu.Unlock()
	return s.transport.idle(ctx)
}
