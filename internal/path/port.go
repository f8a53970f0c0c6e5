package path

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// port is a pair of UDP sockets with their readers. It is of one node, or of
// several of a process that share it, see shared.go.
type port struct {
	listen  func(ctx context.Context, port uint16) (*sockets, error)
	fixed   uint16                                        // the UDP port asked for, 0 = any
	spacing time.Duration                                 // rebind does nothing so soon after the last time
	take    func(from netip.AddrPort, datagrams [][]byte) // by the readers
	log     *zap.Logger

	ctx     context.Context
	cancel  context.CancelFunc
	readers sync.WaitGroup
	socks   atomic.Pointer[sockets] // never nil; empty before open, and while there are none
	broken  atomic.Bool             // a socket failed

	mu     sync.Mutex // guards what follows, and opening and closing of sockets
	closed bool
	opened time.Time // when sockets were opened last
}

func (t *port) init(listen func(context.Context, uint16) (*sockets, error), take func(netip.AddrPort, [][]byte), log *zap.Logger) {
	t.listen, t.take, t.log = listen, take, log
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.socks.Store(&sockets{})
}

// open opens the sockets and starts their readers.
func (t *port) open() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.openLocked(t.fixed)
}

func (t *port) openLocked(number uint16) error {
	if t.closed {
		return net.ErrClosed
	}
	s, err := t.listen(t.ctx, number)
	if err != nil {
		return err
	}
	t.opened = time.Now()
	t.socks.Store(s)
	t.broken.Store(false)
	s.each(func(s *socket) { t.readers.Go(func() { t.read(s) }) })
	return nil
}

// number returns the UDP port, that of IPv4 if they differ; 0 without sockets.
func (t *port) number() uint16 {
	s := t.socks.Load()
	if s.v4 != nil {
		return s.port4()
	}
	return s.port6()
}

// rebind replaces the sockets, on the same port if it is still free. Those who
// share them come with the same news at about the same time: it is done once,
// for whoever saw the sockets that are there.
func (t *port) rebind(seen *sockets) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if seen != t.socks.Load() || t.spacing > 0 && time.Since(t.opened) < t.spacing {
		return nil
	}
	number := t.fixed
	if number == 0 {
		number = t.number()
	}
	t.socks.Swap(&sockets{}).each(func(s *socket) { s.pc.Close() })
	err := t.openLocked(number)
	if err != nil && t.fixed == 0 && !t.closed {
		err = t.openLocked(0)
	}
	return err
}

// shut closes the sockets for good. The readers end soon after.
func (t *port) shut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.cancel()
	t.socks.Load().each(func(s *socket) { s.pc.Close() })
}

// read hands on what comes to a socket until it is closed.
func (t *port) read(s *socket) {
	r := s.reader()
	defer r.release()
	var failed time.Duration
	for {
		datagrams, from, err := r.read()
		switch {
		case err == nil:
			failed = 0
			t.take(from, datagrams)
		case errors.Is(err, net.ErrClosed) || t.ctx.Err() != nil || !t.current(s):
			return
		default:
			// Some systems report here what a datagram sent earlier met.
			t.log.Debug("read UDP", zap.Error(err))
			if failed >= time.Second {
				t.broken.Store(true) // opened anew when the network changes
			}
			failed = min(2*failed+time.Millisecond, time.Second)
			if !sleep(t.ctx, failed) {
				return
			}
		}
	}
}

// current reports whether a socket is in use, not replaced.
func (t *port) current(s *socket) bool {
	now := t.socks.Load()
	return s == now.v4 || s == now.v6
}

// sleep reports whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
