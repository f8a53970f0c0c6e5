package netstack

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// dial is a connection attempt that can be refused from outside.
type dial struct {
	mu       sync.Mutex // guards the fields below
	err      error      // why it was refused
	finished bool       // the outcome is known
	refused  chan struct{}
}

// reject makes the attempt fail with err and reports whether it was still open.
func (d *dial) reject(err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.finished {
		return false
	}
	if d.err == nil {
		d.err = err
		close(d.refused)
	}
	return true
}

// finish ends the attempt and returns the refusal, if there was one.
func (d *dial) finish() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.finished = true
	return d.err
}

// DialTCP connects to remote from the own address local; the zero Addr lets the
// stack choose. Errors are *net.OpError as net.Dialer has them: ECONNREFUSED,
// ETIMEDOUT, EADDRNOTAVAIL when local is not ours, ENETUNREACH
// without an own address of that family, ctx.Err() (for a deadline one that also
// matches os.ErrDeadlineExceeded), the error of Reject or Abort, net.ErrClosed.
func (s *Stack) DialTCP(ctx context.Context, local netip.Addr, remote netip.AddrPort) (*Conn, error) {
	local, remote = local.Unmap(), unmap(remote)
	fail := func(err error) (*Conn, error) {
		op := &net.OpError{Op: "dial", Net: "tcp", Addr: tcpAddr(remote), Err: s.orClosed(err)}
		if local.IsValid() {
			op.Source = tcpAddr(netip.AddrPortFrom(local, 0))
		}
		return nil, op
	}
	if err := checkDial(local, remote); err != nil {
		return fail(err)
	}
	if ctx.Err() != nil {
		return fail(ctxError(ctx))
	}
	st, err := s.gVisor()
	if err != nil {
		return fail(err)
	}
	var wq waiter.Queue
	tep, terr := st.NewEndpoint(tcp.ProtocolNumber, protocolOf(remote.Addr()), &wq)
	if terr != nil {
		return fail(toErrno(terr))
	}
	ep := tep.(*tcp.Endpoint)
	d := &dial{refused: make(chan struct{})}
	if err := s.track(func() { s.dials[ep] = d; s.wg.Add(1) }); err != nil {
		ep.Close()
		return fail(err)
	}
	defer s.wg.Done()
	c := newConn(s, ep, &wq)
	err = c.reserve(false)
	if err == nil {
		err = s.connect(ctx, c, d, local, remote)
	}
	if refusal := d.finish(); refusal != nil {
		err = refusal
	}
	if err == nil {
		c.control()
		c.flow, c.asked = flowOf(ep), true
		c.in = s.link.tallies.add(c.flow, ep.SocketOptions())
		err = s.track(func() { delete(s.dials, ep); s.conns[ep] = c })
	}
	if err != nil {
		s.untrack(func() { delete(s.dials, ep) })
		if c.in != nil {
			s.link.tallies.remove(c.flow, c.in)
		}
		c.mu.Lock()
		c.release()
		c.mu.Unlock()
		ep.Abort()
		ep.Close()
		return fail(err)
	}
	return c, nil
}

// connect starts the handshake and waits for its outcome.
func (s *Stack) connect(ctx context.Context, c *Conn, d *dial, local netip.Addr, remote netip.AddrPort) error {
	// Binding takes the port away from every other destination, so only do it
	// where gVisor could choose another address.
	if local.IsValid() && !s.only(local) {
		if terr := c.ep.Bind(tcpip.FullAddress{Addr: toAddress(local)}); terr != nil {
			return toErrno(terr)
		}
	}
	switch terr := c.ep.Connect(toFull(remote)); terr.(type) {
	case nil, *tcpip.ErrConnectStarted:
	default:
		return toErrno(terr)
	}
	for {
		if connecting(c.ep) {
			select {
			case <-c.writable:
			case <-d.refused:
				return net.ErrClosed // replaced by the refusal
			case <-ctx.Done():
				return ctxError(ctx)
			}
			continue
		}
		switch tcp.EndpointState(c.ep.State()) {
		case tcp.StateError, tcp.StateClose:
			if terr := c.ep.LastError(); terr != nil {
				return toErrno(terr)
			}
			return syscall.ECONNREFUSED
		}
		return nil
	}
}

// checkDial refuses addresses that nobody can dial, or not from local. Both are
// unmapped; local may be zero.
func checkDial(local netip.Addr, remote netip.AddrPort) error {
	to := remote.Addr()
	switch {
	case !remote.IsValid() || to.Zone() != "":
		return &net.AddrError{Err: "invalid address", Addr: remote.String()}
	case to.IsUnspecified() || to.IsLoopback() || to.IsMulticast():
		return syscall.ENETUNREACH
	case local.IsValid() && local.Is4() != to.Is4():
		return &net.AddrError{Err: "mismatched local address type", Addr: local.String()}
	}
	return nil
}
