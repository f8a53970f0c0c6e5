package path

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mesh/control/wire"
	derprelay "mesh/derp/relay"
	"mesh/identity"
	"mesh/internal/stun"
)

// realNet is a relay with STUN on loopback.
func realNet(t testing.TB) *wire.DERPMap {
	t.Helper()
	key := identity.NewNode()
	srv := derprelay.New(derprelay.Config{Key: key, Admit: func(context.Context, identity.NodePublic, netip.Addr) error { return nil }})
	certPEM, keyPEM, pin, err := derprelay.SelfSigned(nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln, derprelay.TLSConfig(cert, srv)) })
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			if tx, err := stun.ParseRequest(b[:n]); err == nil {
				pc.WriteTo(stun.AppendResponse(nil, tx, from.(*net.UDPAddr).AddrPort()), from)
			}
		}
	})
	t.Cleanup(func() {
		srv.Close()
		pc.Close()
		wg.Wait()
	})
	return &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900: {RegionID: 900, Nodes: []*wire.DERPNode{{
		Name: "900a", RegionID: 900, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none", CertName: pin,
		DERPPort: ln.Addr().(*net.TCPAddr).Port, STUNPort: pc.LocalAddr().(*net.UDPAddr).Port,
	}}}}}
}

// realNode is a Path on real sockets.
func realNode(t testing.TB, m *wire.DERPMap, change func(*Config)) *node {
	t.Helper()
	nd := &node{
		disc: identity.NewDisco(),
		nm:   &netmap{peers: make(map[identity.NodePublic]Peer)},
	}
	nd.cfg = Config{
		Key: identity.NewNode(), Disco: nd.disc,
		Lookup: nd.nm.lookup, LookupDisco: nd.nm.lookupDisco,
		Receive: nd.receive, Report: nd.reported,
		LoopbackEndpoints: true,
		Interfaces: func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")}, nil
		},
	}
	if change != nil {
		change(&nd.cfg)
	}
	p, err := New(nd.cfg)
	if err != nil {
		t.Fatal(err)
	}
	nd.Path = p
	nd.addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.LocalPort())
	t.Cleanup(func() { p.Close() })
	p.SetRelays(m)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return nd
}

// wrapped hides that a socket is a *net.UDPConn.
type wrapped struct{ net.PacketConn }

