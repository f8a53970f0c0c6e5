package tunnel

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

func TestIdlePeersGo(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		for round := range 3 {
			a.say(t, b, "x")
			b.wantGot(t, a, "x")
			// Traffic keeps both alive, handshakes and keepalives would not.
			for range 5 {
				time.Sleep(4 * time.Minute)
				b.say(t, a, "y")
				a.wantGot(t, b, "y")
			}
			time.Sleep(DefaultIdleAfter - time.Second)
			synctest.Wait()
			if n := a.t.ActivePeers(); n != 1 {
				t.Fatalf("round %d: %d active peers before the time", round, n)
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if n := a.t.ActivePeers() + b.t.ActivePeers(); n != 0 {
				t.Fatalf("round %d: %d active peers after the idle time", round, n)
			}
			if len(a.t.indexes)+len(b.t.indexes)+len(a.t.table.claims) != 0 {
				t.Fatal("something of the peers is left")
			}
		}
		if s := a.t.Stats(); s.Evicted != 3 {
			t.Errorf("evicted %d, want 3", s.Evicted)
		}
	})
}

func TestUnknownPeer(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := nw.add(t, "a", 1), nw.add(t, "b", 2)
		if err := a.t.Send(b.key, [][]byte{packet(a.v4, b.v4, "")}); !errors.Is(err, ErrUnknownPeer) {
			t.Fatalf("send to an unknown peer: %v", err)
		}
		for _, k := range []identity.NodePublic{a.key, {}} {
			if err := a.t.Send(k, [][]byte{packet(a.v4, a.v4, "")}); !errors.Is(err, ErrUnknownPeer) {
				t.Fatalf("send to self or nobody: %v", err)
			}
		}
		// b does not know a: a's handshake gets no answer and no state, however
		// long a tries.
		a.knows(b)
		a.say(t, b, "x")
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := b.t.Stats(); s.DropUnknownKey < 5 || b.t.ActivePeers() != 0 || s.DatagramsOut != 0 {
			t.Fatalf("unknown initiator: %+v", s)
		}
		// A node with b's key in its own netmap as a peer does not talk to itself.
		b.knows(b)
		b.knows(a)
		b.say(t, a, "y")
		a.wantGot(t, b, "y")
	})
}

// The listener hears of the dialler a moment after its first packet.
func TestInitiationBeforeNetmap(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := nw.add(t, "a", 1), nw.add(t, "b", 2)
		a.knows(b)
		a.say(t, b, "early")
		time.Sleep(time.Second)
		synctest.Wait()
		b.knows(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.wantGot(t, a, "early")
	})
}

func TestHeldInitiationsExpireAndAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		b := nw.add(t, "b", 0)
		var first *node
		for i := range maxHeld + 20 {
			n := nw.add(t, "n", byte(i+1))
			if first == nil {
				first = n
			}
			n.knows(b)
			n.say(t, b, "x")
			synctest.Wait()
			n.forget(b)
			n.t.Update([]identity.NodePublic{b.key}) // no further tries
			time.Sleep(30 * time.Millisecond)
		}
		b.t.mu.RLock()
		held := len(b.t.held)
		b.t.mu.RUnlock()
		if held != maxHeld {
			t.Fatalf("%d held, want %d", held, maxHeld)
		}
		time.Sleep(holdFor)
		b.knows(first)
		b.t.Update([]identity.NodePublic{first.key})
		synctest.Wait()
		if b.t.ActivePeers() != 0 {
			t.Fatal("an initiation was answered after its time")
		}
	})
}

func TestRemovedPeerStopsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.say(t, a, "x")
		a.wantGot(t, b, "x")

		b.forget(a)
		b.t.Update([]identity.NodePublic{a.key})
		out := b.t.Stats().DatagramsOut
		if b.t.ActivePeers() != 0 {
			t.Fatal("the peer is still configured")
		}
		a.say(t, b, "y")
		b.wantGot(t, a)
		if err := b.t.Send(a.key, [][]byte{packet(b.v4, a.v4, "")}); !errors.Is(err, ErrUnknownPeer) {
			t.Fatalf("send to a removed peer: %v", err)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := b.t.Stats().DatagramsOut; n != out {
			t.Fatalf("%d datagrams sent to a removed peer", n-out)
		}
		// And back.
		b.take()
		b.knows(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.say(t, a, "z")
		a.wantGot(t, b, "z")
	})
}

