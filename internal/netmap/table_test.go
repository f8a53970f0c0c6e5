package netmap

import (
	"maps"
	"math/rand/v2"
	"testing"
)

// TestTable edits a table as it grows beyond one shard and shrinks again: each
// says what a plain map does, and those before it stay as they were.
func TestTable(t *testing.T) {
	type version struct {
		table table[int, int]
		want  map[int]int
	}
	check := func(at int, v version) {
		t.Helper()
		if v.table.n != len(v.want) {
			t.Fatalf("edit %d: %d entries, want %d", at, v.table.n, len(v.want))
		}
		if got := maps.Collect(v.table.all()); !maps.Equal(got, v.want) {
			t.Fatalf("edit %d: %v, want %v", at, got, v.want)
		}
		for k, want := range v.want {
			if got := v.table.get(k); got != want {
				t.Fatalf("edit %d: get(%d) = %d, want %d", at, k, got, want)
			}
		}
		if got := v.table.get(-1); got != 0 {
			t.Fatalf("edit %d: get of what is not there = %d", at, got)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	versions := []version{{want: map[int]int{}}}
	for at := range 60 {
		last := versions[len(versions)-1]
		e := editor[int, int]{table: last.table}
		want := maps.Clone(last.want)
		for range 20 {
			k := rng.IntN(3 * smallTable)
			if at < 30 && rng.IntN(4) > 0 || at >= 30 && rng.IntN(4) == 0 {
				e.set(k, at+1)
				want[k] = at + 1
			} else {
				e.del(k)
				delete(want, k)
			}
		}
		versions = append(versions, version{e.table, want})
	}
	spread := false
	for at, v := range versions {
		check(at, v)
		spread = spread || len(v.table.parts) == shards
	}
	if !spread {
		t.Error("the table never had more than one shard")
	}
}
