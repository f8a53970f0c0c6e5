package tunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.zx2c4.com/wireguard/device"

	"mesh/identity"
)

// leaveTimeout bounds how long the creation of a peer waits for the removal of
// its predecessor. The wait is short unless it is the predecessor's Deliver
// that asks.
const leaveTimeout = time.Second

// wish is what Lookup said about a key.
type wish struct {
	key      identity.NodePublic
	prefixes []netip.Prefix
	psk      [32]byte
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
		left, gone := t.configure(active, shrink)
		for _, ch := range gone {
			<-ch
		}
		for _, p := range left {
			p.awaitDelivery()
		}
		_, gone = t.configure(active, adjust)
		for _, ch := range gone {
			<-ch
		}
	}
	t.retryHeld(keys)
}

// configure makes the Device's peers follow Lookup. It returns the peers that
// lost prefixes and a channel for each removed peer that is closed when the
// Device has forgotten it.
func (t *Tunnel) configure(keys []identity.NodePublic, m mode) (lost []*peer, gone []chan struct{}) {
	lost, gone, contested := t.configureOnce(keys, m)
	if len(contested) > 0 {
		// Somebody else holds what is claimed: perhaps only because nobody has
		// told us yet that they gave it up.
		_, more, _ := t.configureOnce(contested, adjust)
		gone = append(gone, more...)
	}
	return lost, gone
}

func (t *Tunnel) configureOnce(keys []identity.NodePublic, m mode) (lost []*peer, gone []chan struct{}, contested []identity.NodePublic) {
	for {
		revision := t.revision.Load()
		wishes := t.ask(keys, m)
		t.route.Lock()
		if t.closed {
			t.route.Unlock()
			return nil, nil, nil
		}
		if t.revision.Load() != revision {
			t.route.Unlock()
			continue // the netmap changed meanwhile: these answers are stale
		}
		lost, gone, contested = t.apply(wishes, m)
		t.route.Unlock()
		return lost, gone, contested
	}
}

