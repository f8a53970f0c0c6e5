package netstack

import (
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
)

func TestSetAddrs(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	extra := netip.MustParseAddr("100.64.0.20")
	set := func(addrs ...netip.Addr) {
		t.Helper()
		if err := b.SetAddrs(addrs); err != nil {
			t.Fatal(err)
		}
	}
	set(b4, b6, extra, extra)
	set(b4, b6, extra)
	stay, stayPeer := connect(t, a, b, b6)
	gone, gonePeer := connect(t, a, b, extra)
	l := listen(t, b, "tcp", netip.AddrPortFrom(extra, 80))
	any := listen(t, b, "tcp", netip.AddrPort{})

	set(b6)
	if _, err := gonePeer.Read(make([]byte, 1)); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("read on an address taken away: %v", err)
	}
	if _, err := gone.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read on the other side: %v", err)
	}
	if _, err := b.Listen("tcp", netip.AddrPortFrom(extra, 81)); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("listen on an address taken away: %v", err)
	}
	echo := func(c, peer *Conn) {
		t.Helper()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(peer, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	echo(stay, stayPeer)
	echo(stayPeer, stay)

	set(extra, b6) // and the listener hears again
	for _, l := range []*Listener{l, any} {
		c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(extra, portOf(l)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		peer, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		echo(c, peer)
	}
	echo(stay, stayPeer)

	for _, bad := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1"),
		netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("fe80::1%eth0")} {
		if err := b.SetAddrs([]netip.Addr{bad}); err == nil {
			t.Errorf("accepted %v", bad)
		}
	}
	echo(stay, stayPeer)
}
