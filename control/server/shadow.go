package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
)

const (
	// reportEvery is how often nodes report connection attempts, in seconds.
	reportEvery = 2
	// maxShadowPairs bounds what is kept for the report.
	maxShadowPairs = 10000
	// maxPairRules is how many rules the report names for a pair.
	maxPairRules = 4
)

// shadowState is a candidate that is evaluated beside the policy in force on
// the connection attempts that nodes report. It is guarded by Server.mu.
type shadowState struct {
	store.Policy
	parsed   *policy.Policy
	compiled *policy.Compiled // nil = there is no candidate
	nodes    map[netip.Addr]wire.NodeID
	report   admin.ShadowReport // without Pairs
	pairs    map[shadowKey]*admin.ShadowPair
}

// shadowKey tells the lines of a report apart.
type shadowKey struct {
	src, dst string
	proto    int
	port     uint16
	allowed  bool
}

// The methods below need Server.mu.

// upsert follows a node.
func (c *shadowState) upsert(n policy.Node) {
	if c.compiled == nil {
		return
	}
	c.compiled.Upsert(n)
	for _, a := range n.Addrs {
		c.nodes[a] = n.ID
	}
}

// remove forgets a node.
func (c *shadowState) remove(n *node) {
	if c.compiled != nil {
		c.compiled.Remove(n.ID)
		delete(c.nodes, n.IPv4)
		delete(c.nodes, n.IPv6)
	}
}

// interval is what nodes are told about reports.
func (c *shadowState) interval() *int {
	every := 0
	if c.compiled != nil {
		every = reportEvery
	}
	return &every
}

// start begins to evaluate a candidate, or with nil ends it, and tells all nodes
// whether to report.
func (s *Server) startShadow(p store.Policy, parsed *policy.Policy) {
	was := s.shadow.compiled != nil
	s.shadow = shadowState{}
	if parsed != nil {
		nodes := s.policyNodes(s.policy.base)
		c := &s.shadow
		*c = shadowState{
			Policy: p, parsed: parsed, compiled: policy.Compile(parsed, nodes), nodes: make(map[netip.Addr]wire.NodeID),
			report: admin.ShadowReport{Since: s.cfg.Now()}, pairs: make(map[shadowKey]*admin.ShadowPair),
		}
		for _, n := range nodes {
			for _, a := range n.Addrs {
				c.nodes[a] = n.ID
			}
		}
	}
	if was == (parsed != nil) {
		return
	}
	for _, n := range s.nodes.byID {
		if n.stream != nil {
			n.stream.pending.flows = true
			n.stream.poke()
		}
	}
}

// judge evaluates attempts that a node reports under both policies. What a node
// says of others does not count.
func (s *Server) judge(n *node, flows []wire.Flow) {
	c := &s.shadow
	if c.compiled == nil || len(flows) == 0 {
		return
	}
	now := s.cfg.Now()
	if now.Sub(n.reported) < reportEvery*time.Second/2 {
		return // more often than asked for
	}
	n.reported = now
	for _, f := range flows[:min(len(flows), wire.MaxFlows)] {
		f.Src, f.Dst = f.Src.Unmap(), f.Dst.Unmap()
		count := f.Allowed + f.Denied
		own := f.Dst == n.IPv4 || f.Dst == n.IPv6 || slices.ContainsFunc(n.routed, func(r netip.Prefix) bool { return r.Contains(f.Dst) })
		if !own || !f.Src.IsValid() || f.Allowed < 0 || f.Denied < 0 || count <= 0 || count > 1<<40 || f.Proto < 0 || f.Proto > 255 {
			continue
		}
		live, rules := s.policy.compiled.Allows(f.Src, f.Dst, f.Proto, f.Port)
		candidate, newRules := c.compiled.Allows(f.Src, f.Dst, f.Proto, f.Port)
		c.report.Attempts += count
		if live == candidate {
			continue
		}
		if candidate {
			rules = newRules
		}
		k := shadowKey{s.identityAt(f.Src), s.identityAt(f.Dst), f.Proto, f.Port, candidate}
		p := c.pairs[k]
		if p == nil {
			if len(c.pairs) == maxShadowPairs {
				c.report.Dropped += count
				continue
			}
			p = &admin.ShadowPair{Src: k.src, Dst: k.dst, Proto: k.proto, Port: k.port, Allowed: candidate, First: now}
			c.pairs[k] = p
		}
		p.Attempts, p.Last, p.Rules = p.Attempts+count, now, rules[:min(len(rules), maxPairRules)]
	}
}

