package vnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const errNetUnreachable = syscall.ENETUNREACH

// numbered sends numbers and returns those that arrive, in order of arrival.
func numbered(t *testing.T, n *Net, l Link, count int, every time.Duration) (got []int) {
	a, b := n.Host(V4), n.Host(V4)
	a.SetLink(l)
	b.SetLink(Link{})
	sa, sb := a.open(t, ":1"), b.open(t, ":1")
	to := netip.AddrPortFrom(b.Addr(), 1)
	for k := range count {
		sa.send(to, fmt.Sprint(k))
		time.Sleep(every)
	}
	for {
		text, _, ok := sb.recv()
		if !ok {
			return got
		}
		var k int
		fmt.Sscan(text, &k)
		got = append(got, k)
	}
}

func TestLoss(t *testing.T) {
	var first string
	for run := range 3 {
		bubble(t, func(t *testing.T, n *Net) {
			got := numbered(t, n, Link{Loss: 0.1}, 5000, time.Millisecond)
			if len(got) < 4400 || len(got) > 4600 {
				t.Errorf("%d of 5000 at 10 %% loss", len(got))
			}
			if text := fmt.Sprint(got); run == 0 {
				first = text
			} else if text != first {
				t.Error("the same seed, other losses")
			}
		})
	}
	bubble(t, func(t *testing.T, n *Net) {
		got := numbered(t, n, Link{Loss: 0.1, Burst: 8}, 20000, 100*time.Microsecond)
		gaps, last := 0, -1
		for _, k := range got {
			if k != last+1 {
				gaps++
			}
			last = k
		}
		lost := 20000 - len(got)
		if mean := float64(lost) / float64(gaps); lost < 1500 || lost > 2500 || mean < 6 || mean > 10 {
			t.Errorf("%d lost in bursts of %.1f, want 2000 in bursts of 8", lost, mean)
		}
	})
}

func TestOrder(t *testing.T) {
	outOfOrder := func(got []int) (n int) {
		for i := 1; i < len(got); i++ {
			if got[i] < got[i-1] {
				n++
			}
		}
		return n
	}
	bubble(t, func(t *testing.T, n *Net) {
		got := numbered(t, n, Link{Latency: 20 * time.Millisecond, Jitter: 30 * time.Millisecond}, 1000, time.Millisecond)
		if len(got) != 1000 || outOfOrder(got) != 0 {
			t.Errorf("jitter: %d arrived, %d out of order", len(got), outOfOrder(got))
		}
		got = numbered(t, n, Link{Reorder: 0.1}, 1000, time.Millisecond)
		if k := outOfOrder(got); len(got) != 1000 || k < 60 || k > 140 {
			t.Errorf("reorder: %d arrived, %d out of order", len(got), k)
		}
		got = numbered(t, n, Link{Duplicate: 0.2}, 1000, time.Millisecond)
		if len(got) < 1150 || len(got) > 1250 {
			t.Errorf("duplicate: %d arrived", len(got))
		}
	})
}

func TestLatency(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		l := newLab(t, n)
		r := n.NAT(Home())
		r.SetLink(Link{Latency: 100 * time.Millisecond})
		c := r.Host().open(t, ":0")
		began := time.Now()
		c.mapped(l.h[0], l.s[0][0])
		if d := time.Since(began); d != 105200*time.Microsecond {
			t.Error(d)
		}
	})
}

func TestBandwidth(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		a, b := n.Host(V4), n.Host(V4)
		a.SetLink(Link{Bandwidth: 100_000, Queue: 50_000})
		sa, sb := a.open(t, ":1"), b.open(t, ":1")
		for range 100 {
			sa.send(netip.AddrPortFrom(b.Addr(), 1), strings.Repeat("x", 972)) // 1000 on the wire
		}
		began, got := time.Now(), 0
		var last time.Duration
		for {
			if _, _, ok := sb.recv(); !ok {
				break
			}
			got++
			last = time.Since(began)
		}
		if got != 50 || last != 505*time.Millisecond {
			t.Errorf("%d arrived, the last after %v", got, last)
		}
	})
}

