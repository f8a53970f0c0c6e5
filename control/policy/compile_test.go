package policy

import (
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"mesh/control/policy/policytest"
	"mesh/control/wire"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func testNodes() []Node {
	n := func(id int, user string, tags ...string) Node {
		return Node{ID: wire.NodeID(id), User: user, Tags: tags,
			Addrs: []netip.Addr{addr(fmt.Sprintf("100.64.0.%d", id)), addr(fmt.Sprintf("fd7a:115c:a1e0::%x", id))}}
	}
	router := n(5, "", "tag:router")
	router.Routes = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("0.0.0.0/0")}
	carol := n(6, "carol")
	carol.Email = "Carol@example.com"
	return []Node{n(1, "alice@example.com"), n(2, "alice@example.com"), n(3, "bob"), n(4, "bob", "tag:db"), router, carol}
}

const testPolicy = `{
	"groups": {"group:ops": ["alice@example.com"]},
	"tagOwners": {"tag:db": ["group:ops"], "tag:router": []},
	"hosts": {"lan": "10.1.2.0/24"},
	"acls": [
		{"action": "accept", "src": ["group:ops"], "dst": ["tag:db:5432"]},
		{"action": "accept", "src": ["ALICE@example.com"], "dst": ["tag:db:5432,80"]},
		{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"], "proto": "tcp"},
		{"action": "accept", "src": ["bob@"], "dst": ["lan:443"]},
		{"action": "accept", "src": ["carol@example.com"], "dst": ["autogroup:internet:*"]},
	],
}`

func format(rules []wire.FilterRule) string {
	var out []string
	for _, r := range rules {
		var dsts []string
		for i, d := range r.DstPorts {
			var from []string
			for _, o := range r.MeshOrigins[i] {
				from = append(from, fmt.Sprintf("{%s %d}", o.Rule, o.Line))
			}
			dsts = append(dsts, fmt.Sprintf("%s:%d-%d%v", d.IP, d.Ports.First, d.Ports.Last, from))
		}
		out = append(out, fmt.Sprintf("%v -> %v %v", r.SrcIPs, dsts, r.IPProto))
	}
	return strings.Join(out, "\n")
}

func TestFilter(t *testing.T) {
	c := Compile(mustParse(t, testPolicy), testNodes())
	for id, want := range map[wire.NodeID]string{
		1: `[100.64.0.1-100.64.0.2 fd7a:115c:a1e0::1-fd7a:115c:a1e0::2] -> [100.64.0.1:0-65535[{acls[2] 8}] fd7a:115c:a1e0::1:0-65535[{acls[2] 8}]] [6]`,
		3: `[100.64.0.3 fd7a:115c:a1e0::3] -> [100.64.0.3:0-65535[{acls[2] 8}] fd7a:115c:a1e0::3:0-65535[{acls[2] 8}]] [6]`,
		4: `[100.64.0.1-100.64.0.2 fd7a:115c:a1e0::1-fd7a:115c:a1e0::2] -> [100.64.0.4:5432-5432[{acls[0] 6}] fd7a:115c:a1e0::4:5432-5432[{acls[0] 6}]] []
[100.64.0.1-100.64.0.2 fd7a:115c:a1e0::1-fd7a:115c:a1e0::2] -> [100.64.0.4:5432-5432[{acls[1] 7}] 100.64.0.4:80-80[{acls[1] 7}] fd7a:115c:a1e0::4:5432-5432[{acls[1] 7}] fd7a:115c:a1e0::4:80-80[{acls[1] 7}]] []`,
		5:  `[100.64.0.3 fd7a:115c:a1e0::3] -> [10.1.2.0/24:443-443[{acls[3] 9}]] []`,
		99: ``,
	} {
		if got := format(c.Filter(id)); got != want {
			t.Errorf("filter of %d:\n%s\nwant\n%s", id, got, want)
		}
	}
	for id, want := range map[wire.NodeID]string{1: "[2 4]", 2: "[1 4]", 3: "[5]", 4: "[1 2]", 5: "[3 6]", 6: "[5]", 99: "[]"} {
		if got := fmt.Sprint(c.Visible(id)); got != want {
			t.Errorf("peers of %d: %s, want %s", id, got, want)
		}
	}
	if got := fmt.Sprint(c.Routes(3, 5), c.Routes(6, 5), c.Routes(1, 5), c.Routes(5, 3), c.Routes(99, 5)); got != "[10.1.0.0/16] [0.0.0.0/0] [] [] []" {
		t.Errorf("routes: %s", got)
	}
	if got := fmt.Sprint(Compile(nil, testNodes()).Filter(1), Compile(nil, testNodes()).Visible(1)); got != "[] []" {
		t.Errorf("no policy: %s", got)
	}
	if got := Compile(mustParse(t, `{"acls": []}`), testNodes()); len(got.Filter(1)) != 0 || got.Filter(1) == nil || len(got.Visible(1)) != 0 {
		t.Error("an empty list of rules allows something")
	}
	if got := format(Compile(mustParse(t, `{}`), testNodes()[:2]).Filter(1)); got !=
		`[100.64.0.0-100.115.91.255 100.115.94.0-100.127.255.255 fd7a:115c:a1e0::/48] -> [*:0-65535[{default 0}]] []` {
		t.Errorf("a policy without rules: %s", got)
	}
}

