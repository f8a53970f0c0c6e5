package path

import (
	"testing"
	"time"

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
