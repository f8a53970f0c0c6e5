package netstack

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Conn is a TCP connection. It behaves as *net.TCPConn does. Its addresses
// are *net.TCPAddr.
type Conn struct {
	s    *Stack
	ep   *tcp.Endpoint
	flow Flow
	in   *tally // small segments; nil before track

	readable, writable   chan struct{} // a token when gVisor says that it may be worth trying
	readEntry, writeWait waiter.Entry
	readBy, writeBy      deadline

	readMu sync.Mutex // serialises Read; guards the fields below
	dst    tcpip.SliceWriter
	window window // but for extra, which mu guards
	asked  bool   // we dialled, and Read has not waited yet
	eof    bool   // Read saw the end of the stream

	writeMu sync.Mutex // serialises Write; guards the fields below
	src     bytes.Reader
	out     pieces
	wrote   atomic.Int64

	done chan struct{} // closed by Close or fail

	mu       sync.Mutex // guards the fields below
	closed   bool       // by Close
	failure  error      // by fail
	broken   error      // the error that ended the connection; gVisor tells it only once
	reserved int64      // of the stack's receive memory, but for window.extra; 0 = none, or given back
	room     int64      // the same of what is to be sent: the size of the send buffer, or what it is to be
}

var _ net.Conn = (*Conn)(nil)

func newConn(s *Stack, ep *tcp.Endpoint, wq *waiter.Queue) *Conn {
	c := &Conn{
		s:        s,
		ep:       ep,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		done:     make(chan struct{}),
	}
	c.readBy.init()
	c.writeBy.init()
	c.readEntry.Init(waiter.ChannelNotifier(c.readable), waiter.ReadableEvents|waiter.EventErr|waiter.EventHUp)
	c.writeWait.Init(waiter.ChannelNotifier(c.writable), waiter.WritableEvents|waiter.EventErr|waiter.EventHUp)
	wq.EventRegister(&c.readEntry)
	wq.EventRegister(&c.writeWait)
	ops := ep.SocketOptions()
	ops.SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(keepAliveIdle), tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// These cannot fail on a TCP endpoint.
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	return c
}

// Flow returns the addresses of the connection.
func (c *Conn) Flow() Flow { return c.flow }

// LocalAddr returns our address, a *net.TCPAddr.
func (c *Conn) LocalAddr() net.Addr { return tcpAddr(c.flow.Local) }

// RemoteAddr returns the address of the other side, a *net.TCPAddr.
func (c *Conn) RemoteAddr() net.Addr { return tcpAddr(c.flow.Remote) }

// Read reads from the connection. io.EOF means that the other side ended its
// stream or that CloseRead was called; a connection that broke never reads as io.EOF
// before that.
func (c *Conn) Read(b []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	for {
		by := c.readBy.wait()
		if err := c.stopped(by); err != nil {
			return 0, c.opError("read", err)
		}
		if len(b) == 0 {
			return 0, nil
		}
		c.dst = b
		res, terr := c.ep.Read(&c.dst, tcpip.ReadOptions{})
		c.dst = nil
		switch terr.(type) {
		case nil:
			if res.Count < len(b) {
				c.in.empty()
			}
			c.widen(res.Count)
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			c.in.empty()
			if c.asked {
				c.asked = false
				c.s.link.hold.release(c.flow)
			}
			c.waitFor(c.readable, by)
			continue
		}
		if err := c.stopped(nil); err != nil {
			return 0, c.opError("read", err)
		}
		_, end := terr.(*tcpip.ErrClosedForReceive)
		if c.eof || end && tcp.EndpointState(c.ep.State()) != tcp.StateError {
			c.eof = true
			return 0, io.EOF
		}
		return 0, c.opError("read", c.breakWith(terr, syscall.ECONNRESET))
	}
}

// Write writes all of b, or returns how much it wrote and why it stopped.
func (c *Conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	defer c.src.Reset(nil)
	done := 0
	for {
		by := c.writeBy.wait()
		if err := c.stopped(by); err != nil {
			return done, c.opError("write", err)
		}
		if done == len(b) {
			return done, nil
		}
		c.src.Reset(b[done:])
		n, terr := c.ep.Write(&c.src, tcpip.WriteOptions{})
		done += int(n)
		c.wrote.Add(n)
		c.out.add(c.ep.SocketOptions(), int(n))
		switch terr.(type) {
		case nil:
			if done == len(b) {
				return done, nil
			}
			continue
		case *tcpip.ErrWouldBlock:
			if !c.grow() {
				c.waitFor(c.writable, by)
			}
			continue
		}
		if err := c.stopped(nil); err != nil {
			return done, c.opError("write", err)
		}
		return done, c.opError("write", c.breakWith(terr, syscall.EPIPE))
	}
}

