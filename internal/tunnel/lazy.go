package tunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"mesh/identity"
)

// wish is what Lookup said about a key.
type wish struct {
	key      identity.NodePublic
	prefixes []netip.Prefix
	psk      psk
	known    bool
}

type mode int

const (
	shrink mode = iota // only take away: peers and prefixes
	adjust             // bring configured peers in line
	create             // and make those that are not configured
)

// Update looks the given keys up again. Peers that are gone lose their sessions
// at once, others get their new AllowedIPs without disturbing the session. Call
// it after the new netmap is visible through Lookup, with the keys of all peers
// that are gone or whose AllowedIPs changed; with those that are new too,
// initiations that came just before the netmap knew them are answered now.
//
// When Update returns, no packet is being delivered any more that would be
// refused now. Addresses that move between peers in one call are refused until
// the old owner's last delivery has ended.
func (t *Tunnel) Update(keys []identity.NodePublic) {
	if len(keys) == 0 {
		return
	}
	// A peer that is being created is either among the active ones below, or
	// its creator sees the new revision and looks again.
	var active []identity.NodePublic
	t.route.Lock()
	t.revision.Add(1)
	t.mu.RLock()
	for _, k := range keys {
		if t.peers[k] != nil {
			active = append(active, k)
		}
	}
	t.mu.RUnlock()
	t.route.Unlock()
	if len(active) > 0 {
		for _, p := range t.configure(active, shrink) {
			p.awaitDelivery()
		}
		for _, p := range t.configure(active, adjust) {
			p.awaitDelivery()
		}
	}
	t.retryHeld(keys)
}

// configure makes the configured peers follow Lookup. It returns the peers that
// lost prefixes or are gone.
func (t *Tunnel) configure(keys []identity.NodePublic, m mode) (lost []*peer) {
	lost, contested := t.configureOnce(keys, m)
	if len(contested) > 0 {
		// Somebody else holds what is claimed: perhaps only because nobody has
		// told us yet that they gave it up.
		more, _ := t.configureOnce(contested, adjust)
		lost = append(lost, more...)
	}
	return lost
}

func (t *Tunnel) configureOnce(keys []identity.NodePublic, m mode) (lost []*peer, contested []identity.NodePublic) {
	for {
		revision := t.revision.Load()
		wishes := t.ask(keys, m)
		t.route.Lock()
		if t.closed {
			t.route.Unlock()
			return nil, nil
		}
		if t.revision.Load() != revision {
			t.route.Unlock()
			continue // the netmap changed meanwhile: these answers are stale
		}
		lost, contested = t.apply(wishes, m)
		t.route.Unlock()
		return lost, contested
	}
}

func (t *Tunnel) ask(keys []identity.NodePublic, m mode) []wish {
	ring := t.keys.Load()
	wishes := make([]wish, 0, len(keys))
	for _, k := range keys {
		w := wish{key: k}
		if !ring.owns(k) && !k.IsZero() {
			var p Peer
			p, w.known = t.cfg.Lookup(k)
			for _, prefix := range p.AllowedIPs {
				if prefix, ok := usable(prefix); ok {
					w.prefixes = append(w.prefixes, prefix)
				}
			}
			slices.SortFunc(w.prefixes, netip.Prefix.Compare)
			w.prefixes = slices.Compact(w.prefixes)
		}
		if w.known && m == create && t.cfg.PSK != nil {
			w.psk = t.cfg.PSK(k)
		}
		wishes = append(wishes, w)
	}
	return wishes
}

// apply changes peers and table. The caller holds route.
func (t *Tunnel) apply(wishes []wish, m mode) (lost []*peer, contested []identity.NodePublic) {
	made := false
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range wishes {
		p := t.peers[w.key]
		switch {
		case p == nil:
		case !w.known:
			t.log.Debug("tunnel peer removed", zap.String("peer", p.key.Short()))
			t.retire(p)
			lost = append(lost, p)
		default:
			kept := p.prefixes[:0:0]
			for _, prefix := range p.prefixes {
				if _, keep := slices.BinarySearchFunc(w.prefixes, prefix, netip.Prefix.Compare); keep {
					kept = append(kept, prefix)
				} else {
					t.table.release(prefix, p)
				}
			}
			if len(kept) != len(p.prefixes) {
				lost = append(lost, p)
			}
			p.prefixes = kept
		}
	}
	for _, w := range wishes {
		p := t.peers[w.key]
		if !w.known || m == shrink || p == nil && (m != create || len(t.peers) >= maxPeers) {
			continue
		}
		if p == nil {
			p = newPeer(w.key, w.psk, t.instant())
			t.peers[w.key] = p
			made = true
			t.log.Debug("tunnel peer added", zap.String("peer", p.key.Short()))
		}
		for _, prefix := range w.prefixes {
			if _, has := slices.BinarySearchFunc(p.prefixes, prefix, netip.Prefix.Compare); has {
				continue
			}
			t.table.claim(prefix, p)
			for _, other := range t.table.claims[prefix] {
				if other != p {
					contested = append(contested, other.key)
				}
			}
		}
		p.prefixes = w.prefixes
	}
	if made {
		t.summon(t.born)
	}
	return lost, contested
}

// retire ends a peer: nothing comes in or goes out any more, but for a delivery
// that is going on. The caller holds route and mu.
func (t *Tunnel) retire(p *peer) {
	p.dead.Store(true)
	close(p.gone)
	delete(t.peers, p.key)
	for _, index := range p.indexes {
		delete(t.indexes, index)
	}
	p.indexes = nil
	for _, prefix := range p.prefixes {
		t.table.release(prefix, p)
	}
	p.prefixes = nil
}

// evictIdle removes peers without traffic and says when the next one may be
// due; 0 when there is none left.
func (t *Tunnel) evictIdle() time.Duration {
	t.route.Lock()
	defer t.route.Unlock()
	if t.closed {
		return 0
	}
	next := time.Duration(0)
	limit := t.instant() - int64(t.cfg.IdleAfter)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		rest := time.Duration(p.active.Load() - limit)
		switch {
		case rest <= 0:
			t.log.Debug("tunnel peer idle", zap.String("peer", p.key.Short()))
			t.retire(p)
			t.stats.evicted.Add(1)
		case next == 0 || rest < next:
			next = rest
		}
	}
	return next
}

// obtain returns the configured peer with this key, creating it if Lookup knows
// it, and notes that it is in use.
func (t *Tunnel) obtain(key identity.NodePublic, now time.Time) (*peer, error) {
	for {
		if t.isClosing() {
			return nil, ErrClosed
		}
		t.mu.RLock()
		p, full := t.peers[key], len(t.peers) >= maxPeers
		if p != nil {
			p.active.Store(t.since(now))
		}
		t.mu.RUnlock()
		switch {
		case p != nil:
			return p, nil
		case full:
			return nil, fmt.Errorf("peer %s: %w", key.Short(), errTooManyPeers)
		}
		if _, known := t.cfg.Lookup(key); !known || t.keys.Load().owns(key) {
			return nil, fmt.Errorf("peer %s: %w", key.Short(), ErrUnknownPeer)
		}
		t.configure([]identity.NodePublic{key}, create)
	}
}
