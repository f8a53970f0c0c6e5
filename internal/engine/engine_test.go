package engine

import (
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/filter"
	"mesh/internal/netmap"
)

const (
	tcp = filter.ProtoTCP
	udp = filter.ProtoUDP
)

func port(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }

// pair starts two hosts that see each other; b lets a in at port 80.
func pair(t *testing.T) (a, b *host) {
	n := newNet()
	a, b = newHost(t, n, 1), newHost(t, n, 2)
	a.start(nil, b.node)
	b.start([]wire.FilterRule{allow("*", "*", 80)}, a.node)
	return a, b
}

func TestAllowedGetsThroughAndDeniedIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		b.link.arrived = make(chan []byte, 10)
		a.link.told = make(chan flow, 10)
		for _, addrs := range [][2]netip.Addr{{a.four, b.four}, {a.six, b.six}} {
			for _, proto := range []uint8{tcp, udp} {
				from, to := port(addrs[0], 1000), port(addrs[1], 80)
				sent := packet(proto, from, to, filter.TCPSyn)
				a.e.Out([][]byte{sent})
				if got := <-b.link.arrived; string(got) != string(sent) {
					t.Errorf("arrived %x, sent %x", got, sent)
				}
				who, p, rule, ok := b.e.Admitted(proto, to, from)
				if !ok || p.Key != a.key.Public() || who != b.e.Map() {
					t.Errorf("admitted: %v %v %v", p, rule, ok)
				}

				to = port(addrs[1], 81)
				a.e.Out([][]byte{packet(proto, from, to, filter.TCPSyn)})
				f := <-a.link.told
				if f != (flow{proto, from, to}) {
					t.Errorf("rejected %v", f)
				}
				var denied *DeniedError
				if err := a.link.rejected[f]; !errors.As(err, &denied) || !errors.Is(err, ErrDenied) {
					t.Fatalf("error %v", err)
				}
				if denied.Peer.Key != b.key.Public() || denied.Port != 81 || denied.Peer.Name != "n2.mesh.internal" ||
					(denied.Proto == "udp") != (proto == udp) {
					t.Errorf("denied: %+v", denied)
				}
				if !strings.Contains(denied.Error(), "n2.mesh.internal refused") || !strings.Contains(denied.Error(), "port 81") {
					t.Errorf("text %q", denied)
				}
			}
		}
		if n := b.link.count(); n != 4 {
			t.Errorf("%d packets reached b's stack, want 4", n)
		}
		if d := b.e.Dropped(); d.Rejected != 4 || d.Spoofed != 0 {
			t.Errorf("dropped %+v", d)
		}
	})
}

