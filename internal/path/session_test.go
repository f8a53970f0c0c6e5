package path

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

func TestDirectByCallMeMaybe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, a, b := pair(t)
		// Nobody knows an address of the other.
		pb, pa := b.peer(1), a.peer(1)
		pb.Endpoints, pa.Endpoints = nil, nil
		a.knows(pb)
		b.knows(pa)
		a.send(t, b, "one")
		settle(100 * time.Millisecond)
		a.send(t, b, "two") // tries the address from which b pinged
		settle(100 * time.Millisecond)
		if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
			t.Errorf("status %+v", st)
		}
	})
}

func TestStaleDiscoKey(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, a, b := pair(t)
		stale := b.peer(1)
		stale.Disco = identity.NewDisco().Public()
		a.knows(stale)
		for range 20 {
			a.send(t, b, "x")
			settle(time.Second)
		}
		if st := a.Status(b.key()); st.Direct.IsValid() || st.Region != 1 {
			t.Fatalf("direct with a wrong key: %+v", st)
		}
		if len(b.take()) != 20 {
			t.Error("relay lost packets")
		}
		a.knows(b.peer(1))
		settle(100 * time.Millisecond)
		if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
			t.Errorf("not direct with the right key: %+v", st)
		}
		// Updates that change nothing, or only addresses, disturb nothing.
		other := b.peer(1)
		other.Endpoints = []netip.AddrPort{ap("203.0.113.5:5")}
		a.knows(b.peer(1), b.peer(1), other)
		if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
			t.Errorf("disturbed: %+v", st)
		}
		// A new process of the peer: both ways until a pong with the new key.
		again := b.peer(1)
		again.Disco = identity.NewDisco().Public()
		a.knows(again)
		if st := a.Status(b.key()); st.Trusted {
			t.Errorf("trusted in spite of a new key: %+v", st)
		}
	})
}

func TestNetmapRace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, a, b := pair(t)
		b.nm.remove(a.key())
		b.Update([]identity.NodePublic{a.key()})
		initiation := make([]byte, initiationLen)
		initiation[0] = 1
		if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{initiation}); err != nil {
			t.Fatal(err)
		}
		settle(500 * time.Millisecond)
		if got := b.take(); len(got) != 0 {
			t.Fatalf("packets of a stranger delivered: %d", len(got))
		}
		// The netmap introduces a, at first without home and addresses.
		pa := a.peer(0)
		pa.Endpoints = nil
		b.knows(pa)
		settle(100 * time.Millisecond)
		got := b.take()
		if len(got) != 1 || got[0].data != string(initiation) || got[0].src.Peer != a.key() {
			t.Fatalf("held initiation: %+v", got)
		}
		b.send(t, a, "answer")
		settle(100 * time.Millisecond)
		if got := a.take(); len(got) == 0 {
			t.Error("answer lost")
		}
		if st := a.Status(b.key()); st.Direct != b.addr {
			t.Errorf("held disco packets were not answered: %+v", st)
		}
	})
}

// TestInitiationBeforeNetmap: without a relay too the first handshake of a peer
// that the netmap does not name yet is not lost.
func TestInitiationBeforeNetmap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		initiation := make([]byte, initiationLen)
		initiation[0] = 1
		for range 100 {
			n.deliver(ap("203.0.113.5:5"), a.addr, initiation)
		}
		settle(100 * time.Millisecond)
		if got := a.take(); len(got) != 100 {
			t.Fatalf("%d of 100 handed over at once", len(got))
		}
		a.knows(b.peer(1))
		if got := a.take(); len(got) != maxHeldSender || got[0].src != (Source{Addr: ap("203.0.113.5:5")}) {
			t.Errorf("%d handed over again", len(got))
		}
		a.knows(b.peer(1))
		if got := a.take(); len(got) != 0 {
			t.Errorf("%d handed over for a third time", len(got))
		}
	})
}

func TestIdlePeerLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.send(t, b, "x")
		settle(sessionTimeout + 2*heartbeat)
		quiet := n.total()
		settle(peerIdle)
		if n.total() != quiet {
			t.Errorf("%d datagrams of idle nodes", n.total()-quiet)
		}
		for _, nd := range []*node{a, b} {
			nd.mu.Lock()
			nd.Path.mu.Lock()
			if len(nd.timers) != 0 || len(nd.held) != 0 || len(nd.calls) != 0 || nd.ends.next != 0 || nd.home.next != 0 {
				t.Errorf("timers %d held %d calls %d, next %v %v", len(nd.timers), len(nd.held), len(nd.calls), nd.ends.next, nd.home.next)
			}
			nd.Path.mu.Unlock()
			nd.mu.Unlock()
			nd.peers.mu.Lock()
			if len(nd.peers.byKey) != 0 || len(nd.peers.addrs) != 0 {
				t.Errorf("%d peers, %d addresses kept", len(nd.peers.byKey), len(nd.peers.addrs))
			}
			nd.peers.mu.Unlock()
		}
		// And it works again.
		a.send(t, b, "y")
		settle(time.Second)
		if got := b.take(); len(got) < 2 {
			t.Errorf("%+v", got)
		}
		if st := a.Status(b.key()); !st.Trusted {
			t.Errorf("%+v", st)
		}
	})
}

