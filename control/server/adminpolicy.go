package server

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/store"
)

func adminPolicyOf(p store.Policy) admin.Policy {
	return admin.Policy{Version: p.Version, Text: p.Text, Author: p.Author, Created: p.Created, Note: p.Note}
}

func (s *Server) adminPolicy(r *http.Request) (any, error) {
	if text := r.URL.Query().Get("version"); text != "" {
		version, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%w: version %q: want a number", errInvalid, clip(text))
		}
		p, err := s.store.PolicyVersion(r.Context(), version)
		if err != nil {
			return nil, err
		}
		return adminPolicyOf(p), nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return adminPolicyOf(s.policy.Policy), nil
}

// maxVersions bounds one answer.
const maxVersions = 1000

func (s *Server) adminPolicyVersions(r *http.Request) (any, error) {
	list, err := s.store.Policies(r.Context(), maxVersions)
	if err != nil {
		return nil, err
	}
	out := make([]admin.Policy, 0, len(list))
	for _, p := range list {
		out = append(out, adminPolicyOf(p))
	}
	return out, nil
}

// expected is the version that a writer has seen, -1 = any.
func expected(replaces *int64) (int64, error) {
	if replaces == nil {
		return -1, nil
	}
	if *replaces < 0 {
		return 0, fmt.Errorf("%w: version %d", errInvalid, *replaces)
	}
	return *replaces, nil
}

func (s *Server) adminRollback(r *http.Request) (any, error) {
	var in admin.PolicyRollback
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	expect, err := expected(in.Replaces)
	if err != nil {
		return nil, err
	}
	old, err := s.store.PolicyVersion(r.Context(), in.Version)
	if err != nil {
		return nil, err
	}
	note := fmt.Sprintf("rollback to version %d", in.Version)
	if _, err := s.setPolicy(r.Context(), actor(r), policyChange{text: old.Text, note: note, expect: expect}); err != nil {
		return nil, err
	}
	return s.adminPolicy(r)
}

// adminTopology describes the mesh as policies see it.
func (s *Server) adminTopology(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := admin.Topology{Users: []admin.TopologyUser{}, Nodes: make(map[string]admin.TopologyNode, len(s.nodes.byID))}
	for _, u := range s.users {
		out.Users = append(out.Users, admin.TopologyUser{ID: u.ID, Name: u.Name, Role: policyRole(u.Role)})
	}
	slices.SortFunc(out.Users, func(a, b admin.TopologyUser) int { return int(a.ID - b.ID) })
	for _, n := range s.nodes.byID {
		p := s.policyNode(n, s.policy.base)
		t := admin.TopologyNode{ID: n.ID, User: p.User, Tags: p.Tags, RoutableIPs: s.advertised(n), ApprovedRoutes: p.Routes, Offline: p.Offline}
		if len(p.Addrs) > 0 {
			t.IPv4, t.IPv6 = n.IPv4, n.IPv6
		}
		out.Nodes[n.Name] = t
	}
	return out, nil
}

// adminPolicyBody reads a policy and says what is odd about it.
func (s *Server) adminPolicyBody(r *http.Request) (in admin.PolicySet, parsed *policy.Policy, warnings []string, err error) {
	if err := adminBody(r, &in); err != nil {
		return in, nil, nil, err
	}
	if len(in.Text) > admin.MaxPolicy {
		return in, nil, nil, fmt.Errorf("%w: policy is longer than %d bytes", errInvalid, admin.MaxPolicy)
	}
	parsed, err = policy.Parse([]byte(in.Text))
	if err != nil {
		return in, nil, nil, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	s.mu.Lock()
	known := make(map[string]bool, len(s.users))
	for _, u := range s.users {
		known[u.Name] = true
	}
	s.mu.Unlock()
	if err := parsed.Check(func(user string) bool { return known[user] }); err != nil {
		warnings = strings.Split(err.Error(), "\n")
	}
	return in, parsed, warnings, nil
}

func (s *Server) adminSetPolicy(r *http.Request) (any, error) {
	in, _, warnings, err := s.adminPolicyBody(r)
	if err != nil {
		return nil, err
	}
	expect, err := expected(in.Replaces)
	if err != nil {
		return nil, err
	}
	p, err := s.setPolicy(r.Context(), actor(r), policyChange{text: in.Text, expect: expect, guard: in.Guard})
	if err != nil {
		return nil, err
	}
	return admin.Policy{Version: p.Version, Text: in.Text, Author: p.Author, Created: p.Created, Warnings: warnings}, nil
}

func (s *Server) adminCheckPolicy(r *http.Request) (any, error) {
	_, parsed, warnings, err := s.adminPolicyBody(r)
	if err != nil {
		return nil, err
	}
	s.lockOps()
	defer s.opMu.Unlock()
	if _, err := s.tryPolicy(parsed); err != nil {
		return nil, err
	}
	return admin.Policy{Warnings: warnings}, nil
}
