package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tailscale/hujson"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// assertion is an entry of "tests": what src must be able to reach, or must not.
type assertion struct {
	line   int
	name   string // "tests[0]"
	src    []*selector
	srcAs  string
	protos []int // nil: TCP, UDP or ICMP, whichever a rule allows
	proto  string
	accept []asserted
	deny   []asserted
}

// asserted is a destination of an assertion.
type asserted struct {
	text string
	sels []*selector
	port uint16
	line int
}

func (r *reader) readTest(i int, v hujson.Value) {
	t := assertion{name: fmt.Sprintf("tests[%d]", i)}
	t.line, _ = r.position(v.StartOffset)
	got, ok := r.entry(v, t.name, []string{"src", "proto", "accept", "deny", "srcPostureAttrs"}, "src")
	if !ok {
		return
	}
	if m, ok := got["srcPostureAttrs"]; ok && !isEmpty(m.value) {
		r.unsupported(m.nameAt, "member %q", m.name)
	}
	if m, ok := got["src"]; ok {
		if s, ok := r.text(m.value, "src"); ok {
			t.srcAs = s
			t.src, _ = r.selectors(s, m.value.StartOffset, inSrc)
		}
	}
	if m, ok := got["proto"]; ok {
		if s, ok := r.protoText(m.value); ok && s != "" {
			protos, ports, known := parseProto(s)
			if !known || !ports {
				r.fail(m.value.StartOffset, `leave it out, or write "tcp", "udp" or "sctp"`, "protocol %q in a test", s)
			}
			t.protos, t.proto = protos, strings.ToLower(s)
		}
	}
	said := false
	for _, m := range []member{got["accept"], got["deny"]} {
		if m.name == "" {
			continue
		}
		for _, d := range r.texts(m.value, m.name) {
			said = true
			if a, ok := r.asserted(d.text, d.at); !ok {
				continue
			} else if m.name == "accept" {
				t.accept = append(t.accept, a)
			} else {
				t.deny = append(t.deny, a)
			}
		}
	}
	if !said {
		r.fail(v.StartOffset, "", `%s has neither "accept" nor "deny"`, t.name)
	}
	r.tests = append(r.tests, t)
}

// asserted reads a destination of a test: one host or name, and one port.
func (r *reader) asserted(s string, at int) (asserted, bool) {
	name, ports, ok := r.splitDest(s, at)
	if !ok {
		return asserted{}, false
	}
	sels, ok := r.selectors(name, at, inDst)
	if !ok {
		return asserted{}, false
	}
	switch k := kindOf(sels); {
	case len(ports) != 1 || ports[0].first != ports[0].last:
		r.fail(at, "test each port on its own", "dst %q of a test must have a single port", s)
		return asserted{}, false
	case k == kindInternet || k == kindSelf:
		r.fail(at, "", "%q can not be a destination of a test", sels[0])
		return asserted{}, false
	case len(sels) != 1 || k == kindPrefix && (strings.Contains(name, "/") || !sels[0].prefix.IsSingleIP()):
		r.fail(at, "test an address in it", "dst %q of a test must be a single host, not a network", s)
		return asserted{}, false
	}
	line, _ := r.position(at)
	return asserted{s, sels, ports[0].first, line}, true
}

// TestFailure is an entry of "tests" that does not hold.
type TestFailure struct {
	Test string // "tests[2]"
	Line int    // where the destination stands, or the test
	Src  string // as in the file
	Dst  string // as in the file; empty if the test itself is wrong
	// Wanted is "accept" or "deny".
	Wanted string
	Reason string // which rule lets it in, or why none does
}

// Error returns a form like
//
//	tests[2] at line 12: bob@ can reach tag:db:5432 but must not: acls[0] at line 3
func (f TestFailure) Error() string {
	head := fmt.Sprintf("%s at line %d: ", f.Test, f.Line)
	switch {
	case f.Dst == "":
		return head + f.Reason
	case f.Wanted == "deny":
		return fmt.Sprintf("%s%s can reach %s but must not: %s", head, f.Src, f.Dst, f.Reason)
	}
	return fmt.Sprintf("%s%s can not reach %s: %s", head, f.Src, f.Dst, f.Reason)
}