func TestMTU(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		r := n.NAT(Home())
		h, p := r.Host(), n.Host(V4)
		c, s := h.open(t, ":1"), p.open(t, ":1")
		to := netip.AddrPortFrom(p.Addr(), 1)
		// passes reports which of three tries of a payload arrive, and the error of
		// the last.
		passes := func(size int) (out string) {
			var err error
			for range 3 {
				_, err = c.WriteTo(make([]byte, size), net.UDPAddrFromAddrPort(to))
				if text, _, ok := s.recv(); ok && len(text) == size {
					out += "+"
				} else {
					out += "-"
				}
			}
			if errors.Is(err, syscall.EMSGSIZE) {
				out += "E"
			} else if err != nil {
				out += err.Error()
			}
			return out
		}
		want := func(what string, size int, want string) {
			t.Helper()
			if got := passes(size); got != want {
				t.Errorf("%s: %d bytes: %s, want %s", what, size, got, want)
			}
		}
		df := func(on bool) { c.PacketConn.(interface{ SetDontFragment(bool) error }).SetDontFragment(on) }
		want("plain", 1472, "+++")
		want("own interface, fragments", 1473, "+++")
		df(true)
		want("own interface", 1473, "---E")
		df(false)
		r.SetLink(Link{BlackHole: 1280})
		want("black hole", 1252, "+++")
		want("black hole", 1253, "---")
		r.SetLink(Link{MTU: 1280})
		want("MTU", 1252, "+++")
		want("MTU, fragments", 1253, "-++")
		df(true)
		want("MTU", 1253, "---E")
		df(false)
		r.SetLink(Link{MTU: 1280, NoFragments: true})
		want("no fragments", 1400, "---")
		r.SetLink(Link{Block: []Match{{Proto: UDP, Host: netip.PrefixFrom(p.Addr(), 32), Longer: 500}}})
		want("blocked", 400, "+++")
		want("blocked", 500, "---")
		r.SetLink(Link{Block: []Match{{Proto: TCP}, {Port: 2}}})
		want("others blocked", 500, "+++")
	})
}

func TestSockets(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		h := n.Host(V4)
		open := func(network, addr string) (net.PacketConn, error) { return h.ListenUDP(t.Context(), network, addr) }
		a, err := open("udp4", ":5")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open("udp4", ":5"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Error(err)
		}
		if _, err := open("udp", "127.0.0.1:5"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Error(err)
		}
		six, err := open("udp6", "[::]:5")
		if err != nil {
			t.Error(err)
		}
		for _, bad := range []string{"tcp4 :6", "udp4 [::1]:6", "udp :x", "udp 6", "udp4 192.0.2.9:6", "udp host:6"} {
			network, addr, _ := strings.Cut(bad, " ")
			if _, err := open(network, addr); err == nil {
				t.Errorf("%s: no error", bad)
			}
		}
		_, err = six.WriteTo([]byte("x"), &net.UDPAddr{IP: net.ParseIP("2001:db8::99"), Port: 5})
		if !errors.Is(err, syscall.ENETUNREACH) {
			t.Error(err)
		}
		// Loopback.
		lo, _ := open("udp", "127.0.0.1:0")
		s := &sock{lo, t}
		s.send(netip.MustParseAddrPort("127.0.0.1:5"), "loop")
		if text, from, _ := (&sock{a, t}).recv(); text != "loop" || from.Addr() != netip.MustParseAddr("127.0.0.1") {
			t.Error(text, from)
		}
		// A wait ends with Close, and with a deadline that is set meanwhile.
		for _, end := range []func(){func() { a.SetReadDeadline(time.Now()) }, func() { a.Close() }} {
			a.SetReadDeadline(time.Time{})
			errs := make(chan error)
			go func() {
				_, _, err := a.ReadFrom(make([]byte, 10))
				errs <- err
			}()
			synctest.Wait()
			end()
			if err := <-errs; err == nil {
				t.Error("no error")
			}
		}
		if _, err := a.WriteTo(nil, s.LocalAddr()); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if again, err := open("udp4", ":5"); err != nil {
			t.Error("port not free after Close:", err)
		} else {
			again.Close()
		}
		six.Close()
		lo.Close()
		if st := n.Stats(); st.Sockets != 0 || st.Pending != 0 {
			t.Errorf("%+v", st)
		}
	})
}
