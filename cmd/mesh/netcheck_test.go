package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"mesh/control/admin"
	"mesh/internal/netcheck"
)

func TestNetcheck(t *testing.T) {
	s := startServer(t)
	s.ok("policy", "set", writeFile(t, testPolicy))
	key := strings.TrimSpace(s.ok("key", "create", "--tag", "tag:app", "--reusable"))
	look := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_CONTROL_KEY="+s.key, "MESH_AUTHKEY="+key)

	// For people.
	text := look.ok("netcheck", "--no-port-mapping")
	for _, want := range []string{
		"udp             works\n", "ipv4            works, seen as 127.0.0.1:", "nat             none: others see this host's own address\n",
		"port mapping    not asked\n", "captive portal  not known: no relay offers the check\n", "\n\nRELAY  CODE", " ms",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	// For programs.
	r := decode[netcheck.Report](t, look.ok("netcheck", "--no-port-mapping", "--json", "--control", s.url))
	if r.UDP == nil || !*r.UDP || len(r.Regions) != 1 || r.Preferred != r.Regions[0].ID || r.Regions[0].V4 == 0 || !r.Full || r.PortMapping != nil {
		t.Errorf("%+v", r)
	}
	if nodes := decode[[]admin.Node](t, s.ok("node", "list", "--json")); len(nodes) != 0 {
		t.Errorf("the node of mesh netcheck stays: %+v", nodes)
	}

	// As an existing node, which keeps its name and address, ...
	dir := filepath.Join(shortDir(t), "state")
	node := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_CONTROL_KEY="+s.key, "MESH_STATE_DIR="+dir)
	node.fails([]string{"netcheck"}, dir+" holds no node that is enrolled")
	dir = filepath.Join(shortDir(t), "state")
	node.env[len(node.env)-1] = "MESH_STATE_DIR=" + dir
	enrol := newShell(t, append(node.env[len(node.env)-3:], "MESH_AUTHKEY="+key, "MESH_HOSTNAME=app")...)
	enrol.ok("status")
	before := decode[[]admin.Node](t, s.ok("node", "list", "--json"))
	node.ok("netcheck", "--no-port-mapping")
	after := decode[[]admin.Node](t, s.ok("node", "list", "--json"))
	if len(before) != 1 || len(after) != 1 || after[0].Name != before[0].Name || after[0].NodeKey != before[0].NodeKey {
		t.Errorf("before %+v, after %+v", before, after)
	}
	// ... also while the control server is away, and with it its relay: over
	// HTTPS nobody answers, either.
	s.terminate()
	r = decode[netcheck.Report](t, node.ok("netcheck", "--no-port-mapping", "--json"))
	if r.UDP == nil || *r.UDP || r.Preferred != 0 || len(r.Regions) != 1 || r.Regions[0].Error == "" {
		t.Errorf("%+v", r)
	}
	text = node.ok("netcheck", "--no-port-mapping")
	for _, want := range []string{"udp             no answer, nor by HTTPS", "ipv4            no answer by UDP", "home relay      none: no relay answered", "HTTPS\n", "refused"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	look.fails([]string{"netcheck"}, "control server unreachable")

	// With a map of one's own there is no server to ask.
	alone := newShell(t)
	relays := `{"Regions":{"907":{"RegionID":907,"RegionName":"Nowhere","Nodes":[{"Name":"a","RegionID":907,"HostName":"127.0.0.1","IPv4":"127.0.0.1","STUNPort":1,"DERPPort":1}]}}}`
	for _, got := range []result{alone.run("netcheck", "--no-port-mapping", "--json", "--relay-map", writeFile(t, relays)),
		alone.pipe(relays, "netcheck", "--no-port-mapping", "--json", "--relay-map", "-")} {
		if got.code != exitDone || !json.Valid([]byte(got.stdout)) || !strings.Contains(got.stdout, `"name": "Nowhere"`) {
			t.Errorf("%+v", got)
		}
	}
	alone.fails([]string{"netcheck"}, "give --relay-map")
	alone.fails([]string{"netcheck", "--control", "http://127.0.0.1:1"}, "set MESH_AUTHKEY")
	alone.fails([]string{"netcheck", "--relay-map", "/does/not/exist"}, "open /does/not/exist")
	alone.fails([]string{"netcheck", "--relay-map", writeFile(t, "{")}, "is no relay map")
	alone.fails([]string{"netcheck", "--relay-map", writeFile(t, "{}")}, "no region that may be asked")
	alone.fails([]string{"netcheck", "--relay-map", writeFile(t, strings.Repeat(" ", 2<<20))}, "longer than 1048576 bytes")
	if r := alone.run("netcheck", "--relay-map", "a", "--control", "b"); r.code != exitUsage || !strings.Contains(r.stderr, "give one of the two") {
		t.Errorf("%+v", r)
	}
}
