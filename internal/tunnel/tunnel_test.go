package tunnel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network joins tunnels in memory, as the path does with nodes.
type network struct {
	mu    sync.Mutex
	nodes map[identity.NodePublic]*node
	// source, if set, says what the receiver learns of the origin.
	source func(from, to *node) Source
	// wire, if set, may lose, repeat or reorder; what it returns arrives.
	wire func(from, to *node, datagram []byte) [][]byte
	// inline networks deliver in the goroutine of the sender.
	inline bool
	wg     sync.WaitGroup // the nodes' readers
}

// parcel is what arrives at a node at once.
type parcel struct {
	src       Source
	datagrams [][]byte
}

type got struct {
	from   identity.NodePublic
	packet []byte
}

type node struct {
	net     *network
	name    string
	private identity.NodePrivate
	key     identity.NodePublic
	v4, v6  netip.Addr
	t       *Tunnel

	mu            sync.Mutex
	netmap        map[identity.NodePublic]Peer
	got           []got
	hints         []netip.AddrPort
	authenticated []Source
	onDeliver     func(got)

	inbox  []parcel
	mail   chan struct{} // capacity 1: there is something in inbox
	closed chan struct{} // the network is
}

func newNetwork() *network { return &network{nodes: make(map[identity.NodePublic]*node)} }

// add makes a node; number is the last byte of its addresses.
func (nw *network) add(tb testing.TB, name string, number byte, change ...func(*Config)) *node {
	tb.Helper()
	n := &node{
		net:     nw,
		name:    name,
		private: identity.NewNode(),
		v4:      netip.AddrFrom4([4]byte{100, 64, 0, number}),
		v6:      netip.AddrFrom16([16]byte{0xfd, 0x7a, 15: number}),
		netmap:  make(map[identity.NodePublic]Peer),
		mail:    make(chan struct{}, 1),
		closed:  make(chan struct{}),
	}
	n.key = n.private.Public()
	cfg := Config{
		Key:           n.private,
		Lookup:        n.lookup,
		Send:          n.send,
		Deliver:       n.deliver,
		Authenticated: n.auth,
	}
	for _, f := range change {
		f(&cfg)
	}
	t, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	n.t = t
	nw.wg.Go(n.read)
	nw.mu.Lock()
	nw.nodes[n.key] = n
	nw.mu.Unlock()
	return n
}

func (nw *network) setSource(f func(from, to *node) Source) {
	nw.mu.Lock()
	defer nw.mu.Unlock()
	nw.source = f
}

func (nw *network) close() {
	nw.mu.Lock()
	nodes := nw.nodes
	nw.nodes = nil
	nw.mu.Unlock()
	// A node may stand under two keys.
	seen := make(map[*node]bool)
	for _, n := range nodes {
		if !seen[n] {
			seen[n] = true
			close(n.closed)
			n.t.Close()
		}
	}
	nw.wg.Wait()
}

// read takes what arrives, as a socket's reader does.
func (n *node) read() {
	for {
		select {
		case <-n.mail:
		case <-n.closed:
			return
		}
		n.mu.Lock()
		inbox := n.inbox
		n.inbox = nil
		n.mu.Unlock()
		for _, p := range inbox {
			n.t.Receive(p.src, p.datagrams)
		}
	}
}

// arrive puts copies of datagrams into the inbox.
func (n *node) arrive(src Source, datagrams [][]byte) {
	p := parcel{src: src}
	for _, d := range datagrams {
		p.datagrams = append(p.datagrams, append([]byte(nil), d...))
	}
	n.mu.Lock()
	n.inbox = append(n.inbox, p)
	n.mu.Unlock()
	select {
	case n.mail <- struct{}{}:
	default:
	}
}

func (n *node) lookup(k identity.NodePublic) (Peer, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.netmap[k]
	return p, ok
}

func (n *node) send(to identity.NodePublic, addr netip.AddrPort, datagrams [][]byte) error {
	n.mu.Lock()
	n.hints = append(n.hints, addr)
	if len(n.hints) > 100 {
		n.hints = n.hints[50:]
	}
	n.mu.Unlock()
	nw := n.net
	nw.mu.Lock()
	peer, source, wire := nw.nodes[to], nw.source, nw.wire
	nw.mu.Unlock()
	if peer == nil {
		return errors.New("no such node")
	}
	src := Source{Peer: n.key}
	if source != nil {
		src = source(n, peer)
	}
	if wire != nil {
		for _, d := range datagrams {
			if out := wire(n, peer, append([]byte(nil), d...)); len(out) > 0 {
				peer.arrive(src, out)
			}
		}
		return nil
	}
	if nw.inline {
		peer.t.Receive(src, datagrams)
	} else {
		peer.arrive(src, datagrams)
	}
	return nil
}

func (n *node) deliver(from identity.NodePublic, packets [][]byte) {
	for _, p := range packets {
		g := got{from, append([]byte(nil), p...)}
		n.mu.Lock()
		f := n.onDeliver
		n.got = append(n.got, g)
		n.mu.Unlock()
		if f != nil {
			f(g)
		}
	}
}

