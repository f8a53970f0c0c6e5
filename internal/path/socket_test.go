package path

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

func TestTrain(t *testing.T) {
	of := func(sizes ...int) (out [][]byte) {
		for _, n := range sizes {
			out = append(out, make([]byte, n))
		}
		return out
	}
	for _, c := range []struct {
		sizes []int
		want  int
	}{
		{[]int{100}, 1},
		{[]int{100, 100, 100}, 3},
		{[]int{100, 100, 50, 100}, 3}, // a shorter one ends it
		{[]int{100, 101}, 1},
		{[]int{100, 0, 100}, 1}, // an empty one cannot be part of one
		{[]int{0, 0}, 1},
		{slices.Repeat([]int{10}, 100), maxSegments},
		{slices.Repeat([]int{1424}, 50), 45}, // 46 would be 65,504 bytes
		{slices.Repeat([]int{1308}, 50), 50}, // 65,400 bytes
		{[]int{65000, 401}, 1},
		{[]int{65000, 400}, 2},
	} {
		if got := train(of(c.sizes...)); got != c.want {
			t.Errorf("%d × %d…: %d, want %d", len(c.sizes), c.sizes[0], got, c.want)
		}
	}
}

// What lies end to end in memory is sent as it lies, what does not is copied, and
// both arrive alike.
func TestEndToEnd(t *testing.T) {
	buf := make([]byte, 0, 4096)
	lay := func(sizes ...int) (out [][]byte) {
		buf = buf[:0]
		for _, n := range sizes {
			at := len(buf)
			for range n {
				buf = append(buf, byte(len(buf)*7))
			}
			out = append(out, buf[at:])
		}
		return out
	}
	cut := func(list [][]byte) [][]byte { // the first without what follows it
		return append([][]byte{list[0][:len(list[0]):len(list[0])]}, list[1:]...)
	}
	apart := lay(100, 100, 100)
	sets := map[string]struct {
		datagrams [][]byte
		lies      bool
	}{
		"one":       {lay(100), true},
		"three":     {lay(100, 100, 40), true},
		"a gap":     {[][]byte{apart[0], apart[2]}, false},
		"backwards": {[][]byte{apart[1], apart[0]}, false},
		"the same":  {[][]byte{apart[1], apart[1]}, false},
		"cut":       {cut(apart), false},
		"elsewhere": {[][]byte{apart[2], make([]byte, 100)}, false},
		"beyond":    {[][]byte{buf[4000:4096], buf[:96]}, false},
	}
	from, to := loopbackSocket(t), loopbackSocket(t)
	for name, set := range sets {
		all := endToEnd(set.datagrams)
		if (all != nil) != set.lies || set.lies && !slices.Equal(all, slices.Concat(set.datagrams...)) {
			t.Errorf("%s: %d bytes", name, len(all))
		}
		dst := to.pc.LocalAddr().(*net.UDPAddr).AddrPort()
		if err := from.write(dst, set.datagrams); err != nil {
			t.Fatal(err)
		}
		r := to.reader()
		for i := 0; i < len(set.datagrams); {
			got, _, err := r.read()
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range got {
				if !slices.Equal(d, set.datagrams[i]) {
					t.Errorf("%s: datagram %d is another", name, i)
				}
				i++
			}
		}
	}
}

// A stranger is sent what is small, and is no peer for it.
func TestReply(t *testing.T) {
	m := realNet(t)
	a := realNode(t, m, func(c *Config) { c.LoopbackEndpoints = true })
	stranger := loopbackSocket(t)
	to := stranger.pc.LocalAddr().(*net.UDPAddr).AddrPort()
	a.Reply(netip.AddrPort{}, []byte("nowhere"))
	a.Reply(netip.AddrPortFrom(to.Addr(), 0), []byte("nowhere"))
	a.Reply(ap("224.0.0.1:9"), []byte("to many"))
	a.Reply(to, nil)
	a.Reply(to, make([]byte, maxReply+1))
	a.Reply(netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port()), []byte("cookie"))
	got, from, err := stranger.reader().read()
	if err != nil || len(got) != 1 || string(got[0]) != "cookie" || from.Port() != a.addr.Port() {
		t.Errorf("%q from %v: %v", got, from, err)
	}
	b := realNode(t, m, func(c *Config) { c.RelayOnly = true })
	b.Reply(to, []byte("no socket"))
}

func loopbackSocket(t *testing.T) *socket {
	t.Helper()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	pc.SetDeadline(time.Now().Add(20 * time.Second))
	return newSocket(pc)
}

// TestNamedRelay finds the STUN server by the name of the relay.
func TestNamedRelay(t *testing.T) {
	m := realNet(t)
	n := m.Regions[900].Nodes[0]
	n.HostName, n.IPv4, n.IPv6, n.CertName, n.InsecureForTests = "localhost", "", "", "", true
	a := realNode(t, m, func(c *Config) {
		c.Interfaces = func() ([]netip.Prefix, error) { return nil, nil }
		c.LoopbackEndpoints = false
	})
	for deadline := time.Now().Add(10 * time.Second); ; {
		if slices.Contains(a.lastReport().Endpoints, a.addr) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("report %+v", a.lastReport())
		}
		time.Sleep(time.Millisecond) // polls; the cap is above
	}
}