// Rules with one source list and protocol become one on the wire, which names
// all of them.
func TestFilterMerges(t *testing.T) {
	c := Compile(mustParse(t, `{"tagOwners": {"tag:db": []}, "acls": [
		{"action": "accept", "src": ["bob@", "*"], "dst": ["tag:db:80"]},
		{"action": "accept", "src": ["*"], "dst": ["tag:db:1"]},
		{"action": "accept", "src": ["*", "bob@"], "dst": ["tag:db:80,81"]},
		{"action": "accept", "src": ["*", "bob@"], "dst": ["tag:db:80"], "proto": "udp"}]}`), testNodes())
	f := c.Filter(4)
	if len(f) != 3 || !strings.Contains(format(f[:1]), "100.64.0.4:80-80[{acls[0] 2} {acls[2] 4}] fd7a:115c:a1e0::4:80-80[{acls[0] 2} {acls[2] 4}] 100.64.0.4:81-81[{acls[2] 4}]") {
		t.Errorf("%s", format(f))
	}
}

func TestTaggedNodesHaveNoUser(t *testing.T) {
	c := Compile(mustParse(t, `{"tagOwners": {"tag:db": []}, "acls": [{"action": "accept", "src": ["bob@", "autogroup:member"], "dst": ["tag:db:*"]}]}`),
		[]Node{{ID: 1, User: "bob", Tags: []string{"tag:db"}, Addrs: []netip.Addr{addr("100.64.0.1")}},
			{ID: 2, Addrs: []netip.Addr{addr("100.64.0.2")}}})
	if f := c.Filter(1); len(f) != 0 {
		t.Errorf("%s", format(f))
	}
	if c.Upsert(Node{ID: 1, User: "bob", Addrs: []netip.Addr{addr("100.64.0.1")}}); len(c.Visible(1)) != 0 {
		t.Error("visible")
	}
}

// view is all that a node is told.
func view(c *Compiled, id wire.NodeID) string {
	var b strings.Builder
	fmt.Fprintln(&b, format(c.Filter(id)))
	for _, r := range c.Filter(id) {
		for _, g := range r.CapGrant {
			fmt.Fprintln(&b, r.SrcIPs, g.Dsts, g.CapMap)
		}
	}
	for _, peer := range c.Visible(id) {
		fmt.Fprintln(&b, peer, c.Routes(id, peer))
	}
	fmt.Fprintln(&b, c.Attributes(id))
	return b.String()
}

var places = regexp.MustCompile(`\{(acls|grants)\[\d+\] \d+\}`)

// unplaced leaves out where rules stand, which an edit of others moves.
func unplaced(view string) string { return places.ReplaceAllString(view, "") }

// fromTest makes a node of a made-up one.
func fromTest(n policytest.Node) Node {
	return Node{ID: wire.NodeID(n.ID), User: n.User, Email: n.Email, Role: n.Role, Tags: n.Tags, Addrs: n.Addrs, Routes: n.Routes, Offline: n.Offline}
}

// edited returns the policy with other groups and some other rules.
func edited(m policytest.Maker, text string) string {
	if m.IntN(8) == 0 {
		return m.Policy()
	}
	if m.IntN(2) == 0 {
		text = strings.Replace(text, `"group:a": ["alice@example.com", "bob@"]`, `"group:a": ["dave@", "bob@"]`, 1)
	}
	if m.IntN(2) == 0 {
		text = strings.Replace(text, `"22-80"`, `"23"`, 1)
	}
	if m.IntN(2) == 0 {
		text = strings.Replace(text, "example.com/attr/one", "example.com/attr/two", 1)
	}
	return strings.Replace(text, `"acls": [`, `"acls": [{"action": "accept", "src": ["`+[]string{"bob@", "group:b", "tag:y", "lan"}[m.IntN(4)]+`"], "dst": ["tag:x:7"]},`, 1)
}

