package portmap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// client starts a client and waits until it has found what there is. Changes
// are counted.
type client struct {
	*Client
	t  *testing.T
	mu sync.Mutex // guards n
	n  int
}

func start(t *testing.T, cfg Config) *client {
	c := &client{t: t}
	cfg.Changed = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.n++
	}
	c.Client = New(cfg)
	t.Cleanup(func() { c.Close() })
	c.settle()
	return c
}

// settle waits for what takes a moment.
func (c *client) settle() {
	time.Sleep(10 * time.Second) // virtual
	synctest.Wait()
}

func (c *client) changes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *client) want(addr string) {
	c.t.Helper()
	got, ok := c.Mapping()
	if want, err := netip.ParseAddrPort(addr); ok != (err == nil) || got != want {
		c.t.Errorf("mapping %v, %v; want %q (%+v)", got, ok, addr, c.Status())
	}
}

func TestProtocols(t *testing.T) {
	for _, test := range []struct {
		speaks []Protocol
		refuse map[Protocol]int
		want   Protocol
		took   []string
	}{
		{speaks: []Protocol{PCP}, want: PCP, took: []string{"PCP 41641 2h0m0s"}},
		{speaks: []Protocol{PMP}, want: PMP, took: []string{"NAT-PMP 41641 2h0m0s"}},
		{speaks: []Protocol{UPnP}, want: UPnP, took: []string{"UPnP 41641 2h0m0s"}},
		{speaks: []Protocol{PCP, PMP, UPnP}, want: PCP, took: []string{"PCP 41641 2h0m0s"}},
		{speaks: []Protocol{PCP, PMP, UPnP}, refuse: map[Protocol]int{PCP: 2}, want: PMP, took: []string{"PCP 41641 2h0m0s", "NAT-PMP 41641 2h0m0s"}},
		{speaks: []Protocol{PCP, PMP, UPnP}, refuse: map[Protocol]int{PCP: 2, PMP: 2}, want: UPnP,
			took: []string{"PCP 41641 2h0m0s", "NAT-PMP 41641 2h0m0s", "UPnP 41641 2h0m0s"}},
		{speaks: []Protocol{UPnP}, refuse: map[Protocol]int{UPnP: upnpOnlyPermanent}, want: UPnP, took: []string{"UPnP 41641 2h0m0s", "UPnP 41641 0s"}},
		{speaks: []Protocol{UPnP}, refuse: map[Protocol]int{UPnP: 606}, took: []string{"UPnP 41641 2h0m0s"}},
		{},
	} {
		t.Run(fmt.Sprint(test.speaks, test.refuse), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, test.speaks...)
				for p, code := range test.refuse {
					g.refuse[p] = code
				}
				c := start(t, g.config())
				if got := g.took(); !reflect.DeepEqual(got, test.took) {
					t.Errorf("the gateway took %q, want %q", got, test.took)
				}
				st := c.Status()
				if st.Protocol != test.want {
					t.Errorf("by %q, want %q: %+v", st.Protocol, test.want, st)
				}
				if test.want == "" {
					c.want("none")
					if st.Err == nil || c.changes() != 0 {
						t.Errorf("no reason, or changes: %+v, %d", st, c.changes())
					}
					c.Close()
					return
				}
				c.want("203.0.113.7:41641")
				if c.changes() != 1 || st.DoubleNAT || st.Gateway != gwAddr {
					t.Errorf("%d changes, %+v", c.changes(), st)
				}
				if m := g.mapped(); len(m) != 1 || m[41641].internal != localPort {
					t.Errorf("table %v", m)
				}
				if n := g.sockets(); n != 0 {
					t.Errorf("%d sockets stay open", n)
				}
				c.Close()
				c.want("none")
				if m := g.mapped(); len(m) != 0 {
					t.Errorf("not released: %v", m)
				}
				if err := c.Status().Err; !errors.Is(err, net.ErrClosed) {
					t.Errorf("after Close: %v", err)
				}
			})
		})
	}
}

