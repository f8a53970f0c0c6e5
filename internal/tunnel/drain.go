package tunnel

import (
	"slices"
	"time"

	"mesh/identity"
)

// Drain waits until the packets that were sent to peers have left, but not
// longer than atMost. It is for last words, such as the resets of connections:
// before Update to the peers that go, before Close to all peers with a session,
// which no keys mean.
func (t *Tunnel) Drain(atMost time.Duration, keys ...identity.NodePublic) {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, p := range t.active() {
		if len(keys) > 0 && !slices.Contains(keys, p.key) {
			continue
		}
		for p.hasToSend(len(keys) > 0) {
			select {
			case <-tick.C:
			case <-p.gone:
			case <-deadline.C:
				return
			}
			if p.dead.Load() {
				break
			}
		}
	}
}

// hasToSend reports whether packets are on their way out. Those that wait for a
// handshake count if evenStalled: nobody knows whether they will ever leave.
func (p *peer) hasToSend(evenStalled bool) bool {
	p.window.Lock()
	defer p.window.Unlock()
	return (evenStalled || !p.stalled) && p.inside > 0
}
