package netmap

import (
	"hash/maphash"
	"iter"
	"maps"
	"slices"
)

const (
	shards = 256
	// smallTable is up to which size a table is one shard: those of a node that
	// sees a few peers take no more than these need.
	smallTable = 64
)

// table is a map that is never changed: an editor makes a new one, which shares
// the shards that it left alone. With 10,000 entries a change copies some 40.
// The zero value is empty.
type table[K comparable, V any] struct {
	seed  maphash.Seed // of the shards; the zero seed while there is but one
	parts []map[K]V    // none, one or all the shards; replaced, never changed
	n     int
}

func (t *table[K, V]) shard(k K) int {
	if len(t.parts) == 1 {
		return 0
	}
	return int(maphash.Comparable(t.seed, k) % shards)
}

func (t *table[K, V]) get(k K) (v V) {
	if t.parts == nil {
		return v
	}
	return t.parts[t.shard(k)][k]
}

func (t *table[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, part := range t.parts {
			for k, v := range part {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// editor makes a new table out of an old one. Take the result from its table
// member, after the last change.
type editor[K comparable, V any] struct {
	table[K, V]
	owned *[shards]bool // which parts are copies already; nil = none
}

func (e *editor[K, V]) part(k K) map[K]V {
	switch {
	case e.parts == nil:
		e.parts = make([]map[K]V, 1)
		e.owned = new([shards]bool)
	case len(e.parts) == 1 && e.n >= smallTable:
		e.spread()
	case e.owned == nil:
		e.parts = slices.Clone(e.parts)
		e.owned = new([shards]bool)
	}
	i := e.shard(k)
	if !e.owned[i] {
		e.owned[i] = true
		if e.parts[i] = maps.Clone(e.parts[i]); e.parts[i] == nil {
			e.parts[i] = map[K]V{}
		}
	}
	return e.parts[i]
}

// spread makes all the shards out of the one of a small table. It stays with
// them: a table that was large may become so again.
func (e *editor[K, V]) spread() {
	all := e.parts[0]
	e.seed = maphash.MakeSeed()
	e.parts = make([]map[K]V, shards)
	e.owned = new([shards]bool)
	for k, v := range all {
		i := e.shard(k)
		if e.parts[i] == nil {
			e.parts[i], e.owned[i] = map[K]V{}, true
		}
		e.parts[i][k] = v
	}
}

func (e *editor[K, V]) set(k K, v V) {
	part := e.part(k)
	before := len(part)
	part[k] = v
	e.n += len(part) - before
}

func (e *editor[K, V]) del(k K) {
	part := e.part(k)
	before := len(part)
	delete(part, k)
	e.n += len(part) - before
}

// claims are the nodes that claim the same thing. Nearly always it is one.
type claims struct {
	first rank    // the one that gets it; 0 = nobody claims it
	more  *ranked // the others; nil = none
}

// ranked is a list of claims in their order, never empty.
type ranked struct {
	owner *edit // may change the list in place
	list  []rank
}

// all yields the claims in their order.
func (c claims) all() iter.Seq[rank] {
	return func(yield func(rank) bool) {
		if c.first == 0 || !yield(c.first) || c.more == nil {
			return
		}
		for _, r := range c.more.list {
			if !yield(r) {
				return
			}
		}
	}
}

// rank orders claims: lower ones come first. It is a node's ID, with the top
// bit set for a claim of the second class. IDs are never reused, so the node
// that has been there longest gets what two nodes claim, and the outcome does
// not depend on the order in which they are heard of.
type rank uint64

const second rank = 1 << 63

func (r rank) id() NodeID { return NodeID(r &^ second) }

// claimTable says who claims what.
type claimTable[K comparable] struct{ table[K, claims] }

// first returns the node that gets k, or 0.
func (t *claimTable[K]) first(k K) NodeID { return t.get(k).first.id() }

// claimEditor edits a claimTable on behalf of edit.
type claimEditor[K comparable] struct {
	editor[K, claims]
	edit *edit
}

// own returns a list that may be changed in place.
func (e *claimEditor[K]) own(m *ranked) *ranked {
	switch {
	case m == nil:
		return &ranked{owner: e.edit}
	case m.owner != e.edit:
		return &ranked{owner: e.edit, list: slices.Clone(m.list)}
	}
	return m
}

// claim reports whether k had no claims before.
func (e *claimEditor[K]) claim(k K, r rank) bool {
	c := e.get(k)
	before := c
	switch {
	case c.first == 0:
		e.set(k, claims{first: r})
		return true
	case r == c.first:
		return false
	case r < c.first:
		c.first, r = r, c.first
	}
	c.more = e.own(c.more)
	if i, found := slices.BinarySearch(c.more.list, r); !found {
		c.more.list = slices.Insert(c.more.list, i, r)
	}
	if c != before {
		e.set(k, c)
	}
	return false
}

// unclaim reports whether k has no claims any more.
func (e *claimEditor[K]) unclaim(k K, r rank) bool {
	c := e.get(k)
	switch {
	case c.first == 0:
		return false
	case c.more == nil:
		if r != c.first {
			return false
		}
		e.del(k)
		return true
	}
	if r == c.first {
		r = c.more.list[0]
		c.first = r
	}
	i, found := slices.BinarySearch(c.more.list, r)
	if !found {
		return false
	}
	c.more = e.own(c.more)
	if c.more.list = slices.Delete(c.more.list, i, i+1); len(c.more.list) == 0 {
		c.more = nil
	}
	e.set(k, c)
	return false
}