// The table of what a peer may try without any right to get in.
func TestHostilePackets(t *testing.T) {
	a, b := pair(t)
	c := identity.NewNode().Public()
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{wireNode(3, c)}})
	me, mine := port(b.four, 80), port(a.four, 1000)
	hidden := port(b.four, 22)
	icmp := func(src, dst netip.Addr, quoted []byte) []byte {
		return ip(filter.ProtoICMP, src, dst, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, quoted...))
	}
	for _, tc := range []struct {
		name   string
		from   identity.NodePublic
		packet []byte
		want   func(Dropped) uint64
	}{
		{"source of another peer", c, packet(tcp, mine, me, filter.TCPSyn), func(d Dropped) uint64 { return d.Spoofed }},
		{"source of nobody", c, packet(udp, port(netip.MustParseAddr("100.64.9.9"), 1), me, 0), func(d Dropped) uint64 { return d.Spoofed }},
		{"own address as source", c, packet(udp, port(b.four, 1), me, 0), func(d Dropped) uint64 { return d.Spoofed }},
		{"unknown peer", identity.NewNode().Public(), packet(tcp, mine, me, filter.TCPSyn), func(d Dropped) uint64 { return d.Spoofed }},
		{"no IP packet", a.key.Public(), []byte("hello, this is no packet"), func(d Dropped) uint64 { return d.Malformed }},
		{"data of no connection", a.key.Public(), packet(tcp, mine, hidden, filter.TCPAck), func(d Dropped) uint64 { return d.Filtered }},
		{"SYN and ACK of no connection", a.key.Public(), packet(tcp, mine, hidden, filter.TCPSyn|filter.TCPAck), func(d Dropped) uint64 { return d.Filtered }},
		{"reset of no connection", a.key.Public(), packet(tcp, mine, hidden, filter.TCPRst), func(d Dropped) uint64 { return d.Filtered }},
		{"to another destination", a.key.Public(), packet(tcp, mine, port(netip.MustParseAddr("10.0.0.1"), 80), filter.TCPSyn), func(d Dropped) uint64 { return d.Filtered }},
		{"ICMP about no flow", a.key.Public(), icmp(a.four, b.four, packet(tcp, me, mine, 0)), func(d Dropped) uint64 { return d.Filtered }},
		{"ICMP about another's flow", a.key.Public(), icmp(a.four, b.four, packet(tcp, me, port(netip.MustParseAddr("100.64.0.3"), 9), 0)), func(d Dropped) uint64 { return d.Filtered }},
		{"garbage between nodes", a.key.Public(), ip(filter.ProtoTSMP, a.four, b.four, []byte{'?'}), func(d Dropped) uint64 { return d.Malformed }},
	} {
		before := b.e.Dropped()
		if b.gets(tc.from, tc.packet) {
			t.Errorf("%s: it reached the stack", tc.name)
		}
		after := b.e.Dropped()
		if tc.want(after) != tc.want(before)+1 || after.Rejected != before.Rejected {
			t.Errorf("%s: %+v, then %+v", tc.name, before, after)
		}
	}

	// An error about a packet that b did send gets in, from its receiver only.
	b.e.Out([][]byte{packet(udp, port(b.four, 5), port(a.four, 7), 0)})
	quoted := packet(udp, port(b.four, 5), port(a.four, 7), 0)
	if !b.gets(a.key.Public(), icmp(a.four, b.four, quoted)) {
		t.Error("a true ICMP error did not get in")
	}
	if b.gets(c, icmp(netip.MustParseAddr("100.64.0.3"), b.four, quoted)) {
		t.Error("an ICMP error of a third node got in")
	}
}

func TestForgedRejection(t *testing.T) {
	a, b := pair(t)
	c := identity.NewNode().Public()
	cnode := wireNode(3, c)
	a.update(&wire.MapResponse{PeersChanged: []*wire.Node{cnode}})
	dialled := filter.Packet{Proto: tcp, Src: port(a.four, 1000), Dst: port(b.four, 80)}
	forged := filter.AppendRejected(nil, &dialled, filter.RejectedPolicy, 0)
	a.deliver(c, forged)
	if len(a.link.rejected) != 0 || a.e.Dropped().Spoofed != 1 {
		t.Errorf("believed %v, %+v", a.link.rejected, a.e.Dropped())
	}
	// A rejection speaks for its sender's address alone.
	own := dialled
	own.Dst = port(cnode.Addresses[0].Addr(), 80)
	a.deliver(c, filter.AppendRejected(nil, &own, filter.RejectedPolicy, 0))
	for f, err := range a.link.rejected {
		var denied *DeniedError
		if f.remote != own.Dst || !errors.As(err, &denied) || denied.Peer.Key != c {
			t.Errorf("%v: %v", f, err)
		}
	}
	a.deliver(b.key.Public(), forged)
	if a.link.rejected[flow{tcp, dialled.Src, dialled.Dst}] == nil {
		t.Error("the true rejection was not believed")
	}
}

// A peer that asks for many rejections gets few, and takes none from others.
func TestRejectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newHost(t, newNet(), 2)
		var peers []*wire.Node
		for i := range 50 {
			peers = append(peers, wireNode(i+10, identity.NewNode().Public()))
		}
		b.start(nil, peers...)
		try := func(n *wire.Node, p uint16) []byte {
			return packet(udp, port(n.Addresses[0].Addr(), p), port(b.four, 22), 0)
		}
		var flood [][]byte
		for i := range 3000 {
			flood = append(flood, try(peers[0], uint16(i+1)))
		}
		b.e.deliver(peers[0].Key, flood)
		d := b.e.Dropped()
		if d.Rejected != 200 || d.Filtered != 2800 {
			t.Errorf("%+v", d)
		}
		for _, p := range peers[1:] {
			b.deliver(p.Key, try(p, 1))
		}
		if told := b.e.Dropped().Rejected - d.Rejected; told < 30 {
			t.Errorf("%d of 49 other peers were told", told)
		}
	})
}

