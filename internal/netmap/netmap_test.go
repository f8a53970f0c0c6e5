package netmap

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func key(n int) identity.NodePublic {
	var b [32]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	b[31] = 1
	return identity.NodePublicFrom(b)
}

func disco(n int) identity.DiscoPublic {
	var b [32]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	b[31] = 2
	return identity.DiscoPublicFrom(b)
}

func prefixes(list ...string) []netip.Prefix {
	out := []netip.Prefix{}
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func addr4(n int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(n >> 8), byte(n)}), 32)
}

func addr6(n int) netip.Prefix {
	b := netip.MustParseAddr("fd7a:115c:a1e0::").As16()
	binary.BigEndian.PutUint32(b[12:], uint32(n))
	return netip.PrefixFrom(netip.AddrFrom16(b), 128)
}

func node(n int) *wire.Node {
	return &wire.Node{
		ID: wire.NodeID(n), StableID: fmt.Sprintf("s%d", n), Name: fmt.Sprintf("n%d.mesh.internal.", n), User: 1,
		Key: key(n), DiscoKey: disco(n), Addresses: []netip.Prefix{addr4(n), addr6(n)},
		HomeDERP: 900, Hostinfo: &wire.Hostinfo{}, MachineAuthorized: true,
	}
}

func first(peers ...*wire.Node) *wire.MapResponse {
	return &wire.MapResponse{
		Node: node(1000), Peers: peers, Domain: "example mesh", MeshPolicy: 1,
		DERPMap:       &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900: {RegionID: 900}}},
		DNSConfig:     &wire.DNSConfig{Proxied: true},
		UserProfiles:  []wire.UserProfile{{ID: 1, LoginName: "ann@example.com", Groups: []string{"group:dev"}}},
		PacketFilters: map[string][]wire.FilterRule{"base": {{SrcIPs: []string{"*"}}}},
	}
}

func apply(t testing.TB, prev *Map, r *wire.MapResponse) (*Map, Delta) {
	t.Helper()
	m, d, err := ApplyAt(prev, r, start)
	if err != nil {
		t.Fatal(err)
	}
	return m, d
}

func ids(list []*Peer) []wire.NodeID {
	out := []wire.NodeID{}
	for _, p := range list {
		out = append(out, p.ID)
	}
	return out
}

func changed(d Delta) []wire.NodeID {
	out := []wire.NodeID{}
	for _, c := range d.Changed {
		out = append(out, c.New.ID)
	}
	return out
}

func TestFirst(t *testing.T) {
	m, d := apply(t, nil, first(node(1), node(2)))
	if !d.Full || !d.Self || !d.Relays || !d.Filter || !d.DNS || !d.Policy || !slices.Equal(ids(d.Added), []wire.NodeID{1, 2}) {
		t.Errorf("delta %+v", d)
	}
	if m.NumPeers() != 2 || m.Domain() != "mesh.internal" || m.Network() != "example mesh" || m.PolicyVersion() != 1 || len(m.Filter()) != 1 || m.DERPMap() == nil || !m.DNS().Proxied {
		t.Errorf("map %+v", m)
	}
	if _, _, err := Apply(nil, &wire.MapResponse{Peers: []*wire.Node{node(1)}}); err != ErrNoNode {
		t.Errorf("no node: %v", err)
	}
	if m, _, err := Apply(nil, &wire.MapResponse{KeepAlive: true}); m != nil || err != nil {
		t.Errorf("keep-alive first: %v, %v", m, err)
	}
	if _, _, err := Apply(nil, &wire.MapResponse{Node: &wire.Node{ID: 4}}); err == nil {
		t.Error("a node without key is taken")
	}
}

