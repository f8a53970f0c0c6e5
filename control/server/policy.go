package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
)

// PolicyState describes the policy in force.
type PolicyState struct {
	Version int64 // 0 = there is none
	Author  string
	Created time.Time
	// DenyAll is true as long as there is no policy: nobody may talk to
	// anybody.
	DenyAll bool
}

// policyState is the newest policy. It is guarded by Server.mu.
type policyState struct {
	store.Policy
	base     *policy.Policy // as its text says, nil = none
	parsed   *policy.Policy // with the grants beside it, nil = none
	compiled *policy.Compiled
}

func (p *policyState) tagOwner(u store.User, tag string) bool {
	return p.parsed != nil && u.Name != "" && p.parsed.OwnsTag(policy.User{Name: u.Name, Role: policyRole(u.Role)}, tag)
}

// PolicyState returns which policy is in force.
func (s *Server) PolicyState() PolicyState {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.policy
	return PolicyState{Version: p.Version, Author: p.Author, Created: p.Created, DenyAll: p.parsed == nil}
}

// loadPolicy brings the stored policy in force. Server.mu is held.
func (s *Server) loadPolicy(ctx context.Context) error {
	p, err := s.store.Policy(ctx)
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.log.Warn("there is no policy: nobody may talk to anybody; set one with `mesh policy set`")
	case err != nil:
		return err
	default:
		parsed, err := policy.Parse([]byte(p.Text))
		if err != nil {
			return fmt.Errorf("stored policy %d: %w", p.Version, err)
		}
		s.policy = policyState{Policy: p, base: parsed, parsed: parsed}
	}
	nodes := s.policyNodes(s.policy.base)
	for _, p := range nodes {
		s.nodes.byID[p.ID].routed = p.Routes
	}
	s.policy.compiled = policy.Compile(s.policy.base, nodes)
	if s.policy.base == nil {
		return nil
	}
	// It may have come from a file, or nodes may have gone since: it stays in
	// force, since a mesh without policy would help nobody.
	for _, f := range s.policy.compiled.Test(s.policyUsers()) {
		s.log.Warn("the policy's own tests do not hold", zap.Error(f))
	}
	return nil
}

// policyNodes describes all nodes, with the routes that a policy approves.
// Server.mu is held.
func (s *Server) policyNodes(base *policy.Policy) []policy.Node {
	nodes := make([]policy.Node, 0, len(s.nodes.byID))
	for _, n := range s.nodes.byID {
		nodes = append(nodes, s.policyNode(n, base))
	}
	return nodes
}

// SetPolicy checks a policy, runs its own tests, stores it as the next version
// and brings it in force: every node hears what changes for it, and nothing
// else. expect is the version it replaces, or -1 for any; store.ErrConflict says
// that there is a newer one. Errors of the policy itself match ErrPolicy.
func (s *Server) SetPolicy(ctx context.Context, by, text string, expect int64) (PolicyState, error) {
	return s.setPolicy(ctx, by, policyChange{text: text, expect: expect})
}

// policyChange is a policy on its way to be in force.
type policyChange struct {
	text   string
	note   string // where it comes from
	expect int64  // version it replaces, -1 = any
	guard  bool   // not if it leaves nobody anybody to reach
}

func (s *Server) setPolicy(ctx context.Context, by string, c policyChange) (PolicyState, error) {
	parsed, err := policy.Parse([]byte(c.text))
	if err != nil {
		return PolicyState{}, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	s.lockOps()
	defer s.opMu.Unlock()
	compiled, err := s.tryPolicy(parsed)
	if err != nil {
		return PolicyState{}, err
	}
	with, err := parsed.With(s.temporary())
	if err != nil {
		return PolicyState{}, fmt.Errorf("%w: it does not fit the grants in force: revoke these first: %w", ErrPolicy, err)
	}
	if c.guard && !s.connects(compiled) && s.connects(s.policy.compiled) {
		return PolicyState{}, fmt.Errorf("%w: nobody could reach anybody any more, and every connection would be cut", ErrPolicy)
	}
	p, err := s.store.SetPolicy(context.WithoutCancel(ctx), by, c.text, c.note, c.expect, s.cfg.Now())
	if err != nil {
		return PolicyState{}, err
	}
	s.mu.Lock()
	s.policy.Policy, s.policy.base = p, parsed
	s.apply(with)
	s.mu.Unlock()
	return s.PolicyState(), nil
}

// connects reports whether any node may talk to another.
func (s *Server) connects(c *policy.Compiled) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.nodes.byID {
		if len(c.Visible(id)) > 0 {
			return true
		}
	}
	return false
}

// apply brings a policy with its grants in force and tells those nodes that it
// concerns. opMu and Server.mu are held.
func (s *Server) apply(p *policy.Policy) {
	s.policy.parsed = p
	affected := s.policy.compiled.Replace(p)
	tell := func(id wire.NodeID) {
		if n := s.nodes.byID[id]; n != nil && n.stream != nil {
			n.stream.pending.all, n.stream.pending.filter = true, true
			n.stream.hurry()
		}
	}
	for _, id := range affected {
		tell(id)
	}
	// Whoever sees a node of a user learns of the user's groups.
	if users := s.renewProfiles(); len(users) > 0 {
		for _, n := range s.nodes.byID {
			if !users[wireUser(&n.Node)] {
				continue
			}
			tell(n.ID)
			for _, id := range s.policy.compiled.Visible(n.ID) {
				tell(id)
			}
		}
	}
	for _, n := range s.nodes.byID {
		if n.advertises() {
			s.entitle(n) // the policy approves other routes, perhaps
		}
	}
}

// tryPolicy compiles a policy for the nodes that there are and runs its own
// tests. opMu is held.
func (s *Server) tryPolicy(p *policy.Policy) (*policy.Compiled, error) {
	s.mu.Lock()
	nodes, users := s.policyNodes(p), s.policyUsers()
	s.mu.Unlock()
	compiled := policy.Compile(p, nodes)
	var errs []error
	for _, f := range compiled.Test(users) {
		errs = append(errs, f)
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrPolicy, errors.Join(errs...))
	}
	return compiled, nil
}

// ErrPolicy reports a policy that cannot be accepted; the error around it says
// where and why.
var ErrPolicy = errors.New("policy refused")
