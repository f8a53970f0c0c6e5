package server

import (
	"container/heap"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
)

// deadlines is a heap of nodes by the moment at which they should be looked at.
// Looking too early changes nothing. Guarded by Server.mu.
type deadlines []*node

func (d deadlines) Len() int           { return len(d) }
func (d deadlines) Less(i, j int) bool { return d[i].due.Before(d[j].due) }
func (d deadlines) Swap(i, j int) {
	d[i], d[j] = d[j], d[i]
	d[i].place, d[j].place = i+1, j+1
}

// Push and Pop implement heap.Interface.
func (d *deadlines) Push(x any) {
	n := x.(*node)
	*d = append(*d, n)
	n.place = len(*d)
}

// Pop implements heap.Interface.
func (d *deadlines) Pop() any {
	old := *d
	n := old[len(old)-1]
	old[len(old)-1] = nil
	*d = old[:len(old)-1]
	n.place = 0
	return n
}

// drop takes a node out, if it is in.
func (d *deadlines) drop(n *node) {
	if n.place > 0 {
		heap.Remove(d, n.place-1)
	}
}

// neverPolled is how many times the EphemeralTimeout an ephemeral node has
// from its registration to its first poll.
const neverPolled = 10

// removalAt is when an ephemeral node has been silent for too long; zero =
// never. Server.mu is held.
func (s *Server) removalAt(n *node) time.Time {
	switch {
	case !n.Ephemeral || n.stream != nil || s.away(n):
		return time.Time{}
	case n.Polled:
		return n.idleSince.Add(s.cfg.EphemeralTimeout)
	default:
		return n.idleSince.Add(neverPolled * s.cfg.EphemeralTimeout)
	}
}

// scheduleNode has the janitor look at n when something is due. Server.mu is
// held.
func (s *Server) scheduleNode(n *node) {
	var next time.Time
	consider := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	consider(n.offlineAt)
	consider(n.formerUntil)
	consider(s.removalAt(n))
	if n.parked != nil {
		consider(n.parkedUntil())
	}
	if !n.expired {
		consider(n.Expires)
	}
	if next.IsZero() {
		s.deadline.drop(n)
		return
	}
	n.due = next
	if n.place > 0 {
		heap.Fix(&s.deadline, n.place-1)
	} else {
		heap.Push(&s.deadline, n)
	}
	if s.deadline[0] == n {
		s.wakeJanitor()
	}
}

// clockStep is more than a clock is off between two looks if nobody set it.
const clockStep = 2 * time.Second

// janitor does what is due: nodes and relays that went silent, keys that expire,
// reports to store.
func (s *Server) janitor() {
	flush := time.NewTicker(max(s.cfg.FlushInterval, time.Millisecond))
	defer flush.Stop()
	due := time.NewTimer(0)
	defer due.Stop()
	last := s.cfg.Now().Round(0) // by the wall clock
	for {
		flushing := false
		select {
		case <-s.ctx.Done():
			return
		case <-s.kick: // a deadline or a grant came that is the next one
		case <-due.C:
		case <-flush.C:
			flushing = true
		}
		now := s.cfg.Now().Round(0)
		ahead := now.Sub(last) > s.cfg.FlushInterval+clockStep
		if now.Sub(last) < -clockStep {
			s.clockSetBack()
		}
		last = now
		if flushing {
			s.shared.age(now)
			if err := s.flush(s.ctx); err != nil && s.ctx.Err() == nil {
				s.log.Error("what nodes report could not be stored", zap.Error(err))
			}
			if !ahead {
				continue
			}
		}
		due.Reset(min(max(s.lookAtDue(), 0), time.Hour))
	}
}

// clockSetBack lets nodes in again whose keys expired because the clock was ahead. Work for all nodes,
// but clocks are not set every day.
func (s *Server) clockSetBack() {
	s.log.Warn("the clock was set back")
	s.opMu.Lock()
	defer s.opMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.nodes.byID {
		if n.expired {
			s.reconsider(n, wire.CodeNodeKeyExpired)
		} else {
			s.scheduleNode(n)
		}
	}
}

