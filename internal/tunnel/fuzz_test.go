package tunnel

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"mesh/identity"
)

// puppet is a tunnel without a worker: it does what it is told when it is told.
type puppet struct {
	t       *Tunnel
	private identity.NodePrivate
	key     identity.NodePublic
	v4      netip.Addr
	out     [][]byte
	got     []string
}

func newPuppets(tb testing.TB) (x, y *puppet) {
	tb.Helper()
	both := [2]*puppet{}
	for i := range both {
		private := identity.NewNode()
		both[i] = &puppet{private: private, key: private.Public(), v4: netip.AddrFrom4([4]byte{100, 64, 0, byte(i + 1)})}
	}
	for i, p := range both {
		other := both[1-i]
		var err error
		p.t, err = New(Config{
			Key: p.private,
			Lookup: func(k identity.NodePublic) (Peer, bool) {
				return Peer{Key: k, AllowedIPs: []netip.Prefix{netip.PrefixFrom(other.v4, 32)}}, k == other.key
			},
			Send: func(_ identity.NodePublic, _ netip.AddrPort, datagrams [][]byte) error {
				for _, d := range datagrams {
					p.out = append(p.out, append([]byte(nil), d...))
				}
				return nil
			},
			Deliver: func(_ identity.NodePublic, packets [][]byte) {
				for _, b := range packets {
					p.got = append(p.got, payload(b))
				}
			},
		})
		if err != nil {
			tb.Fatal(err)
		}
		p.t.working.Close() // take works
		p.t.strange = rate.NewLimiter(rate.Inf, 1)
		tb.Cleanup(func() { p.t.Close() })
	}
	return both[0], both[1]
}

// take receives datagrams and reads what they brought for the worker.
func (p *puppet) take(src Source, datagrams ...[]byte) {
	for _, d := range datagrams {
		p.t.Receive(src, [][]byte{append([]byte(nil), d...)})
		for len(p.t.knocks) > 0 {
			p.t.answer(<-p.t.knocks)
		}
	}
}

func (p *puppet) left() [][]byte {
	out := p.out
	p.out = nil
	return out
}

var fuzzSource = Source{Addr: netip.MustParseAddrPort("192.0.2.1:1")}

// settle carries what both send until they are silent.
func settle(x, y *puppet) {
	for len(x.out)+len(y.out) > 0 {
		y.take(fuzzSource, x.left()...)
		x.take(fuzzSource, y.left()...)
	}
}

// alive checks that both hear each other without another handshake.
func alive(t testing.TB, x, y *puppet) {
	t.Helper()
	for _, dir := range [][2]*puppet{{x, y}, {y, x}} {
		from, to := dir[0], dir[1]
		to.got = nil
		if err := from.t.Send(to.key, [][]byte{packet(from.v4, to.v4, "alive")}); err != nil {
			t.Fatal(err)
		}
		out := from.left()
		if len(out) != 1 || out[0][0] != typeData {
			t.Fatalf("%d datagrams sent, no session?", len(out))
		}
		to.take(fuzzSource, out...)
		if len(to.got) != 1 || to.got[0] != "alive" {
			t.Fatalf("got %q; %+v", to.got, to.t.Stats())
		}
		to.out = nil
	}
}

// again begins a handshake with the other one, whatever the time.
func (p *puppet) again(other *puppet) []byte {
	pe, err := p.t.obtain(other.key, time.Now())
	if err != nil {
		panic(err)
	}
	pe.mu.Lock()
	p.t.giveUp(pe)
	pe.since = time.Time{}
	pe.mu.Unlock()
	p.t.begin(pe, false)
	out := p.left()
	return out[len(out)-1]
}

// resign makes mac1 of a handshake message right again.
func resign(msg []byte, to identity.NodePublic) {
	raw := to.Bytes()
	g := newGuest(raw[:])
	g.sign(msg, time.Time{})
}

