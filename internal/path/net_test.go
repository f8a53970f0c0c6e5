package path

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/identity"
	"mesh/internal/stun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memNet is an internet in memory: datagrams between sockets, STUN servers,
// relays. All under virtual time.
type memNet struct {
	t *testing.T

	mu      sync.Mutex // guards what follows
	socks   map[netip.AddrPort]*memSock
	blocked map[[2]netip.Addr]bool // datagrams from, to
	stuns   map[netip.AddrPort]time.Duration
	sent    map[netip.AddrPort]int // datagrams by destination
	tap     func(from, to netip.AddrPort, b []byte)
	delay   time.Duration
	relays  map[int]*memRelay
	// siblings are relays of a region that has several, by name.
	siblings map[string]*memRelay
}

func newMemNet(t *testing.T) *memNet {
	return &memNet{
		t: t, delay: time.Millisecond,
		socks:   make(map[netip.AddrPort]*memSock),
		blocked: make(map[[2]netip.Addr]bool),
		stuns:   make(map[netip.AddrPort]time.Duration),
		sent:    make(map[netip.AddrPort]int),
		relays:  make(map[int]*memRelay),
	}
}

// block stops datagrams between two hosts, both ways.
func (n *memNet) block(a, b netip.Addr, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.blocked[[2]netip.Addr{a, b}] = on
	n.blocked[[2]netip.Addr{b, a}] = on
}

func (n *memNet) setTap(tap func(from, to netip.AddrPort, b []byte)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tap = tap
}

func (n *memNet) count(to netip.AddrPort) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent[to]
}

func (n *memNet) total() (sum int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.sent {
		sum += c
	}
	return sum
}

type memSock struct {
	n      *memNet
	addr   netip.AddrPort
	in     chan memPacket
	closed chan struct{}
	once   sync.Once
}

type memPacket struct {
	from netip.AddrPort
	b    []byte
}

// listen returns the ListenUDP of a host.
func (n *memNet) listen(host netip.Addr) func(context.Context, string, string) (net.PacketConn, error) {
	return func(_ context.Context, network, addr string) (net.PacketConn, error) {
		if network != "udp4" {
			return nil, errors.New("no IPv6 here")
		}
		_, port, _ := net.SplitHostPort(addr)
		n.mu.Lock()
		defer n.mu.Unlock()
		a := netip.MustParseAddrPort(host.String() + ":" + port)
		if a.Port() == 0 {
			a = netip.AddrPortFrom(host, uint16(40000+len(n.socks)))
		}
		s := &memSock{n: n, addr: a, in: make(chan memPacket, 1024), closed: make(chan struct{})}
		n.socks[a] = s
		return s, nil
	}
}

func (s *memSock) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-s.in:
		return copy(b, p.b), net.UDPAddrFromAddrPort(p.from), nil
	case <-s.closed:
		return 0, nil, net.ErrClosed
	}
}

func (s *memSock) WriteTo(b []byte, to net.Addr) (int, error) {
	select {
	case <-s.closed:
		return 0, net.ErrClosed
	default:
	}
	s.n.deliver(s.addr, to.(*net.UDPAddr).AddrPort(), b)
	return len(b), nil
}

// deliver carries a datagram, also one with a forged source.
func (n *memNet) deliver(from, to netip.AddrPort, b []byte) {
	b = slices.Clone(b)
	n.mu.Lock()
	n.sent[to]++
	tap, delay := n.tap, n.delay
	dead := n.blocked[[2]netip.Addr{from.Addr(), to.Addr()}]
	rtt, isStun := n.stuns[to]
	dst := n.socks[to]
	n.mu.Unlock()
	if tap != nil {
		tap(from, to, b)
	}
	switch {
	case dead:
	case isStun:
		tx, err := stun.ParseRequest(b)
		if err == nil {
			time.AfterFunc(max(rtt, 1), func() { n.deliver(to, from, stun.AppendResponse(nil, tx, from)) })
		}
	case dst != nil:
		time.AfterFunc(max(delay, 1), func() { // see vnet's armLocked
			select {
			case dst.in <- memPacket{from, b}:
			default:
			}
		})
	}
}

func (s *memSock) Close() error {
	s.once.Do(func() {
		close(s.closed)
		s.n.mu.Lock()
		defer s.n.mu.Unlock()
		if s.n.socks[s.addr] == s {
			delete(s.n.socks, s.addr)
		}
	})
	return nil
}

