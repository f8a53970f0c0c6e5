package tunnel

import (
	"slices"
	"time"

	"mesh/identity"
)

// Drain waits until the packets that were sent to peers with a session have
// left, but not longer than atMost. It is for last words, such as the resets of
// connections: before Close to all peers, before Update to those that go.
// Without keys all peers are meant.
func (t *Tunnel) Drain(atMost time.Duration, keys ...identity.NodePublic) {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, p := range t.active() {
		if len(keys) > 0 && !slices.Contains(keys, p.key) {
			continue
		}
		for p.hasToSend() {
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
// handshake do not count: nobody knows whether they will ever leave.
func (p *peer) hasToSend() bool {
	p.window.Lock()
	defer p.window.Unlock()
	return !p.stalled && p.inside > 0
}
