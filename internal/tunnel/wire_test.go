package tunnel

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// tap records what goes from one node to another.
type tap struct {
	mu   sync.Mutex
	seen map[string][][]byte // by "from>to"
}

func (nw *network) tap() *tap {
	tp := &tap{seen: make(map[string][][]byte)}
	nw.wire = func(from, to *node, d []byte) [][]byte {
		tp.mu.Lock()
		defer tp.mu.Unlock()
		k := from.name + ">" + to.name
		tp.seen[k] = append(tp.seen[k], d)
		return [][]byte{d}
	}
	return tp
}

// of returns the recorded datagrams of one type.
func (tp *tap) of(k string, kind byte) [][]byte {
	tp.mu.Lock()
	defer tp.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(tp.seen[k]), func(d []byte) bool { return d[0] != kind })
}

func TestReplayedInitiation(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		inits := tp.of("a>b", typeInitiation)
		if len(inits) != 1 {
			t.Fatalf("%d initiations", len(inits))
		}
		b.t.Receive(Source{Peer: a.key}, inits) // while the peer is there
		synctest.Wait()
		if s := b.t.Stats(); s.DropReplay != 1 {
			t.Fatalf("replay with the peer active: %+v", s)
		}
		time.Sleep(2 * DefaultIdleAfter)
		synctest.Wait()
		if b.t.ActivePeers() != 0 {
			t.Fatal("not evicted")
		}
		out := b.t.Stats().DatagramsOut
		b.t.Receive(Source{Peer: a.key}, inits)
		b.t.Receive(Source{Addr: netip.MustParseAddrPort("192.0.2.1:1")}, inits)
		synctest.Wait()
		if s := b.t.Stats(); s.DropReplay != 3 || s.DatagramsOut != out || b.t.ActivePeers() != 0 {
			t.Fatalf("replay after eviction: %+v, %d active", s, b.t.ActivePeers())
		}
		// A real one still comes through.
		a.say(t, b, "y")
		b.wantGot(t, a, "y")
	})
}

// A response that comes by two ways at the same moment begins one session: two
// would count from zero both, under the same keys.
func TestResponseByTwoWays(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		nw.wire = func(from, to *node, d []byte) [][]byte {
			if d[0] == typeResponse {
				return [][]byte{d, d}
			}
			return [][]byte{d}
		}
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		if s := a.t.Stats(); s.DropReplay != 1 {
			t.Errorf("the second copy was passed on: %+v", s)
		}
	})
}

func TestSourceMismatch(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		m := nw.add(t, "mallory", 3)
		b.knows(m)
		m.knows(b)
		nw.setSource(func(from, to *node) Source {
			if from == a {
				return Source{Peer: m.key, Region: 7} // the relay says that mallory sent it
			}
			return Source{Peer: from.key}
		})
		a.say(t, b, "x")
		b.wantGot(t, a)
		if s := b.t.Stats(); s.DropMismatch != 1 || b.t.ActivePeers() != 0 {
			t.Fatalf("initiation from another's connection: %+v", s)
		}
		nw.setSource(nil)
		time.Sleep(6 * time.Second) // a tries again
		b.wantGot(t, a, "x")
		// Sessions are not usable from somebody else's relay connection either.
		nw.setSource(func(from, to *node) Source { return Source{Peer: m.key, Region: 7} })
		a.say(t, b, "y")
		b.wantGot(t, a)
		if s := b.t.Stats(); s.DropMismatch < 2 {
			t.Fatalf("data from another's connection: %+v", s)
		}
	})
}

func TestSpoofedInnerSource(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		c := nw.add(t, "c", 3)
		b.knows(c)
		c.knows(b)
		c.say(t, b, "x")
		b.wantGot(t, c, "x")
		a.say(t, b, "x")
		b.wantGot(t, a, "x")

		short := packet(a.v6, b.v6, "")
		short[4], short[5] = 0xff, 0xf0 // with the header's 40 bytes this overflows 16 bits
		for name, p := range map[string][]byte{
			"other peer's":    packet(c.v4, b.v4, "spoof"),
			"other peer's v6": packet(c.v6, b.v6, "spoof"),
			"receiver's own":  packet(b.v4, b.v4, "spoof"),
			"unlisted":        packet(netip.MustParseAddr("192.0.2.7"), b.v4, "spoof"),
			"unspecified":     packet(netip.IPv4Unspecified(), b.v4, "spoof"),
			"loopback":        packet(netip.MustParseAddr("127.0.0.1"), b.v4, "spoof"),
			"loopback v6":     packet(netip.IPv6Loopback(), b.v6, "spoof"),
			"mapped":          packet(netip.AddrFrom16(a.v4.As16()), b.v6, "spoof"),
			"length overflow": short,
			"length beyond":   func() []byte { p := packet(a.v4, b.v4, "q"); p[2] = 0xff; return p }(),
			"length below":    func() []byte { p := packet(a.v4, b.v4, "q"); p[2], p[3] = 0, 7; return p }(),
		} {
			before := b.t.Stats().PacketsIn
			if err := a.t.Send(b.key, [][]byte{p}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			for _, g := range b.take() {
				t.Errorf("%s: delivered %x from %s", name, g.packet, g.from.Short())
			}
			if b.t.Stats().PacketsIn != before {
				t.Errorf("%s: counted as delivered", name)
			}
		}
		a.say(t, b, "honest")
		b.wantGot(t, a, "honest")
	})
}

