package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

func TestConn(t *testing.T) {
	for _, tc := range []struct {
		name string
		addr netip.Addr
	}{{"IPv4", b4}, {"IPv6", b6}} {
		t.Run(tc.name, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				a, b, _ := newPair(t, Config{})
				l, err := b.Listen("tcp", netip.AddrPort{})
				if err != nil {
					return nil, nil, nil, err
				}
				ca, err := a.DialTCP(context.Background(), netip.Addr{}, netip.AddrPortFrom(tc.addr, portOf(l)))
				if err != nil {
					return nil, nil, nil, err
				}
				cb, err := l.Accept()
				if err != nil {
					return nil, nil, nil, err
				}
				return ca, cb, func() {
					ca.Close()
					cb.Close()
					a.Close()
					b.Close()
				}, nil
			})
		})
	}
}

func TestConnLocal(t *testing.T) {
	// Dialling an own address goes through no link.
	a, _, w := newPair(t, Config{})
	w.setFilter(func(bool, [][]byte) [][]byte {
		t.Error("a packet to an own address left the stack")
		return nil
	})
	for _, addr := range []netip.Addr{a4, a6} {
		c1, c2 := connect(t, a, a, addr)
		msg := make([]byte, 300_000)
		go func() {
			c1.Write(msg)
			c1.CloseWrite()
		}()
		if got, err := io.ReadAll(c2); err != nil || len(got) != len(msg) {
			t.Errorf("%v: read %d bytes: %v", addr, len(got), err)
		}
	}
}

func TestDialRefused(t *testing.T) {
	a, _, _ := newPair(t, Config{})
	for _, addr := range []netip.Addr{b4, b6} {
		_, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, 81))
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "dial" || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial a closed port: %v", err)
		}
	}
}

func TestDialErrors(t *testing.T) {
	a, _, _ := newPair(t, Config{})
	if err := a.SetAddrs([]netip.Addr{a4}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name          string
		local, remote string
		want          error
	}{
		{"no own IPv6", "", "[fd7a:115c:a1e0::2]:1", syscall.ENETUNREACH},
		{"local not ours", "100.64.0.9", "100.64.0.2:1", syscall.EADDRNOTAVAIL},
		{"loopback", "", "127.0.0.1:1", syscall.ENETUNREACH},
		{"unspecified", "", "0.0.0.0:1", syscall.ENETUNREACH},
	} {
		var local netip.Addr
		if tc.local != "" {
			local = netip.MustParseAddr(tc.local)
		}
		if _, err := a.DialTCP(dialCtx(t), local, netip.MustParseAddrPort(tc.remote)); !errors.Is(err, tc.want) {
			t.Errorf("TCP, %s: %v, want %v", tc.name, err, tc.want)
		}
		if _, err := a.DialUDP(local, netip.MustParseAddrPort(tc.remote)); !errors.Is(err, tc.want) {
			t.Errorf("UDP, %s: %v, want %v", tc.name, err, tc.want)
		}
	}
	var addrErr *net.AddrError
	if _, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPort{}); !errors.As(err, &addrErr) {
		t.Errorf("zero address: %v", err)
	}
	if _, err := a.DialTCP(dialCtx(t), a4, netip.AddrPortFrom(b6, 1)); !errors.As(err, &addrErr) {
		t.Errorf("mixed families: %v", err)
	}
}

func TestDialContext(t *testing.T) {
	a, _, w := newPair(t, Config{})
	sent := make(chan struct{}, 100)
	w.setFilter(func(bool, [][]byte) [][]byte {
		sent <- struct{}{}
		return nil
	})
	remote := netip.AddrPortFrom(b4, 80)

	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-sent; cancel() }()
	if _, err := a.DialTCP(ctx, netip.Addr{}, remote); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled dial: %v", err)
	}
	if _, err := a.DialTCP(ctx, netip.Addr{}, remote); !errors.Is(err, context.Canceled) {
		t.Errorf("dial with a context that has ended: %v", err)
	}

	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := a.DialTCP(ctx, netip.Addr{}, remote)
	var ne net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("dial past its deadline: %v", err)
	}
}

func TestDialLocalAddress(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	second := netip.MustParseAddr("100.64.0.7")
	if err := a.SetAddrs([]netip.Addr{a4, second, a6}); err != nil {
		t.Fatal(err)
	}
	l := listen(t, b, "tcp", netip.AddrPort{})
	for _, local := range []netip.Addr{a4, second} {
		c, err := a.DialTCP(dialCtx(t), local, netip.AddrPortFrom(b4, portOf(l)))
		if err != nil {
			t.Fatal(err)
		}
		peer, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		if got := peer.Flow().Remote.Addr(); got != local {
			t.Errorf("dialled from %v, seen as %v", local, got)
		}
		if c.Flow().Local != peer.Flow().Remote || c.Flow().Remote != peer.Flow().Local {
			t.Errorf("flows differ: %v and %v", c.Flow(), peer.Flow())
		}
		if c.RemoteAddr().String() != peer.LocalAddr().String() {
			t.Errorf("addresses differ: %v and %v", c.RemoteAddr(), peer.LocalAddr())
		}
		c.Close()
		peer.Close()
	}
}

func TestHalfClose(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b6)
	if _, err := ca.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if err := ca.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(cb); err != nil || string(got) != "ping" {
		t.Fatalf("read %q: %v", got, err)
	}
	if _, err := ca.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if _, err := cb.Write([]byte("pong")); err != nil {
		t.Fatal(err)
	}
	cb.Close()
	if got, err := io.ReadAll(ca); err != nil || string(got) != "pong" {
		t.Fatalf("read %q: %v", got, err)
	}
}

func TestCloseRead(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, _ := connect(t, a, b, b4)
	read := make(chan error)
	go func() {
		_, err := ca.Read(make([]byte, 1))
		read <- err
	}()
	if err := ca.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != io.EOF {
		t.Errorf("read after CloseRead: %v", err)
	}
}

// A reset must never look like the end of the stream, however often and in
// whatever order one asks.
func TestResetIsNotEOF(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	for _, writeFirst := range []bool{false, true} {
		ca, cb := connect(t, a, b, b4)
		cb.SetLinger(0)
		cb.Close()
		buf := make([]byte, 1)
		if writeFirst {
			for {
				if _, err := ca.Write(buf); err != nil {
					if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
						t.Errorf("write: %v", err)
					}
					break
				}
			}
		}
		for range 3 {
			if _, err := ca.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read (write first %v): %v", writeFirst, err)
			}
		}
		if err := ca.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := ca.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second close: %v", err)
		}
		if _, err := ca.Read(buf); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
	}
}

// Data and the end of the stream that arrived before a reset of the writing
// side are still read.
func TestEOFStays(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	cb.Write([]byte("bye"))
	cb.Close()
	if got, err := io.ReadAll(ca); err != nil || string(got) != "bye" {
		t.Fatalf("read %q: %v", got, err)
	}
	for { // until the answer to our data, a reset, is in
		if _, err := ca.Write([]byte("more")); err != nil {
			break
		}
	}
	if _, err := ca.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read: %v", err)
	}
}

func TestConnOptions(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, _ := connect(t, a, b, b4)
	for name, err := range map[string]error{
		"no delay":   ca.SetNoDelay(false),
		"keep alive": ca.SetKeepAlive(true),
		"period":     ca.SetKeepAlivePeriod(time.Minute),
		"linger":     ca.SetLinger(-1),
		"deadline":   ca.SetDeadline(time.Now().Add(time.Hour)),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