func (n *node) auth(_ identity.NodePublic, src Source) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.authenticated = append(n.authenticated, src)
}

func (n *node) take() []got {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.got
	n.got = nil
	return g
}

func (n *node) prefixes() []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(n.v4, 32), netip.PrefixFrom(n.v6, 128)}
}

// knows puts peers into n's netmap with their own addresses.
func (n *node) knows(peers ...*node) {
	for _, p := range peers {
		n.set(p, p.prefixes()...)
	}
}

func (n *node) set(p *node, prefixes ...netip.Prefix) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.netmap[p.key] = Peer{Key: p.key, AllowedIPs: prefixes}
}

func (n *node) forget(p *node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.netmap, p.key)
}

// packet makes an IP packet with an empty-ish header and a payload.
func packet(src, dst netip.Addr, payload string) []byte {
	if src.Is4() {
		b := make([]byte, 20+len(payload))
		b[0] = 0x45
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[8], b[9] = 64, 17
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		copy(b[20:], payload)
		return b
	}
	b := make([]byte, 40+len(payload))
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = 17, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	copy(b[40:], payload)
	return b
}

func payload(b []byte) string {
	if b[0]>>4 == 4 {
		return string(b[20:])
	}
	return string(b[40:])
}

// say sends an IPv4 packet with n's own source.
func (n *node) say(tb testing.TB, to *node, text string) {
	tb.Helper()
	if err := n.t.Send(to.key, [][]byte{packet(n.v4, to.v4, text)}); err != nil {
		tb.Fatalf("%s: %v", n.name, err)
	}
}

func (n *node) wantGot(tb testing.TB, from *node, texts ...string) {
	tb.Helper()
	synctest.Wait()
	gs := n.take()
	if len(gs) != len(texts) {
		tb.Fatalf("%s got %d packets, want %d %q; stats %+v", n.name, len(gs), len(texts), texts, n.t.Stats())
	}
	for i, g := range gs {
		if g.from != from.key || payload(g.packet) != texts[i] {
			tb.Fatalf("%s got %q from %s, want %q from %s", n.name, payload(g.packet), g.from.Short(), texts[i], from.key.Short())
		}
	}
}

// bubble runs f under virtual time with a network that is closed at the end.
func bubble(t *testing.T, f func(t *testing.T, nw *network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork()
		defer nw.close()
		f(t, nw)
	})
}

// pair returns two nodes that know each other.
func pair(tb testing.TB, nw *network, change ...func(*Config)) (a, b *node) {
	a, b = nw.add(tb, "a", 1, change...), nw.add(tb, "b", 2, change...)
	a.knows(b)
	b.knows(a)
	return a, b
}

func TestExchange(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		if a.t.ActivePeers()+b.t.ActivePeers() != 0 {
			t.Fatal("peers configured without traffic")
		}
		start := time.Now()
		a.say(t, b, "hello")
		b.wantGot(t, a, "hello")
		if a.t.ActivePeers() != 1 || b.t.ActivePeers() != 1 {
			t.Fatalf("active peers %d and %d", a.t.ActivePeers(), b.t.ActivePeers())
		}
		b.say(t, a, "world")
		a.wantGot(t, b, "world")
		err := a.t.Send(b.key, [][]byte{packet(a.v6, b.v6, "six"), packet(a.v4, b.v4, "four"), packet(a.v6, b.v6, "")})
		if err != nil {
			t.Fatal(err)
		}
		b.wantGot(t, a, "six", "four", "")
		for _, n := range []*node{a, b} {
			for k := range n.netmap {
				if at, ok := n.t.LastHandshake(k); !ok || at.Before(start) {
					t.Errorf("%s: last handshake %v %v", n.name, at, ok)
				}
			}
			s := n.t.Stats()
			if s.DropSession+s.DropSource+s.DropDestination+s.DropStalled+s.DropReplay+s.DropForged != 0 {
				t.Errorf("%s dropped: %+v", n.name, s)
			}
		}
		ps, ok := a.t.PeerStats(b.key)
		if !ok || ps.SentBytes != 25+43+24+40 || ps.ReceivedBytes != 25 {
			t.Errorf("peer stats %+v %v", ps, ok)
		}
	})
}

func TestNewRefusesBadConfig(t *testing.T) {
	ok := Config{
		Key:     identity.NewNode(),
		Lookup:  func(identity.NodePublic) (Peer, bool) { return Peer{}, false },
		Send:    func(identity.NodePublic, netip.AddrPort, [][]byte) error { return nil },
		Deliver: func(identity.NodePublic, [][]byte) {},
	}
	for name, change := range map[string]func(*Config){
		"no key":     func(c *Config) { c.Key = identity.NodePrivate{} },
		"no lookup":  func(c *Config) { c.Lookup = nil },
		"no send":    func(c *Config) { c.Send = nil },
		"no deliver": func(c *Config) { c.Deliver = nil },
	} {
		c := ok
		change(&c)
		if tun, err := New(c); err == nil {
			tun.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}
