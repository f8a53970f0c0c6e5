package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
)

// Limits of access for a time.
const (
	maxGrantTime = 366 * 24 * time.Hour
	maxGrants    = 1000 // in force
	maxReason    = 500  // bytes
	maxSelectors = 100  // of a grant, on each side
)

// endRetry is when to try again to put the end of a grant on record.
const endRetry = 10 * time.Second

// grant is access in force. It is guarded by Server.mu.
type grant struct {
	store.Grant
	// over says that its time has ended: it does not count any more, but the
	// store could not be told yet. retry is when to try again.
	over  bool
	retry time.Time
}

// temporary returns what the grants in force add to the policy, in the order of
// their IDs. It takes Server.mu.
func (s *Server) temporary() []policy.Temporary {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.temporaries()
}

// temporaries is temporary for who holds Server.mu.
func (s *Server) temporaries() []policy.Temporary {
	var out []policy.Temporary
	for _, id := range s.grantIDs() {
		if g := s.grants[id]; !g.over {
			out = append(out, temporaryOf(&g.Grant))
		}
	}
	return out
}

func (s *Server) grantIDs() []int64 {
	ids := make([]int64, 0, len(s.grants))
	for id := range s.grants {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func temporaryOf(g *store.Grant) policy.Temporary {
	return policy.Temporary{ID: strconv.FormatInt(g.ID, 10), Src: g.Src, Dst: g.Dst, IP: g.IP, Reason: g.Reason, Until: g.Until}
}

// loadGrants puts the stored grants beside the policy. Those that do not fit it,
// because it came from a file meanwhile, stay without effect. Server.mu is held;
// nobody else has the server yet.
func (s *Server) loadGrants() {
	now := s.cfg.Now()
	var fit []policy.Temporary
	for _, id := range s.grantIDs() {
		g := s.grants[id]
		if !g.Until.After(now) {
			g.over = true // the janitor tells the store
			continue
		}
		t := temporaryOf(&g.Grant)
		if s.policy.base == nil {
			break
		}
		if _, err := s.policy.base.With([]policy.Temporary{t}); err != nil {
			s.log.Warn("a grant does not fit the policy and has no effect", zap.Int64("grant", id), zap.Error(err))
			delete(s.grants, id)
			continue
		}
		fit = append(fit, t)
	}
	if len(fit) > 0 {
		if with, err := s.policy.base.With(fit); err == nil {
			s.apply(with)
		}
	}
}

// AddGrant gives access for a time, beside the policy: at once, and until then.
// The error matches admin.ErrInvalid if it makes no sense.
func (s *Server) AddGrant(ctx context.Context, by string, in admin.GrantAdd) (store.Grant, error) {
	switch {
	case in.For <= 0 || in.For > maxGrantTime:
		return store.Grant{}, fmt.Errorf("%w: give a time up to a year", errInvalid)
	case len(in.Src) > maxSelectors || len(in.Dst) > maxSelectors || len(in.IP) > maxSelectors:
		return store.Grant{}, fmt.Errorf("%w: more than %d sources, destinations or ports", errInvalid, maxSelectors)
	case len(in.Reason) > maxReason || strings.ContainsFunc(in.Reason, func(r rune) bool { return r < ' ' }):
		return store.Grant{}, fmt.Errorf("%w: the reason is a line of at most %d bytes", errInvalid, maxReason)
	}
	s.lockOps()
	defer s.opMu.Unlock()
	now := s.cfg.Now()
	g := store.Grant{IP: in.IP, Asked: [3][]string{in.Src, in.Dst, in.IP}, Reason: in.Reason, Author: by, Created: now, Until: now.Add(in.For)}
	s.mu.Lock()
	base, count := s.policy.base, len(s.grants)
	if base != nil {
		g.Src = s.meant(base, in.Src, &g.Nodes)
		g.Dst = s.meant(base, in.Dst, &g.Nodes)
	}
	have := s.temporaries()
	s.mu.Unlock()
	switch {
	case base == nil:
		return store.Grant{}, fmt.Errorf("%w: there is no policy; set one first", errInvalid)
	case count >= maxGrants:
		return store.Grant{}, fmt.Errorf("%w: there are %d grants already", store.ErrConflict, count)
	}
	// Its ID is not known yet; one that no grant has will do.
	t := temporaryOf(&g)
	if _, err := base.With([]policy.Temporary{t}); err != nil {
		return store.Grant{}, fmt.Errorf("%w: %s", errInvalid, strings.ReplaceAll(err.Error(), "temp[0]: ", ""))
	}
	g, err := s.store.AddGrant(context.WithoutCancel(ctx), g, now)
	if err != nil {
		return store.Grant{}, err
	}
	with, err := base.With(append(have, temporaryOf(&g)))
	if err != nil {
		return store.Grant{}, fmt.Errorf("%w: %w", errInvalid, err)
	}
	s.mu.Lock()
	s.grants[g.ID] = &grant{Grant: g}
	s.apply(with)
	s.mu.Unlock()
	s.wakeJanitor()
	return g, nil
}

// meant puts addresses in place of the names of nodes, and notes which nodes
// these are. What the policy language knows by itself goes first. Server.mu is
// held.
func (s *Server) meant(p *policy.Policy, selectors []string, nodes *[]wire.NodeID) (out []string) {
	for _, sel := range selectors {
		n, err := s.nodeByName(sel)
		probe := policy.Temporary{ID: "probe", Src: []string{sel}, Dst: []string{"*"}, IP: []string{"*"}, Until: time.Unix(1, 0)}
		_, unknown := p.With([]policy.Temporary{probe})
		if err != nil || unknown == nil && sel != n.IPv4.String() && sel != n.IPv6.String() {
			out = append(out, sel)
			continue
		}
		*nodes = append(*nodes, n.ID)
		out = append(out, n.IPv4.String(), n.IPv6.String())
	}
	return out
}

// RevokeGrant ends a grant before its time. Errors: store.ErrNotFound,
// store.ErrConflict if it has ended already.
func (s *Server) RevokeGrant(ctx context.Context, by string, id int64) (store.Grant, error) {
	s.lockOps()
	defer s.opMu.Unlock()
	g, err := s.store.EndGrant(context.WithoutCancel(ctx), by, id, "revoked", s.cfg.Now())
	if err != nil {
		return store.Grant{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.grants, id)
	s.regrant()
	return g, nil
}

// regrant brings the policy in force with the grants that are left. opMu and
// Server.mu are held.
func (s *Server) regrant() {
	if s.policy.base == nil {
		return
	}
	with, err := s.policy.base.With(s.temporaries())
	if err != nil {
		// They all fitted before. Without them nobody has too much.
		s.log.Error("grants do not fit the policy", zap.Error(err))
		with = s.policy.base
	}
	s.apply(with)
}

// nextGrant returns the time to when the next grant ends, or is to be tried
// again. Server.mu is held.
func (s *Server) nextGrant(now time.Time) time.Duration {
	wait := time.Hour
	for _, g := range s.grants {
		at := g.Until
		if g.over {
			at = g.retry
		}
		wait = min(wait, at.Sub(now))
	}
	return wait
}

// endGrants ends the grants whose time is over and returns the time to the
// next.
func (s *Server) endGrants(now time.Time) time.Duration {
	s.mu.Lock()
	wait := s.nextGrant(now)
	s.mu.Unlock()
	if wait > 0 {
		return wait
	}
	s.lockOps()
	defer s.opMu.Unlock()
	now = s.cfg.Now()
	return s.end(now, "over", func(g *grant) bool {
		return !g.over && !g.Until.After(now) || g.over && !g.retry.After(now)
	})
}

// endGrantsOf ends the grants that name a node which is gone. opMu is held.
func (s *Server) endGrantsOf(id wire.NodeID) {
	s.end(s.cfg.Now(), "a node that it names was removed", func(g *grant) bool { return slices.Contains(g.Nodes, id) })
}

// isNamed reports whether a grant names a node. Server.mu is held.
func (s *Server) isNamed(id wire.NodeID) bool {
	for _, g := range s.grants {
		if slices.Contains(g.Nodes, id) {
			return true
		}
	}
	return false
}

// end ends grants: first for the nodes, then on record. opMu is held.
func (s *Server) end(now time.Time, why string, which func(*grant) bool) time.Duration {
	s.mu.Lock()
	var ids []int64
	changed := false
	for _, id := range s.grantIDs() {
		if g := s.grants[id]; which(g) {
			ids = append(ids, id)
			changed = changed || !g.over
			g.over, g.retry = true, now.Add(endRetry)
		}
	}
	if changed {
		s.regrant()
	}
	s.mu.Unlock()
	for _, id := range ids {
		_, err := s.store.EndGrant(context.WithoutCancel(s.ctx), "server", id, why, now)
		if err != nil && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrNotFound) {
			s.log.Error("the end of a grant could not be put on record", zap.Int64("grant", id), zap.Error(err))
			continue
		}
		s.mu.Lock()
		delete(s.grants, id)
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nextGrant(now)
}

// wakeJanitor has the janitor look at what is due.
func (s *Server) wakeJanitor() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func adminGrant(g store.Grant) admin.Grant {
	return admin.Grant{
		ID: g.ID, From: g.Asked[0], To: g.Asked[1], Src: g.Src, Dst: g.Dst, IP: g.IP, Reason: g.Reason, Author: g.Author,
		Created: g.Created, Until: g.Until, Ended: g.Ended, EndedBy: g.EndedBy, Why: g.Why,
	}
}

func (s *Server) adminGrants(r *http.Request) (any, error) {
	out := []admin.Grant{}
	if r.URL.Query().Get("all") != "" {
		list, err := s.store.Grants(r.Context(), true, maxGrants)
		for _, g := range list {
			out = append(out, adminGrant(g))
		}
		return out, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range s.grantIDs() {
		if g := s.grants[id]; !g.over {
			out = append(out, adminGrant(g.Grant))
		}
	}
	return out, nil
}

func (s *Server) adminAddGrant(r *http.Request) (any, error) {
	var in admin.GrantAdd
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	g, err := s.AddGrant(r.Context(), actor(r), in)
	if err != nil {
		return nil, err
	}
	return adminGrant(g), nil
}

func (s *Server) adminRevokeGrant(r *http.Request) (any, error) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: grant %q: want its number", errInvalid, clip(r.PathValue("id")))
	}
	g, err := s.RevokeGrant(r.Context(), actor(r), id)
	if err != nil {
		return nil, err
	}
	return adminGrant(g), nil
}
