package netmap

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/iprange"
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
	sources []iprange.Range
	grants  []grant
}

type grant struct {
	dsts []netip.Prefix
	from wire.CapGrant
}

func compileGrants(rules []wire.FilterRule) []grantRule {
	var out []grantRule
	for i := range rules {
		if len(rules[i].CapGrant) == 0 {
			continue
		}
		var g grantRule
		for _, s := range rules[i].SrcIPs {
			// What is no address, such as "cap:x", gives nothing.
			if ranges, err := iprange.Parse(s); err == nil {
				g.sources = append(g.sources, ranges...)
			}
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
			if !slices.ContainsFunc(rule.sources, func(r iprange.Range) bool { return r.Contains(src) }) {
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