// Limits of testing.
const (
	maxFailures = 100       // that are reported
	maxTestWork = 3_000_000 // rules that are looked at
)

// Test runs the policy's own tests against the nodes that there are, and returns
// those that do not hold, at most 100. Who has no node yet is tested as if there
// were one. users are all users; a test about anybody else fails. nil: they are
// not known, and nobody is missing.
//
// A destination of "accept" must be reachable from every source that the test
// names; one of "deny" from none.
func (c *Compiled) Test(users []User) []TestFailure {
	if c.policy == nil {
		return nil
	}
	t := tester{c: c, users: users, known: make(map[selector][]*party)}
	for i := range c.policy.tests {
		t.run(&c.policy.tests[i])
	}
	return t.failures
}

// Test compiles the policy for nodes and runs its tests, as Compiled.Test does.
func (p *Policy) Test(nodes []Node, users []User) []TestFailure {
	if len(p.tests) == 0 {
		return nil
	}
	return Compile(p, nodes).Test(users)
}

// tester runs the tests of a policy.
type tester struct {
	c        *Compiled
	users    []User
	failures []TestFailure
	work     int
	known    map[selector][]*party // that were looked up
}

func (t *tester) fail(f TestFailure) {
	if len(t.failures) < maxFailures {
		t.failures = append(t.failures, f)
	}
}

func (t *tester) run(a *assertion) {
	srcs, why := t.parties(a.src)
	if why != "" {
		t.fail(TestFailure{Test: a.name, Line: a.line, Src: a.srcAs, Reason: fmt.Sprintf("src %q: %s", a.srcAs, why)})
		return
	}
	protos := a.protos
	if protos == nil {
		protos = []int{6, 17, 1, 58}
	}
	for _, want := range []struct {
		word string
		list []asserted
	}{{"accept", a.accept}, {"deny", a.deny}} {
		for _, d := range want.list {
			f := TestFailure{Test: a.name, Line: d.line, Src: a.srcAs, Dst: d.text, Wanted: want.word}
			dsts, why := t.parties(d.sels)
			if why != "" {
				f.Reason = why
				t.fail(f)
				continue
			}
			if f.Reason = t.compare(srcs, dsts, protos, d.port, want.word == "accept"); f.Reason != "" {
				t.fail(f)
			}
		}
	}
}

// compare reports what contradicts that all sources reach all destinations, or
// that none reaches any.
func (t *tester) compare(srcs, dsts []*party, protos []int, port uint16, accept bool) string {
	for _, s := range srcs {
		for _, d := range dsts {
			if t.work++; t.work > maxTestWork {
				return "the tests of this policy compare too many nodes"
			}
			rule, ok := t.anyProto(s, d, protos, port)
			switch {
			case ok && !accept:
				return ruleText(rule)
			case !ok && accept:
				return t.c.explain(s, d, protos[0], port).shortReason()
			}
		}
	}
	return ""
}

// anyProto reports whether a rule allows one of the protocols.
func (t *tester) anyProto(a, b *party, protos []int, port uint16) (wire.RuleOrigin, bool) {
	c := t.c
	m := matcher{c: c, a: a, b: b}
	for _, ref := range c.targets(b) {
		t.work++
		r := &c.rules[ref.rule]
		for _, p := range protos {
			// What a rule says about ports of ICMP is nothing: only one that names
			// the protocol counts.
			if p == 1 || p == 58 {
				if !slices.Contains(r.protos, p) {
					continue
				}
			} else if !r.covers(ref.dst, p, port) {
				continue
			}
			if _, _, ok := m.admits(ref); ok {
				return r.origin, true
			}
		}
	}
	return wire.RuleOrigin{}, false
}