func TestSTUNHost(t *testing.T) {
	for _, c := range []struct {
		n     wire.DERPNode
		v6    bool
		want  string
		ok    bool
		named bool
	}{
		{wire.DERPNode{HostName: "r", IPv4: "192.0.2.1", IPv6: "none"}, false, "192.0.2.1", true, false},
		{wire.DERPNode{HostName: "r", IPv4: "192.0.2.1", IPv6: "none"}, true, "", false, false},
		{wire.DERPNode{HostName: "r", IPv4: "192.0.2.1", IPv6: "2001:db8::1"}, true, "2001:db8::1", true, false},
		{wire.DERPNode{HostName: "r"}, true, "", true, true},
		{wire.DERPNode{HostName: "127.0.0.1"}, false, "127.0.0.1", true, false},
		{wire.DERPNode{HostName: "127.0.0.1"}, true, "127.0.0.1", false, false},
		{wire.DERPNode{HostName: "r", IPv4: "192.0.2.1", STUNTestIP: "127.0.0.1"}, false, "127.0.0.1", true, false},
		{wire.DERPNode{HostName: "r", IPv6: "2001:db8::1", STUNTestIP: "127.0.0.1"}, true, "127.0.0.1", false, false},
		{wire.DERPNode{}, false, "", false, false},
	} {
		a, ok, named := stunHost(&c.n, c.v6)
		if ok != c.ok || ok && (named != c.named || !named && a.String() != c.want) {
			t.Errorf("%+v v6 %v: %v %v %v", c.n, c.v6, a, ok, named)
		}
	}
}

// FuzzIncoming feeds bytes from strangers and from a peer to a running path.
func FuzzIncoming(f *testing.F) {
	peerDisco, peerKey := identity.NewDisco(), identity.NewNode().Public()
	own := identity.NewDisco()
	known := Peer{Key: peerKey, Disco: peerDisco.Public(), HomeRegion: 1}
	p, err := New(Config{
		Key: identity.NewNode(), Disco: own, RelayOnly: true,
		Lookup:      func(k identity.NodePublic) (Peer, bool) { return known, k == peerKey },
		LookupDisco: func(k identity.DiscoPublic) []Peer { return []Peer{known}[:b2i(k == peerDisco.Public())] },
		GuessPorts:  true,
		Receive:     func(Source, [][]byte) {},
		dialRelay: func(ctx context.Context, _ *wire.DERPRegion, _ identity.NodePrivate) (relayConn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { p.Close() })
	p.SetRelays(relayMap(1))
	f.Add([]byte(nil), uint8(0))
	f.Add([]byte{4, 0, 0, 0}, uint8(1))
	f.Add(stun.AppendResponse(nil, stun.TxID{}, ap("192.0.2.1:1")), uint8(0))
	f.Add(disco.Append(nil, disco.CallMeMaybe{Endpoints: []netip.AddrPort{ap("[ff02::1]:9")}}), uint8(3))
	f.Add(disco.Append(nil, disco.Ping{TxID: disco.NewTxID()}), uint8(2))
	for _, ph := range []disco.Phase{disco.MeetAsk, disco.MeetAnswer, disco.MeetStart, disco.MeetGuess} {
		f.Add(disco.Append(nil, disco.Meet{Phase: ph, Endpoints: []netip.AddrPort{ap("203.0.113.9:9")}}), uint8(3))
	}
	sealer := identity.DiscoPrivate.Shared(peerDisco, own.Public())
	pub := peerDisco.Public().Bytes()
	f.Fuzz(func(t *testing.T, b []byte, how uint8) {
		if how&2 != 0 { // what a known peer may seal
			b = sealer.Seal(append([]byte(disco.Magic), pub[:]...), b)
		}
		if how&1 == 0 {
			p.fromUDP(ap("192.0.2.7:7"), [][]byte{b, b})
		} else {
			p.relayPackets(1, peerKey, [][]byte{b, b})
			p.relayPackets(1, identity.NodePublicFrom([32]byte{9}), [][]byte{b})
		}
		if pe := p.peers.get(peerKey); pe != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(pe.ch.candidates) > maxCandidates || len(pe.ch.pending) > maxPending || len(p.held) > 2*maxHeldKind {
				t.Fatalf("%d candidates, %d pending, %d held", len(pe.ch.candidates), len(pe.ch.pending), len(p.held))
			}
		}
	})
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// A reader that heard nothing for a while waits without a buffer, and goes on.
func TestReaderLends(t *testing.T) {
	if !canAwait {
		t.Skip("cannot wait without a buffer here")
	}
	from, to := loopbackSocket(t), loopbackSocket(t)
	dst := to.pc.LocalAddr().(*net.UDPAddr).AddrPort()
	r := to.reader()
	next := func(want string) {
		t.Helper()
		if err := from.write(dst, [][]byte{[]byte(want)}); err != nil {
			t.Fatal(err)
		}
		got, _, err := r.read()
		if err != nil || len(got) != 1 || string(got[0]) != want {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
	}
	if r.buf != nil {
		t.Error("a buffer before there is anything to read")
	}
	next("one")
	to.udp.SetReadDeadline(time.Unix(1, 0)) // nothing came for a while, but before that
	next("two")
	r.release()
	next("three")
	r.busy = false
	to.udp.SetReadDeadline(time.Unix(1, 0))
	next("four")
	r.release()
	if r.buf != nil || r.lent != nil {
		t.Error("the buffer is not given back")
	}
	to.pc.Close()
	if _, _, err := r.read(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed socket: %v", err)
	}
}
