package path

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"mesh/identity"
	"mesh/internal/disco"
)

// seal makes a disco packet as its sender would.
func seal(from identity.DiscoPrivate, to identity.DiscoPublic, m disco.Message) []byte {
	return disco.NewSealer(from, 1).Seal(nil, to, m)
}

func callTo(addrs ...string) disco.CallMeMaybe {
	var m disco.CallMeMaybe
	for _, a := range addrs {
		m.Endpoints = append(m.Endpoints, ap(a))
	}
	return m
}

func TestForgedCallMeMaybe(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		victim := ap("203.0.113.66:53")
		packet := callTo(victim.String())
		stranger, strangerNode := identity.NewDisco(), identity.NewNode().Public()
		mallory := n.node("192.0.2.66")
		a.knows(mallory.peer(1)) // a peer, but not b
		mallory.SetRelays(relayMap(1))

		r := n.relays[1]
		// By UDP: only the relay proves who sent it.
		n.deliver(b.addr, a.addr, seal(b.disc, a.disc.Public(), packet))
		// From nobody we know.
		r.inject(strangerNode, a.key(), seal(stranger, a.disc.Public(), packet))
		// A known node key with another node's disco key, and the other way round.
		r.inject(mallory.key(), a.key(), seal(b.disc, a.disc.Public(), packet))
		r.inject(b.key(), a.key(), seal(mallory.disc, a.disc.Public(), packet))
		// A genuine one for somebody else.
		r.inject(b.key(), a.key(), seal(b.disc, mallory.disc.Public(), packet))
		settle(time.Minute)
		if c := n.count(victim); c != 0 {
			t.Errorf("%d packets to the victim", c)
		}
		// A genuine one works, and asks for no more than one ping.
		r.inject(b.key(), a.key(), seal(b.disc, a.disc.Public(), packet))
		settle(time.Minute)
		if c := n.count(victim); c != 1 {
			t.Errorf("%d packets after a genuine call", c)
		}
	})
}

func TestPingsOfStrangersUnanswered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		c := n.node("192.0.2.3") // a does not know c
		from := ap("192.0.2.3:41641")
		n.deliver(from, a.addr, seal(c.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID(), Node: c.key()}))
		// b's name in the clear, but not b's box.
		forged := seal(c.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID(), Node: b.key()})
		pub := b.disc.Public().Bytes()
		copy(forged[len(disco.Magic):], pub[:])
		n.deliver(from, a.addr, forged)
		// For another receiver, cut, and empty.
		genuine := seal(b.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID()})
		n.deliver(from, a.addr, seal(b.disc, c.disc.Public(), disco.Ping{}))
		n.deliver(from, a.addr, genuine[:50])
		n.deliver(from, a.addr, genuine[:len(genuine)-1])
		n.deliver(from, a.addr, []byte(disco.Magic))
		n.deliver(from, a.addr, nil)
		settle(10 * time.Second)
		if got := n.count(from); got != 0 {
			t.Errorf("%d answers", got)
		}
		if st := a.Status(b.key()); st.Candidates > 1 {
			t.Errorf("addresses learned from forgeries: %+v", st)
		}
		for _, g := range a.take() {
			if g.data != "" {
				t.Errorf("handed to WireGuard: %+v", g)
			}
		}
	})
}

func TestReplayedPing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		attacker := ap("203.0.113.9:9")
		// The attacker records a ping and a pong of b.
		var mu sync.Mutex // guards recorded
		var recorded [][]byte
		n.setTap(func(from, to netip.AddrPort, p []byte) {
			mu.Lock()
			defer mu.Unlock()
			if from == b.addr && to == a.addr && isDisco(p) {
				recorded = append(recorded, p)
			}
		})
		b.send(t, a, "x")
		a.send(t, b, "x")
		settle(time.Second)
		n.setTap(nil)
		if len(recorded) < 2 {
			t.Fatalf("%d packets recorded", len(recorded))
		}
		for range 3 {
			for range 20 {
				for _, p := range recorded {
					n.deliver(attacker, a.addr, p)
					// The same with the source of the true peer.
					n.deliver(b.addr, a.addr, p)
				}
				a.send(t, b, "y")
				settle(100 * time.Millisecond)
			}
			if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
				t.Fatalf("path moved: %+v", st)
			}
			if pe := a.peers.at(b.addr); pe == nil || pe.key != b.key() {
				t.Fatal("address of the peer taken away")
			}
			settle(time.Minute)
		}
		if c := n.count(attacker); c > 12 {
			t.Errorf("%d packets to the attacker", c)
		}
	})
}