func TestRenewal(t *testing.T) {
	for _, p := range []Protocol{PCP, PMP, UPnP} {
		for granted, every := range map[time.Duration]time.Duration{
			0:                checkEvery, // what is asked for
			10 * time.Minute: 5 * time.Minute,
			2 * time.Second:  minRenew, // however short: the gateway does not keep us busy
		} {
			if p == UPnP && granted != 0 {
				continue // the gateway does not say
			}
			t.Run(fmt.Sprint(p, granted), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGateway(t, p)
					g.lifetime = granted
					c := start(t, g.config())
					began := time.Now()
					g.took()
					time.Sleep(10 * every)
					synctest.Wait()
					if got := g.took(); len(got) != 10 {
						t.Errorf("%d renewals in %v", len(got), time.Since(began))
					}
					c.want("203.0.113.7:41641")
					if c.changes() != 1 {
						t.Errorf("%d changes", c.changes())
					}
				})
			})
		}
	}
}

// A gateway that reboots forgets; the next renewal mends it, and a probe that
// sees the new epoch does so at once.
func TestReboot(t *testing.T) {
	for _, p := range []Protocol{PCP, PMP} {
		for _, probe := range []bool{false, true} {
			t.Run(fmt.Sprint(p, probe), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGateway(t, p)
					g.firstExt = 7000
					c := start(t, g.config())
					c.want("203.0.113.7:7000")
					g.reboot()
					if probe {
						if _, err := c.Probe(t.Context()); err != nil {
							t.Fatal(err)
						}
						c.settle()
					} else {
						time.Sleep(checkEvery)
						synctest.Wait()
					}
					c.want("203.0.113.7:7001")
					if m := g.mapped(); len(m) != 1 || m[7001].internal != localPort {
						t.Errorf("table %v", m)
					}
				})
			})
		}
	}
}

func TestEpoch(t *testing.T) {
	now := time.Now()
	for _, test := range []struct {
		before, after uint32
		elapsed       time.Duration
		want          bool
	}{
		{100, 200, 100 * time.Second, false},
		{100, 194, 100 * time.Second, false}, // its clock is slow
		{100, 206, 100 * time.Second, false},
		{100, 99, 0, false},
		{100, 98, 0, true},
		{100, 50, 50 * time.Second, true},
		{100, 150, 100 * time.Second, true},
		{100, 400, 100 * time.Second, true},
		{1 << 31, 0, time.Hour, true},
		{0, 1<<32 - 1, time.Hour, true},
	} {
		if got := restarted(test.before, now, test.after, now.Add(test.elapsed)); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}

func TestNewExternalAddress(t *testing.T) {
	for _, p := range []Protocol{PCP, PMP, UPnP} {
		t.Run(string(p), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, p)
				c := start(t, g.config())
				g.change(func() { g.external = netip.MustParseAddr("198.51.100.9") })
				c.NetworkChanged() // somebody saw it by STUN
				c.settle()
				c.want("198.51.100.9:41641")
				// Behind another NAT the mapping is kept but not shown.
				g.change(func() { g.external = netip.MustParseAddr("100.64.3.4") })
				time.Sleep(checkEvery)
				synctest.Wait()
				c.want("none")
				if st := c.Status(); !st.DoubleNAT || st.External.String() != "100.64.3.4:41641" || st.Err != nil {
					t.Errorf("%+v", st)
				}
				g.change(func() { g.external = extAddr })
				time.Sleep(checkEvery)
				synctest.Wait()
				c.want("203.0.113.7:41641")
				if c.changes() != 4 {
					t.Errorf("%d changes", c.changes())
				}
			})
		})
	}
}

// Addresses that no host of the internet has are not believed.
func TestNonsense(t *testing.T) {
	for _, addr := range []string{"0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.1.1", "241.0.0.1"} {
		for _, p := range []Protocol{PCP, PMP, UPnP} {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, p)
				g.external = netip.MustParseAddr(addr)
				c := start(t, g.config())
				c.want("none")
				if st := c.Status(); st.External.IsValid() || st.Err == nil {
					t.Errorf("%s by %s: %+v", addr, p, st)
				}
			})
		}
	}
}

func TestNewGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PCP)
		c := start(t, g.config())
		c.want("203.0.113.7:41641")
		g.took()
		// Another network with another gateway, which speaks something else.
		g.change(func() {
			g.gw, g.self, g.external = netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("198.51.100.1")
			g.pcp, g.pmp = false, true
			clear(g.table)
		})
		c.NetworkChanged()
		c.settle()
		c.want("198.51.100.1:41641")
		if c.changes() != 3 { // there, gone, there
			t.Errorf("%d changes", c.changes())
		}
		// Back: what worked is tried first, and without a search.
		g.change(func() {
			g.gw, g.self, g.external = gwAddr, selfAddr, extAddr
			g.pcp, g.pmp = true, true
			g.packets = 0
			clear(g.table)
		})
		c.NetworkChanged()
		c.settle()
		c.want("203.0.113.7:41641")
		if st := c.Status(); st.Protocol != PCP || g.packets != 1 {
			t.Errorf("%d packets, %+v", g.packets, st)
		}
		// No network, a public address, a gateway that is none.
		for _, l := range []link{{}, {netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.5")}, {selfAddr, selfAddr},
			{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")}, {netip.MustParseAddr("fe80::1"), selfAddr}} {
			g.change(func() { g.gw, g.self, g.packets = l.gw, l.self, 0 })
			c.NetworkChanged()
			c.settle()
			c.want("none")
			if err := c.Status().Err; err == nil || g.packets != 0 {
				t.Errorf("%v: %v, %d packets", l, err, g.packets)
			}
		}
	})
}

// Without IPv4 the gateway's firewall is asked to let the port through, by PCP
// alone: the others do not know IPv6.
func TestIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PCP, PMP, UPnP)
		g.gw, g.self = netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("2001:db8::5")
		g.external = g.self
		c := start(t, g.config())
		c.want("[2001:db8::5]:41641")
		if got := g.took(); c.Status().Protocol != PCP || len(got) != 1 || len(g.dials) != 0 || g.packets > 3 {
			t.Errorf("%+v, %q, %d packets", c.Status(), got, g.packets)
		}
		g.change(func() { g.pcp, g.pmp = false, true })
		if r, err := c.Probe(t.Context()); err != nil || r != (Result{Gateway: g.gw}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

func TestNewPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, UPnP)
		cfg := g.config()
		var mu sync.Mutex
		port := uint16(0)
		cfg.LocalPort = func() uint16 {
			mu.Lock()
			defer mu.Unlock()
			return port
		}
		set := func(p uint16) {
			mu.Lock()
			port = p
			mu.Unlock()
		}
		c := start(t, cfg)
		c.want("none")
		if st := c.Status(); !errors.Is(st.Err, errNoPort) {
			t.Errorf("%+v", st)
		}
		for _, p := range []uint16{1000, 2000, 0} {
			set(p)
			c.NetworkChanged()
			c.settle()
			m := g.mapped()
			if p == 0 {
				c.want("none")
				if len(m) != 0 {
					t.Errorf("table %v", m)
				}
				continue
			}
			c.want(fmt.Sprintf("203.0.113.7:%d", p))
			if len(m) != 1 || m[p].internal != p {
				t.Errorf("port %d: table %v", p, m)
			}
		}
	})
}

// A gateway that falls silent is asked again a few times, then given up; when
// it is back it is found again.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PMP)
		g.lifetime = 4 * time.Minute
		c := start(t, g.config())
		g.change(func() { g.silent = true })
		time.Sleep(2*time.Minute + 5*time.Second)
		synctest.Wait()
		c.want("203.0.113.7:41641") // it may be a lost packet
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		c.want("none")
		g.change(func() { g.silent = false })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		c.want("203.0.113.7:41641")
		// A short outage is not noticed by anybody.
		before := c.changes()
		time.Sleep(2*time.Minute - 5*time.Second)
		g.change(func() { g.silent = true })
		time.Sleep(15 * time.Second)
		g.change(func() { g.silent = false })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		c.want("203.0.113.7:41641")
		if c.changes() != before {
			t.Errorf("%d changes, then %d", before, c.changes())
		}
	})
}

// A lease that cannot be renewed ends at its time.
func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PCP)
		g.lifetime = 40 * time.Second
		c := start(t, g.config())
		end := c.Status().Expires
		g.change(func() { g.silent = true })
		time.Sleep(time.Until(end) + 5*time.Second)
		synctest.Wait()
		c.want("none")
	})
}

// Where the preferred protocol fails later, by a refusal or by silence, another
// one takes over without a moment without a mapping.
func TestFallback(t *testing.T) {
	for name, fail := range map[string]func(g *fakeGateway){
		"refusal": func(g *fakeGateway) { g.refuse[PCP] = 2 },
		"silence": func(g *fakeGateway) { g.pcp = false },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, PCP, UPnP)
				c := start(t, g.config())
				g.change(func() { fail(g) })
				time.Sleep(checkEvery + time.Minute)
				synctest.Wait()
				c.want("203.0.113.7:41641")
				if st := c.Status(); st.Protocol != UPnP || c.changes() != 1 {
					t.Errorf("%d changes, %+v", c.changes(), st)
				}
			})
		})
	}
}

