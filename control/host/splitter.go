package host

import (
	"bufio"
	"net"
	"sync"
	"time"

	"mesh/control/server"
)

const (
	// sniffTimeout is how long a connection may take to send its first byte.
	sniffTimeout = 10 * time.Second
	// maxSniffing bounds the connections whose first byte is awaited; more are
	// closed at once, so that silent ones cannot exhaust the process.
	maxSniffing = 4096
	// maxSniffingSource is how many of these may come from one source address.
	maxSniffingSource = 1024

	tlsHandshakeByte = 0x16
)

// splitter tells TLS from plain text by the first byte of each connection of
// one listener, and gives each kind a listener of its own.
type splitter struct {
	ln         net.Listener
	plain, tls *kindListener
	slots      *server.Places
	done       chan struct{}
	once       sync.Once
	wg         sync.WaitGroup
}

func newSplitter(ln net.Listener) *splitter {
	s := &splitter{ln: ln, slots: server.NewPlaces(maxSniffing, maxSniffingSource), done: make(chan struct{})}
	s.plain, s.tls = newKindListener(ln.Addr()), newKindListener(ln.Addr())
	return s
}

// run accepts until the listener is closed.
func (s *splitter) run() error {
	defer s.wg.Wait()
	var delay time.Duration
	for {
		c, err := s.ln.Accept()
		if err != nil {
			// Out of descriptors is a passing state, not an end.
			if t, ok := err.(interface{ Temporary() bool }); ok && t.Temporary() {
				delay = min(max(2*delay, 5*time.Millisecond), time.Second)
				select {
				case <-time.After(delay):
					continue
				case <-s.done:
				}
			}
			return err
		}
		delay = 0
		leave, ok := s.slots.Enter(c.RemoteAddr())
		if !ok {
			c.Close()
			continue
		}
		s.wg.Go(func() {
			defer leave()
			s.sort(c)
		})
	}
}

// sort reads the first byte of c and passes c on.
func (s *splitter) sort(c net.Conn) {
	stop := make(chan struct{})
	defer close(stop)
	s.wg.Go(func() {
		select {
		case <-s.done:
			c.SetReadDeadline(time.Unix(1, 0))
		case <-stop:
		}
	})
	c.SetReadDeadline(time.Now().Add(sniffTimeout))
	r := bufio.NewReaderSize(c, 16)
	first, err := r.Peek(1)
	if err != nil {
		c.Close()
		return
	}
	c.SetReadDeadline(time.Time{})
	to := s.plain
	if first[0] == tlsHandshakeByte {
		to = s.tls
	}
	head, _ := r.Peek(r.Buffered())
	to.offer(&headConn{Conn: c, head: append([]byte(nil), head...)})
}

// Close ends the accepting; connections that were passed on live on.
func (s *splitter) Close() {
	s.once.Do(func() {
		close(s.done)
		s.ln.Close()
		s.plain.Close()
		s.tls.Close()
	})
}

// headConn is a connection of which some bytes were read already.
type headConn struct {
	net.Conn
	head []byte // owned by the one reader
}

func (c *headConn) Read(b []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// kindListener hands out connections of one kind.
type kindListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newKindListener(addr net.Addr) *kindListener {
	return &kindListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *kindListener) offer(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

func (l *kindListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *kindListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *kindListener) Addr() net.Addr { return l.addr }
