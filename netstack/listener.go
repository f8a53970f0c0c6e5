package netstack

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"mesh/internal/errand"
)

// Listener accepts TCP connections.
type Listener struct {
	s        *Stack
	network  string
	proto    tcpip.NetworkProtocolNumber
	v6only   bool
	bind     tcpip.FullAddress
	addr     netip.AddrPort
	ep       *tcp.Endpoint // nil while the stack is not built; set under its buildMu, and before pumping
	pumping  *errand.Errand
	entry    waiter.Entry // asks for pumping when gVisor completed a handshake
	queue    chan *Conn   // completed connections nobody accepted yet
	acceptBy deadline
	done     chan struct{} // closed by Close
	once     sync.Once
}

var _ net.Listener = (*Listener)(nil)

// Listen opens a listener. network is "tcp", "tcp4" or "tcp6". The zero Addr (or
// an unspecified one) means any own address: of both families for "tcp". Port 0 picks
// a free one. An address in use is EADDRINUSE, one that is not ours
// EADDRNOTAVAIL, both in a *net.OpError.
func (s *Stack) Listen(network string, addr netip.AddrPort) (*Listener, error) {
	fail := func(err error) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: tcpAddr(addr), Err: s.orClosed(err)}
	}
	proto, v6only, full, err := bindAddr("tcp", network, addr)
	if err != nil {
		return fail(err)
	}
	l := &Listener{
		s:       s,
		network: network,
		proto:   proto,
		v6only:  v6only,
		bind:    full,
		queue:   make(chan *Conn, s.backlog),
		done:    make(chan struct{}),
	}
	l.acceptBy.init()
	l.pumping = errand.New(l.pump)
	if full.Addr.Len() == 0 {
		later, err := s.listenLater(l)
		if err != nil {
			return fail(err)
		}
		if later {
			return l, nil
		}
	}
	st, err := s.gVisor()
	if err != nil {
		return fail(err)
	}
	if err := l.open(st); err != nil {
		return fail(err)
	}
	if err := s.track(func() { s.listeners[l] = struct{}{} }); err != nil {
		l.ep.Close()
		l.pumping.Close()
		return fail(err)
	}
	return l, nil
}

// open makes the endpoint.
func (l *Listener) open(st *stack.Stack) error {
	wq := new(waiter.Queue)
	tep, terr := st.NewEndpoint(tcp.ProtocolNumber, l.proto, wq)
	if terr != nil {
		return toErrno(terr)
	}
	l.ep = tep.(*tcp.Endpoint)
	ops := l.ep.SocketOptions()
	ops.SetV6Only(l.v6only)
	ops.SetReuseAddress(true) // connections of an earlier listener may live on
	l.entry.Init(asking{l.pumping}, waiter.ReadableEvents)
	wq.EventRegister(&l.entry)
	terr = l.ep.Bind(l.bind)
	if terr == nil {
		terr = l.ep.Listen(halfOpen)
	}
	var local tcpip.FullAddress
	if terr == nil {
		local, terr = l.ep.GetLocalAddress()
	}
	if terr != nil {
		l.ep.Close()
		return toErrno(terr)
	}
	if !l.addr.IsValid() { // else it knows, and has told
		l.addr = netip.AddrPortFrom(anyAddr(l.bind.Addr, l.proto), local.Port)
	}
	return nil
}

// asking asks for an errand when gVisor tells of an event.
type asking struct{ *errand.Errand }

func (a asking) NotifyEvent(waiter.EventMask) { a.Ask() }