func TestSendRefusesForeignDestinations(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		c := nw.add(t, "c", 3)
		a.knows(c)
		c.knows(a)
		bad := [][]byte{
			packet(a.v4, c.v4, "c's"), packet(a.v6, c.v6, "c's"), packet(a.v4, a.v4, "own"),
			packet(a.v4, netip.MustParseAddr("192.0.2.7"), "unlisted"),
			nil, {}, {0x45}, {0x45, 0, 0, 20}, {0x60, 1, 2, 3}, make([]byte, 39), packet(a.v6, b.v6, "")[:39],
			append([]byte{0x75}, make([]byte, 60)...),
			packet(a.v4, b.v4, string(make([]byte, 65500))), // no datagram holds it
		}
		if err := a.t.Send(b.key, append(bad, packet(a.v4, b.v4, "good"))); err != nil {
			t.Fatal(err)
		}
		b.wantGot(t, a, "good")
		c.wantGot(t, a)
		if s := a.t.Stats(); s.DropDestination != uint64(len(bad)) {
			t.Errorf("dropped %d of %d", s.DropDestination, len(bad))
		}
		big := string(make([]byte, 60000))
		a.say(t, b, big)
		b.wantGot(t, a, big)
	})
}

// Traffic flows for hours through dozens of rekeys without losing a packet.
func TestRekey(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		var sent, echoed int
		b.mu.Lock()
		b.onDeliver = func(g got) {
			if err := b.t.Send(g.from, [][]byte{packet(b.v4, a.v4, payload(g.packet))}); err != nil {
				t.Error(err)
			}
		}
		b.mu.Unlock()
		for begin := time.Now(); time.Since(begin) < 2*time.Hour; {
			a.say(t, b, fmt.Sprint(sent))
			sent++
			time.Sleep(time.Duration(1+sent%7) * time.Second)
			synctest.Wait()
			echoed += len(a.take())
			b.take()
		}
		if sent != echoed {
			t.Errorf("%d of %d came back", echoed, sent)
		}
		if n := len(tp.of("a>b", typeInitiation)) + len(tp.of("b>a", typeInitiation)); n < 50 || n > 70 {
			t.Errorf("%d handshakes in two hours", n)
		}
		for _, n := range []*node{a, b} {
			n.t.mu.RLock()
			if len(n.t.indexes) > 12 {
				t.Errorf("%s keeps %d indexes", n.name, len(n.t.indexes))
			}
			n.t.mu.RUnlock()
		}
		at, _ := a.t.LastHandshake(b.key)
		if age := time.Since(at); age > 3*time.Minute {
			t.Errorf("last handshake %v ago", age)
		}
	})
}

func TestBadNetwork(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		rng := rand.New(rand.NewPCG(1, 2))
		var mu sync.Mutex
		var late [][]byte
		clean := false
		nw.wire = func(from, to *node, d []byte) [][]byte {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case clean || from.name == "b": // b's way is fine
				return [][]byte{d}
			case rng.IntN(10) == 0: // lost
				return nil
			case rng.IntN(5) == 0: // overtaken
				late = append(late, d)
				return nil
			case rng.IntN(5) == 0: // repeated
				return [][]byte{d, d}
			}
			out := append([][]byte{d}, late...)
			late = nil
			return out
		}
		a, b := pair(t, nw)
		seen := make(map[string]int)
		const count = 3000
		for i := range count {
			a.say(t, b, fmt.Sprint(i))
			if i%100 == 99 {
				time.Sleep(20 * time.Second)
			}
			synctest.Wait()
			for _, g := range b.take() {
				seen[payload(g.packet)]++
			}
		}
		for k, n := range seen {
			if n != 1 {
				t.Errorf("packet %s delivered %d times", k, n)
			}
		}
		if len(seen) < count*7/10 {
			t.Errorf("only %d of %d packets arrived", len(seen), count)
		}
		mu.Lock()
		clean = true
		mu.Unlock()
		time.Sleep(time.Minute)
		a.say(t, b, "end")
		b.wantGot(t, a, "end")
	})
}