func TestRemovedPeerIsCut(t *testing.T) {
	a, b := pair(t)
	in := flow{tcp, port(b.four, 80), port(a.four, 1000)}
	other := flow{tcp, port(b.four, 80), port(netip.MustParseAddr("100.64.0.3"), 1)}
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{wireNode(3, identity.NewNode().Public())}})
	b.link.flows[in], b.link.flows[other] = nil, nil
	if !b.gets(a.key.Public(), packet(tcp, in.remote, in.local, filter.TCPSyn)) {
		t.Fatal("not admitted")
	}
	b.update(&wire.MapResponse{PeersRemoved: []wire.NodeID{1}, MeshPolicy: 7})
	var revoked *RevokedError
	if err := b.link.errorOf(in); !errors.As(err, &revoked) || !errors.Is(err, ErrRevoked) || revoked.Peer.ID != "s1" || revoked.Policy != 7 {
		t.Errorf("error %v", err)
	}
	if err := b.link.errorOf(other); err != nil {
		t.Errorf("another peer's connection: %v", err)
	}
	if _, _, _, ok := b.e.Admitted(in.proto, in.local, in.remote); ok {
		t.Error("still admitted")
	}
	for _, flags := range []uint8{filter.TCPSyn, filter.TCPAck} {
		if b.gets(a.key.Public(), packet(tcp, in.remote, in.local, flags)) {
			t.Error("still gets in")
		}
	}
}

// What gets less than before is cut, for the reason that is told.
func TestPeerThatIsLessIsCut(t *testing.T) {
	for _, tc := range []struct {
		reason string
		change func(*wire.Node)
	}{
		{"lost tag:admin", func(n *wire.Node) { n.Tags = []string{"tag:web"} }},
		{"changed its owner", func(n *wire.Node) { n.User = 2 }},
		{"another node", func(n *wire.Node) { n.StableID = "new" }},
		{"may not begin", func(n *wire.Node) { n.IsJailed = true }},
	} {
		b := newHost(t, newNet(), 2)
		key := identity.NewNode().Public()
		was := wireNode(1, key)
		was.Tags = []string{"tag:admin", "tag:web"}
		b.start([]wire.FilterRule{allow("*", "*", 80)}, was)
		f := flow{tcp, port(b.four, 80), port(was.Addresses[0].Addr(), 1000)}
		b.link.flows[f] = nil
		if !b.gets(key, packet(tcp, f.remote, f.local, filter.TCPSyn)) {
			t.Fatal("not admitted")
		}
		// While its connections are being cut it makes a new one, which must
		// not be taken for what the peer was.
		again := packet(tcp, port(f.remote.Addr(), 1001), f.local, filter.TCPSyn)
		hooked := false
		b.link.onAbort = func() {
			hooked = true
			if b.gets(key, again) {
				t.Errorf("%s: a new connection under the old identity", tc.reason)
			}
		}
		is := *was
		tc.change(&is)
		b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&is}})
		b.link.onAbort = nil
		if err := b.link.errorOf(f); err == nil || !strings.Contains(err.Error(), tc.reason) || !hooked {
			t.Errorf("%s: %v", tc.reason, err)
		}
		if got, want := b.gets(key, again), !is.IsJailed; got != want {
			t.Errorf("%s: a connection after it: %v", tc.reason, got)
		}
	}
}