func TestLookups(t *testing.T) {
	router := node(3)
	router.AllowedIPs = append(slices.Clone(router.Addresses), prefixes("10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "0.0.0.0/0", "::/0")...)
	other := node(4)
	other.AllowedIPs = append(slices.Clone(other.Addresses), prefixes("10.1.2.0/24")...)
	twin := node(5)
	twin.DiscoKey = disco(4)
	m, _ := apply(t, nil, first(node(2), router, other, twin))

	for a, want := range map[string]wire.NodeID{
		"100.64.0.2": 2, "fd7a:115c:a1e0::2": 2, "::ffff:100.64.0.2": 2,
		"10.9.9.9": 3, "10.1.1.1": 3, "10.1.2.3": 4, "fd00::1": 3,
		"8.8.8.8": 0, "2001:db8::1": 0, "100.64.3.232": 0 /* self */, "100.64.0.99": 0,
	} {
		p, ok := m.PeerByAddr(netip.MustParseAddr(a))
		if ok != (want != 0) || ok && p.ID != want {
			t.Errorf("PeerByAddr(%s) = %v, %v; want %d", a, p, ok, want)
		}
	}
	if _, ok := m.PeerByAddr(netip.Addr{}); ok {
		t.Error("the zero address has a peer")
	}
	for name, want := range map[string]wire.NodeID{
		"n2": 2, "N2": 2, "n2.": 2, "n2.mesh.internal": 2, "n2.Mesh.Internal.": 2,
		"n9": 0, "": 0, ".": 0, "mesh.internal": 0, "n1000": 0, "n2.mesh": 0,
	} {
		p, ok := m.PeerByName(name)
		if ok != (want != 0) || ok && p.ID != want {
			t.Errorf("PeerByName(%q) = %v, %v; want %d", name, p, ok, want)
		}
	}
	if p, ok := m.Peer(key(2)); !ok || p.ID != 2 {
		t.Errorf("Peer: %v, %v", p, ok)
	}
	if _, ok := m.Peer(key(1000)); ok {
		t.Error("self is a peer")
	}
	if p, ok := m.PeerByStableID("s3"); !ok || p.ID != 3 || !p.OffersExit || slices.ContainsFunc(p.AllowedIPs, isExit) {
		t.Errorf("PeerByStableID: %+v, %v", p, ok)
	}
	if got := ids(m.PeersByDisco(disco(4))); !slices.Equal(got, []wire.NodeID{4, 5}) {
		t.Errorf("PeersByDisco: %v", got)
	}
	if got := m.PeersByDisco(identity.DiscoPublic{}); len(got) != 0 {
		t.Errorf("peers without disco key are found by it: %v", ids(got))
	}
}

func TestDeltas(t *testing.T) {
	base, _ := apply(t, nil, first(node(1), node(2), node(3)))
	no, yes := false, true
	region := *node(2)
	region.HomeDERP = 0
	region.LegacyDERP = "127.3.3.40:901"
	for _, test := range []struct {
		name  string
		r     wire.MapResponse
		want  string // added|changed|removed
		check func(*Map) bool
	}{
		{"nothing", wire.MapResponse{}, "[]|[]|[]", nil},
		{"empty peers change nothing", wire.MapResponse{Peers: []*wire.Node{}}, "[]|[]|[]", nil},
		{"replace all", wire.MapResponse{Peers: []*wire.Node{node(2), node(4)}, PeersRemoved: []wire.NodeID{2}}, "[4]|[]|[1 3]", nil},
		{"remove", wire.MapResponse{PeersRemoved: []wire.NodeID{2, 77}}, "[]|[]|[2]", nil},
		{"add", wire.MapResponse{PeersChanged: []*wire.Node{node(7)}}, "[7]|[]|[]", nil},
		{"same again", wire.MapResponse{PeersChanged: []*wire.Node{node(2)}}, "[]|[]|[]", nil},
		{"older relay form", wire.MapResponse{PeersChanged: []*wire.Node{&region}}, "[]|[2]|[]", func(m *Map) bool { p, _ := m.PeerByID(2); return p.HomeDERP == 901 }},
		{"remove, then change", wire.MapResponse{PeersRemoved: []wire.NodeID{2}, PeersChanged: []*wire.Node{node(2)}}, "[]|[]|[]", nil},
		{"online", wire.MapResponse{OnlineChange: map[wire.NodeID]bool{2: true, 99: true}}, "[]|[2]|[]", func(m *Map) bool { p, _ := m.PeerByID(2); return *p.Online }},
		{"patch after online", wire.MapResponse{OnlineChange: map[wire.NodeID]bool{2: true}, PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, Online: &no}, nil, {NodeID: 99}}}, "[]|[2]|[]", func(m *Map) bool { p, _ := m.PeerByID(2); return !*p.Online }},
		{"seen", wire.MapResponse{PeerSeenChange: map[wire.NodeID]bool{1: true, 2: false}}, "[]|[1]|[]", func(m *Map) bool { p, _ := m.PeerByID(1); return p.LastSeen.Equal(start) }},
		{"patch of all", wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 1, DERPRegion: 5, Cap: 140, CapMap: map[string][]json.RawMessage{"x": nil},
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4")}, Key: ptr(key(50)), DiscoKey: ptr(disco(50)), Online: &yes, LastSeen: &start, KeyExpiry: &start}}},
			"[]|[1]|[]", func(m *Map) bool {
				p, ok := m.Peer(key(50))
				_, old := m.Peer(key(1))
				return ok && !old && p.ID == 1 && p.HomeDERP == 5 && p.Cap == 140 && len(p.CapMap) == 1 && len(p.Endpoints) == 1 && len(m.PeersByDisco(disco(50))) == 1 && len(m.PeersByDisco(disco(1))) == 0 && p.KeyExpiry.Equal(start)
			}},
		{"a patch without endpoints keeps them", wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 1, Endpoints: []netip.AddrPort{}}}}, "[]|[]|[]", nil},
		{"own node keeps peers", wire.MapResponse{Node: ptr(func() wire.Node { n := *node(1000); n.HomeDERP = 3; return n }())}, "[]|[]|[]", func(m *Map) bool { return m.Self().HomeDERP == 3 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := base.Response()
			m, d := apply(t, base, &test.r)
			if got := fmt.Sprint(ids(d.Added), "|", changed(d), "|", ids(d.Removed)); strings.ReplaceAll(got, " | ", "|") != test.want {
				t.Errorf("delta %s, want %s", got, test.want)
			}
			if test.check != nil && !test.check(m) {
				t.Error("wrong map")
			}
			if !reflect.DeepEqual(base.Response(), before) {
				t.Error("the former map changed")
			}
			checkIndex(t, m)
		})
	}
}

