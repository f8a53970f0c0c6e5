package netmap

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"

	"mesh/control/wire"
	"mesh/identity"
)

// Identity says who a peer is: owner or tags, addresses, and the capabilities
// that the filter's grants give it at this node.
func (m *Map) Identity(p *Peer) identity.Peer {
	who := m.describe(p.Node)
	who.Capabilities = m.capabilities(who.Addresses)
	return who
}

// SelfIdentity says who this node is to others.
func (m *Map) SelfIdentity() identity.Peer { return m.describe(m.Self()) }

func (m *Map) describe(n *wire.Node) identity.Peer {
	who := identity.Peer{
		ID:        identity.StableID(n.StableID),
		Key:       n.Key,
		Name:      strings.TrimSuffix(n.Name, "."),
		Addresses: addresses(n),
		Tags:      slices.Clone(n.Tags),
	}
	if !slices.IsSorted(who.Tags) {
		who.Tags = slices.Sorted(slices.Values(who.Tags))
	}
	if u, ok := m.User(n.User); ok && len(n.Tags) == 0 {
		who.User, who.Groups = u.LoginName, u.Groups
	}
	return who
}

// addresses returns a node's own addresses, those of IPv4 first.
func addresses(n *wire.Node) []netip.Addr {
	out := make([]netip.Addr, 0, len(n.Addresses))
	for _, p := range n.Addresses {
		out = append(out, p.Addr())
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out
}

// grantRule is a filter rule that gives capabilities.
type grantRule struct {
	sources []addrRange
	grants  []grant
}

type grant struct {
	dsts []netip.Prefix
	from wire.CapGrant
}

type addrRange struct{ first, last netip.Addr }

func (r addrRange) contains(a netip.Addr) bool {
	return a.BitLen() == r.first.BitLen() && r.first.Compare(a) <= 0 && a.Compare(r.last) <= 0
}

func compileGrants(rules []wire.FilterRule) []grantRule {
	var out []grantRule
	for i := range rules {
		if len(rules[i].CapGrant) == 0 {
			continue
		}
		var g grantRule
		for _, s := range rules[i].SrcIPs {
			g.sources = append(g.sources, parseRanges(s)...)
		}
		for _, c := range rules[i].CapGrant {
			one := grant{from: c}
			for _, d := range c.Dsts {
				if p, err := netip.ParsePrefix(d); err == nil && p == p.Masked() {
					one.dsts = append(one.dsts, p)
				}
			}
			if len(one.dsts) > 0 {
				g.grants = append(g.grants, one)
			}
		}
		if len(g.sources) > 0 && len(g.grants) > 0 {
			out = append(out, g)
		}
	}
	return out
}

// parseRanges reads the forms of filter addresses: "*", address, network or
// "first-last". Anything else, such as "cap:x", gives nothing.
func parseRanges(s string) []addrRange {
	if s == "*" {
		return []addrRange{
			{netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255})},
			{netip.IPv6Unspecified(), lastOf(netip.PrefixFrom(netip.IPv6Unspecified(), 0))},
		}
	}
	if first, last, ok := strings.Cut(s, "-"); ok {
		a, err1 := netip.ParseAddr(first)
		b, err2 := netip.ParseAddr(last)
		if err1 != nil || err2 != nil || a.BitLen() != b.BitLen() || b.Less(a) {
			return nil
		}
		return []addrRange{{a.WithZone(""), b.WithZone("")}}
	}
	if p, err := netip.ParsePrefix(s); err == nil && p == p.Masked() {
		return []addrRange{{p.Addr(), lastOf(p)}}
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return []addrRange{{a.WithZone(""), a.WithZone("")}}
	}
	return nil
}

// lastOf returns the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// capabilities collects what the grants give a peer with those addresses at
// the own address of the same family. A grant counts once, and values of one
// name are in the order of the rules.
func (m *Map) capabilities(srcs []netip.Addr) map[string][]json.RawMessage {
	var out map[string][]json.RawMessage
	own := addresses(m.Self())
	for _, rule := range m.grants {
		// Own addresses at which this rule may give something.
		var at []netip.Addr
		for _, src := range srcs {
			if !slices.ContainsFunc(rule.sources, func(r addrRange) bool { return r.contains(src) }) {
				continue
			}
			if i := slices.IndexFunc(own, func(a netip.Addr) bool { return a.BitLen() == src.BitLen() }); i >= 0 {
				at = append(at, own[i])
			}
		}
		for _, g := range rule.grants {
			if !slices.ContainsFunc(at, func(a netip.Addr) bool {
				return slices.ContainsFunc(g.dsts, func(p netip.Prefix) bool { return p.Contains(a) })
			}) {
				continue
			}
			if out == nil {
				out = map[string][]json.RawMessage{}
			}
			for _, name := range g.from.Caps {
				out[name] = append(out[name], []json.RawMessage{}...)
			}
			for name, values := range g.from.CapMap {
				out[name] = append(out[name], values...)
			}
		}
	}
	for name, values := range out {
		if values == nil {
			out[name] = []json.RawMessage{}
		}
	}
	return out
}
