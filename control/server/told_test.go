package server

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"mesh/control/wire"
)

// TestTold compares a list of known peers with a map.
func TestTold(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	want := make(map[wire.NodeID]*view)
	var k told
	for i := range 20000 {
		id := wire.NodeID(r.IntN(1000))
		if i > 15000 {
			id = wire.NodeID(r.IntN(50))
		}
		switch {
		case i > 10000 && i < 15000, r.IntN(3) == 0:
			k.drop(id)
			delete(want, id)
		default:
			v := &view{node: wire.Node{ID: id}}
			k.put(v)
			want[id] = v
		}
		if k.get(id) != want[id] {
			t.Fatalf("step %d: node %d is known as %p, want %p", i, id, k.get(id), want[id])
		}
	}
	ids := slices.Sorted(maps.Keys(want))
	if len(k) != len(ids) {
		t.Fatalf("%d are known, want %d", len(k), len(ids))
	}
	for i, v := range k {
		if v.node.ID != ids[i] || v != want[ids[i]] {
			t.Fatalf("place %d has node %d, want %d", i, v.node.ID, ids[i])
		}
	}
	if cap(k) > 2*len(k)+fewChanges {
		t.Errorf("room for %d is kept for %d", cap(k), len(k))
	}
}

// TestChanges shows that the last change of each peer counts, and that many
// changes of few peers take little room.
func TestChanges(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	want := make(map[wire.NodeID]bool)
	var c changes
	for range 100000 {
		id, visible := wire.NodeID(r.IntN(200)), r.IntN(2) == 0
		c.add(id, visible)
		want[id] = visible
	}
	if cap(c) > 1000 {
		t.Errorf("room for %d changes of 200 peers", cap(c))
	}
	last := wire.NodeID(-1)
	for _, x := range c.latest() {
		if x.id <= last {
			t.Fatalf("node %d comes after %d", x.id, last)
		}
		if visible, ok := want[x.id]; !ok || visible != x.visible {
			t.Fatalf("node %d: visible is %v, want %v", x.id, x.visible, visible)
		}
		last = x.id
		delete(want, x.id)
	}
	if len(want) > 0 {
		t.Errorf("%d changes are missing", len(want))
	}
}

// TestMemoForgets shows that what nobody is sent any more is forgotten, and what
// somebody is sent is not.
func TestMemoForgets(t *testing.T) {
	var m memo
	now := time.Now()
	m.put([]byte("used"), []byte("u"))
	m.put([]byte("unused"), []byte("n"))
	for i := range 4 {
		m.age(now.Add(time.Duration(i) * memoLife))
		if b, ok := m.get([]byte("used")); !ok || string(b) != "u" {
			t.Fatalf("what is used is forgotten after %d turns", i+1)
		}
	}
	if _, ok := m.get([]byte("unused")); ok {
		t.Error("what is not used is kept")
	}
}