func TestRelayReconnects(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		a.send(t, b, "one")
		settle(time.Second)
		r := n.relays[1]
		r.setDown(true)
		settle(30 * time.Second)
		if d := r.dials; d > 180 { // of two nodes
			t.Errorf("%d attempts in 30 s", d)
		}
		b.take()
		r.setDown(false)
		settle(backoffMax + time.Second)
		for _, nd := range []*node{a, b} {
			if _, home := r.isHome(nd.key()); !home {
				t.Error("home not connected, or not told that it is")
			}
		}
		a.send(t, b, "two")
		settle(time.Second)
		if got := b.take(); len(got) != 1 || got[0].data != "two" {
			t.Errorf("%+v", got)
		}
		if a.HomeRegion() != 1 {
			t.Error(a.HomeRegion())
		}
	})
}

// regions starts a node in a net with two regions, the first being nearer.
func regions(t *testing.T, change func(*Config)) (*memNet, *node) {
	n := newMemNet(t)
	n.relay(1)
	n.relay(2)
	n.stuns[stunServer(1)] = 10 * time.Millisecond
	n.stuns[stunServer(2)] = 60 * time.Millisecond
	cfg, nd := n.config("192.0.2.1")
	if change != nil {
		change(&cfg)
	}
	n.start(cfg, nd)
	return n, nd
}

func TestHomeFailover(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		a.SetRelays(relayMap(1, 2))
		began := time.Now()
		if err := a.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); a.HomeRegion() != 1 || d > 50*time.Millisecond {
			t.Fatalf("home %d after %v", a.HomeRegion(), d)
		}
		settle(time.Second)
		if c, _ := n.relays[2].isHome(a.key()); c {
			t.Error("connected to a region without need")
		}
		n.relays[1].setDown(true)
		settle(homeDown + 100*time.Millisecond)
		if a.HomeRegion() != 2 || a.lastReport().NetInfo.PreferredDERP != 2 {
			t.Fatalf("home %d, reported %d", a.HomeRegion(), a.lastReport().NetInfo.PreferredDERP)
		}
		if _, home := n.relays[2].isHome(a.key()); !home {
			t.Error("new home not told")
		}
		// It comes back, and after a while the nearer one is home again.
		n.relays[1].setDown(false)
		settle(badFor + 10*time.Second)
		if a.HomeRegion() != 1 {
			t.Errorf("home %d", a.HomeRegion())
		}
		settle(relayIdle + 2*relayIdleCheck)
		if c, _ := n.relays[2].isHome(a.key()); c {
			t.Error("old home still connected")
		}
	})
}

func TestHomeWithoutSTUN(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for _, relayOnly := range []bool{false, true} {
			n, a := regions(t, func(c *Config) { c.RelayOnly = relayOnly })
			clear(n.stuns)
			n.relays[1].down = true
			a.SetRelays(relayMap(1, 2))
			began := time.Now()
			if err := a.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(began); a.HomeRegion() != 2 || d > settleAfter+100*time.Millisecond {
				t.Errorf("home %d after %v", a.HomeRegion(), d)
			}
			settle(time.Second)
			r := a.lastReport()
			if relayOnly && (len(r.Endpoints) != 0 || n.total() != 0 || r.NetInfo.WorkingUDP != nil) {
				t.Errorf("relay only: %+v, %d datagrams", r, n.total())
			}
			if !relayOnly && (r.NetInfo.WorkingUDP == nil || *r.NetInfo.WorkingUDP || len(r.Endpoints) != 1) {
				t.Errorf("UDP blocked: %+v", r)
			}
			a.Close()
		}
	})
}

func TestReadyNamesTheCause(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ready := func(a *node) error {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			return a.Ready(ctx)
		}
		_, a := regions(t, nil)
		if err := ready(a); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no relay map") {
			t.Error(err)
		}
		a.SetRelays(relayMap(7)) // there is no such relay, but UDP works
		if err := ready(a); err != nil {
			t.Error(err)
		}
		_, b := regions(t, func(c *Config) { c.RelayOnly = true })
		b.SetRelays(relayMap(7))
		if err := ready(b); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "relay 7: no such host") {
			t.Error(err)
		}
		b.Close()
		if err := ready(b); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		_, c := regions(t, func(c *Config) { c.DirectOnly = true })
		c.SetRelays(relayMap(1))
		if err := ready(c); err != nil {
			t.Error(err)
		}
		if c.HomeRegion() != 0 || c.relays.connected(1) {
			t.Error("direct only, but at home at a relay")
		}
	})
}

