package interop

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// onStock is one of our nodes on the stock servers, with services.
func (s *stockServers) agent(name string, options ...func(*mesh.Node)) *agent {
	s.t.Helper()
	a := &agent{s.ours(name, options...), s.t}
	a.services()
	return a
}

// handshake returns when a stock node last agreed on WireGuard keys with a peer.
func (n *stockNode) handshake(key string) time.Time {
	n.t.Helper()
	var st struct {
		Peer map[string]struct{ LastHandshake time.Time }
	}
	n.do("status", nil, &st)
	return st.Peer[key].LastHandshake
}

// begins dials a TCP port. Who may not is not waited for, since a stock client
// tries for long.
func (n *stockNode) begins(addr string, may bool) error {
	n.t.Helper()
	wait := 2
	if may {
		wait = seconds
	}
	name := time.Now().String()
	err := n.try("open", map[string]any{"Name": name, "Addr": addr, "Seconds": wait}, nil)
	if err == nil {
		n.do("shut", map[string]any{"Name": name}, nil)
	}
	return err
}

// A server that sends all it knows again and again, in messages full of members
// that nobody knows, disturbs neither connections nor WireGuard sessions; and
// the clock of 2020 that this one shows has no say.
func TestOnStockRepeats(t *testing.T) {
	s := serveStock(t)
	s.do("junk", map[string]any{"On": true}, nil)
	a, b := s.agent("a"), s.agent("b")
	laptop := s.stocks("laptop", "")
	laptop.services()
	me, other, theirs := s.findOurs(a.Node), s.findOurs(b.Node), s.findStock(laptop)
	waitFor(t, a.Node, other.Key)
	waitFor(t, a.Node, theirs.Key)
	toB, toLaptop := dialEcho(t, a.Node, port(b, false, 7)), dialEcho(t, a.Node, port(laptop, false, 7))
	laptop.do("open", map[string]any{"Name": "a", "Addr": port(a, false, 7)}, nil)
	laptop.do("exchange", map[string]any{"Name": "a", "Bytes": 1000}, nil)
	before := laptop.handshake(me.Key)
	if before.IsZero() {
		t.Fatal("the stock node knows of no handshake")
	}
	for i := range 20 {
		switch i % 3 {
		case 0:
			s.raw(me, map[string]any{"PeersChanged": []known{other, theirs}})
		case 1:
			s.raw(me, map[string]any{"Peers": []known{theirs, other}, "XUnknown": []any{1, nil, "x"}})
		case 2: // what a stock server sends for each lite update
			s.raw(me, map[string]any{
				"Node": me, "Peers": []known{other, theirs}, "Domain": "again", "ControlTime": "2020-08-03T00:00:00.000000001Z",
				"UserProfiles": []any{map[string]any{"ID": 1, "LoginName": "again"}}, "CollectServices": true,
			})
		}
	}
	s.seen(a.Node, me)
	toB.works("after much was repeated")
	toLaptop.works("after much was repeated")
	laptop.do("exchange", map[string]any{"Name": "a", "Bytes": 1000}, nil)
	if after := laptop.handshake(me.Key); !after.Equal(before) {
		t.Errorf("the handshake of %v was followed by one at %v", before, after)
	}
	if st := a.Status(); st.Control != "" || !st.Running {
		t.Errorf("status %+v", st)
	}
}

