package session

import (
	"context"
	"time"

	"mesh/control/wire"
	"mesh/internal/netmap"
)

// AwaitMap waits until ok holds of the map in force, but not longer than atMost
// nor than ctx, and returns the map in force then.
func (s *Session) AwaitMap(ctx context.Context, atMost time.Duration, ok func(*netmap.Map) bool) *netmap.Map {
	if m := s.engine.Load().Map(); ok(m) {
		return m
	}
	timer := time.NewTimer(atMost)
	defer timer.Stop()
	for {
		next := s.nextMap()
		m := s.engine.Load().Map()
		if ok(m) {
			return m
		}
		select {
		case <-next:
		case <-timer.C:
			return m
		case <-s.ended:
			return m
		case <-ctx.Done():
			return m
		}
	}
}

// nextMap returns what is closed when another map is in force.
func (s *Session) nextMap() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.another
}

// tellMap wakes those who wait for another map.
func (s *Session) tellMap() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.another)
	s.another = make(chan struct{})
}

// awayCheck is how often UnlessOffline looks what the relay says.
const awayCheck = 200 * time.Millisecond

// UnlessOffline returns a context for a dial to a peer that control believes to
// be offline: it ends after atMost, or after atLeast if by then the peer's relay
// says the same; unless control hears from the peer meanwhile. stop frees it and
// reports whether it ended for that reason; it must be called.
func (s *Session) UnlessOffline(ctx context.Context, peer wire.NodeID, atLeast, atMost time.Duration) (within context.Context, stop func() bool) {
	within, cancel := context.WithCancel(ctx)
	gaveUp := make(chan bool, 1)
	back := func(m *netmap.Map) bool {
		p, ok := m.PeerByID(peer)
		return !ok || p.Online == nil || *p.Online
	}
	go func() {
		m := s.AwaitMap(within, atLeast, back)
		for waited := atLeast; waited < atMost && !back(m) && within.Err() == nil && !s.isAway(m, peer); waited += awayCheck {
			m = s.AwaitMap(within, awayCheck, back)
		}
		offline := !back(m) && within.Err() == nil
		if offline {
			cancel()
		}
		gaveUp <- offline
	}()
	return within, func() bool {
		cancel()
		return <-gaveUp
	}
}

// isAway reports whether a peer is known not to be at its relay, and no direct
// path to it works.
func (s *Session) isAway(m *netmap.Map, peer wire.NodeID) bool {
	p, ok := m.PeerByID(peer)
	if !ok {
		return false
	}
	st := s.engine.Load().PathTo(p.Key)
	return st.Away && !st.Trusted
}
