package relay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh/derp"
	"mesh/identity"
)

// region is several relays that serve one region.
func newRegion(t testing.TB, n int, cfg Config) []*bed {
	t.Helper()
	beds := make([]*bed, n)
	for i := range beds {
		cfg.Admit = admitAll
		beds[i] = newBed(t, cfg)
	}
	meshed(t, beds...)
	return beds
}

var meshSecret = strings.Repeat("0123456789abcdef", 4)

// mesh returns what b is told when it is to forward with others.
func (b *bed) mesh(others ...*bed) Mesh {
	m := Mesh{Keys: []string{meshSecret}}
	for _, o := range others {
		if o != b {
			m.Peers = append(m.Peers, MeshPeer{o.srv.Key(), o.config(identity.NodePrivate{}).Target})
		}
	}
	return m
}

// meshed makes relays forward to each other, and waits until they do.
func meshed(t testing.TB, beds ...*bed) {
	t.Helper()
	for _, b := range beds {
		b.srv.SetMesh(b.mesh(beds...))
	}
	for i, b := range beds {
		until(t, fmt.Sprintf("relay %d is connected", i), func() bool {
			b.srv.mu.RLock()
			watched := len(b.srv.mesh.watchers)
			b.srv.mu.RUnlock()
			return b.srv.Stats().MeshPeers == len(beds)-1 && watched == len(beds)-1
		})
	}
}

// sees waits until relays know where a key is.
func (b *bed) sees(key identity.NodePublic, at *bed) {
	b.t.Helper()
	until(b.t, "the route", func() bool {
		p := b.srv.lookup(key)
		if at == nil {
			return p == nil
		}
		if p == nil {
			return false
		}
		l := p.via.Load()
		return at == b && p.active.Load() != nil || at != b && l != nil && l.peer.Key == at.srv.Key()
	})
}

// Clients of different relays of a region reach each other, whoever is where,
// and learn when the other is gone.
func TestMeshForwards(t *testing.T) {
	r := newRegion(t, 3, Config{})
	x, y := r[0].dial(), r[1].dial()
	r[0].sees(y.pub, r[1])
	r[1].sees(x.pub, r[0])
	var want []string
	for i := range 300 {
		want = append(want, fmt.Sprint("packet ", i))
	}
	x.send(y.pub, want...)
	for _, s := range want {
		y.wantPacket(x.pub, s)
	}
	y.send(x.pub, disco("ping"), "data")
	x.wantPacket(y.pub, disco("ping"))
	x.wantPacket(y.pub, "data")
	big := strings.Repeat("x", derp.MaxPacket)
	x.send(y.pub, big)
	y.wantPacket(x.pub, big)

	late := r[2].dial()
	r[0].sees(late.pub, r[2])
	r[1].sees(late.pub, r[2])
	r[2].sees(x.pub, r[0])
	x.send(late.pub, "to the third")
	late.wantPacket(x.pub, "to the third")

	// Each of those who heard from x hears that it is gone, and nobody twice.
	x.Close()
	y.wantGone(x.pub, derp.PeerDisconnected)
	late.wantGone(x.pub, derp.PeerDisconnected)
	r[1].sees(x.pub, nil)
	y.send(x.pub, disco("anybody?"))
	y.wantGone(x.pub, derp.PeerNotHere)
	y.quiet()
	st := r[1].srv.Stats()
	if st.ForwardedIn != 302-1 || st.ForwardedOut != 2 || st.MeshPeers != 2 || st.MeshClients != 1 || st.Keys != 1 || st.Clients != 1 {
		t.Errorf("%+v", st)
	}
}

// The newest connection of a key has the packets, wherever it is, and the older
// one is told.
func TestMeshNewestWins(t *testing.T) {
	r := newRegion(t, 2, Config{})
	z := [2]*node{r[0].dial(), r[1].dial()}
	key := identity.NewNode()
	deliver := func(to *node, what string) {
		t.Helper()
		for i, from := range z {
			text := fmt.Sprint(what, i)
			from.send(key.Public(), text)
			to.wantPacket(from.pub, text)
		}
	}
	first := r[0].dialAs(key)
	r[1].sees(first.pub, r[0])
	deliver(first, "one place")
	second := r[1].dialAs(key)
	r[0].sees(second.pub, r[1])
	first.wantHealth(healthDuplicate)
	second.wantHealth(healthDuplicate)
	deliver(second, "two places")
	// What it sends does not bring the older one back: it may be what a
	// network still held.
	first.send(z[0].pub, "late")
	z[0].wantPacket(key.Public(), "late")
	deliver(second, "still two places")
	second.Close()
	first.wantHealth("")
	r[0].sees(first.pub, r[0])
	r[1].sees(first.pub, r[0])
	deliver(first, "one place again")
	for _, n := range z {
		n.quiet() // nobody was ever told that it is gone
	}
}

