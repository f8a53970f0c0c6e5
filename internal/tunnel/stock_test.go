package tunnel

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"mesh/identity"
)

// ether joins nodes of ours with upstream Devices. Every datagram takes the
// time that wire says, if it arrives at all.
type ether struct {
	mu     sync.Mutex
	nodes  map[identity.NodePublic]*node
	stocks map[identity.NodePublic]*stock
	// wire says when copies of a datagram arrive; guarded by mu.
	wire func(from, to identity.NodePublic, d []byte) []time.Duration
}

func newEther() *ether {
	return &ether{nodes: make(map[identity.NodePublic]*node), stocks: make(map[identity.NodePublic]*stock),
		wire: func(_, _ identity.NodePublic, _ []byte) []time.Duration { return []time.Duration{0} }}
}

// carries is the change of a node's Config that puts it on the ether.
func (e *ether) carries(private identity.NodePrivate) func(*Config) {
	return func(c *Config) {
		c.Key = private
		c.Send = func(to identity.NodePublic, _ netip.AddrPort, datagrams [][]byte) error {
			for _, d := range datagrams {
				e.carry(private.Public(), to, d)
			}
			return nil
		}
	}
}

func (e *ether) add(tb testing.TB, nw *network, name string, number byte, change ...func(*Config)) *node {
	private := identity.NewNode()
	n := nw.add(tb, name, number, append([]func(*Config){e.carries(private)}, change...)...)
	nw.mu.Lock()
	delete(nw.nodes, n.key)
	n.private, n.key = private, private.Public()
	nw.nodes[n.key] = n
	nw.mu.Unlock()
	e.mu.Lock()
	e.nodes[n.key] = n
	e.mu.Unlock()
	return n
}

// later runs f after a delay, never at once: the race detector of Go 1.26 crashes
// when timers of a synctest bubble that are due already are set by several
// goroutines.
func later(delay time.Duration, f func()) { time.AfterFunc(max(delay, 1), f) }

func (e *ether) carry(from, to identity.NodePublic, d []byte) {
	d = append([]byte(nil), d...)
	e.mu.Lock()
	delays := e.wire(from, to, d)
	e.mu.Unlock()
	for _, delay := range delays {
		later(delay, func() {
			e.mu.Lock()
			n, s := e.nodes[to], e.stocks[to]
			e.mu.Unlock()
			switch {
			case n != nil:
				n.arrive(Source{Peer: from}, [][]byte{d})
			case s != nil:
				select {
				case s.in <- letter{from, d}:
				default:
				}
			}
		})
	}
}

type letter struct {
	from identity.NodePublic
	d    []byte
}

// stock is a plain upstream Device on the ether; its peers' endpoints are their
// keys.
type stock struct {
	e       *ether
	dev     *device.Device
	tun     *tuntest.ChannelTUN
	private identity.NodePrivate
	key     identity.NodePublic
	v4, v6  netip.Addr
	peers   []identity.NodePublic
	in      chan letter
	down    chan struct{}
	wg      sync.WaitGroup

	mu  sync.Mutex
	got []string
}

func (e *ether) stock(tb testing.TB, private identity.NodePrivate, number byte) *stock {
	tb.Helper()
	s := &stock{e: e, tun: tuntest.NewChannelTUN(), private: private, key: private.Public(), in: make(chan letter, 4096),
		v4: netip.AddrFrom4([4]byte{100, 64, 0, number}), v6: netip.AddrFrom16([16]byte{0xfd, 0x7a, 15: number})}
	s.dev = device.NewDevice(s.tun.TUN(), s, device.NewLogger(device.LogLevelSilent, ""))
	raw := private.Bytes()
	s.set(tb, fmt.Sprintf("private_key=%x\n", raw[:]))
	if err := s.dev.Up(); err != nil {
		tb.Fatal(err)
	}
	e.mu.Lock()
	e.stocks[s.key] = s
	e.mu.Unlock()
	s.wg.Go(func() {
		for p := range s.tun.Inbound {
			s.mu.Lock()
			s.got = append(s.got, payload(p))
			s.mu.Unlock()
		}
	})
	return s
}

func (s *stock) set(tb testing.TB, config string) {
	tb.Helper()
	if err := s.dev.IpcSet(config); err != nil {
		tb.Fatal(err)
	}
}