func TestRealSockets(t *testing.T) {
	m := realNet(t)
	for _, mode := range []string{"fast", "plain", "relay only", "one side without gso"} {
		t.Run(mode, func(t *testing.T) {
			change := func(c *Config) {
				switch mode {
				case "plain":
					c.ListenUDP = func(ctx context.Context, network, addr string) (net.PacketConn, error) {
						pc, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
						if err != nil {
							return nil, err
						}
						return wrapped{pc}, nil
					}
				case "relay only":
					c.RelayOnly = true
				}
			}
			var mu sync.Mutex
			next := uint32(0)
			var direct, bad int
			done := make(chan struct{})
			const rounds, burst = 200, 50
			a := realNode(t, m, change)
			b := realNode(t, m, func(c *Config) {
				change(c)
				c.Receive = func(src Source, datagrams [][]byte) {
					mu.Lock()
					defer mu.Unlock()
					for _, d := range datagrams {
						if len(d) < 1280 || int(d[4]) != len(d)-1280 {
							bad++
						}
						if src.Addr.IsValid() {
							direct++
						}
						if n := binary.LittleEndian.Uint32(d); n == next {
							if next++; next == rounds*burst {
								close(done)
							}
						}
					}
				}
			})
			if mode == "one side without gso" {
				a.socks.Load().each(func(s *socket) { s.gso.Store(false) })
			}
			pa, pb := a.peer(900), b.peer(900)
			if mode == "relay only" {
				pa.Endpoints, pb.Endpoints = nil, nil
			}
			a.knows(pb)
			b.knows(pa)
			// Numbered datagrams; a burst is sent again until it is all there,
			// as nothing here guarantees delivery.
			timeout := time.After(20 * time.Second)
			for {
				mu.Lock()
				from := next
				mu.Unlock()
				if from == rounds*burst {
					break
				}
				var out [][]byte
				for i := range uint32(burst) {
					if from+i >= rounds*burst {
						break
					}
					short := 20
					if i%10 == 9 {
						short = 0 // ends a train
					}
					d := make([]byte, 1280+short)
					binary.LittleEndian.PutUint32(d, from+i)
					d[4] = byte(short)
					out = append(out, d)
				}
				if err := a.Send(b.key(), netip.AddrPort{}, out); err != nil {
					t.Fatal(err)
				}
				for range 100 { // until it is there, or 10 ms
					mu.Lock()
					arrived := next >= from+uint32(len(out))
					mu.Unlock()
					if arrived {
						break
					}
					select {
					case <-done:
					case <-time.After(100 * time.Microsecond):
					case <-timeout:
						t.Fatalf("%d of %d after 20 s", from, rounds*burst)
					}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if bad != 0 {
				t.Errorf("%d datagrams of wrong length", bad)
			}
			if (direct == 0) != (mode == "relay only") {
				t.Errorf("%d datagrams by UDP", direct)
			}
		})
	}
}

func TestPortInUse(t *testing.T) {
	pc, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	port := pc.LocalAddr().(*net.UDPAddr).Port
	_, err = New(Config{Key: identity.NewNode(), Disco: identity.NewDisco(), Port: uint16(port)})
	if err == nil || !containsAll(err.Error(), "UDP port", fmt.Sprint(port), "in use") {
		t.Errorf("error %v", err)
	}
}

func containsAll(s string, parts ...string) bool {
	for _, p := range parts {
		found := false
		for i := 0; i+len(p) <= len(s); i++ {
			found = found || s[i:i+len(p)] == p
		}
		if !found {
			return false
		}
	}
	return true
}

// TestCloseRaces calls everything while the path closes, several times.
func TestCloseRaces(t *testing.T) {
	m := realNet(t)
	for range 5 {
		a, b := realNode(t, m, nil), realNode(t, m, nil)
		a.knows(b.peer(900))
		b.knows(a.peer(900))
		var wg sync.WaitGroup
		var stop atomic.Bool
		closing := make(chan struct{})
		for _, f := range []func(){
			func() { a.Send(b.key(), netip.AddrPort{}, [][]byte{make([]byte, 1000)}) },
			func() { b.Send(a.key(), netip.AddrPort{}, [][]byte{make([]byte, 100), make([]byte, 100)}) },
			func() { a.Update([]identity.NodePublic{b.key()}) },
			func() { a.Status(b.key()); a.HomeRegion(); a.LocalPort() },
			func() { a.SetRelays(m) },
			func() { a.Authenticated(b.key(), Source{Addr: b.addr}) },
			func() { a.Rebind() },
		} {
			wg.Go(func() {
				for n := 0; !stop.Load(); n++ {
					f()
					if n == 20 {
						select {
						case closing <- struct{}{}:
						default:
						}
					}
				}
			})
		}
		<-closing
		var closers sync.WaitGroup
		for range 3 {
			closers.Go(func() { a.Close() })
		}
		closers.Wait()
		stop.Store(true)
		wg.Wait()
		b.Close()
	}
}

func benchPair(b *testing.B, change func(*Config)) (*node, *node, *atomic.Int64) {
	m := realNet(b)
	var got atomic.Int64
	x := realNode(b, m, change)
	y := realNode(b, m, func(c *Config) {
		if change != nil {
			change(c)
		}
		c.Receive = func(_ Source, d [][]byte) {
			n := 0
			for _, p := range d {
				n += len(p)
			}
			got.Add(int64(n))
		}
	})
	x.knows(y.peer(900))
	y.knows(x.peer(900))
	return x, y, &got
}

func benchSend(b *testing.B, batch int, change func(*Config)) {
	x, y, got := benchPair(b, change)
	out := make([][]byte, batch)
	for i := range out {
		out[i] = make([]byte, 1312)
	}
	for !x.Status(y.key()).Trusted && !x.cfg.RelayOnly {
		x.Send(y.key(), netip.AddrPort{}, out[:1])
		time.Sleep(time.Millisecond)
	}
	b.SetBytes(int64(batch * 1312))
	b.ReportAllocs()
	before := got.Load()
	to := y.key()
	for b.Loop() {
		x.Send(to, netip.AddrPort{}, out)
	}
	b.ReportMetric(100*float64(got.Load()-before)/float64(b.N*batch*1312), "%delivered")
}

func BenchmarkSend1(b *testing.B)     { benchSend(b, 1, nil) }
func BenchmarkSend49(b *testing.B)    { benchSend(b, 49, nil) }
func BenchmarkSendRelay(b *testing.B) { benchSend(b, 49, func(c *Config) { c.RelayOnly = true }) }
