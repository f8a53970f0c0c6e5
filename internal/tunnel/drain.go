package tunnel

import "time"

// Drain waits until the packets that were sent to peers with a session have
// left, but not longer than atMost. It is for last words before Close, such as
// the resets of connections.
func (t *Tunnel) Drain(atMost time.Duration) {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, p := range t.active() {
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
