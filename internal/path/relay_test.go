package path

import (
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/identity"
)

// TestSilentRelayIsLeft: a relay that takes packets and gives nothing back is
// found out while packets go there, and another is home soon.
func TestSilentRelayIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		a.SetRelays(relayMap(1, 2))
		b := n.node("192.0.2.2")
		b.SetRelays(relayMap(1, 2))
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		a.Ready(t.Context())
		b.Ready(t.Context())
		a.knows(b.peer(1))
		b.knows(a.peer(1)) // and control says so for long
		talk := func(d time.Duration) (gap time.Duration) {
			last := time.Now()
			for end := time.Now().Add(d); time.Now().Before(end); {
				a.send(t, b, "x")
				b.send(t, a, "x")
				settle(20 * time.Millisecond)
				if a.take() != nil && b.take() != nil {
					gap = max(gap, time.Since(last))
					last = time.Now()
				}
			}
			return max(gap, time.Since(last))
		}
		talk(10 * time.Second)
		n.relays[1].mu.Lock()
		n.relays[1].hole = true
		n.relays[1].mu.Unlock()
		gap := talk(20 * time.Second)
		t.Logf("silent for %v", gap)
		if gap > 4*time.Second {
			t.Errorf("nothing for %v", gap)
		}
		if a.HomeRegion() != 2 || b.HomeRegion() != 2 {
			t.Error("home", a.HomeRegion(), b.HomeRegion())
		}
	})
}

// TestRelayRestarting: a relay that says that it will restart is left before.
func TestRelayRestarting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		a.SetRelays(relayMap(1, 2))
		a.Ready(t.Context())
		settle(time.Second)
		r := n.relays[1]
		r.mu.Lock()
		r.conns[a.key()].in <- derp.Message{Kind: derp.KindRestarting, ReconnectIn: 3 * time.Second}
		r.mu.Unlock()
		settle(100 * time.Millisecond)
		if a.HomeRegion() != 2 {
			t.Fatalf("home %d", a.HomeRegion())
		}
		if c, _ := r.isHome(a.key()); !c {
			t.Error("old relay left before it went: peers still send there")
		}
		settle(2*badFor + relayIdle)
		if a.HomeRegion() != 1 {
			t.Errorf("home %d, the better one is back", a.HomeRegion())
		}
		// With a single region there is no better place.
		_, b, _ := pair(t)
		b.relayRestarting(1, time.Hour)
		settle(time.Second)
		if b.HomeRegion() != 1 || !b.relays.connected(1) {
			t.Error("only relay left")
		}
	})
}

// relaysOfRegion is a map whose region 1 has relays of these names.
func relaysOfRegion(names ...string) *wire.DERPMap {
	m := relayMap(1, 2)
	one := *m.Regions[1].Nodes[0]
	m.Regions[1].Nodes = nil
	for _, name := range names {
		n := one
		n.Name = name
		m.Regions[1].Nodes = append(m.Regions[1].Nodes, &n)
	}
	return m
}

// TestRegionOfSeveralRelays: a node leaves a relay for another one of the region
// without a gap, and never the region for it.
func TestRegionOfSeveralRelays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, func(c *Config) { c.RelayOnly = true })
		first, second := n.relay(1), &memRelay{region: 1, conns: make(map[identity.NodePublic]*memRelayConn)}
		first.next, second.next = second, first
		n.siblings = map[string]*memRelay{"1a": first, "1b": second}
		n.relays[2].setDown(true)
		cfg, b := n.config("192.0.2.2")
		cfg.RelayOnly = true
		n.start(cfg, b)
		for _, nd := range []*node{a, b} {
			nd.SetRelays(relaysOfRegion("1a", "1b"))
			nd.Ready(t.Context())
		}
		a.knows(b.peer(1))
		b.knows(a.peer(1))
		lost := 0
		talk := func(d time.Duration) {
			t.Helper()
			for end := time.Now().Add(d); time.Now().Before(end); {
				a.send(t, b, "x")
				b.send(t, a, "x")
				settle(20 * time.Millisecond)
				if a.take() == nil || b.take() == nil {
					lost++
				}
			}
			for _, nd := range []*node{a, b} {
				if nd.HomeRegion() != 1 {
					t.Errorf("home %d", nd.HomeRegion())
				}
			}
		}
		at := func(nd *node, want *memRelay) {
			t.Helper()
			for _, r := range []*memRelay{first, second} {
				if _, home := r.isHome(nd.key()); home != (r == want) {
					t.Errorf("home at the wrong relay of the region")
				}
			}
		}
		restart := func(nd *node, r *memRelay) {
			r.mu.Lock()
			r.conns[nd.key()].in <- derp.Message{Kind: derp.KindRestarting, ReconnectIn: 3 * time.Second}
			r.mu.Unlock()
		}
		settle(3 * time.Second)
		at(a, first)
		at(b, first)
		restart(a, first)
		talk(5 * time.Second)
		at(a, second)
		at(b, first)
		if c, _ := first.isHome(a.key()); !c {
			t.Error("the relay was left before it went: peers still send there")
		}
		talk(lingerFor)
		if c, _ := first.isHome(a.key()); c {
			t.Error("still connected to the relay that was left")
		}
		// The map does not name it any more; then names it again.
		b.SetRelays(relaysOfRegion("1b"))
		talk(time.Second)
		at(b, second)
		b.SetRelays(relaysOfRegion("1a", "1b"))
		talk(lingerFor)
		at(b, second)
		if lost > 0 {
			t.Errorf("%d packets lost while nodes moved", lost)
		}
		// It dies: back to the other one.
		before := first.dials
		second.setDown(true)
		talk(5 * time.Second)
		at(a, first)
		at(b, first)
		if lost > 20 {
			t.Errorf("%d packets lost when the relay died", lost)
		}
		// Both go: to the other region.
		t.Log(lost, "lost,", first.dials-before, "dials")
		n.relays[2].setDown(false)
		first.setDown(true)
		settle(5 * time.Second)
		if a.HomeRegion() != 2 {
			t.Errorf("home %d", a.HomeRegion())
		}
	})
}

