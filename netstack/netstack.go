package netstack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Config is what a Stack is made from.
type Config struct {
	// MTU is the size of the largest IP packet in bytes, 1280 to 65535. 0 means 1280.
	MTU int

	// Out takes the packets that leave the stack: complete IP packets with
	// checksums. It is called in batches, from many goroutines at once; the
	// slices are valid only during the call. It may block for back-pressure
	// and is never called after Close returned. See the package comment for
	// what it may call. Required.
	Out func(packets [][]byte)

	// PacketSize, if it is not nil, is asked for each large TCP segment how
	// large the packets may be into which it is cut, in bytes, by the
	// destination. Less than the MTU means the MTU. It is called where Out is,
	// and must be fast.
	PacketSize func(dst netip.Addr) int

	// Limits bound connections and the memory that they take.
	Limits Limits
}

// Flow names a connection as this stack sees it.
type Flow struct {
	Proto  uint8          // IP protocol number: 6 is TCP, 17 is UDP
	Local  netip.AddrPort // our side
	Remote netip.AddrPort // the other side
}

// IP protocol numbers for Flow.Proto.
const (
	TCP uint8 = 6
	UDP uint8 = 17
)

const nicID tcpip.NICID = 1

// Stack is a TCP/IP stack with one link and some own addresses. It costs next to
// nothing until a packet comes in or something but Listen is called. All methods
// may be called concurrently. Close it to free its goroutines.
type Stack struct {
	st      atomic.Pointer[stack.Stack] // nil until it is needed; see build
	link    *link
	backlog int
	budget  *budget
	closing chan struct{}  // closed when Close begins
	down    chan struct{}  // closed when Close is done
	wg      sync.WaitGroup // dials under way

	buildMu sync.Mutex // serialises SetAddrs and what has to know whether st is nil

	mu        sync.Mutex // guards the fields below; never held while calling gVisor or Out
	closed    bool
	addrs     []netip.Addr
	conns     map[*tcp.Endpoint]*Conn // accepted or dialled, not yet closed by the application
	dials     map[*tcp.Endpoint]*dial // connecting
	listeners map[*Listener]struct{}
	flows     map[Flow]*UDPConn // connected UDP sockets
	packets   map[*PacketConn]struct{}
}

// New makes a stack without addresses.
func New(c Config) (*Stack, error) {
	if c.Out == nil {
		return nil, errors.New("netstack: Config.Out is missing")
	}
	if c.MTU == 0 {
		c.MTU = defaultMTU
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return nil, fmt.Errorf("netstack: MTU %d is not in %d to %d", c.MTU, minMTU, maxMTU)
	}
	limits, err := c.Limits.fill()
	if err != nil {
		return nil, err
	}
	return &Stack{
		link:      newLink(c.MTU, c.Out, c.PacketSize),
		backlog:   limits.AcceptBacklog,
		budget:    newBudget(limits),
		closing:   make(chan struct{}),
		down:      make(chan struct{}),
		conns:     make(map[*tcp.Endpoint]*Conn),
		dials:     make(map[*tcp.Endpoint]*dial),
		listeners: make(map[*Listener]struct{}),
		flows:     make(map[Flow]*UDPConn),
		packets:   make(map[*PacketConn]struct{}),
	}, nil
}

// SetAddrs replaces the own addresses. Connections on addresses that stay are
// not touched; those on addresses that go are reset and fail with
// EADDRNOTAVAIL. A listener on an address that goes stays open but hears nothing
// until the address is back.
func (s *Stack) SetAddrs(addrs []netip.Addr) error {
	want := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		a = a.Unmap()
		if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
			return fmt.Errorf("netstack: set addresses: %v is not a unicast address", a)
		}
		if !slices.Contains(want, a) {
			want = append(want, a)
		}
	}
	gone := func(f Flow) bool { return !slices.Contains(want, f.Local.Addr()) }
	s.Abort(gone, syscall.EADDRNOTAVAIL) // while the address can still send a reset
	err := s.replaceAddrs(want)
	s.Abort(gone, syscall.EADDRNOTAVAIL) // what began in between
	return err
}

// replaceAddrs makes want the own addresses.
func (s *Stack) replaceAddrs(want []netip.Addr) (err error) {
	s.buildMu.Lock()
	defer s.buildMu.Unlock()
	s.mu.Lock()
	have, closed := s.addrs, s.closed
	s.mu.Unlock()
	if closed {
		return fmt.Errorf("netstack: set addresses: %w", net.ErrClosed)
	}
	st := s.st.Load()
	if st == nil {
		s.mu.Lock()
		s.addrs = want
		s.mu.Unlock()
		return nil
	}
	now := slices.Clone(have)
	defer func() {
		s.mu.Lock()
		s.addrs = now
		s.mu.Unlock()
	}()
	for _, a := range have {
		if slices.Contains(want, a) {
			continue
		}
		if terr := st.RemoveAddress(nicID, toAddress(a)); terr != nil {
			err = errors.Join(err, fmt.Errorf("netstack: remove address %v: %w", a, toErrno(terr)))
			continue
		}
		now = slices.DeleteFunc(now, func(b netip.Addr) bool { return a == b })
	}
	for _, a := range want {
		if slices.Contains(have, a) {
			continue
		}
		if aerr := addAddress(st, a); aerr != nil {
			err = errors.Join(err, aerr)
			continue
		}
		now = append(now, a)
	}
	return err
}