func TestPeerInAnotherRegion(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		b := n.node("192.0.2.2")
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		a.SetRelays(relayMap(1, 2))
		b.SetRelays(relayMap(2))
		a.Ready(t.Context())
		b.Ready(t.Context())
		a.knows(b.peer(2))
		b.knows(a.peer(0)) // home unknown as yet
		a.send(t, b, "one")
		settle(time.Second)
		if got := b.take(); len(got) != 1 || got[0].src.Region != 2 {
			t.Fatalf("%+v", got)
		}
		// Back by the region where a was heard.
		b.send(t, a, "two")
		settle(time.Second)
		if got := a.take(); len(got) != 1 || got[0].src.Region != 2 {
			t.Fatalf("%+v", got)
		}
		// The relay says that a has gone: that way is none any more.
		n.relays[2].gone(b.key(), a.key())
		settle(time.Millisecond)
		if err := b.Send(a.key(), netip.AddrPort{}, [][]byte{{1}}); !errors.Is(err, ErrNoPath) {
			t.Error(err)
		}
		// Not used: closed, and opened when needed again.
		settle(sessionTimeout + relayIdle + 2*relayIdleCheck)
		if c, _ := n.relays[2].isHome(a.key()); c {
			t.Error("idle relay still connected")
		}
		if a.HomeRegion() != 1 || b.HomeRegion() != 2 {
			t.Error(a.HomeRegion(), b.HomeRegion())
		}
		a.send(t, b, "three")
		settle(time.Second)
		if got := b.take(); len(got) != 1 {
			t.Errorf("%+v", got)
		}
	})
}

func TestRelayMapChanges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		a.SetRelays(relayMap(1, 2))
		a.Ready(t.Context())
		dials := func(r int) int {
			n.relays[r].mu.Lock()
			defer n.relays[r].mu.Unlock()
			return n.relays[r].dials
		}
		if a.SetRelays(relayMap(1, 2)); dials(1) != 1 {
			t.Errorf("connection rebuilt for the same map")
		}
		m := relayMap(1, 2)
		m.Regions[1].Nodes[0].DERPPort = 8443
		a.SetRelays(m)
		settle(time.Second)
		if dials(1) != 2 || a.HomeRegion() != 1 {
			t.Errorf("%d dials, home %d", dials(1), a.HomeRegion())
		}
		a.SetRelays(relayMap(2))
		settle(time.Second)
		if a.HomeRegion() != 2 {
			t.Errorf("home %d", a.HomeRegion())
		}
		if c, _ := n.relays[1].isHome(a.key()); c {
			t.Error("still connected to a region that is gone")
		}
		m = relayMap(1, 2)
		m.Regions[2].NoMeasureNoHome = true
		m.Regions[3] = nil
		a.SetRelays(m)
		settle(time.Second)
		if a.HomeRegion() != 1 {
			t.Errorf("home %d", a.HomeRegion())
		}
		a.SetRelays(nil)
		settle(time.Second)
		if r := a.lastReport(); a.HomeRegion() != 0 || r.NetInfo.PreferredDERP != 0 {
			t.Errorf("home %d", a.HomeRegion())
		}
	})
}

func TestNetworkChange(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.send(t, b, "x")
		settle(time.Second)
		old := a.addr
		if err := a.Rebind(); err != nil {
			t.Fatal(err)
		}
		if st := a.Status(b.key()); st.Trusted || st.Region != 1 || st.Why != "network changed" {
			t.Errorf("old path trusted: %+v", st)
		}
		b.take()
		a.send(t, b, "y")
		settle(time.Second)
		if got := b.take(); len(got) == 0 {
			t.Error("nothing arrived")
		}
		if st := a.Status(b.key()); !st.Trusted || a.LocalPort() != old.Port() {
			t.Errorf("%+v port %d", st, a.LocalPort())
		}
		if _, home := n.relays[1].isHome(a.key()); !home {
			t.Error("home lost")
		}
	})
}

func TestMappedAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newMemNet(t)
		for r := 1; r <= 2; r++ {
			n.relay(r)
			n.stuns[stunServer(r)] = 5 * time.Millisecond
		}
		cfg, a := n.config("192.0.2.1")
		cfg.Interfaces = func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24"), netip.MustParsePrefix("127.0.0.1/8")}, nil
		}
		n.start(cfg, a)
		a.SetRelays(relayMap(1, 2))
		a.Ready(t.Context())
		settle(time.Second)
		r := a.lastReport()
		want := []netip.AddrPort{a.addr, ap("10.0.0.2:41641")}
		if len(r.Endpoints) != 2 || r.Endpoints[0] != want[0] || r.Endpoints[1] != want[1] ||
			r.Types[0] != wire.EndpointSTUN || r.Types[1] != wire.EndpointLocal {
			t.Errorf("%v %v", r.Endpoints, r.Types)
		}
		if v := r.NetInfo.MappingVariesByDestIP; v == nil || *v {
			t.Errorf("mapping %v", v)
		}
		if l := r.NetInfo.DERPLatency["1-v4"]; l != 0.006 {
			t.Errorf("latency %v", r.NetInfo.DERPLatency)
		}
		a.mu.Lock()
		reports := len(a.reports)
		a.mu.Unlock()
		if reports > 3 {
			t.Errorf("%d reports", reports)
		}
	})
}
