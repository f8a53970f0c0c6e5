package tunnel

import (
	"encoding/binary"
	"testing"
	"time"

	"mesh/identity"
)

// What nodes that share a socket are told apart by: keys and indexes.
func TestToldApart(t *testing.T) {
	nw := newNetwork()
	defer nw.close()
	next := uint32(0xAB000000)
	x := nw.add(t, "x", 1, func(c *Config) {
		c.Index = func() uint32 { next++; return next &^ 1 } // each twice
	})
	y := nw.add(t, "y", 2)
	first := forge(t, x.key, y.private, time.Unix(1e9, 0))
	if !x.t.Owns(first) || y.t.Owns(first) || x.t.Owns(first[:100]) || x.t.Owns(nil) {
		t.Error("who owns the initiation")
	}
	later := identity.NewNode()
	if err := x.t.AddKey(later); err != nil {
		t.Fatal(err)
	}
	if !x.t.Owns(forge(t, later.Public(), y.private, time.Unix(1e9, 0))) {
		t.Error("the key to come is not owned")
	}

	if _, err := x.t.obtain(y.key, time.Now()); err == nil {
		t.Fatal("a peer that nobody knows")
	}
	x.knows(y)
	p, err := x.t.obtain(y.key, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[uint32]bool)
	for range 5 {
		index, ok := x.t.newIndex(p)
		if !ok || index>>24 != 0xAB || seen[index] {
			t.Fatalf("index %x, %v", index, ok)
		}
		seen[index] = true
		msg := make([]byte, keepaliveSize)
		msg[0] = typeData
		binary.LittleEndian.PutUint32(msg[4:], index)
		if who, ok := x.t.Whose(msg); !ok || who != y.key {
			t.Errorf("index %x is %s's", index, who.Short())
		}
		binary.LittleEndian.PutUint32(msg[4:], index+1)
		if _, ok := x.t.Whose(msg); ok {
			t.Error("somebody has an index that was not given")
		}
	}
	for _, msg := range [][]byte{nil, first, make([]byte, 40)} {
		if _, ok := x.t.Whose(msg); ok {
			t.Errorf("%d bytes are somebody's", len(msg))
		}
	}
}