// What a node costs that has nothing to do.
func TestIdle(t *testing.T) {
	for _, test := range []struct {
		speaks []Protocol
		max    int // packets a day
	}{{nil, 1000}, {[]Protocol{PCP}, 150}, {[]Protocol{PMP}, 300}} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(t, test.speaks...)
			c := start(t, g.config())
			g.change(func() { g.packets = 0 })
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			if g.packets > test.max || g.packets == 0 {
				t.Errorf("%v: %d packets a day", test.speaks, g.packets)
			}
			c.Close()
		})
	}
}

func TestProbe(t *testing.T) {
	for _, speaks := range [][]Protocol{{}, {PCP}, {PMP}, {UPnP}, {PCP, PMP, UPnP}} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(t, speaks...)
			cfg := g.config()
			cfg.LocalPort = nil
			c := New(cfg)
			defer c.Close()
			began := time.Now()
			r, err := c.Probe(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := Result{Gateway: gwAddr, PCP: slices.Contains(speaks, PCP), PMP: slices.Contains(speaks, PMP), UPnP: slices.Contains(speaks, UPnP)}
			if want.PMP || want.UPnP {
				want.External = extAddr
			}
			if r != want {
				t.Errorf("%v: %+v", speaks, r)
			}
			if d := time.Since(began); d > 2*time.Second {
				t.Errorf("it took %v", d)
			}
			if len(g.mapped()) != 0 || len(g.took()) != 0 || g.sockets() != 0 {
				t.Error("the probe left something behind")
			}
			g.change(func() { g.gw = netip.Addr{} })
			if r, err := c.Probe(t.Context()); !errors.Is(err, errNoGateway) || r != (Result{}) {
				t.Errorf("without a gateway: %+v, %v", r, err)
			}
		})
	}
}

// Close ends everything in a bounded time, whatever is going on, and may be
// called at any time by anybody.
func TestClose(t *testing.T) {
	for _, after := range []time.Duration{0, time.Millisecond, 100 * time.Millisecond, time.Second, time.Hour} {
		for _, silent := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, PCP, PMP, UPnP)
				c := New(g.config())
				time.Sleep(after)
				g.change(func() { g.silent = silent })
				began := time.Now()
				probed := make(chan struct{})
				go func() {
					c.Probe(t.Context())
					close(probed)
				}()
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() { c.Close() })
				}
				c.NetworkChanged()
				wg.Wait()
				<-probed
				if d := time.Since(began); d > releaseTime {
					t.Errorf("Close after %v took %v", after, d)
				}
				if n := g.sockets(); n != 0 {
					t.Errorf("%d sockets", n)
				}
				if m := g.mapped(); !silent && len(m) != 0 {
					t.Errorf("after %v: not released: %v", after, m)
				}
				c.NetworkChanged()
			})
		}
	}
}

// A port that another host has taken is not insisted on.
func TestUPnPConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, UPnP)
		g.table[localPort] = mapping{host: netip.MustParseAddr("192.168.1.99"), internal: localPort}
		c := start(t, g.config())
		got, ok := c.Mapping()
		if !ok || got.Port() == localPort || got.Port() < 1024 || g.mapped()[got.Port()].internal != localPort {
			t.Errorf("%v, %v, %v", got, ok, g.mapped())
		}
	})
}

func TestAddresses(t *testing.T) {
	for text, want := range map[string]bool{
		"8.8.4.4": true, "203.0.113.1": true, "2001:db8::1": true, "10.0.0.1": false, "172.16.0.1": false, "192.168.0.1": false,
		"100.64.0.1": false, "100.128.0.1": true, "127.0.0.1": false, "169.254.0.1": false, "0.0.0.0": false, "0.0.0.1": false,
		"224.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false, "fe80::1": false, "fd00::1": false, "::1": false, "::": false,
		"::ffff:10.0.0.1": false, "192.0.0.8": false, "198.18.0.1": false,
	} {
		if got := isPublic(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
	if isPublic(netip.Addr{}) {
		t.Error("no address is public")
	}
}
