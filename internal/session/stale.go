package session

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"mesh/internal/engine"
	"mesh/internal/netmap"
)

// ErrStale reports that the node has not heard of its control server for longer
// than it may: what it knows may be revoked by now, and is not acted upon.
var ErrStale = errors.New("cut off: the control server was not heard for longer than is allowed")

// ErrNotApproved reports that the control server knows the node but an
// administrator has not let it in yet.
var ErrNotApproved = errors.New("this node waits for an administrator to approve it at its control server")

// Bounds on how often a node that may not be stale looks whether it is.
const (
	staleLookLeast = 10 * time.Millisecond
	staleLookMost  = clockCheck
)

// maxStale is how long the node may go on without its control server: what its
// owner or its policy says, whichever is shorter; 0 = for ever.
func (s *Session) maxStale(m *netmap.Map) time.Duration {
	own, theirs := s.cfg.MaxStale, m.MaxStale()
	if own == 0 || theirs != 0 && theirs < own {
		return theirs
	}
	return own
}

// age is the time from then to now. A clock may be set, which the monotonic one
// is not, and that stands still while the machine sleeps: the longer counts.
func age(then, now time.Time) time.Duration {
	return max(now.Sub(then), now.Round(0).Sub(then.Round(0)))
}

// checkStale takes the node out of use as far as the age of what it knows asks
// for, and back when the control server is there. It returns when to look again,
// zero for not before there is another map. Only expiryWatch calls it.
func (s *Session) checkStale(e *enrolment, m *netmap.Map, now time.Time) time.Time {
	limit := s.maxStale(m)
	if limit == 0 {
		if s.isStale() != nil {
			s.setStale(nil, engine.Unrestricted)
		}
		return time.Time{}
	}
	old := age(e.lastHeard(), now)
	// One that has nothing to say is silent for up to a minute, one that died may
	// be so for two before its connection counts as lost.
	if old > limit/2 {
		s.mu.Lock()
		ask := s.ask
		s.mu.Unlock()
		if ask != nil {
			ask()
		}
	}
	next := min(limit/8, staleLookMost)
	switch {
	case old <= limit:
		s.setStale(nil, engine.Unrestricted)
		next = min(next, limit-old+1)
	case old <= limit+limit/4:
		s.setStale(s.staleFor(old, limit), engine.NothingNew)
		next = min(next, limit+limit/4-old+1)
	default:
		s.setStale(s.staleFor(old, limit), engine.Nothing)
	}
	return now.Add(max(staleLookLeast, next))
}

// isStale returns why the node is cut off, nil if it is not.
func (s *Session) isStale() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stale
}

func (s *Session) staleFor(old, limit time.Duration) error {
	err := fmt.Errorf("%w (%v; %v are allowed)", ErrStale, old.Round(time.Second), limit)
	if t := s.Trouble(); t != nil {
		err = fmt.Errorf("%w: %w", err, t)
	}
	return err
}

// setStale says why the node is cut off, nil if it is not.
func (s *Session) setStale(why error, to engine.Restriction) {
	s.mu.Lock()
	news := (why == nil) != (s.stale == nil)
	s.stale = why
	if news {
		s.turn()
	}
	s.mu.Unlock()
	if news && why != nil {
		s.log.Warn("no new connections", zap.Error(why))
	}
	s.engine.Load().Restrict(to, why)
}

// lastHeard is when the control server was last heard, or what is known of it
// was saved.
func (e *enrolment) lastHeard() time.Time {
	if e.client != nil {
		if at := e.client.LastHeard(); at.After(e.savedAt) {
			return at
		}
	}
	return e.savedAt
}

// admit takes note of whether an administrator has approved the node, and
// reports it. Until that is so it is of no use.
func (s *Session) admit(m *netmap.Map) bool {
	approved := m.Self().MachineAuthorized
	waits := errors.Is(s.isBarred(), ErrNotApproved)
	switch {
	case !approved && !waits:
		s.bar(ErrNotApproved)
		s.log.Warn(ErrNotApproved.Error())
		s.engine.Load().CutAll(ErrNotApproved)
	case approved && waits:
		s.bar(nil)
	}
	return approved
}
