package netcheck

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/internal/stun"
	"mesh/internal/vnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is an internet with relays.
type world struct {
	t      *testing.T
	n      *vnet.Net
	relays *wire.DERPMap
	hosts  map[int]*vnet.Host
	stop   []func()
	wg     sync.WaitGroup
}

func inWorld(t *testing.T, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, n: vnet.New(1), relays: &wire.DERPMap{Regions: map[int]*wire.DERPRegion{}}, hosts: map[int]*vnet.Host{}}
		defer func() {
			for _, stop := range w.stop {
				stop()
			}
			w.n.Close()
			w.wg.Wait()
		}()
		f(w)
	})
}

// relay adds a relay that is so far away, in a region of its own.
func (w *world) relay(region int, latency time.Duration) *wire.DERPNode {
	w.t.Helper()
	h := w.n.Host(vnet.Dual)
	h.SetLink(vnet.Link{Latency: latency})
	w.hosts[region] = h
	n := &wire.DERPNode{Name: fmt.Sprint(region), RegionID: region, HostName: fmt.Sprintf("relay%d.example", region), IPv4: h.Addr().String(), IPv6: h.Addr6().String()}
	w.relays.Regions[region] = &wire.DERPRegion{RegionID: region, RegionCode: fmt.Sprintf("r%d", region), RegionName: fmt.Sprintf("Region %d", region), Nodes: []*wire.DERPNode{n}}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = append(w.stop, cancel)
	for _, network := range []string{"udp4", "udp6"} {
		pc, err := h.ListenUDP(ctx, network, ":3478")
		if err != nil {
			w.t.Fatal(err)
		}
		w.wg.Go(func() { (&stun.Server{Rate: -1}).Serve(ctx, pc) })
	}
	w.https(h, n)
	return n
}

// https serves what a relay serves beside the protocol itself.
func (w *world) https(h *vnet.Host, n *wire.DERPNode) {
	mux := http.NewServeMux()
	mux.HandleFunc("/derp/latency-check", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/generate_204", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set(responseHeader, "response "+r.Header.Get(challengeHeader))
		rw.WriteHeader(http.StatusNoContent)
	})
	cert, pin := selfSigned(w.t, n.HostName)
	n.CertName = pin
	w.serve(h, ":80", mux, nil)
	w.serve(h, ":443", mux, &tls.Config{Certificates: []tls.Certificate{cert}})
}

func (w *world) serve(h *vnet.Host, addr string, handler http.Handler, conf *tls.Config) {
	w.t.Helper()
	ln, err := h.ListenTCP("tcp4", addr)
	if err != nil {
		w.t.Fatal(err)
	}
	if conf != nil {
		ln = tls.NewListener(ln, conf)
	}
	srv := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	w.stop = append(w.stop, func() { srv.Close() })
	w.wg.Go(func() { srv.Serve(ln) })
}

func selfSigned(t *testing.T, name string) (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, fmt.Sprintf("sha256-raw:%x", sha256.Sum256(der))
}

func (w *world) config(h *vnet.Host) Config {
	return Config{
		Relays: w.relays, ListenUDP: h.ListenUDP, DialTCP: h.DialTCP, Interfaces: h.Interfaces,
		Resolve: func(context.Context, string, string) ([]netip.Addr, error) { return nil, errors.New("no such host") },
	}
}

