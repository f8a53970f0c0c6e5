package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"mesh/control/policy"
	"mesh/control/store"
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
	parsed   *policy.Policy // nil = none
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
		s.policy.compiled = policy.Compile(nil, s.policyNodes())
		return nil
	case err != nil:
		return err
	}
	parsed, err := policy.Parse([]byte(p.Text))
	if err != nil {
		return fmt.Errorf("stored policy %d: %w", p.Version, err)
	}
	s.policy = policyState{Policy: p, parsed: parsed, compiled: policy.Compile(parsed, s.policyNodes())}
	// It may have come from a file, or nodes may have gone since: it stays in
	// force, since a mesh without policy would help nobody.
	for _, f := range s.policy.compiled.Test(s.policyUsers()) {
		s.log.Warn("the policy's own tests do not hold", zap.Error(f))
	}
	return nil
}

// policyNodes describes all nodes. Server.mu is held.
func (s *Server) policyNodes() []policy.Node {
	nodes := make([]policy.Node, 0, len(s.nodes.byID))
	for _, n := range s.nodes.byID {
		nodes = append(nodes, s.policyNode(n))
	}
	return nodes
}

// SetPolicy checks a policy, runs its own tests, stores it as the next version
// and brings it in force: every node hears what changes for it, and nothing
// else. expect is the version it replaces, or -1 for any; store.ErrConflict says that there is a
// newer one. Errors of the policy itself match ErrPolicy.
func (s *Server) SetPolicy(ctx context.Context, by, text string, expect int64) (PolicyState, error) {
	parsed, err := policy.Parse([]byte(text))
	if err != nil {
		return PolicyState{}, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	s.opMu.Lock()
	defer s.opMu.Unlock()
	compiled, err := s.tryPolicy(parsed)
	if err != nil {
		return PolicyState{}, err
	}
	p, err := s.store.SetPolicy(context.WithoutCancel(ctx), by, text, expect, s.cfg.Now())
	if err != nil {
		return PolicyState{}, err
	}
	s.mu.Lock()
	s.policy = policyState{Policy: p, parsed: parsed, compiled: compiled}
	s.renewProfiles()
	for _, n := range s.nodes.byID {
		if n.stream != nil {
			n.stream.pending.all, n.stream.pending.filter = true, true
			n.stream.poke()
		}
	}
	s.mu.Unlock()
	return s.PolicyState(), nil
}

// tryPolicy compiles a policy for the nodes that there are and runs its own
// tests. Nodes come, go, expire and change owner under opMu only: as long as
// that is held the result stays true.
func (s *Server) tryPolicy(p *policy.Policy) (*policy.Compiled, error) {
	s.mu.Lock()
	nodes, users := s.policyNodes(), s.policyUsers()
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
