package server

import (
	"context"
	"sync"
	"time"

	"mesh/identity"
)

// subscriber learns who is a member. What it still has to hear is a set: one
// that is slow hears the newest state, at once.
type subscriber struct {
	wake    chan struct{}                // buffered: pending is not empty
	pending map[identity.NodePublic]bool // true = member now; guarded by Server.mu
}

// Admit reports whether key belongs to a node that is a member: registered and
// not expired. A relay asks before it lets somebody in, and because the answer
// may change while it does so, once more when a removal could have been missed.
func (s *Server) Admit(key identity.NodePublic) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byKey[key]
	if n == nil {
		n = s.nodes.formers[key]
	}
	return n != nil && !n.expired && !expiredAt(n.Expires, s.cfg.Now())
}

// Members returns the keys of all members.
func (s *Server) Members() []identity.NodePublic {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.memberKeys()
}

func (s *Server) memberKeys() []identity.NodePublic {
	keys := make([]identity.NodePublic, 0, len(s.nodes.byKey)+len(s.nodes.formers))
	now := s.cfg.Now()
	for _, index := range []map[identity.NodePublic]*node{s.nodes.byKey, s.nodes.formers} {
		for k, n := range index {
			if !n.expired && !expiredAt(n.Expires, now) {
				keys = append(keys, k)
			}
		}
	}
	return keys
}

// dropFormer ends the membership of the key that a node had before, if it had
// one. Server.mu is held.
func (s *Server) dropFormer(n *node) {
	if n.former.IsZero() {
		return
	}
	s.member(n.former, false)
	delete(s.nodes.formers, n.former)
	n.former, n.formerUntil, n.unshown = identity.NodePublic{}, time.Time{}, false
}

// Subscribe calls f with all present members, and from then on at once with
// those that come and go, one call at a time. The function it returns ends
// that and waits for a call under way; it must not be called from f. Close ends
// all subscriptions.
func (s *Server) Subscribe(f func(added, removed []identity.NodePublic)) (cancel func()) {
	ctx, stop := context.WithCancel(s.ctx)
	sub, all := s.subscribe()
	var done sync.WaitGroup
	run := func() {
		defer s.unsubscribe(sub)
		f(all, nil)
		for {
			select {
			case <-ctx.Done():
				return
			case <-sub.wake:
			}
			if added, removed := s.membership(sub); len(added)+len(removed) > 0 {
				f(added, removed)
			}
		}
	}
	s.wg.Add(1)
	done.Go(func() {
		defer s.wg.Done()
		run()
	})
	return func() {
		stop()
		done.Wait()
	}
}

func (s *Server) subscribe() (*subscriber, []identity.NodePublic) {
	sub := &subscriber{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.members[sub] = struct{}{}
	return sub, s.memberKeys()
}

func (s *Server) unsubscribe(sub *subscriber) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.members, sub)
}

// membership takes what is pending for sub.
func (s *Server) membership(sub *subscriber) (added, removed []identity.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, in := range sub.pending {
		if in {
			added = append(added, k)
		} else {
			removed = append(removed, k)
		}
	}
	sub.pending = nil
	return added, removed
}

// member tells all subscribers about one key. Server.mu is held.
func (s *Server) member(key identity.NodePublic, in bool) {
	for sub := range s.members {
		if sub.pending == nil {
			sub.pending = make(map[identity.NodePublic]bool)
		}
		sub.pending[key] = in
		select {
		case sub.wake <- struct{}{}:
		default:
		}
	}
}
