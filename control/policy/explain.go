package policy

import (
	"fmt"
	"slices"
	"strings"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// Explanation says why somebody may reach something, or why not.
type Explanation struct {
	Allowed bool
	// Rules are those that allow it, at most 16, in the order of the policy.
	Rules []Match
	// Near is the rule that lacks the least when nothing allows it, Missing what
	// it lacks. There is none if no rule knows either side.
	Near    *Match
	Missing string
	// Notes are what else matters: that no such node exists, that no router leads
	// to the address.
	Notes []string
}

// Match is a rule with what it has to do with the two sides.
type Match struct {
	wire.RuleOrigin
	// Src and Dst are the selectors of the rule that mean the sides, as policies
	// write them; empty if none does. For Dst the ports follow: "tag:db:5432".
	Src, Dst string
	// SrcBy and DstBy say why they do: "alice@example.com is in group:ops".
	SrcBy, DstBy string
}

// String returns lines for people to read.
func (e Explanation) String() string {
	var b strings.Builder
	word := "denied"
	if e.Allowed {
		word = "allowed"
	}
	fmt.Fprintln(&b, word)
	for _, m := range e.Rules {
		fmt.Fprintf(&b, "  by %s: %s may reach %s\n", ruleText(m.RuleOrigin), m.Src, m.Dst)
		for _, by := range []string{m.SrcBy, m.DstBy} {
			if by != "" {
				fmt.Fprintf(&b, "    %s\n", by)
			}
		}
	}
	if e.Near != nil {
		fmt.Fprintf(&b, "  nearest is %s: %s\n", ruleText(e.Near.RuleOrigin), e.Missing)
		for _, by := range []string{e.Near.SrcBy, e.Near.DstBy} {
			if by != "" {
				fmt.Fprintf(&b, "    %s\n", by)
			}
		}
	}
	for _, n := range e.Notes {
		fmt.Fprintf(&b, "  %s\n", n)
	}
	return b.String()
}

// shortReason says in one line why not.
func (e Explanation) shortReason() string {
	if e.Near != nil {
		return fmt.Sprintf("nearest is %s: %s", ruleText(e.Near.RuleOrigin), e.Missing)
	}
	if len(e.Notes) > 0 {
		return e.Notes[0]
	}
	return "no rule allows it"
}

// ruleText is "acls[2] at line 7".
func ruleText(o wire.RuleOrigin) string {
	if o.Line == 0 {
		return o.Rule
	}
	return fmt.Sprintf("%s at line %d", o.Rule, o.Line)
}

// Explain says whether and why the policy lets src begin to talk to a port of
// dst over an IP protocol.
func (c *Compiled) Explain(src, dst Endpoint, proto int, port uint16) Explanation {
	a, b := c.party(src), c.party(dst)
	var e Explanation
	if a == nil {
		e.Notes = append(e.Notes, fmt.Sprintf("there is no node %d", src.Node))
	}
	if b == nil {
		e.Notes = append(e.Notes, fmt.Sprintf("there is no node %d", dst.Node))
	}
	if a == nil || b == nil {
		return e
	}
	return c.explain(a, b, proto, port)
}

func (c *Compiled) explain(a, b *party, proto int, port uint16) Explanation {
	var e Explanation
	seen := make(map[wire.RuleOrigin]bool)
	m := &matcher{c: c, a: a, b: b}
	for _, ref := range c.targets(b) {
		r := &c.rules[ref.rule]
		if len(e.Rules) == maxOrigins || seen[r.origin] || !r.covers(ref.dst, proto, port) {
			continue
		}
		if s, d, ok := m.admits(ref); ok {
			seen[r.origin] = true
			e.Rules = append(e.Rules, c.matched(r, ref, s, d, a, b))
		}
	}
	e.Allowed = len(e.Rules) > 0
	if !e.Allowed {
		m.nearest(&e, proto, port)
	}
	e.Notes = append(e.Notes, c.notes(a, b)...)
	return e
}

// notes says what the rules do not.
func (c *Compiled) notes(a, b *party) (out []string) {
	switch {
	case c.policy == nil:
		out = append(out, "there is no policy, so nobody may reach anybody")
	case !slices.ContainsFunc(c.rules, func(r rule) bool { return r.app == nil && len(r.dsts) > 0 && len(r.src.sels) > 0 }):
		out = append(out, "the policy has no rule that lets anything through")
	}
	for _, p := range []*party{a, b} {
		if p.n != nil || len(p.addrs) == 0 || !p.addrs[0].IsValid() {
			continue
		}
		x := p.addrs[0]
		switch n := c.behind(x); {
		case n != nil:
			out = append(out, fmt.Sprintf("%v lies behind %s", x, n.title()))
		case slices.ContainsFunc(meshRanges, func(r iprange.Range) bool { return r.Contains(x) }):
			out = append(out, fmt.Sprintf("no node has the address %v", x))
		default:
			out = append(out, fmt.Sprintf("no approved route leads to %v", x))
		}
	}
	return out
}

// title names a node without its name, which a policy does not know.
func (n *node) title() string {
	if n.slot < 0 {
		return n.owner()
	}
	return fmt.Sprintf("node %d (%s)", n.ID, n.owner())
}

// owner is who a node belongs to.
func (n *node) owner() string {
	switch {
	case len(n.Tags) > 0:
		return strings.Join(n.Tags, ", ")
	case n.Email != "":
		return n.Email
	case n.User != "":
		return n.User
	}
	return "nobody"
}

// nearest finds the rule that lacks the least: first the port or protocol, then
// the source, then the destination.
func (m *matcher) nearest(e *Explanation, proto int, port uint16) {
	c, a, b := m.c, m.a, m.b
	best := 0
	for i := range c.rules {
		r := &c.rules[i]
		if r.app != nil {
			continue
		}
		src := m.anySource(r)
		for j, d := range r.dsts {
			ref := dstRef{i, j}
			s, _, admitted := m.admits(ref)
			covered := r.covers(j, proto, port)
			meant := admitted || d.kind != kindSelf && m.target(d)
			score := 0
			switch {
			case admitted && !covered && r.coversProto(proto):
				score = 5
			case admitted && !covered:
				score = 4
			case meant && covered && src == nil:
				score = 3
			case src != nil && covered && !admitted:
				score = 2
			case meant && src == nil:
				score = 1
			}
			if score <= best {
				continue
			}
			switch best = score; score {
			case 5:
				e.Missing = fmt.Sprintf("it opens port %s, not %d", portsText(r.access.dsts[j].ports), port)
			case 4:
				e.Missing = fmt.Sprintf("it opens %s, not %s", protosTitle(r.protos), protosText([]int{proto}))
			case 3:
				e.Missing = fmt.Sprintf("%s is not among its sources: %s", a.title(), selsText(r.src.sels))
			case 2:
				e.Missing = fmt.Sprintf("%s is not among its destinations: %s", b.title(), selsText(r.dsts))
				s = src
			default:
				e.Missing = fmt.Sprintf("neither the source nor the port %d is in it", port)
			}
			near := Match{RuleOrigin: r.origin}
			if meant {
				near = c.matched(r, ref, s, d, a, b)
			} else if s != nil {
				near.Src, near.SrcBy = s.String(), c.why(s.selector, a)
			}
			e.Near = &near
		}
	}
}

func protosTitle(protos []int) string {
	if protos == nil {
		return "TCP and UDP"
	}
	return protosText(protos)
}

func (a *access) coversProto(proto int) bool {
	if a.protos == nil {
		return proto == 6 || proto == 17 || proto == 1 || proto == 58
	}
	return slices.Contains(a.protos, proto)
}

// selsText lists some selectors.
func selsText(sels []*selSet) string {
	var out []string
	for _, s := range sels {
		if len(out) == 6 {
			out = append(out, fmt.Sprintf("and %d more", len(sels)-6))
			break
		}
		out = append(out, s.String())
	}
	if len(out) == 0 {
		return "none"
	}
	return strings.Join(out, ", ")
}

func (p *party) title() string {
	if p.n != nil {
		return p.n.title()
	}
	if len(p.addrs) > 0 {
		return p.addrs[0].String()
	}
	return "nobody"
}

// matched describes a rule. s or d may be nil.
func (c *Compiled) matched(r *rule, ref dstRef, s, d *selSet, a, b *party) Match {
	m := Match{RuleOrigin: r.origin}
	if s != nil {
		m.Src, m.SrcBy = s.String(), c.why(s.selector, a)
	}
	if d != nil {
		m.Dst, m.DstBy = d.String()+":"+portsText(r.access.dsts[ref.dst].ports), c.why(d.selector, b)
	}
	return m
}

// why says what a selector has to do with a party, "" if it goes without saying.
func (c *Compiled) why(s selector, p *party) string {
	switch s.kind {
	case kindPrefix, kindVia:
		host := ""
		for name, h := range c.policy.hosts {
			if h == s.prefix && (host == "" || name < host) {
				host = name
			}
		}
		if host != "" {
			return fmt.Sprintf("%s is %s in \"hosts\"", host, prefixText(s.prefix))
		}
		for _, a := range p.addrs {
			if a.IsValid() && s.prefix.Contains(a) && !s.prefix.IsSingleIP() {
				return fmt.Sprintf("%v is in %v", a, s.prefix)
			}
		}
		return ""
	}
	if p.n == nil {
		return ""
	}
	switch s.kind {
	case kindGroup:
		return fmt.Sprintf("%s is in %s", p.n.owner(), s.name)
	case kindTag:
		return fmt.Sprintf("%s carries %s", p.n.title(), s.name)
	case kindMember:
		return fmt.Sprintf("%s belongs to a user, %s", p.n.title(), p.n.owner())
	case kindTagged:
		return fmt.Sprintf("%s has tags", p.n.title())
	case kindSelf:
		return fmt.Sprintf("both belong to %s", p.n.owner())
	case kindRole:
		return fmt.Sprintf("%s has the role %s", p.n.owner(), s.name)
	case kindDomain:
		return fmt.Sprintf("%s has an address at %s", p.n.owner(), s.name)
	}
	return ""
}
