package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh/control/wire"
)

func TestGrants(t *testing.T) {
	c := Compile(mustParse(t, `{
	"groups": {"group:ops": ["alice@example.com"]},
	"tagOwners": {"tag:db": [], "tag:router": []},
	"grants": [
		{"src": ["group:ops"], "dst": ["tag:db"], "ip": ["tcp:5432", "udp:53", "tcp:80-81", "icmp:*"], "app": {"example.com/cap/db": [{"role": "writer"}, 5]}},
		{"src": ["bob@"], "dst": ["tag:db"], "app": {"tailscale.com/cap/drive": [{"shares": ["*"]}]}, "via": null},
		{"src": ["bob@"], "dst": ["autogroup:self"], "ip": ["22", "*"]},
	]}`), testNodes())
	if got, want := format(c.Filter(3)), `[100.64.0.3 fd7a:115c:a1e0::3] -> [100.64.0.3:22-22[{grants[2] 7}] 100.64.0.3:0-65535[{grants[2] 7}] fd7a:115c:a1e0::3:22-22[{grants[2] 7}] fd7a:115c:a1e0::3:0-65535[{grants[2] 7}]] []`; !strings.Contains(got, want) {
		t.Errorf("filter of bob's node:\n%s\nwant\n%s", got, want)
	}
	b, err := json.Marshal(c.Filter(4))
	if err != nil {
		t.Fatal(err)
	}
	var rules []wire.FilterRule
	if err := json.Unmarshal(b, &rules); err != nil {
		t.Fatal(err)
	}
	for i := range rules {
		rules[i].MeshOrigins = nil
	}
	b, _ = json.Marshal(rules)
	want := strings.NewReplacer("\n", "", "\t", "").Replace(`[
	{"SrcIPs":["100.64.0.1-100.64.0.2","fd7a:115c:a1e0::1-fd7a:115c:a1e0::2"],"DstPorts":[{"IP":"100.64.0.4","Ports":{"First":5432,"Last":5432}},{"IP":"100.64.0.4","Ports":{"First":80,"Last":81}},{"IP":"fd7a:115c:a1e0::4","Ports":{"First":5432,"Last":5432}},{"IP":"fd7a:115c:a1e0::4","Ports":{"First":80,"Last":81}}],"IPProto":[6]},
	{"SrcIPs":["100.64.0.1-100.64.0.2","fd7a:115c:a1e0::1-fd7a:115c:a1e0::2"],"DstPorts":[{"IP":"100.64.0.4","Ports":{"First":53,"Last":53}},{"IP":"fd7a:115c:a1e0::4","Ports":{"First":53,"Last":53}}],"IPProto":[17]},
	{"SrcIPs":["100.64.0.1-100.64.0.2","fd7a:115c:a1e0::1-fd7a:115c:a1e0::2"],"DstPorts":[{"IP":"100.64.0.4","Ports":{"First":0,"Last":65535}},{"IP":"fd7a:115c:a1e0::4","Ports":{"First":0,"Last":65535}}],"IPProto":[1]},
	{"SrcIPs":["100.64.0.1-100.64.0.2","fd7a:115c:a1e0::1-fd7a:115c:a1e0::2"],"CapGrant":[{"Dsts":["100.64.0.4/32","fd7a:115c:a1e0::4/128"],"CapMap":{"example.com/cap/db":[{"role":"writer"},5]}}]},
	{"SrcIPs":["100.64.0.3","fd7a:115c:a1e0::3"],"CapGrant":[{"Dsts":["100.64.0.4/32","fd7a:115c:a1e0::4/128"],"CapMap":{"tailscale.com/cap/drive":[{"shares":["*"]}]}}]}]`)
	if string(b) != want {
		t.Errorf("filter of the database:\n%s\nwant\n%s", b, want)
	}
	// A capability lets no packet through, and shows the node.
	if _, ok := c.CanReach(3, 4, 6, 5432); ok {
		t.Error("a capability lets packets through")
	}
	if got := fmt.Sprint(c.Visible(3), c.Visible(4)); got != "[4] [1 2 3]" {
		t.Errorf("peers: %s", got)
	}
	// The companion is at bob's side, for the database.
	if b, _ := json.Marshal(c.Filter(3)); !strings.Contains(string(b), `{"SrcIPs":["100.64.0.4","fd7a:115c:a1e0::4"],"CapGrant":[{"Dsts":["100.64.0.3/32","fd7a:115c:a1e0::3/128"],"CapMap":{"tailscale.com/cap/drive-sharer":null}}]}`) {
		t.Errorf("companion: %s", b)
	}
}

