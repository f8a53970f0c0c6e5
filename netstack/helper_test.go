package netstack

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	a4 = netip.MustParseAddr("100.64.0.1")
	b4 = netip.MustParseAddr("100.64.0.2")
	a6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	b6 = netip.MustParseAddr("fd7a:115c:a1e0::2")
)

// wire joins two stacks back to back: what leaves one enters the other in the
// same goroutine. A filter may change what passes.
type wire struct {
	a, b   atomic.Pointer[Stack]
	filter atomic.Pointer[func(toB bool, packets [][]byte) [][]byte]
}

func (w *wire) out(toB bool) func([][]byte) {
	return func(packets [][]byte) {
		if f := w.filter.Load(); f != nil {
			packets = (*f)(toB, packets)
		}
		to := &w.a
		if toB {
			to = &w.b
		}
		if s := to.Load(); s != nil && len(packets) > 0 {
			s.In(packets)
		}
	}
}

func (w *wire) setFilter(f func(toB bool, packets [][]byte) [][]byte) { w.filter.Store(&f) }

// newPair makes stacks a (a4, a6) and b (b4, b6) joined by a wire.
func newPair(t testing.TB, c Config) (a, b *Stack, w *wire) {
	t.Helper()
	w = new(wire)
	make := func(toB bool, addrs ...netip.Addr) *Stack {
		c.Out = w.out(toB)
		s, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetAddrs(addrs); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	a, b = make(true, a4, a6), make(false, b4, b6)
	w.a.Store(a)
	w.b.Store(b)
	return a, b, w
}

func listen(t testing.TB, s *Stack, network string, addr netip.AddrPort) *Listener {
	t.Helper()
	l, err := s.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func portOf(l interface{ Addr() net.Addr }) uint16 {
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func dialCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// connect gives both ends of a TCP connection from a to addr on b.
func connect(t testing.TB, a, b *Stack, addr netip.Addr) (ca, cb *Conn) {
	t.Helper()
	l := listen(t, b, "tcp", netip.AddrPort{})
	defer l.Close()
	ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, portOf(l)))
	if err != nil {
		t.Fatal(err)
	}
	cb, err = l.AcceptConn()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close(); cb.Close() })
	return ca, cb
}
