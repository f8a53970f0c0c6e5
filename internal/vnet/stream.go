package vnet

import (
	"context"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// end is the sequence number behind everything that is to be sent, FIN
// included.
func (c *tcpConn) end() int64 {
	e := c.sndUna + int64(len(c.out))
	if c.finAsked {
		e++
	}
	return e
}

// pushLocked sends what the windows allow.
func (c *tcpConn) pushLocked() {
	if c.state != established {
		return
	}
	for c.sndNxt < c.end() {
		inFlight := int(c.sndNxt - c.sndUna)
		room := min(c.window, c.cwnd) - inFlight
		at := int(c.sndNxt - c.sndUna)
		n := min(len(c.out)-at, mss)
		fin := false
		switch {
		case n <= 0: // FIN alone
			n = 0
			fin = true
		case room <= 0 || n > room && inFlight > 0:
			c.timeLocked()
			return
		default:
			n = min(n, room)
			fin = c.finAsked && at+n == len(c.out)
		}
		if c.timed == 0 && c.tries == 0 {
			c.timed, c.timedAt = c.sndNxt+int64(n), time.Now()
		}
		c.emit(c.sndNxt, slices.Clone(c.out[at:at+n]), fin)
		c.sndNxt += int64(n)
		if fin {
			c.sndNxt++
			c.finSent = true
		}
	}
	c.timeLocked()
}

// timeLocked makes sure that a timer runs while something is outstanding.
func (c *tcpConn) timeLocked() {
	if c.timer == nil && c.sndUna < c.end() {
		c.timer = c.h.n.atLocked(time.Now().Add(c.rto), c.timeout)
	}
}

func (c *tcpConn) quietLocked() {
	c.h.n.cancelLocked(c.timer)
	c.timer = nil
}

// resendLocked sends the oldest segment again, or for the first time.
func (c *tcpConn) resendLocked() {
	switch c.state {
	case synSent, synReceived:
		if c.tries == 0 {
			c.timed, c.timedAt = 1, time.Now()
		}
		c.h.sendLocked(&packet{
			proto: TCP, src: c.flow.local, dst: c.flow.remote,
			tcp: segment{syn: true, hasAck: c.state == synReceived, ack: c.rcvNxt, window: recvBuffer},
		})
	case established:
		n := min(len(c.out), mss, int(c.sndNxt-c.sndUna))
		fin := c.finSent && n == len(c.out)
		c.emit(c.sndUna, slices.Clone(c.out[:n]), fin)
	}
	if c.timer == nil {
		c.timer = c.h.n.atLocked(time.Now().Add(c.rto), c.timeout)
	}
}

// timeout is what happens when an acknowledgement does not come.
func (c *tcpConn) timeout() {
	c.timer = nil
	c.timed = 0
	limit := maxTries
	if c.state != established {
		limit = synTries
	}
	if c.tries++; c.tries > limit {
		c.endLocked(syscall.ETIMEDOUT)
		return
	}
	c.rto = min(2*c.rto, maxRTO)
	if c.state != established {
		c.resendLocked()
		return
	}
	if c.window == 0 && c.sndNxt == c.sndUna {
		c.sendLocked(nil, segment{seq: c.sndNxt, probe: true})
		c.timeLocked()
		return
	}
	// From the beginning, slowly.
	c.ssthresh = max(int(c.sndNxt-c.sndUna)/2, 2*mss)
	c.cwnd = mss
	c.inRecov, c.dups = false, 0
	c.sndNxt = c.sndUna
	c.finSent = false
	c.window = max(c.window, mss)
	c.pushLocked()
}

// acknowledged takes what the other end says it has.
func (c *tcpConn) acknowledged(s *segment, data int) {
	ack := s.ack
	switch {
	case ack > c.end():
		return
	case ack > c.sndUna:
		n := int(ack - c.sndUna)
		c.measure(ack)
		data := min(n, len(c.out)) // the rest is our FIN
		c.out = c.out[data:]
		if len(c.out) == 0 {
			c.out = nil
		}
		if n > data {
			c.finAsked, c.finSent = false, false
			c.outDone = true
		}
		c.sndUna = ack
		c.sndNxt = max(c.sndNxt, ack)
		c.window = s.window
		c.dups, c.tries = 0, 0
		c.rto = c.baseRTO()
		c.quietLocked()
		switch {
		case c.inRecov && ack < c.recover:
			c.resendLocked() // the next hole
		case c.inRecov:
			c.inRecov = false
			c.cwnd = c.ssthresh
		case c.cwnd < c.ssthresh:
			c.cwnd += n
		default:
			c.cwnd += max(mss*mss/c.cwnd, 1)
		}
		c.writable.wake()
	case ack == c.sndUna:
		if s.window != c.window {
			c.window = s.window
			if c.window > 0 && c.sndNxt == c.sndUna {
				c.quietLocked()
				c.tries = 0
			}
			return
		}
		if data > 0 || s.fin || c.sndNxt == c.sndUna {
			return
		}
		// Something behind a hole arrived.
		if c.dups++; c.dups == 3 && !c.inRecov {
			c.ssthresh = max(int(c.sndNxt-c.sndUna)/2, 2*mss)
			c.cwnd = c.ssthresh + 3*mss
			c.recover, c.inRecov = c.sndNxt, true
			c.timed = 0
			c.resendLocked()
		} else if c.dups > 3 {
			c.cwnd += mss
		}
	}
}

// doneLocked forgets a connection of which both ends have everything.
func (c *tcpConn) doneLocked() {
	if c.outDone && c.finSeen && c.closed {
		c.endLocked(net.ErrClosed)
	}
}

// measure takes the round-trip time from an acknowledgement.
func (c *tcpConn) measure(ack int64) {
	if c.timed == 0 || ack < c.timed {
		return
	}
	d := time.Since(c.timedAt)
	c.timed = 0
	if c.srtt == 0 {
		c.srtt, c.rttvar = d, d/2
	} else {
		c.rttvar += ((c.srtt - d).Abs() - c.rttvar) / 4
		c.srtt += (d - c.srtt) / 8
	}
	c.rto = c.baseRTO()
}

func (c *tcpConn) baseRTO() time.Duration {
	if c.srtt == 0 {
		return firstRTO
	}
	return min(max(c.srtt+4*c.rttvar, c.srtt+minRTO), maxRTO)
}

// Read implements net.Conn.
func (c *tcpConn) Read(b []byte) (int, error) {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case !c.readBy.IsZero() && !time.Now().Before(c.readBy):
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(b) == 0:
			return 0, nil
		case len(c.in) > 0:
			before := c.freeLocked()
			n := copy(b, c.in)
			if c.in = c.in[n:]; len(c.in) == 0 {
				c.in = nil
			}
			if c.state == established && before < 2*mss && c.freeLocked() >= 2*mss {
				c.ackLocked() // the window is open again
			}
			return n, nil
		case c.finSeen:
			return 0, io.EOF
		case c.state == ended:
			return 0, c.fail("read", sysError("read", c.err))
		}
		if err := c.readable.wait(context.Background(), &c.h.n.mu, c.readBy); err != nil {
			return 0, c.fail("read", err)
		}
	}
}