// A removal waits for the delivery that is going on, and Deliver may send to
// any peer meanwhile, even to the one that is being removed.
func TestRemovalDuringDelivery(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		c := nw.add(t, "c", 3)
		b.knows(c)
		c.knows(b)
		entered, release := make(chan struct{}), make(chan struct{})
		sends := make(chan error, 2)
		b.mu.Lock()
		b.onDeliver = func(got) {
			close(entered)
			<-release
			sends <- b.t.Send(c.key, [][]byte{packet(b.v4, c.v4, "during")})
			sends <- b.t.Send(a.key, [][]byte{packet(b.v4, a.v4, "during")})
		}
		b.mu.Unlock()
		a.say(t, b, "x")
		<-entered
		b.forget(a)
		updated := make(chan struct{})
		go func() {
			b.t.Update([]identity.NodePublic{a.key})
			close(updated)
		}()
		synctest.Wait()
		select {
		case <-updated:
			t.Fatal("Update returned while a packet of the removed peer was being delivered")
		default:
		}
		b.knows(a) // and at once back in the netmap
		close(release)
		<-updated
		if err := <-sends; err != nil {
			t.Errorf("send to another peer: %v", err)
		}
		<-sends // may fail, must not hang
		c.wantGot(t, b, "during")
	})
}

func TestAllowedIPsChange(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		handshake, _ := a.t.LastHandshake(b.key)

		route := netip.MustParsePrefix("10.1.0.0/16")
		via := func(text string) { // to a subnet behind b
			t.Helper()
			dst := netip.MustParseAddr("10.1.2.3")
			if err := a.t.Send(b.key, [][]byte{packet(a.v4, dst, text)}); err != nil {
				t.Fatal(err)
			}
		}
		via("too early")
		b.wantGot(t, a)
		a.set(b, append(b.prefixes(), route)...)
		a.t.Update([]identity.NodePublic{b.key})
		via("routed")
		b.wantGot(t, a, "routed")
		// Back from the subnet: a accepts the source only while it is b's.
		back := [][]byte{packet(netip.MustParseAddr("10.1.2.3"), a.v4, "back")}
		b.t.Send(a.key, back)
		a.wantGot(t, b, "back")

		a.knows(b)
		a.t.Update([]identity.NodePublic{b.key})
		via("too late")
		b.wantGot(t, a)
		b.t.Send(a.key, back)
		a.wantGot(t, b)
		a.say(t, b, "still here")
		b.wantGot(t, a, "still here")
		if again, _ := a.t.LastHandshake(b.key); again != handshake {
			t.Error("the change disturbed the session")
		}
		if s := a.t.Stats(); s.DropDestination != 2 || s.DropSource != 1 {
			t.Errorf("drops: %+v", s)
		}
		b.set(a) // no addresses at all
		b.t.Update([]identity.NodePublic{a.key})
		a.say(t, b, "homeless")
		b.wantGot(t, a)
	})
}