func (w *world) check(cfg Config) *Report {
	w.t.Helper()
	began := time.Now()
	r, err := Run(context.Background(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	if d := time.Since(began); d > DefaultTimeout+time.Millisecond {
		w.t.Errorf("the report took %v", d)
	}
	return r
}

func show(b *bool) string {
	if b == nil {
		return "?"
	}
	return fmt.Sprint(*b)
}

func TestNetworks(t *testing.T) {
	hairpin := vnet.FullCone()
	hairpin.Hairpin = true
	hairpinAPDF := vnet.PortRestricted()
	hairpinAPDF.Hairpin = true
	dual := vnet.Home()
	dual.IPv6 = vnet.FirewalledIPv6
	only6 := vnet.NAT{NoIPv4: true, IPv6: vnet.FirewalledIPv6}
	for _, test := range []struct {
		name string
		host func(n *vnet.Net) *vnet.Host
		// udp, IPv4 available and works, IPv6 the same, NAT, varies, hairpin
		want string
	}{
		{"public", func(n *vnet.Net) *vnet.Host { return n.Host(vnet.V4) }, "true true/true false/? false false ?"},
		{"public, both", func(n *vnet.Net) *vnet.Host { return n.Host(vnet.Dual) }, "true true/true true/true false false ?"},
		{"home", func(n *vnet.Net) *vnet.Host { return n.NAT(vnet.Home()).Host() }, "true true/true false/? true false false"},
		{"home with IPv6", func(n *vnet.Net) *vnet.Host { return n.NAT(dual).Host() }, "true true/true true/true true false false"},
		{"full cone, hairpin", func(n *vnet.Net) *vnet.Host { return n.NAT(hairpin).Host() }, "true true/true false/? true false true"},
		{"port restricted, hairpin", func(n *vnet.Net) *vnet.Host { return n.NAT(hairpinAPDF).Host() }, "true true/true false/? true false true"},
		{"symmetric", func(n *vnet.Net) *vnet.Host { return n.NAT(vnet.Symmetric()).Host() }, "true true/true false/? true true false"},
		{"double NAT", func(n *vnet.Net) *vnet.Host { return n.NAT(vnet.CGN()).NAT(vnet.Home()).Host() }, "true true/true false/? true false false"},
		{"IPv6 only", func(n *vnet.Net) *vnet.Host { return n.NAT(only6).Host() }, "true false/? true/true ? ? ?"},
		{"UDP blocked", func(n *vnet.Net) *vnet.Host { return n.NAT(vnet.UDPBlocked()).Host() }, "false true/false false/? ? ? ?"},
		{"corporate", func(n *vnet.Net) *vnet.Host { return n.NAT(vnet.Corporate()).Host() }, "false true/false false/? ? ? ?"},
		{"offline", func(n *vnet.Net) *vnet.Host { h := n.Host(vnet.V4); h.Cut(true); return h }, "false true/false false/? ? ? ?"},
	} {
		t.Run(test.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.relay(901, 40*time.Millisecond)
				w.relay(902, 15*time.Millisecond)
				h := test.host(w.n)
				r := w.check(w.config(h))
				got := fmt.Sprintf("%s %v/%s %v/%s %s %s %s", show(r.UDP), r.IPv4.Available, show(r.IPv4.Works), r.IPv6.Available, show(r.IPv6.Works),
					show(r.NAT), show(r.MappingVaries), show(r.Hairpin))
				if got != test.want {
					t.Errorf("%s, want %s", got, test.want)
				}
				wantHome := 902
				if test.name == "offline" {
					wantHome = 0
				}
				if r.Preferred != wantHome || len(r.Regions) != 2 || !r.Full {
					t.Errorf("%+v", r)
				}
				blocked := r.UDP != nil && !*r.UDP
				for _, g := range r.Regions {
					if udp, https := g.V4 > 0 || g.V6 > 0, g.HTTPS > 0; udp == blocked || https != (blocked && wantHome != 0) {
						t.Errorf("%+v", g)
					}
					if wantHome == 0 && g.Error == "" {
						t.Errorf("%+v", g)
					}
				}
				if test.name == "public" {
					if g := r.Regions[1]; time.Duration(g.V4) != 40*time.Millisecond {
						t.Errorf("latency %v, want 40 ms", g.V4)
					}
					if r.IPv4.Global.Addr() != h.Addr() {
						t.Errorf("seen as %v", r.IPv4.Global)
					}
				}
				if s := w.n.Stats(); s.Sockets > 2*(2+2)+4 {
					t.Errorf("%d sockets are open", s.Sockets)
				}
			})
		})
	}
}