// knows adds a peer; its endpoint is its key.
func (s *stock) knows(tb testing.TB, key identity.NodePublic, v4 netip.Addr, preshared psk) {
	raw := key.Bytes()
	s.set(tb, fmt.Sprintf("public_key=%x\npreshared_key=%x\nendpoint=%x\nallowed_ip=%s/32\n", raw[:], preshared[:], raw[:], v4))
	s.peers = append(s.peers, key)
}

// asNode is how a node's netmap sees the Device.
func (s *stock) asNode() *node { return &node{key: s.key, v4: s.v4, v6: s.v6} }

func (s *stock) peer(key identity.NodePublic) *device.Peer { return s.dev.LookupPeer(key.Bytes()) }

func (s *stock) say(to netip.Addr, text string) { s.tun.Outbound <- packet(s.v4, to, text) }

func (s *stock) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	got := s.got
	s.got = nil
	return got
}

func (s *stock) close() {
	s.e.mu.Lock()
	if s.e.stocks[s.key] == s {
		delete(s.e.stocks, s.key)
	}
	s.e.mu.Unlock()
	for _, k := range s.peers {
		dropFinalizers(s.peer(k))
	}
	s.dev.Close()
	close(s.tun.Inbound)
	s.wg.Wait()
}

func (s *stock) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	down := make(chan struct{})
	s.down = down
	return []conn.ReceiveFunc{func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case <-down:
			return 0, net.ErrClosed
		case l := <-s.in:
			sizes[0], eps[0] = copy(bufs[0], l.d), stockEndpoint{key: l.from}
			return 1, nil
		}
	}}, 1, nil
}

func (s *stock) Close() error {
	if s.down != nil {
		close(s.down)
		s.down = nil
	}
	return nil
}

func (s *stock) Send(bufs [][]byte, to conn.Endpoint) error {
	for _, b := range bufs {
		s.e.carry(s.key, to.(stockEndpoint).key, b)
	}
	return nil
}

func (s *stock) SetMark(uint32) error { return nil }
func (s *stock) BatchSize() int       { return 1 }
func (s *stock) ParseEndpoint(text string) (conn.Endpoint, error) {
	var raw [identity.KeyLen]byte
	if _, err := fmt.Sscanf(text, "%x", (*hexKey)(&raw)); err != nil {
		return nil, err
	}
	return stockEndpoint{key: identity.NodePublicFrom(raw)}, nil
}

type hexKey [identity.KeyLen]byte

func (h *hexKey) Scan(state fmt.ScanState, _ rune) error {
	for i := range h {
		var b byte
		for range 2 {
			r, _, err := state.ReadRune()
			if err != nil {
				return err
			}
			switch {
			case r >= '0' && r <= '9':
				b = b<<4 | byte(r-'0')
			default:
				b = b<<4 | byte(r-'a'+10)
			}
		}
		h[i] = b
	}
	return nil
}

type stockEndpoint struct {
	judgeEndpoint
	key identity.NodePublic
}

func (e stockEndpoint) DstToBytes() []byte { b := e.key.Bytes(); return b[:] }
func (e stockEndpoint) DstIP() netip.Addr {
	b := e.key.Bytes()
	return netip.AddrFrom16([16]byte(b[:16]))
}

// duo is a node of ours and a Device that know each other.
func duo(t *testing.T, nw *network, change ...func(*Config)) (*ether, *node, *stock) {
	e := newEther()
	n := e.add(t, nw, "n", 1, change...)
	s := e.stock(t, identity.NewNode(), 2)
	s.knows(t, n.key, n.v4, psk{})
	n.knows(s.asNode())
	return e, n, s
}

// exchange has both say something, and checks what arrives.
func exchange(t *testing.T, n *node, s *stock, text string) {
	t.Helper()
	s.say(n.v4, text)
	synctest.Wait() // handshakes that cross have a test of their own
	if err := n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, text)}); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	time.Sleep(time.Second)
	synctest.Wait()
	if got := s.take(); len(got) != 1 || got[0] != text {
		t.Fatalf("the Device got %q, want %q; %+v", got, text, n.t.Stats())
	}
	if got := n.take(); len(got) != 1 || payload(got[0].packet) != text {
		t.Fatalf("the node got %d packets, want %q; %+v", len(got), text, n.t.Stats())
	}
}