func TestAddressMoves(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b, c := nw.add(t, "a", 1), nw.add(t, "b", 2), nw.add(t, "c", 3)
		a.knows(b, c)
		b.knows(a)
		c.knows(a)
		shared := netip.MustParseAddr("100.64.9.9")
		host := netip.PrefixFrom(shared, 32)
		claim := func(who ...*node) {
			a.knows(b, c)
			for _, n := range who {
				a.set(n, append(n.prefixes(), host)...)
			}
		}
		send := func(to *node, text string) {
			t.Helper()
			if err := a.t.Send(to.key, [][]byte{packet(a.v4, shared, text)}); err != nil {
				t.Fatal(err)
			}
		}
		from := func(n *node, text string) {
			n.t.Send(a.key, [][]byte{packet(shared, a.v4, text)})
		}
		claim(b)
		a.say(t, b, "1")
		a.say(t, c, "1")
		b.wantGot(t, a, "1")
		c.wantGot(t, a, "1")
		send(b, "yours")
		send(c, "not yours")
		b.wantGot(t, a, "yours")
		c.wantGot(t, a)
		from(b, "ok")
		a.wantGot(t, b, "ok")
		from(c, "spoof")
		a.wantGot(t, c)

		claim(c)
		a.t.Update([]identity.NodePublic{c.key, b.key})
		send(b, "was yours")
		send(c, "now yours")
		b.wantGot(t, a)
		c.wantGot(t, a, "now yours")
		from(b, "spoof")
		a.wantGot(t, b)
		from(c, "ok")
		a.wantGot(t, c, "ok")

		// Claimed by two: nobody's, also when a shorter prefix would fit.
		claim(b, c)
		a.set(b, append(b.prefixes(), host, netip.MustParsePrefix("100.64.9.0/24"))...)
		a.t.Update([]identity.NodePublic{b.key})
		send(b, "doubt")
		send(c, "doubt")
		from(b, "doubt")
		from(c, "doubt")
		b.wantGot(t, a)
		c.wantGot(t, a)
		a.wantGot(t, b)

		// Only the other claimant's key is given: the doubt is resolved too.
		claim(b)
		a.t.Update([]identity.NodePublic{b.key})
		a.t.Update([]identity.NodePublic{c.key})
		send(b, "again")
		b.wantGot(t, a, "again")
		c.wantGot(t, a)
	})
}

// A peer that is made while an old owner still stands in the way makes the
// tunnel ask about that owner.
func TestLazyPeerTakesOverAddress(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b, c := nw.add(t, "a", 1), nw.add(t, "b", 2), nw.add(t, "c", 3)
		b.knows(a)
		c.knows(a)
		shared := netip.MustParseAddr("100.64.9.9")
		a.knows(c)
		a.set(b, append(b.prefixes(), netip.PrefixFrom(shared, 32))...)
		a.say(t, b, "1")
		b.wantGot(t, a, "1")
		a.knows(b)
		a.set(c, append(c.prefixes(), netip.PrefixFrom(shared, 32))...)
		// No Update yet.
		if err := a.t.Send(c.key, [][]byte{packet(a.v4, shared, "moved")}); err != nil {
			t.Fatal(err)
		}
		c.wantGot(t, a, "moved")
	})
}

func TestBlock(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.t.Block([]netip.Prefix{netip.PrefixFrom(a.v4, 32), netip.MustParsePrefix("fd7a::/64")})
		a.say(t, b, "y")
		a.t.Send(b.key, [][]byte{packet(a.v6, b.v6, "y")})
		b.wantGot(t, a)
		b.say(t, a, "z")
		a.wantGot(t, b)
		b.t.Block(nil)
		a.say(t, b, "w")
		b.wantGot(t, a, "w")
	})
}

func TestSetKey(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		time.Sleep(time.Second)

		old := a.key
		fresh := identity.NewNode()
		nw.mu.Lock()
		nw.nodes[fresh.Public()] = a
		a.key = fresh.Public()
		nw.mu.Unlock()
		if err := a.t.SetKey(fresh); err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		delete(b.netmap, old)
		b.mu.Unlock()
		b.knows(a)
		b.t.Update([]identity.NodePublic{old, a.key})
		b.say(t, a, "new key")
		a.wantGot(t, b, "new key")
		a.say(t, b, "me too")
		b.wantGot(t, a, "me too")
		if err := a.t.SetKey(identity.NodePrivate{}); err == nil {
			t.Error("zero key accepted")
		}
	})
}

func TestPSK(t *testing.T) {
	secret := func(same byte) func(*Config) {
		return func(c *Config) {
			c.PSK = func(identity.NodePublic) [32]byte { return [32]byte{1, 2, same} }
		}
	}
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw, secret(1))
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		c := nw.add(t, "c", 3, secret(2))
		a.knows(c)
		c.knows(a)
		c.say(t, a, "wrong secret")
		a.wantGot(t, c)
	})
}