// A report takes no longer than the network makes it.
func TestDuration(t *testing.T) {
	inWorld(t, func(w *world) {
		for i := range 10 {
			w.relay(901+i, time.Duration(10+20*i)*time.Millisecond)
		}
		h := w.n.Host(vnet.V4)
		began := time.Now()
		first := w.check(w.config(h))
		if d := time.Since(began); d > 500*time.Millisecond {
			t.Errorf("full report: %v", d)
		}
		if len(first.Regions) != 10 || first.Preferred != 901 {
			t.Errorf("%+v", first)
		}
		cfg := w.config(h)
		cfg.Previous = []*Report{first}
		before := w.n.Stats().Packets
		began = time.Now()
		second := w.check(cfg)
		if d := time.Since(began); d > 150*time.Millisecond {
			t.Errorf("incremental report: %v", d)
		}
		if second.Full || len(second.Regions) != 3 || second.Preferred != 901 {
			t.Errorf("%+v", second)
		}
		if n := w.n.Stats().Packets - before; n > 12 {
			t.Errorf("%d packets", n)
		}
		time.Sleep(Memory)
		if third := w.check(cfg); !third.Full {
			t.Error("no full report after five minutes")
		}
	})
}

// Home stays what it is unless another relay is clearly better or it is gone.
func TestHome(t *testing.T) {
	report := func(home int, ms ...float64) *Report {
		r := &Report{Time: time.Now(), Full: true, Preferred: home}
		for i, l := range ms {
			r.Regions = append(r.Regions, Region{ID: i + 1, V4: Latency(l * float64(time.Millisecond))})
		}
		return r
	}
	old := report(2, 5, 100)
	old.Time = time.Now().Add(-Memory)
	m := &wire.DERPMap{Regions: map[int]*wire.DERPRegion{1: {}, 2: {}, 3: {}}}
	scored := &wire.DERPMap{Regions: m.Regions, HomeParams: &wire.DERPHomeParams{RegionScore: map[int]float64{1: 3}}}
	for i, test := range []struct {
		m        *wire.DERPMap
		previous []*Report
		now      *Report
		want     int
	}{
		{m, nil, report(0, 30, 20, 0), 2},
		{m, nil, report(0, 0, 0, 0), 0},
		{m, []*Report{report(1, 30)}, report(0, 30, 21), 1},           // by less than 10 ms
		{m, []*Report{report(1, 100)}, report(0, 100, 80), 1},         // not by a third
		{m, []*Report{report(1, 100)}, report(0, 100, 60), 2},         //
		{m, []*Report{report(1, 20)}, report(0, 0, 60), 2},            // home does not answer
		{m, []*Report{report(1, 20)}, report(0, 0, 0), 1},             // nobody does
		{m, []*Report{report(7, 20)}, report(0, 0, 0), 0},             // and home left the map
		{m, []*Report{report(2, 20, 90)}, report(0, 100, 90), 1},      // region 1 was much nearer a moment ago
		{m, []*Report{old}, report(0, 100, 90), 2},                    // but that is too long ago
		{scored, nil, report(0, 20, 50), 2},                           // 60 against 50
		{m, []*Report{nil, report(1, 30), nil}, report(0, 30, 29), 1}, //
	} {
		if got := choose(test.m, test.now, test.previous, false); got != test.want {
			t.Errorf("%d: %d, want %d", i, got, test.want)
		}
	}
	// The connection to home is known to work, but its STUN answers are lost.
	near, far, gone := report(1, 20), report(1, 200), report(7, 1)
	if got := choose(m, report(0, 0, 15), []*Report{near}, true); got != 1 {
		t.Errorf("alive: %d", got)
	}
	if got := choose(m, report(0, 0, 10), []*Report{far}, true); got != 2 {
		t.Errorf("alive but far: %d", got)
	}
	if got := choose(m, report(0, 0, 10), []*Report{gone}, true); got != 2 {
		t.Errorf("alive but not in the map: %d", got)
	}
}