func (s *memSock) LocalAddr() net.Addr              { return net.UDPAddrFromAddrPort(s.addr) }
func (s *memSock) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (s *memSock) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (s *memSock) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// memRelay is a relay region in memory.
type memRelay struct {
	region int
	mu     sync.Mutex // guards what follows
	down   bool
	hole   bool // swallows everything, new connections too
	conns  map[identity.NodePublic]*memRelayConn
	dials  int
	data   int // WireGuard packets carried
	// flushes of connections that were open
	flushes int

	next *memRelay // of the same region, to which this one forwards
}

type memRelayConn struct {
	r      *memRelay
	key    identity.NodePublic
	in     chan derp.Message
	closed chan struct{}
	once   sync.Once
	home   bool // under r.mu
	local  netip.AddrPort
}

func (n *memNet) relay(region int) *memRelay {
	r := &memRelay{region: region, conns: make(map[identity.NodePublic]*memRelayConn)}
	n.relays[region] = r
	return r
}

// setDown makes the relay unreachable and cuts its connections, or ends that.
func (r *memRelay) setDown(down bool) {
	r.mu.Lock()
	r.down = down
	conns := make([]*memRelayConn, 0)
	if down {
		for _, c := range r.conns {
			conns = append(conns, c)
		}
	}
	r.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

func (r *memRelay) isHome(key identity.NodePublic) (connected, home bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.conns[key]
	return c != nil, c != nil && c.home
}

func (r *memRelay) carried() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.data
}

func (n *memNet) dialRelay(local func() netip.AddrPort) func(context.Context, *wire.DERPRegion, identity.NodePrivate) (relayConn, error) {
	return func(ctx context.Context, def *wire.DERPRegion, private identity.NodePrivate) (relayConn, error) {
		key := private.Public()
		t := time.NewTimer(n.delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		r := n.relays[def.RegionID]
		if len(def.Nodes) > 0 && n.siblings[def.Nodes[0].Name] != nil {
			r = n.siblings[def.Nodes[0].Name]
		}
		if r == nil {
			return nil, fmt.Errorf("relay %d: no such host", def.RegionID)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.dials++
		if r.hole {
			r.mu.Unlock()
			t := time.NewTimer(connectTimeout)
			select {
			case <-t.C:
			case <-ctx.Done():
			}
			t.Stop()
			r.mu.Lock()
			return nil, fmt.Errorf("relay %d: timeout", def.RegionID)
		}
		if r.down {
			return nil, fmt.Errorf("relay %d: connection refused", def.RegionID)
		}
		c := &memRelayConn{r: r, key: key, in: make(chan derp.Message, 1024), closed: make(chan struct{}), local: local()}
		r.conns[key] = c
		return c, nil
	}
}

func (c *memRelayConn) Send(dst identity.NodePublic, packets ...[]byte) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	c.r.inject(c.key, dst, packets...)
	return nil
}

// inject delivers packets as the relay does.
func (r *memRelay) inject(src, dst identity.NodePublic, packets ...[]byte) {
	r.mu.Lock()
	to := r.conns[dst]
	if r.hole {
		to = nil
	}
	for _, b := range packets {
		if !isDisco(b) {
			r.data++
		}
	}
	hole := r.hole
	r.mu.Unlock()
	if to == nil && r.next != nil && !hole {
		r.next.mu.Lock()
		to = r.next.conns[dst]
		r.next.mu.Unlock()
	}
	if to == nil {
		return
	}
	m := derp.Message{Kind: derp.KindPackets, Peer: src}
	for _, b := range packets {
		m.Packets = append(m.Packets, slices.Clone(b))
	}
	select {
	case to.in <- m:
	default:
	}
}

func (r *memRelay) gone(at, peer identity.NodePublic) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns[at].in <- derp.Message{Kind: derp.KindPeerGone, Peer: peer}
}

func (c *memRelayConn) Ping(ctx context.Context) (time.Duration, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-c.closed:
		return 0, net.ErrClosed
	case <-time.After(time.Millisecond):
	}
	c.r.mu.Lock()
	hole := c.r.hole
	c.r.mu.Unlock()
	if hole {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return time.Millisecond, nil
}

func (c *memRelayConn) LocalAddr() net.Addr {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	return net.TCPAddrFromAddrPort(c.local)
}

func (c *memRelayConn) NotePreferred(home bool) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.home = home
}

func (c *memRelayConn) Flush(context.Context) {
	select {
	case <-c.closed:
	default:
		c.r.mu.Lock()
		defer c.r.mu.Unlock()
		c.r.flushes++
	}
}

func (c *memRelayConn) Recv() (derp.Message, error) {
	select {
	case m := <-c.in:
		return m, nil
	case <-c.closed:
		return derp.Message{}, io.EOF
	}
}

func (c *memRelayConn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.r.mu.Lock()
		defer c.r.mu.Unlock()
		if c.r.conns[c.key] == c {
			delete(c.r.conns, c.key)
		}
	})
	return nil
}

