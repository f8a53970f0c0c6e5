package tunnel

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"mesh/identity"
)

// restart ends a node and starts it again with its key and its netmap, and
// nothing else of what it knew.
func (nw *network) restart(tb testing.TB, n *node, change ...func(*Config)) *node {
	tb.Helper()
	close(n.closed)
	n.t.Close()
	again := nw.add(tb, n.name, n.v4.As4()[3], append([]func(*Config){func(c *Config) { c.Key = n.private }}, change...)...)
	nw.mu.Lock()
	delete(nw.nodes, again.key)
	again.private, again.key = n.private, n.key
	nw.nodes[n.key] = again
	nw.mu.Unlock()
	n.mu.Lock()
	again.netmap = n.netmap
	n.mu.Unlock()
	return again
}

// setClock makes a node's timestamps those of a clock that is off.
func (n *node) setClock(off time.Duration) {
	h := &n.t.history
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock = func() time.Time { return time.Now().Add(off) }
}

// A clock that was wrong and is put right, on one side or the other, with the
// node running or started anew, cuts nobody off: CVE-2021-46873.
func TestClockPutBack(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, off := range map[string]time.Duration{"hour ahead": time.Hour, "hour behind": -time.Hour, "10 years ahead": 10 * year} {
		for _, anew := range []bool{false, true} {
			for _, first := range []string{"a", "b"} {
				t.Run(name+map[bool]string{true: ", started anew"}[anew]+", "+first+" speaks", func(t *testing.T) {
					bubble(t, func(t *testing.T, nw *network) {
						a, b := pair(t, nw)
						a.setClock(off)
						a.say(t, b, "wrong")
						b.wantGot(t, a, "wrong")
						b.say(t, a, "wrong")
						a.wantGot(t, b, "wrong")
						time.Sleep(time.Minute)
						if anew {
							a = nw.restart(t, a)
						} else {
							a.setClock(0)
							time.Sleep(2 * DefaultIdleAfter)
							synctest.Wait()
						}
						x, y := a, b
						if first == "b" {
							x, y = b, a
						}
						begin := time.Now()
						for heard := false; !heard; {
							x.say(t, y, "right")
							synctest.Wait()
							heard = len(y.take()) > 0
							if time.Since(begin) > 10*time.Second {
								t.Fatalf("cut off: %+v", y.t.Stats())
							}
							time.Sleep(time.Second)
						}
						y.say(t, x, "answer")
						synctest.Wait()
						if len(x.take()) == 0 {
							t.Errorf("no answer: %+v", x.t.Stats())
						}
					})
				})
			}
		}
	}
}

// An old initiation that is played back makes us begin a handshake with the one
// who made it, seldom, and changes nothing else.
func TestOldInitiationIsNoAmplifier(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		old := tp.of("a>b", typeInitiation)[:1]
		time.Sleep(2 * DefaultIdleAfter)
		a.say(t, b, "y")
		b.wantGot(t, a, "y")
		time.Sleep(time.Minute)
		before := len(tp.of("b>a", typeInitiation))
		for range 100 {
			b.t.Receive(Source{Addr: netip.MustParseAddrPort("192.0.2.66:6")}, old)
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if n := len(tp.of("b>a", typeInitiation)) - before; n == 0 || n > 3 {
			t.Errorf("%d initiations in ten seconds of replays", n)
		}
		if b.mu.Lock(); len(b.authenticated) != 0 {
			t.Errorf("the address of the replay was believed: %v", b.authenticated)
		}
		b.mu.Unlock()
		a.say(t, b, "z")
		b.wantGot(t, a, "z")
	})
}

// Who sees an initiation can answer it wrongly as often as he likes. That neither
// ends the handshake nor costs more than strangers do.
func TestForgedAnswers(t *testing.T) {
	x, y := newPuppets(t)
	x.t.strange = rate.NewLimiter(1, 5)
	init := x.again(y)
	y.take(fuzzSource, init)
	proper := y.left()
	forged := append([]byte(nil), proper[0]...)
	forged[50] ^= 1
	resign(forged, x.key)
	for range 1000 {
		x.take(fuzzSource, forged)
	}
	s := x.t.Stats()
	if s.DropForged > freeAnswers+6 || s.DropForged+s.DropRate != 1000 {
		t.Errorf("%d forged answers opened, %d not", s.DropForged, s.DropRate)
	}
	x.t.strange = rate.NewLimiter(rate.Inf, 1)
	x.take(fuzzSource, proper...)
	settle(x, y)
	alive(t, x, y)
}

