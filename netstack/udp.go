package netstack

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// udpSocket is what PacketConn and UDPConn have in common.
type udpSocket struct {
	s     *Stack
	ep    tcpip.Endpoint
	local netip.AddrPort
	flow  Flow   // without a remote address if it is not connected
	in    *tally // small datagrams of flow

	readable, writable   chan struct{} // a token when it may be worth trying
	readEntry, writeWait waiter.Entry
	readBy, writeBy      deadline

	readMu sync.Mutex // serialises reads; guards dst
	dst    tcpip.SliceWriter

	writeMu sync.Mutex // serialises writes; guards the fields below
	src     bytes.Reader
	to      tcpip.FullAddress

	done chan struct{} // closed by Close or abort

	mu      sync.Mutex // guards the fields below
	closed  bool       // by Close
	failure error      // by abort: returned by every operation
	refusal error      // by reject: returned by one operation
}

// newUDP makes a socket that is not bound yet.
func (s *Stack) newUDP(proto tcpip.NetworkProtocolNumber, v6only bool) (*udpSocket, error) {
	st, err := s.gVisor()
	if err != nil {
		return nil, err
	}
	var wq waiter.Queue
	ep, terr := st.NewEndpoint(udp.ProtocolNumber, proto, &wq)
	if terr != nil {
		return nil, toErrno(terr)
	}
	u := &udpSocket{
		s:        s,
		ep:       ep,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		done:     make(chan struct{}),
	}
	u.readBy.init()
	u.writeBy.init()
	u.readEntry.Init(waiter.ChannelNotifier(u.readable), waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp)
	u.writeWait.Init(waiter.ChannelNotifier(u.writable), waiter.WritableEvents|waiter.EventErr|waiter.EventHUp)
	wq.EventRegister(&u.readEntry)
	wq.EventRegister(&u.writeWait)
	ops := ep.SocketOptions()
	ops.SetV6Only(v6only)
	ops.SetReceiveBufferSize(udpBuffer, false)
	ops.SetSendBufferSize(udpBuffer, false)
	return u, nil
}

// read receives one datagram; what does not fit into b is lost.
func (u *udpSocket) read(b []byte) (int, netip.AddrPort, error) {
	u.readMu.Lock()
	defer u.readMu.Unlock()
	for {
		by := u.readBy.wait()
		if err := u.stopped(by); err != nil {
			return 0, netip.AddrPort{}, err
		}
		u.dst = b
		res, terr := u.ep.Read(&u.dst, tcpip.ReadOptions{NeedRemoteAddr: true})
		u.dst = nil
		switch terr.(type) {
		case nil:
			u.in.taken(res.Total)
			return res.Count, fromFull(res.RemoteAddr), nil
		case *tcpip.ErrBadBuffer: // an empty b
			return 0, fromFull(res.RemoteAddr), nil
		case *tcpip.ErrWouldBlock:
			u.in.empty()
			u.waitFor(u.readable, by)
			continue
		}
		if err := u.stopped(nil); err != nil {
			return 0, netip.AddrPort{}, err
		}
		return 0, netip.AddrPort{}, toErrno(terr)
	}
}

// write sends one datagram; the zero to means the connected address.
func (u *udpSocket) write(b []byte, to netip.AddrPort) (int, error) {
	u.writeMu.Lock()
	defer u.writeMu.Unlock()
	defer u.src.Reset(nil)
	var opts tcpip.WriteOptions
	if to.IsValid() {
		u.to = toFull(to)
		opts.To = &u.to
	}
	for {
		by := u.writeBy.wait()
		if err := u.stopped(by); err != nil {
			return 0, err
		}
		u.src.Reset(b)
		n, terr := u.ep.Write(&u.src, opts)
		switch terr.(type) {
		case nil:
			return int(n), nil
		case *tcpip.ErrWouldBlock:
			u.waitFor(u.writable, by)
			continue
		}
		if err := u.stopped(nil); err != nil {
			return 0, err
		}
		return 0, toErrno(terr)
	}
}

func (u *udpSocket) waitFor(token <-chan struct{}, by <-chan struct{}) {
	select {
	case <-token:
	case <-by:
	case <-u.done:
	}
}