// routers are two routers of one network for each of two tags, and a client.
func routers() []Node {
	var out []Node
	for i, tags := range [][]string{{"tag:a"}, {"tag:a", "tag:a2"}, {"tag:b"}, {"tag:b"}, nil} {
		n := Node{ID: wire.NodeID(i + 1), Tags: tags, Addrs: []netip.Addr{addr(fmt.Sprintf("100.64.0.%d", i+1))}}
		if tags == nil {
			n.User = "bob"
		} else {
			n.Routes = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("0.0.0.0/0")}
		}
		out = append(out, n)
	}
	return out
}

func TestRoutes(t *testing.T) {
	head := `{"tagOwners": {"tag:a": [], "tag:a2": [], "tag:b": []}, "grants": [{"src": ["tag:a", "tag:b", "bob@"], "dst": ["tag:a", "tag:b", "bob@"], "ip": ["*"]},`
	for _, tt := range []struct{ name, rules, want string }{
		{"no rule", ``, "[] [] [] []"},
		{"by the first", `{"src": ["bob@"], "dst": ["10.0.1.0/24"], "ip": ["*"]}`, "[10.0.0.0/16] [] [] []"},
		{"only ports of it", `{"src": ["bob@"], "dst": ["10.0.1.1"], "ip": ["22"]}`, "[10.0.0.0/16] [] [] []"},
		{"who comes from there", `{"src": ["10.0.0.0/8"], "dst": ["bob@"], "ip": ["22"]}`, "[10.0.0.0/16] [] [] []"},
		{"another network", `{"src": ["bob@"], "dst": ["10.1.0.0/16"], "ip": ["22"]}`, "[] [] [] []"},
		{"via", `{"src": ["bob@"], "dst": ["10.0.1.0/24"], "ip": ["*"], "via": ["tag:b"]}`, "[] [] [10.0.0.0/16] []"},
		{"via one", `{"src": ["bob@"], "dst": ["10.0.1.0/24"], "ip": ["*"], "via": ["tag:a2"]}`, "[] [10.0.0.0/16] [] []"},
		{"via is moot", `{"src": ["bob@"], "dst": ["10.0.1.0/24"], "ip": ["*"], "via": ["tag:b"]}, {"src": ["bob@"], "dst": ["10.0.0.0/16"], "ip": ["*"]}`, "[10.0.0.0/16] [] [] []"},
		{"internet", `{"src": ["bob@"], "dst": ["autogroup:internet"], "ip": ["*"]}`, "[0.0.0.0/0] [0.0.0.0/0] [0.0.0.0/0] [0.0.0.0/0]"},
		{"internet via", `{"src": ["bob@"], "dst": ["autogroup:internet"], "ip": ["*"], "via": ["tag:b"]}`, "[] [] [0.0.0.0/0] [0.0.0.0/0]"},
	} {
		c := Compile(mustParse(t, head+tt.rules+"]}"), routers())
		if got := fmt.Sprint(c.Routes(5, 1), c.Routes(5, 2), c.Routes(5, 3), c.Routes(5, 4)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
		// Another router of the network is told who is in charge.
		if got := fmt.Sprint(c.Routes(4, 1), c.Routes(4, 2), c.Routes(1, 4)); got != "[10.0.0.0/16] [] []" {
			t.Errorf("%s: routers are told %s", tt.name, got)
		}
	}
	c := Compile(mustParse(t, head+`{"src": ["bob@"], "dst": ["10.0.1.0/24"], "ip": ["*"]}]}`), routers())
	n := routers()[0]
	n.Offline = true
	if got := fmt.Sprint(c.Upsert(n)); got != "[1 2 3 4 5]" {
		t.Errorf("affected: %s", got)
	}
	if id, ok := c.Primary(n.Routes[0]); id != 2 || !ok {
		t.Errorf("in charge: %d", id)
	}
	if got := fmt.Sprint(c.Routes(5, 1), c.Routes(5, 2)); got != "[] [10.0.0.0/16]" {
		t.Errorf("with one offline: %s", got)
	}
	if _, ok := c.Primary(netip.MustParsePrefix("10.9.0.0/16")); ok {
		t.Error("someone is in charge of nothing")
	}
}

func TestIDs(t *testing.T) {
	id := func(text string) string { return mustParse(t, text).access[0].origin.ID }
	head := `{"groups": {"group:a": ["x@"]}, "tagOwners": {"tag:t": []}, `
	a := id(head + `"acls": [{"action": "accept", "src": ["bob@", "group:a"], "dst": ["tag:t:22,80"], "proto": "tcp"}]}`)
	for _, same := range []string{
		head + `/* new */ "acls": [{"proto": "TCP", "dst": ["tag:t:80,22,22"], "src": ["group:a", "BOB@", "bob@"], "action": "accept"}, {"action": "accept", "src": [], "dst": []}]}`,
		strings.Replace(head, `["x@"]`, `["y@"]`, 1) + `"acls": [{"action": "accept", "src": ["bob@", "group:a"], "dst": ["tag:t:22,80"], "proto": "6"}]}`,
	} {
		if b := id(same); a != b || len(b) != 12 {
			t.Errorf("%s: %s, want %s", same, b, a)
		}
	}
	seen := map[string]string{a: "the first"}
	for _, other := range []string{
		`"acls": [{"action": "accept", "src": ["bob@", "group:a"], "dst": ["tag:t:22,80"]}]}`,
		`"acls": [{"action": "accept", "src": ["bob@", "group:a"], "dst": ["tag:t:22-80"], "proto": "tcp"}]}`,
		`"acls": [{"action": "accept", "src": ["bob@"], "dst": ["tag:t:22,80"], "proto": "tcp"}]}`,
		`"grants": [{"src": ["bob@", "group:a"], "dst": ["tag:t"], "ip": ["tcp:22,80"]}]}`,
		`"grants": [{"src": ["bob@", "group:a"], "dst": ["tag:t"], "ip": ["tcp:22,80"], "app": {"a.b/c": [1]}}]}`,
		`"grants": [{"src": ["bob@", "group:a"], "dst": ["tag:t"], "ip": ["tcp:22,80"], "app": {"a.b/c": [2]}}]}`,
		`"grants": [{"src": ["bob@", "group:a"], "dst": ["10.0.0.0/8"], "ip": ["tcp:22,80"], "via": ["tag:t"]}]}`,
		`"grants": [{"src": ["bob@", "group:a"], "dst": ["10.0.0.0/8"], "ip": ["tcp:22,80"]}]}`,
	} {
		b := id(head + other)
		if seen[b] != "" {
			t.Errorf("%s has the ID of %s", other, seen[b])
		}
		seen[b] = other
	}
}

func TestAutogroupsAndSets(t *testing.T) {
	p := mustParse(t, `{
	"tagOwners": {"tag:db": ["autogroup:admin"], "tag:router": ["user:*@example.com"]},
	"hosts": {"lan": "10.1.0.0/16"},
	"ipsets": {"ipset:some": ["lan", "remove ipset:not", "100.64.0.0/30"], "ipset:not": ["add 10.1.2.0/24", "10.1.3.0/24"]},
	"acls": [
		{"action": "accept", "src": ["autogroup:admin"], "dst": ["tag:db:1"]},
		{"action": "accept", "src": ["user:*@EXAMPLE.com"], "dst": ["tag:db:2"]},
		{"action": "accept", "src": ["autogroup:danger-all"], "dst": ["tag:db:3"]},
		{"action": "accept", "src": ["ipset:some"], "dst": ["tag:db:4"], "proto": 6},
		{"action": "accept", "users": ["carol@example.com"], "ports": ["ipset:some:5"]},
	]}`)
	nodes := testNodes()
	nodes[2].Role = "admin"
	c := Compile(p, nodes)
	for port, want := range map[uint16]string{1: "[3]", 2: "[1 2 6]", 3: "[1 2 3 4 5 6]", 4: "[1 2 3]", 5: "[]"} {
		got := []wire.NodeID{}
		for _, n := range nodes {
			if _, ok := c.CanReach(n.ID, 4, 6, port); ok {
				got = append(got, n.ID)
			}
		}
		if fmt.Sprint(got) != want {
			t.Errorf("port %d: %v, want %s", port, got, want)
		}
	}
	for a, want := range map[string]bool{"10.1.1.1": true, "10.1.2.1": false, "10.1.3.255": false, "10.1.4.0": true, "10.1.255.255": true, "10.2.0.0": false, "100.64.0.3": true} {
		if got, _ := c.Allows(addr("100.64.0.6"), addr(a), 6, 5); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	// Exactly the sources that the filter has.
	if f := c.Filter(4); !slices.ContainsFunc(f, func(r wire.FilterRule) bool { return slices.Equal(r.SrcIPs, []string{"*"}) }) {
		t.Errorf("%s", format(f))
	}
	if !p.OwnsTag(User{Name: "bob", Role: "admin"}, "tag:db") || p.OwnsTag(User{Name: "bob"}, "tag:db") || p.TagOwner("bob", "tag:db") ||
		!p.OwnsTag(User{Name: "carol", Email: "c@Example.com"}, "tag:router") || p.OwnsTag(User{Name: "x@example.com.evil.org"}, "tag:router") {
		t.Error("owners of tags")
	}
}

func TestAttributesAndApprovers(t *testing.T) {
	p := mustParse(t, `{
	"groups": {"group:ops": ["bob@"]},
	"tagOwners": {"tag:db": [], "tag:router": []},
	"hosts": {"lan": "10.0.0.0/8"},
	"autoApprovers": {"routes": {"lan": ["tag:router", "group:ops"], "0.0.0.0/0": ["carol@example.com"], "fd00::/16": ["autogroup:member"]}, "exitNode": ["tag:router"]},
	"nodeAttrs": [
		{"target": ["*"], "attr": ["one"]},
		{"target": ["tag:db", "group:ops"], "attr": ["two", "one"], "app": {"tailscale.com/app-connectors": [{"name": "x"}]}},
		{"target": ["100.64.0.1", "autogroup:tagged"], "attr": ["three"], "ipPool": ["100.81.0.0/16"]},
		{"target": ["tag:db"], "app": {"tailscale.com/app-connectors": [2]}, "ipPool": ["100.80.0.0/16"]},
		{"target": ["*"]},
	],
	"randomizeClientPort": true,
	"disableIPv4": false, "ssh": [], "derpMap": null, "acls": []}`)
	c := Compile(p, testNodes())
	for id, want := range map[wire.NodeID]string{
		1:  `{"one":null,"randomize-client-port":null,"three":null}`,
		3:  `{"one":null,"randomize-client-port":null,"tailscale.com/app-connectors":[{"name":"x"}],"two":null}`,
		4:  `{"one":null,"randomize-client-port":null,"tailscale.com/app-connectors":[{"name":"x"},2],"three":null,"two":null}`,
		99: `{}`,
	} {
		if got, _ := json.Marshal(c.Attributes(id)); string(got) != want {
			t.Errorf("attributes of %d: %s, want %s", id, got, want)
		}
	}
	nodes := testNodes()
	if got := fmt.Sprint(p.AddressPools(nodes[3]), p.AddressPools(nodes[5])); got != "[100.81.0.0/16 100.80.0.0/16] []" {
		t.Errorf("pools: %s", got)
	}
	for _, tt := range []struct {
		node  int
		route string
		want  bool
	}{
		{5, "10.0.0.0/8", true}, {5, "10.1.0.0/16", true}, {5, "8.0.0.0/5", false}, {5, "192.168.0.0/24", false}, {5, "0.0.0.0/0", true}, {5, "::/0", true},
		{3, "10.2.3.4/32", true}, {3, "0.0.0.0/0", false}, {6, "192.168.0.0/24", true}, {6, "0.0.0.0/0", false}, {6, "fd00:1::/64", true}, {5, "fd00:1::/64", false}, {4, "10.0.0.0/8", false},
	} {
		if got := p.AutoApproves(nodes[tt.node-1], netip.MustParsePrefix(tt.route)); got != tt.want {
			t.Errorf("%s of node %d: %v", tt.route, tt.node, got)
		}
	}
}

func TestOwnTests(t *testing.T) {
	head := `{"groups": {"group:ops": ["alice@example.com", "dave@"], "group:none": []}, "tagOwners": {"tag:db": [], "tag:new": []}, "hosts": {"web": "10.0.0.7"},
	"acls": [{"action": "accept", "src": ["group:ops"], "dst": ["tag:db:22", "web:80"]},
	{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:new:1-9"], "proto": "udp"}],
	"tests": [` + "\n"
	users := []User{{Name: "alice@example.com"}, {Name: "bob"}, {Name: "carol", Email: "Carol@example.com"}, {Name: "dave"}}
	for _, tt := range []struct{ test, want string }{
		{`{"src": "group:ops", "accept": ["tag:db:22", "web:80"], "deny": ["tag:db:23", "tag:new:1000"]}`, ``},
		{`{"src": "alice@example.com", "accept": ["tag:db:22"], "deny": ["bob@:22"]}`, ``},
		{`{"src": "dave@", "proto": "udp", "accept": ["tag:new:9"], "deny": ["tag:new:10"]}`, ``},
		{`{"src": "tag:new", "deny": ["tag:db:22"]}`, ``},
		{`{"src": "bob@", "accept": ["tag:db:22"]}`, "tests[0] at line 5: bob@ can not reach tag:db:22: nearest is acls[0] at line 2: node 3 (bob) is not among its sources: group:ops"},
		{`{"src": "alice@example.com", "accept": ["tag:db:23"]}`, "tests[0] at line 5: alice@example.com can not reach tag:db:23: nearest is acls[0] at line 2: it opens port 22, not 23"},
		{`{"src": "autogroup:member", "deny": ["tag:db:22"]}`, "tests[0] at line 5: autogroup:member can reach tag:db:22 but must not: acls[0] at line 2"},
		{`{"src": "autogroup:member", "accept": ["tag:db:22"]}`, "tests[0] at line 5: autogroup:member can not reach tag:db:22: nearest is acls[0] at line 2: node 3 (bob) is not among its sources: group:ops"},
		{`{"src": "eve@example.com", "deny": ["tag:db:22"]}`, `tests[0] at line 5: src "eve@example.com": unknown user "eve@example.com"`},
		{`{"src": "group:none", "deny": ["tag:db:22"]}`, `tests[0] at line 5: src "group:none": group:none has no members`},
	} {
		p := mustParse(t, head+tt.test+"]}")
		var got []string
		for _, f := range p.Test(testNodes(), users) {
			got = append(got, f.Error())
		}
		if strings.Join(got, "\n") != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.test, strings.Join(got, "\n"), tt.want)
		}
	}
	if got := mustParse(t, head+`{"src": "eve@example.com", "deny": ["tag:db:22"]}]}`).Test(nil, nil); got != nil {
		t.Errorf("users not known: %v", got)
	}
}

