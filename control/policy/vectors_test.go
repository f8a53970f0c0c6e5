package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// vector is one case of the shared policy vectors, which live outside the
// repository.
type vector struct {
	ID       string
	Policy   json.RawMessage
	Rejected bool
	Users    []struct{ Name, Email, Role string }
	Nodes    map[string]struct {
		User                        string
		Tags                        []string
		IPv4, IPv6                  netip.Addr
		RoutableIPs, ApprovedRoutes []netip.Prefix
	}
	Want map[string]struct {
		Filter []wire.FilterRule
		Peers  map[string]struct {
			AllowedIPs    []netip.Prefix `json:"allowed_ips"`
			PrimaryRoutes []netip.Prefix `json:"primary_routes"`
		}
		SelfCapMap map[string][]json.RawMessage
	}
}

func (v *vector) nodes() ([]Node, map[string]wire.NodeID) {
	var names []string
	for name := range v.Nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	ids := make(map[string]wire.NodeID)
	var out []Node
	for i, name := range names {
		n := v.Nodes[name]
		ids[name] = wire.NodeID(i + 1)
		c := Node{ID: ids[name], User: n.User, Tags: n.Tags, Addrs: []netip.Addr{n.IPv4, n.IPv6}, Routes: n.ApprovedRoutes}
		for _, u := range v.Users {
			if u.Name == n.User {
				c.Email, c.Role = u.Email, u.Role
			}
		}
		out = append(out, c)
	}
	return out, ids
}

func (v *vector) users() []User {
	var out []User
	for _, u := range v.Users {
		out = append(out, User{Name: u.Name, Email: u.Email, Role: u.Role})
	}
	return out
}

func (v *vector) text() []byte {
	var s string
	if json.Unmarshal(v.Policy, &s) == nil {
		return []byte(s)
	}
	return v.Policy
}

// TestVectors prints for each kind of vectors how many match.
func TestVectors(t *testing.T) {
	dir := filepath.Join("..", "..", "..", "shared", "policy-vectors")
	if _, err := os.Stat(dir); err != nil {
		t.Skip("the shared policy vectors are not here: ", err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			data = []byte(strings.NewReplacer(`"routable_ips"`, `"RoutableIPs"`, `"approved_routes"`, `"ApprovedRoutes"`, `"self_capmap"`, `"SelfCapMap"`).Replace(string(data)))
			var all []vector
			if err := json.Unmarshal(data, &all); err != nil {
				t.Fatal(err)
			}
			matched := 0
			for i := range all {
				if msg := all[i].check(); msg != "" {
					t.Errorf("%s: %s", all[i].ID, msg)
				} else {
					matched++
				}
			}
			t.Logf("%d of %d vectors match", matched, len(all))
		})
	}
}

func (v *vector) check() string {
	p, err := Parse(v.text())
	nodes, ids := v.nodes()
	var failures []TestFailure
	if err == nil {
		failures = p.Test(nodes, v.users())
	}
	if v.Rejected != (err != nil || len(failures) > 0) {
		return fmt.Sprintf("rejected: %v, got error %v, tests %v", v.Rejected, err, failures)
	}
	if v.Rejected {
		return ""
	}
	for name, n := range v.Nodes {
		for _, r := range n.RoutableIPs {
			// Some were recorded before their routes were approved.
			if slices.Contains(n.ApprovedRoutes, r) && !p.AutoApproves(nodes[ids[name]-1], r) {
				return fmt.Sprintf("route %v of %s is not approved", r, name)
			}
		}
	}
	c := Compile(p, nodes)
	for name, want := range v.Want {
		id := ids[name]
		if msg := sameCaps(c.Filter(id), want.Filter); msg != "" {
			return fmt.Sprintf("capabilities at %s: %s", name, msg)
		}
		if msg := sameMeaning(c.Filter(id), want.Filter); msg != "" {
			got, _ := json.Marshal(c.Filter(id))
			return fmt.Sprintf("filter of %s: %s\n%s", name, msg, got)
		}
		if msg := v.checkPeers(c, name, ids); msg != "" {
			return msg
		}
		if want.SelfCapMap != nil {
			if msg := v.checkAttributes(c.Attributes(id), want.SelfCapMap); msg != "" {
				return fmt.Sprintf("attributes of %s: %s", name, msg)
			}
		}
	}
	return ""
}

