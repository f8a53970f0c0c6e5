package policy

import (
	"net/netip"
	"slices"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// Filter returns the packet filter of a node: the rules of which it is a
// destination, in the order of the policy. Rules with equal sources and
// protocols are merged. Capabilities are rules of their own, and let no packet
// through. The result is empty, not nil, if nobody may reach the node. Its parts
// are shared between rules and must not be changed.
func (c *Compiled) Filter(id wire.NodeID) []wire.FilterRule {
	n := c.nodes[id]
	if n == nil {
		return []wire.FilterRule{}
	}
	b := filterBuilder{c: c, n: n, out: []wire.FilterRule{}, at: make(map[filterKey]int), dsts: make(map[filterDst]int)}
	refs := c.refs(n)
	for len(refs) > 0 {
		r := &c.rules[refs[0].rule]
		of := 1
		for of < len(refs) && refs[of].rule == refs[0].rule {
			of++
		}
		if r.app != nil {
			b.capabilities(r, refs[:of])
		} else {
			for _, ref := range refs[:of] {
				b.ports(r, ref)
			}
		}
		refs = refs[of:]
	}
	return b.out
}

// maxMerged bounds how many rules of the policy one destination on the wire names.
const maxMerged = 128

// filterBuilder collects the rules of a node.
type filterBuilder struct {
	c    *Compiled
	n    *node
	out  []wire.FilterRule
	at   map[filterKey]int // index of the rule with that key
	dsts map[filterDst]int // index of the destination in a rule
}

type filterKey struct {
	src    *srcList
	self   bool
	protos string
}

type filterDst struct {
	at   int
	dest wire.NetPortRange
}

// ports adds what a destination of a rule lets in.
func (b *filterBuilder) ports(r *rule, ref dstRef) {
	d, sel := &r.access.dsts[ref.dst], r.dsts[ref.dst]
	k := filterKey{r.src, sel.kind == kindSelf, protosKey(r.protos)}
	i, known := b.at[k]
	if !known {
		src := b.c.sources(r.src, b.n, k.self)
		if len(src) == 0 {
			return
		}
		i = len(b.out)
		b.at[k] = i
		b.out = append(b.out, wire.FilterRule{SrcIPs: src, IPProto: r.protos})
	}
	f := &b.out[i]
	for _, ip := range sel.dstIPs(b.n) {
		for _, p := range d.ports {
			dest := wire.NetPortRange{IP: ip, Ports: wire.PortRange{First: p.first, Last: p.last}}
			j, known := b.dsts[filterDst{i, dest}]
			if !known {
				b.dsts[filterDst{i, dest}] = len(f.DstPorts)
				f.DstPorts = append(f.DstPorts, dest)
				f.MeshOrigins = append(f.MeshOrigins, []wire.RuleOrigin{r.origin})
			} else if len(f.MeshOrigins[j]) < maxMerged && !slices.Contains(f.MeshOrigins[j], r.origin) {
				f.MeshOrigins[j] = append(f.MeshOrigins[j], r.origin)
			}
		}
	}
}

// protosKey is a cheap key for a list of protocols: nearly always none or one.
func protosKey(protos []int) string {
	var b [4]byte
	key := b[:0]
	for _, p := range protos {
		key = append(key, byte(p))
	}
	return string(key)
}

// capabilities adds the capabilities that a rule gives at the node.
func (b *filterBuilder) capabilities(r *rule, refs []dstRef) {
	// The sources of autogroup:self are others than those of its neighbours.
	for _, self := range []bool{false, true} {
		var dsts []string
		for _, ref := range refs {
			if sel := r.dsts[ref.dst]; (sel.kind == kindSelf) == self {
				dsts = append(dsts, sel.capDsts(b.n)...)
			}
		}
		slices.Sort(dsts)
		if dsts = slices.Compact(dsts); len(dsts) == 0 || len(r.src.sels) == 0 {
			continue
		}
		src := b.c.sources(r.src, b.n, self)
		if len(src) == 0 && (self || r.companion) {
			continue
		}
		if src == nil {
			src = []string{}
		}
		b.out = append(b.out, wire.FilterRule{SrcIPs: src, CapGrant: []wire.CapGrant{{Dsts: dsts, CapMap: r.app}}})
	}
}

// capDsts returns where a selector gives capabilities at n: at addresses of the
// node, and in networks behind it.
func (s *selSet) capDsts(n *node) (out []string) {
	for _, a := range n.Addrs {
		if s.kind != kindVia && (s.kind != kindPrefix || s.prefix.Contains(a)) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()).String())
		}
	}
	if (s.kind == kindPrefix || s.kind == kindVia) && n.routes(s.prefix) {
		out = append(out, s.prefix.String())
	}
	return out
}

// refs returns the destinations that match a node, in the policy's order.
func (c *Compiled) refs(n *node) []dstRef { return sortedRefs(n.sels) }

func sortedRefs(sels []*selSet) []dstRef {
	var refs []dstRef
	for _, s := range sels {
		// What lies behind an exit node is no address of the mesh: such a rule
		// shows the exit node and admits nothing.
		if s.kind != kindInternet && s.kind != kindViaNet {
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

// dstIPs returns the destinations of filter rules that a selector means at n.
func (s *selSet) dstIPs(n *node) []string {
	switch s.kind {
	case kindAll:
		return []string{"*"}
	case kindPrefix, kindVia:
		return []string{iprange.Of(s.prefix).String()}
	}
	var out []string
	for _, a := range n.Addrs {
		out = append(out, a.String())
	}
	return out
}

// covers reports whether a destination of the rule covers protocol and port.
func (a *access) covers(dst, proto int, port uint16) bool {
	if a.app != nil {
		return false
	}
	if proto == 1 || proto == 58 {
		return true
	}
	if a.protos == nil {
		if proto != 6 && proto != 17 {
			return false
		}
	} else if !slices.Contains(a.protos, proto) {
		return false
	}
	for _, p := range a.dsts[dst].ports {
		if p == allPorts || hasPorts(proto) && p.first <= port && port <= p.last {
			return true
		}
	}
	return false
}
