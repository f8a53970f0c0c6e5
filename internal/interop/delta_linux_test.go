package interop

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// quickOffline makes the server say at once that a node has gone.
func quickOffline(c *host.Config) { c.OfflineGrace = time.Millisecond }

// mapsInLog makes a stock node write the maps it gets to its log. Its status
// does not show the endpoints of peers.
var mapsInLog = []string{"TS_DEBUG_MAP=2"}

// A stock node hears of every change by deltas: its one map poll is never
// begun again, and traffic that a change does not concern goes on.
func TestStockHearsDeltas(t *testing.T) {
	m := meshtest.Start(t, openPolicy, quickOffline)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, mapsInLog)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	laptop.do("open", map[string]any{"Name": "long", "Addr": port(ours, false, 7)}, nil)
	polls := laptop.polls()
	if polls == 0 {
		t.Fatal("no poll in the stock log: is its text another now?")
	}
	// sees waits until the stock node's view of a peer is as it should be.
	sees := func(what, label string, ok func(p stockPeer, there bool) bool) {
		t.Helper()
		until(t, what, func() bool { return ok(laptop.status().peer(label)) })
		if n := laptop.polls(); n != polls {
			t.Errorf("%s: the stock node polled anew", what)
			polls = n
		}
		var sum string
		laptop.do("exchange", map[string]any{"Name": "long", "Bytes": 1000}, &sum)
		if sum != sumOf(1000) {
			t.Errorf("%s: the connection that it does not concern broke", what)
		}
	}

	late := startAgent(t, m, "late", []string{"tag:a"})
	sees("a join", "late", func(p stockPeer, there bool) bool { return there && p.Online && p.Relay != "" })
	talk(t, laptop, late, false)

	// Started again it is the same node, at another place.
	dir := late.Dir
	late.Close()
	sees("a leave", "late", func(p stockPeer, there bool) bool { return there && !p.Online })
	late = startAgent(t, m, "late", nil, func(n *mesh.Node) { n.Dir, n.Port = dir, freePort(t) })
	sees("an endpoint change", "late", func(_ stockPeer, there bool) bool {
		return there && laptop.logged(fmt.Sprintf("192.0.2.1:%d\"", late.Port)) > 0
	})
	talk(t, laptop, late, false)

	rename := func(from, to string) {
		t.Helper()
		if _, err := m.Admin.RenameNode(t.Context(), from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename("late", "later")
	sees("a rename", "later", func(_ stockPeer, there bool) bool { return there })
	if id := laptop.whois(late.at(false)); id.Name != "later.mesh.internal." {
		t.Errorf("after the rename the stock node says %+v", id)
	}
	rename("laptop", "notebook")
	until(t, "a rename of the stock node itself", func() bool { return laptop.status().Self.label() == "notebook" })

	if _, err := m.Admin.SetNodeOwner(t.Context(), "later", admin.NodeOwner{Tags: []string{"tag:a", "tag:s"}}); err != nil {
		t.Fatal(err)
	}
	sees("a tag change", "later", func(p stockPeer, _ bool) bool { return slices.Equal(p.Tags, []string{"tag:a", "tag:s"}) })

	m.SetPolicy(`{
		"tagOwners": {"tag:a": [], "tag:s": []},
		"acls": [{"action": "accept", "src": ["tag:s"], "dst": ["*:7"]}]}`)
	until(t, "the policy to deny HTTP to ours", func() bool {
		_, err := late.fetch("http://"+port(laptop, false, 80)+"/whois", 0)
		return err != nil && !timeout(err)
	})
	sees("a policy change", "later", func(_ stockPeer, there bool) bool { return there })
	m.SetPolicy(`{
		"tagOwners": {"tag:a": [], "tag:s": []},
		"acls": [{"action": "accept", "src": ["tag:s"], "dst": ["*:*"]}, {"action": "accept", "src": ["tag:a"], "dst": ["tag:s:80"]}]}`)
	until(t, "the policy to allow it again", func() bool {
		_, err := late.fetch("http://"+port(laptop, false, 80)+"/whois", 0)
		return err == nil
	})

	if err := m.Admin.RemoveNode(t.Context(), "later"); err != nil {
		t.Fatal(err)
	}
	sees("a removal", "later", func(_ stockPeer, there bool) bool { return !there })
	whoAmI(t, ours, laptop, false)
}

// freePort returns a UDP port that is free now.
func freePort(t testing.TB) uint16 {
	t.Helper()
	pc, err := net.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	return uint16(pc.LocalAddr().(*net.UDPAddr).Port)
}

// The addresses of a stock node's host change: it tells our server, and another
// stock node and one of ours hear it by a delta.
func TestStockChangesEndpoints(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, mapsInLog)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, phone, ours)
	added := func(a netip.AddrPort) bool { return a.Addr() == netip.MustParseAddr("192.0.2.77") }
	endpoints := func() []netip.AddrPort {
		n, err := m.Admin.Node(t.Context(), "phone")
		if err != nil {
			t.Fatal(err)
		}
		return n.Endpoints
	}
	addr := fmt.Sprintf("192.0.2.77:%d\"", endpoints()[0].Port())
	ip(t, "addr add 192.0.2.77/24 dev veth0")
	there := true
	t.Cleanup(func() {
		if there {
			ip(t, "addr del 192.0.2.77/24 dev veth0")
		}
	})
	until(t, "the new address to be told", func() bool { return slices.ContainsFunc(endpoints(), added) })
	until(t, "another stock node to hear it", func() bool { return laptop.logged(addr) > 0 })
	talk(t, ours, phone, false)
	talk(t, laptop, phone, false)
	ip(t, "addr del 192.0.2.77/24 dev veth0")
	there = false
	until(t, "the lost address to be told", func() bool { return !slices.ContainsFunc(endpoints(), added) })
	talk(t, phone, ours, false)
}

// ip changes the network of the namespace.
func ip(t testing.TB, line string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		t.Errorf("ip %s: %v: %s", line, err, out)
	}
}
