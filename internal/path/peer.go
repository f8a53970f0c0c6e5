package path

import (
	"container/heap"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"mesh/identity"
	"mesh/internal/disco"
)

const (
	// peerIdle is how long the state of a peer without traffic is kept: as
	// long as a WireGuard session can last.
	peerIdle = 3 * time.Minute
	maxBound = 64 // addresses that one peer holds in the table
)

// peer is the state of a peer with traffic.
type peer struct {
	key identity.NodePublic

	// Read on every packet, written under Path.mu.
	direct   atomic.Pointer[netip.AddrPort] // best address, nil = none
	trusted  atomic.Int64                   // instant until which direct alone is used
	active   atomic.Bool                    // heartbeats run
	discover atomic.Int64                   // instant from which discovery has something to do
	home     atomic.Int32                   // the peer's home region, 0 = unknown

	// Written on every packet.
	sent     atomic.Int64 // instant of the last one out
	received atomic.Int64 // and in
	heard    atomic.Int32 // region by which the peer was last heard, 0 = none

	born instant // not changed

	// Guarded by Path.mu.
	info   Peer
	ch     chooser
	at     instant // when something is due
	index  int     // in the heap; -1 = not there
	gone   bool
	unsent unsent

	bound map[netip.AddrPort]struct{} // guarded by table.mu
}

// lastUsed is when a packet last went or came, or the state was made.
func (pe *peer) lastUsed() instant {
	return max(pe.born, instant(pe.sent.Load()), instant(pe.received.Load()))
}

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

// open returns the state of a peer, making it if the netmap knows the peer;
// nil if it does not.
func (p *Path) open(key identity.NodePublic) *peer {
	if pe := p.peers.get(key); pe != nil {
		return pe
	}
	info, ok := p.cfg.Lookup(key)
	if !ok || p.ctx.Err() != nil {
		return nil
	}
	now := p.now()
	p.mu.Lock()
	p.peers.mu.Lock()
	pe := p.peers.byKey[key]
	isNew := pe == nil
	if isNew {
		pe = &peer{key: key, born: now, ch: newChooser(now), index: -1, bound: make(map[netip.AddrPort]struct{})}
		p.peers.byKey[key] = pe
	}
	p.peers.mu.Unlock()
	if isNew {
		p.applyLocked(pe, info, now)
	}
	p.mu.Unlock()
	if isNew {
		// The netmap may have changed while nobody knew that this state
		// exists; Update did not touch it then.
		p.refresh(key)
		if p.peers.get(key) != pe {
			return nil
		}
	}
	return pe
}

// applyLocked takes over what the netmap says. It reports whether discovery
// has something new to try.
func (p *Path) applyLocked(pe *peer, info Peer, now instant) (try bool) {
	if pe.info.Disco != info.Disco && !pe.info.Disco.IsZero() {
		// A new process: the old addresses may be dead. Not to be trusted, but
		// not forgotten either.
		clear(pe.ch.pending)
		pe.ch.distrust(now)
		for _, k := range pe.ch.candidates {
			k.pinged = 0
		}
		try = true
	}
	pe.info = info
	pe.info.Endpoints = nil // kept by the chooser
	pe.home.Store(int32(info.HomeRegion))
	if pe.ch.setEndpoints(info.Endpoints, now) {
		try = true
	}
	p.settleLocked(pe, now)
	return try && pe.ch.active
}

// settleLocked publishes what the chooser decided and plans the next tick.
func (p *Path) settleLocked(pe *peer, now instant) {
	if pe.gone {
		return
	}
	c := &pe.ch
	if d := pe.direct.Load(); c.best.IsValid() && (d == nil || *d != c.best) {
		best := c.best
		pe.trusted.Store(0)
		pe.direct.Store(&best)
	} else if !c.best.IsValid() && d != nil {
		pe.trusted.Store(0)
		pe.direct.Store(nil)
	}
	pe.trusted.Store(int64(c.trusted))
	pe.active.Store(c.active)
	pe.discover.Store(int64(c.nextDiscovery()))

	at := pe.lastUsed() + peerIdle
	if d, ok := c.deadline(); ok && d < at {
		at = d
	}
	if pe.index >= 0 && at == pe.at {
		return
	}
	pe.at = at
	if pe.index >= 0 {
		heap.Fix(&p.timers, pe.index)
	} else {
		heap.Push(&p.timers, pe)
	}
	if pe.index == 0 {
		p.poke()
	}
}

