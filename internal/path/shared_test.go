package path

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// patient waits for something that real sockets bring.
func patient(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// sharer is a node that shares sockets with others of h.
func sharer(t testing.TB, m *wire.DERPMap, h *sharing) *node {
	t.Helper()
	return realNode(t, m, func(c *Config) {
		c.Share, c.sharing = true, h
		key := c.Key.Public().Bytes()
		c.Owns = func(b []byte) bool { return string(b[8:40]) == string(key[:]) }
	})
}

// sealed is a message with data for an index, as far as path looks at it.
func sealed(index uint32, text string) []byte {
	b := make([]byte, 16, 64)
	b[0] = 4
	binary.LittleEndian.PutUint32(b[4:], index)
	return append(append(b, text...), make([]byte, 16)...)
}

// Nodes that share a port find their addresses, and direct paths to others and to
// each other, and get what is theirs.
func TestSharers(t *testing.T) {
	m := realNet(t)
	h := &sharing{most: 1}
	nodes := []*node{sharer(t, m, h), sharer(t, m, h), sharer(t, m, h), realNode(t, m, nil)}
	if a, b := nodes[0], nodes[1]; a.LocalPort() == 0 || a.LocalPort() != b.LocalPort() || nodes[3].LocalPort() == a.LocalPort() {
		t.Fatalf("ports %d, %d", a.LocalPort(), b.LocalPort())
	}
	for _, a := range nodes {
		patient(t, "what STUN told", func() bool {
			r := a.lastReport()
			i := slices.Index(r.Endpoints, a.addr)
			return i >= 0 && r.Types[i] == wire.EndpointSTUN
		})
		for _, b := range nodes {
			if a != b {
				a.knows(b.peer(900))
			}
		}
	}
	each := func(do func(a, b *node)) {
		for _, a := range nodes {
			for _, b := range nodes {
				if a != b {
					do(a, b)
				}
			}
		}
	}
	// The first ones begin the search for paths; there may be none yet.
	hello := func(a, b *node) {
		err := a.Send(b.key(), netip.AddrPort{}, [][]byte{sealed(b.Index(), "hello")})
		if err != nil && !errors.Is(err, ErrNoPath) {
			t.Fatal(err)
		}
	}
	each(hello)
	each(func(a, b *node) {
		patient(t, "a direct path", func() bool { st := a.Status(b.key()); return st.Trusted && st.Direct.Port() == b.addr.Port() })
	})
	for _, n := range nodes {
		n.take()
	}
	each(func(a, b *node) {
		text := a.key().String() + b.key().String()
		hello(a, b)
		patient(t, "the direct path again", func() bool { return a.Status(b.key()).Trusted })
		a.send(t, b, string(sealed(b.Index(), text)))
		var all []received
		patient(t, "a datagram", func() bool {
			all = append(all, b.take()...)
			return slices.ContainsFunc(all, func(g received) bool {
				return g.data == string(sealed(0, text)) || len(g.data) > 16 && g.data[16:] == string(sealed(0, text))[16:]
			})
		})
		for _, n := range nodes {
			for _, g := range n.take() {
				if n != b && len(g.data) > 16 && g.data[16:] == string(sealed(0, text))[16:] {
					t.Error("it came to another node")
				}
			}
		}
	})

	// An initiation finds the owner of the key.
	initiation := make([]byte, initiationLen)
	initiation[0] = 1
	key := nodes[1].key().Bytes()
	copy(initiation[8:], key[:])
	if err := nodes[3].writeUDP(nodes[0].addr, [][]byte{initiation}); err != nil {
		t.Fatal(err)
	}
	patient(t, "the initiation", func() bool {
		return slices.ContainsFunc(nodes[1].take(), func(g received) bool { return g.data == string(initiation) })
	})

	if st := nodes[0].Stats(); st.SharedRefused != 0 || st.SharedStrays > 100 {
		t.Errorf("dropped: %+v", st)
	}

	// New sockets are for all, and replaced once.
	seen := nodes[0].socks.Load()
	h.all[0].spacing = 0
	if err := nodes[0].Rebind(); err != nil || nodes[1].socks.Load() == seen || nodes[1].LocalPort() != nodes[0].LocalPort() {
		t.Fatalf("%v, ports %d, %d", err, nodes[0].LocalPort(), nodes[1].LocalPort())
	}
	now := nodes[1].socks.Load()
	if err := nodes[1].port.rebind(seen); err != nil || nodes[0].socks.Load() != now {
		t.Errorf("replaced again: %v", err)
	}
	h.all[0].spacing = time.Hour
	if nodes[1].Rebind(); nodes[0].socks.Load() != now {
		t.Error("replaced again so soon")
	}
	each(func(a, b *node) {
		hello(a, b)
		patient(t, "a direct path", func() bool { return a.Status(b.key()).Trusted })
	})

	// Some go, whatever goes on; the last closes the sockets.
	a, c := nodes[0].addr, nodes[2]
	var wg sync.WaitGroup
	for _, n := range nodes[:2] {
		wg.Go(func() { n.Close() })
		wg.Go(func() { n.Close() })
	}
	wg.Wait()
	nodes[3].send(t, c, string(sealed(c.Index(), "still there?")))
	patient(t, "a datagram to who stays", func() bool { return len(c.take()) > 0 })
	if pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv6Unspecified(), a.Port()))); err == nil {
		pc.Close()
		t.Error("the port is free while a node uses it")
	}
	c.Close()
	if len(h.all) != 0 {
		t.Error("a port without nodes is kept")
	}
	pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv6Unspecified(), a.Port())))
	if err != nil {
		t.Fatalf("the port is not free: %v", err)
	}
	pc.Close()
}

