package vnet

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"
)

// TCP as far as its user sees it: a handshake that is refused or times out,
// retransmission with back-off, flow control, congestion windows without
// selective acknowledgements, resets. There is no TIME-WAIT, no keep-alive and
// no path MTU discovery: segments are small enough for every link.
const (
	mss        = minMTU - ip6Header - tcpHeader
	sendBuffer = 256 << 10
	recvBuffer = 256 << 10
	firstCwnd  = 10 * mss
	maxOoo     = recvBuffer / mss
	minRTO     = 200 * time.Millisecond
	firstRTO   = time.Second
	maxRTO     = 120 * time.Second
	synTries   = 6  // after the first, as Linux: 127 s in all
	maxTries   = 15 // of data
	orphanLife = 60 * time.Second
	backlog    = 1024
)

// segment is the TCP part of a packet. Sequence numbers count from 0 and never
// wrap.
type segment struct {
	syn, fin, rst bool
	hasAck        bool
	probe         bool // asks for an acknowledgement
	seq, ack      int64
	window        int
}

type tcpState int

const (
	synSent tcpState = iota
	synReceived
	established
	ended
)

// tcpConn is one end of a connection.
type tcpConn struct {
	h    *Host
	flow flow
	from *listener // where it waits to be accepted

	// Under Net.mu.
	state  tcpState
	err    error // why it ended
	closed bool  // by the user

	out      []byte // from sndUna on, but SYN and FIN
	finAsked bool   // send FIN after out
	finSent  bool
	outDone  bool // the other end has everything, FIN included
	sndUna   int64
	sndNxt   int64
	window   int // of the other end
	cwnd     int
	ssthresh int
	dups     int
	recover  int64
	inRecov  bool

	rcvNxt  int64
	in      []byte
	ooo     map[int64]*packet
	finSeen bool

	srtt, rttvar time.Duration
	rto          time.Duration
	timed        int64 // sequence number whose acknowledgement is timed, 0 = none
	timedAt      time.Time
	tries        int
	timer        *event
	orphan       *event

	readBy, writeBy time.Time
	readable        waiters // also for the end of the handshake
	writable        waiters
}

// DialTCP connects; network is "tcp", "tcp4" or "tcp6", addr an IP address and
// a port.
func (h *Host) DialTCP(ctx context.Context, network, addr string) (net.Conn, error) {
	b, err := parse("tcp", network, addr)
	fail := func(err error) (net.Conn, error) {
		op := &net.OpError{Op: "dial", Net: network, Err: err}
		if b.addr.IsValid() {
			op.Addr = net.TCPAddrFromAddrPort(b.addr)
		}
		return nil, op
	}
	if err != nil {
		return fail(err)
	}
	remote := b.addr
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if h.n.closed {
		return fail(net.ErrClosed)
	}
	_, src, err := h.routeLocked(remote.Addr())
	if err != nil {
		return fail(sysError("connect", err))
	}
	port, ok := h.freePortLocked(func(port uint16) bool {
		return h.tcp[flow{TCP, netip.AddrPortFrom(src, port), remote}] == nil
	})
	if !ok {
		return fail(sysError("connect", syscall.EADDRNOTAVAIL))
	}
	c := h.newConnLocked(flow{TCP, netip.AddrPortFrom(src, port), remote}, synSent)
	c.resendLocked()
	for c.state == synSent {
		if err := c.readable.wait(ctx, &h.n.mu, time.Time{}); err != nil {
			c.endLocked(err)
			return fail(err)
		}
	}
	if c.state == ended {
		return fail(sysError("connect", c.err))
	}
	return c, nil
}

func (h *Host) newConnLocked(f flow, state tcpState) *tcpConn {
	c := &tcpConn{
		h: h, flow: f, state: state, sndNxt: 1, rto: firstRTO,
		cwnd: firstCwnd, ssthresh: 1 << 30, window: mss, ooo: make(map[int64]*packet),
	}
	h.tcp[f] = c
	return c
}

// listener is a listening TCP socket.
type listener struct {
	h *Host
	binding
	// Under Net.mu.
	ready      []*tcpConn
	pending    int // connections not accepted, those in handshakes included
	closed     bool
	acceptable waiters
}

// ListenTCP listens; network is "tcp", "tcp4" or "tcp6". The listener has a
// method SetDeadline.
func (h *Host) ListenTCP(network, addr string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	b, err := parse("tcp", network, addr)
	if err != nil {
		return fail(err)
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if err := h.bindLocked(&b, func() bool {
		return slices.ContainsFunc(h.listened, func(l *listener) bool { return l.overlaps(&b) })
	}); err != nil {
		return fail(err)
	}
	l := &listener{h: h, binding: b}
	h.listened = append(h.listened, l)
	return l, nil
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	l.h.n.mu.Lock()
	defer l.h.n.mu.Unlock()
	for {
		if l.closed {
			return nil, &net.OpError{Op: "accept", Net: l.network, Addr: l.Addr(), Err: net.ErrClosed}
		}
		if len(l.ready) > 0 {
			c := l.ready[0]
			l.ready = l.ready[1:]
			l.pending--
			c.from = nil
			return c, nil
		}
		if err := l.acceptable.wait(context.Background(), &l.h.n.mu, time.Time{}); err != nil {
			return nil, err
		}
	}
}

// Close implements net.Listener. Connections that nobody accepted are reset.
func (l *listener) Close() error {
	l.h.n.mu.Lock()
	defer l.h.n.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "close", Net: l.network, Addr: l.Addr(), Err: net.ErrClosed}
	}
	l.closeLocked()
	return nil
}