func TestPlan(t *testing.T) {
	m := &wire.DERPMap{Regions: map[int]*wire.DERPRegion{0: {Nodes: []*wire.DERPNode{{IPv4: "192.0.2.9"}}}, 7: nil, 70000: {}, 8: {NoMeasureNoHome: true}}}
	for id := 1; id <= 6; id++ {
		m.Regions[id] = &wire.DERPRegion{RegionID: 99, Nodes: []*wire.DERPNode{nil, {IPv4: "192.0.2.1", IPv6: "none"}, {STUNPort: -1, HostName: "a.example"}, {HostName: "b.example"}}}
	}
	regions := measured(m)
	if len(regions) != 6 || regions[0].RegionID != 1 {
		t.Fatalf("%+v", regions)
	}
	targets := plan(regions, true, nil, 0)
	if len(targets) != 12 || len(targets[0].nodes) != 2 || len(targets[1].nodes) != 1 || !targets[1].v6 {
		t.Errorf("%+v", targets)
	}
	if want := []time.Duration{0, 100 * time.Millisecond, 200 * time.Millisecond}; !reflect.DeepEqual(targets[0].after, want) {
		t.Errorf("%v", targets[0].after)
	}
	latency := map[int]time.Duration{1: 50e6, 2: 40e6, 3: 30e6, 4: 20e6, 5: 10e6}
	count := map[int]int{}
	for _, g := range plan(regions, false, latency, 1) {
		count[g.region] = len(g.after)
	}
	if want := map[int]int{5: 2, 4: 2, 3: 1, 1: 4}; !reflect.DeepEqual(count, want) {
		t.Errorf("%v", count)
	}
	if got := plan(regions, false, nil, 0); len(got) != 0 {
		t.Errorf("%v", got)
	}
}

// Of an address that only its name tells, the resolver is asked.
func TestNames(t *testing.T) {
	inWorld(t, func(w *world) {
		n := w.relay(901, time.Millisecond)
		at := netip.MustParseAddr(n.IPv4)
		n.IPv4, n.IPv6 = "", "none"
		cfg := w.config(w.n.NAT(vnet.Home()).Host())
		cfg.Resolve = func(_ context.Context, network, host string) ([]netip.Addr, error) {
			if network != "ip4" || host != n.HostName {
				t.Errorf("resolve %s %s", network, host)
			}
			return []netip.Addr{netip.MustParseAddr("2001:db8::9"), at}, nil
		}
		if r := w.check(cfg); r.Preferred != 901 || r.MappingVaries != nil {
			t.Errorf("%+v", r)
		}
		// Two relays in one region tell the kind of the NAT, too.
		second := *w.relay(902, 5*time.Millisecond)
		delete(w.relays.Regions, 902)
		w.relays.Regions[901].Nodes = append(w.relays.Regions[901].Nodes, &second)
		if r := w.check(cfg); show(r.MappingVaries) != "false" {
			t.Errorf("%+v", r)
		}
	})
}

func TestCaptivePortal(t *testing.T) {
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		off     bool
		want    string
	}{
		"free":         {nil, false, "false"},
		"not offered":  {nil, true, "?"},
		"login page":   {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "log in") }, false, "true"},
		"redirect":     {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "http://portal/", http.StatusFound) }, false, "true"},
		"a plain 204":  {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }, false, "true"},
		"hangs up":     {func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, false, "?"},
		"never ending": {func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, false, "?"},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				n := w.relay(901, time.Millisecond)
				n.CanPort80 = !test.off
				h := w.n.NAT(vnet.Home()).Host()
				cfg := w.config(h)
				if test.handler != nil {
					portal := w.n.Host(vnet.V4)
					w.serve(portal, ":80", test.handler, nil)
					cfg.DialTCP = func(ctx context.Context, network, addr string) (net.Conn, error) {
						if _, port, _ := net.SplitHostPort(addr); port == "80" {
							addr = portal.Addr().String() + ":80"
						}
						return h.DialTCP(ctx, network, addr)
					}
				}
				if r := w.check(cfg); show(r.CaptivePortal) != test.want {
					t.Errorf("%s, want %s", show(r.CaptivePortal), test.want)
				}
			})
		})
	}
}

// Where UDP is blocked, a relay that cannot prove who it is does not count.
func TestHTTPSVerified(t *testing.T) {
	inWorld(t, func(w *world) {
		n := w.relay(901, time.Millisecond)
		h := w.n.NAT(vnet.Corporate()).Host()
		good := n.CertName
		for _, test := range []struct {
			cert     string
			insecure bool
			want     string
		}{
			{good, false, ""}, {"", true, ""},
			{"sha256-raw:" + strings.Repeat("0", 64), false, "does not match the pin"},
			{"sha256-raw:zz", false, "malformed pin"},
			{"", false, "unknown authority"}, {"other.example", false, "valid for"},
		} {
			n.CertName, n.InsecureForTests = test.cert, test.insecure
			cfg := w.config(h)
			cfg.RootCAs = x509.NewCertPool()
			r := w.check(cfg)
			g := r.Regions[0]
			if (g.HTTPS > 0) != (test.want == "") || !strings.Contains(g.Error, test.want) {
				t.Errorf("%q: %+v", test.cert, g)
			}
		}
	})
}