// netmap is what control would know; shared by the nodes of a test.
type netmap struct {
	mu    sync.Mutex // guards peers
	peers map[identity.NodePublic]Peer
}

func (m *netmap) set(pr Peer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.peers[pr.Key] = pr
}

func (m *netmap) remove(k identity.NodePublic) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.peers, k)
}

func (m *netmap) lookup(k identity.NodePublic) (Peer, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pr, ok := m.peers[k]
	return pr, ok
}

func (m *netmap) lookupDisco(k identity.DiscoPublic) (out []Peer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, pr := range m.peers {
		if pr.Disco == k {
			out = append(out, pr)
		}
	}
	return out
}

// node is a Path with everything around it.
type node struct {
	*Path
	cfg  Config
	addr netip.AddrPort
	disc identity.DiscoPrivate
	nm   *netmap // what this node knows

	mu      sync.Mutex // guards what follows
	got     []received
	reports []Report
	local   []netip.Prefix // addresses of the host
}

func (nd *node) interfaces() ([]netip.Prefix, error) {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	return slices.Clone(nd.local), nil
}

// relayAddr is from where the node connects to relays.
func (nd *node) relayAddr() netip.AddrPort {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	if len(nd.local) == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(nd.local[0].Addr(), 50000)
}

func (nd *node) setInterfaces(list ...string) {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	nd.local = nil
	for _, s := range list {
		nd.local = append(nd.local, netip.MustParsePrefix(s))
	}
}

type received struct {
	src  Source
	data string
}

func (n *memNet) config(host string) (Config, *node) {
	ip := netip.MustParseAddr(host)
	nd := &node{
		addr: netip.AddrPortFrom(ip, 41641),
		nm:   &netmap{peers: make(map[identity.NodePublic]Peer)},
		disc: identity.NewDisco(),
	}
	nd.setInterfaces(host + "/24")
	key := identity.NewNode()
	return Config{
		Key: key, Disco: nd.disc, Port: 41641,
		Lookup:      nd.nm.lookup,
		LookupDisco: nd.nm.lookupDisco,
		Receive:     nd.receive,
		Report:      nd.reported,
		ListenUDP:   n.listen(ip),
		Interfaces:  nd.interfaces,
		dialRelay:   n.dialRelay(nd.relayAddr),
	}, nd
}

func (n *memNet) start(cfg Config, nd *node) *node {
	n.t.Helper()
	p, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	nd.Path, nd.cfg = p, cfg
	n.t.Cleanup(func() { p.Close() })
	return nd
}

func (n *memNet) node(host string) *node { return n.start(n.config(host)) }

func (nd *node) receive(src Source, datagrams [][]byte) {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	for _, b := range datagrams {
		nd.got = append(nd.got, received{src, string(b)})
	}
}

func (nd *node) reported(r Report) {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	nd.reports = append(nd.reports, r)
}

// take returns what was received since the last take.
func (nd *node) take() []received {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	got := nd.got
	nd.got = nil
	return got
}

func (nd *node) lastReport() (r Report) {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	if len(nd.reports) > 0 {
		r = nd.reports[len(nd.reports)-1]
	}
	return r
}

func (nd *node) key() identity.NodePublic { return nd.cfg.Key.Public() }

// peer is how others see the node.
func (nd *node) peer(home int) Peer {
	return Peer{Key: nd.key(), Disco: nd.disc.Public(), Endpoints: []netip.AddrPort{nd.addr}, HomeRegion: home}
}

func (nd *node) knows(prs ...Peer) {
	keys := make([]identity.NodePublic, 0, len(prs))
	for _, pr := range prs {
		nd.nm.set(pr)
		keys = append(keys, pr.Key)
	}
	nd.Update(keys)
}

func (nd *node) send(t *testing.T, to *node, text string) {
	t.Helper()
	if err := nd.Send(to.key(), netip.AddrPort{}, [][]byte{[]byte(text)}); err != nil {
		t.Fatalf("send: %v", err)
	}
}

func relayMap(regions ...int) *wire.DERPMap {
	m := &wire.DERPMap{Regions: make(map[int]*wire.DERPRegion)}
	for _, id := range regions {
		m.Regions[id] = &wire.DERPRegion{RegionID: id, Nodes: []*wire.DERPNode{{
			Name: fmt.Sprint(id), RegionID: id, HostName: "relay", IPv4: stunServer(id).Addr().String(), IPv6: "none",
		}}}
	}
	return m
}

// stunServer is the STUN address of a region in relayMap.
func stunServer(region int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(region % 256)}), defaultSTUNPort)
}