// FuzzHandshake changes messages of real handshakes, makes their MACs right
// again and sends them: none begins a session but the one that was not changed,
// and none disturbs the one that there is.
func FuzzHandshake(f *testing.F) {
	f.Add(uint8(0), uint8(0), uint8(0), uint8(0), []byte(nil))
	for kind := range uint8(3) {
		for _, at := range []uint8{0, 3, 4, 8, 11, 12, 40, 44, 60, 87, 88, 115} {
			f.Add(kind, at, uint8(1), uint8(kind), []byte{0x80})
			f.Add(kind, at, uint8(0), uint8(0), make([]byte, 32))
		}
	}
	x, y := newPuppets(f)
	y.take(fuzzSource, x.again(y))
	settle(x, y)
	f.Fuzz(func(t *testing.T, kind, at, xor, how uint8, body []byte) {
		init := x.again(y)
		peerX := x.t.peers[y.key]
		change := func(msg []byte, macs int) (changed []byte, differs bool) {
			changed = append([]byte(nil), msg...)
			end := len(msg) - macs
			for i, c := range body {
				if p := int(at) + i; p < end {
					if xor&1 != 0 {
						c ^= msg[p]
					}
					differs = differs || changed[p] != c
					changed[p] = c
				}
			}
			return changed, differs
		}
		src := fuzzSource
		if how&1 != 0 {
			src = Source{Peer: x.key, Region: 1}
		}
		switch kind % 3 {
		case 0: // an initiation
			msg, differs := change(init, 2*macSize)
			resign(msg, y.key)
			accepted := func() bool { return len(y.left()) > 0 }
			y.take(src, msg)
			// The sender's index and nothing else may be another.
			if ok := accepted(); ok != !differs && string(msg[:4])+string(msg[8:116]) != string(init[:4])+string(init[8:116]) {
				t.Fatalf("changed %v, accepted %v", differs, ok)
			} else if ok {
				y.take(src, msg)
				if accepted() {
					t.Fatal("a replay is answered")
				}
			}
		case 1: // a response
			y.take(fuzzSource, init)
			out := y.left()
			if len(out) != 1 {
				t.Fatalf("%d answers; %+v", len(out), y.t.Stats())
			}
			msg, differs := change(out[0], 2*macSize)
			resign(msg, x.key)
			src.Peer = y.key
			if how&1 == 0 {
				src.Peer = identity.NodePublic{}
			}
			before := peerX.current.Load()
			x.take(src, msg)
			after := peerX.current.Load()
			same := string(msg[:4])+string(msg[8:60]) == string(out[0][:4])+string(out[0][8:60])
			if (after != before) != same {
				t.Fatalf("changed %v, new session %v", differs, after != before)
			}
			if same && differs && after.remote != binary.LittleEndian.Uint32(out[0][4:]) {
				// Nobody seals the sender's index: what the peer never gave
				// out is not heard, until the next handshake.
				y.take(fuzzSource, x.again(y))
				settle(x, y)
			}
			x.take(fuzzSource, out[0]) // the true one comes too
		case 2: // a cookie
			raw := append([]byte(nil), init...)
			good := y.t.keys.Load().current.door.reply(raw, []byte{how}, time.Now())
			msg, differs := change(good[:], 0)
			before := x.t.Stats().CookiesIn
			x.take(src, msg)
			taken := x.t.Stats().CookiesIn > before
			if named := src.Peer == x.key; !named && taken == differs {
				t.Fatalf("changed %v, taken %v", differs, taken)
			}
			y.take(fuzzSource, init)
		}
		settle(x, y)
		alive(t, x, y)
	})
}

// FuzzCookie hands anything at all to who waits for a cookie.
func FuzzCookie(f *testing.F) {
	x, y := newPuppets(f)
	y.take(fuzzSource, x.again(y))
	settle(x, y)
	f.Add([]byte(nil), true)
	f.Add(make([]byte, cookieSize-8), true)
	f.Fuzz(func(t *testing.T, body []byte, addressed bool) {
		init := x.again(y)
		msg := make([]byte, cookieSize)
		msg[0] = typeCookie
		copy(msg[8:], body)
		if addressed {
			copy(msg[4:8], init[4:8])
		} else {
			copy(msg[4:], body)
		}
		x.take(fuzzSource, msg)
		if n := x.t.Stats().CookiesIn; n != 0 {
			t.Fatalf("%d cookies taken", n)
		}
		y.take(fuzzSource, init)
		settle(x, y)
		alive(t, x, y)
	})
}
