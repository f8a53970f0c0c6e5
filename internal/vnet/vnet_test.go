package vnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs a test on a new internet in virtual time.
func bubble(t *testing.T, f func(t *testing.T, n *Net)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := New(1)
		defer n.Close()
		f(t, n)
	})
}

// sock is a UDP socket for tests.
type sock struct {
	net.PacketConn
	t testing.TB
}

func (h *Host) open(t testing.TB, addr string) *sock {
	t.Helper()
	pc, err := h.ListenUDP(context.Background(), "udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return &sock{pc, t}
}

func (s *sock) port() uint16 { return s.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func (s *sock) send(to netip.AddrPort, text string) {
	s.t.Helper()
	if _, err := s.WriteTo([]byte(text), net.UDPAddrFromAddrPort(to)); err != nil {
		s.t.Fatal(err)
	}
}

// recv returns what comes within a second.
func (s *sock) recv() (text string, from netip.AddrPort, ok bool) {
	s.t.Helper()
	s.SetReadDeadline(time.Now().Add(time.Second))
	b := make([]byte, 1<<16)
	n, a, err := s.ReadFrom(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "", from, false
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b[:n]), a.(*net.UDPAddr).AddrPort(), true
}

// mapped sends to a socket of a public host and returns what it sees as source.
func (s *sock) mapped(h *Host, to *sock) netip.AddrPort {
	s.t.Helper()
	s.send(netip.AddrPortFrom(h.Addr(), to.port()), "where am I")
	_, from, ok := to.recv()
	if !ok {
		return netip.AddrPort{}
	}
	return from
}

func (s *sock) drain() {
	for {
		if _, _, ok := s.recv(); !ok {
			return
		}
	}
}

// lab is two public hosts with two ports each, to measure NATs with.
type lab struct {
	h [2]*Host
	s [2][2]*sock
}

func newLab(t testing.TB, n *Net) (l lab) {
	for i := range l.h {
		l.h[i] = n.Host(V4)
		for j := range l.s[i] {
			l.s[i][j] = l.h[i].open(t, fmt.Sprintf(":%d", 3478+j))
		}
	}
	return l
}

// measure classifies a router by asking from behind it.
func (l lab) measure(t *testing.T, r *Router) (mapping, filtering string, kept, hairpin bool) {
	h := r.Host()
	c := h.open(t, ":0")
	a, b, o := c.mapped(l.h[0], l.s[0][0]), c.mapped(l.h[0], l.s[0][1]), c.mapped(l.h[1], l.s[1][0])
	switch {
	case !a.IsValid():
		return "none", "none", false, false
	case a == b && a == o:
		mapping = "EIM"
	case a == b:
		mapping = "ADM"
	default:
		mapping = "APDM"
	}
	kept = a.Port() == c.port()

	c = h.open(t, ":0")
	a = c.mapped(l.h[0], l.s[0][0])
	l.s[0][0].send(a, "same")
	if text, _, _ := c.recv(); text != "same" {
		t.Fatal("no answer from whom we asked")
	}
	filtering = "APDF"
	l.s[0][1].send(a, "other port")
	if _, _, ok := c.recv(); ok {
		filtering = "ADF"
	}
	l.s[1][0].send(a, "other host")
	if _, _, ok := c.recv(); ok {
		filtering = "EIF"
	}

	h2 := r.Host()
	c, d := h.open(t, ":0"), h2.open(t, ":0")
	a, b = c.mapped(l.h[0], l.s[0][0]), d.mapped(l.h[0], l.s[0][0])
	for range 3 {
		c.send(b, "hairpin")
		if _, from, ok := d.recv(); ok && from == a {
			hairpin = true
		}
		d.send(a, "hairpin")
		if _, from, ok := c.recv(); ok && from != b {
			t.Errorf("hairpin shows %v, want %v", from, b)
		}
	}
	return mapping, filtering, kept, hairpin
}

// The kinds of routers measure as the rule sets of real kernels do.
func TestNATKinds(t *testing.T) {
	with := func(s NAT, change func(*NAT)) NAT { change(&s); return s }
	for _, c := range []struct {
		name               string
		spec               NAT
		mapping, filtering string
		kept, hairpin      bool
	}{
		{"full cone", FullCone(), "EIM", "EIF", true, false},
		{"full cone, hairpin", with(FullCone(), func(s *NAT) { s.Hairpin = true }), "EIM", "EIF", true, true},
		{"full cone, random ports", with(FullCone(), func(s *NAT) { s.Ports = RandomPort }), "EIM", "EIF", false, false},
		{"address restricted", AddressRestricted(), "EIM", "ADF", true, false},
		{"port restricted", PortRestricted(), "EIM", "APDF", true, false},
		{"home", Home(), "EIM", "APDF", true, false},
		{"masquerade", Masquerade(), "EIM", "APDF", true, false},
		{"symmetric", Symmetric(), "APDM", "APDF", false, false},
		{"symmetric, sequential", SymmetricSequential(), "APDM", "APDF", false, false},
		{"by address", NAT{Mapping: AddressDependent, Filtering: AddressDependent, Ports: RandomPort}, "ADM", "ADF", false, false},
		{"cgn", CGN(), "EIM", "APDF", true, false},
		{"cgn, hairpin", with(CGN(), func(s *NAT) { s.Hairpin = true }), "EIM", "APDF", true, true},
		{"udp blocked", UDPBlocked(), "none", "none", false, false},
		{"corporate", Corporate(), "none", "none", false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Net) {
				m, f, kept, hairpin := newLab(t, n).measure(t, n.NAT(c.spec))
				if m != c.mapping || f != c.filtering || kept != c.kept || hairpin != c.hairpin {
					t.Errorf("measured %s %s kept %v hairpin %v, want %s %s %v %v", m, f, kept, hairpin, c.mapping, c.filtering, c.kept, c.hairpin)
				}
			})
		})
	}
	t.Run("double", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *Net) {
			if m, f, _, _ := newLab(t, n).measure(t, n.NAT(CGN()).NAT(Home())); m != "EIM" || f != "APDF" {
				t.Error(m, f)
			}
		})
	})
}

