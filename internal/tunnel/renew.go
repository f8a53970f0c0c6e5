package tunnel

import (
	"time"

	"mesh/identity"
)

// Renew begins another handshake with a peer that was probably started again,
// if it is one that we talk to: it does not have our session any more, and
// WireGuard finds that out after 15 seconds of silence only. The session that
// there is stays in use until the peer answers.
func (t *Tunnel) Renew(peer identity.NodePublic) {
	t.mu.RLock()
	p := t.peers[peer]
	t.mu.RUnlock()
	if p == nil || t.isClosing() {
		return
	}
	// The last handshake, however recent, was with the process before; one that
	// is under way as well, and so it is tried anew at once.
	p.mu.Lock()
	if p.begun != nil {
		now := time.Now()
		p.since, p.attempts, p.retry = now, 0, now
		p.mu.Unlock()
		t.wake(p, now)
		return
	}
	p.since = time.Time{}
	p.mu.Unlock()
	select {
	case t.lost <- peer:
		t.working.Ask()
	default: // many at once: the timer finds out
	}
}
