package engine

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/filter"
)

func named(r wire.FilterRule, id string) wire.FilterRule {
	for range r.DstPorts {
		r.MeshOrigins = append(r.MeshOrigins, []wire.RuleOrigin{{Rule: "acls[0]", ID: id}})
	}
	return r
}

// When a permission is withdrawn both ends of a connection hear that, from
// which policy on, and nobody else's is touched.
func TestBothEndsHearThatItIsOver(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(a, b *host)
		want   string // at the dialling end
		policy int64
	}{
		{"policy", func(a, b *host) {
			b.update(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {named(allow("*", "*", 81), "2")}}, MeshPolicy: 9})
		}, "access to and from n2.mesh.internal revoked: policy version 9 no longer allows it", 9},
		{"its rule, though another matches", func(a, b *host) {
			b.update(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {
				named(allow("*", "*", 81), "2"), {SrcIPs: []string{"*"}, DstPorts: []wire.NetPortRange{{IP: "*", Ports: wire.AllPorts}}, MeshOrigins: [][]wire.RuleOrigin{{{Rule: "acls[1]", ID: "3"}}}},
			}}, MeshPolicy: 9})
		}, "policy version 9 no longer allows it", 9},
		{"tag", func(a, b *host) {
			is := *a.node
			is.Tags = nil
			b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&is}, MeshPolicy: 8})
		}, "the owner or the tags of this node changed (policy version 8)", 8},
		{"expiry", func(a, b *host) {
			is := *a.node
			is.Expired = true
			b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&is}})
		}, "the key of this node expired (policy version 1)", 1},
		{"removal", func(a, b *host) {
			b.update(&wire.MapResponse{PeersRemoved: []wire.NodeID{1}, MeshPolicy: 3})
		}, "it may not be reached any more (policy version 3)", 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNet()
				a, b := newHost(t, n, 1), newHost(t, n, 2)
				a.node.Tags = []string{"tag:a"}
				a.start(nil, b.node)
				b.start([]wire.FilterRule{named(allow("*", "*", 80), "1"), named(allow("*", "*", 81), "2")}, a.node)
				b.link.arrived = make(chan []byte, 100)
				a.link.told = make(chan flow, 100)
				var ours, theirs []flow
				for _, addrs := range [][2]netip.Addr{{a.four, b.four}, {a.six, b.six}} {
					for i, proto := range []uint8{tcp, udp} {
						from, to := port(addrs[0], uint16(1000+i)), port(addrs[1], 80)
						a.link.flows[flow{proto, from, to}] = nil
						b.link.flows[flow{proto, to, from}] = nil
						ours, theirs = append(ours, flow{proto, from, to}), append(theirs, flow{proto, to, from})
						a.e.Out([][]byte{packet(proto, from, to, filter.TCPSyn)})
						<-b.link.arrived
					}
				}
				other := flow{tcp, port(a.four, 9), port(b.four, 81)}
				a.link.flows[other] = nil
				tc.change(a, b)
				for range ours {
					<-a.link.told
				}
				for i := range ours {
					var revoked *RevokedError
					err := a.link.errorOf(ours[i])
					if !errors.As(err, &revoked) || !errors.Is(err, ErrRevoked) || revoked.Policy != tc.policy || revoked.Peer.ID != "s2" || !strings.HasSuffix(err.Error(), tc.want) {
						t.Errorf("dialling end of %v: %v", ours[i], err)
					}
					if err := b.link.errorOf(theirs[i]); !errors.As(err, &revoked) || revoked.Peer.ID != "s1" {
						t.Errorf("accepting end of %v: %v", theirs[i], err)
					}
				}
				if err := a.link.errorOf(other); err != nil {
					t.Errorf("another connection: %v", err)
				}
			})
		})
	}
}

