package vnet

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Two hosts behind one router that use the same port towards the same remote
// get different public ports; towards others they keep it.
func TestPortClash(t *testing.T) {
	for _, spec := range []NAT{Home(), PortRestricted()} {
		bubble(t, func(t *testing.T, n *Net) {
			l := newLab(t, n)
			r := n.NAT(spec)
			a, b := r.Host().open(t, ":7000"), r.Host().open(t, ":7000")
			ma, mb := a.mapped(l.h[0], l.s[0][0]), b.mapped(l.h[0], l.s[0][0])
			if ma.Port() != 7000 || mb.Port() == 7000 {
				t.Error(ma, mb)
			}
			for s, at := range map[*sock]netip.AddrPort{a: ma, b: mb} {
				l.s[0][0].send(at, at.String())
				if text, _, _ := s.recv(); text != at.String() {
					t.Errorf("%s came instead of %v", text, at)
				}
			}
			if other := b.mapped(l.h[1], l.s[1][0]); (other.Port() == 7000) != (spec.Mapping == AddressAndPortDependent) {
				t.Error("towards another host", other)
			}
		})
	}
}

// A router forgets what is dead, and serves many.
func TestManyMappings(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := newLab(t, n)
		r := n.NAT(Symmetric())
		c := r.Host().open(t, ":0")
		for k := range 10_000 {
			c.send(netip.AddrPortFrom(l.h[0].Addr(), uint16(10_000+k)), "x")
			time.Sleep(10 * time.Millisecond)
		}
		if k := r.Mappings(); k < 2900 || k > 3100 {
			t.Errorf("%d mappings, want those of 30 s", k)
		}
		n.mu.Lock()
		k := len(r.nat.out)
		n.mu.Unlock()
		if k > 8000 {
			t.Errorf("%d mappings kept", k)
		}
		// No port is left: packets are lost, nothing else.
		n.mu.Lock()
		for port := range uint16(65535) {
			r.nat.fixed[outer{proto: UDP, port: port + 1}] = &mapping{expires: time.Now().Add(time.Hour)}
		}
		n.mu.Unlock()
		if from := c.mapped(l.h[1], l.s[1][0]); from.IsValid() {
			t.Error("mapped to", from)
		}
	})
}

// A router without a firewall refuses connections; one with drops them.
func TestClosedRouter(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		p := n.Host(V4)
		try := func(r *Router) error {
			ctx, cancel := contextFor(time.Second)
			defer cancel()
			_, err := p.DialTCP(ctx, "tcp", netip.AddrPortFrom(r.WAN(), 22).String())
			return err
		}
		if err := try(n.NAT(Masquerade())); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		if err := try(n.NAT(Home())); errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	})
}

func TestTCPOverIPv6AndForwards(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		spec := Home()
		spec.IPv6 = FirewalledIPv6
		r := n.NAT(spec)
		h, p := r.Host(), n.Host(Dual)
		dialTo := func(from, to *Host, addr netip.AddrPort) error {
			ln, err := to.ListenTCP("tcp", ":443")
			if err != nil {
				return err
			}
			defer ln.Close()
			ctx, cancel := contextFor(5 * time.Second)
			defer cancel()
			c, err := from.DialTCP(ctx, "tcp", addr.String())
			if err != nil {
				return err
			}
			defer c.Close()
			s, err := ln.Accept()
			if err != nil {
				return err
			}
			defer s.Close()
			s.SetDeadline(time.Now().Add(time.Second))
			c.Write([]byte("x"))
			_, err = s.Read(make([]byte, 1))
			return err
		}
		if err := dialTo(h, p, netip.AddrPortFrom(p.Addr6(), 443)); err != nil {
			t.Error("out by IPv6:", err)
		}
		if err := dialTo(p, h, netip.AddrPortFrom(h.Addr6(), 443)); err == nil {
			t.Error("in by IPv6 through the firewall")
		}
		ext, err := r.Forward(TCP, 0, netip.AddrPortFrom(h.Addr(), 443), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := dialTo(p, h, ext); err != nil {
			t.Error("in by a forwarded port:", err)
		}
		r.Forward(TCP, ext.Port(), netip.AddrPortFrom(h.Addr(), 443), 0)
		if err := dialTo(p, h, ext); err == nil {
			t.Error("in by a port that is forwarded no more")
		}
		if r.Self().Addr() != r.Gateway() {
			t.Error(r.Self().Addr(), r.Gateway())
		}
	})
}

func TestListeners(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		h := n.Host(V4)
		a, err := h.ListenTCP("tcp4", ":80")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.ListenTCP("tcp", ":80"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Error(err)
		}
		for _, bad := range []string{"192.0.2.77:81", "x", ":x"} {
			if _, err := h.ListenTCP("tcp", bad); err == nil {
				t.Error("listens on", bad)
			}
		}
		b, err := h.ListenTCP("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		// Not accepted, then the listener closes: reset.
		c, err := h.DialTCP(t.Context(), "tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
		done := make(chan error)
		go func() {
			_, err := a.Accept()
			done <- err
		}()
		synctest.Wait()
		a.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if a.Close() == nil || b.Close() == nil {
			t.Error("closed twice")
		}
	})
}

func TestDeadlines(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		s := n.Host(V4).open(t, ":1")
		past := time.Now().Add(-time.Second)
		s.SetWriteDeadline(past)
		if _, err := s.WriteTo(nil, s.LocalAddr()); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		s.SetDeadline(past)
		if _, _, err := s.ReadFrom(nil); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		s.Close()
		if s.SetDeadline(past) == nil || s.Close() == nil {
			t.Error("closed, but no error")
		}
	})
}

// Close ends all waits, and everything fails afterwards.
func TestNetClose(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		h, p := n.NAT(Home()).Host(), n.Host(V4)
		s := h.open(t, ":1")
		ln, _ := p.ListenTCP("tcp", ":80")
		c, err := h.DialTCP(t.Context(), "tcp", netip.AddrPortFrom(p.Addr(), 80).String())
		if err != nil {
			t.Fatal(err)
		}
		errs := make(chan error)
		go func() { _, _, err := s.ReadFrom(nil); errs <- err }()
		go func() { _, err := c.Read(make([]byte, 1)); errs <- err }()
		go func() { ln.Accept(); _, err := ln.Accept(); errs <- err }()
		go func() {
			_, err := h.DialTCP(t.Context(), "tcp", "203.0.113.200:1")
			errs <- err
		}()
		synctest.Wait()
		n.Close()
		n.Close()
		for range 4 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
		if _, err := h.ListenUDP(t.Context(), "udp", ":2"); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if _, err := h.ListenTCP("tcp", ":2"); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if st := n.Stats(); st.Sockets != 0 || st.Pending != 0 {
			t.Errorf("%+v", st)
		}
	})
}
