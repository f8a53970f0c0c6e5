package server

import (
	"container/heap"
	"strconv"
	"strings"

	"mesh/control/wire"
)

// nameTable has the names that are taken, and finds free ones without trying all
// that are not: thousands of agents may have one host name. It is guarded by
// Server.mu.
type nameTable struct {
	ids   map[string]wire.NodeID // 0 = of a node that is on its way to the store
	clash map[string]*suffixes   // of host names that several nodes have had
}

// suffixes are those of one host name.
type suffixes struct {
	next int     // no higher one was given out
	free intHeap // lower ones that may be free
}

func (t *nameTable) init() {
	t.ids = make(map[string]wire.NodeID)
	t.clash = make(map[string]*suffixes)
}

// id returns whose a name is; 0 = a node's that is on its way to the store.
func (t *nameTable) id(name string) (id wire.NodeID, taken bool) {
	id, taken = t.ids[name]
	return id, taken
}

func (t *nameTable) put(name string, id wire.NodeID) { t.ids[name] = id }

// drop forgets that a node has a name, which it had because of its host name. If
// another has the name by now, it stays that one's: where several names changed
// elsewhere, this one may have been taken over before it was given up.
func (t *nameTable) drop(name, hostname string, id wire.NodeID) {
	if have, ok := t.ids[name]; !ok || have != id {
		return
	}
	delete(t.ids, name)
	s := t.clash[hostname]
	if s == nil {
		return
	}
	i, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil || i <= 0 || i >= s.next || suffixed(hostname, i) != name {
		return
	}
	if heap.Push(&s.free, i); len(s.free) >= s.next-1 {
		delete(t.clash, hostname) // nobody has one any more
	}
}

// free returns base, or base with a suffix that makes it unique: the lowest,
// unless that was the host name of another node in the meantime. A name that id
// already has counts as free.
func (t *nameTable) free(base string, id wire.NodeID) string {
	open := func(name string) bool {
		have, ok := t.ids[name]
		return !ok || id != 0 && have == id
	}
	if open(base) {
		return base
	}
	s := t.clash[base]
	if s == nil {
		s = &suffixes{next: 1}
		t.clash[base] = s
	}
	for len(s.free) > 0 {
		i := heap.Pop(&s.free).(int)
		if name := suffixed(base, i); open(name) {
			// Whoever asked may not take it after all.
			heap.Push(&s.free, i)
			return name
		}
	}
	for {
		name := suffixed(base, s.next)
		if open(name) {
			return name
		}
		s.next++
	}
}

// intHeap is a heap of numbers, the lowest first.
type intHeap []int

func (h intHeap) Len() int           { return len(h) }
func (h intHeap) Less(i, j int) bool { return h[i] < h[j] }
func (h intHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push and Pop implement heap.Interface.
func (h *intHeap) Push(x any) { *h = append(*h, x.(int)) }

// Pop implements heap.Interface.
func (h *intHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}
