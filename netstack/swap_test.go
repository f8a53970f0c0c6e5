package netstack

import (
	"net/netip"
	"testing"
	"time"
)

// Two stacks swap their addresses, as when a control server that forgot
// everything numbers its nodes anew. What is left of connections that had the
// old ones does not keep either from dialling the other: an address that a stack
// had is not its own any more.
func TestSwappedAddresses(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	for name, leave := range map[string]func(){
		"nothing": func() {},
		"connections that were closed": func() { // wait out their time at one end, then the other
			for i := range 4 {
				ca, cb := connect(t, a, b, b4)
				if i%2 == 0 {
					ca, cb = cb, ca
				}
				ca.Close()
				cb.Close()
			}
		},
		"half-closed connections": func() {
			ca, _ := connect(t, a, b, b4)
			ca.CloseWrite()
			_, cb := connect(t, a, b, b6)
			cb.CloseWrite()
		},
		"live connections": func() {
			connect(t, a, b, b4)
			connect(t, b, a, a6)
		},
		"listeners": func() {
			for _, ap := range []netip.Addr{a4, b4} {
				s := a
				if ap == b4 {
					s = b
				}
				if l, err := s.Listen("tcp", netip.AddrPortFrom(ap, 0)); err == nil {
					t.Cleanup(func() { l.Close() })
				}
			}
		},
		"UDP sockets": func() {
			for _, s := range []*Stack{a, b} {
				for _, ap := range []netip.Addr{a4, b4, a6, b6} {
					if c, err := s.ListenUDP("udp", netip.AddrPortFrom(ap, 0)); err == nil {
						t.Cleanup(func() { c.Close() })
					}
				}
			}
		},
		"a dial that hangs": func() {
			c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, 9))
			if err == nil {
				c.Close()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			home := func(s, o *Stack, four, six, ofour, osix netip.Addr) {
				t.Helper()
				if err := s.SetAddrs([]netip.Addr{four, six}); err != nil {
					t.Fatal(err)
				}
				if err := o.SetAddrs([]netip.Addr{ofour, osix}); err != nil {
					t.Fatal(err)
				}
			}
			defer home(a, b, a4, a6, b4, b6)
			leave()
			home(a, b, b4, b6, a4, a6)
			for _, p := range []struct {
				from, to *Stack
				addr     netip.Addr
			}{{a, b, a4}, {b, a, b4}, {a, b, a6}, {b, a, b6}} {
				l, err := p.to.Listen("tcp", netip.AddrPort{})
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				c, err := p.from.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(p.addr, portOf(l)))
				if err != nil {
					t.Errorf("dial %v: %v after %v", p.addr, err, time.Since(begin))
				} else {
					peer, err := l.AcceptConn()
					if err != nil {
						t.Fatal(err)
					}
					peer.Close()
					c.Close()
				}
				l.Close()
			}
		})
	}
}