// There are as many ports as cores before nodes share one, and nodes spread.
func TestPortsBeforeSharing(t *testing.T) {
	m := realNet(t)
	h := &sharing{most: 2}
	at := make(map[uint16]int)
	var nodes []*node
	for range 6 {
		nodes = append(nodes, sharer(t, m, h))
		at[nodes[len(nodes)-1].LocalPort()]++
	}
	if len(at) != 2 || at[nodes[0].LocalPort()] != 3 {
		t.Errorf("nodes by port: %v", at)
	}
	for _, change := range []func(*Config){
		func(c *Config) { c.Share = false },
		func(c *Config) { c.Port = freeUDP(t) },
		func(c *Config) { c.ListenUDP = new(net.ListenConfig).ListenPacket },
		func(c *Config) { c.RelayOnly = true },
	} {
		n := realNode(t, m, func(c *Config) {
			c.Share, c.sharing = true, h
			c.Owns = func([]byte) bool { return false }
			change(c)
		})
		if at[n.LocalPort()] > 0 || n.share != nil {
			t.Error("a node shares that must not")
		}
	}
}

func freeUDP(t testing.TB) uint16 {
	t.Helper()
	pc, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	return uint16(pc.LocalAddr().(*net.UDPAddr).Port)
}

// One node has the shared port mapped, for all; when it goes another may.
func TestSharersLendTheirMapping(t *testing.T) {
	m := realNet(t)
	h := &sharing{most: 1}
	a, b := sharer(t, m, h), sharer(t, m, h)
	if !a.ClaimPort() || b.ClaimPort() || !a.ClaimPort() {
		t.Fatal("not one alone")
	}
	outside := netip.MustParseAddrPort("203.0.113.7:4711")
	static := netip.MustParseAddrPort("203.0.113.8:4712")
	has := func(n *node, e netip.AddrPort, want bool) {
		t.Helper()
		patient(t, "the report", func() bool { return slices.Contains(n.lastReport().Endpoints, e) == want })
	}
	list := []Endpoint{{outside, wire.EndpointPortMapped}, {static, wire.EndpointExplicit}}
	b.SetEndpoints(list[:1]) // is not believed about the others
	has(b, outside, true)
	has(a, outside, false)
	b.SetEndpoints(nil)
	has(b, outside, false)
	a.SetEndpoints(list)
	has(a, static, true)
	has(b, outside, true)
	has(b, static, false)
	c := sharer(t, m, h)
	has(c, outside, true)
	a.Close()
	has(b, outside, false)
	has(c, outside, false)
	if !c.ClaimPort() || b.ClaimPort() {
		t.Error("nobody, or another, has the port mapped")
	}
}

