package path

import (
	"container/heap"
	"net/netip"
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
	full     atomic.Int64                   // and for full datagrams
	proven   atomic.Bool                    // direct takes full datagrams
	awake    atomic.Bool                    // heartbeats run, packets out are watched
	discover atomic.Int64                   // instant from which discovery has something to do
	large    atomic.Pointer[large]          // the largest datagram it takes, nil = what the MTU needs
	askSize  atomic.Int64                   // instant from which bulk data is a reason to ask for that
	home     atomic.Int32                   // the peer's home region, 0 = unknown

	// Written on every packet.
	sent     atomic.Int64 // instant of the last one out
	received atomic.Int64 // and in
	heardUDP atomic.Int64 // and in from direct
	away     atomic.Int32 // region of whose relay it is known not to be there, 0 = none
	doubted  atomic.Int64 // instant until which packets by relay are no news
	heard    atomic.Int32 // region by which the peer was last heard, 0 = none
	asked    atomic.Int32 // askedByUDP or askedByRelay; 0 = never

	born instant // not changed

	// Guarded by Path.mu.
	info    Peer
	ch      chooser
	sizing  sizing
	at      instant // when something is due
	index   int     // in the heap; -1 = not there
	gone    bool
	unsent  unsent
	guessed instant     // when ports were last guessed, 0 = never
	pingers []chan Pong // calls of Ping that wait

	bound map[netip.AddrPort]struct{} // guarded by table.mu
}

// lastUsed is when a packet last went or came, or the state was made.
func (pe *peer) lastUsed() instant {
	return max(pe.born, instant(pe.sent.Load()), instant(pe.received.Load()))
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
		pe.ch.meet = meeting{}
		// A new process: the old addresses may be dead. Not to be trusted, but
		// not forgotten either.
		clear(pe.ch.pending)
		pe.ch.distrust(now)
		for _, k := range pe.ch.candidates {
			k.pinged = 0
		}
		try = true
	}
	p.talkLocked(pe.info.Disco, info.Disco)
	pe.info = info
	pe.info.Endpoints = nil // kept by the chooser
	if pe.home.Swap(int32(info.HomeRegion)) != int32(info.HomeRegion) {
		pe.away.Store(0)
	}
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
	trusted := c.trusted
	if c.alive.missed > 0 {
		trusted = 0
	}
	pe.trusted.Store(int64(trusted))
	pe.full.Store(int64(min(trusted, c.size.until)))
	pe.proven.Store(c.size.proven)
	if !c.size.proven && pe.sizing.way.IsValid() {
		pe.sizing = sizing{}
		p.publishSizeLocked(pe)
	}
	pe.awake.Store(c.active && c.alive.watching)
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
	p.talkLocked(pe.info.Disco, identity.DiscoPublic{})
	if pe.index >= 0 {
		heap.Remove(&p.timers, pe.index)
	}
	delete(p.calls, pe)
	delete(p.meets, pe)
	p.peers.remove(pe)
	if d := pe.direct.Load(); d != nil {
		p.closeWays(*d)
	}
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
	pe.ch.tick(now, sent, instant(pe.heardUDP.Load()), &p.budget, &out)
	if now-pe.lastUsed() >= peerIdle {
		p.dropLocked(pe)
	} else {
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
	if p.cfg.GuessPorts {
		p.dueGuess(pe, now)
	}
	return true
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
		pe.awake.Store(true)
		p.mu.Unlock()
		return
	}
	if !pe.ch.active {
		p.stirLocked(now)
		pe.ch.meet.able = p.ends.natted && p.relayOf(pe) != 0
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
	if len(out.pings) == 0 && !out.call && !out.stale && out.meet == nil {
		return
	}
	p.mu.Lock()
	to := pe.info.Disco
	if out.stale {
		p.doubtEndpointsLocked(p.now())
	}
	p.mu.Unlock()
	if to.IsZero() {
		return
	}
	if out.meet != nil {
		p.sendMeet(pe, *out.meet, p.now())
	}
	buf := make([]byte, 0, fullDatagram)
	for _, pg := range out.pings {
		m := disco.Ping{TxID: pg.tx, Node: p.own.Load().public}
		if pg.full {
			m.Padding = fullDatagram - disco.PingLen
		}
		buf = p.sealer.Seal(buf[:0], to, m)
		if !pg.to.IsValid() {
			if region := p.relayFor(pe); region != 0 {
				p.sendRelay(region, pe.key, buf)
			}
			continue
		}
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
	var out todo
	p.mu.Lock()
	if !pe.gone && !p.cfg.RelayOnly {
		pe.ch.authenticated(a, now, &p.budget, &out)
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
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