// checkAttributes compares attributes, without those that the service adds to
// every node for features of its own.
func (v *vector) checkAttributes(got, want map[string][]json.RawMessage) string {
	for name := range got {
		if _, ok := want[name]; !ok {
			return fmt.Sprintf("%q is too much", name)
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok && bytes.Contains(v.text(), []byte(`"`+name+`"`)) {
			return fmt.Sprintf("%q is missing", name)
		}
	}
	return ""
}

// checkPeers compares what a node is told about others. Of several routers of
// one network any one may be in charge, but one must be.
func (v *vector) checkPeers(c *Compiled, name string, ids map[string]wire.NodeID) string {
	id, want := ids[name], v.Want[name]
	holders := func(r netip.Prefix) (n int) {
		for _, o := range v.Nodes {
			if slices.Contains(o.ApprovedRoutes, r) {
				n++
			}
		}
		return n
	}
	shared := func(r netip.Prefix) bool { return r.Bits() > 0 && holders(r) > 1 }
	var peers, wantPeers []string
	charge, wantCharge := make(map[netip.Prefix]int), make(map[netip.Prefix]int)
	for other, n := range v.Nodes {
		if !slices.Contains(c.Visible(id), ids[other]) {
			continue
		}
		allowed := []netip.Prefix{netip.PrefixFrom(n.IPv4, 32), netip.PrefixFrom(n.IPv6, 128)}
		for _, r := range c.Routes(id, ids[other]) {
			if shared(r) {
				charge[r]++
			} else {
				allowed = append(allowed, r)
			}
		}
		peers = append(peers, fmt.Sprint(other, sortedPrefixes(allowed)))
	}
	for other, w := range want.Peers {
		var allowed []netip.Prefix
		for _, r := range w.AllowedIPs {
			switch {
			case r.IsSingleIP():
				allowed = append(allowed, r)
			case !slices.Contains(v.Nodes[other].ApprovedRoutes, r):
				// In one vector some peers of a router, and not others of the same
				// kind, were sent a route that the topology does not call approved:
				// it was being approved just then. Approval is given to the
				// compiler, so such a route says nothing about it.
			case shared(r):
				wantCharge[r]++
			default:
				allowed = append(allowed, r)
			}
		}
		wantPeers = append(wantPeers, fmt.Sprint(other, sortedPrefixes(allowed)))
	}
	for _, r := range v.Nodes[name].ApprovedRoutes {
		delete(charge, r) // it may be in charge itself
		delete(wantCharge, r)
	}
	slices.Sort(peers)
	slices.Sort(wantPeers)
	if !slices.Equal(peers, wantPeers) {
		return fmt.Sprintf("peers of %s: got %v, want %v", name, peers, wantPeers)
	}
	if !maps.Equal(charge, wantCharge) {
		return fmt.Sprintf("routers in charge for %s: got %v, want %v", name, charge, wantCharge)
	}
	return ""
}

func sortedPrefixes(p []netip.Prefix) []netip.Prefix {
	p = slices.Clone(p)
	slices.SortFunc(p, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	return p
}

// parseRange reads the address forms of filter rules.
func parseRange(s string) []iprange.Range {
	if s == "*" {
		return []iprange.Range{iprange.Of(netip.MustParsePrefix("0.0.0.0/0")), iprange.Of(netip.MustParsePrefix("::/0"))}
	}
	if a, b, ok := strings.Cut(s, "-"); ok {
		return []iprange.Range{{First: netip.MustParseAddr(a), Last: netip.MustParseAddr(b)}}
	}
	if strings.Contains(s, "/") {
		return []iprange.Range{iprange.Of(netip.MustParsePrefix(s))}
	}
	a := netip.MustParseAddr(s)
	return []iprange.Range{{First: a, Last: a}}
}

// flat is a filter rule with its addresses parsed.
type flat struct {
	wire.FilterRule
	srcs []iprange.Range
	dsts [][]iprange.Range
}

func flatten(rules []wire.FilterRule) []flat {
	var out []flat
	for _, r := range rules {
		f := flat{FilterRule: r}
		if len(r.IPProto) == 0 {
			f.IPProto = []int{6, 17, 1, 58}
		}
		for _, s := range r.SrcIPs {
			f.srcs = append(f.srcs, parseRange(s)...)
		}
		for _, d := range r.DstPorts {
			f.dsts = append(f.dsts, parseRange(d.IP))
		}
		out = append(out, f)
	}
	return out
}

func inRanges(list []iprange.Range, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(r iprange.Range) bool { return r.Contains(a) })
}

// allows is the meaning of filter rules, read naively.
func allows(rules []flat, src, dst netip.Addr, proto int, port uint16) bool {
	for _, r := range rules {
		if !slices.Contains(r.IPProto, proto) || !inRanges(r.srcs, src) {
			continue
		}
		for i, d := range r.DstPorts {
			if d.Ports.First <= port && port <= d.Ports.Last && inRanges(r.dsts[i], dst) {
				return true
			}
		}
	}
	return false
}

// sameMeaning compares two filters at every edge of every range in either: in
// between, neither can change its mind.
func sameMeaning(got, want []wire.FilterRule) string {
	var srcs, dsts []netip.Addr
	ports := map[uint16]bool{}
	protos := map[int]bool{6: true, 17: true, 1: true, 58: true, 132: true, 47: true}
	edges := func(list []netip.Addr, s string) []netip.Addr {
		for _, r := range parseRange(s) {
			for _, a := range []netip.Addr{r.First.Prev(), r.First, r.Last, r.Last.Next()} {
				if a.IsValid() {
					list = append(list, a)
				}
			}
		}
		return list
	}
	for _, rules := range [][]wire.FilterRule{got, want} {
		for _, r := range rules {
			for _, s := range r.SrcIPs {
				srcs = edges(srcs, s)
			}
			for _, d := range r.DstPorts {
				dsts = edges(dsts, d.IP)
				for _, p := range []uint16{d.Ports.First - 1, d.Ports.First, d.Ports.Last, d.Ports.Last + 1} {
					ports[p] = true
				}
			}
			for _, p := range r.IPProto {
				protos[p] = true
			}
		}
	}
	distinctAddrs := func(l []netip.Addr) []netip.Addr {
		slices.SortFunc(l, netip.Addr.Compare)
		return slices.Compact(l)
	}
	g, w := flatten(got), flatten(want)
	dsts = distinctAddrs(dsts)
	for _, s := range distinctAddrs(srcs) {
		for _, d := range dsts {
			if s.BitLen() != d.BitLen() {
				continue
			}
			for port := range ports {
				for proto := range protos {
					if allows(g, s, d, proto, port) != allows(w, s, d, proto, port) {
						return fmt.Sprintf("%v to %v, port %d, protocol %d is allowed on one side only", s, d, port, proto)
					}
				}
			}
		}
	}
	return ""
}

// sameCaps compares the capabilities of two filters, as a set of who gets what
// where.
func sameCaps(got, want []wire.FilterRule) string {
	list := func(rules []wire.FilterRule) (out []string) {
		for _, r := range rules {
			srcs := slices.Clone(r.SrcIPs)
			slices.Sort(srcs)
			for _, g := range r.CapGrant {
				for _, d := range g.Dsts {
					for name, values := range g.CapMap {
						for i := range values {
							var v any
							if err := json.Unmarshal(values[i], &v); err != nil {
								return []string{err.Error()}
							}
							values[i], _ = json.Marshal(v)
						}
						out = append(out, fmt.Sprintf("%v %s %s %s", srcs, d, name, values))
					}
				}
			}
		}
		slices.Sort(out)
		return out
	}
	g, w := list(got), list(want)
	if !slices.Equal(g, w) {
		return fmt.Sprintf("got %q, want %q", g, w)
	}
	return ""
}