// Write implements net.Conn.
func (c *tcpConn) Write(b []byte) (n int, err error) {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	for {
		switch {
		case c.closed || c.finAsked || c.outDone:
			return n, c.fail("write", net.ErrClosed)
		case c.state == ended:
			err := c.err
			if err == syscall.ECONNRESET && n == 0 {
				err = syscall.EPIPE
			}
			return n, c.fail("write", sysError("write", err))
		case !c.writeBy.IsZero() && !time.Now().Before(c.writeBy):
			return n, c.fail("write", os.ErrDeadlineExceeded)
		case n == len(b):
			return n, nil
		}
		if room := sendBuffer - len(c.out); room > 0 {
			part := b[n:min(n+room, len(b))]
			c.out = append(c.out, part...)
			n += len(part)
			c.pushLocked()
			if n == len(b) {
				return n, nil
			}
			continue
		}
		if err := c.writable.wait(context.Background(), &c.h.n.mu, c.writeBy); err != nil {
			return n, c.fail("write", err)
		}
	}
}

// Close implements net.Conn. What was written is still sent, for a while.
func (c *tcpConn) Close() error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.closed = true
	c.readable.wake()
	c.writable.wake()
	switch {
	case c.state == ended:
	case len(c.in) > 0:
		c.resetLocked() // as Linux: what nobody read is lost, and the other end hears of it
	default:
		c.finishLocked()
		c.orphan = c.h.n.atLocked(time.Now().Add(orphanLife), func() { c.endLocked(net.ErrClosed) })
		c.doneLocked()
	}
	return nil
}

// CloseWrite ends the stream in this direction.
func (c *tcpConn) CloseWrite() error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	if c.closed || c.state == ended {
		return c.fail("close", net.ErrClosed)
	}
	c.finishLocked()
	return nil
}

func (c *tcpConn) finishLocked() {
	if !c.finAsked && !c.outDone {
		c.finAsked = true
		c.pushLocked()
	}
}

func (c *tcpConn) fail(op string, err error) error {
	if err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// LocalAddr implements net.Conn.
func (c *tcpConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.flow.local) }

// RemoteAddr implements net.Conn.
func (c *tcpConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.flow.remote) }

// SetDeadline implements net.Conn.
func (c *tcpConn) SetDeadline(t time.Time) error { return c.setDeadlines(&t, &t) }

// SetReadDeadline implements net.Conn.
func (c *tcpConn) SetReadDeadline(t time.Time) error { return c.setDeadlines(&t, nil) }

// SetWriteDeadline implements net.Conn.
func (c *tcpConn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(nil, &t) }

func (c *tcpConn) setDeadlines(read, write *time.Time) error {
	c.h.n.mu.Lock()
	defer c.h.n.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	if read != nil {
		c.readBy = *read
		c.readable.wake()
	}
	if write != nil {
		c.writeBy = *write
		c.writable.wake()
	}
	return nil
}