// Both renew sessions by count, each when its own counter says so; the Device's
// is set by hand, for its limit is not.
func TestJudgeRekeyByCount(t *testing.T) {
	t.Run("node", func(t *testing.T) {
		bubble(t, func(t *testing.T, nw *network) {
			_, n, s := duo(t, nw)
			defer s.close()
			n.t.quota = quota{rekey: 30, reject: 50}
			first := time.Time{}
			renewed := 0
			for i := range 200 {
				exchange(t, n, s, fmt.Sprint(i))
				if at, _ := n.t.LastHandshake(s.key); at != first {
					first = at
					renewed++
				}
			}
			if renewed < 6 {
				t.Errorf("%d handshakes for 200 packets", renewed)
			}
		})
	})
	t.Run("Device", func(t *testing.T) {
		bubble(t, func(t *testing.T, nw *network) {
			_, n, s := duo(t, nw)
			defer s.close()
			exchange(t, n, s, "first")
			for range 3 {
				time.Sleep(6 * time.Second) // the Device begins no handshake sooner
				before, _ := n.t.LastHandshake(s.key)
				field := reflect.ValueOf(s.peer(n.key)).Elem().FieldByName("keypairs").FieldByName("current")
				pair := *(**device.Keypair)(unsafe.Pointer(field.UnsafeAddr()))
				counter := reflect.ValueOf(pair).Elem().FieldByName("sendNonce").FieldByName("v")
				atomic.StoreUint64((*uint64)(unsafe.Pointer(counter.UnsafeAddr())), device.RekeyAfterMessages+1)
				exchange(t, n, s, "beyond")
				if after, _ := n.t.LastHandshake(s.key); after == before {
					t.Fatal("not renewed")
				}
				exchange(t, n, s, "after")
			}
		})
	})
}

// A Device that is flooded asks for a cookie and gets it.
func TestJudgeUnderLoad(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		_, n, s := duo(t, nw)
		defer s.close()
		junk := forge(t, s.key, identity.NewNode(), time.Now())
		from := identity.NewNode().Public()
		for round := range 40 {
			for range 2000 {
				select {
				case s.in <- letter{from, junk}:
				default:
				}
			}
			if round%10 == 0 {
				if err := n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "let me in")}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Millisecond)
			if n.t.Stats().CookiesIn > 0 && len(s.take()) > 0 {
				return
			}
		}
		t.Errorf("not let in: %+v", n.t.Stats())
	})
}

// One-sided and idle traffic: keepalives are sent when they are due and no
// handshake is begun that nobody needs.
func TestJudgeKeepalives(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		e, n, s := duo(t, nw)
		defer s.close()
		count := make(map[string]int)
		e.mu.Lock()
		e.wire = func(from, _ identity.NodePublic, d []byte) []time.Duration {
			kind := map[bool]string{true: "node ", false: "Device "}[from == n.key] + fmt.Sprint(d[0])
			if d[0] == typeData && len(d) == keepaliveSize {
				kind += " empty"
			}
			count[kind]++
			return []time.Duration{time.Millisecond}
		}
		e.mu.Unlock()
		counts := func() string {
			synctest.Wait()
			e.mu.Lock()
			defer e.mu.Unlock()
			text := fmt.Sprint(count)
			clear(count)
			return text
		}
		exchange(t, n, s, "begin")
		time.Sleep(time.Minute)
		counts()
		s.say(n.v4, "one way")
		time.Sleep(9 * time.Second)
		if got := counts(); got != "map[Device 4:1]" {
			t.Errorf("before a keepalive is due: %v", got)
		}
		time.Sleep(2 * time.Second)
		if got := counts(); got != "map[node 4 empty:1]" {
			t.Errorf("when it is: %v", got)
		}
		n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "other way")})
		time.Sleep(11 * time.Second)
		if got := counts(); got != "map[Device 4 empty:1 node 4:1]" {
			t.Errorf("the other way: %v", got)
		}
		time.Sleep(time.Hour)
		if got := counts(); got != "map[]" {
			t.Errorf("in an idle hour: %v", got)
		}
	})
}