func (t *Tunnel) ask(keys []identity.NodePublic, m mode) []wish {
	own := t.key.Load().public
	wishes := make([]wish, 0, len(keys))
	for _, k := range keys {
		w := wish{key: k}
		if k != own && !k.IsZero() {
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

// apply changes table and Device. The caller holds route.
func (t *Tunnel) apply(wishes []wish, m mode) (lost []*peer, gone []chan struct{}, contested []identity.NodePublic) {
	now := time.Now()
	var conf strings.Builder
	var retired []*peer

	t.mu.Lock()
	for _, w := range wishes {
		p := t.peers[w.key]
		switch {
		case p == nil:
		case !w.known:
			t.retire(p)
			retired = append(retired, p)
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
	var made []*peer
	for _, w := range wishes {
		p := t.peers[w.key]
		if !w.known || m == shrink || p == nil && m != create {
			continue
		}
		if p == nil {
			if t.changing != nil || t.leaving[w.key] != nil || len(t.peers)+len(t.leaving) >= device.MaxPeers {
				continue
			}
			p = newPeer(w.key, now)
			t.peers[w.key] = p
			made = append(made, p)
			fmt.Fprintf(&conf, "public_key=%s\npreshared_key=%x\nendpoint=%s\n", p.hexKey(), w.psk[:], p.hexKey())
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
	transfers := t.table.take()
	t.mu.Unlock()

	// The old owner lets go before the new one gets it.
	for _, tr := range transfers {
		if tr.from != nil {
			fmt.Fprintf(&conf, "public_key=%s\nupdate_only=true\nallowed_ip=-%s\n", tr.from.hexKey(), tr.prefix)
		}
	}
	for _, tr := range transfers {
		if tr.to != nil {
			fmt.Fprintf(&conf, "public_key=%s\nupdate_only=true\nallowed_ip=%s\n", tr.to.hexKey(), tr.prefix)
		}
	}
	if conf.Len() > 0 {
		if err := t.dev.IpcSet(conf.String()); err != nil {
			// Cannot happen with what is written above. What the Device then
			// lacks is refused by it, what it has too much by our table.
			t.log.Error("configure tunnel", zap.Error(err))
		}
	}
	for _, p := range made {
		t.log.Debug("tunnel peer added", zap.String("peer", p.key.Short()))
	}
	for _, p := range retired {
		t.log.Debug("tunnel peer removed", zap.String("peer", p.key.Short()))
		gone = append(gone, t.dismiss(p))
	}
	if len(made) > 0 {
		select {
		case t.born <- struct{}{}:
		default:
		}
	}
	return lost, gone, contested
}

// retire ends a peer as far as we are concerned: nothing comes in or goes out
// any more. The caller holds route and mu, and calls dismiss after mu.
func (t *Tunnel) retire(p *peer) {
	p.dead.Store(true)
	close(p.gone)
	delete(t.peers, p.key)
	for _, i := range p.indexes {
		if s := t.sessions[i.index]; s != nil && s.peer == p {
			delete(t.sessions, i.index)
		}
	}
	p.indexes = nil
	for _, prefix := range p.prefixes {
		t.table.release(prefix, p)
	}
	p.prefixes = nil
	t.leaving[p.key] = make(chan struct{})
}

// dismiss makes the Device forget a retired peer, in the background since that
// has to wait for a delivery that may be going on. The caller holds route.
func (t *Tunnel) dismiss(p *peer) chan struct{} {
	t.mu.RLock()
	done := t.leaving[p.key]
	t.mu.RUnlock()
	dev := t.dev
	t.wg.Go(func() {
		key := device.NoisePublicKey(p.key.Bytes())
		// Stopped first, because RemovePeer blocks everybody else while it
		// waits for a running peer.
		if dp := dev.LookupPeer(key); dp != nil {
			dp.Stop()
			dropFinalizers(dp)
		}
		dev.RemovePeer(key)
		t.mu.Lock()
		delete(t.leaving, p.key)
		t.mu.Unlock()
		close(done)
	})
	return done
}

// evictIdle removes peers without traffic and says when the next one may be
// due; 0 when there is none left.
func (t *Tunnel) evictIdle(now time.Time) time.Duration {
	t.route.Lock()
	defer t.route.Unlock()
	if t.closed {
		return 0
	}
	var idle []wish
	next := time.Duration(0)
	limit := now.Add(-t.cfg.IdleAfter).UnixNano()
	t.mu.Lock()
	for _, p := range t.peers {
		if rest := time.Duration(p.active.Load() - limit); rest <= 0 {
			idle = append(idle, wish{key: p.key})
		} else if next == 0 || rest < next {
			next = rest
		}
	}
	// Between here and retire mu is free, but a Send in that gap only finds a
	// peer that is about to go, as it would a moment earlier.
	t.mu.Unlock()
	if len(idle) > 0 {
		t.apply(idle, shrink)
		t.stats.evicted.Add(uint64(len(idle)))
	}
	return next
}

// obtain returns the configured peer with this key, creating it if Lookup knows
// it, and notes that it is in use.
func (t *Tunnel) obtain(key identity.NodePublic) (*peer, error) {
	deadline := time.Time{}
	for {
		if t.isClosing() {
			return nil, ErrClosed
		}
		now := time.Now()
		t.mu.RLock()
		p, leaving, full := t.peers[key], t.leaving[key], len(t.peers)+len(t.leaving) >= device.MaxPeers
		if p != nil {
			p.active.Store(now.UnixNano())
		}
		if leaving == nil {
			leaving = t.changing
		}
		t.mu.RUnlock()
		switch {
		case p != nil:
			return p, nil
		case full:
			return nil, fmt.Errorf("peer %s: %w", key.Short(), errTooManyPeers)
		}
		if _, known := t.cfg.Lookup(key); !known || key == t.key.Load().public {
			return nil, fmt.Errorf("peer %s: %w", key.Short(), ErrUnknownPeer)
		}
		if leaving == nil {
			t.configure([]identity.NodePublic{key}, create)
			continue
		}
		if deadline.IsZero() {
			deadline = now.Add(leaveTimeout)
		}
		wait := time.NewTimer(time.Until(deadline))
		select {
		case <-leaving:
			wait.Stop()
		case <-t.closing:
			wait.Stop()
			return nil, ErrClosed
		case <-wait.C:
			return nil, fmt.Errorf("peer %s: still being removed", key.Short())
		}
	}
}

func (t *Tunnel) isClosing() bool {
	select {
	case <-t.closing:
		return true
	default:
		return false
	}
}

// register notes an index of ours that goes out in a handshake message to p;
// from now on messages that carry it are p's.
func (t *Tunnel) register(index uint32, p *peer, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.dead.Load() {
		return
	}
	old := 0
	for old < len(p.indexes) && (now.Sub(p.indexes[old].born) > sessionLife || len(p.indexes)-old >= sessionsPerPeer) {
		if s := t.sessions[p.indexes[old].index]; s != nil && s.peer == p && s.born.Equal(p.indexes[old].born) {
			delete(t.sessions, p.indexes[old].index)
		}
		old++
	}
	p.indexes = append(slices.Delete(p.indexes, 0, old), indexed{index, now})
	t.sessions[index] = &session{peer: p, born: now}
}