func TestJailedPeerOnlyAnswers(t *testing.T) {
	b := newHost(t, newNet(), 2)
	key := identity.NewNode().Public()
	jailed := wireNode(1, key)
	jailed.IsJailed = true
	b.start([]wire.FilterRule{allow("*", "*", 80)}, jailed)
	local, remote := port(b.four, 80), port(jailed.Addresses[0].Addr(), 1000)
	for range 2 {
		for _, p := range [][]byte{packet(tcp, remote, local, filter.TCPSyn), packet(tcp, remote, local, filter.TCPAck), packet(udp, remote, local, 0)} {
			if b.gets(key, p) {
				t.Errorf("%x got in", p)
			}
		}
	}
	b.e.Out([][]byte{packet(udp, port(b.four, 5), remote, 0)})
	if !b.gets(key, packet(udp, remote, port(b.four, 5), 0)) {
		t.Error("an answer did not get in")
	}
}

// An address goes from one peer to another that may do what the first may not:
// neither has the other's rights for a moment, and no connection is inherited.
func TestMovedAddress(t *testing.T) {
	n := newNet()
	b := newHost(t, n, 2)
	ka, kc := identity.NewNode().Public(), identity.NewNode().Public()
	na, nc := wireNode(1, ka), wireNode(3, kc)
	x := na.Addresses[0]
	b.start([]wire.FilterRule{allow(x.Addr().String(), "*", 80)}, na, nc)
	f := flow{tcp, port(b.four, 80), port(x.Addr(), 1000)}
	out := flow{tcp, port(b.four, 2000), port(x.Addr(), 443)}
	b.link.flows[f], b.link.flows[out] = nil, nil
	if !b.gets(ka, packet(tcp, f.remote, f.local, filter.TCPSyn)) {
		t.Fatal("not admitted")
	}
	b.e.Out([][]byte{packet(tcp, out.local, out.remote, filter.TCPSyn)})

	toA, toC := *na, *nc
	toA.Addresses = []netip.Prefix{netip.MustParsePrefix("100.64.0.77/32"), na.Addresses[1]}
	toC.Addresses = []netip.Prefix{x, nc.Addresses[1]}
	b.link.onAbort = func() {
		for _, k := range []identity.NodePublic{ka, kc} {
			if b.gets(k, packet(tcp, port(x.Addr(), 3000), f.local, filter.TCPSyn)) {
				t.Error("a connection from an address that is changing hands")
			}
		}
	}
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&toA, &toC}})
	b.link.onAbort = nil
	for _, f := range []flow{f, out} {
		if err := b.link.errorOf(f); !errors.Is(err, ErrRevoked) {
			t.Errorf("%v lives on with another node: %v", f, err)
		}
	}
	if _, _, _, ok := b.e.Admitted(f.proto, f.local, f.remote); ok {
		t.Error("the flow is believed to be the new holder's")
	}
	if b.gets(ka, packet(tcp, f.remote, f.local, filter.TCPAck)) {
		t.Error("the old holder still sends from it")
	}
	if b.gets(kc, packet(tcp, out.remote, out.local, filter.TCPAck)) {
		t.Error("the new holder answers for the old one")
	}
	if !b.gets(kc, packet(tcp, port(x.Addr(), 3000), f.local, filter.TCPSyn)) {
		t.Error("the new holder does not get in")
	}
	_, p, _, ok := b.e.Admitted(tcp, f.local, port(x.Addr(), 3000))
	if !ok || p.Key != kc {
		t.Errorf("admitted as %v, %v", p, ok)
	}
}

