package tunnel

import (
	"time"

	"mesh/identity"
)

const (
	// greetEvery is how often one peer is greeted at most. WireGuard begins
	// no two handshakes with a peer within this time either.
	greetEvery = 5 * time.Second
	// maxGreeted bounds the peers whose last greeting is remembered; when
	// there are more nobody is greeted until some of it is over.
	maxGreeted = 1024
)

// greet begins a handshake with a peer that sends data of a session which we do
// not have: we were restarted, or let go of it as idle. WireGuard alone leaves
// such a peer talking to nobody for 15 seconds. The path says who it is, and
// may be wrong, so this is done rarely and costs the one greeted no more than
// any handshake does. Only the worker calls it; greeted is its memory.
func (t *Tunnel) greet(key identity.NodePublic, greeted map[identity.NodePublic]time.Time) {
	now := time.Now()
	if last, ok := greeted[key]; ok && now.Sub(last) < greetEvery {
		return
	}
	if len(greeted) >= maxGreeted {
		for k, at := range greeted {
			if now.Sub(at) >= greetEvery {
				delete(greeted, k)
			}
		}
		if len(greeted) >= maxGreeted {
			return
		}
	}
	if _, err := t.obtain(key); err != nil {
		return
	}
	greeted[key] = now
	t.route.Lock()
	dev := t.dev
	t.route.Unlock()
	if p := dev.LookupPeer(key.Bytes()); p != nil {
		if err := p.SendHandshakeInitiation(false); err == nil {
			t.stats.greeted.Add(1)
		}
	}
}