func TestExplain(t *testing.T) {
	c := Compile(mustParse(t, testPolicy), testNodes())
	alice, db := Endpoint{Node: 1}, Endpoint{Node: 4}
	for _, tt := range []struct {
		src, dst Endpoint
		port     uint16
		proto    int
		want     string
	}{
		{alice, db, 5432, 6, `allowed
  by acls[0] at line 6: group:ops may reach tag:db:5432
    alice@example.com is in group:ops
    node 4 (tag:db) carries tag:db
  by acls[1] at line 7: alice@example.com may reach tag:db:80,5432
    node 4 (tag:db) carries tag:db
`},
		{alice, db, 22, 6, `denied
  nearest is acls[0] at line 6: it opens port 5432, not 22
    alice@example.com is in group:ops
    node 4 (tag:db) carries tag:db
`},
		{alice, db, 5432, 132, `denied
  nearest is acls[0] at line 6: it opens TCP and UDP, not sctp
    alice@example.com is in group:ops
    node 4 (tag:db) carries tag:db
`},
		{Endpoint{Node: 3}, db, 5432, 6, `denied
  nearest is acls[0] at line 6: node 3 (bob) is not among its sources: group:ops
    node 4 (tag:db) carries tag:db
`},
		{Endpoint{User: User{Name: "zoe"}}, db, 80, 6, `denied
  nearest is acls[1] at line 7: zoe is not among its sources: alice@example.com
    node 4 (tag:db) carries tag:db
`},
		{Endpoint{Node: 3}, Endpoint{Addr: addr("10.1.2.3")}, 443, 6, `allowed
  by acls[3] at line 9: bob@ may reach 10.1.2.0/24:443
    lan is 10.1.2.0/24 in "hosts"
  10.1.2.3 lies behind node 5 (tag:router)
`},
		{Endpoint{Node: 1}, Endpoint{Node: 2}, 1, 6, `allowed
  by acls[2] at line 8: autogroup:member may reach autogroup:self:*
    node 1 (alice@example.com) belongs to a user, alice@example.com
    both belong to alice@example.com
`},
		{Endpoint{Node: 77}, Endpoint{Addr: addr("100.99.0.1")}, 1, 6, "denied\n  there is no node 77\n"},
	} {
		if got := c.Explain(tt.src, tt.dst, tt.proto, tt.port).String(); got != tt.want {
			t.Errorf("%+v to %+v port %d: got\n%swant\n%s", tt.src, tt.dst, tt.port, got, tt.want)
		}
	}
	if got := Compile(nil, testNodes()).Explain(alice, db, 6, 1).String(); got != "denied\n  there is no policy, so nobody may reach anybody\n" {
		t.Errorf("without a policy: %s", got)
	}
}