// The order of nodes does not show in anything.
func TestDeterministic(t *testing.T) {
	for seed := range uint64(60) {
		m := policytest.New(seed)
		text := m.Policy()
		var nodes []Node
		for i := range 8 {
			nodes = append(nodes, fromTest(m.Node(i+1)))
		}
		c := Compile(mustParse(t, text), nodes)
		m.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		d := Compile(mustParse(t, text), nodes)
		for _, n := range nodes {
			if a, b := view(c, n.ID), view(d, n.ID); a != b {
				t.Fatalf("seed %d: node %d is told\n%s\nor\n%s", seed, n.ID, a, b)
			}
			a, b := c.Explain(Endpoint{Node: 1}, Endpoint{Node: n.ID}, 6, 80), d.Explain(Endpoint{Node: 1}, Endpoint{Node: n.ID}, 6, 80)
			if a.String() != b.String() {
				t.Fatalf("seed %d: explained\n%s\nor\n%s", seed, a, b)
			}
		}
	}
}

// After any of 10,000 random changes the compiled policy is what a fresh one
// would be, and nodes not named as affected are told the same as before.
func TestIncrementalEqualsFull(t *testing.T) {
	seeds := uint64(84)
	if testing.Short() || raceEnabled {
		seeds = 5
	}
	for seed := range seeds {
		m := policytest.New(seed)
		text := m.Policy()
		p := mustParse(t, text)
		other := mustParse(t, edited(m, text))
		c := Compile(p, nil)
		nodes := make(map[wire.NodeID]Node)
		before := make(map[wire.NodeID]string)
		for step := range 120 {
			id := 1 + m.IntN(12)
			var affected []wire.NodeID
			if m.IntN(10) == 0 {
				p, other = other, p
				affected = c.Replace(p)
			} else if m.IntN(4) == 0 {
				delete(nodes, wire.NodeID(id))
				affected = c.Remove(wire.NodeID(id))
				delete(before, wire.NodeID(id))
			} else {
				n := fromTest(m.Node(id))
				if m.IntN(6) == 0 {
					n.Addrs = []netip.Addr{addr(fmt.Sprintf("100.64.0.%d", 1+m.IntN(12)))}
				}
				affected = c.Upsert(n)
				if old, ok := nodes[n.ID]; ok && reflect.DeepEqual(old, n) && affected != nil {
					t.Fatalf("seed %d: nothing changed, affected %v", seed, affected)
				}
				nodes[n.ID] = n
			}
			if !slices.IsSorted(affected) {
				t.Fatalf("affected %v", affected)
			}
			var list []Node
			for _, n := range nodes {
				list = append(list, n)
			}
			full := Compile(p, list)
			for id := range nodes {
				got, want := view(c, id), view(full, id)
				if got != want {
					t.Fatalf("seed %d step %d: node %d is told\n%s\nwant\n%s\n%s", seed, step, id, got, want, text)
				}
				if unplaced(got) != unplaced(before[id]) && !slices.Contains(affected, id) {
					t.Fatalf("seed %d step %d: node %d not among the affected %v, but changed from\n%s\nto\n%s\n%s", seed, step, id, affected, before[id], got, text)
				}
				before[id] = got
			}
		}
	}
}

// A large policy that mentions everybody everywhere compiles in bounded memory.
func TestExplodingGroups(t *testing.T) {
	p := mustParse(t, groups(100, 500))
	var nodes []Node
	for i := range 500 {
		nodes = append(nodes, Node{ID: wire.NodeID(i + 1), User: fmt.Sprintf("user%d@x", i), Addrs: []netip.Addr{addr(fmt.Sprintf("100.64.%d.%d", i>>8, i&255))}})
	}
	c := Compile(p, nodes)
	f := c.Filter(1)
	if len(f) != 1 || len(f[0].SrcIPs) != 2 && len(f[0].SrcIPs) != 1 || len(f[0].MeshOrigins[0]) != 100 {
		t.Errorf("%d rules, sources %v", len(f), f[0].SrcIPs)
	}
}

func BenchmarkParse(b *testing.B) {
	text, _ := bench(1)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		mustParse(b, text)
	}
}
