package natlab

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"mesh"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// within calls f with the thread in the host's namespace: sockets that it opens
// stay there.
func (h *Host) within(f func()) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(home)
	there, err := unix.Open(filepath.Join("/run/netns", h.NS), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(there)
	if err := unix.Setns(there, unix.CLONE_NEWNET); err != nil {
		return err
	}
	f()
	if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
		return err // the thread stays locked, and ends with the goroutine
	}
	runtime.UnlockOSThread()
	return nil
}

// internetSockets lists the sockets of the test's own namespace, as the system
// has them.
func internetSockets(t *testing.T) (list []string) {
	t.Helper()
	for _, kind := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + kind)
		if err != nil {
			continue // no IPv6 here
		}
		for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n")[1:] {
			list = append(list, kind+l)
		}
	}
	return list
}

// A node whose sockets come from functions opens no other: it lives in a process
// whose own network leads nowhere, and which has no socket in it.
func TestInjectedSockets(t *testing.T) {
	w := newWorld(t)
	h := w.at(place(Home), "a")
	peer := w.node("nb", w.at(place(Home), "b"))
	var udp, tcp atomic.Int64
	n := &mesh.Node{
		Hostname: "na", ControlURL: w.ready.URL, ControlKey: w.ready.Key, AuthKey: w.key, Ephemeral: true,
		ListenUDP: func(ctx context.Context, network, addr string) (pc net.PacketConn, err error) {
			udp.Add(1)
			if e := h.within(func() { pc, err = new(net.ListenConfig).ListenPacket(ctx, network, addr) }); e != nil {
				return nil, e
			}
			return pc, err
		},
		DialTCP: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			tcp.Add(1)
			// A name has two addresses, which package net tries in goroutines.
			addr = strings.Replace(addr, controlName, w.host.IPv4.String(), 1)
			if e := h.within(func() { c, err = new(net.Dialer).DialContext(ctx, network, addr) }); e != nil {
				return nil, e
			}
			return c, err
		},
	}
	defer n.Close()
	meshtest.Up(t, n)
	if s := internetSockets(t); len(s) != 0 {
		t.Errorf("sockets after the start:\n%s", strings.Join(s, "\n"))
	}
	c, err := actor.Open(t.Context(), n, "nb:7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	meshtest.Until(t, "a direct path", func() bool {
		if err := actor.Round(c, 1, 1000); err != nil {
			t.Fatal(err)
		}
		return c.(*mesh.Conn).Path().Kind == "direct"
	})
	if s := internetSockets(t); len(s) != 0 {
		t.Errorf("sockets after a direct path:\n%s", strings.Join(s, "\n"))
	}
	if udp.Load() == 0 || tcp.Load() < 2 {
		t.Errorf("%d sockets for UDP, %d connections: want some, and control and relay", udp.Load(), tcp.Load())
	}
	peer.Stop()
}