func TestAddressOfAnotherIsNotStolen(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		mallory := n.node("192.0.2.66")
		a.knows(mallory.peer(1))
		a.send(t, b, "x")
		settle(time.Second)
		// A genuine ping of another peer, from b's address.
		n.deliver(b.addr, a.addr, seal(mallory.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID(), Node: mallory.key()}))
		// And one that claims b's node key.
		n.deliver(ap("192.0.2.66:1"), a.addr, seal(mallory.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID(), Node: b.key()}))
		settle(time.Second)
		a.take()
		b.send(t, a, "from b")
		settle(time.Second)
		for _, g := range a.take() {
			if g.src.Peer != b.key() {
				t.Errorf("taken for somebody else's: %+v", g)
			}
		}
		if pe := a.peers.at(ap("192.0.2.66:1")); pe == nil || pe.key != mallory.key() {
			t.Error("node key of another believed, or own address not learned")
		}
		// What WireGuard proves goes over what a ping says.
		a.Authenticated(b.key(), Source{Addr: ap("192.0.2.66:1")})
		if pe := a.peers.at(ap("192.0.2.66:1")); pe == nil || pe.key != b.key() {
			t.Error("authenticated address not taken over")
		}
		if st := a.Status(b.key()); st.Direct != b.addr {
			t.Errorf("path moved by a datagram: %+v", st)
		}
	})
}

func TestCallMeMaybeFlood(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, _ := pair(t)
		victim := netip.MustParseAddr("203.0.113.66")
		var m disco.CallMeMaybe
		for i := range 64 {
			m.Endpoints = append(m.Endpoints, netip.AddrPortFrom(victim, uint16(1000+i)))
		}
		// Many peers in league.
		const league = 60
		for range league {
			d, key := identity.NewDisco(), identity.NewNode().Public()
			a.knows(Peer{Key: key, Disco: d.Public(), HomeRegion: 1})
			packet := seal(d, a.disc.Public(), m)
			for range 20 {
				n.relays[1].inject(key, a.key(), packet)
			}
		}
		settle(4 * time.Second)
		sum := 0
		n.mu.Lock()
		for to, c := range n.sent {
			if to.Addr() == victim {
				sum += c
			}
		}
		n.mu.Unlock()
		if sum > 2*windowPublic {
			t.Errorf("%d packets to the victim for %d calls", sum, league*20)
		}
		if sum == 0 {
			t.Error("nothing at all: the test does not test")
		}
		settle(peerIdle + time.Minute)
		if l := len(a.peers.all()); l != 0 {
			t.Errorf("%d peers kept", l)
		}
	})
}

func TestHeldPacketsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, _ := pair(t)
		initiation := make([]byte, initiationLen)
		initiation[0] = 1
		for range 200 {
			d, key := identity.NewDisco(), identity.NewNode().Public()
			n.deliver(ap("203.0.113.1:1"), a.addr, seal(d, a.disc.Public(), disco.Ping{}))
			n.relays[1].inject(key, a.key(), initiation, initiation, make([]byte, 1400))
		}
		settle(100 * time.Millisecond)
		a.Path.mu.Lock()
		held := len(a.held)
		a.Path.mu.Unlock()
		if held == 0 || held > 2*maxHeldKind {
			t.Errorf("%d packets held", held)
		}
		if l := len(a.peers.all()); l != 0 {
			t.Errorf("%d peers made of strangers", l)
		}
		settle(holdFor)
		a.Path.mu.Lock()
		held = len(a.held)
		a.Path.mu.Unlock()
		if held != 0 {
			t.Errorf("%d packets held for ever", held)
		}
	})
}

func TestUnknownPeer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, a, b := pair(t)
		err := a.Send(identity.NewNode().Public(), ap("192.0.2.5:1"), [][]byte{{1}})
		if !errors.Is(err, ErrUnknownPeer) {
			t.Error(err)
		}
		a.Authenticated(identity.NewNode().Public(), Source{Addr: ap("192.0.2.5:1")})
		if l := len(a.peers.all()); l != 0 {
			t.Errorf("%d peers", l)
		}
		nowhere := Peer{Key: identity.NewNode().Public()}
		a.knows(nowhere)
		if err := a.Send(nowhere.Key, netip.AddrPort{}, [][]byte{{1}}); !errors.Is(err, ErrNoPath) {
			t.Error(err)
		}
		// A peer that goes takes all its state along.
		a.send(t, b, "x")
		settle(time.Second)
		a.nm.remove(b.key())
		a.Update([]identity.NodePublic{b.key()})
		if a.peers.get(b.key()) != nil || a.peers.at(b.addr) != nil {
			t.Error("state kept")
		}
		if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{{1}}); !errors.Is(err, ErrUnknownPeer) {
			t.Error(err)
		}
	})
}
