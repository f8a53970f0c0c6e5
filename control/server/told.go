package server

import (
	"cmp"
	"slices"

	"mesh/control/wire"
)

// told are the peers that a node was told of, in order of their IDs. A list
// takes a sixth of the memory that a map takes, gives back what it does not
// need, and what a look-up reads besides is the same for all streams.
type told []*view

func byNode(v *view, id wire.NodeID) int { return cmp.Compare(v.node.ID, id) }

// get returns how a peer is known; nil = not at all.
func (k told) get(id wire.NodeID) *view {
	if i, ok := slices.BinarySearchFunc(k, id, byNode); ok {
		return k[i]
	}
	return nil
}

// put notes that a peer is known as v.
func (k *told) put(v *view) {
	l := *k
	if n := len(l); n == 0 || l[n-1].node.ID < v.node.ID {
		*k = append(l, v)
		return
	}
	i, ok := slices.BinarySearchFunc(l, v.node.ID, byNode)
	if ok {
		l[i] = v
		return
	}
	*k = slices.Insert(l, i, v)
}

// drop forgets a peer.
func (k *told) drop(id wire.NodeID) {
	l := *k
	i, ok := slices.BinarySearchFunc(l, id, byNode)
	if !ok {
		return
	}
	l = slices.Delete(l, i, i+1)
	if cap(l) > 64 && len(l) < cap(l)/2 {
		l = append(make(told, 0, len(l)+len(l)/4), l...)
	}
	*k = l
}

// changes are peers that a stream has to look at, the newest last. A peer may be
// in it more than once, yet its size is bounded by the number of peers.
type changes []change

type change struct {
	id      wire.NodeID
	visible bool
}

// fewChanges is how many changes are not worth being put in order.
const fewChanges = 64

func (c *changes) add(id wire.NodeID, visible bool) {
	l := *c
	if n := len(l); n > 0 && l[n-1].id == id {
		l[n-1].visible = visible
		return
	}
	if len(l) == cap(l) && len(l) >= fewChanges {
		l = l.latest()
		l = slices.Grow(l, len(l)) // so that it pays
	}
	*c = append(l, change{id, visible})
}

// latest returns, in the memory of c, the last change of each peer, in order of
// their IDs.
func (c changes) latest() changes {
	slices.SortStableFunc(c, func(a, b change) int { return cmp.Compare(a.id, b.id) })
	out := c[:0]
	for i, x := range c {
		if i+1 == len(c) || c[i+1].id != x.id {
			out = append(out, x)
		}
	}
	return out
}