func ptr[T any](v T) *T { return &v }

func TestFilterChunks(t *testing.T) {
	m, _ := apply(t, nil, &wire.MapResponse{Node: node(1000)})
	if m.Filter() != nil {
		t.Error("a map without filter lets something in")
	}
	for i, step := range []struct{ json, want string }{
		{`{"PacketFilters":{"b":[{"SrcIPs":["b"]}],"a":[{"SrcIPs":["a"]}]}}`, "a b"},
		{`{"PacketFilter":[{"SrcIPs":["base"]}]}`, "a b base"},
		{`{}`, "a b base"},
		{`{"PacketFilter":null,"PacketFilters":null}`, "a b base"},
		{`{"PacketFilters":{"a":null}}`, "b base"},
		{`{"PacketFilters":{"*":null,"c":[{"SrcIPs":["c"]}]}}`, "c"},
		{`{"PacketFilters":{"d":[{"SrcIPs":["d"],"SrcBits":[32]}]}}`, ""},
		{`{"PacketFilters":{"d":[{"SrcIPs":["d"],"DstPorts":[{"IP":"*","Bits":0,"Ports":{"First":0,"Last":0}}]}]}}`, ""},
		{`{"PacketFilters":{"d":[{"SrcIPs":["d"]}]}}`, "c d"},
		{`{"PacketFilters":{"base":[]}}`, "c d"},
		{`{"PacketFilters":{"*":null,"base":[]}}`, ""},
		{`{"PacketFilter":[{"SrcIPs":["x"]}]}`, "x"},
		{`{"PacketFilter":[]}`, ""},
	} {
		var r wire.MapResponse
		if err := json.Unmarshal([]byte(step.json), &r); err != nil {
			t.Fatal(err)
		}
		var d Delta
		was := m.Filter()
		m, d = apply(t, m, &r)
		var got []string
		for _, f := range m.Filter() {
			got = append(got, f.SrcIPs...)
		}
		if strings.Join(got, " ") != step.want {
			t.Errorf("step %d: %v, want %s", i, got, step.want)
		}
		if d.Filter != !reflect.DeepEqual(was, m.Filter()) {
			t.Errorf("step %d: Delta.Filter = %v", i, d.Filter)
		}
	}
}

