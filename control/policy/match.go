package policy

import (
	"net/netip"
	"slices"

	"mesh/control/wire"
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
	one   bool         // it is about that address
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
			return &party{n: n, addrs: []netip.Addr{e.Addr.Unmap()}, one: true}
		}
		return &party{n: n, addrs: n.Addrs}
	case e.Addr.IsValid():
		a := e.Addr.Unmap()
		return &party{n: c.byAddr[a], addrs: []netip.Addr{a}, one: true}
	}
	return c.imagined(Node{User: e.User.Name, Email: e.User.Email, Role: e.User.Role, Tags: e.Tags})
}

// imagined is a node that does not exist, at an address that nothing is said
// about.
func (c *Compiled) imagined(n Node) *party {
	r := &node{Node: n, slot: -1}
	c.match(r)
	return &party{n: r, addrs: []netip.Addr{{}}}
}

// pairs calls f for each pair of addresses of one family, until f is satisfied.
func pairs(a, b *party, f func(x, y netip.Addr) bool) bool {
	for _, x := range a.addrs {
		for _, y := range b.addrs {
			if (!x.IsValid() || !y.IsValid() || x.Is4() == y.Is4()) && f(x, y) {
				return true
			}
		}
	}
	return false
}

// named reports whether a selector means the party's node by name.
func (p *party) named(s *selSet, a netip.Addr) bool {
	if p.n == nil || a.IsValid() && !slices.Contains(p.n.Addrs, a) {
		return false
	}
	return p.n.in(s)
}

// source returns the selector of the list that means the party's address.
func (c *Compiled) source(l *srcList, p *party, a netip.Addr) *selSet {
	var best *selSet
	for _, s := range l.sels {
		ok := false
		switch s.kind {
		case kindAll:
			ok = !a.IsValid() || c.inMesh(a)
		case kindAnywhere:
			ok = true
		case kindPrefix:
			ok = a.IsValid() && s.prefix.Contains(a)
		default:
			ok = p.named(s, a)
		}
		// Who is named in so many words is not told about "*".
		if ok && (best == nil || best.kind == kindAll || best.kind == kindAnywhere) {
			best = s
		}
	}
	return best
}

// inMesh reports whether "*" means the address as a source.
func (c *Compiled) inMesh(a netip.Addr) bool {
	if slices.ContainsFunc(meshRanges, func(r addrRange) bool { return r.contains(a) }) {
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

func (r addrRange) contains(a netip.Addr) bool {
	return r.first.BitLen() == a.BitLen() && !a.Less(r.first) && !r.last.Less(a)
}

// target reports whether a destination means the party's address.
func (c *Compiled) target(s *selSet, p *party, a netip.Addr) bool {
	switch s.kind {
	case kindAll:
		return true
	case kindInternet, kindViaNet, kindAnywhere:
		return false
	case kindPrefix, kindVia:
		return a.IsValid() && s.prefix.Contains(a)
	}
	return p.named(s, a)
}

// targets returns the destinations that may mean the party, in the order of the
// policy.
func (c *Compiled) targets(p *party) []dstRef {
	if p.n != nil {
		return c.refs(p.n)
	}
	var sels []*selSet
	if s := c.bySel[selector{kind: kindAll}]; s != nil {
		sels = append(sels, s)
	}
	for _, list := range [][]*selSet{c.nets, c.vias} {
		for _, s := range list {
			if slices.ContainsFunc(p.addrs, s.prefix.Contains) {
				sels = append(sels, s)
			}
		}
	}
	return sortedRefs(sels)
}

// admits reports whether a destination of a rule, whatever its ports, lets a
// talk to b, and by which selectors.
func (c *Compiled) admits(ref dstRef, a, b *party) (src, dst *selSet, ok bool) {
	r := &c.rules[ref.rule]
	dst = r.dsts[ref.dst]
	if dst.kind == kindSelf && (a.n == nil || b.n == nil || a.n.user == "" || a.n.user != b.n.user) {
		return nil, nil, false
	}
	ok = pairs(a, b, func(x, y netip.Addr) bool {
		if !c.target(dst, b, y) {
			return false
		}
		src = c.source(r.src, a, x)
		// The nodes of the user are sources, not others that she can reach.
		return src != nil && (dst.kind != kindSelf || a.named(c.bySel[selector{kind: kindSelf}], x))
	})
	return src, dst, ok
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
	for _, ref := range c.targets(b) {
		r := &c.rules[ref.rule]
		if !r.covers(ref.dst, proto, port) || len(out) == maxOrigins || len(out) > 0 && out[len(out)-1] == r.origin {
			continue
		}
		if _, _, ok := c.admits(ref, a, b); ok {
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
