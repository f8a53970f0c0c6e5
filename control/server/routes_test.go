package server

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/wire"
)

const routePolicy = `{"tagOwners":{"tag:a":[],"tag:b":[],"tag:c":[]},
	"autoApprovers":{"routes":{"10.0.0.0/8":["tag:b"]}},
	"acls":[{"action":"accept","src":["tag:a"],"dst":["10.1.0.0/16:*","192.168.0.0/24:*"]}]}`

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// advertise has a router offer networks.
func (m *machine) advertise(name string, networks ...string) {
	m.lite(func(r *wire.MapRequest) { r.Hostinfo.Hostname, r.Hostinfo.RoutableIPs = name, networks })
}

// behind are the networks that lead to a peer.
func (n *netmap) behind(id wire.NodeID) []netip.Prefix {
	if n.peers[id] == nil {
		return nil
	}
	return n.peers[id].PrimaryRoutes
}

// A route counts when it is advertised and approved, one router is in charge,
// and another takes over when that one goes.
func TestRoutes(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.setPolicy(routePolicy)
		a, r1, r2, c := w.tagged("tag:a", "a"), w.tagged("tag:b", "r1"), w.tagged("tag:b", "r2"), w.tagged("tag:c", "c")
		na, n1, n2, nc := a.poll(nil), r1.poll(nil), r2.poll(nil), c.poll(nil)
		id1, id2 := n1.self.ID, n2.self.ID
		if len(na.peers) != 0 {
			t.Fatalf("peers without routes: %v", na.peers)
		}
		r1.advertise("r1", "10.1.0.0/16")
		na.until(t, "the route", func() bool { return slices.Equal(na.behind(id1), prefixes("10.1.0.0/16")) })
		n1.until(t, "its own route and filter", func() bool { return len(n1.self.PrimaryRoutes) == 1 && len(n1.filter) == 1 })
		if want := 3; len(na.peers[id1].AllowedIPs) != want {
			t.Errorf("allowed: %v", na.peers[id1].AllowedIPs)
		}
		// The second router stands by; it takes over while the first is away.
		r2.advertise("r2", "10.1.0.0/16")
		n2.until(t, "its filter", func() bool { return len(n2.filter) == 1 })
		w.mark(11, na)
		if len(na.behind(id1)) != 1 || len(na.behind(id2)) != 0 {
			t.Errorf("two in charge: %v, %v", na.behind(id1), na.behind(id2))
		}
		n1.cancel()
		na.until(t, "the other router", func() bool { return len(na.behind(id2)) == 1 && len(na.behind(id1)) == 0 })
		n1 = r1.poll(nil)
		na.until(t, "the first again", func() bool { return len(na.behind(id1)) == 1 && len(na.behind(id2)) == 0 })
		// One that the policy does not approve needs an administrator, who
		// approves this network and nothing wider.
		r1.advertise("r1", "10.1.0.0/16", "192.168.0.0/24")
		w.mark(12, na)
		if got := na.behind(id1); len(got) != 1 {
			t.Errorf("unapproved: %v", got)
		}
		ctx := t.Context()
		if err := w.s.ApproveRoutes(ctx, "admin", "r1", prefixes("192.168.0.0/24")); err != nil {
			t.Fatal(err)
		}
		na.until(t, "the approved route", func() bool { return len(na.behind(id1)) == 2 })
		r1.advertise("r1", "10.1.0.0/16", "192.168.0.0/16")
		na.until(t, "it is gone", func() bool { return len(na.behind(id1)) == 1 })
		r1.advertise("r1", "10.1.0.0/16", "192.168.0.0/24")
		na.until(t, "it is back", func() bool { return len(na.behind(id1)) == 2 })
		// What the policy approved goes with it.
		w.setPolicy(`{"tagOwners":{"tag:a":[],"tag:b":[],"tag:c":[]},"acls":[{"action":"accept","src":["tag:a"],"dst":["10.1.0.0/16:*","192.168.0.0/24:*"]}]}`)
		na.until(t, "the policy's approval is gone", func() bool { return slices.Equal(na.behind(id1), prefixes("192.168.0.0/24")) && na.peers[id2] == nil })
		// Removed, it leads nowhere.
		if err := w.s.RemoveNode(ctx, "admin", "r1"); err != nil {
			t.Fatal(err)
		}
		na.until(t, "no router", func() bool { return len(na.peers) == 0 })
		if nc.count > 3 || len(nc.seen) > 0 {
			t.Errorf("a node without access got %d messages", nc.count)
		}
	})
}

