package tunnel

import (
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// A peer that lost its session, as by a restart, is back with the first packet
// it cannot open, and greets no more often than a handshake may begin.
func TestLostSessionIsRenewedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		time.Sleep(time.Minute) // so that WireGuard may begin another handshake

		b.forget(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.knows(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.take()

		for range 10 {
			a.say(t, b, "lost")
			synctest.Wait()
		}
		if n := b.t.Stats().Greeted; n != 1 {
			t.Errorf("%d greetings for packets of one moment", n)
		}
		b.take()
		a.say(t, b, "y")
		b.wantGot(t, a, "y")

		// Strangers are not greeted.
		stranger := identity.NewNode().Public()
		b.t.Receive(Source{Peer: stranger, Region: 1}, [][]byte{append([]byte{typeData, 0, 0, 0, 1, 2, 3, 4}, make([]byte, 40)...)})
		synctest.Wait()
		if n := b.t.Stats().Greeted; n != 1 {
			t.Errorf("%d greetings after a stranger's packet", n)
		}
	})
}
