package netstack

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

func TestUDPEcho(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	server, err := b.ListenUDP("udp", netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			if _, err := server.WriteTo(buf[:n], from); err != nil {
				t.Errorf("answer %v: %v", from, err)
			}
		}
	}()
	port := server.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	for _, addr := range []netip.Addr{b4, b6} {
		remote := netip.AddrPortFrom(addr, port)
		c, err := a.DialUDP(netip.Addr{}, remote)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if c.RemoteAddr().String() != remote.String() || c.Flow().Remote != remote || c.LocalAddr().String() != c.Flow().Local.String() {
			t.Errorf("addresses %v, %v, flow %v", c.LocalAddr(), c.RemoteAddr(), c.Flow())
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		for _, size := range []int{0, 1, 1200, 5000, 60000} { // the last two in fragments
			sent := bytes.Repeat([]byte{byte(size)}, size)
			if n, err := c.Write(sent); n != size || err != nil {
				t.Fatalf("write %d bytes: %d, %v", size, n, err)
			}
			got := make([]byte, 65536)
			n, err := c.Read(got)
			if err != nil || !bytes.Equal(got[:n], sent) {
				t.Errorf("%v: sent %d bytes, got %d: %v", addr, size, n, err)
			}
		}
		// Truncated like anywhere else.
		c.Write([]byte("hello"))
		got := make([]byte, 2)
		if n, err := c.Read(got); n != 2 || err != nil || string(got) != "he" {
			t.Errorf("read into a short buffer: %d, %v", n, err)
		}

		p, err := a.ListenUDP("udp", netip.AddrPortFrom(c.Flow().Local.Addr(), 0))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if _, err := p.WriteToUDPAddrPort([]byte("hi"), remote); err != nil {
			t.Fatal(err)
		}
		n, from, err := p.ReadFromUDPAddrPort(got)
		if n != 2 || from != remote || err != nil {
			t.Errorf("%d bytes from %v: %v", n, from, err)
		}
	}
	if _, err := server.WriteTo(nil, &net.TCPAddr{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("WriteTo a TCP address: %v", err)
	}
	if _, err := server.WriteToUDPAddrPort(nil, netip.AddrPort{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("WriteTo no address: %v", err)
	}
	if _, err := server.WriteToUDPAddrPort(make([]byte, 65600), netip.AddrPortFrom(a4, 1)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("a datagram too long: %v", err)
	}
}

func TestUDPPortUnreachable(t *testing.T) {
	a, _, _ := newPair(t, Config{})
	for _, addr := range []netip.Addr{b4, b6, a4} {
		c, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(addr, 9))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v: %v", addr, err)
		}
	}
}

func TestUDPDeadlineAndClose(t *testing.T) {
	a, _, _ := newPair(t, Config{})
	p, err := a.ListenUDP("udp4", netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.DialUDP(a6, netip.AddrPortFrom(b6, 9))
	if err != nil {
		t.Fatal(err)
	}
	type socket interface {
		SetDeadline(time.Time) error
		SetReadDeadline(time.Time) error
		Close() error
	}
	for _, tc := range []struct {
		name string
		socket
		read, write func() error
	}{
		{"PacketConn", p,
			func() error { _, _, err := p.ReadFrom(make([]byte, 1)); return err },
			func() error { _, err := p.WriteTo(nil, &net.UDPAddr{IP: net.IP(b4.AsSlice()), Port: 9}); return err }},
		{"UDPConn", c,
			func() error { _, err := c.Read(make([]byte, 1)); return err },
			func() error { _, err := c.Write(nil); return err }},
	} {
		tc.SetDeadline(time.Now().Add(-time.Second))
		if err := tc.read(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: read past the deadline: %v", tc.name, err)
		}
		if err := tc.write(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: write past the deadline: %v", tc.name, err)
		}
		tc.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if err := tc.read(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: read until the deadline: %v", tc.name, err)
		}
		tc.SetDeadline(time.Time{})
		if err := tc.write(); err != nil {
			t.Errorf("%s: write: %v", tc.name, err)
		}
		if tc.name == "UDPConn" { // the answer to that write
			if err := tc.read(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: read: %v", tc.name, err)
			}
		}
		done := make(chan error)
		go func() { done <- tc.read() }()
		if err := tc.Close(); err != nil {
			t.Errorf("%s: close: %v", tc.name, err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: read while closing: %v", tc.name, err)
		}
		for what, err := range map[string]error{"close": tc.Close(), "write": tc.write(), "deadline": tc.SetDeadline(time.Time{})} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: %s after close: %v", tc.name, what, err)
			}
		}
	}
}
