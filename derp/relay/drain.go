package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"time"

	"mesh/derp"
)

const (
	// A relay that everybody has left is still there for packets of those who
	// have not heard of it: until there were none for lull, within limits.
	lull      = 300 * time.Millisecond
	settleMin = 500 * time.Millisecond
	settleMax = 3 * time.Second
	// drainCheck bounds how often the clients are counted while many leave.
	drainCheck = 20 * time.Millisecond
)

// Drain prepares the end of the relay: it tells every client, and those that
// log in from now on, to look for another one, and passes packets on as before,
// until no client calls this relay its home any more and packets for those that
// moved have stopped coming, or until ctx ends. Close should follow, or
// another Drain with the same notice, which waits on. back says when the relay is expected to
// be there again, tryFor for how long after that it is worth to try; 0 is
// unknown. Drain returns how many connections still call this relay home:
// those of clients that have no other relay, or do not listen.
func (s *Server) Drain(ctx context.Context, back, tryFor time.Duration) int {
	notice := make([]byte, 8)
	binary.BigEndian.PutUint32(notice, milliseconds(back))
	binary.BigEndian.PutUint32(notice[4:], milliseconds(tryFor))
	s.mu.Lock()
	if !bytes.Equal(s.notice, notice) {
		s.notice = notice
		for _, p := range s.peers {
			for _, c := range p.sessions {
				c.conn.EnqueueControl(derp.FrameRestarting, notice)
			}
		}
	}
	waiting := s.homesLocked()
	s.mu.Unlock()
	if waiting == 0 {
		return 0
	}
	t := time.NewTicker(drainCheck)
	defer t.Stop()
	for waiting > 0 {
		select {
		case <-ctx.Done():
			return waiting
		case <-s.ctx.Done():
			return waiting
		case <-t.C:
		}
		s.mu.RLock()
		waiting = s.homesLocked()
		s.mu.RUnlock()
	}
	began, quiet, passed := time.Now(), time.Now(), s.passed()
	for time.Since(quiet) < lull || time.Since(began) < settleMin {
		select {
		case <-ctx.Done():
			return 0
		case <-s.ctx.Done():
			return 0
		case <-t.C:
		}
		if n := s.passed(); n != passed && time.Since(began) < settleMax-lull {
			quiet, passed = time.Now(), n
		}
	}
	return 0
}

// homesLocked counts the connections of clients whose home this relay is.
func (s *Server) homesLocked() int {
	n := 0
	for _, p := range s.peers {
		for _, c := range p.sessions {
			if c.home.Load() {
				n++
			}
		}
	}
	return n
}

func milliseconds(d time.Duration) uint32 {
	return uint32(min(max(d.Milliseconds(), 0), math.MaxUint32))
}