// A peer that missed the announcement and goes on is told again, TCP and UDP.
func TestWhoGoesOnIsToldAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		b.link.arrived = make(chan []byte, 10)
		a.link.told = make(chan flow, 10)
		for i, proto := range []uint8{tcp, udp} {
			from, to := port(a.four, uint16(1000+i)), port(b.four, 80)
			a.e.Out([][]byte{packet(proto, from, to, filter.TCPSyn)})
			<-b.link.arrived
		}
		// Nobody at a has these flows when it is announced.
		b.update(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {}}, MeshPolicy: 5})
		synctest.Wait()
		if n := a.e.Dropped().Refused; n != 2 {
			t.Errorf("%d refusals that nobody waited for", n)
		}
		for i, proto := range []uint8{tcp, udp} {
			f := flow{proto, port(a.four, uint16(1000+i)), port(b.four, 80)}
			a.link.mu.Lock()
			a.link.flows[f] = nil
			a.link.mu.Unlock()
			a.e.Out([][]byte{packet(proto, f.local, f.remote, filter.TCPAck)})
			<-a.link.told
			var revoked *RevokedError
			if err := a.link.errorOf(f); !errors.As(err, &revoked) || revoked.Policy != 5 {
				t.Errorf("%v: %v", f, err)
			}
		}
	})
}

// What says that a connection is over is believed from the other end alone, and
// what only may be broken goes on.
func TestForgedEnd(t *testing.T) {
	a, b := pair(t)
	c := identity.NewNode().Public()
	a.update(&wire.MapResponse{PeersChanged: []*wire.Node{wireNode(3, c)}})
	f := flow{tcp, port(a.four, 1000), port(b.four, 80)}
	a.link.flows[f] = nil
	a.e.Out([][]byte{packet(tcp, f.local, f.remote, filter.TCPSyn)})
	over := filter.AppendWithdrawn(nil, filter.Flow{Proto: tcp, Local: f.remote, Remote: f.local}, filter.WithdrawnByPolicy, 1)
	a.deliver(c, over) // spoofed address
	own := filter.AppendWithdrawn(nil, filter.Flow{Proto: tcp, Local: port(wireNode(3, c).Addresses[0].Addr(), 80), Remote: f.local}, filter.WithdrawnByPolicy, 1)
	a.deliver(c, own) // about a flow that c has not
	if err := a.link.errorOf(f); err != nil {
		t.Errorf("believed of another: %v", err)
	}
	if !a.gets(b.key.Public(), packet(tcp, f.remote, f.local, filter.TCPSyn|filter.TCPAck)) {
		t.Error("the answer does not get in")
	}
	dialled := filter.Packet{Proto: tcp, Src: f.local, Dst: f.remote}
	maybe := append(filter.AppendRejected(nil, &dialled, filter.RejectedFirewall, 0), 1)
	maybe[3]++ // its length
	a.deliver(b.key.Public(), maybe)
	if len(a.link.rejected) != 0 {
		t.Errorf("a suspicion counts as a refusal: %v", a.link.rejected)
	}
	a.deliver(b.key.Public(), over)
	if err := a.link.errorOf(f); !errors.Is(err, ErrRevoked) {
		t.Errorf("the other end is not believed: %v", err)
	}
	if a.gets(b.key.Public(), packet(tcp, f.remote, f.local, filter.TCPAck)) {
		t.Error("data of what is over gets in")
	}
}

// Refusals of stock nodes say what they can.
func TestStockRefusals(t *testing.T) {
	a, b := pair(t)
	for reason, want := range map[byte]string{
		filter.RejectedPolicy:   "n2.mesh.internal refused tcp port 80: not allowed by policy",
		filter.RejectedShields:  "n2.mesh.internal refused tcp port 80: it accepts no connections at present",
		filter.RejectedRouting:  "n2.mesh.internal refused tcp port 80: it forwards nothing at present",
		filter.RejectedFirewall: "n2.mesh.internal refused tcp port 80: the firewall of its host blocks it",
		'?':                     "n2.mesh.internal refused tcp port 80: not allowed by policy",
	} {
		f := flow{tcp, port(a.four, 1000), port(b.four, 80)}
		a.deliver(b.key.Public(), ip(filter.ProtoTSMP, b.four, a.four, []byte{'!', tcp, reason, 1000 >> 8, 1000 & 255, 0, 80}))
		if err := a.link.rejected[f]; err == nil || err.Error() != want {
			t.Errorf("%c: %v", reason, err)
		}
	}
}

// A refusal names the policy by which it was decided; to a stock dialler it is
// the stock form, with more behind it.
func TestRefusalNamesThePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t)
		a.link.told = make(chan flow, 1)
		b.update(&wire.MapResponse{MeshPolicy: 12})
		f := flow{tcp, port(a.four, 1000), port(b.four, 22)}
		a.e.Out([][]byte{packet(tcp, f.local, f.remote, filter.TCPSyn)})
		<-a.link.told
		var denied *DeniedError
		if err := a.link.rejected[f]; !errors.As(err, &denied) || denied.Policy != 12 || !strings.HasSuffix(err.Error(), "not allowed by policy (policy version 12)") {
			t.Errorf("%v", err)
		}
	})
}