// identityAt is who has an address: a user, tags, or nobody but the address.
func (s *Server) identityAt(a netip.Addr) string {
	n := s.nodes.byID[s.shadow.nodes[a]]
	switch {
	case n == nil:
		return a.String()
	case len(n.Tags) > 0:
		return strings.Join(n.Tags, ",")
	}
	return s.ownerName(&n.Node)
}

// loadShadow goes on with a stored candidate.
func (s *Server) loadShadow(ctx context.Context) error {
	p, err := s.store.Shadow(ctx)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	parsed, err := policy.Parse([]byte(p.Text))
	if err != nil {
		s.log.Warn("the stored shadow policy is not evaluated", zap.Error(err))
		return nil
	}
	s.startShadow(p, parsed)
	return nil
}

// SetShadow evaluates a candidate beside the policy in force, on what nodes
// really try, and starts a new report. "" ends it. Errors of the candidate match
// ErrPolicy; its own tests are not run.
func (s *Server) SetShadow(ctx context.Context, by, text string) (store.Policy, error) {
	var parsed *policy.Policy
	if text != "" {
		var err error
		if parsed, err = policy.Parse([]byte(text)); err != nil {
			return store.Policy{}, fmt.Errorf("%w: %w", ErrPolicy, err)
		}
	}
	s.lockOps()
	defer s.opMu.Unlock()
	p, err := s.store.SetShadow(context.WithoutCancel(ctx), by, text, s.cfg.Now())
	if err != nil {
		return store.Policy{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startShadow(p, parsed)
	return p, nil
}

// ShadowReport tells what the candidate would decide otherwise: what it would
// deny first, most attempts first. ErrNotFound: there is no candidate.
func (s *Server) ShadowReport() (admin.ShadowReport, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &s.shadow
	if c.compiled == nil {
		return admin.ShadowReport{}, fmt.Errorf("shadow policy: %w", store.ErrNotFound)
	}
	r := c.report
	r.Pairs = make([]admin.ShadowPair, 0, len(c.pairs))
	for _, p := range c.pairs {
		r.Pairs = append(r.Pairs, *p)
	}
	slices.SortFunc(r.Pairs, func(a, b admin.ShadowPair) int {
		switch {
		case a.Allowed != b.Allowed && b.Allowed, a.Allowed == b.Allowed && a.Attempts > b.Attempts:
			return -1
		case a.Allowed != b.Allowed || a.Attempts < b.Attempts:
			return 1
		}
		return strings.Compare(fmt.Sprint(a.Src, a.Dst, a.Proto, a.Port), fmt.Sprint(b.Src, b.Dst, b.Proto, b.Port))
	})
	return r, nil
}

func (s *Server) adminShadow(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return adminPolicyOf(s.shadow.Policy), nil
}

func (s *Server) adminSetShadow(r *http.Request) (any, error) {
	in, _, warnings, err := s.adminPolicyBody(r)
	if err != nil {
		return nil, err
	}
	if in.Text == "" {
		return nil, fmt.Errorf("%w: the policy is empty", errInvalid)
	}
	p, err := s.SetShadow(r.Context(), actor(r), in.Text)
	if err != nil {
		return nil, err
	}
	out := adminPolicyOf(p)
	out.Warnings = warnings
	return out, nil
}

func (s *Server) adminClearShadow(r *http.Request) (any, error) {
	_, err := s.SetShadow(r.Context(), actor(r), "")
	return struct{}{}, err
}

func (s *Server) adminShadowReport(*http.Request) (any, error) { return s.ShadowReport() }
