package server

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

// suspended reports whether the user of a node is suspended: such a node keeps
// what it is, but is no member, and no request of it is served. Server.mu is
// held.
func (s *Server) suspended(n *store.Node) bool { return !s.users[n.User].Suspended.IsZero() }

// outAt reports whether a node is no member at a moment. Server.mu is held.
func (s *Server) outAt(n *store.Node, now time.Time) bool {
	return expiredAt(n.Expires, now) || s.suspended(n)
}

func (s *Server) adminSuspendUser(r *http.Request) (any, error) { return s.suspendOrResume(r, true) }
func (s *Server) adminResumeUser(r *http.Request) (any, error)  { return s.suspendOrResume(r, false) }

func (s *Server) suspendOrResume(r *http.Request, suspend bool) (any, error) {
	wait, err := waitFor(r)
	if err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	rec, err := s.suspendUser(r.Context(), actor(r), name, suspend, wait > 0)
	if err != nil {
		return nil, err
	}
	told := s.await(r.Context(), rec, wait)
	s.mu.Lock()
	defer s.mu.Unlock()
	u, ok := s.userByName(name)
	if !ok {
		return nil, fmt.Errorf("user %q: %w", clip(name), store.ErrNotFound)
	}
	out := s.adminUser(u)
	out.Applied = told
	return out, nil
}

// SuspendUser cuts off all nodes of a user at once and refuses them and the
// user's keys, until it is called again with suspend false: then the nodes are
// what they were. Nodes with tags belong to no user and go on. The error is
// store.ErrNotFound if there is no such user.
func (s *Server) SuspendUser(ctx context.Context, by, name string, suspend bool) error {
	_, err := s.suspendUser(ctx, by, name, suspend, false)
	return err
}

func (s *Server) suspendUser(ctx context.Context, by, name string, suspend, wait bool) (*receipt, error) {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	u, ok := s.userByName(name)
	var ids []wire.NodeID
	for id, n := range s.nodes.byID {
		if ok && n.User == u.ID {
			ids = append(ids, id)
		}
	}
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("user %q: %w", clip(name), store.ErrNotFound)
	}
	return s.withdraw(ids, wait, func() error {
		u, err := s.store.SuspendUser(context.WithoutCancel(ctx), by, u.ID, suspend, s.cfg.Now())
		if err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.users[u.ID] = u
		for _, id := range ids {
			if n := s.nodes.byID[id]; n != nil {
				s.reconsider(n, wire.CodeUserSuspended)
			}
		}
		return nil
	})
}

// reconsider makes a node a member, or none, as its key and its user now have
// it; code is why it is none. opMu and Server.mu are held.
func (s *Server) reconsider(n *node, code wire.ErrorCode) {
	now := s.cfg.Now()
	switch out := s.outAt(&n.Node, now); {
	case out && !n.expired:
		// It was told so: no grace.
		n.online, n.offlineAt, n.LastSeen = presenceOffline, time.Time{}, now
		s.unsaved[n.ID] = struct{}{}
		s.expire(n, code)
	case !out && n.expired:
		n.expired = false
		s.member(n.Key, true)
		s.entitle(n)
	}
	s.changed(n)
	s.scheduleNode(n)
}

// active refuses a user who is suspended. Server.mu is held.
func active(u store.User) error {
	if u.Suspended.IsZero() {
		return nil
	}
	return fmt.Errorf("%w: user %q is suspended: `mesh user resume %s` ends that", store.ErrConflict, u.Name, u.Name)
}