// TestMapWhileMoving: what the map says of a region while a node connects to one of
// its relays, or moves to another, is not forgotten.
func TestMapWhileMoving(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, func(c *Config) { c.RelayOnly = true })
		n.delay = time.Second
		n.siblings = map[string]*memRelay{}
		for _, name := range []string{"1a", "1b", "1c"} {
			n.siblings[name] = &memRelay{region: 1, conns: make(map[identity.NodePublic]*memRelayConn)}
		}
		n.relays[2].setDown(true)
		at := func(want string) {
			t.Helper()
			for name, r := range n.siblings {
				if _, home := r.isHome(a.key()); home != (name == want) {
					t.Errorf("home at relay %s: %v, want it at %s", name, home, want)
				}
			}
		}
		tell := func(first, second, want string) {
			t.Helper()
			a.SetRelays(relaysOfRegion(first))
			settle(n.delay / 2)
			a.SetRelays(relaysOfRegion(second))
			settle(5 * time.Second)
			at(want)
		}
		tell("1a", "1b", "1b")
		settle(lingerFor)
		tell("1a", "1c", "1c")
		settle(lingerFor)
		tell("1a", "1c", "1c") // it never should have left, and comes back
		settle(lingerFor)
		n.siblings["1a"].setDown(true)
		tell("1a", "1b", "1b")
	})
}

// TestWaitingPacketsAreBounded: for each peer and in all, in number and bytes.
func TestWaitingPacketsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		c := n.node("192.0.2.3")
		c.SetRelays(relayMap(1))
		c.Ready(t.Context())
		a.knows(c.peer(1))
		n.relays[1].setDown(true)
		settle(time.Second)
		n.relays[1].mu.Lock()
		n.relays[1].down = false
		n.relays[1].mu.Unlock()
		r := a.relays.get(1)
		b.take()
		r.wait(c.key(), [][]byte{[]byte("first")})
		for range 1000 {
			r.wait(b.key(), [][]byte{make([]byte, 1000)})
		}
		r.mu.Lock()
		if len(r.waiting) != maxWaitingPeer+1 || r.size != maxWaitingPeer*1000+5 {
			t.Errorf("%d packets, %d bytes", len(r.waiting), r.size)
		}
		r.mu.Unlock()
		for range 1000 {
			r.wait(identity.NewNode().Public(), [][]byte{make([]byte, 4000)})
		}
		r.mu.Lock()
		if len(r.waiting) > maxWaiting || r.size > maxWaitingSize {
			t.Errorf("%d packets, %d bytes", len(r.waiting), r.size)
		}
		r.mu.Unlock()
	})
}

// TestNothingLeftOfIdlePeer: ten minutes after the last packet there is no state,
// timer, goroutine, socket or relay connection for a peer, and nothing is sent.
func TestNothingLeftOfIdlePeer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, nil)
		a.SetRelays(relayMap(1, 2))
		b := n.node("192.0.2.2")
		b.SetRelays(relayMap(2))
		a.Ready(t.Context())
		b.Ready(t.Context())
		a.knows(b.peer(2))
		b.knows(a.peer(1))
		for range 100 {
			a.send(t, b, "x")
			settle(100 * time.Millisecond)
			b.send(t, a, "x")
		}
		a.Ping(t.Context(), b.key(), func(Pong) {})
		if !a.Status(b.key()).Trusted {
			t.Fatal("no direct path")
		}
		settle(5 * time.Minute)
		quiet := n.total()
		settle(5 * time.Minute)
		if n.total() != quiet {
			t.Errorf("%d datagrams", n.total()-quiet)
		}
		if c, _ := n.relays[2].isHome(a.key()); c {
			t.Error("connection to the peer's relay kept")
		}
		for _, nd := range []*node{a, b} {
			p := nd.Path
			p.peers.mu.Lock()
			p.mu.Lock()
			if len(p.peers.byKey)+len(p.peers.addrs)+len(p.timers)+len(p.calls)+len(p.meets)+len(p.held) != 0 {
				t.Errorf("%d peers, %d addresses, %d timers, %d calls, %d meets, %d held",
					len(p.peers.byKey), len(p.peers.addrs), len(p.timers), len(p.calls), len(p.meets), len(p.held))
			}
			if p.ends.next != 0 || p.home.next != 0 || p.watchAt != 0 || p.idleCheck != 0 {
				t.Errorf("due: endpoints %v home %v watch %v idle %v", p.ends.next, p.home.next, p.watchAt, p.idleCheck)
			}
			p.mu.Unlock()
			p.peers.mu.Unlock()
			if len(nd.socks.Load().each2()) != 1 {
				t.Error("sockets")
			}
		}
	})
}

func (s *sockets) each2() (all []*socket) {
	s.each(func(s *socket) { all = append(all, s) })
	return all
}

// TestCloseSendsWhatWasSent: what a relay has not taken yet when the node leaves are
// the resets of its connections.
func TestCloseSendsWhatWasSent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, _ := pair(t)
		a.Close()
		a.Close()
		r := n.relays[1]
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.flushes != 1 {
			t.Errorf("flushed %d times before the connection was closed, want once", r.flushes)
		}
	})
}