// lookAtDue handles all deadlines that passed and returns the time to the next.
func (s *Server) lookAtDue() time.Duration {
	var remove, expire []wire.NodeID
	now := s.cfg.Now()
	s.mu.Lock()
	wait := time.Hour
	for len(s.deadline) > 0 {
		n := s.deadline[0]
		if d := n.due.Sub(now); d > 0 {
			wait = d
			break
		}
		heap.Pop(&s.deadline)
		if !n.offlineAt.IsZero() && !n.offlineAt.After(now) {
			n.online, n.offlineAt = presenceOffline, time.Time{}
			if n.advertises() {
				s.entitle(n) // another router takes over
			}
		}
		if !n.formerUntil.IsZero() && !n.formerUntil.After(now) {
			s.dropFormer(n)
		}
		if !n.parkedUntil().After(now) {
			n.parked = nil
		}
		s.changed(n)
		if !n.expired && expiredAt(n.Expires, now) {
			expire = append(expire, n.ID) // which looks at the rest again
			continue
		}
		if at := s.removalAt(n); !at.IsZero() && !at.After(now) {
			remove = append(remove, n.ID)
			continue
		}
		s.scheduleNode(n)
	}
	s.mu.Unlock()
	for _, id := range expire {
		s.expireDue(id)
	}
	// The store commits them together.
	var idle sync.WaitGroup
	slots := make(chan struct{}, maxRemovals)
	for _, id := range remove {
		slots <- struct{}{}
		idle.Go(func() {
			s.removeIdle(id)
			<-slots
		})
	}
	idle.Wait()
	return min(wait, s.endGrants(now), s.endLeases(now))
}

// expireDue ends the membership of a node whose key has expired.
func (s *Server) expireDue(id wire.NodeID) {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return
	}
	if !n.expired && expiredAt(n.Expires, s.cfg.Now()) {
		s.expire(n, wire.CodeNodeKeyExpired)
	}
	s.scheduleNode(n)
}

// expire ends a node's membership for as long as it has no new key: peers and
// relays hear of it, its stream ends with code and no filter lets it in. opMu
// and Server.mu are held.
func (s *Server) expire(n *node, code wire.ErrorCode) {
	n.expired = true
	if n.stream != nil {
		n.stream.end(code)
	}
	s.dropFormer(n)
	s.member(n.Key, false)
	s.changed(n)
	s.entitle(n)
}

// entitle has the policy look at what n is now, and tells those whom that
// concerns. opMu and Server.mu are held.
func (s *Server) entitle(n *node) {
	p := s.policyNode(n, s.policy.base)
	routes := len(n.routed) > 0 || len(p.Routes) > 0
	if !slices.Equal(n.routed, p.Routes) {
		if n.routed = p.Routes; n.stream != nil {
			n.stream.pending.self = true
			n.stream.poke()
		}
	}
	affected := s.policy.compiled.Upsert(p)
	s.affected(n.ID, affected)
	if routes {
		s.rerouted(affected)
	}
	s.shadow.upsert(p)
}

// rerouted tells nodes to look at all their peers: a route may lead to another
// of them now. Server.mu is held.
func (s *Server) rerouted(ids []wire.NodeID) {
	for _, id := range ids {
		if n := s.nodes.byID[id]; n != nil && n.stream != nil {
			n.stream.pending.all = true
			n.stream.pending.self = n.stream.pending.self || len(n.routed) > 0
			n.stream.poke()
		}
	}
}

// maxRemovals is how many silent nodes are removed at a time.
const maxRemovals = 64

// removeIdle removes an ephemeral node that is still silent.
func (s *Server) removeIdle(id wire.NodeID) {
	now := s.cfg.Now()
	err := s.leave(s.ctx, "server", id, func(n *node) bool {
		at := s.removalAt(n)
		return !at.IsZero() && !at.After(now)
	})
	if err != nil && s.ctx.Err() == nil {
		s.log.Error("ephemeral node could not be removed", zap.Int64("node", int64(id)), zap.Error(err))
		s.mu.Lock()
		if n := s.nodes.byID[id]; n != nil {
			n.idleSince = now // once more, later
			s.scheduleNode(n)
		}
		s.mu.Unlock()
	}
}