// The death of a relay takes its clients with it at once, and when it is back
// they are.
func TestMeshDeath(t *testing.T) {
	r := newRegion(t, 2, Config{})
	x, y := r[0].dial(), r[1].dial()
	r[0].sees(y.pub, r[1])
	r[1].sees(x.pub, r[0])
	y.send(x.pub, "a")
	x.wantPacket(y.pub, "a")
	r[1].srv.Close()
	x.wantGone(y.pub, derp.PeerDisconnected)
	r[0].sees(y.pub, nil)
	if st := r[0].srv.Stats(); st.MeshPeers != 0 || st.MeshClients != 0 {
		t.Errorf("%+v", st)
	}
	again := newBed(t, Config{Admit: admitAll})
	meshed(t, r[0], again)
	y2 := again.dialAs(y.key)
	r[0].sees(y.pub, again)
	x.send(y.pub, "b")
	y2.wantPacket(x.pub, "b")
	// One that does not belong here any more is cut off.
	r[0].srv.SetMesh(Mesh{})
	r[0].sees(y.pub, nil)
	until(t, "the other is cut off", func() bool { return again.srv.Stats().MeshPeers == 0 })
}

// meshLogin is a relay played by hand.
func (b *bed) meshLogin(key identity.NodePrivate, secret string) *raw {
	b.t.Helper()
	r := b.raw()
	r.write(derp.FrameClientInfo, derp.SealClientInfo(key, r.serverKey(), derp.ClientInfo{Version: 2, MeshKey: secret}))
	return r
}

// Only a relay that control named, with the secret, is one.
func TestMeshAdmission(t *testing.T) {
	logger, logs := observedLogger()
	b := newBed(t, Config{Admit: admitAll, Logger: logger})
	friend := identity.NewNode()
	b.srv.SetMesh(Mesh{Keys: []string{meshSecret, strings.Repeat("f", 64)}, Peers: []MeshPeer{
		{friend.Public(), derp.Target{Addr: "127.0.0.1:1"}},
		{b.srv.Key(), derp.Target{Addr: b.addr}}, // itself: never
	}})
	x := b.dial()
	wrong := "1" + meshSecret[1:]
	for name, refused := range map[string]*raw{
		"wrong secret":             b.meshLogin(friend, wrong),
		"short secret":             b.meshLogin(friend, meshSecret[:63]),
		"another key":              b.meshLogin(identity.NewNode(), meshSecret),
		"a node's key":             b.meshLogin(x.key, meshSecret),
		"wrong secret and another": b.meshLogin(identity.NewNode(), wrong),
	} {
		t.Run(name, func(t *testing.T) { refused.wantClosed() })
	}
	for _, f := range []derp.FrameType{derp.FrameWatchConns, derp.FrameForwardPacket, derp.FrameClosePeer} {
		n := b.rawLogin(identity.NewNode())
		n.write(f, make([]byte, 2*identity.KeyLen+1))
		n.wantClosed()
	}
	x.quiet()
	until(t, "a line for each that broke the protocol", func() bool { return logs.Len() == 3 })
	for _, secret := range []string{meshSecret, strings.Repeat("f", 64)} {
		ok := b.meshLogin(friend, secret)
		if f := ok.read(); f.Type != derp.FrameServerInfo {
			t.Fatalf("frame %#x", byte(f.Type))
		}
		ok.write(derp.FrameWatchConns)
		f := ok.read()
		key, flags, whole := derp.ParsePeerPresent(f.Payload)
		if f.Type != derp.FramePeerPresent || key != x.pub || flags != derp.PresentRegular || !whole || len(f.Payload) != 51 {
			t.Fatalf("%#x, %v %v %v", byte(f.Type), key, flags, whole)
		}
		ok.nc.Close()
	}
	if len(b.srv.mesh.links) != 1 {
		t.Error("connects to itself")
	}
	// Too short a frame.
	ok := b.meshLogin(friend, meshSecret)
	ok.read()
	ok.write(derp.FrameForwardPacket, make([]byte, 2*identity.KeyLen-1))
	ok.wantClosed()
	// And ClosePeer closes.
	ok = b.meshLogin(friend, meshSecret)
	ok.read()
	raw := x.pub.Bytes()
	ok.write(derp.FrameClosePeer, raw[:])
	x.wantEnd()
}