// Nobody draws the mesh's own traffic to itself (negative test 57).
func TestRoutesThatNobodyMayHave(t *testing.T) {
	w := newWorld(t, nil)
	w.setPolicy(`{"tagOwners":{"tag:a":[],"tag:b":[]},"autoApprovers":{"routes":{"0.0.0.0/1":["tag:b"],"100.64.0.0/10":["tag:b"],"fd00::/8":["tag:b"]},"exitNode":["tag:b"]},
		"acls":[{"action":"accept","src":["*"],"dst":["*:*"]}]}`)
	a, b := w.tagged("tag:a", "a"), w.tagged("tag:b", "b")
	na, nb := a.poll(nil), b.poll(nil)
	b.advertise("b", na.self.Addresses[0].String(), "100.64.0.0/10", "100.0.0.0/8", "fd7a:115c:a1e0::/48", "fd00::/8", "64.0.0.0/2", "10.0.0.0/8", "0.0.0.0/0", "10.0.0.1/8", "nonsense")
	na.until(t, "what may be", func() bool { return len(na.behind(nb.self.ID)) == 1 })
	p := na.peers[nb.self.ID]
	if got := fmt.Sprint(p.AllowedIPs[2:]); got != "[0.0.0.0/0 10.0.0.0/8]" && got != "[10.0.0.0/8 0.0.0.0/0]" {
		t.Errorf("allowed: %v", p.AllowedIPs)
	}
	c, ctx := w.admin(), t.Context()
	for _, bad := range []string{"100.64.0.0/10", "100.64.0.1/32", "fd7a:115c:a1e0::/48", "10.0.0.1/8"} {
		if _, err := c.ApproveRoutes(ctx, "b", prefixes(bad)); !errors.Is(err, admin.ErrInvalid) {
			t.Errorf("route %s: %v", bad, err)
		}
	}
	if _, err := c.ApproveRoutes(ctx, "nobody", nil); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("routes of nobody: %v", err)
	}
	must[admin.Node](t)(c.ApproveRoutes(ctx, "b", prefixes("172.16.0.0/12", "10.0.0.0/8")))
	got := must[admin.Node](t)(c.Node(ctx, "b")).Routes
	want := []admin.NodeRoute{
		{Prefix: prefixes("10.0.0.0/8")[0], Advertised: true, Approved: "administrator", Primary: true},
		{Prefix: prefixes("0.0.0.0/0")[0], Advertised: true, Approved: "policy"},
		{Prefix: prefixes("172.16.0.0/12")[0], Approved: "administrator"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("routes %+v, want %+v", got, want)
	}
	topology := must[admin.Topology](t)(c.Topology(ctx))
	if n := topology.Nodes["b"]; len(n.ApprovedRoutes) != 2 || n.ID != nb.self.ID || n.IPv4 != nb.self.Addresses[0].Addr() || topology.Nodes["a"].Tags[0] != "tag:a" {
		t.Errorf("topology: %+v", topology)
	}
}

// A candidate is judged on what nodes report of themselves, and changes
// nothing.
func TestShadow(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:80","tag:b:443"]}]}`)
		a, b := w.tagged("tag:a", "a"), w.tagged("tag:b", "b")
		na, nb := a.poll(nil), b.poll(nil)
		src, dst := na.self.Addresses[0].Addr(), nb.self.Addresses[0].Addr()
		ctx := t.Context()
		report := func(m *machine, flows ...wire.Flow) {
			t.Helper()
			time.Sleep(reportEvery * time.Second)
			m.lite(func(r *wire.MapRequest) { r.Hostinfo.Hostname, r.MeshFlows = "", flows })
		}
		flow := func(port uint16, count int64) wire.Flow {
			return wire.Flow{Src: src, Dst: dst, Proto: 6, Port: port, Allowed: count}
		}
		report(b, flow(80, 1)) // before there is a candidate
		if _, err := w.s.ShadowReport(); err == nil {
			t.Error("a report without a candidate")
		}
		if _, err := w.s.SetShadow(ctx, "admin", `{"acls":1}`); !errors.Is(err, ErrPolicy) {
			t.Errorf("a bad candidate: %v", err)
		}
		if _, err := w.s.SetShadow(ctx, "admin", `{`+owners+`,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:80","tag:b:22"]}]}`); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "to be asked", func() bool { return nb.flows != nil && *nb.flows == reportEvery })
		if len(nb.filter) != 1 || nb.policy != 1 {
			t.Errorf("the candidate changed something: %v, version %d", nb.filter, nb.policy)
		}
		report(b, flow(80, 3), flow(443, 2), wire.Flow{Src: src, Dst: dst, Proto: 6, Port: 22, Denied: 4}, flow(9, 1))
		report(b, flow(443, 1))
		report(a, flow(443, 100)) // a has no say about b
		report(b, wire.Flow{Src: src, Dst: dst, Proto: 6, Port: 443, Allowed: -5}, wire.Flow{Dst: dst, Proto: 6, Port: 443, Allowed: 1}, wire.Flow{Src: src, Dst: dst, Proto: 600, Port: 443, Allowed: 1})
		r, err := w.s.ShadowReport()
		if err != nil || r.Attempts != 11 || len(r.Pairs) != 2 {
			t.Fatalf("report %+v, %v", r, err)
		}
		if p := r.Pairs[0]; p.Allowed || p.Src != "tag:a" || p.Dst != "tag:b" || p.Port != 443 || p.Attempts != 3 || len(p.Rules) == 0 {
			t.Errorf("newly denied: %+v", p)
		}
		if p := r.Pairs[1]; !p.Allowed || p.Port != 22 || p.Attempts != 4 || len(p.Rules) == 0 {
			t.Errorf("newly allowed: %+v", p)
		}
		// It follows nodes, and a restart.
		if err := w.s.SetOwner(ctx, "admin", "a", "", []string{"tag:c"}); err != nil {
			t.Fatal(err)
		}
		report(b, flow(80, 1)) // denied by both now
		if r, _ := w.s.ShadowReport(); len(r.Pairs) != 2 || r.Attempts != 12 {
			t.Errorf("after a change of owner: %+v", r)
		}
		b.close()
		a.close()
		w.stop()
		w.start(nil)
		b.connect()
		nb = b.poll(nil)
		if nb.flows == nil || *nb.flows != reportEvery {
			t.Error("nobody is asked after a restart")
		}
		if _, err := w.s.SetShadow(ctx, "admin", ""); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "the end", func() bool { return *nb.flows == 0 })
		if _, err := w.s.ShadowReport(); err == nil {
			t.Error("a report after the end")
		}
	})
}