// The same under load: each packet names in its source port which peer sent it,
// so that any that gets in under another's right shows.
func TestMovedAddressUnderLoad(t *testing.T) {
	b := newHost(t, newNet(), 2)
	keys := []identity.NodePublic{identity.NewNode().Public(), identity.NewNode().Public()}
	shared := netip.MustParsePrefix("100.64.0.99/32")
	maps := func(owner int) []*wire.Node {
		var out []*wire.Node
		for i, k := range keys {
			n := wireNode(i+10, k)
			if i == owner {
				n.Addresses = []netip.Prefix{shared}
			}
			out = append(out, n)
		}
		return out
	}
	// Peer i may reach port 100+i, and only while it has the address.
	rules := func(owner int) []wire.FilterRule {
		return []wire.FilterRule{allow(shared.Addr().String(), "*", uint16(100+owner))}
	}
	b.start(rules(0), maps(0)...)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i, k := range keys {
		wg.Go(func() {
			for n := uint16(0); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				for p := range keys {
					b.deliver(k, packet(udp, port(shared.Addr(), uint16(10000*(i+1))+n%500), port(b.four, uint16(100+p)), 0))
				}
			}
		})
	}
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				b.e.Out([][]byte{packet(tcp, port(b.four, 9), port(shared.Addr(), 9), filter.TCPAck)})
			}
		}
	})
	for i := range 100 {
		owner := (i + 1) % 2
		b.update(&wire.MapResponse{PeersChanged: maps(owner), PacketFilters: map[string][]wire.FilterRule{"base": rules(owner)}})
	}
	close(stop)
	wg.Wait()
	for _, p := range b.link.in {
		var d filter.Packet
		if err := d.Decode(p); err != nil {
			t.Fatal(err)
		}
		if sender, right := d.Src.Port()/10000-1, d.Dst.Port()-100; sender != right {
			t.Fatalf("peer %d got in at port %d", sender, d.Dst.Port())
		}
	}
}

// A change of a peer's key cuts nothing, however packets fall into it.
func TestChangedKeyKeepsFlows(t *testing.T) {
	b := newHost(t, newNet(), 2)
	old, next := identity.NewNode().Public(), identity.NewNode().Public()
	n := wireNode(1, old)
	b.start(nil, n)
	local, remote := port(b.four, 2000), port(n.Addresses[0].Addr(), 443)
	b.e.Out([][]byte{packet(tcp, local, remote, filter.TCPSyn)})
	if !b.gets(old, packet(tcp, remote, local, filter.TCPSyn|filter.TCPAck)) {
		// A SYN with ACK is no attempt of the peer but the answer.
		t.Fatal("no answer")
	}
	for range 50 {
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					b.e.Out([][]byte{packet(tcp, local, remote, filter.TCPAck)})
				}
			}
		})
		was := old
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					b.deliver(was, packet(tcp, remote, local, filter.TCPAck))
				}
			}
		})
		// Another peer leaves at the same time, so that Apply has something to
		// cut: packets of the old key come while it does.
		b.update(&wire.MapResponse{PeersChanged: []*wire.Node{wireNode(9, identity.NewNode().Public())}})
		b.link.onAbort = func() {
			b.e.Out([][]byte{packet(tcp, local, remote, filter.TCPAck)})
			b.deliver(was, packet(tcp, remote, local, filter.TCPAck))
		}
		is := *n
		is.Key = next
		b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&is}, PeersRemoved: []wire.NodeID{9}})
		b.link.onAbort = nil
		close(stop)
		wg.Wait()
		if !b.gets(next, packet(tcp, remote, local, filter.TCPAck)) {
			t.Fatal("the change of keys cut the connection")
		}
		n, old, next = &is, next, was
	}
}

// A filter that this node cannot understand lets nothing in.
func TestRefusedFilter(t *testing.T) {
	a, b := pair(t)
	syn := packet(tcp, port(a.four, 1000), port(b.four, 80), filter.TCPSyn)
	if !b.gets(a.key.Public(), syn) {
		t.Fatal("not admitted")
	}
	bad := allow("*", "*", 80)
	bad.SrcBits = []int{8}
	_ = b.tryUpdate(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {allow("*", "*", 80), bad}}})
	for _, p := range [][]byte{syn, packet(tcp, port(a.four, 1001), port(b.four, 80), filter.TCPSyn), packet(udp, port(a.four, 1), port(b.four, 80), 0)} {
		if b.gets(a.key.Public(), p) {
			t.Errorf("%x got in", p)
		}
	}
	b.update(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {allow("*", "*", 80)}}})
	if !b.gets(a.key.Public(), syn) {
		t.Error("a good filter is not in force again")
	}
}