// In takes packets from the mesh that passed the packet filter. They are copied
// before it returns. Malformed packets are dropped; after Close all are.
func (s *Stack) In(packets [][]byte) {
	if _, err := s.gVisor(); err == nil {
		s.link.deliver(packets)
	}
}

// Reject tells the application that the other side, or something on the way,
// refused f. A DialTCP still connecting on f fails at once with err; a connected
// UDP socket returns err once, from the Read or Write under way or else from the
// next. An established TCP connection is left alone. Reject reports whether there was
// such a dial or socket. It may be called from Out.
func (s *Stack) Reject(f Flow, err error) bool {
	f = f.unmap()
	if f.Proto == UDP {
		s.mu.Lock()
		u := s.flows[f]
		s.mu.Unlock()
		if u != nil {
			u.reject(err)
		}
		return u != nil
	}
	if f.Proto != TCP || !f.Local.IsValid() || !f.Remote.IsValid() {
		return false
	}
	// gVisor registers the endpoint under its full address before it sends the
	// first SYN, so the dial is found even if Connect has not returned.
	ep := s.endpoint(f)
	if ep == nil || !connecting(ep) {
		return false
	}
	s.mu.Lock()
	d := s.dials[ep]
	s.mu.Unlock()
	return d != nil && d.reject(err)
}

// endpoint finds the TCP endpoint of f, which is unmapped and valid; nil if
// there is none.
func (s *Stack) endpoint(f Flow) *tcp.Endpoint {
	st := s.st.Load()
	if st == nil {
		return nil
	}
	id := stack.TransportEndpointID{
		LocalAddress:  toAddress(f.Local.Addr()),
		LocalPort:     f.Local.Port(),
		RemoteAddress: toAddress(f.Remote.Addr()),
		RemotePort:    f.Remote.Port(),
	}
	ep, ok := st.FindTransportEndpoint(protocolOf(f.Local.Addr()), tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
	if !ok || flowOf(ep) != f {
		return nil // a listener matches, too
	}
	return ep
}

// AbortFlow is Abort for one flow, at a cost that does not depend on how many
// there are. It reports whether there was such a connection, dial or connected
// UDP socket.
func (s *Stack) AbortFlow(f Flow, err error) bool {
	f = f.unmap()
	switch {
	case !f.Local.IsValid() || !f.Remote.IsValid():
		return false
	case f.Proto == UDP:
		s.mu.Lock()
		u := s.flows[f]
		s.mu.Unlock()
		return u != nil && u.abort(err)
	case f.Proto != TCP:
		return false
	}
	ep := s.endpoint(f)
	return ep != nil && s.abort(ep, err)
}

// Abort ends everything that match selects: live TCP connections (a reset is sent
// through Out before Abort returns), connections nobody accepted yet, dials
// under way and connected UDP sockets. Their operations return err from
// then on. It returns how many it ended. Connections that the application closed but
// that still have data to send count too.
func (s *Stack) Abort(match func(Flow) bool, err error) int {
	n := 0
	for _, tep := range s.registered() {
		ep, ok := tep.(*tcp.Endpoint)
		if !ok {
			continue
		}
		if live(ep) && match(flowOf(ep)) && s.abort(ep, err) {
			n++
		}
	}
	s.mu.Lock()
	var udps []*UDPConn
	for _, u := range s.flows {
		udps = append(udps, u)
	}
	s.mu.Unlock()
	for _, u := range udps {
		if match(u.flow) && u.abort(err) {
			n++
		}
	}
	return n
}

// live reports whether ep is a connection that has not ended.
func live(ep *tcp.Endpoint) bool {
	switch tcp.EndpointState(ep.State()) {
	case tcp.StateInitial, tcp.StateBound, tcp.StateListen, tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
		return false
	}
	return true
}

// abort ends a connection or dial, and reports whether it had not ended before.
func (s *Stack) abort(ep *tcp.Endpoint, err error) bool {
	if !live(ep) {
		return false
	}
	s.mu.Lock()
	c, d := s.conns[ep], s.dials[ep]
	s.mu.Unlock()
	if d != nil && d.reject(err) {
		return true // its goroutine closes the endpoint
	}
	if c != nil {
		c.fail(err)
	}
	ep.Abort()
	// It may have been accepted, or its dial completed, in between.
	s.mu.Lock()
	c = s.conns[ep]
	s.mu.Unlock()
	if c != nil {
		c.fail(err)
	}
	return true
}

// Close resets all connections, closes all listeners and sockets (their
// operations return net.ErrClosed) and waits until nothing of the stack
// runs any more. Further calls wait for the first.
func (s *Stack) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		<-s.down
		return nil
	}
	s.closed = true
	var (
		listeners []*Listener
		conns     []*Conn
		dials     []*dial
		udps      []*UDPConn
		packets   []*PacketConn
	)
	for l := range s.listeners {
		listeners = append(listeners, l)
	}
	for _, c := range s.conns {
		conns = append(conns, c)
	}
	for _, d := range s.dials {
		dials = append(dials, d)
	}
	for _, u := range s.flows {
		udps = append(udps, u)
	}
	for p := range s.packets {
		packets = append(packets, p)
	}
	s.mu.Unlock()

	s.buildMu.Lock() // whoever builds has done so, and nobody will
	close(s.closing)
	s.buildMu.Unlock()
	s.link.taking.close()
	for _, d := range dials {
		d.reject(net.ErrClosed)
	}
	for _, l := range listeners {
		l.Close()
	}
	for _, c := range conns {
		c.fail(net.ErrClosed)
	}
	for _, u := range udps {
		u.abort(net.ErrClosed) // but one that Abort ended before keeps its reason
		s.untrack(func() { delete(s.flows, u.flow) })
	}
	for _, p := range packets {
		p.Close()
	}
	s.wg.Wait()
	// No packet comes in any more, but those already queued may still complete
	// a handshake: repeat until nothing is left.
	for {
		eps := s.registered()
		if len(eps) == 0 {
			break
		}
		for _, ep := range eps {
			ep.Abort()
		}
	}
	s.link.close()
	if st := s.st.Load(); st != nil {
		st.Destroy()
	}
	close(s.down)
	return nil
}

