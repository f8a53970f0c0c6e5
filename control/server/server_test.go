package server

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

func allow(w *world) {
	w.t.Helper()
	if _, err := w.s.SetPolicy(context.Background(), "test", allowAll, -1); err != nil {
		w.t.Fatal(err)
	}
}

const allowAll = `{"tagOwners":{"tag:a":[],"tag:b":[]},"acls":[{"action":"accept","src":["*"],"dst":["*:*"]}]}`

func TestTwoNodesMeet(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	na := a.poll(func(r *wire.MapRequest) { r.MeshInstance = "one" })
	if na.self == nil || na.self.Name != "agent.mesh.internal." || !na.self.MachineAuthorized || len(na.self.Addresses) != 2 {
		t.Fatalf("self: %+v", na.self)
	}
	if len(na.derp.Regions) != 1 || len(na.filter) == 0 || na.last.Domain != "mesh.internal" || na.last.ControlTime == nil || na.policy != 1 {
		t.Errorf("first message is not complete: %+v", na.last)
	}
	if len(na.peers) != 1 {
		t.Fatalf("a sees %d peers, want 1", len(na.peers))
	}
	nb := b.poll(nil)
	id := nb.self.ID
	na.until(t, "b to be online", func() bool { p := na.peers[id]; return p != nil && p.Online != nil && *p.Online })
	if p := na.peers[id]; p.Name != "agent-1.mesh.internal." || p.DiscoKey != b.disco.Public() || p.Hostinfo == nil {
		t.Errorf("b as a peer: %+v", p)
	}
	ep := netip.MustParseAddrPort("192.0.2.7:41641")
	if status, _ := b.lite(func(r *wire.MapRequest) {
		r.Endpoints = []netip.AddrPort{ep, netip.MustParseAddrPort("[fe80::1%eth0]:1"), netip.MustParseAddrPort("[fe80::1]:1"), ep}
		r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900}
	}); status != 200 {
		t.Fatalf("lite update: %d", status)
	}
	na.until(t, "b's endpoints", func() bool { return len(na.peers[id].Endpoints) > 0 })
	if p := na.peers[id]; len(p.Endpoints) != 1 || p.Endpoints[0] != ep || p.HomeDERP != 900 {
		t.Errorf("after the lite update: %+v", p)
	}
	if len(na.last.PeersChangedPatch) == 0 || len(na.last.PeersChanged) > 0 {
		t.Errorf("endpoints came as %+v, want a patch", na.last)
	}
}

// Some stock clients lose patches of a node that they have just heard of: they get
// it whole until they have surely taken it in.
func TestStockHearsOfNewcomers(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		ours, stock, b := w.machine().join(key), w.machine().join(key), w.machine().join(key)
		nOurs, nStock := ours.poll(func(r *wire.MapRequest) { r.MeshInstance = "one" }), stock.poll(nil)
		id := b.poll(nil).self.ID
		for i, want := range []struct {
			n     *netmap
			patch bool
		}{{nOurs, true}, {nStock, false}, {nStock, true}} {
			if i == 2 {
				time.Sleep(takenIn + time.Second)
			}
			ep := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.7"), uint16(i+1))
			if status, _ := b.lite(func(r *wire.MapRequest) { r.Endpoints = []netip.AddrPort{ep} }); status != 200 {
				t.Fatalf("lite update: %d", status)
			}
			want.n.until(t, "b's endpoints", func() bool { p := want.n.peers[id]; return p != nil && slices.Contains(p.Endpoints, ep) })
			if got := len(want.n.last.PeersChangedPatch) > 0; got != want.patch {
				t.Errorf("%d: endpoints came as %+v", i, want.n.last)
			}
		}
	})
}

func TestLogoutOfEphemeralNode(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.OfflineGrace = time.Hour })
	allow(w)
	key := w.key(store.Key{Reusable: true, Ephemeral: true})
	a, b := w.machine().join(key), w.machine().join(key)
	na, nb := a.poll(nil), b.poll(nil)
	req := b.registerRequest("")
	req.Expiry = wire.LogoutExpiry
	if resp, err := b.register(req); err != nil || !resp.NodeKeyExpired {
		t.Fatalf("logout: %+v %v", resp, err)
	}
	na.until(t, "b to be gone", func() bool { return len(na.peers) == 0 })
	nb.end(t)
	if status, code := b.lite(nil); status != 404 || code != wire.CodeNodeUnknown {
		t.Errorf("lite update after logout: %d %s", status, code)
	}
}