// Silence is noticed after 15 seconds, tried for 90, and left.
func TestJudgeSilence(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		e, n, s := duo(t, nw)
		defer s.close()
		exchange(t, n, s, "begin")
		tries := 0
		begin := time.Now()
		var first, last time.Duration
		e.mu.Lock()
		e.wire = func(from, _ identity.NodePublic, d []byte) []time.Duration {
			if from == n.key && d[0] == typeInitiation {
				tries++
				if last = time.Since(begin); tries == 1 {
					first = last
				}
			}
			return nil
		}
		e.mu.Unlock()
		n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "anybody?")})
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		e.mu.Lock()
		defer e.mu.Unlock()
		if first < silenceAfter-2*time.Second || first > silenceAfter+time.Second || last < 95*time.Second || last > first+attemptFor+6*time.Second || tries < 15 || tries > 20 {
			t.Errorf("%d tries, the first after %v, the last after %v", tries, first, last)
		}
	})
}

// Wrong and changed pre-shared keys.
func TestJudgePSK(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		secret := psk{7}
		_, n, s := duo(t, nw, func(c *Config) { c.PSK = func(identity.NodePublic) [32]byte { return secret } })
		defer s.close()
		s.say(n.v4, "wrong")
		n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "wrong")})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if a, b := n.take(), s.take(); len(a)+len(b) != 0 {
			t.Fatalf("delivered %v %v", a, b)
		}
		if n.t.Stats().DropForged == 0 {
			t.Errorf("%+v", n.t.Stats())
		}
		raw := n.key.Bytes()
		s.set(t, fmt.Sprintf("public_key=%x\npreshared_key=%x\n", raw[:], secret[:]))
		time.Sleep(3 * time.Minute)
		n.take()
		s.take()
		exchange(t, n, s, "right")
	})
}

// Either side is started anew in mid-flow: both hear each other soon.
func TestJudgeRestart(t *testing.T) {
	for _, who := range []string{"node", "Device"} {
		for _, first := range []string{"node", "Device"} {
			t.Run(who+" anew, "+first+" speaks", func(t *testing.T) {
				bubble(t, func(t *testing.T, nw *network) {
					e, n, s := duo(t, nw)
					exchange(t, n, s, "begin")
					time.Sleep(20 * time.Second)
					if who == "node" {
						e.mu.Lock()
						delete(e.nodes, n.key)
						e.mu.Unlock()
						n = nw.restart(t, n, e.carries(n.private))
						e.mu.Lock()
						e.nodes[n.key] = n
						e.mu.Unlock()
					} else {
						s.close()
						s = e.stock(t, s.private, 2)
						s.knows(t, n.key, n.v4, psk{})
					}
					defer func() { s.close() }()
					begin := time.Now()
					for {
						if first == "node" {
							n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "x")})
						} else {
							s.say(n.v4, "x")
						}
						time.Sleep(time.Second)
						synctest.Wait()
						if len(n.take())+len(s.take()) > 0 {
							break
						}
						// A Device greets nobody: it lets us talk to a dead
						// session for 15 seconds.
						if time.Since(begin) > 25*time.Second {
							t.Fatalf("cut off: %+v", n.t.Stats())
						}
					}
					exchange(t, n, s, "both ways")
				})
			})
		}
	}
}

// Loss, reordering and repetition, with renewals in the middle: nothing is
// delivered twice, most arrives, and in the end all is well.
func TestJudgeBadNetwork(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		e, n, s := duo(t, nw)
		defer s.close()
		rng := rand.New(rand.NewPCG(3, 4))
		bad := func(_, _ identity.NodePublic, d []byte) (out []time.Duration) {
			for rng.IntN(10) != 0 && len(out) < 3 {
				out = append(out, time.Duration(rng.IntN(30))*time.Millisecond)
				if rng.IntN(4) != 0 {
					break
				}
			}
			return out
		}
		e.mu.Lock()
		good := e.wire
		e.wire = bad
		e.mu.Unlock()
		seen := make(map[string]int)
		const count = 2000
		for i := range count {
			s.say(n.v4, fmt.Sprint("s", i))
			n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, fmt.Sprint("n", i))})
			time.Sleep(time.Duration(i*389%1000) * time.Millisecond)
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		for _, g := range n.take() {
			seen[payload(g.packet)]++
		}
		for _, g := range s.take() {
			seen[g]++
		}
		for k, times := range seen {
			if times != 1 {
				t.Errorf("%s came %d times", k, times)
			}
		}
		if len(seen) < 2*count*8/10 {
			t.Errorf("%d of %d arrived", len(seen), 2*count)
		}
		e.mu.Lock()
		e.wire = good
		e.mu.Unlock()
		time.Sleep(3 * time.Minute)
		n.take()
		s.take()
		exchange(t, n, s, "well again")
	})
}