// track runs add under the lock unless the stack is closed.
func (s *Stack) track(add func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	add()
	return nil
}

// orClosed returns err, or net.ErrClosed if the closed stack is the reason for it.
func (s *Stack) orClosed(err error) error {
	select {
	case <-s.closing:
		return net.ErrClosed
	default:
		return err
	}
}

// untrack runs remove under the lock.
func (s *Stack) untrack(remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	remove()
}

// only reports whether a is our only address of its family, so that gVisor has
// no choice but to use it.
func (s *Stack) only(a netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.addrs {
		if b != a && b.Is4() == a.Is4() {
			return false
		}
	}
	return slices.Contains(s.addrs, a)
}

// bindAddr checks the address of a Listen call against the network and returns
// what to bind: the protocol of the endpoint, whether it serves IPv6 only, and
// the address (empty for any).
func bindAddr(base, network string, addr netip.AddrPort) (proto tcpip.NetworkProtocolNumber, v6only bool, full tcpip.FullAddress, err error) {
	v, err := family(base, network)
	if err != nil {
		return 0, false, full, err
	}
	full.Port = addr.Port()
	a := addr.Addr().Unmap()
	if a.IsValid() && !a.IsUnspecified() {
		if v == 4 && !a.Is4() || v == 6 && !a.Is6() || a.Zone() != "" {
			return 0, false, full, &net.AddrError{Err: "no suitable address", Addr: a.String()}
		}
		full.Addr = toAddress(a)
		return protocolOf(a), a.Is6(), full, nil
	}
	if v == 4 {
		return header.IPv4ProtocolNumber, false, full, nil
	}
	return header.IPv6ProtocolNumber, v == 6, full, nil
}

func (f Flow) unmap() Flow {
	f.Local = unmap(f.Local)
	f.Remote = unmap(f.Remote)
	return f
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// flowOf reads the address of a registered TCP endpoint, which no longer changes.
func flowOf(ep *tcp.Endpoint) Flow {
	id := ep.TransportEndpointInfo.ID
	return Flow{
		Proto:  TCP,
		Local:  netip.AddrPortFrom(fromAddress(id.LocalAddress), id.LocalPort),
		Remote: netip.AddrPortFrom(fromAddress(id.RemoteAddress), id.RemotePort),
	}
}

func connecting(ep *tcp.Endpoint) bool {
	switch tcp.EndpointState(ep.State()) {
	case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
		return true
	}
	return false
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func toAddress(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func fromAddress(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr.Unmap()
}

func fromFull(a tcpip.FullAddress) netip.AddrPort {
	return netip.AddrPortFrom(fromAddress(a.Addr), a.Port)
}

func toFull(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{Addr: toAddress(a.Addr().Unmap()), Port: a.Port()}
}
