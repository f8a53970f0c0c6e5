package path

import (
	"net/netip"
	"slices"
	"time"
)

const (
	maxUnsent     = 4    // datagrams kept for one peer
	maxUnsentSize = 2048 // of one of them; handshakes are far smaller
	unsentFor     = 5 * time.Second
)

// unsent holds the last datagrams for a peer to which there was no path. The
// netmap often names a peer before it tells its relay: without this the first
// handshake would be lost, and the next one is seconds away.
type unsent struct {
	datagrams [][]byte
	at        instant // of the last one
}

// keep remembers copies of the newest datagrams.
func (u *unsent) keep(datagrams [][]byte, now instant) {
	for _, d := range datagrams[max(0, len(datagrams)-maxUnsent):] {
		if len(d) > maxUnsentSize {
			continue
		}
		if len(u.datagrams) == maxUnsent {
			u.datagrams = slices.Delete(u.datagrams, 0, 1)
		}
		u.datagrams = append(u.datagrams, slices.Clone(d))
	}
	u.at = now
}

// take returns what is held and still fresh, and forgets it.
func (u *unsent) take(now instant) [][]byte {
	d, at := u.datagrams, u.at
	*u = unsent{}
	if now-at >= instant(unsentFor) {
		return nil
	}
	return d
}

// sendUnsent sends what is held for a peer once there is a path to it.
func (p *Path) sendUnsent(pe *peer) {
	now := p.now()
	p.mu.Lock()
	waiting := !pe.gone && len(pe.unsent.datagrams) > 0
	p.mu.Unlock()
	if !waiting || pe.direct.Load() == nil && p.relayOf(pe) == 0 {
		return
	}
	p.mu.Lock()
	datagrams := pe.unsent.take(now)
	p.mu.Unlock()
	if len(datagrams) > 0 {
		// Best effort, as ever: WireGuard tries again.
		_ = p.Send(pe.key, netip.AddrPort{}, datagrams)
	}
}