// leave removes a node that goes of itself, if is holds for it. Many may leave
// at a time, unless a grant names the node.
func (s *Server) leave(ctx context.Context, by string, id wire.NodeID, is func(*node) bool) error {
	decide := func() (ok, named bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		n := s.nodes.byID[id]
		return n != nil && is(n), s.isNamed(id)
	}
	s.catchUp()
	s.opMu.RLock()
	ok, named := decide()
	if !ok || !named {
		defer s.opMu.RUnlock()
		if !ok {
			return nil
		}
		err := s.store.RemoveNode(context.WithoutCancel(ctx), by, id, false, s.cfg.Now())
		if err == nil {
			s.forget(id, false)
		}
		if errors.Is(err, store.ErrNotFound) {
			return nil // it left twice
		}
		return err
	}
	s.opMu.RUnlock()
	s.lockOps()
	defer s.opMu.Unlock()
	if ok, _ := decide(); !ok {
		return nil
	}
	return s.remove(ctx, by, id, false)
}

// remove forgets a node, in the store and everywhere. With bury its key stays
// refused as removed by an administrator. opMu is held.
func (s *Server) remove(ctx context.Context, by string, id wire.NodeID, bury bool) error {
	if err := s.store.RemoveNode(context.WithoutCancel(ctx), by, id, bury, s.cfg.Now()); err != nil {
		return err
	}
	s.forget(id, bury)
	s.endGrantsOf(id)
	return nil
}

// forget is remove without the store, for a node that no grant names. A share of
// opMu is held.
func (s *Server) forget(id wire.NodeID, bury bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return
	}
	s.dropFormer(n)
	viewers := s.policy.compiled.Visible(id)
	affected := s.policy.compiled.Remove(id)
	s.shadow.remove(n)
	s.nodes.remove(n)
	s.deadline.drop(n)
	delete(s.unsaved, id)
	s.excuse(id)
	delete(s.replica.claims, id)
	if n.stream != nil {
		code := wire.CodeNodeUnknown
		if bury {
			code = wire.CodeNodeRevoked
			// Stock nodes do not know the code; an expired key they understand.
			last := s.selfNode(n)
			last.Expired, last.KeyExpiry = true, s.cfg.Now()
			n.stream.pending.last = last
		}
		n.stream.end(code)
	}
	s.member(n.Key, false)
	hide := func(st *stream) { st.left(id) }
	if bury {
		hide = func(st *stream) { st.peer(id, false) }
	}
	for _, v := range viewers {
		if v := s.nodes.byID[v]; v != nil && v.stream != nil {
			hide(v.stream)
		}
	}
	for _, v := range affected {
		if v := s.nodes.byID[v]; v != nil && v.stream != nil {
			v.stream.pending.filter = true
			hide(v.stream)
		}
	}
	if len(n.routed) > 0 {
		s.rerouted(affected)
	}
}

// flush stores what nodes reported since the last time.
func (s *Server) flush(ctx context.Context) error {
	s.replica.reports.Lock()
	defer s.replica.reports.Unlock()
	s.mu.Lock()
	states := make(map[wire.NodeID]store.NodeState, len(s.unsaved))
	for id := range s.unsaved {
		if n := s.nodes.byID[id]; n != nil {
			states[id] = n.NodeState
		}
	}
	clear(s.unsaved)
	claims := s.replica.claims
	s.replica.claims = make(map[wire.NodeID]bool)
	s.mu.Unlock()
	s.removeLogins(ctx)
	var err error
	if s.replica.store != nil {
		err = s.replica.store.SaveReports(ctx, states, claims)
	} else {
		err = s.store.SaveStates(ctx, states)
	}
	if err != nil {
		s.mu.Lock()
		for id := range states {
			s.unsaved[id] = struct{}{}
		}
		maps.Copy(s.replica.claims, claims)
		s.mu.Unlock()
	}
	return err
}