// Initiations that seem to come from many peers are bounded all together.
func TestFloodFromForgedAddresses(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		b := nw.add(t, "b", 2)
		b.t.familiar = rate.NewLimiter(100, 100)
		var peers []*node
		for i := range 40 {
			n := &node{name: "n", key: identity.NewNode().Public(), v4: netip.AddrFrom4([4]byte{100, 64, 1, byte(i)}), v6: netip.AddrFrom16([16]byte{0xfd, 15: byte(i)})}
			b.knows(n)
			peers = append(peers, n)
		}
		msg := forge(t, b.key, identity.NewNode(), time.Now())
		begin := time.Now()
		for time.Since(begin) < 2*time.Second {
			for i, p := range peers {
				b.t.Receive(Source{Peer: p.key, Addr: netip.AddrPortFrom(p.v4, uint16(1000+i))}, [][]byte{msg})
				synctest.Wait()
			}
			time.Sleep(20 * time.Millisecond)
		}
		// Those that go over count as strangers.
		limit := uint64(100+100*2+initBurst+initRate*2) + 10
		if s := b.t.Stats(); s.DropUnknownKey > limit || s.DropRate == 0 {
			t.Errorf("%d opened, %d not", s.DropUnknownKey, s.DropRate)
		}
	})
}

// Drain waits also for what has a session by now and is only being sent.
func TestDrainWaitsForWhatLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		hang := make(chan struct{})
		a := nw.add(t, "a", 1, func(c *Config) {
			send := c.Send
			c.Send = func(k identity.NodePublic, ad netip.AddrPort, d [][]byte) error {
				if d[0][0] == typeData {
					<-hang
				}
				return send(k, ad, d)
			}
		})
		b := nw.add(t, "b", 2)
		a.knows(b)
		b.knows(a)
		a.say(t, b, "last words")
		drained := make(chan struct{})
		go func() {
			a.t.Drain(time.Minute, b.key)
			close(drained)
		}()
		time.Sleep(time.Second)
		select {
		case <-drained:
			t.Error("Drain did not wait")
		default:
		}
		close(hang)
		<-drained
		a.forget(b)
		a.t.Update([]identity.NodePublic{b.key})
		b.wantGot(t, a, "last words")
	})
}

// What a session cannot seal any more goes with the next one.
func TestNoncesRunOut(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.t.quota = quota{rekey: 1 << 20, reject: 20}
		var texts []string
		for range 4 {
			var packets [][]byte
			for range 15 {
				text := strings.Repeat("x", len(texts)+1)
				texts = append(texts, text)
				packets = append(packets, packet(a.v4, b.v4, text))
			}
			if err := a.t.Send(b.key, packets); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			time.Sleep(time.Second)
		}
		b.wantGot(t, a, texts...)
		if s := a.t.Stats(); s.DropStalled != 0 {
			t.Errorf("%d stalled", s.DropStalled)
		}
	})
}

// Sessions are renewed by count, by whoever sends, and neither counter nor key
// is used twice.
func TestRekeyByCount(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		a.t.quota, b.t.quota = quota{rekey: 40, reject: 60}, quota{rekey: 40, reject: 60}
		for i := range 400 {
			from, to := a, b
			if i%40 < 20 {
				from, to = b, a
			}
			from.say(t, to, "x")
			to.wantGot(t, from, "x")
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(tp.of("a>b", typeInitiation)) + len(tp.of("b>a", typeInitiation)); n < 5 || n > 24 {
			t.Errorf("%d handshakes for 400 packets", n)
		}
		for _, way := range []string{"a>b", "b>a"} {
			seen := make(map[string]bool)
			for _, d := range tp.of(way, typeData) {
				if id := string(d[4:16]); seen[id] {
					t.Fatalf("%s: a counter was used twice", way)
				} else {
					seen[id] = true
				}
				if d[8] >= 60 || d[9] != 0 {
					t.Fatalf("%s: counter %d", way, d[8])
				}
			}
		}
	})
}