// A masquerade without a firewall is not punched when the peer's packet comes
// first: within one one-way delay of a common start it is.
func TestStartSkew(t *testing.T) {
	for _, c := range []struct {
		spec NAT
		skew time.Duration
		want bool
	}{
		{Masquerade(), 0, true}, {Masquerade(), 5 * time.Millisecond, true}, {Masquerade(), 15 * time.Millisecond, true},
		{Masquerade(), 25 * time.Millisecond, false}, {Masquerade(), 300 * time.Millisecond, false},
		{Home(), 25 * time.Millisecond, true}, {Home(), 300 * time.Millisecond, true},
		{PortRestricted(), 300 * time.Millisecond, true},
	} {
		bubble(t, func(t *testing.T, n *Net) {
			l := newLab(t, n)
			var s [2]*sock
			var at [2]netip.AddrPort
			for i := range s {
				r := n.NAT(c.spec)
				r.SetLink(Link{Latency: 10 * time.Millisecond})
				s[i] = r.Host().open(t, ":0")
				at[i] = s[i].mapped(l.h[0], l.s[0][0])
			}
			s[0].send(at[1], "x")
			time.Sleep(c.skew)
			s[1].send(at[0], "x")
			direct := false
			for range 20 {
				time.Sleep(50 * time.Millisecond)
				s[0].send(at[1], "x")
				s[1].send(at[0], "x")
			}
			synctest.Wait()
			_, from, ok := s[0].recv()
			direct = ok
			if ok && from != at[1] {
				t.Errorf("%v: heard from %v, want %v", c, from, at[1])
			}
			if direct != c.want {
				t.Errorf("skew %v, no input filter %v: direct %v", c.skew, c.spec.NoInputFilter, direct)
			}
		})
	}
}

func TestMappingLife(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := newLab(t, n)
		r := n.NAT(Symmetric())
		c := r.Host().open(t, ":0")
		first := c.mapped(l.h[0], l.s[0][0])
		time.Sleep(29 * time.Second)
		if again := c.mapped(l.h[0], l.s[0][0]); again != first {
			t.Error("mapping changed in use")
		}
		time.Sleep(31 * time.Second)
		second := c.mapped(l.h[0], l.s[0][0])
		if second == first {
			t.Error("an unreplied mapping lives longer than 30 s")
		}
		l.s[0][0].send(second, "answer")
		c.drain()
		time.Sleep(100 * time.Second)
		if c.mapped(l.h[0], l.s[0][0]) != second {
			t.Error("a replied mapping does not live 120 s")
		}
		if r.Mappings() != 1 {
			t.Error(r.Mappings(), "mappings")
		}
		r.Flush()
		third := c.mapped(l.h[0], l.s[0][0])
		if third == second {
			t.Error("flushed, but the same")
		}
		old := r.WAN()
		if a := r.NewWAN(); a == old || c.mapped(l.h[0], l.s[0][0]).Addr() != a {
			t.Error("no new address", a, old)
		}
		l.s[0][0].send(third, "to the old one")
		if _, _, ok := c.recv(); ok {
			t.Error("the old address still works")
		}

		r = n.NAT(Home())
		c = r.Host().open(t, ":0")
		first = c.mapped(l.h[0], l.s[0][0])
		if r.Flush(); c.mapped(l.h[0], l.s[0][0]) != first {
			t.Error("a preserved port changed with a flush")
		}
		if r.Rebind(); c.mapped(l.h[0], l.s[0][0]) == first {
			t.Error("the port did not change with a rebinding")
		}
	})
}

