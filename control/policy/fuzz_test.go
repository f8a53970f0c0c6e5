package policy

import (
	"slices"
	"strings"
	"testing"

	"mesh/control/policy/policytest"
	"mesh/control/wire"
)

// FuzzParse gives any bytes to the parser, and what it accepts to all that
// reads a policy.
func FuzzParse(f *testing.F) {
	f.Add([]byte(testPolicy))
	for seed := range uint64(20) {
		f.Add([]byte(policytest.New(seed).Policy()))
	}
	f.Add([]byte(`{"acls": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*", "[fd00::1]:2", "autogroup:internet:*"]},]}`))
	f.Add([]byte(`{"acl": [/*`))
	f.Add([]byte(`{"ipsets": {"ipset:none": []}, "grants": [{"src": ["ipset:none"], "dst": ["ipset:none"], "ip": ["1"]}], "tests": [{"src": "ipset:none", "deny": ["ipset:none:1"]}]}`))
	f.Add([]byte(`{"ipsets": {"ipset:none": []}, "acls": [{"action": "accept", "src": ["ipset:none"], "dst": ["ipset:none:1"]}], "nodeAttrs": [{"target": ["ipset:none"]}]}`))
	f.Add([]byte(`{"tests": [{"src": "bob@", "proto": "udp", "accept": ["tag:x:22"], "deny": ["alice@example.com:1", "100.64.0.4:9"]}], "tagOwners": {"tag:x": []}, "randomizeClientPort": true, "ssh": [{}]}`))
	nodes := testNodes()
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			if err.Error() == "" || p != nil {
				t.Fatalf("%v %v", p, err)
			}
			return
		}
		c := Compile(p, nodes)
		c.Test(nil)
		for _, n := range nodes {
			p.AutoApproves(n, nodes[4].Routes[0])
			p.AddressPools(n)
			c.Attributes(n.ID)
			_ = c.Explain(Endpoint{Node: 1}, Endpoint{Node: n.ID}, 6, 22).String()
			for _, r := range c.Filter(n.ID) {
				if len(r.DstPorts) != len(r.MeshOrigins) || (len(r.DstPorts) == 0) == (len(r.CapGrant) == 0) || r.SrcIPs == nil {
					t.Fatalf("%+v", r)
				}
			}
			c.Visible(n.ID)
		}
		Diff(nil, p, nodes)
		if q, err := p.With(nil); err != nil || len(c.Replace(q)) != 0 {
			t.Fatalf("the same policy is not the same: %v", err)
		}
		for _, n := range nodes {
			c.Remove(n.ID)
		}
	})
}

// FuzzCompile lets bytes decide about policies, nodes and changes of both, and
// compares with a policy that was compiled at once.
func FuzzCompile(f *testing.F) {
	f.Add(uint64(1), []byte{1, 2, 3})
	f.Add(uint64(2), []byte(strings.Repeat("\x00\x87\xff", 9)))
	f.Fuzz(func(t *testing.T, seed uint64, steps []byte) {
		m := policytest.New(seed)
		texts := []string{m.Policy(), m.Policy()}
		p := mustParse(t, texts[0])
		c := Compile(p, nil)
		nodes := make(map[wire.NodeID]Node)
		for _, b := range steps[:min(len(steps), 40)] {
			id := int(b&7) + 1
			var affected []wire.NodeID
			switch b >> 6 {
			case 0:
				affected = c.Remove(wire.NodeID(id))
				delete(nodes, wire.NodeID(id))
			case 1:
				text := texts[b>>3&1]
				if p2, err := p.With(nil); err != nil || p2 == nil {
					t.Fatal(err)
				}
				p = mustParse(t, text)
				affected = c.Replace(p)
			default:
				n := fromTest(m.Node(id))
				affected = c.Upsert(n)
				nodes[n.ID] = n
			}
			if !slices.IsSorted(affected) {
				t.Fatal(affected)
			}
		}
		var list []Node
		for _, n := range nodes {
			list = append(list, n)
		}
		full := Compile(p, list)
		for id := range nodes {
			if got, want := view(c, id), view(full, id); got != want {
				t.Fatalf("node %d is told\n%s\nwant\n%s", id, got, want)
			}
		}
	})
}