// parties returns the nodes that selectors mean, one for all between which no
// rule can tell, or a node that might be if there is none.
func (t *tester) parties(sels []*selector) (out []*party, why string) {
	for _, s := range sels {
		list, ok := t.known[*s]
		if !ok {
			if list, why = t.party(s); why != "" {
				return nil, why
			}
			list = distinctParties(list)
			t.known[*s] = list
		}
		out = append(out, list...)
	}
	if len(out) == 0 {
		return nil, "means nobody"
	}
	return out, ""
}

// distinctParties leaves out nodes like others. Of those that differ in nothing
// but their owner two stay, since autogroup:self tells one's own from others.
func distinctParties(list []*party) (out []*party) {
	type class struct {
		n    int
		user userRef
	}
	seen := make(map[string]class)
	for _, p := range list {
		if p.n != nil && p.n.slot >= 0 && !p.one {
			k := p.n.class(false)
			c := seen[k]
			if c.n == 2 || c.n == 1 && c.user == p.n.user {
				continue
			}
			seen[k] = class{c.n + 1, p.n.user}
		}
		out = append(out, p)
	}
	return out
}

// class is equal for nodes between which no rule can tell; rules with
// autogroup:self tell owners apart.
func (n *node) class(owner bool) string {
	b := make([]byte, 0, 64)
	if owner {
		b = append(b, n.user...)
	}
	for _, s := range n.sels {
		b = append(b, ' ')
		b = strconv.AppendInt(b, int64(s.id), 36)
		if s.kind == kindPrefix {
			for _, a := range n.Addrs {
				b = strconv.AppendBool(b, s.prefix.Contains(a))
			}
		}
	}
	return string(b)
}

// party returns what one selector means.
func (t *tester) party(s *selector) (out []*party, why string) {
	switch s.kind {
	case kindPrefix:
		r := iprange.Of(s.prefix)
		out = append(out, t.c.party(Endpoint{Addr: r.First}))
		if r.Last != r.First {
			out = append(out, t.c.party(Endpoint{Addr: r.Last}))
		}
		return out, ""
	case kindGroup:
		for _, u := range t.c.policy.groups[s.name] {
			list, why := t.party(&selector{kind: kindUser, name: string(u)})
			if why != "" {
				return nil, why
			}
			out = append(out, list...)
		}
		if len(out) == 0 {
			return nil, fmt.Sprintf("%s has no members", s.name)
		}
		return out, ""
	}
	t.c.eachOf(s, func(n *node) { out = append(out, t.c.newParty(n, n.Addrs, false)) })
	if len(out) > 0 {
		return out, ""
	}
	switch s.kind {
	case kindUser:
		u, known := t.user(userRef(s.name))
		if !known {
			return nil, fmt.Sprintf("unknown user %q", s)
		}
		return []*party{t.c.imagined(Node{User: u.Name, Email: u.Email, Role: u.Role})}, ""
	case kindTag:
		return []*party{t.c.imagined(Node{Tags: []string{s.name}})}, ""
	case kindTagged:
		return []*party{t.c.imagined(Node{Tags: []string{"tag:"}})}, ""
	case kindDomain:
		return []*party{t.c.imagined(Node{User: "@" + s.name})}, ""
	case kindRole:
		return []*party{t.c.imagined(Node{User: "@", Role: s.name})}, ""
	case kindAnywhere:
		return []*party{t.c.newParty(nil, []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, true)}, ""
	}
	return []*party{t.c.imagined(Node{User: "@"})}, ""
}

// user finds who a policy means.
func (t *tester) user(ref userRef) (User, bool) {
	if t.users == nil {
		return User{Name: string(ref)}, true
	}
	for _, u := range t.users {
		if canonicalUser(u.Name) == ref || u.Email != "" && canonicalUser(u.Email) == ref {
			return u, true
		}
	}
	return User{}, false
}

// eachOf calls f for the nodes that a selector means, by an index if a rule has
// the same selector.
func (c *Compiled) eachOf(s *selector, f func(n *node)) {
	if set := c.bySel[*s]; set != nil {
		for _, slot := range set.nodes {
			f(c.slots[slot])
		}
		return
	}
	for _, n := range c.slots {
		if n != nil && c.policy.isOf(&n.Node, s) {
			f(n)
		}
	}
}