func (l *listener) closeLocked() {
	l.closed = true
	l.h.listened = slices.DeleteFunc(l.h.listened, func(o *listener) bool { return o == l })
	for _, c := range l.h.tcp {
		if c.from == l {
			c.resetLocked()
		}
	}
	l.ready = nil
	l.acceptable.wake()
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.addr) }

// inputTCP takes a packet for this host.
func (h *Host) inputTCP(p *packet) {
	f := flow{TCP, p.dst, p.src}
	if c := h.tcp[f]; c != nil {
		c.input(p)
		return
	}
	if p.tcp.rst {
		return
	}
	if p.tcp.syn && !p.tcp.hasAck {
		for _, l := range h.listened {
			if !l.takes(p.dst) {
				continue
			}
			if l.pending >= backlog {
				return // as Linux: the other end tries again
			}
			c := h.newConnLocked(f, synReceived)
			c.from = l
			l.pending++
			c.rcvNxt = 1
			c.window = p.tcp.window
			c.resendLocked()
			return
		}
	}
	h.resetLocked(p)
}

// resetLocked answers a packet that belongs to no connection.
func (h *Host) resetLocked(p *packet) {
	h.sendLocked(&packet{
		proto: TCP, src: p.dst, dst: p.src,
		tcp: segment{rst: true, hasAck: true, seq: p.tcp.ack, ack: p.tcp.seq + int64(len(p.data)) + 1},
	})
}

// input takes a packet of the connection.
func (c *tcpConn) input(p *packet) {
	s := &p.tcp
	if s.rst {
		switch {
		case c.state == synSent:
			c.endLocked(syscall.ECONNREFUSED)
		default:
			c.endLocked(syscall.ECONNRESET)
		}
		return
	}
	switch c.state {
	case ended:
		return
	case synSent:
		if !s.syn || !s.hasAck {
			return
		}
		c.state = established
		c.rcvNxt = 1
		c.measure(1)
		c.sndUna, c.window = 1, s.window
		c.quietLocked()
		c.ackLocked()
		c.readable.wake()
		c.pushLocked()
		return
	case synReceived:
		if s.syn {
			c.resendLocked()
			return
		}
		if !s.hasAck || s.ack < 1 {
			return
		}
		c.state = established
		c.measure(1)
		c.sndUna = 1
		c.quietLocked()
		if l := c.from; l != nil {
			l.ready = append(l.ready, c)
			l.acceptable.wake()
		}
	case established:
		if s.syn {
			c.ackLocked() // our last word was lost
			return
		}
	}
	if s.hasAck {
		c.acknowledged(s, len(p.data))
	}
	if c.state == ended {
		return
	}
	if s.probe {
		c.ackLocked()
	}
	if len(p.data) > 0 || s.fin {
		if c.closed && len(p.data) > 0 {
			// Nobody will read it.
			c.h.resetLocked(p)
			c.endLocked(net.ErrClosed)
			return
		}
		c.received(p)
		c.ackLocked()
	}
	c.pushLocked()
	c.doneLocked()
}

// received puts data in order.
func (c *tcpConn) received(p *packet) {
	if p.tcp.seq > c.rcvNxt {
		if len(c.ooo) < maxOoo {
			c.ooo[p.tcp.seq] = p
		}
		return
	}
	for p != nil {
		seq := p.tcp.seq
		if skip := c.rcvNxt - seq; skip >= 0 && skip <= int64(len(p.data)) && !c.finSeen {
			c.in = append(c.in, p.data[skip:]...)
			c.rcvNxt += int64(len(p.data)) - skip
			if p.tcp.fin {
				c.rcvNxt++
				c.finSeen = true
			}
		}
		p = nil
		for seq, o := range c.ooo {
			if seq <= c.rcvNxt {
				delete(c.ooo, seq)
				if p == nil && seq+int64(len(o.data)) >= c.rcvNxt {
					p = o
				}
			}
		}
	}
	c.readable.wake()
}

func (c *tcpConn) freeLocked() int { return max(recvBuffer-len(c.in), 0) }

// ackLocked tells what has been received.
func (c *tcpConn) ackLocked() { c.emit(c.sndNxt, nil, false) }

// emit sends a segment.
func (c *tcpConn) emit(seq int64, data []byte, fin bool) {
	c.sendLocked(data, segment{fin: fin, seq: seq})
}

func (c *tcpConn) sendLocked(data []byte, s segment) {
	s.hasAck, s.ack, s.window = true, c.rcvNxt, c.freeLocked()
	// Without a route the segment is lost; TCP tries again.
	_ = c.h.sendLocked(&packet{proto: TCP, src: c.flow.local, dst: c.flow.remote, data: data, tcp: s})
}

// endLocked ends the connection without a word to the other end.
func (c *tcpConn) endLocked(err error) {
	if c.state == ended {
		return
	}
	if l := c.from; l != nil {
		l.ready = slices.DeleteFunc(l.ready, func(o *tcpConn) bool { return o == c })
		l.pending--
		c.from = nil
	}
	c.state, c.err = ended, err
	c.out = nil
	c.quietLocked()
	c.h.n.cancelLocked(c.orphan)
	delete(c.h.tcp, c.flow)
	c.readable.wake()
	c.writable.wake()
}

// resetLocked ends the connection for both ends.
func (c *tcpConn) resetLocked() {
	if c.state != ended {
		c.h.sendLocked(&packet{
			proto: TCP, src: c.flow.local, dst: c.flow.remote,
			tcp: segment{rst: true, hasAck: true, seq: c.sndNxt, ack: c.rcvNxt},
		})
	}
	c.endLocked(net.ErrClosed)
}