func TestReplayedData(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		for i := range 50 {
			a.say(t, b, fmt.Sprint(i))
			synctest.Wait()
		}
		if n := len(b.take()); n != 50 {
			t.Fatalf("%d delivered", n)
		}
		data := tp.of("a>b", typeData)
		attacker := netip.MustParseAddrPort("192.0.2.66:6")
		b.t.Receive(Source{Peer: a.key}, data)
		b.t.Receive(Source{Addr: attacker}, data)
		slices.Reverse(data)
		b.t.Receive(Source{Peer: a.key}, data)
		flipped := slices.Clone(data[0])
		flipped[len(flipped)-1] ^= 1
		b.t.Receive(Source{Addr: attacker}, [][]byte{flipped})
		b.wantGot(t, a)
		if len(b.authenticated) != 0 {
			t.Error("a replay counted as authenticated")
		}
		b.say(t, a, "still to a")
		a.wantGot(t, b, "still to a")
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, h := range b.hints {
			if h.IsValid() {
				t.Error("a replay changed where b sends to")
			}
		}
	})
}

// The path does not know the address from which the first packets come.
func TestUnknownAddress(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		addrs := map[string]netip.AddrPort{
			"a": netip.MustParseAddrPort("192.0.2.1:1001"),
			"b": netip.MustParseAddrPort("[2001:db8::2]:1002"),
		}
		nw.source = func(from, to *node) Source { return Source{Addr: addrs[from.name]} }
		a, b := pair(t, nw)
		c := nw.add(t, "c", 3)
		check := func(n, other *node, authenticated int, hint bool) {
			t.Helper()
			n.mu.Lock()
			defer n.mu.Unlock()
			if len(n.authenticated) != authenticated {
				t.Errorf("%s: Authenticated called %d times, want %d", n.name, len(n.authenticated), authenticated)
			}
			if l := len(n.authenticated); l > 0 && n.authenticated[l-1].Addr != addrs[other.name] {
				t.Errorf("%s: authenticated %v", n.name, n.authenticated[l-1])
			}
			want := netip.AddrPort{}
			if hint {
				want = addrs[other.name]
			}
			if got := n.hints[len(n.hints)-1]; got != want {
				t.Errorf("%s: sent with hint %v, want %v", n.name, got, want)
			}
		}
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.say(t, a, "y")
		a.wantGot(t, b, "y")
		check(a, b, 1, true) // a's first message had no hint, b's answer changed that
		check(b, a, 1, true)
		// The path of both has bound the addresses now.
		nw.setSource(func(from, to *node) Source { return Source{Peer: from.key, Addr: addrs[from.name]} })
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.say(t, a, "y")
		a.wantGot(t, b, "y")
		check(b, a, 1, false)
		a.say(t, b, "x")
		synctest.Wait()
		check(a, b, 1, false)
		// a roams, and the path takes a's new address for c's.
		b.take()
		synctest.Wait()
		addrs["a"] = netip.MustParseAddrPort("203.0.113.9:9")
		nw.setSource(func(from, to *node) Source { return Source{Peer: c.key, Addr: addrs[from.name]} })
		time.Sleep(2 * time.Second)
		a.say(t, b, "moved")
		b.wantGot(t, a, "moved")
		b.say(t, a, "y")
		synctest.Wait()
		check(b, a, 2, true)
	})
}

