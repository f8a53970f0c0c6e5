package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/filter"
	"mesh/internal/netmap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// flow is what Link methods are called with.
type flow struct {
	proto         uint8
	local, remote netip.AddrPort
}

// fakeLink is a stack that writes down what it is told.
type fakeLink struct {
	mu       sync.Mutex // guards what follows
	in       [][]byte
	arrived  chan []byte // each packet once more, if not nil
	addrs    []netip.Addr
	rejected map[flow]error
	flows    map[flow]error // live connections, nil until aborted
	onAbort  func()         // called at the start of each Abort
	told     chan flow      // each rejection, if not nil
}

func newFakeLink() *fakeLink {
	return &fakeLink{rejected: map[flow]error{}, flows: map[flow]error{}}
}

func (l *fakeLink) In(packets [][]byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range packets {
		p = slices.Clone(p)
		l.in = append(l.in, p)
		if l.arrived != nil {
			l.arrived <- p
		}
	}
}

func (l *fakeLink) SetAddrs(a []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addrs = a
	return nil
}

func (l *fakeLink) Reject(proto uint8, local, remote netip.AddrPort, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rejected[flow{proto, local, remote}] = err
	if l.told != nil {
		l.told <- flow{proto, local, remote}
	}
	return true
}

func (l *fakeLink) Abort(match func(uint8, netip.AddrPort, netip.AddrPort) bool, err error) int {
	l.mu.Lock()
	hook := l.onAbort
	l.mu.Unlock()
	if hook != nil {
		hook()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for f, was := range l.flows {
		if was == nil && match(f.proto, f.local, f.remote) {
			l.flows[f] = err
			n++
		}
	}
	return n
}

func (l *fakeLink) AbortFlow(proto uint8, local, remote netip.AddrPort, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := flow{proto, local, remote}
	was, ok := l.flows[f]
	if ok && was == nil {
		l.flows[f] = err
		if l.told != nil {
			l.told <- f
		}
		return true
	}
	return false
}

func (l *fakeLink) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.in)
}

func (l *fakeLink) errorOf(f flow) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.flows[f]
}

// udpNet carries datagrams between the sockets of one test.
type udpNet struct {
	mu    sync.Mutex // guards socks
	socks map[netip.AddrPort]*udpSock
}

type udpSock struct {
	n      *udpNet
	addr   netip.AddrPort
	in     chan datagram
	closed chan struct{}
	once   sync.Once
}

type datagram struct {
	from netip.AddrPort
	b    []byte
}

func (n *udpNet) listen(host netip.Addr) func(context.Context, string, string) (net.PacketConn, error) {
	return func(_ context.Context, network, _ string) (net.PacketConn, error) {
		if network != "udp4" {
			return nil, errors.New("no IPv6 here")
		}
		s := &udpSock{n: n, addr: netip.AddrPortFrom(host, 41641), in: make(chan datagram, 1024), closed: make(chan struct{})}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.socks[s.addr] = s
		return s, nil
	}
}

func (s *udpSock) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case d := <-s.in:
		return copy(b, d.b), net.UDPAddrFromAddrPort(d.from), nil
	case <-s.closed:
		return 0, nil, net.ErrClosed
	}
}

func (s *udpSock) WriteTo(b []byte, to net.Addr) (int, error) {
	s.n.mu.Lock()
	dst := s.n.socks[to.(*net.UDPAddr).AddrPort()]
	s.n.mu.Unlock()
	if dst != nil {
		select {
		case dst.in <- datagram{s.addr, slices.Clone(b)}:
		default:
		}
	}
	return len(b), nil
}

func (s *udpSock) Close() error                     { s.once.Do(func() { close(s.closed) }); return nil }
func (s *udpSock) LocalAddr() net.Addr              { return net.UDPAddrFromAddrPort(s.addr) }
func (s *udpSock) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (s *udpSock) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (s *udpSock) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// host is one node of a test.
type host struct {
	t    testing.TB
	e    *Engine
	link *fakeLink
	node *wire.Node
	key  identity.NodePrivate
	m    *netmap.Map
	four netip.Addr
	six  netip.Addr
}

