package path

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

// TestEndpointFlood: a peer that lists addresses without end, by call and by
// ping, makes us probe little: each address at most once in five seconds, and
// none that no peer can have.
func TestEndpointFlood(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		n.block(a.addr.Addr(), b.addr.Addr(), true) // a goes on searching
		control := ap("203.0.113.250:8080")
		a.Avoid([]netip.AddrPort{control})
		forbidden := []netip.AddrPort{
			ap("192.0.2.255:7"), ap("255.255.255.255:7"), ap("224.0.0.1:7"), ap("[ff02::1]:7"), ap("0.0.0.0:7"),
			control, stunServer(1),
		}
		var mu sync.Mutex // guards what follows
		last := make(map[netip.AddrPort]time.Time)
		total, tooSoon, never := 0, 0, 0
		n.setTap(func(from, to netip.AddrPort, p []byte) {
			if from != a.addr || !isDisco(p) || len(p) == disco.PongLen {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			total++
			if at, ok := last[to]; ok && time.Since(at) < pingSpacing && to != b.addr {
				tooSoon++
			}
			last[to] = time.Now()
			for _, f := range forbidden {
				if to == f {
					never++
				}
			}
		})
		listed := 0
		addr := func() netip.AddrPort {
			listed++ // no address twice: who lists one again and again is bounded for its host
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{20, byte(listed >> 16), byte(listed >> 8), byte(listed)}), 9)
		}
		const seconds, each = 20, 100
		for range seconds * 10 {
			for range each / 10 {
				m := disco.CallMeMaybe{Endpoints: append([]netip.AddrPort(nil), forbidden...)}
				for len(m.Endpoints) < disco.MaxEndpoints {
					m.Endpoints = append(m.Endpoints, addr())
				}
				n.relays[1].inject(b.key(), a.key(), seal(b.disc, a.disc.Public(), m))
				n.deliver(addr(), a.addr, seal(b.disc, a.disc.Public(), disco.Ping{TxID: disco.NewTxID()}))
			}
			a.send(t, b, "x")
			settle(100 * time.Millisecond)
		}
		mu.Lock()
		defer mu.Unlock()
		t.Logf("%d pings for %d addresses listed", total, seconds*each*disco.MaxEndpoints)
		if never != 0 {
			t.Errorf("%d pings to forbidden addresses", never)
		}
		if tooSoon != 0 {
			t.Errorf("%d pings to one address within %v", tooSoon, pingSpacing)
		}
		if limit := seconds*(maxCandidates+1)/2 + maxCandidates; total > limit || total == 0 {
			t.Errorf("%d pings in %d s, want at most %d", total, seconds, limit)
		}
		if st := a.Status(b.key()); st.Candidates > maxCandidates {
			t.Errorf("%d candidates", st.Candidates)
		}
		if st := a.Stats(); st.PingsHeld == 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestCallsNamingOneVictim: a thousand peers each name the same host once.
func TestCallsNamingOneVictim(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, _ := pair(t)
		victim := netip.MustParseAddr("203.0.113.66")
		const peers = 1000
		for i := range peers {
			d, key := identity.NewDisco(), identity.NewNode().Public()
			a.knows(Peer{Key: key, Disco: d.Public(), HomeRegion: 1})
			call := disco.CallMeMaybe{Endpoints: []netip.AddrPort{netip.AddrPortFrom(victim, uint16(1+i))}}
			n.relays[1].inject(key, a.key(), seal(d, a.disc.Public(), call))
			if i%100 == 99 {
				settle(10 * time.Millisecond)
			}
		}
		settle(time.Minute)
		sum := 0
		n.mu.Lock()
		for to, c := range n.sent {
			if to.Addr() == victim {
				sum += c
			}
		}
		n.mu.Unlock()
		if sum == 0 || sum > windowPublic {
			t.Errorf("%d packets to the victim of %d calls", sum, peers)
		}
	})
}

