package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"mesh/control/admin"
	"mesh/control/wire"
)

// Bounds on waiting until a withdrawal is in force.
const (
	maxAppliedWait = 25 * time.Second // less than an admin answer may take
	maxMissing     = 100              // names in an answer
)

// receipt is the wait for nodes to have a withdrawal in force. It is guarded by
// Server.mu.
type receipt struct {
	version int64
	since   time.Time
	open    map[wire.NodeID]string // who has not said so yet, by name
	done    chan struct{}          // closed when open is empty
	told    admin.Applied
}

// receipts are those that somebody waits for. It is guarded by Server.mu.
type receipts struct {
	version int64 // of the newest; grows also over restarts
	open    map[*receipt]struct{}
}

// withdraw does what cuts the given nodes off. If somebody will wait, it returns
// the receipt of all connected nodes that can see one of them; only these are
// asked, and only then. opMu is held.
func (s *Server) withdraw(ids []wire.NodeID, wait bool, do func() error) (*receipt, error) {
	if !wait {
		return nil, do()
	}
	r := &receipt{since: time.Now(), open: make(map[wire.NodeID]string), done: make(chan struct{})}
	s.mu.Lock()
	s.receipts.version = max(s.receipts.version+1, s.cfg.Now().UnixNano())
	r.version = s.receipts.version
	mute, elsewhere := make(map[wire.NodeID]struct{}), make(map[wire.NodeID]struct{})
	for _, id := range ids {
		for _, v := range s.policy.compiled.Visible(id) {
			n := s.nodes.byID[v]
			switch {
			case n == nil || slices.Contains(ids, v):
			case s.away(n):
				elsewhere[v] = struct{}{}
			case n.stream == nil:
			case n.stream.reports:
				r.open[v] = n.Name
			default:
				mute[v] = struct{}{}
			}
		}
	}
	r.told.Peers, r.told.Mute, r.told.Elsewhere = len(r.open), len(mute), len(elsewhere)
	s.mu.Unlock()
	if err := do(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(r.open) == 0 {
		close(r.done)
		return r, nil
	}
	s.receipts.open[r] = struct{}{}
	for id := range r.open {
		if n := s.nodes.byID[id]; n != nil && n.stream != nil && n.stream.reports {
			n.stream.pending.version = r.version
			n.stream.poke()
		}
	}
	return r, nil
}

// owed is the version that a node which connects anew has to report, 0 = none.
// Server.mu is held.
func (s *Server) owed(id wire.NodeID) (version int64) {
	for r := range s.receipts.open {
		if _, ok := r.open[id]; ok {
			version = max(version, r.version)
		}
	}
	return version
}

// applied notes which version of the map is in force at a node. Server.mu is
// held.
func (s *Server) applied(id wire.NodeID, version int64) {
	for r := range s.receipts.open {
		name, waits := r.open[id]
		if !waits || version < r.version {
			continue
		}
		r.told.Applied++
		if took := time.Since(r.since); took >= r.told.Slowest {
			r.told.Slowest, r.told.SlowestNode = took, name
		}
		s.settle(r, id)
	}
}

// settle takes a node out of a receipt. Server.mu is held.
func (s *Server) settle(r *receipt, id wire.NodeID) {
	if delete(r.open, id); len(r.open) == 0 {
		delete(s.receipts.open, r)
		close(r.done)
	}
}

// excuse takes a node that is no more out of all receipts. Server.mu is held.
func (s *Server) excuse(id wire.NodeID) {
	for r := range s.receipts.open {
		if _, ok := r.open[id]; ok {
			r.told.Peers--
			s.settle(r, id)
		}
	}
}

// await waits until a withdrawal is in force everywhere, and tells how far it is
// when that or the time is over. A nil receipt gives nil.
func (s *Server) await(ctx context.Context, r *receipt, limit time.Duration) *admin.Applied {
	if r == nil {
		return nil
	}
	over := time.NewTimer(limit)
	defer over.Stop()
	select {
	case <-r.done:
	case <-over.C:
	case <-ctx.Done():
	case <-s.ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.receipts.open, r)
	told := r.told
	for _, name := range r.open {
		told.Missing = append(told.Missing, name)
	}
	slices.Sort(told.Missing)
	told.Missing = told.Missing[:min(len(told.Missing), maxMissing)]
	return &told
}

// waitFor is how long a request wants to wait; 0 = not at all.
func waitFor(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("wait")
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > maxAppliedWait {
		return 0, fmt.Errorf("%w: wait: want a time up to %v", errInvalid, maxAppliedWait)
	}
	return d, nil
}