func newHost(t testing.TB, n *udpNet, number int) *host {
	t.Helper()
	key, disco := identity.NewNode(), identity.NewDisco()
	node := wireNode(number, key.Public())
	node.DiscoKey = disco.Public()
	where := netip.AddrFrom4([4]byte{192, 0, 2, byte(number)})
	node.Endpoints = []netip.AddrPort{netip.AddrPortFrom(where, 41641)}
	h := &host{t: t, link: newFakeLink(), node: node, key: key, four: node.Addresses[0].Addr(), six: node.Addresses[1].Addr()}
	e, err := New(Config{
		Key: key, Disco: disco, Link: h.link, ListenUDP: n.listen(where),
		DialTCP: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no relays here") },
	})
	if err != nil {
		t.Fatal(err)
	}
	h.e = e
	t.Cleanup(func() { e.Close() })
	return h
}

func newNet() *udpNet { return &udpNet{socks: map[netip.AddrPort]*udpSock{}} }

func wireNode(number int, key identity.NodePublic) *wire.Node {
	six := netip.MustParseAddr("fd7a:115c:a1e0::").As16()
	binary.BigEndian.PutUint32(six[12:], uint32(number))
	return &wire.Node{
		ID: wire.NodeID(number), StableID: fmt.Sprintf("s%d", number), Name: fmt.Sprintf("n%d.mesh.internal.", number),
		User: 1, Key: key, Hostinfo: &wire.Hostinfo{}, MachineAuthorized: true,
		Addresses: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(number >> 8), byte(number)}), 32),
			netip.PrefixFrom(netip.AddrFrom16(six), 128),
		},
	}
}

// start puts the first map in force.
func (h *host) start(rules []wire.FilterRule, peers ...*wire.Node) {
	h.t.Helper()
	h.m = nil
	h.update(&wire.MapResponse{Node: h.node, Peers: peers, PacketFilters: map[string][]wire.FilterRule{"base": rules}, MeshPolicy: 1})
}

// update puts a message of the map stream in force.
func (h *host) update(r *wire.MapResponse) {
	h.t.Helper()
	if err := h.tryUpdate(r); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) tryUpdate(r *wire.MapResponse) error {
	m, d, err := netmap.Apply(h.m, r)
	if err != nil {
		return err
	}
	h.m = m
	return h.e.Apply(m, d)
}

func allow(src, dst string, port uint16) wire.FilterRule {
	return wire.FilterRule{SrcIPs: []string{src}, DstPorts: []wire.NetPortRange{{IP: dst, Ports: wire.PortRange{First: port, Last: port}}}}
}

// packet is a packet of TCP or UDP without payload.
func packet(proto uint8, src, dst netip.AddrPort, flags uint8) []byte {
	l4 := make([]byte, 20)
	if proto == filter.ProtoUDP {
		l4 = l4[:8]
		binary.BigEndian.PutUint16(l4[4:], 8)
	} else {
		l4[12], l4[13] = 5<<4, flags
	}
	binary.BigEndian.PutUint16(l4, src.Port())
	binary.BigEndian.PutUint16(l4[2:], dst.Port())
	return ip(proto, src.Addr(), dst.Addr(), l4)
}

func ip(proto uint8, src, dst netip.Addr, payload []byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, 20)
		b[0], b[8], b[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
	} else {
		b = make([]byte, 40)
		b[0], b[6], b[7] = 0x60, proto, 64
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	}
	return append(b, payload...)
}

// deliver gives the host packets as if its tunnel had decrypted them.
func (h *host) deliver(from identity.NodePublic, packets ...[]byte) {
	h.e.deliver(from, packets)
}

// gets reports whether that one packet reaches the stack.
func (h *host) gets(from identity.NodePublic, packet []byte) bool {
	before := h.link.count()
	h.deliver(from, packet)
	return h.link.count() == before+1
}
