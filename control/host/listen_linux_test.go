package host

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListen shows that accepted connections have what the listener says.
func TestListen(t *testing.T) {
	ln, err := listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	out, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	raw, err := in.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []struct {
		name      string
		opt, want int
	}{
		{"TCP_USER_TIMEOUT", unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds())},
		{"TCP_KEEPIDLE", unix.TCP_KEEPIDLE, int(probeAfter.Seconds())},
		{"TCP_KEEPINTVL", unix.TCP_KEEPINTVL, int(probeEvery.Seconds())},
		{"TCP_KEEPCNT", unix.TCP_KEEPCNT, probes},
	} {
		var got int
		var gerr error
		if err := raw.Control(func(fd uintptr) { got, gerr = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option.opt) }); err != nil || gerr != nil {
			t.Fatal(option.name, err, gerr)
		}
		if got != option.want {
			t.Errorf("%s is %d, want %d", option.name, got, option.want)
		}
	}
}
