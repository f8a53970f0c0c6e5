package policy

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tailscale/hujson"

	"mesh/control/policy/policytest"
)

// naive answers from the text of a made-up policy and a list of nodes, slowly and
// with nothing of the parser or the compiler.
type naive struct {
	Groups map[string][]string
	ACLs   []struct {
		Src, Dst []string
		Proto    string
	}
	Grants []struct {
		Src, Dst, IP, Via []string
		App               map[string]any
	}
	nodes []Node
}

// opening is one way in that a policy gives.
type opening struct {
	srcs, via         []string
	dst, proto, ports string
	app               bool
}

func (w *naive) openings() (out []opening) {
	for _, a := range w.ACLs {
		for _, d := range a.Dst {
			i := strings.LastIndex(d, ":")
			out = append(out, opening{srcs: a.Src, dst: d[:i], proto: a.Proto, ports: d[i+1:]})
		}
	}
	for _, g := range w.Grants {
		for _, d := range g.Dst {
			for _, ip := range g.IP {
				proto, ports, ok := strings.Cut(ip, ":")
				if !ok {
					proto, ports = "", ip
				}
				out = append(out, opening{srcs: g.Src, via: g.Via, dst: d, proto: proto, ports: ports})
			}
			if len(g.App) > 0 {
				out = append(out, opening{srcs: g.Src, via: g.Via, dst: d, app: true})
			}
		}
	}
	return out
}

