package server

import (
	"fmt"
	"net/http"
	"strings"

	"mesh/control/admin"
	"mesh/control/policy"
)

func (s *Server) adminPolicy(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.policy.Policy
	return admin.Policy{Version: p.Version, Text: p.Text, Author: p.Author, Created: p.Created}, nil
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
	expect := int64(-1)
	if in.Replaces != nil {
		if expect = *in.Replaces; expect < 0 {
			return nil, fmt.Errorf("%w: version %d", errInvalid, expect)
		}
	}
	p, err := s.SetPolicy(r.Context(), localAdmin, in.Text, expect)
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
	s.opMu.Lock()
	defer s.opMu.Unlock()
	if _, err := s.tryPolicy(parsed); err != nil {
		return nil, err
	}
	return admin.Policy{Warnings: warnings}, nil
}
