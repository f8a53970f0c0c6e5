package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"mesh/control/wire"
)

// Filter returns the packet filter of a node: the rules of which it is a
// destination, in the order of the policy. Rules with equal sources and
// protocols are merged. The result is empty, not nil, if nobody may reach the
// node. Its SrcIPs are shared between rules and must not be changed.
func (c *Compiled) Filter(id wire.NodeID) []wire.FilterRule {
	out := []wire.FilterRule{}
	n := c.nodes[id]
	if n == nil {
		return out
	}
	type key struct {
		src    *srcList
		self   bool
		protos string
	}
	type dstKey struct {
		at   int
		dest wire.NetPortRange
	}
	at := make(map[key]int)
	dsts := make(map[dstKey]int)
	for _, ref := range c.refs(n) {
		r := &c.rules[ref.rule]
		d, sel := &r.acl.dsts[ref.dst], r.dsts[ref.dst]
		k := key{r.src, sel.kind == kindSelf, fmt.Sprint(r.acl.protos)}
		i, known := at[k]
		if !known {
			src := c.sources(r.src, n, k.self)
			if len(src) == 0 {
				continue
			}
			i = len(out)
			at[k] = i
			out = append(out, wire.FilterRule{SrcIPs: src, IPProto: r.acl.protos})
		}
		origin := wire.RuleOrigin{Rule: r.acl.name, Line: r.acl.line}
		f := &out[i]
		for _, ip := range sel.dstIPs(n) {
			for _, p := range d.ports {
				dest := wire.NetPortRange{IP: ip, Ports: wire.PortRange{First: p.first, Last: p.last}}
				j, known := dsts[dstKey{i, dest}]
				if !known {
					dsts[dstKey{i, dest}] = len(f.DstPorts)
					f.DstPorts = append(f.DstPorts, dest)
					f.MeshOrigins = append(f.MeshOrigins, []wire.RuleOrigin{origin})
				} else if !slices.Contains(f.MeshOrigins[j], origin) {
					f.MeshOrigins[j] = append(f.MeshOrigins[j], origin)
				}
			}
		}
	}
	return out
}

// refs returns the destinations that match a node, in the policy's order.
func (c *Compiled) refs(n *node) []dstRef {
	var refs []dstRef
	for _, s := range n.sels {
		// What lies behind an exit node is no address of the mesh: such a rule
		// shows the exit node and admits nothing.
		if s.kind != kindInternet {
			refs = append(refs, s.dsts...)
		}
	}
	slices.SortFunc(refs, func(a, b dstRef) int {
		if a.rule != b.rule {
			return a.rule - b.rule
		}
		return a.dst - b.dst
	})
	return refs
}

func (c *Compiled) sources(l *srcList, n *node, self bool) []string {
	if self {
		return texts(merge(c.addrs(nil, l.self(c, n))))
	}
	l.fill(c)
	return l.text
}

// dstIPs returns the destinations of filter rules that a selector means at n.
func (s *selSet) dstIPs(n *node) []string {
	switch s.kind {
	case kindAll:
		return []string{"*"}
	case kindPrefix:
		return []string{rangeOf(s.prefix).String()}
	}
	var out []string
	for _, a := range n.Addrs {
		out = append(out, a.String())
	}
	return out
}

// CanReach reports whether the policy lets one node send to a port of another
// over an IP protocol, on any pair of their addresses, and by which rule. For
// ICMP any rule between the two will do, as on the wire.
func (c *Compiled) CanReach(from, to wire.NodeID, proto uint8, port uint16) (wire.RuleOrigin, bool) {
	a, b := c.nodes[from], c.nodes[to]
	if a == nil || b == nil {
		return wire.RuleOrigin{}, false
	}
	for _, ref := range c.refs(b) {
		r := &c.rules[ref.rule]
		sel := r.dsts[ref.dst]
		if !r.acl.covers(ref.dst, proto, port) {
			continue
		}
		var src []addrRange
		if sel.kind == kindSelf {
			src = merge(c.addrs(nil, r.src.self(c, b)))
		} else {
			r.src.fill(c)
			src = r.src.ranges
		}
		for _, x := range a.Addrs {
			for _, y := range b.Addrs {
				if x.Is4() == y.Is4() && (sel.kind != kindPrefix || sel.prefix.Contains(y)) && contains(src, x) {
					return wire.RuleOrigin{Rule: r.acl.name, Line: r.acl.line}, true
				}
			}
		}
	}
	return wire.RuleOrigin{}, false
}

// covers reports whether a destination of the rule covers protocol and port.
func (a *acl) covers(dst int, proto uint8, port uint16) bool {
	if proto == 1 || proto == 58 {
		return true
	}
	if a.protos == nil {
		if proto != 6 && proto != 17 {
			return false
		}
	} else if !slices.Contains(a.protos, int(proto)) {
		return false
	}
	for _, p := range a.dsts[dst].ports {
		if p == (portRange{0, 65535}) || (proto == 6 || proto == 17 || proto == 132) && p.first <= port && port <= p.last {
			return true
		}
	}
	return false
}

// contains searches merged ranges.
func contains(list []addrRange, a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(list, a, func(r addrRange, a netip.Addr) int { return r.first.Compare(a) })
	return found || i > 0 && !list[i-1].last.Less(a) && list[i-1].last.BitLen() == a.BitLen()
}