// A relay that connects again replaces its former connection, and nothing that
// was forwarded once is forwarded again: a packet cannot go in circles.
func TestMeshNoCircles(t *testing.T) {
	r := newRegion(t, 2, Config{})
	y := r[1].dial()
	r[0].sees(y.pub, r[1])
	evil := identity.NewNode()
	m := r[0].mesh(r...)
	m.Peers = append(m.Peers, MeshPeer{evil.Public(), derp.Target{Addr: "127.0.0.1:1"}})
	r[0].srv.SetMesh(m)
	first := r[0].meshLogin(evil, meshSecret)
	first.read()
	second := r[0].meshLogin(evil, meshSecret)
	second.read()
	first.wantClosed()
	src, dst := identity.NewNode().Public().Bytes(), y.pub.Bytes()
	second.write(derp.FrameForwardPacket, src[:], dst[:], []byte("round and round"))
	x := r[0].dial()
	local := x.pub.Bytes()
	second.write(derp.FrameForwardPacket, src[:], local[:], []byte("here"))
	x.wantPacket(identity.NodePublicFrom(src), "here")
	y.quiet()
	if st := r[0].srv.Stats(); st.Unknown != 1 || st.ForwardedOut != 0 || st.ForwardedIn != 2 {
		t.Errorf("%+v", st)
	}
}

// A relay that claims more clients than one may have is believed up to that.
func TestMeshTableIsBounded(t *testing.T) {
	a, b := newBed(t, Config{Admit: admitAll, MaxClients: 3}), newBed(t, Config{Admit: admitAll})
	meshed(t, a, b)
	for range 5 {
		b.dial()
	}
	until(t, "the table is full", func() bool { return a.srv.Stats().MeshFull == 2 })
	if st := a.srv.Stats(); st.MeshClients != 3 || st.Keys != 0 {
		t.Errorf("%+v", st)
	}
	a.dial() // its own clients are counted apart
}

// A connection that a node left without a word ends when the node turns out to
// be at another relay.
func TestMeshFindsDeadSessions(t *testing.T) {
	a, b := newBed(t, Config{Admit: admitAll}), newBed(t, Config{Admit: admitAll})
	key := identity.NewNode()
	old := a.raw()
	old.write(derp.FrameClientInfo, derp.SealClientInfo(key, old.serverKey(), derp.ClientInfo{Version: 2, CanAckPings: true}))
	old.read()
	live := a.dial() // answers pings
	b.dialAs(key)
	b.dialAs(live.key)
	b.srv.SetMesh(b.mesh(a))
	meshed(t, a, b)
	a.sees(key.Public(), b)
	old.nc.SetDeadline(time.Now().Add(patience))
	old.wantSilentEnd()
	if c := a.srv.Connected(); len(c) != 1 || c[0] != live.pub {
		t.Errorf("%d keys", len(c))
	}
}

// wantSilentEnd is wantClosed for a client that does not answer what it reads.
func (r *raw) wantSilentEnd() {
	r.t.Helper()
	for {
		if _, err := r.conn.ReadFrame(); err != nil {
			return
		}
	}
}

// FuzzMesh: whatever a relay of the region sends, this one stays whole.
func FuzzMesh(f *testing.F) {
	present := derp.PeerPresentPayload(identity.NewNode().Public(), netip.MustParseAddr("192.0.2.1"), derp.PresentRegular)
	f.Add(present)
	f.Add(present[:32])
	f.Add(append(present, 3, 'a', 'b', 'c'))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		key, flags, ok := derp.ParsePeerPresent(b)
		if ok != (len(b) >= identity.KeyLen && !key.IsZero()) || ok && len(b) < 51 && flags != derp.PresentRegular {
			t.Errorf("%x: %v %v %v", b, key, flags, ok)
		}
		c := &session{srv: New(Config{Key: identity.NewNode()}), mesh: true}
		for _, ft := range []derp.FrameType{derp.FrameForwardPacket, derp.FrameWatchConns, derp.FrameClosePeer} {
			c.handle(derp.Frame{Type: ft, Payload: b})
		}
		c.flush()
		c.srv.Close()
	})
}