// TestReplayFromElsewhere: an authentic datagram that an attacker sends on makes
// us ask at most once there, and moves nothing.
func TestReplayFromElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		attacker := ap("203.0.113.9:9")
		for range 10 {
			a.send(t, b, "x")
			b.send(t, a, "x")
			settle(100 * time.Millisecond)
		}
		for range 20 {
			// WireGuard says that it was the peer's, as it was.
			a.Authenticated(b.key(), Source{Addr: attacker})
			if err := a.Send(b.key(), attacker, [][]byte{[]byte("y")}); err != nil {
				t.Fatal(err)
			}
			settle(100 * time.Millisecond)
		}
		if c := n.count(attacker); c > 1 {
			t.Errorf("%d packets to the attacker", c)
		}
		if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
			t.Errorf("path moved: %+v", st)
		}
		// Without a direct path neither: the relay is the way, not a stranger.
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		for range 100 {
			if err := a.Send(b.key(), attacker, [][]byte{[]byte("y")}); err != nil {
				t.Fatal(err)
			}
			settle(100 * time.Millisecond)
		}
		if st := a.Status(b.key()); st.Direct.IsValid() {
			t.Fatalf("%+v", st)
		}
		if c := n.count(attacker); c > 5 {
			t.Errorf("%d packets to the attacker", c)
		}
	})
}

// TestOldReplays: what was recorded does not work seconds or an hour later, from
// the true address or another.
func TestOldReplays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		var mu sync.Mutex // guards recorded
		var recorded [][]byte
		n.setTap(func(from, to netip.AddrPort, p []byte) {
			if mu.Lock(); to == a.addr && isDisco(p) {
				recorded = append(recorded, p)
			}
			mu.Unlock()
		})
		for range 30 {
			a.send(t, b, "x")
			b.send(t, a, "x")
			settle(100 * time.Millisecond)
		}
		n.setTap(nil)
		for _, wait := range []time.Duration{time.Second, time.Hour} {
			settle(wait)
			for i, p := range recorded {
				n.deliver(netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), uint16(1+i)), a.addr, p)
				n.relays[1].inject(b.key(), a.key(), p)
			}
			a.send(t, b, "x")
			settle(time.Second)
			if st := a.Status(b.key()); st.Direct != b.addr {
				t.Errorf("after %v: %+v", wait, st)
			}
		}
		if st := a.Stats(); st.PongsStray == 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestSpoofsAreCounted: what is ignored is seen.
func TestSpoofsAreCounted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		settle(time.Second) // for the first report
		before := a.lastReport().Endpoints
		server := stunServer(1)
		stranger := identity.NewDisco()
		forged := seal(stranger, a.disc.Public(), disco.Ping{})
		pub := b.disc.Public().Bytes()
		copy(forged[len(disco.Magic):], pub[:])
		for range 10 {
			n.deliver(server, a.addr, stun.AppendResponse(nil, stun.NewTxID(), ap("203.0.113.1:1")))
			n.deliver(server, a.addr, stun.AppendResponse(nil, stun.NewTxID(), ap("203.0.113.1:1"))[:25])
			n.deliver(b.addr, a.addr, forged)
			n.deliver(b.addr, a.addr, seal(stranger, a.disc.Public(), disco.Ping{}))
			n.deliver(b.addr, a.addr, seal(b.disc, a.disc.Public(), callTo("203.0.113.1:1")))
			n.deliver(b.addr, a.addr, seal(b.disc, a.disc.Public(), disco.Pong{}))
		}
		settle(time.Minute)
		if st, want := a.Stats(), (Stats{DiscoUnknown: 10, DiscoForged: 10, DiscoByUDP: 10, PongsStray: 10, STUNStray: 20}); st != want {
			t.Errorf("%+v, want %+v", st, want)
		}
		if after := a.lastReport().Endpoints; len(after) != len(before) || after[0] != before[0] {
			t.Errorf("endpoints %v became %v", before, after)
		}
	})
}

// TestSetEndpoints: what a port mapper or the user knows goes to control and to
// peers.
func TestSetEndpoints(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		a.send(t, b, "x")
		settle(time.Second)
		mapped := ap("203.0.113.77:7777")
		a.SetEndpoints([]Endpoint{{mapped, wire.EndpointPortMapped}})
		settle(time.Second)
		if r := a.lastReport(); len(r.Endpoints) != 2 || r.Endpoints[0] != mapped || r.Types[0] != wire.EndpointPortMapped {
			t.Errorf("%v %v", r.Endpoints, r.Types)
		}
		if n.count(mapped) == 0 {
			t.Error("peer does not try it")
		}
		a.SetEndpoints(nil)
		settle(time.Second)
		if r := a.lastReport(); len(r.Endpoints) != 1 {
			t.Errorf("%v %v", r.Endpoints, r.Types)
		}
	})
}
