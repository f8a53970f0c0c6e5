package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestBuiltWhenNeeded has a stack that only listens not exist below, though its
// listeners behave as they do otherwise, and exist from the first packet on.
func TestBuiltWhenNeeded(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	any := netip.AddrPort{}
	l := listen(t, b, "tcp", any)
	if p := portOf(l); p < firstPort {
		t.Errorf("port %d", p)
	}
	l4, l6 := listen(t, b, "tcp4", netip.AddrPortFrom(any.Addr(), 80)), listen(t, b, "tcp6", netip.AddrPortFrom(any.Addr(), 80))
	if got := l4.Addr().String() + " " + l6.Addr().String(); got != "0.0.0.0:80 [::]:80" {
		t.Error(got)
	}
	for _, network := range []string{"tcp", "tcp4", "tcp6"} {
		if _, err := b.Listen(network, netip.AddrPortFrom(any.Addr(), 80)); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s twice: %v", network, err)
		}
	}
	l4.SetDeadline(time.Unix(1, 0))
	if _, err := l4.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	l4.Close()
	if _, err := l4.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	l4 = listen(t, b, "tcp4", netip.AddrPortFrom(any.Addr(), 80))
	if b.Abort(func(Flow) bool { return true }, io.EOF) != 0 || b.AbortFlow(Flow{Proto: TCP, Local: netip.AddrPortFrom(b4, 80), Remote: netip.AddrPortFrom(a4, 80)}, io.EOF) {
		t.Error("aborted what does not exist")
	}
	if b.st.Load() != nil {
		t.Fatal("it is there before it is needed")
	}

	var wg sync.WaitGroup
	for _, to := range []struct {
		l    *Listener
		addr netip.Addr
	}{{l, b4}, {l, b6}, {l4, b4}, {l6, b6}} {
		wg.Go(func() {
			c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(to.addr, portOf(to.l)))
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	for _, l := range []*Listener{l, l, l4, l6} {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	wg.Wait()
	if _, err := b.Listen("tcp", netip.AddrPortFrom(any.Addr(), portOf(l))); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("after it was built: %v", err)
	}
}

// TestCloseWhileBuilding closes stacks that packets and listeners are just
// building.
func TestCloseWhileBuilding(t *testing.T) {
	for range 50 {
		s, err := New(Config{Out: func([][]byte) {}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetAddrs([]netip.Addr{b4}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() { s.In([][]byte{ping(a4, b4, nil)}) })
		wg.Go(func() {
			if l, err := s.Listen("tcp", netip.AddrPort{}); err == nil {
				l.Close()
			} else if !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		})
		wg.Go(func() { s.Close() })
		wg.Wait()
		if _, err := s.Listen("tcp", netip.AddrPort{}); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
}