func TestBeforeTheFirstMapNothingGetsInOrOut(t *testing.T) {
	b := newHost(t, newNet(), 2)
	x := netip.MustParseAddr("100.64.0.1")
	if b.gets(identity.NewNode().Public(), packet(tcp, port(x, 1), port(b.four, 80), filter.TCPSyn)) {
		t.Error("something got in")
	}
	b.e.Out([][]byte{packet(tcp, port(b.four, 1), port(x, 80), filter.TCPSyn), {1, 2, 3}})
	if d := b.e.Dropped(); d.NoPeer != 1 || d.Malformed != 1 || d.Spoofed != 1 {
		t.Errorf("%+v", d)
	}
}

// Out finds the runs of one destination in a batch, whatever lies between.
func TestOutBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet()
		a, b, c := newHost(t, n, 1), newHost(t, n, 2), newHost(t, n, 3)
		a.start(nil, b.node, c.node)
		for _, h := range []*host{b, c} {
			h.start([]wire.FilterRule{allow("*", "*", 80)}, a.node)
			h.link.arrived = make(chan []byte, 10)
		}
		nobody := netip.MustParseAddr("100.64.9.9")
		to := func(d netip.Addr, p uint16) []byte { return packet(udp, port(a.four, p), port(d, 80), 0) }
		a.e.Out([][]byte{
			to(b.four, 1), to(b.four, 2), {0x45}, to(b.four, 3), to(c.four, 4), to(nobody, 5), to(nobody, 6),
			ip(filter.ProtoTSMP, a.four, b.four, []byte{'p', 1, 2, 3, 4, 5, 6, 7, 8}), to(b.four, 7), to(c.four, 8),
		})
		for _, x := range []struct {
			h    *host
			want []uint16
		}{{b, []uint16{1, 2, 3, 7}}, {c, []uint16{4, 8}}} {
			var got []uint16
			for range x.want {
				var d filter.Packet
				if err := d.Decode(<-x.h.link.arrived); err != nil {
					t.Fatal(err)
				}
				got = append(got, d.Src.Port())
			}
			slices.Sort(got)
			if !slices.Equal(got, x.want) {
				t.Errorf("got %v, want %v", got, x.want)
			}
		}
		if d := a.e.Dropped(); d.NoPeer != 2 || d.Malformed != 1 {
			t.Errorf("%+v", d)
		}
	})
}

func TestPeersCostNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newHost(t, newNet(), 2)
		b.start(nil)
		synctest.Wait()
		before := runtime.NumGoroutine()
		var peers []*wire.Node
		for i := range 1000 {
			peers = append(peers, wireNode(i+100, identity.NewNode().Public()))
		}
		b.update(&wire.MapResponse{PeersChanged: peers})
		time.Sleep(time.Minute)
		synctest.Wait()
		if after := runtime.NumGoroutine(); after > before {
			t.Errorf("%d goroutines, %d with 1,000 peers", before, after)
		}
		if n := b.e.tunnel.ActivePeers(); n != 0 {
			t.Errorf("%d peers are configured without traffic", n)
		}
	})
}

// Close waits, whoever called it first, and leaves an engine that does nothing.
func TestClose(t *testing.T) {
	a, b := pair(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := a.e.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
		wg.Go(func() { a.e.Out([][]byte{packet(udp, port(a.four, 1), port(b.four, 80), 0)}) })
	}
	wg.Go(func() {
		_ = a.e.Apply(a.e.Map(), netmap.Rebase(nil, a.e.Map()))
	})
	wg.Wait()
	a.update(&wire.MapResponse{PeersRemoved: []wire.NodeID{2}})
	a.e.CutAll(errors.New("over"))
	if a.e.PathTo(b.key.Public()).Direct.IsValid() || a.e.HomeRegion() != 0 {
		t.Error("a closed engine has paths")
	}
}

func TestErrorTexts(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{&DeniedError{Peer: identity.Peer{Name: "db"}, Proto: "tcp", Port: 22, Reason: "not allowed by policy"}, "db refused tcp port 22: not allowed by policy"},
		{&RevokedError{}, "access revoked"},
		{&RevokedError{Peer: identity.Peer{Name: "db"}, Policy: 3, Reason: "it lost tag:x"}, "access to and from db revoked: it lost tag:x (policy version 3)"},
	} {
		if tc.err.Error() != tc.want {
			t.Errorf("%q, want %q", tc.err, tc.want)
		}
	}
}