// Rules whose sources are capabilities follow the peers that have them.
func TestCapabilitySources(t *testing.T) {
	b := newHost(t, newNet(), 2)
	key := identity.NewNode().Public()
	peer := wireNode(1, key)
	b.start([]wire.FilterRule{allow("cap:example.com/cap/x", "*", 80)}, peer)
	syn := func(p uint16) []byte {
		return packet(tcp, port(peer.Addresses[0].Addr(), p), port(b.four, 80), filter.TCPSyn)
	}
	if b.gets(key, syn(1)) {
		t.Error("got in without the capability")
	}
	has := *peer
	has.CapMap = map[string][]json.RawMessage{"example.com/cap/x": nil}
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&has}})
	if !b.gets(key, syn(2)) {
		t.Error("did not get in with the capability")
	}
	// Its key changes, and its connection goes on.
	next := has
	next.Key = identity.NewNode().Public()
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&next}})
	if !b.gets(next.Key, packet(tcp, port(peer.Addresses[0].Addr(), 2), port(b.four, 80), filter.TCPAck)) {
		t.Error("the change of keys cut the connection")
	}
	lost := next
	lost.CapMap = nil
	f := flow{tcp, port(b.four, 80), port(peer.Addresses[0].Addr(), 2)}
	b.link.flows[f] = nil
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&lost}})
	if err := b.link.errorOf(f); !errors.Is(err, ErrRevoked) {
		t.Errorf("without the capability it goes on: %v", err)
	}
	if b.gets(next.Key, syn(3)) {
		t.Error("gets in without the capability")
	}
}

// A peer whose key expired exchanges nothing with us.
func TestExpiredPeer(t *testing.T) {
	a, b := pair(t)
	is := *a.node
	is.Expired = true
	b.update(&wire.MapResponse{PeersChanged: []*wire.Node{&is}})
	if b.gets(a.key.Public(), packet(tcp, port(a.four, 1), port(b.four, 80), filter.TCPSyn)) {
		t.Error("it gets in")
	}
	before := b.e.Dropped().NoPeer
	b.e.Out([][]byte{packet(tcp, port(b.four, 1), port(a.four, 80), filter.TCPSyn)})
	if b.e.Dropped().NoPeer != before+1 {
		t.Error("it is sent to")
	}
	if _, ok := b.e.lookupTunnel(a.key.Public()); ok {
		t.Error("a handshake of it is answered")
	}
	if _, ok := b.e.lookupPath(a.key.Public()); ok || len(b.e.lookupDisco(a.node.DiscoKey)) != 0 {
		t.Error("its pings are answered")
	}
}

// A connection whose flow the filter had to forget ends with its permission
// like any other.
func TestForgottenFlowIsCutToo(t *testing.T) {
	b := newHost(t, newNet(), 2)
	key := identity.NewNode().Public()
	peer := wireNode(1, key)
	b.start([]wire.FilterRule{allow("*", "*", 80), allow("*", "*", 81)}, peer)
	from := peer.Addresses[0].Addr()
	gone, kept := flow{tcp, port(b.four, 80), port(from, 1)}, flow{tcp, port(b.four, 81), port(from, 1)}
	for _, f := range []flow{gone, kept} {
		if !b.gets(key, packet(tcp, f.remote, f.local, filter.TCPSyn)) {
			t.Fatal("not admitted")
		}
		b.link.flows[f] = nil
	}
	for p := range 5000 { // more than one peer may have
		b.deliver(key, packet(tcp, port(from, uint16(p+2)), port(b.four, 80), filter.TCPSyn))
	}
	if _, _, _, ok := b.e.Admitted(gone.proto, gone.local, gone.remote); ok {
		t.Fatal("the flow is still known")
	}
	b.update(&wire.MapResponse{PacketFilters: map[string][]wire.FilterRule{"base": {allow("*", "*", 81)}}, MeshPolicy: 4})
	var revoked *RevokedError
	if err := b.link.errorOf(gone); !errors.As(err, &revoked) || revoked.Policy != 4 {
		t.Errorf("what is no longer allowed: %v", err)
	}
	if err := b.link.errorOf(kept); err != nil {
		t.Errorf("what is still allowed: %v", err)
	}
}