// networks of a selector, if it is one.
func networks(sel string) (out []netip.Prefix) {
	switch sel {
	case "lan":
		sel = "10.1.0.0/16"
	case "ipset:some":
		for _, s := range strings.Fields("100.64.0.5/32 10.1.0.0/23 10.1.3.0/24 10.1.4.0/22 10.1.8.0/21 10.1.16.0/20 10.1.32.0/19 10.1.64.0/18 10.1.128.0/17") {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	if a, err := netip.ParseAddr(sel); err == nil {
		return []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
	}
	if p, err := netip.ParsePrefix(sel); err == nil {
		return []netip.Prefix{p}
	}
	return nil
}

func sameUser(a, b Node) bool {
	return len(a.Tags) == 0 && len(b.Tags) == 0 && a.User != "" && strings.EqualFold(a.User, b.User)
}

// is reports whether a selector means the node by name.
func (w *naive) is(sel string, n Node) bool {
	owned := len(n.Tags) == 0 && n.User != ""
	switch {
	case sel == "*" || sel == "autogroup:danger-all":
		return true
	case sel == "autogroup:member":
		return owned
	case sel == "autogroup:tagged":
		return len(n.Tags) > 0
	case sel == "autogroup:admin":
		return owned && n.Role == "admin"
	case sel == "user:*@example.com":
		return owned && (strings.HasSuffix(strings.ToLower(n.User), "@example.com") || n.Email != "")
	case strings.HasPrefix(sel, "tag:"):
		return slices.Contains(n.Tags, sel)
	case strings.HasPrefix(sel, "group:"):
		return slices.ContainsFunc(w.Groups[sel], func(u string) bool { return w.is(u, n) })
	case strings.Contains(sel, "@"):
		u := strings.TrimSuffix(sel, "@")
		return owned && (strings.EqualFold(u, n.User) || strings.EqualFold(u, n.Email))
	}
	return false
}

// routes reports whether a part of p lies behind the node.
func routes(n Node, p netip.Prefix) bool {
	return slices.ContainsFunc(n.Routes, func(r netip.Prefix) bool { return r.Bits() > 0 && r.Overlaps(p) })
}

func touches(n Node, p netip.Prefix) bool {
	return slices.ContainsFunc(n.Addrs, p.Contains) || routes(n, p)
}

// source reports whether an address is one of the sources; self is the node
// whose user's nodes alone count, if any.
func (w *naive) source(srcs []string, a netip.Addr, self *Node) bool {
	return slices.ContainsFunc(srcs, func(sel string) bool {
		for _, n := range w.nodes {
			if w.is(sel, n) && slices.Contains(n.Addrs, a) && (self == nil || sameUser(n, *self)) {
				return true
			}
			if self == nil && sel == "*" && slices.ContainsFunc(n.Routes, func(r netip.Prefix) bool { return r.Bits() > 0 && r.Contains(a) }) {
				return true
			}
		}
		if self != nil {
			return false
		}
		mesh := netip.MustParsePrefix("100.64.0.0/10").Contains(a) && !netip.MustParsePrefix("100.115.92.0/23").Contains(a) ||
			netip.MustParsePrefix("fd7a:115c:a1e0::/48").Contains(a)
		return sel == "*" && mesh || sel == "autogroup:danger-all" ||
			slices.ContainsFunc(networks(sel), func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// target reports whether an opening is about an address at a node.
func (o opening) target(w *naive, to Node, a netip.Addr) bool {
	nets := networks(o.dst)
	switch {
	case len(o.via) > 0:
		return slices.ContainsFunc(o.via, func(t string) bool { return slices.Contains(to.Tags, t) }) &&
			slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(a) && routes(to, p) })
	case o.dst == "*":
		return true
	case nets != nil:
		return slices.ContainsFunc(nets, func(p netip.Prefix) bool { return p.Contains(a) && touches(to, p) })
	case o.dst == "autogroup:self":
		return len(to.Tags) == 0 && to.User != "" && slices.Contains(to.Addrs, a)
	}
	return w.is(o.dst, to) && slices.Contains(to.Addrs, a)
}

func (o opening) covers(proto int, port uint16) bool {
	protos := map[string][]int{"": {6, 17, 1, 58}, "tcp": {6}, "udp": {17}, "icmp": {1}, "sctp": {132}, "47": {47}}[o.proto]
	if !slices.Contains(protos, proto) {
		return false
	}
	return slices.ContainsFunc(strings.Split(o.ports, ","), func(s string) bool {
		if s == "*" {
			return true
		}
		first, last, ok := strings.Cut(s, "-")
		if !ok {
			last = first
		}
		a, _ := strconv.Atoi(first)
		b, _ := strconv.Atoi(last)
		return a <= int(port) && int(port) <= b
	})
}

// allows reports whether the filter of a node lets a packet in.
func (w *naive) allows(to Node, p policytest.Packet) bool {
	return slices.ContainsFunc(w.openings(), func(o opening) bool {
		var self *Node
		if o.dst == "autogroup:self" {
			self = &to
		}
		return !o.app && o.covers(p.Proto, p.Port) && o.target(w, to, p.Dst) && w.source(o.srcs, p.Src, self)
	})
}

// talks reports whether a may begin to talk to b, or to something behind it.
func (w *naive) talks(a, b Node) bool {
	return slices.ContainsFunc(w.openings(), func(o opening) bool {
		if !slices.ContainsFunc(o.srcs, func(s string) bool {
			return w.is(s, a) || slices.ContainsFunc(networks(s), func(p netip.Prefix) bool { return touches(a, p) })
		}) {
			return false
		}
		exit := slices.Contains(b.Routes, netip.MustParsePrefix("0.0.0.0/0"))
		nets := networks(o.dst)
		switch {
		case len(o.via) > 0:
			return slices.ContainsFunc(o.via, func(t string) bool { return slices.Contains(b.Tags, t) }) &&
				(o.dst == "autogroup:internet" && exit || slices.ContainsFunc(nets, func(p netip.Prefix) bool { return routes(b, p) }))
		case o.dst == "autogroup:internet":
			return exit
		case o.dst == "autogroup:self":
			return sameUser(a, b)
		}
		return w.is(o.dst, b) || slices.ContainsFunc(nets, func(p netip.Prefix) bool { return touches(b, p) })
	})
}

// Filters, answers and peers say what the naive reading says, on random policies.
func TestEqualsNaive(t *testing.T) {
	seeds := uint64(600)
	if testing.Short() || raceEnabled {
		seeds = 60
	}
	accepted, total := 0, 0
	for seed := range seeds {
		m := policytest.New(seed)
		text := m.Policy()
		p := mustParse(t, text)
		std, err := hujson.Standardize([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var w naive
		if err := json.Unmarshal(std, &w); err != nil {
			t.Fatal(err)
		}
		var made []policytest.Node
		for i := range 1 + m.IntN(8) {
			made = append(made, m.Node(i+1))
			w.nodes = append(w.nodes, fromTest(made[i]))
		}
		c := Compile(p, w.nodes)
		for i, to := range w.nodes {
			f := c.Filter(to.ID)
			rules := flatten(f)
			for range 60 {
				k := m.Packet(made, made[i])
				if k.Src.Is4() != k.Dst.Is4() {
					continue
				}
				want := w.allows(to, k)
				if got := allows(rules, k.Src, k.Dst, k.Proto, k.Port); got != want {
					t.Fatalf("seed %d: %+v at node %d: %v, want %v\n%s\n%s", seed, k, to.ID, got, want, text, format(f))
				}
				if slices.Contains(to.Addrs, k.Dst) && k.Proto != 1 && k.Proto != 58 {
					ok, by := c.Allows(k.Src, k.Dst, k.Proto, k.Port)
					if ok != want || ok != (len(by) > 0) {
						t.Fatalf("seed %d: %+v to node %d: Allows %v %v, want %v\n%s", seed, k, to.ID, ok, by, want, text)
					}
					if e := c.Explain(Endpoint{Addr: k.Src}, Endpoint{Addr: k.Dst}, k.Proto, k.Port); e.Allowed != want {
						t.Fatalf("seed %d: %+v to node %d: explained\n%s\nwant %v\n%s", seed, k, to.ID, e, want, text)
					}
				}
				total++
				if want {
					accepted++
				}
			}
			for _, from := range w.nodes {
				if from.ID == to.ID {
					continue
				}
				want := w.talks(from, to) || w.talks(to, from)
				if got := slices.Contains(c.Visible(to.ID), from.ID); got != want {
					t.Fatalf("seed %d: %d sees %d: %v, want %v\n%s", seed, to.ID, from.ID, got, want, text)
				}
				k := policytest.Packet{Proto: []int{6, 17, 132}[m.IntN(3)], Port: []uint16{1, 22, 80, 443}[m.IntN(4)]}
				want = false
				for i := range 2 {
					k.Src, k.Dst = from.Addrs[i], to.Addrs[i]
					want = want || w.allows(to, k)
				}
				if _, got := c.CanReach(from.ID, to.ID, uint8(k.Proto), k.Port); got != want {
					t.Fatalf("seed %d: node %d can reach %d: %v, want %v\n%s", seed, from.ID, to.ID, got, want, text)
				}
			}
		}
	}
	t.Logf("%d of %d packets accepted", accepted, total)
	if accepted < total/20 || accepted > total*19/20 {
		t.Error("not a fair test")
	}
}