// stopped returns the reason why an operation must not go on, if there is one.
func (u *udpSocket) stopped(by <-chan struct{}) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return net.ErrClosed
	case u.failure != nil:
		return u.failure
	case u.refusal != nil:
		err := u.refusal
		u.refusal = nil
		return err
	}
	select {
	case <-by:
		return os.ErrDeadlineExceeded
	default:
		return nil
	}
}

// reject makes one operation fail with err.
func (u *udpSocket) reject(err error) {
	u.mu.Lock()
	u.refusal = err
	u.mu.Unlock()
	waiter.ChannelNotifier(u.readable).NotifyEvent(0)
	waiter.ChannelNotifier(u.writable).NotifyEvent(0)
}

// tally lets small datagrams be counted from now on.
func (u *udpSocket) tally(f Flow) {
	u.flow = f
	u.in = u.s.link.tallies.add(f, u.ep.SocketOptions())
}

// abort makes all operations fail with err; false if the socket ended before.
func (u *udpSocket) abort(err error) bool {
	u.mu.Lock()
	if u.closed || u.failure != nil {
		u.mu.Unlock()
		return false
	}
	u.failure = err
	close(u.done)
	u.mu.Unlock()
	u.s.link.tallies.remove(u.flow, u.in)
	u.ep.Close()
	return true
}

// close reports whether it was the first to close the socket.
func (u *udpSocket) close() bool {
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return false
	}
	u.closed = true
	if u.failure == nil {
		close(u.done)
	}
	u.mu.Unlock()
	u.readBy.set(time.Time{})
	u.writeBy.set(time.Time{})
	u.s.link.tallies.remove(u.flow, u.in)
	u.ep.Close()
	return true
}

func (u *udpSocket) setDeadline(d *deadline, t time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return u.opError("set", nil, net.ErrClosed)
	}
	d.set(t)
	return nil
}

// LocalAddr returns our address, a *net.UDPAddr.
func (u *udpSocket) LocalAddr() net.Addr { return udpAddr(u.local) }

// SetDeadline sets both deadlines.
func (u *udpSocket) SetDeadline(t time.Time) error {
	if err := u.SetReadDeadline(t); err != nil {
		return err
	}
	return u.SetWriteDeadline(t)
}

// SetReadDeadline makes reads fail with os.ErrDeadlineExceeded from t on. The zero time
// means never.
func (u *udpSocket) SetReadDeadline(t time.Time) error { return u.setDeadline(&u.readBy, t) }

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded from t on. The zero
// time means never.
func (u *udpSocket) SetWriteDeadline(t time.Time) error { return u.setDeadline(&u.writeBy, t) }

func (u *udpSocket) opError(op string, remote net.Addr, err error) error {
	return &net.OpError{Op: op, Net: "udp", Source: u.LocalAddr(), Addr: remote, Err: err}
}

// PacketConn is a UDP socket that is not connected.
type PacketConn struct{ *udpSocket }

var _ net.PacketConn = (*PacketConn)(nil)

// ListenUDP opens a UDP socket. network is "udp", "udp4" or "udp6"; addresses
// and errors are as for Listen.
func (s *Stack) ListenUDP(network string, addr netip.AddrPort) (*PacketConn, error) {
	fail := func(err error) (*PacketConn, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: udpAddr(addr), Err: s.orClosed(err)}
	}
	proto, v6only, full, err := bindAddr("udp", network, addr)
	if err != nil {
		return fail(err)
	}
	u, err := s.newUDP(proto, v6only)
	if err != nil {
		return fail(err)
	}
	if terr := u.ep.Bind(full); terr != nil {
		u.ep.Close()
		return fail(toErrno(terr))
	}
	local, terr := u.ep.GetLocalAddress()
	if terr != nil {
		u.ep.Close()
		return fail(toErrno(terr))
	}
	u.local = netip.AddrPortFrom(anyAddr(full.Addr, proto), local.Port)
	u.tally(Flow{Proto: UDP, Local: u.local})
	p := &PacketConn{u}
	if err := s.track(func() { s.packets[p] = struct{}{} }); err != nil {
		s.link.tallies.remove(u.flow, u.in)
		u.ep.Close()
		return fail(err)
	}
	return p, nil
}

// ReadFrom receives a datagram; the address is a *net.UDPAddr. What does not
// fit into b is lost.
func (p *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := p.ReadFromUDPAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, udpAddr(from), nil
}

