package path

import (
	"net/netip"
	"slices"
	"sync"

	"mesh/identity"
)

// table finds peers by key and by address.
type table struct {
	mu    sync.RWMutex // guards what follows
	byKey map[identity.NodePublic]*peer
	addrs map[netip.AddrPort]binding
}

// binding says who uses an address. A strong one was proven by a pong or by
// WireGuard; a weak one only by a ping, which may be a replay.
//
// Several peers may have proven to use one address: nodes of a process that
// share a socket, or one that took over where another was. The last comes first.
type binding struct {
	peer   *peer
	strong bool
	also   []*peer // replaced, never changed
}

// maxAlso bounds them.
const maxAlso = 255

func (t *table) init() {
	t.byKey = make(map[identity.NodePublic]*peer)
	t.addrs = make(map[netip.AddrPort]binding)
}

func (t *table) get(key identity.NodePublic) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byKey[key]
}

// at returns who uses an address, the last who proved it; nil if nobody did.
func (t *table) at(a netip.AddrPort) *peer {
	pe, _ := t.whoAt(a)
	return pe
}

// whoAt is at, and tells whether there are several.
func (t *table) whoAt(a netip.AddrPort) (pe *peer, several bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	b := t.addrs[a]
	return b.peer, len(b.also) > 0
}

// uses reports whether a peer is one of those who use an address.
func (t *table) uses(pe *peer, a netip.AddrPort) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	_, ok := pe.bound[a]
	return ok
}

func (t *table) all() []*peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	out := make([]*peer, 0, len(t.byKey))
	for _, pe := range t.byKey {
		out = append(out, pe)
	}
	return out
}

// bind associates an address with a peer, unless somebody else has a better
// claim to it.
func (t *table) bind(a netip.AddrPort, pe *peer, strong bool) {
	t.mu.RLock()
	old := t.addrs[a]
	t.mu.RUnlock()
	if old.has(pe) && (old.strong || !strong) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey[pe.key] != pe {
		return // dropped meanwhile
	}
	old = t.addrs[a]
	b := binding{peer: pe, strong: strong}
	switch {
	case old.has(pe):
		b = binding{peer: old.peer, strong: old.strong || strong, also: old.also}
	case old.peer == nil:
	case !old.strong:
		delete(old.peer.bound, a)
	case !strong:
		return
	default:
		b.also = append([]*peer{old.peer}, old.also...)
		if len(b.also) > maxAlso {
			delete(b.also[maxAlso].bound, a)
			b.also = b.also[:maxAlso]
		}
	}
	if _, ok := pe.bound[a]; !ok && len(pe.bound) >= maxBound {
		t.evictLocked(pe)
	}
	pe.bound[a] = struct{}{}
	t.addrs[a] = b
}

func (b binding) has(pe *peer) bool { return b.peer == pe || slices.Contains(b.also, pe) }

// evictLocked frees one address of a peer, a weak one if there is one.
func (t *table) evictLocked(pe *peer) {
	var victim netip.AddrPort
	for a := range pe.bound {
		victim = a
		if !t.addrs[a].strong {
			break
		}
	}
	delete(pe.bound, victim)
	t.unbindLocked(victim, pe)
}

// unbindLocked takes an address from a peer.
func (t *table) unbindLocked(a netip.AddrPort, pe *peer) {
	b := t.addrs[a]
	switch {
	case b.peer == pe && len(b.also) == 0:
		delete(t.addrs, a)
	case b.peer == pe:
		t.addrs[a] = binding{b.also[0], true, b.also[1:]}
	default:
		also := slices.DeleteFunc(slices.Clone(b.also), func(o *peer) bool { return o == pe })
		t.addrs[a] = binding{b.peer, b.strong, also}
	}
}

func (t *table) remove(pe *peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey[pe.key] == pe {
		delete(t.byKey, pe.key)
	}
	for a := range pe.bound {
		t.unbindLocked(a, pe)
	}
	clear(pe.bound)
}

// timerHeap orders peers by when something is due.
type timerHeap []*peer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].at < h[j].at }
func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *timerHeap) Push(x any) {
	pe := x.(*peer)
	pe.index = len(*h)
	*h = append(*h, pe)
}
func (h *timerHeap) Pop() any {
	old := *h
	pe := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	pe.index = -1
	return pe
}