// Whoever else sends datagrams changes nothing.
func TestForgery(t *testing.T) {
	inWorld(t, func(w *world) {
		w.relay(901, 50*time.Millisecond)
		h := w.n.Host(vnet.V4)
		evil := w.n.Host(vnet.V4)
		cfg := w.config(h)
		lies := netip.MustParseAddrPort("198.51.100.66:6")
		cfg.ListenUDP = func(ctx context.Context, network, addr string) (net.PacketConn, error) {
			pc, err := h.ListenUDP(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &spied{pc, func(b []byte) {
				// Somebody who even sees the request answers first, from elsewhere.
				tx, err := stun.ParseRequest(b)
				if err != nil {
					return
				}
				from, err := evil.ListenUDP(ctx, "udp4", ":0")
				if err != nil {
					return
				}
				defer from.Close()
				port := pc.LocalAddr().(*net.UDPAddr).AddrPort().Port()
				to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.Addr(), port))
				from.WriteTo(stun.AppendResponse(nil, tx, lies), to)
				from.WriteTo(stun.AppendResponse(nil, stun.NewTxID(), lies), to)
				from.WriteTo([]byte("junk"), to)
			}}, nil
		}
		r := w.check(cfg)
		if r.IPv4.Global.Addr() != h.Addr() || r.Regions[0].V4 < Latency(100*time.Millisecond) {
			t.Errorf("%+v", r)
		}
	})
}

type spied struct {
	net.PacketConn
	see func([]byte)
}

func (s *spied) WriteTo(b []byte, to net.Addr) (int, error) {
	s.see(b)
	return s.PacketConn.WriteTo(b, to)
}

func TestErrors(t *testing.T) {
	for _, m := range []*wire.DERPMap{nil, {}, {Regions: map[int]*wire.DERPRegion{1: nil, -1: {}, 2: {NoMeasureNoHome: true}}}} {
		if _, err := Run(t.Context(), Config{Relays: m}); !errors.Is(err, errNoRelays) {
			t.Errorf("%v: %v", m, err)
		}
	}
	inWorld(t, func(w *world) {
		w.relay(901, time.Millisecond)
		cfg := w.config(w.n.Host(vnet.V4))
		refused := errors.New("no sockets today")
		cfg.ListenUDP = func(context.Context, string, string) (net.PacketConn, error) { return nil, refused }
		if _, err := Run(context.Background(), cfg); !errors.Is(err, refused) {
			t.Errorf("%v", err)
		}
		cfg = w.config(w.n.NAT(vnet.UDPBlocked()).Host())
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(100*time.Millisecond, cancel)
		began := time.Now()
		if _, err := Run(ctx, cfg); !errors.Is(err, context.Canceled) || time.Since(began) > 200*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		// A relay map full of nonsense.
		w.relays.Regions[902] = &wire.DERPRegion{Nodes: []*wire.DERPNode{nil, {STUNPort: 70000}, {IPv4: "x", IPv6: "y", HostName: "a b\r\n"}, {HostName: "::1"}, {STUNTestIP: "224.0.0.1"}}}
		if r := w.check(w.config(w.n.Host(vnet.Dual))); r.Preferred != 901 {
			t.Errorf("%+v", r)
		}
	})
}

func TestPortMapping(t *testing.T) {
	inWorld(t, func(w *world) {
		w.relay(901, time.Millisecond)
		cfg := w.config(w.n.NAT(vnet.Home()).Host())
		cfg.PortMapping = func(context.Context) PortMapping {
			return PortMapping{PCP: true, External: netip.MustParseAddr("10.0.0.1")}
		}
		r := w.check(cfg)
		if n := r.NetInfo(); n.PCP == nil || !*n.PCP || n.UPnP == nil || *n.UPnP || n.PreferredDERP != 901 || n.DERPLatency["901-v4"] == 0 || n.WorkingUDP == nil {
			t.Errorf("%+v", n)
		}
		cfg.Previous = []*Report{r}
		if r := w.check(cfg); r.PortMapping != nil {
			t.Errorf("asked again: %+v", r)
		}
	})
}