func TestTable(t *testing.T) {
	p := func(s string) netip.Prefix { return netip.MustParsePrefix(s) }
	a, b := newPeer(identity.NewNode().Public(), psk{}, 0), newPeer(identity.NewNode().Public(), psk{}, 0)
	var tb table
	tb.claim(p("10.0.0.0/8"), a)
	tb.claim(p("10.1.0.0/16"), b)
	tb.claim(p("0.0.0.0/0"), b)
	tb.claim(p("::/0"), a)
	tb.claim(p("fd00::1/128"), b)
	check := func(addr string, want *peer) {
		t.Helper()
		if got := tb.owner(netip.MustParseAddr(addr)); got != want {
			t.Errorf("owner of %s is wrong", addr)
		}
	}
	check("10.2.3.4", a)
	check("10.1.3.4", b)
	check("8.8.8.8", b)
	check("fd00::1", b)
	check("fd00::2", a)
	check("::ffff:10.1.3.4", a) // an IPv6 address as any other
	tb.claim(p("10.1.0.0/16"), a)
	check("10.1.3.4", nil)
	tb.release(p("10.1.0.0/16"), b)
	check("10.1.3.4", a)
	for _, s := range []string{"10.0.0.0/8", "10.1.0.0/16", "::/0"} {
		tb.release(p(s), a)
	}
	tb.release(p("0.0.0.0/0"), b)
	tb.release(p("fd00::1/128"), b)
	check("10.1.3.4", nil)
	if len(tb.claims)+len(tb.owners.hosts)+len(tb.owners.nets)+len(tb.owners.lens4)+len(tb.owners.lens6) != 0 {
		t.Errorf("something is left: %+v", tb)
	}
	for s, want := range map[string]bool{"10.0.0.7/8": true, "::ffff:10.0.0.0/104": false, "fe80::1/64": true} {
		if q, ok := usable(p(s)); ok != want || ok && q != q.Masked() {
			t.Errorf("usable(%s) = %v %v", s, q, ok)
		}
	}
	if _, ok := usable(netip.Prefix{}); ok {
		t.Error("the zero prefix is usable")
	}
}

// Concurrent updates, sends and deliveries end in the state that Lookup says.
func TestConcurrentUpdates(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a := nw.add(t, "a", 1)
		var peers []*node
		for i := range 4 {
			n := nw.add(t, "n", byte(2+i))
			n.knows(a)
			a.knows(n)
			peers = append(peers, n)
		}
		host := netip.MustParsePrefix("100.64.9.9/32")
		var wg sync.WaitGroup
		for i, n := range peers {
			wg.Go(func() {
				for range 50 {
					a.t.Send(n.key, [][]byte{packet(a.v4, n.v4, "x"), packet(a.v4, host.Addr(), n.name)})
					n.t.Send(a.key, [][]byte{packet(n.v4, a.v4, "y")})
				}
			})
			wg.Go(func() {
				for round := range 50 {
					switch (round + i) % 3 {
					case 0:
						a.set(n, append(n.prefixes(), host)...)
					case 1:
						a.forget(n)
					default:
						a.knows(n)
					}
					a.t.Update([]identity.NodePublic{n.key})
				}
			})
		}
		wg.Wait()
		a.mu.Lock()
		for _, n := range peers {
			a.netmap[n.key] = Peer{Key: n.key, AllowedIPs: n.prefixes()}
		}
		a.mu.Unlock()
		var keys []identity.NodePublic
		for _, n := range peers {
			keys = append(keys, n.key)
		}
		a.t.Update(keys)
		synctest.Wait()
		time.Sleep(20 * time.Second) // handshakes that were cut off
		for _, n := range peers {
			for _, g := range n.take() {
				if g.from != a.key || !slices.Contains(n.prefixes(), netip.PrefixFrom(netip.AddrFrom4([4]byte(g.packet[16:])), 32)) &&
					netip.AddrFrom4([4]byte(g.packet[16:])) != host.Addr() {
					t.Errorf("%s got a packet that is not for it", n.name)
				}
			}
			n.say(t, a, "end")
			synctest.Wait()
			time.Sleep(6 * time.Second)
			a.say(t, n, "end")
			time.Sleep(6 * time.Second)
			synctest.Wait()
			if gs := n.take(); len(gs) == 0 || payload(gs[len(gs)-1].packet) != "end" {
				t.Errorf("%s is cut off: %+v", n.name, a.t.Stats())
			}
		}
	})
}
