package path

import (
	"net/netip"
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
type binding struct {
	peer   *peer
	strong bool
}

func (t *table) init() {
	t.byKey = make(map[identity.NodePublic]*peer)
	t.addrs = make(map[netip.AddrPort]binding)
}

func (t *table) get(key identity.NodePublic) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byKey[key]
}

func (t *table) at(a netip.AddrPort) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.addrs[a].peer
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
	if old.peer == pe && (old.strong || !strong) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey[pe.key] != pe {
		return // dropped meanwhile
	}
	old = t.addrs[a]
	if old.peer != nil && old.strong && !strong {
		return
	}
	if old.peer != nil && old.peer != pe {
		delete(old.peer.bound, a)
	}
	if _, ok := pe.bound[a]; !ok && len(pe.bound) >= maxBound {
		t.evictLocked(pe)
	}
	pe.bound[a] = struct{}{}
	t.addrs[a] = binding{pe, strong}
}

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
	delete(t.addrs, victim)
}

func (t *table) remove(pe *peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byKey[pe.key] == pe {
		delete(t.byKey, pe.key)
	}
	for a := range pe.bound {
		delete(t.addrs, a)
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
