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

func TestListenErrors(t *testing.T) {
	_, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp4", netip.AddrPortFrom(b4, 80))
	listen(t, b, "tcp", netip.AddrPort{})
	u, err := b.ListenUDP("udp", netip.AddrPortFrom(b4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, tc := range []struct {
		network, addr string
		want          error
	}{
		{"tcp", "100.64.0.2:80", syscall.EADDRINUSE},
		{"tcp4", "100.64.0.2:80", syscall.EADDRINUSE},
		{"tcp", "100.64.0.3:80", syscall.EADDRNOTAVAIL},
		{"tcp6", "[fd7a:115c:a1e0::3]:80", syscall.EADDRNOTAVAIL},
		{"udp", "100.64.0.2:53", syscall.EADDRINUSE},
		{"udp", "100.64.0.3:53", syscall.EADDRNOTAVAIL},
		{"tcp5", "100.64.0.2:81", net.UnknownNetworkError("tcp5")},
		{"udp5", "100.64.0.2:81", net.UnknownNetworkError("udp5")},
	} {
		addr := netip.MustParseAddrPort(tc.addr)
		var err error
		if tc.network[0] == 't' {
			_, err = b.Listen(tc.network, addr)
		} else {
			_, err = b.ListenUDP(tc.network, addr)
		}
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "listen" || !errors.Is(err, tc.want) {
			t.Errorf("listen %s %s: %v, want %v", tc.network, tc.addr, err, tc.want)
		}
	}
	var addrErr *net.AddrError
	if _, err := b.Listen("tcp6", netip.AddrPortFrom(b4, 1)); !errors.As(err, &addrErr) {
		t.Errorf("an IPv4 address for tcp6: %v", err)
	}
	l.Close()
	l2, err := b.Listen("tcp", netip.AddrPortFrom(b4, 80))
	if err != nil {
		t.Fatalf("listen again after close: %v", err)
	}
	l2.Close()
}

// A listener may come back at once although connections of its predecessor live
// on and others are in TIME_WAIT.
func TestListenAgain(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	addr := netip.AddrPortFrom(b4, 443)
	for range 3 {
		l := listen(t, b, "tcp", netip.AddrPortFrom(netip.Addr{}, 443))
		open, err := a.DialTCP(dialCtx(t), netip.Addr{}, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		left, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		defer left.Close()
		gone, err := a.DialTCP(dialCtx(t), netip.Addr{}, addr)
		if err != nil {
			t.Fatal(err)
		}
		first, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		first.Close()
		io.ReadAll(gone)
		gone.Close()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestListenFamilies(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	second := netip.MustParseAddr("100.64.0.22")
	if err := b.SetAddrs([]netip.Addr{b4, b6, second}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		network  string
		addr     netip.Addr
		hears    []netip.Addr
		not      []netip.Addr
		wantAddr string
	}{
		{"tcp", netip.Addr{}, []netip.Addr{b4, b6, second}, nil, "::"},
		{"tcp", netip.IPv4Unspecified(), []netip.Addr{b4, b6}, nil, "::"},
		{"tcp4", netip.Addr{}, []netip.Addr{b4, second}, []netip.Addr{b6}, "0.0.0.0"},
		{"tcp6", netip.Addr{}, []netip.Addr{b6}, []netip.Addr{b4}, "::"},
		{"tcp", b4, []netip.Addr{b4}, []netip.Addr{b6, second}, b4.String()},
		{"tcp", second, []netip.Addr{second}, []netip.Addr{b6, b4}, second.String()},
		{"tcp", b6, []netip.Addr{b6}, []netip.Addr{b4}, b6.String()},
	} {
		l := listen(t, b, tc.network, netip.AddrPortFrom(tc.addr, 0))
		port := portOf(l)
		if got := l.Addr().(*net.TCPAddr).IP.String(); got != tc.wantAddr || port == 0 {
			t.Errorf("%s %v: listens on %v", tc.network, tc.addr, l.Addr())
		}
		for _, addr := range tc.hears {
			c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, port))
			if err != nil {
				t.Errorf("%s %v: dial %v: %v", tc.network, tc.addr, addr, err)
				continue
			}
			peer, err := l.AcceptConn()
			if err != nil {
				t.Fatal(err)
			}
			if f := peer.Flow(); f.Local != netip.AddrPortFrom(addr, port) || f.Remote.Addr().Is4() != addr.Is4() {
				t.Errorf("%s %v: accepted %v", tc.network, tc.addr, f)
			}
			peer.Close()
			c.Close()
		}
		for _, addr := range tc.not {
			if _, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, port)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s %v: dial %v: %v", tc.network, tc.addr, addr, err)
			}
		}
		l.Close()
	}
}

func TestAcceptOverflow(t *testing.T) {
	const backlog = 8
	a, b, _ := newPair(t, Config{Limits: Limits{AcceptBacklog: backlog}})
	l := listen(t, b, "tcp", netip.AddrPort{})
	var dialled []*Conn
	dial := func() *Conn {
		c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
			return nil // the reset came before DialTCP looked
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	const tooMany = 3
	over := make(chan error, backlog+tooMany) // what those too many saw
	for range backlog + tooMany {
		if c := dial(); c != nil {
			dialled = append(dialled, c)
		} else {
			over <- syscall.ECONNRESET
		}
	}
	// Whose handshake completes first is not settled, but those too many hear of
	// it while nobody accepts, and the others work afterwards.
	for _, c := range dialled {
		go func() {
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				over <- err
			} else {
				c.Write([]byte("y"))
			}
		}()
	}
	for range tooMany {
		if err := <-over; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read from a connection too many: %v", err)
		}
	}
	for range backlog {
		c, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Errorf("write: %v", err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Errorf("read: %v", err)
		}
	}
	c := dial()
	if c == nil {
		t.Fatal("reset although there is room again")
	}
	if _, err := l.Accept(); err != nil {
		t.Error(err)
	}
}

func TestListenerClose(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	ctx := dialCtx(t)
	remote := netip.AddrPortFrom(b4, portOf(l))
	keep, err := a.DialTCP(ctx, netip.Addr{}, remote)
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	peer, err := l.AcceptConn()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()

	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					if !errors.Is(err, net.ErrClosed) {
						t.Errorf("accept: %v", err)
					}
					return
				}
				c.Close()
			}
		})
	}
	l.Close()
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if err := l.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("deadline after close: %v", err)
	}
	if _, err := a.DialTCP(ctx, netip.Addr{}, remote); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial after close: %v", err)
	}
	if _, err := keep.Write([]byte("x")); err != nil {
		t.Errorf("the accepted connection: %v", err)
	}
	if _, err := io.ReadFull(peer, make([]byte, 1)); err != nil {
		t.Errorf("the accepted connection: %v", err)
	}
}

func TestListenerCloseResetsWaiting(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	var conns []*Conn
	for range 20 {
		c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b6, portOf(l)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	l.Close()
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
	}
}

func TestAcceptDeadline(t *testing.T) {
	_, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	l.SetDeadline(time.Now().Add(10 * time.Millisecond))
	for range 2 {
		if _, err := l.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("accept past the deadline: %v", err)
		}
	}
}