func TestRest(t *testing.T) {
	m, _ := apply(t, nil, first(node(1)))
	m, d := apply(t, m, &wire.MapResponse{DERPMap: &wire.DERPMap{HomeParams: &wire.DERPHomeParams{RegionScore: map[int]float64{900: 2}}}})
	if !d.Relays || len(m.DERPMap().Regions) != 1 || m.DERPMap().HomeParams.RegionScore[900] != 2 {
		t.Errorf("home params: %+v", m.DERPMap())
	}
	m, d = apply(t, m, &wire.MapResponse{DERPMap: &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900: nil, 901: {RegionID: 901}}}})
	if !d.Relays || len(m.DERPMap().Regions) != 1 || m.DERPMap().Regions[901] == nil || m.DERPMap().HomeParams == nil {
		t.Errorf("regions: %+v", m.DERPMap())
	}
	m, _ = apply(t, m, &wire.MapResponse{DERPMap: &wire.DERPMap{HomeParams: &wire.DERPHomeParams{RegionScore: map[int]float64{}}}})
	if len(m.DERPMap().HomeParams.RegionScore) != 0 {
		t.Errorf("reset: %+v", m.DERPMap().HomeParams)
	}
	m, d = apply(t, m, &wire.MapResponse{UserProfiles: []wire.UserProfile{{ID: 2, LoginName: "bob"}, {ID: 1, LoginName: "ann@example.com", Groups: []string{"group:dev"}}, {ID: 0}}})
	if !slices.Equal(d.Users, []wire.UserID{2}) {
		t.Errorf("users: %v", d.Users)
	}
	if _, ok := m.User(1); !ok {
		t.Error("user 1 was lost")
	}
	m, d = apply(t, m, &wire.MapResponse{DNSConfig: &wire.DNSConfig{}, MeshPolicy: 9})
	if !d.DNS || !d.Policy || m.PolicyVersion() != 9 || m.DNS().Proxied {
		t.Errorf("DNS, policy: %+v", d)
	}
	if _, d = apply(t, m, &wire.MapResponse{}); !d.Empty() {
		t.Errorf("an empty message changed %+v", d)
	}
}

func TestClock(t *testing.T) {
	m, _ := apply(t, nil, first(node(1)))
	n := node(2)
	n.KeyExpiry = start.Add(30 * time.Minute)
	late, soon := start.Add(time.Hour), start.Add(30*time.Second)
	m, _ = apply(t, m, &wire.MapResponse{PeersChanged: []*wire.Node{n}, ControlTime: &soon})
	if m.ClockOffset() != 0 || m.Expired(n, start) || !m.NextExpiry(start).Equal(n.KeyExpiry) {
		t.Errorf("offset %v", m.ClockOffset())
	}
	m, _ = apply(t, m, &wire.MapResponse{KeepAlive: true, ControlTime: &late})
	if m.ClockOffset() != time.Hour || !m.Expired(n, start) || !m.NextExpiry(start).IsZero() {
		t.Errorf("offset %v", m.ClockOffset())
	}
	for _, noise := range []time.Duration{-9 * time.Second, 9 * time.Second} {
		about := late.Add(noise)
		if again, _ := apply(t, m, &wire.MapResponse{KeepAlive: true, ControlTime: &about}); again != m {
			t.Errorf("an offset that varies by %v makes another map", noise)
		}
	}
	old := time.Unix(0, 0)
	n.KeyExpiry = old
	m, _ = apply(t, m, &wire.MapResponse{KeepAlive: true, ControlTime: &old})
	if m.Expired(n, start) {
		t.Error("an absurd clock expires nodes")
	}
	if n.Expired = true; !m.Expired(n, start) {
		t.Error("the flag counts always")
	}
}