// anyAddr is the address a socket says it is bound to.
func anyAddr(a tcpip.Address, proto tcpip.NetworkProtocolNumber) netip.Addr {
	if a.Len() > 0 {
		return fromAddress(a)
	}
	if proto == header.IPv4ProtocolNumber {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// pump moves completed connections from gVisor into the queue and resets those
// that do not fit. It keeps gVisor's own queue short: a full one would drop
// SYNs silently.
func (l *Listener) pump() {
	for {
		tep, wq, terr := l.ep.Accept(nil)
		if terr != nil {
			return
		}
		l.offer(tep.(*tcp.Endpoint), wq)
	}
}

func (l *Listener) offer(ep *tcp.Endpoint, wq *waiter.Queue) {
	c := newConn(l.s, ep, wq)
	c.control()
	c.flow = flowOf(ep)
	if err := c.reserve(true); err != nil {
		c.reset(err)
		return
	}
	c.in = l.s.link.tallies.add(c.flow, ep.SocketOptions())
	if err := l.s.track(func() { l.s.conns[ep] = c }); err != nil {
		c.reset(err)
		return
	}
	if tcp.EndpointState(ep.State()) == tcp.StateError {
		c.Close() // ended, perhaps by Abort, before anybody could know of it
		return
	}
	select {
	case l.queue <- c:
	default:
		c.reset(syscall.ECONNABORTED)
	}
}

// Accept waits for a connection; it is a *Conn. After Close it returns net.ErrClosed.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptConn()
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptConn is Accept with the type known.
func (l *Listener) AcceptConn() (*Conn, error) {
	for {
		by := l.acceptBy.wait()
		select {
		case <-l.done:
			return nil, l.opError(net.ErrClosed)
		case <-by:
			return nil, l.opError(os.ErrDeadlineExceeded)
		default:
		}
		select {
		case c := <-l.queue:
			if !c.failed() {
				return c, nil
			}
			c.Close() // aborted while it waited
		case <-l.done:
		case <-by:
		}
	}
}

// Close stops listening, resets the connections that nobody accepted and wakes
// all Accept calls. Accepted connections live on. Closing twice is no error.
func (l *Listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		l.acceptBy.set(time.Time{})
		l.s.buildMu.Lock()
		if l.ep == nil {
			l.s.untrack(func() { delete(l.s.listeners, l) })
		}
		l.s.buildMu.Unlock()
		if l.ep == nil {
			return
		}
		halfOpen := l.handshakes()
		l.ep.Close()
		for _, f := range halfOpen {
			l.s.provoke(f)
		}
		l.s.untrack(func() { delete(l.s.listeners, l) })
	})
	l.pumping.Close()
	for {
		select {
		case c := <-l.queue:
			c.reset(net.ErrClosed)
		default:
			return nil
		}
	}
}

// handshakes returns the flows of handshakes under way. gVisor forgets them when
// the listener closes, and while it does so it may swallow the last packet
// of a handshake: to it the queue of a closing listener is full.
func (l *Listener) handshakes() []Flow {
	var flows []Flow
	for _, tep := range l.s.registered() {
		ep, ok := tep.(*tcp.Endpoint)
		if !ok || tcp.EndpointState(ep.State()) != tcp.StateSynRecv {
			continue
		}
		if f := flowOf(ep); f.Local.Port() == l.addr.Port() {
			flows = append(flows, f)
		}
	}
	return flows
}

// provoke sends a segment that the other side of f answers with an
// acknowledgement if it believes in the connection; the stack, which does not, then
// resets it. An open connection of ours would survive it.
func (s *Stack) provoke(f Flow) {
	r, terr := s.st.Load().FindRoute(nicID, toAddress(f.Local.Addr()), toAddress(f.Remote.Addr()), protocolOf(f.Local.Addr()), false)
	if terr != nil {
		return
	}
	defer r.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: int(r.MaxHeaderLength()) + header.TCPMinimumSize})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = tcp.ProtocolNumber
	h := header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize))
	h.Encode(&header.TCPFields{
		SrcPort:    f.Local.Port(),
		DstPort:    f.Remote.Port(),
		DataOffset: header.TCPMinimumSize,
		Flags:      header.TCPFlagAck,
	})
	h.SetChecksum(^h.CalculateChecksum(r.PseudoHeaderChecksum(tcp.ProtocolNumber, header.TCPMinimumSize)))
	r.WritePacket(stack.NetworkHeaderParams{Protocol: tcp.ProtocolNumber, TTL: r.DefaultTTL()}, pkt)
}

// SetDeadline makes Accept fail with os.ErrDeadlineExceeded from t on. The zero time
// means never.
func (l *Listener) SetDeadline(t time.Time) error {
	select {
	case <-l.done:
		return l.opError(net.ErrClosed)
	default:
		l.acceptBy.set(t)
		return nil
	}
}

// Addr returns the address listened on, a *net.TCPAddr; its IP is unspecified for
// a listener on any address.
func (l *Listener) Addr() net.Addr { return tcpAddr(l.addr) }

func (l *Listener) opError(err error) error {
	return &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: err}
}
