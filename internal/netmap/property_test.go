package netmap

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"mesh/control/wire"
)

// checkIndex checks that all ways to a peer agree with a plain search.
func checkIndex(t testing.TB, m *Map) {
	t.Helper()
	byAddr := map[netip.Prefix]*Peer{}
	n := 0
	for p := range m.Peers() {
		n++
		if got, ok := m.Peer(p.Key); !ok || got != p {
			t.Errorf("node %d is not found by its key", p.ID)
		}
		if got, ok := m.PeerByID(p.ID); !ok || got != p {
			t.Errorf("node %d is not found by its number", p.ID)
		}
		if !p.DiscoKey.IsZero() && !slices.Contains(m.PeersByDisco(p.DiscoKey), p) {
			t.Errorf("node %d is not found by its disco key", p.ID)
		}
		if got, ok := m.PeerByName(p.Name); p.Name != "" && normalName(p.Name) != normalName(m.self.Name) && (!ok || normalName(got.Name) != normalName(p.Name) || got.ID > p.ID) {
			t.Errorf("node %d is not found by its name %s, but %v", p.ID, p.Name, got)
		}
		for _, x := range append(slices.Clone(p.Addresses), p.AllowedIPs...) {
			if byAddr[x] != nil && byAddr[x] != p {
				t.Errorf("nodes %d and %d have both got %v", p.ID, byAddr[x].ID, x)
			}
			if slices.Contains(m.self.Addresses, x) {
				t.Errorf("node %d has got this node's %v", p.ID, x)
			}
			byAddr[x] = p
		}
	}
	if n != m.NumPeers() {
		t.Errorf("%d peers, NumPeers says %d", n, m.NumPeers())
	}
	for x := range byAddr {
		var want *Peer
		best := -1
		for y, p := range byAddr {
			if y.Contains(x.Addr()) && y.Bits() > best {
				best, want = y.Bits(), p
			}
		}
		if got, _ := m.PeerByAddr(x.Addr()); got != want {
			t.Errorf("PeerByAddr(%v) = %v, want %v", x.Addr(), got, want)
		}
	}
	lengths := lengths{}
	for x := range m.prefixes.all() {
		lengths[family(x.Addr())][x.Bits()]++
	}
	if lengths != m.lengths {
		t.Error("the counts of prefix lengths are off")
	}
	var expiry expiries
	for p := range m.Peers() {
		expiry.add(p.Node)
	}
	if m.expiry.count != expiry.count || expiry.count > 0 && !m.expiry.soonest.Equal(expiry.soonest) {
		t.Errorf("expiry is %+v, want %+v", m.expiry, expiry)
	}
}

// same checks that two maps say the same.
func same(t testing.TB, a, b *Map) {
	t.Helper()
	if x, y := a.Response(), b.Response(); !reflect.DeepEqual(x, y) {
		p, _ := json.Marshal(x)
		q, _ := json.Marshal(y)
		t.Fatalf("maps differ:\n%s\n%s", p, q)
	}
	if d := Rebase(a, b); !d.Empty() {
		t.Fatalf("maps differ: %+v", d)
	}
	if !reflect.DeepEqual(a.Filter(), b.Filter()) {
		t.Fatal("filters differ")
	}
}

// world makes random messages of a few nodes that quarrel about everything.
type world struct {
	*rand.Rand
	nodes map[wire.NodeID]*wire.Node // what control has said
	self  *wire.Node
}

func (w *world) node() *wire.Node {
	n := node(1 + w.IntN(8))
	if w.IntN(3) == 0 {
		n.Key = key(w.IntN(10))
	}
	if w.IntN(20) == 0 {
		n.Key = key(1000)
	}
	n.DiscoKey = disco(w.IntN(4))
	if w.IntN(3) == 0 {
		n.Name = fmt.Sprintf("n%d.mesh.internal.", 1+w.IntN(10))
	}
	if w.IntN(3) == 0 {
		n.StableID = fmt.Sprintf("s%d", 1+w.IntN(10))
	}
	if w.IntN(2) == 0 {
		n.KeyExpiry, n.Expired = time.Unix(2e9+w.Int64N(3), 0), w.IntN(4) == 0
	}
	for w.IntN(2) == 0 {
		n.Addresses = append(n.Addresses, addr4(995+w.IntN(10)))
	}
	if w.IntN(2) == 0 {
		n.AllowedIPs = slices.Clone(n.Addresses)
		for w.IntN(3) > 0 {
			n.AllowedIPs = append(n.AllowedIPs, [...]netip.Prefix{
				addr4(995 + w.IntN(10)), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"),
				netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("100.64.0.0/10"),
			}[w.IntN(6)])
		}
	}
	return n
}