// Messages that change one thing each change that thing.
func TestOnStockDeltas(t *testing.T) {
	s := serveStock(t)
	a, b := s.agent("a"), s.agent("b")
	laptop := s.stocks("laptop", "")
	laptop.services()
	me, other, theirs := s.findOurs(a.Node), s.findOurs(b.Node), s.findStock(laptop)
	waitFor(t, a.Node, other.Key)
	waitFor(t, a.Node, theirs.Key)
	talk(t, a, b, false)
	// From here on the server adds nothing of its own.
	s.push(me, map[string]any{"KeepAlive": true})
	toLaptop := dialEcho(t, a.Node, port(laptop, false, 7))
	dial := func(addr string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		c, err := a.Dial(ctx, "tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	}

	// A peer that leaves, and comes back under another name.
	toB := dialEcho(t, a.Node, port(b, false, 7))
	s.rawAndSeen(a.Node, me, map[string]any{"PeersRemoved": []int64{other.ID, 12345, -1, 0}})
	toB.ends("the removal of its peer")
	if err := dial("b:7"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("a peer that has left: %v", err)
	}
	renamed := other
	renamed.Name = "bee" + strings.TrimPrefix(other.Name, "b") // older servers give names without a domain
	s.rawAndSeen(a.Node, me, map[string]any{"PeersChanged": []known{renamed}})
	if err := dial("bee:7"); err != nil {
		t.Errorf("a peer that is back: %v", err)
	}
	if err := dial("b:7"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("the old name: %v", err)
	}

	// Patches: to peers that nobody knows, and of what is no secret.
	yes, no := true, false
	s.rawAndSeen(a.Node, me, map[string]any{
		"PeersChangedPatch": []any{nil, map[string]any{"NodeID": 999, "Online": true}, map[string]any{"NodeID": other.ID, "Online": yes, "XNew": 1}},
		"OnlineChange":      map[string]bool{"998": true},
		"PeerSeenChange":    map[string]bool{"997": true},
	})
	if p := path(a.Node, other.Key); !p.Online {
		t.Errorf("after it came online: %+v", p)
	}
	s.rawAndSeen(a.Node, me, map[string]any{"OnlineChange": map[int64]bool{other.ID: no}, "PeerSeenChange": map[int64]bool{other.ID: true}})
	if p := path(a.Node, other.Key); p.Online || time.Since(p.LastSeen) > time.Minute {
		t.Errorf("after it went offline: %+v", p)
	}
	// A home relay and endpoints that lead nowhere do not end what is direct.
	s.rawAndSeen(a.Node, me, map[string]any{"PeersChangedPatch": []any{
		map[string]any{"NodeID": theirs.ID, "DERPRegion": 77, "Endpoints": []string{"192.0.2.99:9"}, "Cap": 150},
	}})
	toLaptop.works("after its addresses changed")
	s.rawAndSeen(a.Node, me, map[string]any{"PeersChanged": []known{theirs}})

	// Junk between what counts: claims on what belongs to others above all.
	thief := fakePeer(5000, "thief")
	thief.Addresses = append(theirs.Addresses, me.Addresses...)
	thief.AllowedIPs = append([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}, thief.Addresses...)
	twin := fakePeer(5001, "twin")
	twin.Key = theirs.Key
	s.rawAndSeen(a.Node, me, map[string]any{"PeersChanged": []any{
		nil, map[string]any{}, map[string]any{"ID": -5}, map[string]any{"ID": 5002, "Name": "\x00\x1b[2J", "Key": hexKey("nodekey:", 5002)}, thief, twin, me,
	}})
	if id := whoAmI(t, a, laptop, false); label(id.Name) != "a" {
		t.Errorf("after junk the stock node took us for %+v", id)
	}
	toLaptop.works("after junk")
	s.rawAndSeen(a.Node, me, map[string]any{"PeersRemoved": []int64{5000, 5001, 5002}})

	// Filters in pieces: the server's own is "base".
	rule := func(src, port string) []any {
		var p [2]int
		if port == "*" {
			p = [2]int{0, 65535}
		} else if err := json.Unmarshal([]byte("["+port+","+port+"]"), &p); err != nil {
			t.Fatal(err)
		}
		return []any{map[string]any{"SrcIPs": []string{src}, "DstPorts": []any{map[string]any{"IP": "*", "Ports": map[string]int{"First": p[0], "Last": p[1]}}}}}
	}
	from := laptop.at(false).String()
	try := func(what string, echo, web bool) {
		t.Helper()
		if err := laptop.begins(port(a, false, 7), echo); (err == nil) != echo {
			t.Errorf("%s: echo %v", what, err)
		}
		if err := laptop.begins(port(a, false, 80), web); (err == nil) != web {
			t.Errorf("%s: web %v", what, err)
		}
	}
	filters := func(m map[string]any) { s.rawAndSeen(a.Node, me, map[string]any{"PacketFilters": m}) }
	filters(map[string]any{"*": nil, "base": rule(from, "7")})
	try("one piece", true, false)
	filters(map[string]any{"more": rule(from, "80")})
	try("two pieces", true, true)
	filters(map[string]any{"base": nil})
	try("the first one deleted", false, true)
	filters(map[string]any{"*": nil, "base": []any{}})
	try("all deleted", false, false)
	filters(map[string]any{"base": rule("*", "*")})
	try("the first one back", true, true)

	// No relay left, and another one: what is direct goes on.
	s.rawAndSeen(a.Node, me, map[string]any{"DERPMap": map[string]any{"Regions": map[string]any{"900": nil, "901": map[string]any{"RegionID": 901, "Nodes": []any{nil}}}}})
	toLaptop.works("without a relay")
	var info struct{ DERPMap json.RawMessage }
	s.do("info", nil, &info)
	s.rawAndSeen(a.Node, me, map[string]any{"DERPMap": info.DERPMap, "HomeParams": map[string]any{}})
	meshtest.Until(t, "the relay to be back", func() bool { return a.Status().HomeRelay == 900 })
	if st := a.Status(); st.Control != "" {
		t.Errorf("all along the stream should have lived: %v", st.Control)
	}
}

// Peers with restrictions: who is jailed, or is not signed, begins nothing;
// whose key has expired does not exist; and who sees us at another address
// cannot reach us, while all others can.
func TestOnStockRestrictions(t *testing.T) {
	s := serveStock(t)
	a := s.agent("a")
	laptop := s.stocks("laptop", "")
	laptop.services()
	me, theirs := s.findOurs(a.Node), s.findStock(laptop)
	waitFor(t, a.Node, theirs.Key)
	talk(t, a, laptop, false)
	talk(t, laptop, a, false)
	begins := func(may bool) error { return laptop.begins(port(a, false, 7), may) }

	s.do("jail", map[string]any{"Node": me.Key, "Peer": theirs.Key, "On": true}, nil)
	s.seen(a.Node, me)
	if begins(false) == nil {
		t.Error("a jailed peer began a connection")
	}
	talk(t, a, laptop, false)
	s.do("jail", map[string]any{"Node": me.Key, "Peer": theirs.Key, "On": false}, nil)
	s.seen(a.Node, me)
	if err := begins(true); err != nil {
		t.Errorf("after jail: %v", err)
	}

	s.push(me, map[string]any{"KeepAlive": true})
	change := func(f func(*known)) {
		t.Helper()
		p := theirs
		f(&p)
		s.rawAndSeen(a.Node, me, map[string]any{"PeersChanged": []known{p}})
	}
	change(func(p *known) { p.UnsignedPeerAPIOnly = true })
	if begins(false) == nil {
		t.Error("a peer that is not signed began a connection")
	}
	change(func(p *known) {})
	if err := begins(true); err != nil {
		t.Errorf("after the signature: %v", err)
	}
	l := dialEcho(t, a.Node, port(laptop, false, 7))
	masq := netip.MustParseAddr("100.90.1.1")
	change(func(p *known) { p.SelfNodeV4MasqAddrForThisPeer = &masq })
	l.works("though the peer would see us at another address")

	change(func(p *known) { p.Expired = true })
	l.ends("the expiry of its peer")
	if begins(false) == nil {
		t.Error("a peer whose key has expired began a connection")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if c, err := a.Dial(ctx, "tcp", port(laptop, false, 7)); err == nil {
		c.Close()
		t.Error("a peer whose key has expired was dialled")
	} else if !strings.Contains(err.Error(), "expired") {
		t.Logf("dial of an expired peer: %v", err)
	}
	change(func(p *known) {})
	if err := begins(true); err != nil {
		t.Errorf("after the renewal: %v", err)
	}
}