// dropLocked forgets a peer.
func (p *Path) dropLocked(pe *peer) {
	pe.gone = true
	if pe.index >= 0 {
		heap.Remove(&p.timers, pe.index)
	}
	delete(p.calls, pe)
	p.peers.remove(pe)
	pe.direct.Store(nil)
	pe.trusted.Store(0)
	if !pe.info.Disco.IsZero() {
		p.sealer.Forget(pe.info.Disco)
	}
}

// duePeer does what is due for one peer; false if for none.
func (p *Path) duePeer(now instant) bool {
	p.mu.Lock()
	if len(p.timers) == 0 || p.timers[0].at > now {
		p.mu.Unlock()
		return false
	}
	pe := p.timers[0]
	var out todo
	sent := instant(pe.sent.Load())
	pe.ch.tick(now, sent, &p.budget, &out)
	if now-pe.lastUsed() >= peerIdle {
		p.dropLocked(pe)
	} else {
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
	return true
}

// Send sends WireGuard datagrams to a peer of the netmap by the best known way:
// by UDP alone while a pong has confirmed it lately, else by UDP and by relay.
// hint is an address to use when no better one is known (zero = none), such as
// the one WireGuard last heard the peer from. The datagrams are not kept. Delivery
// is best effort; the errors are ErrUnknownPeer and ErrNoPath, or that of the
// system when UDP was the only way.
func (p *Path) Send(key identity.NodePublic, hint netip.AddrPort, datagrams [][]byte) error {
	pe := p.peers.get(key)
	if pe == nil {
		if pe = p.open(key); pe == nil {
			return fmt.Errorf("send to %s: %w", key.Short(), ErrUnknownPeer)
		}
	}
	now := p.now()
	pe.sent.Store(int64(now))
	direct := pe.direct.Load()
	if direct != nil && int64(now) <= pe.trusted.Load() && !isHandshake(datagrams) {
		if !pe.active.Load() {
			p.probe(pe, now)
		}
		err := p.writeUDP(*direct, datagrams)
		if err == nil || passing(err) {
			return nil
		}
		p.sendFailed(pe, *direct, err)
		direct = nil
	}
	return p.sendBoth(pe, now, direct, hint, datagrams)
}

// isHandshake reports whether datagrams begin with a handshake message of
// WireGuard. Those go by every way even while one is trusted: a peer that was
// restarted elsewhere begins with a handshake, and an answer to where it was
// before is lost for the seconds that trust lasts.
func isHandshake(datagrams [][]byte) bool {
	if len(datagrams) == 0 || len(datagrams[0]) < 4 {
		return false
	}
	b := datagrams[0]
	return b[0] >= 1 && b[0] <= 3 && b[1]|b[2]|b[3] == 0
}

// sendBoth sends by every way that may work, and looks for a better one.
func (p *Path) sendBoth(pe *peer, now instant, direct *netip.AddrPort, hint netip.AddrPort, datagrams [][]byte) error {
	var err error = ErrNoPath
	to := hint
	if direct != nil {
		to = *direct
	}
	if to.IsValid() {
		e := p.writeUDP(to, datagrams)
		if e == nil || passing(e) {
			err = nil
		} else {
			err = e
			p.sendFailed(pe, to, e)
		}
	}
	if hint.IsValid() && hint != to && isHandshake(datagrams) {
		_ = p.writeUDP(hint, datagrams) // in addition; what counts is above
	}
	if region := p.relayFor(pe); region != 0 && p.sendRelay(region, pe.key, datagrams...) {
		err = nil
	}
	if !pe.active.Load() || int64(now) >= pe.discover.Load() {
		p.probe(pe, now)
	}
	if err != nil {
		if err == ErrNoPath {
			p.mu.Lock()
			if !pe.gone {
				pe.unsent.keep(datagrams, now)
			}
			p.mu.Unlock()
		}
		return fmt.Errorf("send to %s: %w", pe.key.Short(), err)
	}
	return nil
}

// relayOf returns the region by which to reach a peer, 0 = none. While the
// connection to the peer's home is being made, the one by which it was heard
// serves.
func (p *Path) relayOf(pe *peer) int {
	home, heard := int(pe.home.Load()), int(pe.heard.Load())
	switch {
	case p.relays.connected(home):
		return home
	case p.relays.connected(heard):
		return heard
	case p.relays.has(home):
		return home
	case p.relays.has(heard):
		return heard
	}
	return 0
}

// relayFor returns the region by which to send to a peer now, 0 = none, and
// begins to connect to its home if that is another.
func (p *Path) relayFor(pe *peer) int {
	region := p.relayOf(pe)
	if home := int(pe.home.Load()); home != 0 && region != home {
		if r := p.relays.get(home); r != nil {
			r.used.Store(int64(p.now()))
			r.start()
			p.checkIdle()
		}
	}
	return region
}

// sendRelay sends by a relay, which is connected if need be.
func (p *Path) sendRelay(region int, dst identity.NodePublic, datagrams ...[]byte) bool {
	if p.cfg.DirectOnly {
		return false
	}
	if !p.relays.connected(region) {
		p.checkIdle()
	}
	return p.relays.send(region, dst, datagrams...)
}

// checkIdle makes the loop look for idle relays from now on.
func (p *Path) checkIdle() {
	p.mu.Lock()
	if p.idleCheck == 0 {
		p.idleCheck = p.now() + relayIdleCheck
		p.poke()
	}
	p.mu.Unlock()
}

// probe starts heartbeats and discovery where due.
func (p *Path) probe(pe *peer, now instant) {
	var out todo
	p.mu.Lock()
	if pe.gone {
		p.mu.Unlock()
		return
	}
	if pe.info.Disco.IsZero() || p.cfg.RelayOnly {
		pe.discover.Store(int64(now + pingSpacing))
		pe.active.Store(true)
		p.mu.Unlock()
		return
	}
	pe.ch.sent(now, &p.budget, &out)
	p.settleLocked(pe, now)
	p.wakeEndpointsLocked(now)
	p.mu.Unlock()
	p.perform(pe, &out)
}

// sendFailed notes that the system will not send to an address.
func (p *Path) sendFailed(pe *peer, a netip.AddrPort, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	pe.ch.sendFailed(a, now, err.Error())
	p.settleLocked(pe, now)
}

// perform sends what a chooser asked for. No lock is held.
func (p *Path) perform(pe *peer, out *todo) {
	if len(out.pings) == 0 && !out.call {
		return
	}
	p.mu.Lock()
	to := pe.info.Disco
	p.mu.Unlock()
	if to.IsZero() {
		return
	}
	buf := make([]byte, 0, disco.PingLen)
	for _, pg := range out.pings {
		buf = p.sealer.Seal(buf[:0], to, disco.Ping{TxID: pg.tx, Node: p.pub})
		if err := p.writeUDP(pg.to, [][]byte{buf}); err != nil && !passing(err) {
			p.sendFailed(pe, pg.to, err)
		}
	}
	if out.call {
		p.callMeMaybe(pe)
	}
}

// Authenticated tells that WireGuard authenticated a datagram of the peer from
// a source whose peer was unknown, or another.
func (p *Path) Authenticated(key identity.NodePublic, src Source) {
	pe := p.open(key)
	if pe == nil {
		return
	}
	now := p.now()
	pe.received.Store(int64(now))
	if src.Region != 0 {
		pe.heard.Store(int32(src.Region))
	}
	a := unmap(src.Addr)
	if !usable(a) {
		return
	}
	p.peers.bind(a, pe, true)
	p.mu.Lock()
	defer p.mu.Unlock()
	// WireGuard proves who made the datagram, not who sent it here: the
	// address is worth a ping, no more.
	if k, _ := pe.ch.candidate(a, now); k != nil {
		k.learned = now + learnedFor
		p.settleLocked(pe, now)
	}
}

// Update tells that the netmap changed for these peers. It asks Lookup again;
// peers that are gone lose all state, for the others sessions go on.
func (p *Path) Update(keys []identity.NodePublic) {
	for _, key := range keys {
		p.refresh(key)
	}
	p.replay()
}

// refresh brings the state of a peer in line with the netmap.
func (p *Path) refresh(key identity.NodePublic) {
	if p.peers.get(key) == nil {
		return
	}
	info, ok := p.cfg.Lookup(key)
	now := p.now()
	var out todo
	p.mu.Lock()
	pe := p.peers.get(key)
	if pe == nil || pe.gone {
		p.mu.Unlock()
		return
	}
	if !ok {
		p.dropLocked(pe)
		p.mu.Unlock()
		return
	}
	if p.applyLocked(pe, info, now) && !pe.ch.hasDirect(now) && !info.Disco.IsZero() && !p.cfg.RelayOnly {
		pe.ch.discover(now, &p.budget, &out)
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
	p.sendUnsent(pe)
}