func (w *world) id() wire.NodeID { return wire.NodeID(w.IntN(10)) }

// message returns a random message after telling the model the same.
func (w *world) message() *wire.MapResponse {
	r := &wire.MapResponse{}
	if w.IntN(15) == 0 {
		self := *w.self
		self.Addresses = []netip.Prefix{addr4(995 + w.IntN(10))}
		self.Name = fmt.Sprintf("n%d.mesh.internal.", 1+w.IntN(10))
		self.Key = key(w.IntN(12))
		w.self, r.Node = &self, &self
	}
	if w.IntN(10) == 0 {
		for range 1 + w.IntN(6) {
			r.Peers = append(r.Peers, w.node())
		}
		clear(w.nodes)
		for _, n := range r.Peers {
			w.nodes[n.ID] = n
		}
		r.PeersRemoved = []wire.NodeID{w.id()} // does not count
		return r
	}
	for w.IntN(3) == 0 {
		id := w.id()
		r.PeersRemoved = append(r.PeersRemoved, id)
		delete(w.nodes, id)
	}
	for w.IntN(3) > 0 {
		n := w.node()
		r.PeersChanged = append(r.PeersChanged, n)
		w.nodes[n.ID] = n
	}
	if w.IntN(3) == 0 {
		r.OnlineChange = map[wire.NodeID]bool{w.id(): w.IntN(2) == 0, w.id(): w.IntN(2) == 0}
		for id, online := range r.OnlineChange {
			w.change(id, func(n *wire.Node) { n.Online = &online })
		}
	}
	for w.IntN(3) == 0 {
		c := &wire.PeerChange{NodeID: w.id()}
		switch w.IntN(3) {
		case 0:
			c.Key = ptr(key(w.IntN(10)))
		case 1:
			c.DiscoKey = ptr(disco(w.IntN(4)))
		case 2:
			c.DERPRegion = w.IntN(3)
		}
		r.PeersChangedPatch = append(r.PeersChangedPatch, c)
		w.change(c.NodeID, func(n *wire.Node) { patchNode(n, c) })
	}
	return r
}

func (w *world) change(id wire.NodeID, f func(*wire.Node)) {
	if old := w.nodes[id]; old != nil {
		n := *old
		f(&n)
		w.nodes[id] = &n
	}
}

func (w *world) full() *wire.MapResponse {
	r := first()
	r.Node = w.self
	for _, n := range w.nodes {
		r.Peers = append(r.Peers, n) // in no order
	}
	return r
}