func TestIdentity(t *testing.T) {
	tagged := node(3)
	tagged.User, tagged.Tags = wire.TaggedUser, []string{"tag:web", "tag:db"}
	own4 := addr4(1000).String()
	r := first(node(2), tagged)
	r.PacketFilters = map[string][]wire.FilterRule{"base": {
		{SrcIPs: []string{"*"}, CapGrant: []wire.CapGrant{{Dsts: []string{own4}, CapMap: map[string][]json.RawMessage{"example.com/cap/a": {json.RawMessage(`{"x":1}`)}, "example.com/cap/b": nil}}}},
		{SrcIPs: []string{"100.64.0.0/24"}, CapGrant: []wire.CapGrant{{Dsts: []string{"0.0.0.0/0"}, Caps: []string{"example.com/cap/old"}, CapMap: map[string][]json.RawMessage{"example.com/cap/a": {json.RawMessage(`{"x":2}`)}}}}},
		{SrcIPs: []string{"100.64.0.3-100.64.0.9", "cap:x", "100.64.9.1/24", "bad", "5-4"}, CapGrant: []wire.CapGrant{{Dsts: []string{own4}, Caps: []string{"range"}}}},
		{SrcIPs: []string{"fd7a:115c:a1e0::2"}, CapGrant: []wire.CapGrant{{Dsts: []string{own4}, Caps: []string{"other family"}}}},
		{SrcIPs: []string{"100.64.0.2"}, CapGrant: []wire.CapGrant{{Dsts: []string{"100.64.9.9/32", "bad"}, Caps: []string{"elsewhere"}}}},
	}}
	m, _ := apply(t, nil, r)
	p, _ := m.PeerByID(2)
	who := m.Identity(p)
	want := map[string][]json.RawMessage{
		"example.com/cap/a": {json.RawMessage(`{"x":1}`), json.RawMessage(`{"x":2}`)}, "example.com/cap/b": {}, "example.com/cap/old": {},
	}
	if who.User != "ann@example.com" || who.Name != "n2.mesh.internal" || !slices.Equal(who.Groups, []string{"group:dev"}) || who.ID != "s2" || len(who.Addresses) != 2 {
		t.Errorf("identity %+v", who)
	}
	if !reflect.DeepEqual(who.Capabilities, want) {
		t.Errorf("capabilities %s, want %s", who.Capabilities, want)
	}
	p, _ = m.PeerByID(3)
	who = m.Identity(p)
	if who.User != "" || !slices.Equal(who.Tags, []string{"tag:db", "tag:web"}) || who.Groups != nil {
		t.Errorf("tagged: %+v", who)
	}
	if _, ok := who.Capabilities["range"]; !ok {
		t.Errorf("tagged: %v", who.Capabilities)
	}
	if self := m.SelfIdentity(); self.Name != "n1000.mesh.internal" {
		t.Errorf("self: %+v", self)
	}
}

func TestHostile(t *testing.T) {
	with := func(n int, change func(*wire.Node)) *wire.Node {
		x := node(n)
		change(x)
		return x
	}
	m, d := apply(t, nil, first(
		node(1),
		with(2, func(n *wire.Node) { n.Addresses = append(n.Addresses, addr4(1)) }),                // node 1's address
		with(3, func(n *wire.Node) { n.AllowedIPs = append(slices.Clone(n.Addresses), addr4(1)) }), // as a route
		with(4, func(n *wire.Node) { n.Addresses = append(n.Addresses, addr4(1000)) }),             // this node's
		with(5, func(n *wire.Node) { n.Key = key(1) }),                                             // node 1's key
		with(6, func(n *wire.Node) { n.Key = key(1000) }),                                          // this node's
		with(7, func(n *wire.Node) { n.Key = identity.NodePublic{} }),                              // none
		with(0, func(n *wire.Node) {}),                                                             // no number
		with(-8, func(n *wire.Node) {}),                                                            //
		with(1000, func(n *wire.Node) { n.Key = key(77) }),                                         // this node's number
		with(9, func(n *wire.Node) { n.Name = "n1.mesh.internal."; n.StableID = "s1" }),            // node 1's name
		with(10, func(n *wire.Node) { n.Name = "N1000.mesh.internal" }),                            // this node's name
		with(11, func(n *wire.Node) { n.Name = "\x1b[2J.mesh.internal." }),                         //
		with(12, func(n *wire.Node) {
			n.Addresses = prefixes("127.0.0.1/32", "100.64.0.12/32", "0.0.0.0/32", "100.64.0.0/24", "224.0.0.1/32", "::ffff:1.2.3.4/128", "100.64.0.12/32")
		}), //
		with(13, func(n *wire.Node) { n.Addresses = append(n.Addresses, netip.Prefix{}) }), //
		with(14, func(n *wire.Node) { n.AllowedIPs = []netip.Prefix{} }),                   // nothing
		nil,
	))
	checkIndex(t, m)
	get := func(id wire.NodeID) *Peer { p, _ := m.PeerByID(id); return p }
	for _, id := range []wire.NodeID{0, -8, 5, 6, 7, 1000} {
		if get(id) != nil {
			t.Errorf("node %d is a peer", id)
		}
	}
	for _, id := range []wire.NodeID{2, 3, 4} {
		if p := get(id); p == nil || len(p.Addresses) != 2 || len(p.AllowedIPs) != 2 {
			t.Errorf("node %d got more than its own: %+v", id, p)
		}
	}
	if p, _ := m.PeerByAddr(addr4(1).Addr()); p == nil || p.ID != 1 {
		t.Errorf("node 1's address leads to %v", p)
	}
	if p, _ := m.PeerByName("n1"); p == nil || p.ID != 1 {
		t.Errorf("node 1's name leads to %v", p)
	}
	if p, _ := m.PeerByName("n1000"); p != nil {
		t.Errorf("this node's name leads to %v", p)
	}
	if p, _ := m.PeerByStableID("s1"); p == nil || p.ID != 1 {
		t.Errorf("node 1's stable name leads to %v", p)
	}
	if p := get(11); p.Name != "" {
		t.Errorf("name %q", p.Name)
	}
	if p := get(12); len(p.Addresses) != 1 {
		t.Errorf("addresses %v", p.Addresses)
	}
	if p := get(14); len(p.AllowedIPs) != 0 || len(p.Addresses) != 2 {
		t.Errorf("node 14: %+v", p)
	}
	if len(d.Ignored) < 12 {
		t.Errorf("only %d reports: %q", len(d.Ignored), d.Ignored)
	}

	// When the first holder leaves, the next gets what it claimed.
	m, d = apply(t, m, &wire.MapResponse{PeersRemoved: []wire.NodeID{1}})
	if p, _ := m.PeerByAddr(addr4(1).Addr()); p == nil || p.ID != 2 {
		t.Errorf("node 1's address leads to %v", p)
	}
	if p, _ := m.Peer(key(1)); p == nil || p.ID != 5 {
		t.Errorf("node 1's key leads to %v", p)
	}
	if got := fmt.Sprint(ids(d.Added), changed(d), ids(d.Removed)); got != "[5] [2] [1]" {
		t.Errorf("delta %s", got)
	}
	// And when this node moves, what it had is free.
	self := node(1000)
	self.Addresses = prefixes("100.64.200.1/32")
	m, d = apply(t, m, &wire.MapResponse{Node: self})
	if p, _ := m.PeerByAddr(addr4(1000).Addr()); p == nil || p.ID != 4 {
		t.Errorf("this node's former address leads to %v", p)
	}
	if got := fmt.Sprint(ids(d.Added), changed(d), ids(d.Removed)); got != "[] [4] []" || !d.Self {
		t.Errorf("delta %s", got)
	}
	checkIndex(t, m)
}