// Several peers may use one address; the last to prove it comes first.
func TestTableOfSharers(t *testing.T) {
	var tb table
	tb.init()
	at := ap("192.0.2.1:1")
	var peers []*peer
	for range maxAlso + 3 {
		pe := &peer{key: identity.NewNode().Public(), bound: make(map[netip.AddrPort]struct{})}
		tb.byKey[pe.key] = pe
		peers = append(peers, pe)
	}
	is := func(want *peer, wantSeveral bool) {
		t.Helper()
		if pe, several := tb.whoAt(at); pe != want || several != wantSeveral {
			t.Errorf("%v, %v", pe, several)
		}
	}
	a, b, c := peers[0], peers[1], peers[2]
	tb.bind(at, a, false)
	tb.bind(at, b, false)
	is(b, false)
	if tb.uses(a, at) {
		t.Error("pings prove nothing")
	}
	tb.bind(at, a, true)
	is(a, false)
	tb.bind(at, b, false)
	is(a, false)
	tb.bind(at, b, true)
	is(b, true)
	tb.bind(at, a, true)
	is(b, true)
	tb.bind(at, c, true)
	is(c, true)
	tb.remove(c)
	is(b, true)
	tb.remove(a)
	is(b, false)
	if tb.uses(a, at) || tb.uses(c, at) || !tb.uses(b, at) {
		t.Error("who uses it")
	}
	for _, pe := range peers[3:] {
		tb.bind(at, pe, true)
	}
	tb.bind(at, c, true) // gone
	if n := len(tb.addrs[at].also); n != maxAlso {
		t.Errorf("%d besides the first", n)
	}
	for _, pe := range peers {
		tb.remove(pe)
	}
	if len(tb.addrs) != 0 {
		t.Error("addresses of nobody")
	}
}

// Where several peers use an address the index tells whose a datagram is, and only
// among them.
func TestDatagramsOfSharers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		c := n.node("192.0.2.66")
		d := n.node("192.0.2.67")
		owner := map[byte]identity.NodePublic{1: b.key(), 2: c.key(), 3: d.key()}
		a.Path.cfg.Whose = func(m []byte) (identity.NodePublic, bool) { k, ok := owner[m[4]]; return k, ok }
		a.knows(c.peer(1), d.peer(1))
		at := ap("192.0.2.99:9")
		a.Authenticated(b.key(), Source{Addr: at})
		a.Authenticated(c.key(), Source{Addr: at})
		a.Authenticated(d.key(), Source{Addr: ap("192.0.2.99:10")})
		settle(time.Second)
		a.take()
		init := make([]byte, initiationLen)
		init[0] = 1
		a.fromUDP(at, [][]byte{sealed(1, "b"), sealed(1, "b"), sealed(2, "c"), init, sealed(3, "?"), sealed(1, "b"), sealed(9, "?")})
		want := map[string]identity.NodePublic{string(sealed(1, "b")): b.key(), string(sealed(2, "c")): c.key()}
		got := a.take()
		if len(got) != 7 {
			t.Fatalf("%d datagrams", len(got))
		}
		for _, g := range got {
			if g.src.Peer != want[g.data] {
				t.Errorf("%q is of %s", g.data, g.src.Peer.Short())
			}
		}
	})
}