func TestForward(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := newLab(t, n)
		r := n.NAT(Home())
		h := r.Host()
		c := h.open(t, ":5000")
		// The router answers at its LAN address.
		pmp, err := r.ListenUDP(t.Context(), "udp4", ":5351")
		if err != nil {
			t.Fatal(err)
		}
		c.send(netip.AddrPortFrom(r.Gateway(), 5351), "map")
		gw := &sock{pmp, t}
		if text, from, _ := gw.recv(); text != "map" || from != netip.AddrPortFrom(h.Addr(), 5000) {
			t.Error(text, from)
		}
		ext, err := r.Forward(UDP, 7000, netip.AddrPortFrom(h.Addr(), 5000), time.Minute)
		if err != nil || ext != netip.AddrPortFrom(r.WAN(), 7000) {
			t.Fatal(ext, err)
		}
		if _, err := r.Forward(UDP, 7000, netip.AddrPortFrom(h.Addr(), 5001), time.Minute); err == nil {
			t.Error("one port for two")
		}
		l.s[0][0].send(ext, "hello")
		if text, _, _ := c.recv(); text != "hello" {
			t.Error("not forwarded")
		}
		if from := c.mapped(l.h[0], l.s[0][0]); from != ext {
			t.Errorf("answers come from %v, not %v", from, ext)
		}
		time.Sleep(time.Minute)
		l.s[1][0].send(ext, "late")
		if _, _, ok := c.recv(); ok {
			t.Error("forwarded after its life")
		}
	})
}

func TestIPv6(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		spec := Home()
		spec.IPv6 = FirewalledIPv6
		a := n.NAT(spec)
		spec.IPv6 = OpenIPv6
		spec.NoIPv4 = true
		b := n.NAT(spec)
		ha, hb, pub := a.Host(), b.Host(), n.Host(Dual)
		if ha.Addr().Is6() || !ha.Addr6().IsValid() || !hb.Addr().Is6() {
			t.Fatal(ha.Addr(), ha.Addr6(), hb.Addr())
		}
		sa, sb := ha.open(t, ":7"), hb.open(t, ":7")
		to := func(h *Host) netip.AddrPort { return netip.AddrPortFrom(h.Addr6(), 7) }
		sb.send(to(ha), "one")
		if _, _, ok := sa.recv(); ok {
			t.Error("through the firewall")
		}
		sa.send(to(hb), "two")
		if _, from, ok := sb.recv(); !ok || from != to(ha) {
			t.Error("not out", from)
		}
		sb.send(to(ha), "three")
		if _, _, ok := sa.recv(); !ok {
			t.Error("no answer through the firewall")
		}
		sp := pub.open(t, ":7")
		sp.send(to(hb), "four")
		if _, from, ok := sb.recv(); !ok || from != to(pub) {
			t.Error("not from a public host", from)
		}
		if _, err := sb.WriteTo(nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(pub.Addr(), 7))); !errors.Is(err, errNetUnreachable) {
			t.Error("IPv4 without IPv4:", err)
		}
		// Behind two routers.
		spec = CGN()
		spec.IPv6 = OpenIPv6
		cgn := n.NAT(spec)
		spec = Home()
		spec.IPv6 = OpenIPv6
		hc := cgn.NAT(spec).Host()
		sc := hc.open(t, ":7")
		sp.send(to(hc), "five")
		if _, _, ok := sc.recv(); !ok {
			t.Error("not through two routers")
		}
	})
}

func TestRoaming(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := newLab(t, n)
		r1, r2 := n.NAT(Home()), n.NAT(Home())
		h := r1.Host()
		c := h.open(t, ":4000")
		ifs, _ := h.Interfaces()
		if len(ifs) != 3 || ifs[2].Addr() != h.Addr() {
			t.Error(ifs)
		}
		seen := make(chan uint64, 1)
		go func() {
			k, _ := h.WaitChange(context.Background(), 0)
			seen <- k
		}()
		synctest.Wait()
		old := h.Addr()
		h.Move(r2)
		if k := <-seen; k != 1 {
			t.Error("change", k)
		}
		if from := c.mapped(l.h[0], l.s[0][0]); from.Addr() != r2.WAN() || h.Addr() == old {
			t.Error("still at", from)
		}
		h.SetUp(false)
		if _, err := c.WriteTo(nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(l.h[0].Addr(), 3478))); !errors.Is(err, errNetUnreachable) {
			t.Error(err)
		}
		if ifs, _ := h.Interfaces(); len(ifs) != 2 {
			t.Error(ifs)
		}
		h.SetUp(true)
		// A second interface takes over when the first goes down.
		h.Join(r1)
		if from := c.mapped(l.h[0], l.s[0][0]); from.Addr() != r2.WAN() {
			t.Error("not by the first", from)
		}
		h.SetInterfaceUp(0, false)
		if from := c.mapped(l.h[0], l.s[0][0]); from.Addr() != r1.WAN() {
			t.Error("not by the second", from)
		}
		h.MoveOut(V4)
		if from := c.mapped(l.h[0], l.s[0][0]); from != netip.AddrPortFrom(h.Addr(), 4000) {
			t.Error("not public", from)
		}
		h.Cut(true)
		if from := c.mapped(l.h[0], l.s[0][0]); from.IsValid() {
			t.Error("not cut")
		}
	})
}

func contextFor(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}
