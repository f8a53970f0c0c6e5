package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"mesh/control/policy/policytest"
	"mesh/control/wire"
)

// bench is a mesh of teams of twenty: ten nodes of a user and ten with a tag.
// The 500 rules are between the first fifty teams. So who can talk to whom does
// not become more as the mesh grows, and neither should the work.
func bench(n int) (text string, nodes []Node) {
	m := policytest.New(1)
	teams := max(n/20, 1)
	var owners, acls []string
	for i := range teams {
		owners = append(owners, fmt.Sprintf(`"tag:t%d": []`, i))
	}
	for i := range 500 {
		from, to := m.IntN(min(teams, 50)), m.IntN(min(teams, 50))
		if i == 0 {
			to = 0
		}
		if i == 1 {
			from = 0
		}
		if i%2 == 0 {
			acls = append(acls, fmt.Sprintf(`{"action":"accept","src":["tag:t%d","user%d@x"],"dst":["tag:t%d:%d"]}`, from, from, to, 1+m.IntN(60000)))
		} else {
			acls = append(acls, fmt.Sprintf(`{"action":"accept","src":["tag:t%d"],"dst":["tag:t%d:%d", "10.%d.0.0/16:443"]}`, from, to, 1+m.IntN(60000), m.IntN(200)))
		}
	}
	for i := range n {
		node := Node{ID: wire.NodeID(i + 1), Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i)}),
			netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})}}
		if i%2 == 0 {
			node.Tags = []string{fmt.Sprintf("tag:t%d", i/20%teams)}
		} else {
			node.User = fmt.Sprintf("user%d@x", i/20%teams)
		}
		nodes = append(nodes, node)
	}
	return `{"tagOwners": {` + strings.Join(owners, ",") + `}, "acls": [` + strings.Join(acls, ",") + "]}", nodes
}

var benchSizes = []int{1000, 10_000, 50_000}

// perAffected reports the cost for each node that is told something new.
func perAffected(b *testing.B, affected int) {
	b.ReportMetric(float64(affected)/float64(b.N), "affected/op")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(max(affected, 1)), "ns/affected")
}

// tell asks for all that nodes are told.
func tell(c *Compiled, ids []wire.NodeID) {
	for _, id := range ids {
		c.Filter(id)
		for _, peer := range c.Visible(id) {
			c.Routes(id, peer)
		}
	}
}

// BenchmarkFull parses nothing: it applies 500 rules to the nodes and asks for
// what each is told.
func BenchmarkFull(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			text, nodes := bench(n)
			p := mustParse(b, text)
			var all []wire.NodeID
			for _, n := range nodes {
				all = append(all, n.ID)
			}
			b.ReportAllocs()
			for b.Loop() {
				tell(Compile(p, nodes), all)
			}
			perAffected(b, b.N*n)
		})
	}
}

// BenchmarkJoin adds and removes a node, and asks for what the affected are told.
func BenchmarkJoin(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			text, nodes := bench(n)
			c := Compile(mustParse(b, text), nodes)
			join := nodes[0]
			join.ID, join.Addrs = 1<<30, []netip.Addr{addr("100.99.0.1")}
			affected := 0
			b.ReportAllocs()
			for b.Loop() {
				ids := c.Upsert(join)
				tell(c, ids)
				c.Remove(join.ID)
				affected += len(ids)
			}
			perAffected(b, affected)
		})
	}
}

// BenchmarkTag gives a node another tag and back.
func BenchmarkTag(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			text, nodes := bench(n)
			c := Compile(mustParse(b, text), nodes)
			before, after := nodes[0], nodes[0]
			after.Tags = []string{"tag:t1"}
			affected := 0
			b.ReportAllocs()
			for b.Loop() {
				for _, n := range []Node{after, before} {
					ids := c.Upsert(n)
					tell(c, ids)
					affected += len(ids)
				}
			}
			perAffected(b, affected)
		})
	}
}

// BenchmarkEdit replaces the policy by one with another rule, and back.
func BenchmarkEdit(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			text, nodes := bench(n)
			p := mustParse(b, text)
			q := mustParse(b, strings.Replace(text, `"acls": [`, `"acls": [{"action":"accept","src":["user0@x"],"dst":["tag:t0:9"]},`, 1))
			c := Compile(p, nodes)
			affected := 0
			b.ReportAllocs()
			for b.Loop() {
				for _, p := range []*Policy{q, p} {
					ids := c.Replace(p)
					tell(c, ids)
					affected += len(ids)
				}
			}
			perAffected(b, affected)
		})
	}
}

// What a join costs for each node that is told something new does not grow with
// the mesh.
func TestFlatCost(t *testing.T) {
	cost := func(n int) float64 {
		text, nodes := bench(n)
		c := Compile(mustParse(t, text), nodes)
		join := nodes[0]
		join.ID, join.Addrs = 1<<30, []netip.Addr{addr("100.99.0.1")}
		affected := 0
		allocs := testing.AllocsPerRun(3, func() {
			ids := c.Upsert(join)
			tell(c, ids)
			c.Remove(join.ID)
			affected = len(ids)
		})
		return allocs / float64(affected)
	}
	if small, large := cost(1000), cost(10_000); large > small*1.2 {
		t.Errorf("%.0f allocations for each affected node among 1,000, %.0f among 10,000", small, large)
	}
}

// BenchmarkAllows asks about one observed packet.
func BenchmarkAllows(b *testing.B) {
	text, nodes := bench(10_000)
	c := Compile(mustParse(b, text), nodes)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		c.Allows(nodes[i%len(nodes)].Addrs[0], nodes[0].Addrs[0], 6, 22)
		i++
	}
}
