package policy

import (
	"net/netip"
	"slices"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// Endpoint is one side of a connection to ask about. Set Node, with one of its
// addresses or none to mean all; or Addr, which may lie behind a router; or User
// or Tags, to ask about a node that need not exist.
type Endpoint struct {
	Node wire.NodeID
	Addr netip.Addr
	User User
	Tags []string
}

// party is an endpoint within a mesh.
type party struct {
	n     *node        // nil: an address that no node has
	addrs []netip.Addr // not valid: any address that a node may have
	sels  [][]*selSet  // what may mean each of addrs, sorted by ID
	one   bool         // it is about that address
}

// newParty looks up what means the addresses, so that asking about many rules is
// cheap.
func (c *Compiled) newParty(n *node, addrs []netip.Addr, one bool) *party {
	p := &party{n: n, addrs: addrs, one: one, sels: make([][]*selSet, len(addrs))}
	for i, a := range addrs {
		if n != nil && (!a.IsValid() || slices.Contains(n.Addrs, a)) {
			p.sels[i] = n.sels
			continue
		}
		add := func(s selector) {
			if set := c.bySel[s]; set != nil {
				p.sels[i] = append(p.sels[i], set)
			}
		}
		add(selector{kind: kindAll})
		add(selector{kind: kindAnywhere})
		for bits := range c.netBits {
			if net, err := a.Prefix(bits); err == nil {
				add(selector{kind: kindPrefix, prefix: net})
			}
		}
		for _, s := range c.vias {
			if s.prefix.Contains(a) {
				p.sels[i] = append(p.sels[i], s)
			}
		}
		p.sels[i] = distinct(p.sels[i])
	}
	return p
}

// party finds an endpoint; nil if there is no such node.
func (c *Compiled) party(e Endpoint) *party {
	switch {
	case e.Node != 0:
		n := c.nodes[e.Node]
		switch {
		case n == nil:
			return nil
		case e.Addr.IsValid():
			return c.newParty(n, []netip.Addr{e.Addr.Unmap()}, true)
		}
		return c.newParty(n, n.Addrs, false)
	case e.Addr.IsValid():
		a := e.Addr.Unmap()
		return c.newParty(c.byAddr[a], []netip.Addr{a}, true)
	}
	return c.imagined(Node{User: e.User.Name, Email: e.User.Email, Role: e.User.Role, Tags: e.Tags})
}

// imagined is a node that does not exist, at an address that nothing is said
// about.
func (c *Compiled) imagined(n Node) *party {
	r := &node{Node: n, slot: -1}
	c.match(r)
	return c.newParty(r, []netip.Addr{{}}, false)
}

// within reports whether a selector is one of a sorted list.
func within(list []*selSet, s *selSet) bool {
	_, ok := slices.BinarySearchFunc(list, s, func(x, y *selSet) int { return x.id - y.id })
	return ok
}

// source returns the selector of a list that means address i of the party.
func (c *Compiled) source(l *srcList, p *party, i int) *selSet {
	a := p.addrs[i]
	var best *selSet
	for _, s := range p.sels[i] {
		if !within(l.sels, s) {
			continue
		}
		switch s.kind {
		case kindAll:
			// Who is named in so many words is not told about "*".
			if best == nil && (!a.IsValid() || c.inMesh(a)) {
				best = s
			}
		case kindAnywhere:
			if best == nil {
				best = s
			}
		case kindPrefix:
			if a.IsValid() && s.prefix.Contains(a) {
				return s
			}
		case kindVia:
			if p.n != nil && within(p.n.sels, s) {
				return s
			}
		default:
			return s
		}
	}
	return best
}

// inMesh reports whether "*" means the address as a source.
func (c *Compiled) inMesh(a netip.Addr) bool {
	if slices.ContainsFunc(meshRanges, func(r iprange.Range) bool { return r.Contains(a) }) {
		return true
	}
	return c.behind(a) != nil
}

// behind returns a router with an approved route to the address.
func (c *Compiled) behind(a netip.Addr) *node {
	for bits := a.BitLen(); bits > 0; bits-- {
		p, err := a.Prefix(bits)
		if err != nil {
			return nil
		}
		if n := c.first(p, nil); n != nil {
			return n
		}
	}
	return nil
}

// target reports whether a destination means address i of the party.
func (c *Compiled) target(s *selSet, p *party, i int) bool {
	a := p.addrs[i]
	switch s.kind {
	case kindAll:
		return true
	case kindInternet, kindViaNet, kindAnywhere:
		return false
	case kindPrefix, kindVia:
		return a.IsValid() && s.prefix.Contains(a)
	}
	return within(p.sels[i], s)
}

// targets returns the destinations that may mean the party, in the order of the
// policy.
func (c *Compiled) targets(p *party) []dstRef {
	if p.n != nil {
		return c.refs(p.n)
	}
	var sels []*selSet
	for _, list := range p.sels {
		sels = append(sels, list...)
	}
	return sortedRefs(distinct(sels))
}

// matcher asks about two parties. It remembers what means the source in the last
// rule, since a rule may have many destinations.
type matcher struct {
	c    *Compiled
	a, b *party
	list *srcList
	srcs []*selSet // for each address of a
}

// source returns what means each address of a among the sources of a rule.
func (m *matcher) source(r *rule) []*selSet {
	if m.list != r.src {
		m.list, m.srcs = r.src, m.srcs[:0]
		for i := range m.a.addrs {
			m.srcs = append(m.srcs, m.c.source(r.src, m.a, i))
		}
	}
	return m.srcs
}

// anySource returns what means any address of a among the sources of a rule.
func (m *matcher) anySource(r *rule) *selSet {
	for _, s := range m.source(r) {
		if s != nil {
			return s
		}
	}
	return nil
}

// target reports whether a destination means any address of b.
func (m *matcher) target(s *selSet) bool {
	for i := range m.b.addrs {
		if m.c.target(s, m.b, i) {
			return true
		}
	}
	return false
}

// admits reports whether a destination of a rule, whatever its ports, lets a
// talk to b on a pair of addresses of one family, and by which selectors.
func (m *matcher) admits(ref dstRef) (src, dst *selSet, ok bool) {
	r := &m.c.rules[ref.rule]
	dst = r.dsts[ref.dst]
	if dst.kind == kindSelf && (m.a.n == nil || m.b.n == nil || m.a.n.user == "" || m.a.n.user != m.b.n.user) {
		return nil, nil, false
	}
	for j, y := range m.b.addrs {
		if !m.c.target(dst, m.b, j) {
			continue
		}
		for i, s := range m.source(r) {
			x := m.a.addrs[i]
			if s == nil || x.IsValid() && y.IsValid() && x.Is4() != y.Is4() {
				continue
			}
			// The nodes of the user are sources, not others that she can reach.
			if dst.kind != kindSelf || within(m.a.sels[i], dst) {
				return s, dst, true
			}
		}
	}
	return nil, nil, false
}

// maxOrigins bounds how many rules an answer names.
const maxOrigins = 16

// Allows reports whether the policy lets packets from src to dst in, and by which
// of its rules: at most 16, each once, in the order of the policy. It asks what
// the packet filter of the node at dst would, or that of a router for it, so it
// can be asked about a connection that was observed. For ICMP any rule between
// the two will do, as on the wire. Replies need no rule and are not considered.
func (c *Compiled) Allows(src, dst netip.Addr, proto int, port uint16) (bool, []wire.RuleOrigin) {
	return c.allows(c.party(Endpoint{Addr: src}), c.party(Endpoint{Addr: dst}), proto, port)
}

func (c *Compiled) allows(a, b *party, proto int, port uint16) (bool, []wire.RuleOrigin) {
	var out []wire.RuleOrigin
	m := matcher{c: c, a: a, b: b}
	for _, ref := range c.targets(b) {
		r := &c.rules[ref.rule]
		if !r.covers(ref.dst, proto, port) || len(out) == maxOrigins || len(out) > 0 && out[len(out)-1] == r.origin {
			continue
		}
		if _, _, ok := m.admits(ref); ok {
			out = append(out, r.origin)
		}
	}
	return len(out) > 0, out
}

// CanReach reports whether the policy lets one node send to a port of another
// over an IP protocol, on any pair of their addresses, and by which rule. For
// ICMP any rule between the two will do, as on the wire.
func (c *Compiled) CanReach(from, to wire.NodeID, proto uint8, port uint16) (wire.RuleOrigin, bool) {
	a, b := c.party(Endpoint{Node: from}), c.party(Endpoint{Node: to})
	if a == nil || b == nil || from == 0 || to == 0 {
		return wire.RuleOrigin{}, false
	}
	if ok, rules := c.allows(a, b, int(proto), port); ok {
		return rules[0], true
	}
	return wire.RuleOrigin{}, false
}