// waitFor waits for a token or a reason to stop, which stopped then tells.
func (c *Conn) waitFor(token <-chan struct{}, by <-chan struct{}) {
	select {
	case <-token:
	case <-by:
	case <-c.done:
	}
}

// stopped returns the reason why an operation must not go on, if there is one.
func (c *Conn) stopped(by <-chan struct{}) error {
	select {
	case <-c.done:
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.closed {
			return net.ErrClosed
		}
		return c.failure
	default:
	}
	select {
	case <-by:
		return os.ErrDeadlineExceeded
	default:
		return nil
	}
}

// breakWith remembers why the connection broke and returns it; other is for when
// gVisor told the other direction already and nobody wrote it down.
func (c *Conn) breakWith(terr tcpip.Error, other error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch terr.(type) {
	case *tcpip.ErrClosedForReceive, *tcpip.ErrClosedForSend:
		if c.broken != nil {
			return c.broken
		}
		return other
	}
	c.broken = toErrno(terr)
	return c.broken
}

// fail makes all operations return err. The caller aborts the endpoint.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && c.failure == nil {
		c.failure = err
		close(c.done)
	}
}

func (c *Conn) failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure != nil
}

// reset sends a reset to the other side and forgets the connection.
func (c *Conn) reset(err error) {
	c.fail(err)
	c.ep.Abort()
	c.Close()
}

// Close closes the connection. What was written is still sent, in the background;
// if there is unread data the other side gets a reset, as TCP asks for.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	held := min(c.room, c.wrote.Load())
	c.release()
	aborted := c.failure != nil
	if !aborted {
		close(c.done)
	}
	c.mu.Unlock()
	c.readBy.set(time.Time{})
	c.writeBy.set(time.Time{})
	c.s.untrack(func() { delete(c.s.conns, c.ep) })
	if c.in != nil {
		c.s.link.tallies.remove(c.flow, c.in)
	}
	if aborted {
		// Whoever aborted the connection may not have got to its endpoint yet,
		// and a plain close would tell the other side of a regular end.
		c.ep.Abort()
	}
	c.ep.Close()
	c.s.budget.linger(c.ep, held)
	return nil
}

// reserve takes the connection's share of the stack's budget. accepted says that it
// is a peer's.
func (c *Conn) reserve(accepted bool) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reserved, c.room, err = c.s.budget.open(c.ep, accepted)
	return err
}

// release gives the share back. The caller holds mu.
func (c *Conn) release() {
	if c.reserved > 0 {
		c.s.budget.close(c.reserved, c.window.extra, c.room)
		c.reserved, c.window.extra, c.room = 0, 0, 0
	}
}

// CloseWrite ends our stream; the other side reads io.EOF after the data.
func (c *Conn) CloseWrite() error { return c.shutdown(tcpip.ShutdownWrite) }

// CloseRead makes Read return io.EOF after the data already received.
func (c *Conn) CloseRead() error { return c.shutdown(tcpip.ShutdownRead) }

func (c *Conn) shutdown(how tcpip.ShutdownFlags) error {
	if err := c.stopped(nil); err != nil {
		return c.opError("close", err)
	}
	if terr := c.ep.Shutdown(how); terr != nil {
		return c.opError("close", toErrno(terr))
	}
	return nil
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline makes Read fail with os.ErrDeadlineExceeded from t on. The zero
// time means never.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readBy, t) }

// SetWriteDeadline makes Write fail with os.ErrDeadlineExceeded from t on. The zero
// time means never.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeBy, t) }

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	d.set(t)
	return nil
}

// SetNoDelay chooses whether small writes are sent at once (the default) or
// collected while data is unacknowledged (Nagle's algorithm).
func (c *Conn) SetNoDelay(noDelay bool) error {
	c.ep.SocketOptions().SetDelayOption(!noDelay)
	return nil
}

// SetKeepAlive chooses whether an idle connection is probed; the default is yes.
func (c *Conn) SetKeepAlive(on bool) error {
	c.ep.SocketOptions().SetKeepAlive(on)
	return nil
}

// SetKeepAlivePeriod sets after how much idle time the first probe is sent and how far
// apart the next are. The defaults are two minutes and 30 seconds.
func (c *Conn) SetKeepAlivePeriod(d time.Duration) error {
	idle, interval := tcpip.KeepaliveIdleOption(d), tcpip.KeepaliveIntervalOption(d)
	for _, opt := range []tcpip.SettableSocketOption{&idle, &interval} {
		if terr := c.ep.SetSockOpt(opt); terr != nil {
			return c.opError("set", toErrno(terr))
		}
	}
	return nil
}

// SetLinger with 0 makes Close discard unsent data and reset the connection; any
// other value restores the default, which sends it in the background.
func (c *Conn) SetLinger(sec int) error {
	c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: sec == 0})
	return nil
}

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