func TestInitiationFlood(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		before := b.t.Stats()

		// Proper initiations from keys that nobody knows. Nothing is remembered
		// of them, so repeating some costs what 10,000 different ones would.
		strangers := make([][]byte, 0, 64)
		for range cap(strangers) {
			strangers = append(strangers, forge(t, b.private.Public(), identity.NewNode(), time.Now()))
		}
		src := Source{Addr: netip.MustParseAddrPort("192.0.2.66:6")}
		begin := time.Now()
		for i := range 10000 {
			b.t.Receive(src, strangers[i%len(strangers):][:1])
			if i%100 == 0 {
				time.Sleep(10 * time.Millisecond) // 10,000 in a second
			}
			if i%1000 == 0 {
				a.say(t, b, "during")
				b.wantGot(t, a, "during")
			}
		}
		synctest.Wait()
		elapsed := time.Since(begin).Seconds()
		s := b.t.Stats()
		opened := s.DropUnknownKey + s.DropForged - before.DropUnknownKey
		if limit := uint64(initBurst + initRate*elapsed + 2); opened == 0 || opened > limit {
			t.Errorf("%d initiations opened in %.1f s, at most %d allowed", opened, elapsed, limit)
		}
		if s.DatagramsOut != before.DatagramsOut || b.t.ActivePeers() != 1 {
			t.Errorf("the flood was answered: %+v", s)
		}
		b.t.history.mu.Lock()
		if n := len(b.t.history.peers); n > 1 {
			t.Errorf("the flood left %d records", n)
		}
		b.t.history.mu.Unlock()
		// Somebody whom the path knows gets through in the middle of it.
		c := nw.add(t, "c", 3)
		b.knows(c)
		c.knows(b)
		for i := range 1000 {
			b.t.Receive(src, strangers[i%len(strangers):][:1])
		}
		c.say(t, b, "hello")
		b.wantGot(t, c, "hello")
	})
}

// A peer that sends initiation after initiation only hurts itself.
func TestGreedyPeer(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		m := nw.add(t, "m", 3)
		b.knows(m)
		m.knows(b)
		m.t.Close()
		for range 150 {
			b.t.Receive(Source{Peer: m.key}, [][]byte{forge(t, b.key, m.private, time.Now())})
			time.Sleep(25 * time.Millisecond)
		}
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.t.mu.RLock()
		defer b.t.mu.RUnlock()
		if n := len(b.t.indexes); n > 8 {
			t.Errorf("%d indexes kept", n)
		}
		if n := len(b.t.peers[m.key].indexes); n > 2 {
			t.Errorf("%d indexes kept for one peer", n)
		}
	})
}

// An offline peer costs little and makes nobody wait; when it comes back the
// first packets are still there.
func TestOfflinePeer(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		var mu sync.Mutex
		online := false
		nw.wire = func(from, to *node, d []byte) [][]byte {
			mu.Lock()
			defer mu.Unlock()
			if !online {
				return nil
			}
			return [][]byte{d}
		}
		a, b := pair(t, nw)
		begin := time.Now()
		for i := range 200 {
			a.say(t, b, fmt.Sprint(i))
		}
		if waited := time.Since(begin); waited > 0 {
			t.Errorf("Send waited %v for a peer without session", waited)
		}
		synctest.Wait()
		if s := a.t.Stats(); s.DropStalled != 200-stagedPackets {
			t.Errorf("dropped %d", s.DropStalled)
		}
		// The handshake is given up after 90 seconds. Later traffic tries again.
		time.Sleep(4 * time.Minute)
		mu.Lock()
		online = true
		mu.Unlock()
		a.say(t, b, "again")
		b.wantGot(t, a, "again")

		// A peer that vanishes in mid-flow: after the session's end Send does
		// not wait again and again.
		mu.Lock()
		online = false
		mu.Unlock()
		time.Sleep(4 * time.Minute)
		begin = time.Now()
		for i := range 2000 {
			a.say(t, b, fmt.Sprint(i))
		}
		if waited := time.Since(begin); waited > 2*time.Second {
			t.Errorf("Send waited %v in all", waited)
		}
		mu.Lock()
		online = true
		mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := len(b.take()); n == 0 || n > stagedPackets {
			t.Errorf("%d packets after it came back", n)
		}
	})
}

// Send waits for a Config.Send that is slow, and loses nothing.
func TestBackPressure(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		slow := func(c *Config) {
			send := c.Send
			c.Send = func(k identity.NodePublic, a netip.AddrPort, d [][]byte) error {
				time.Sleep(time.Duration(len(d)) * 5 * time.Millisecond)
				return send(k, a, d)
			}
		}
		a := nw.add(t, "a", 1, slow)
		b := nw.add(t, "b", 2)
		a.knows(b)
		b.knows(a)
		a.say(t, b, "first")
		time.Sleep(time.Second)
		b.wantGot(t, a, "first")
		begin := time.Now()
		const count = 2000
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range count / 4 / 10 {
					burst := make([][]byte, 10)
					for i := range burst {
						burst[i] = packet(a.v4, b.v4, "x")
					}
					a.t.Send(b.key, burst)
				}
			})
		}
		wg.Wait()
		if d := time.Since(begin); d < 2*time.Second {
			t.Errorf("Send took %v and did not wait", d)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := len(b.take()); n != count {
			t.Errorf("%d of %d arrived; %+v", n, count, a.t.Stats())
		}
	})
}
