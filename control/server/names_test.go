package server

import (
	"math/rand/v2"
	"testing"

	"mesh/control/wire"
)

// TestFreeNames compares the names that are found with the lowest free ones.
func TestFreeNames(t *testing.T) {
	var table nameTable
	table.init()
	rnd := rand.New(rand.NewPCG(1, 2))
	bases := []string{"agent", "b-1", "a-2-3", "x"}
	host := make(map[string]string) // of each taken name
	ids := make(map[string]wire.NodeID)
	for id := wire.NodeID(1); id < 5000; id++ {
		if len(host) > 0 && rnd.IntN(100) < 48 {
			for name, base := range host {
				table.drop(name, base, ids[name])
				delete(host, name)
				break
			}
			continue
		}
		base := bases[rnd.IntN(len(bases))]
		want := base
		for i := 1; ; i++ {
			if _, taken := host[want]; !taken {
				break
			}
			want = suffixed(base, i)
		}
		got := table.free(base, 0)
		if got != want {
			t.Fatalf("a free name for %q is %q, want %q", base, got, want)
		}
		if rnd.IntN(10) > 0 { // or it is not taken after all
			table.put(got, id)
			host[got], ids[got] = base, id
		}
	}
	for name, base := range host {
		table.drop(name, base, ids[name])
	}
	if len(table.ids) != 0 {
		t.Errorf("%d names are left", len(table.ids))
	}
}

// Of two nodes whose names changed elsewhere the second may be heard of first.
func TestNameTakenOver(t *testing.T) {
	var table nameTable
	table.init()
	table.put("web", 1)
	table.put("web-1", 2)
	table.drop("web-1", "web", 2)
	table.put("web", 2)
	table.drop("web", "web", 1)
	table.put("old", 1)
	if id, taken := table.id("web"); !taken || id != 2 {
		t.Errorf("the name is node %d's, %v", id, taken)
	}
	if name := table.free("web", 0); name == "web" {
		t.Error("the name is given out twice")
	}
}

// BenchmarkNames gives a name to nodes that all have the same host name.
func BenchmarkNames(b *testing.B) {
	var table nameTable
	table.init()
	id := wire.NodeID(0)
	for b.Loop() {
		id++
		table.put(table.free("agent", 0), id)
	}
}