// Any sequence of messages gives the map that control would send at once; the
// deltas lead there too; and maps of the past stay as they were.
func TestDeltasEqualFullMap(t *testing.T) {
	runs := 120
	if testing.Short() {
		runs = 30
	}
	for seed := range runs {
		w := &world{Rand: rand.New(rand.NewPCG(uint64(seed), 1)), nodes: map[wire.NodeID]*wire.Node{}, self: node(1000)}
		m, d := apply(t, nil, w.full())
		follower := map[wire.NodeID]*Peer{}
		follow := func(d Delta) {
			for _, p := range d.Removed {
				delete(follower, p.ID)
			}
			for _, p := range d.Added {
				if follower[p.ID] != nil {
					t.Fatalf("seed %d: node %d was added twice", seed, p.ID)
				}
				follower[p.ID] = p
			}
			for _, c := range d.Changed {
				if !samePeer(follower[c.Old.ID], c.Old) || c.Old.ID != c.New.ID {
					t.Fatalf("seed %d: node %d changed from what it was not", seed, c.Old.ID)
				}
				follower[c.New.ID] = c.New
			}
		}
		follow(d)
		for step := range 20 {
			past := m.Response()
			next, d := apply(t, m, w.message())
			follow(d)
			if !reflect.DeepEqual(past, m.Response()) {
				t.Fatalf("seed %d step %d: the former map changed", seed, step)
			}
			m = next
			whole, _ := apply(t, nil, w.full())
			same(t, m, whole)
			if len(follower) != m.NumPeers() {
				t.Fatalf("seed %d step %d: deltas lead to %d peers, there are %d", seed, step, len(follower), m.NumPeers())
			}
			for id, p := range follower {
				if now, _ := m.PeerByID(id); now == nil || !samePeer(now, p) {
					t.Fatalf("seed %d step %d: deltas lead to another node %d", seed, step, id)
				}
			}
			checkIndex(t, m)
			if t.Failed() {
				t.Fatalf("seed %d step %d", seed, step)
			}
		}
	}
}

func FuzzApply(f *testing.F) {
	a, _ := json.Marshal(first(node(1), node(2)))
	b, _ := json.Marshal(&wire.MapResponse{PeersRemoved: []wire.NodeID{1}, PeersChanged: []*wire.Node{node(3)}, PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, Key: ptr(key(3))}}})
	f.Add(a, b)
	f.Add(b, a)
	f.Add([]byte(`{"Node":{"ID":1,"Key":"nodekey:`+fmt.Sprintf("%064d", 1)+`"},"Peers":[null]}`), []byte(`{"KeepAlive":true,"ControlTime":"2026-11-23T06:19:50Z"}`))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var m *Map
		for _, text := range [][]byte{one, two} {
			var r wire.MapResponse
			if json.Unmarshal(text, &r) != nil {
				continue
			}
			next, d, err := ApplyAt(m, &r, start)
			if err != nil {
				continue
			}
			if len(d.Ignored) > 3*maxIgnored {
				t.Errorf("%d reports", len(d.Ignored))
			}
			if m = next; m == nil {
				continue
			}
			checkIndex(t, m)
			again, _, err := ApplyAt(nil, m.Response(), start)
			if err != nil {
				t.Fatal(err)
			}
			if d := Rebase(m, again); !d.Empty() {
				t.Errorf("the saved map differs: %+v", d)
			}
			for p := range m.Peers() {
				m.Identity(p)
			}
			m.NextExpiry(start)
			m.Domain()
		}
	})
}

func many(n int) *wire.MapResponse {
	r := first()
	r.Node = node(60000)
	for i := range n {
		r.Peers = append(r.Peers, node(i+1))
	}
	return r
}

func BenchmarkFull10000(b *testing.B) {
	r := many(10000)
	for b.Loop() {
		apply(b, nil, r)
	}
}

func BenchmarkPatchOneOf10000(b *testing.B) {
	m, _ := apply(b, nil, many(10000))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m, _ = apply(b, m, &wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 5000, DERPRegion: 1 + i%100}}})
	}
}

func BenchmarkReplaceOneOf10000(b *testing.B) {
	m, _ := apply(b, nil, many(10000))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		n := node(5000)
		n.Key, n.Addresses = key(20000+i%1000), []netip.Prefix{addr4(20000 + i%1000)}
		m, _ = apply(b, m, &wire.MapResponse{PeersChanged: []*wire.Node{n}})
	}
}

func BenchmarkRebase10000(b *testing.B) {
	m, _ := apply(b, nil, many(10000))
	o, _ := apply(b, nil, many(10000))
	for b.Loop() {
		if d := Rebase(m, o); !d.Empty() {
			b.Fatal("differ")
		}
	}
}

func BenchmarkPeerByAddr(b *testing.B) {
	m, _ := apply(b, nil, many(10000))
	a := addr4(5000).Addr()
	for b.Loop() {
		if _, ok := m.PeerByAddr(a); !ok {
			b.Fatal("not found")
		}
	}
}