func TestDiff(t *testing.T) {
	old := mustParse(t, testPolicy)
	edit := strings.NewReplacer(
		`{"group:ops": ["alice@example.com"]}`, `{"group:ops": ["alice@example.com", "bob@"]}`,
		`["tag:db:5432,80"]`, `["tag:db:5432"]`,
		`["lan:443"]`, `["lan:443-445"]`,
	).Replace(testPolicy)
	next := mustParse(t, edit)
	changes, all := Diff(old, next, testNodes())
	var got []string
	for _, c := range changes {
		got = append(got, c.String())
	}
	slices.Sort(got)
	want := `+ bob → 10.1.2.0/24: tcp, udp 444-445 (acls[3] at line 9)
+ bob → tag:db: tcp, udp 5432 (acls[0] at line 6)
- alice@example.com → tag:db: tcp, udp 80 (acls[0] at line 6, acls[1] at line 7)`
	if strings.Join(got, "\n") != want || !all {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
	if changes, _ := Diff(old, old, testNodes()); len(changes) != 0 {
		t.Errorf("no difference: %v", changes)
	}
	if changes, _ := Diff(nil, mustParse(t, `{}`), testNodes()[:1]); len(changes) != 1 || !changes[0].Gained {
		t.Errorf("from nothing to all: %v", changes)
	}
}

func TestTemporary(t *testing.T) {
	p := mustParse(t, testPolicy)
	until := time.Unix(1e9, 0)
	q, err := p.With([]Temporary{{ID: "7", Src: []string{"bob@"}, Dst: []string{"tag:db"}, IP: []string{"tcp:22"}, Reason: "broken", Until: until}})
	if err != nil {
		t.Fatal(err)
	}
	c := Compile(p, testNodes())
	if got := fmt.Sprint(c.Replace(q)); got != "[3 4]" {
		t.Errorf("affected: %s", got)
	}
	o, ok := c.CanReach(3, 4, 6, 22)
	if !ok || o.Rule != "temp[7]" || o.Line != 0 || o.ID == "" {
		t.Errorf("%+v %v", o, ok)
	}
	if r, err := q.With(nil); err != nil || len(r.access) != len(p.access) {
		t.Errorf("withdrawn: %v", err)
	} else if got := fmt.Sprint(c.Replace(r)); got != "[3 4]" {
		t.Errorf("affected: %s", got)
	}
	if _, ok := c.CanReach(3, 4, 6, 22); ok {
		t.Error("still there")
	}
	for want, bad := range map[string]Temporary{
		`temp[1]: undefined tag "tag:dbs": did you mean "tag:db"?`: {ID: "1", Src: []string{"bob@"}, Dst: []string{"tag:dbs"}, IP: []string{"22"}, Until: until},
		`temp[1]: ip "22-": bad port range "22-"`:                  {ID: "1", Src: []string{"bob@"}, Dst: []string{"tag:db"}, IP: []string{"22-"}, Until: until},
		`temp[1]: needs a source, a destination and ports`:         {ID: "1", Dst: []string{"tag:db"}, IP: []string{"22"}, Until: until},
		`temp[1]: has no end`:                                      {ID: "1", Src: []string{"bob@"}, Dst: []string{"tag:db"}, IP: []string{"22"}},
		`temp[a b]: malformed ID "a b"`:                            {ID: "a b", Src: []string{"bob@"}, Dst: []string{"tag:db"}, IP: []string{"22"}, Until: until},
		`temp[1]: "autogroup:danger-all" is not allowed in dst: to mean all addresses write "*" or "autogroup:internet"`: {ID: "1", Src: []string{"bob@"}, Dst: []string{"autogroup:danger-all"}, IP: []string{"22"}, Until: until},
	} {
		_, err := p.With([]Temporary{bad})
		var e *Error
		if err == nil || err.Error() != want || !errors.As(err, &e) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
