package vnet

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"
)

// maxReceive is how many bytes wait in a UDP socket before more are lost.
const maxReceive = 4 << 20

// udpConn is a UDP socket.
type udpConn struct {
	h *Host
	binding
	// Under Net.mu.
	queue    []datagram
	size     int
	df       bool
	closed   bool
	readBy   time.Time
	writeBy  time.Time
	readable waiters
}

type datagram struct {
	from netip.AddrPort
	data []byte
}

// ListenUDP opens a UDP socket; network is "udp", "udp4" or "udp6". It reads
// and writes *net.UDPAddr. Like a socket of the system it has a method
// SetDontFragment(bool) error: with it, writes larger than what the way is
// known to take fail with EMSGSIZE, without it they go in fragments.
func (h *Host) ListenUDP(ctx context.Context, network, addr string) (net.PacketConn, error) {
	fail := func(err error) (net.PacketConn, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	b, err := parse("udp", network, addr)
	if err != nil {
		return fail(err)
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if err := h.bindLocked(&b, func() bool {
		return slices.ContainsFunc(h.udp, func(c *udpConn) bool { return c.overlaps(&b) })
	}); err != nil {
		return fail(err)
	}
	c := &udpConn{h: h, binding: b}
	h.udp = append(h.udp, c)
	return c, nil
}

// udpAtLocked finds the socket for packets to a.
func (h *Host) udpAtLocked(a netip.AddrPort) (found *udpConn) {
	for _, c := range h.udp {
		if c.takes(a) && (found == nil || found.addr.Addr().IsUnspecified()) {
			found = c
		}
	}
	return found
}

func (c *udpConn) deliver(p *packet) {
	if c.size+len(p.data) > maxReceive {
		c.h.n.stats.Lost++
		return
	}
	c.queue = append(c.queue, datagram{p.src, p.data})
	c.size += len(p.data)
	c.readable.wake()
}

// ReadFrom implements net.PacketConn.
func (c *udpConn) ReadFrom(b []byte) (int, net.Addr, error) {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	for {
		if c.closed {
			return 0, nil, c.fail("read", nil, net.ErrClosed)
		}
		if len(c.queue) > 0 {
			d := c.queue[0]
			c.queue[0] = datagram{}
			if c.queue = c.queue[1:]; len(c.queue) == 0 {
				c.queue = nil
			}
			c.size -= len(d.data)
			return copy(b, d.data), net.UDPAddrFromAddrPort(d.from), nil
		}
		if err := c.readable.wait(context.Background(), &c.h.n.mu, c.readBy); err != nil {
			return 0, nil, c.fail("read", nil, err)
		}
	}
}

// WriteTo implements net.PacketConn.
func (c *udpConn) WriteTo(b []byte, to net.Addr) (int, error) {
	u, ok := to.(*net.UDPAddr)
	if !ok {
		return 0, c.fail("write", to, syscall.EINVAL)
	}
	dst := u.AddrPort()
	dst = netip.AddrPortFrom(dst.Addr().Unmap().WithZone(""), dst.Port())
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	switch {
	case c.closed:
		return 0, c.fail("write", to, net.ErrClosed)
	case !c.writeBy.IsZero() && !time.Now().Before(c.writeBy):
		return 0, c.fail("write", to, os.ErrDeadlineExceeded)
	case dst.Addr().Is4() && !c.v4 || dst.Addr().Is6() && !c.v6:
		return 0, c.fail("write", to, sysError("sendto", syscall.EAFNOSUPPORT))
	case dst.Port() == 0 || !dst.IsValid():
		return 0, c.fail("write", to, sysError("sendto", syscall.EINVAL))
	case len(b) > 65535-ip6Header-udpHeader:
		return 0, c.fail("write", to, sysError("sendto", syscall.EMSGSIZE))
	}
	src := c.addr
	if src.Addr().IsUnspecified() && dst.Addr().Is6() {
		src = netip.AddrPortFrom(netip.IPv6Unspecified(), src.Port())
	}
	p := &packet{proto: UDP, src: src, dst: dst, data: slices.Clone(b)}
	if mtu := c.h.mtuLocked(dst.Addr()); p.size() > mtu {
		if c.df {
			return 0, c.fail("write", to, sysError("sendto", syscall.EMSGSIZE))
		}
		p.frag = mtu
	}
	if err := c.h.sendLocked(p); err != nil {
		return 0, c.fail("write", to, sysError("sendto", err))
	}
	return len(b), nil
}

func (c *udpConn) fail(op string, to net.Addr, err error) error {
	return &net.OpError{Op: op, Net: c.network, Source: c.LocalAddr(), Addr: to, Err: err}
}

// Close implements net.PacketConn.
func (c *udpConn) Close() error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	if c.closed {
		return c.fail("close", nil, net.ErrClosed)
	}
	c.closeLocked()
	return nil
}

func (c *udpConn) closeLocked() {
	c.closed = true
	c.queue, c.size = nil, 0
	c.h.udp = slices.DeleteFunc(c.h.udp, func(o *udpConn) bool { return o == c })
	c.readable.wake()
}

// LocalAddr implements net.PacketConn. The address is not that of an
// interface unless the socket is bound to one.
func (c *udpConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.addr) }

// SetDontFragment says that datagrams are never to be fragmented.
func (c *udpConn) SetDontFragment(on bool) error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	c.df = on
	return nil
}

// SetDeadline implements net.PacketConn.
func (c *udpConn) SetDeadline(t time.Time) error { return c.setDeadlines(&t, &t) }

// SetReadDeadline implements net.PacketConn.
func (c *udpConn) SetReadDeadline(t time.Time) error { return c.setDeadlines(&t, nil) }

// SetWriteDeadline implements net.PacketConn.
func (c *udpConn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(nil, &t) }

func (c *udpConn) setDeadlines(read, write *time.Time) error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	if c.closed {
		return c.fail("set", nil, net.ErrClosed)
	}
	if read != nil {
		c.readBy = *read
		c.readable.wake()
	}
	if write != nil {
		c.writeBy = *write
	}
	return nil
}