func TestIgnoredIsBounded(t *testing.T) {
	n := node(1)
	for i := range maxPrefixes * 2 {
		n.AllowedIPs = append(n.AllowedIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 24))
	}
	_, d := apply(t, nil, first(n))
	if len(d.Ignored) > 2*maxIgnored {
		t.Errorf("%d reports", len(d.Ignored))
	}
}

func TestRebase(t *testing.T) {
	old, _ := apply(t, nil, first(node(1), node(2), node(3)))
	old, _ = apply(t, old, &wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, DERPRegion: 5}}})
	new, _ := apply(t, nil, old.Response())
	if d := Rebase(old, new); !d.Empty() {
		t.Errorf("equal maps differ: %+v", d)
	}
	r := first(node(2), node(3), node(4))
	r.MeshPolicy = 2
	new, _ = apply(t, nil, r)
	d := Rebase(old, new)
	if got := fmt.Sprint(ids(d.Added), changed(d), ids(d.Removed)); got != "[4] [2] [1]" || d.Full || d.Self || d.Filter || d.Relays || !d.Policy {
		t.Errorf("delta %s %+v", got, d)
	}
	if d := Rebase(nil, new); !d.Full || len(d.Added) != 3 {
		t.Errorf("from nothing: %+v", d)
	}
}

func TestZeroMap(t *testing.T) {
	var m Map
	if _, ok := m.PeerByName("x"); ok || m.Domain() != "" || m.Self() == nil || m.NumPeers() != 0 || !m.SelfIdentity().IsZero() || !m.NextExpiry(start).IsZero() || m.Filter() != nil {
		t.Error("the zero map knows something")
	}
	if _, ok := m.PeerByAddr(addr4(1).Addr()); ok || len(m.PeersByDisco(disco(1))) != 0 {
		t.Error("the zero map knows something")
	}
}

// A peer that is not signed may use the peer API alone, which we do not have.
func TestUnsignedPeerBeginsNothing(t *testing.T) {
	n := wire.Node{ID: 2, Key: identity.NewNode().Public(), UnsignedPeerAPIOnly: true}
	m, _, err := Apply(nil, &wire.MapResponse{Node: &wire.Node{ID: 1, Key: identity.NewNode().Public()}, Peers: []*wire.Node{&n}})
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := m.PeerByID(2); !ok || !p.IsJailed || n.IsJailed {
		t.Errorf("the peer is %+v", p)
	}
}
