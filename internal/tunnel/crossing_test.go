package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"mesh/identity"
)

// slow makes datagrams arrive after a delay.
func (nw *network) slow(delay time.Duration) {
	nw.wire = func(from, to *node, d []byte) [][]byte {
		src := Source{Peer: from.key}
		later(delay, func() { to.arrive(src, [][]byte{d}) })
		return nil
	}
}

// Two nodes that begin at the same moment, so that their initiations cross,
// have sessions after one round trip, and what both said arrives.
func TestCrossingHandshakes(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		nw.slow(20 * time.Millisecond)
		a, b := pair(t, nw)
		for range 5 {
			a.say(t, b, "from a")
			b.say(t, a, "from b")
			time.Sleep(100 * time.Millisecond)
			a.wantGot(t, b, "from b")
			b.wantGot(t, a, "from a")
			time.Sleep(2 * DefaultIdleAfter) // and anew
			synctest.Wait()
		}
	})
}

// The same with an upstream Device, which has one state for both roles.
func TestCrossingWithJudge(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		var j *judge
		n := nw.add(t, "n", 1, func(c *Config) {
			c.Send = func(to identity.NodePublic, a netip.AddrPort, d [][]byte) error {
				for i := range d {
					d := [][]byte{append([]byte(nil), d[i]...)}
					time.AfterFunc(20*time.Millisecond, func() { j.send(to, a, d) })
				}
				return nil
			}
		})
		j = newJudge(t, n, psk{})
		defer j.close()
		j.named = true
		j.delay = 20 * time.Millisecond
		j.tun.Outbound <- packet(j.v4, n.v4, "from judge")
		if err := n.t.Send(j.key, [][]byte{packet(n.v4, j.v4, "from node")}); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if got := payload(<-j.tun.Inbound); got != "from node" {
			t.Errorf("judge got %q", got)
		}
		synctest.Wait()
		for len(n.take()) == 0 {
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
		}
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("it took %v", d)
		}
	})
}

// A first packet that is lost is repeated soon; a renewal keeps WireGuard's
// pace.
func TestLostFirstInitiation(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		var mu sync.Mutex
		lose := 2
		nw.wire = func(from, to *node, d []byte) [][]byte {
			mu.Lock()
			defer mu.Unlock()
			if d[0] == typeInitiation && lose > 0 {
				lose--
				return nil
			}
			return [][]byte{d}
		}
		a, b := pair(t, nw)
		a.say(t, b, "x")
		time.Sleep(1500 * time.Millisecond)
		b.wantGot(t, a, "x")
	})
}

// A node that is flooded asks strangers for a cookie, and lets in who brings it.
func TestCookieForStranger(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		var j *judge
		var replies atomic.Int64
		n := nw.add(t, "n", 1, func(c *Config) {
			c.Send = func(to identity.NodePublic, a netip.AddrPort, d [][]byte) error { return j.send(to, a, d) }
			c.Reply = func(a netip.AddrPort, d []byte) {
				if a == j.addr {
					replies.Add(1)
					j.send(j.key, a, [][]byte{d})
				}
			}
		})
		j = newJudge(t, n, psk{})
		defer j.close()
		flood := forge(t, n.key, identity.NewNode(), time.Now())
		stop := time.Now().Add(time.Duration(unlessRace(20, 8)) * time.Second)
		var wg sync.WaitGroup
		wg.Go(func() {
			for time.Now().Before(stop) {
				for range 10 {
					n.t.Receive(Source{Addr: netip.MustParseAddrPort("192.0.2.66:6")}, [][]byte{flood})
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
		time.Sleep(2 * time.Second)
		begin := time.Now()
		j.tun.Outbound <- packet(j.v4, n.v4, "let me in")
		for len(n.take()) == 0 && time.Since(begin) < 15*time.Second {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
		}
		if s := n.t.Stats(); s.PacketsIn == 0 {
			t.Errorf("nothing arrived in the flood: %+v", s)
		}
		t.Logf("in after %v, %d cookies", time.Since(begin), replies.Load())
		wg.Wait()
	})
}

// We bring the cookie that a flooded Device asks for.
func TestCookieFromJudge(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		var j *judge
		var checker device.CookieChecker
		asked := false
		n := nw.add(t, "n", 1, func(c *Config) {
			c.Send = func(to identity.NodePublic, a netip.AddrPort, d [][]byte) error {
				for _, m := range d {
					source := []byte("here")
					switch {
					case m[0] == typeInitiation && !asked:
						asked = true
						reply, err := checker.CreateReply(m, indexOf(m), source)
						if err != nil {
							t.Error(err)
							return nil
						}
						b := append([]byte{typeCookie, 0, 0, 0}, m[4:8]...)
						b = append(append(b, reply.Nonce[:]...), reply.Cookie[:]...)
						go j.target.t.Receive(Source{Peer: j.key, Addr: j.addr}, [][]byte{b})
						continue
					case m[0] == typeInitiation && !checker.CheckMAC2(m, source):
						t.Error("the cookie was not used")
					}
					j.send(to, a, [][]byte{m})
				}
				return nil
			}
		})
		j = newJudge(t, n, psk{})
		checker.Init(device.NoisePublicKey(j.key.Bytes()))
		defer j.close()
		j.named = true
		if err := n.t.Send(j.key, [][]byte{packet(n.v4, j.v4, "x")}); err != nil {
			t.Fatal(err)
		}
		if got := payload(<-j.tun.Inbound); got != "x" {
			t.Errorf("judge got %q", got)
		}
		if s := n.t.Stats(); s.CookiesIn != 1 {
			t.Errorf("%d cookies taken", s.CookiesIn)
		}
	})
}
