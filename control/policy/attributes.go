package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailscale/hujson"

	"mesh/control/wire"
)

// nodeAttr is an entry of "nodeAttrs".
type nodeAttr struct {
	targets []*selector
	attrs   []string
	app     map[string][]json.RawMessage
	pools   []netip.Prefix
}

// reserved are addresses that no node may have: those of services inside of a
// node, and those left to virtual machines of ChromeOS.
var reserved = []netip.Prefix{netip.MustParsePrefix("100.100.100.0/24"), netip.MustParsePrefix("100.115.92.0/23")}

var poolRange = netip.MustParsePrefix("100.64.0.0/10")

func (r *reader) readNodeAttr(i int, v hujson.Value) {
	name := fmt.Sprintf("nodeAttrs[%d]", i)
	got, ok := r.entry(v, name, []string{"target", "attr", "app", "ipPool"}, "target")
	if !ok {
		return
	}
	var a nodeAttr
	if m, ok := got["target"]; ok {
		for _, t := range r.texts(m.value, "target") {
			if sels, ok := r.selectors(t.text, t.at, inTarget); ok {
				a.targets = append(a.targets, sels...)
			}
		}
	}
	if m, ok := got["attr"]; ok && !isNull(m.value) {
		for _, t := range r.texts(m.value, "attr") {
			if t.text == "" || len(t.text) > 1024 || strings.ContainsFunc(t.text, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
				r.fail(t.at, "", "malformed attribute %q", t.text)
				continue
			}
			for _, name := range []string{wire.AttrKeyExpiry, wire.AttrMaxStale} {
				if _, ok := wire.AttrSpan(t.text, name); !ok && strings.HasPrefix(t.text, name) {
					r.fail(t.at, "want a time like 24h or 30d after the colon, or never", "malformed attribute %q", t.text)
				}
			}
			a.attrs = append(a.attrs, t.text)
		}
	}
	if m, ok := got["app"]; ok && !isNull(m.value) {
		a.app = r.capabilities(m.value, "app", true)
	}
	if m, ok := got["ipPool"]; ok && !isNull(m.value) {
		for _, t := range r.texts(m.value, "ipPool") {
			if p, ok := r.pool(t.text, t.at); ok {
				a.pools = append(a.pools, p)
			}
		}
	}
	r.attrs = append(r.attrs, a)
}

// pool reads a network from which nodes get their IPv4 addresses.
func (r *reader) pool(s string, at int) (netip.Prefix, bool) {
	p, err := parsePrefix(s)
	if err != nil {
		r.fail(at, "", "ipPool: %v", err)
		return p, false
	}
	if p.Bits() < poolRange.Bits() || !poolRange.Contains(p.Addr()) {
		r.fail(at, fmt.Sprintf("nodes have addresses in %v", poolRange), "ipPool %q is out of range", s)
		return p, false
	}
	for _, x := range reserved {
		if x.Overlaps(p) {
			r.fail(at, "", "ipPool %q: network within reserved range %v", s, x)
			return p, false
		}
	}
	return p, true
}

// Attributes returns what the policy adds to the node's own capabilities: those
// of "nodeAttrs" and of network-wide settings, with their values. A name without
// values has a nil list. The values must not be changed.
func (c *Compiled) Attributes(id wire.NodeID) map[string][]json.RawMessage {
	out := make(map[string][]json.RawMessage)
	n := c.nodes[id]
	if n == nil || c.policy == nil {
		return out
	}
	if c.policy.randomPort {
		out["randomize-client-port"] = nil
	}
	seen := make(map[int]bool)
	for _, s := range n.sels {
		if s.kind == kindPrefix && !n.at(s.prefix) {
			continue
		}
		for _, i := range s.attrs {
			if seen[i] {
				continue
			}
			seen[i] = true
			a := &c.policy.attrs[i]
			for _, name := range a.attrs {
				if _, ok := out[name]; !ok {
					out[name] = nil
				}
			}
			for name, values := range a.app {
				out[name] = append(out[name][:len(out[name]):len(out[name])], values...)
			}
		}
	}
	return out
}

// KeyLife returns how long keys of the node are good for by the attribute
// wire.AttrKeyExpiry, 0 = for ever. Of several that mean the node the shortest
// counts. It reports false if there is none.
func (p *Policy) KeyLife(n Node) (life time.Duration, ok bool) {
	for i := range p.attrs {
		a := &p.attrs[i]
		if !slices.ContainsFunc(a.targets, func(s *selector) bool { return p.isOf(&n, s) }) {
			continue
		}
		for _, attr := range a.attrs {
			d, is := wire.AttrSpan(attr, wire.AttrKeyExpiry)
			if is && (!ok || life == 0 || d != 0 && d < life) {
				life, ok = d, true
			}
		}
	}
	return life, ok
}

// AddressPools returns the networks from which the node should get its IPv4
// address, in the order of preference; none: any. It is for new nodes: changing
// the policy moves none.
func (p *Policy) AddressPools(n Node) []netip.Prefix {
	var out []netip.Prefix
	for i := range p.attrs {
		a := &p.attrs[i]
		for _, s := range a.targets {
			if len(a.pools) > 0 && p.isOf(&n, s) {
				out = append(out, a.pools...)
				break
			}
		}
	}
	return out
}