// ReadFromUDPAddrPort is ReadFrom without allocating the address.
func (p *PacketConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := p.read(b)
	if err != nil {
		err = p.opError("read", nil, err)
	}
	return n, from, err
}

// WriteTo sends a datagram to a *net.UDPAddr.
func (p *PacketConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	a, ok := addr.(*net.UDPAddr)
	if !ok || a == nil {
		return 0, p.opError("write", addr, syscall.EINVAL)
	}
	return p.WriteToUDPAddrPort(b, a.AddrPort())
}

// WriteToUDPAddrPort is WriteTo without allocating the address.
func (p *PacketConn) WriteToUDPAddrPort(b []byte, addr netip.AddrPort) (int, error) {
	var n int
	err := error(syscall.EINVAL)
	if addr.IsValid() && addr.Addr().Zone() == "" {
		n, err = p.write(b, unmap(addr))
	}
	if err != nil {
		err = p.opError("write", udpAddr(addr), err)
	}
	return n, err
}

// Close closes the socket; waiting operations return net.ErrClosed.
func (p *PacketConn) Close() error {
	if !p.close() {
		return p.opError("close", nil, net.ErrClosed)
	}
	p.s.untrack(func() { delete(p.s.packets, p) })
	return nil
}

// UDPConn is a UDP socket connected to one address. ICMP "port unreachable" is
// ECONNREFUSED from the next operation.
type UDPConn struct{ *udpSocket }

var _ net.Conn = (*UDPConn)(nil)

// DialUDP connects a UDP socket to remote from the own address local; the zero Addr
// lets the stack choose. Nothing is sent.
func (s *Stack) DialUDP(local netip.Addr, remote netip.AddrPort) (*UDPConn, error) {
	local, remote = local.Unmap(), unmap(remote)
	fail := func(err error) (*UDPConn, error) {
		return nil, &net.OpError{Op: "dial", Net: "udp", Addr: udpAddr(remote), Err: s.orClosed(err)}
	}
	if err := checkDial(local, remote); err != nil {
		return fail(err)
	}
	sock, err := s.newUDP(protocolOf(remote.Addr()), remote.Addr().Is6())
	if err != nil {
		return fail(err)
	}
	if local.IsValid() {
		if terr := sock.ep.Bind(tcpip.FullAddress{Addr: toAddress(local)}); terr != nil {
			sock.ep.Close()
			return fail(toErrno(terr))
		}
	}
	if terr := sock.ep.Connect(toFull(remote)); terr != nil {
		sock.ep.Close()
		return fail(toErrno(terr))
	}
	addr, terr := sock.ep.GetLocalAddress()
	if terr != nil {
		sock.ep.Close()
		return fail(toErrno(terr))
	}
	sock.local = fromFull(addr)
	u := &UDPConn{sock}
	u.tally(Flow{Proto: UDP, Local: sock.local, Remote: remote})
	if err := s.track(func() { s.flows[u.flow] = u }); err != nil {
		s.link.tallies.remove(u.flow, u.in)
		sock.ep.Close()
		return fail(err)
	}
	return u, nil
}

// Flow returns the addresses of the connection.
func (u *UDPConn) Flow() Flow { return u.flow }

// RemoteAddr returns the connected address, a *net.UDPAddr.
func (u *UDPConn) RemoteAddr() net.Addr { return udpAddr(u.flow.Remote) }

// Read receives a datagram. What does not fit into b is lost.
func (u *UDPConn) Read(b []byte) (int, error) {
	n, _, err := u.read(b)
	if err != nil {
		err = u.opError("read", u.RemoteAddr(), err)
	}
	return n, err
}

// Write sends a datagram.
func (u *UDPConn) Write(b []byte) (int, error) {
	n, err := u.write(b, netip.AddrPort{})
	if err != nil {
		err = u.opError("write", u.RemoteAddr(), err)
	}
	return n, err
}

// Close closes the socket; waiting operations return net.ErrClosed.
func (u *UDPConn) Close() error {
	// Out of the table first: once the port is free another socket may take
	// the same flow.
	u.s.untrack(func() {
		if u.s.flows[u.flow] == u {
			delete(u.s.flows, u.flow)
		}
	})
	if !u.close() {
		return u.opError("close", u.RemoteAddr(), net.ErrClosed)
	}
	return nil
}
