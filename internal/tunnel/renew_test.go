package tunnel

import (
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// A peer that is known to have been started again gets a handshake at once,
// without having sent anything; one that we do not talk to gets none.
func TestRenew(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		a.t.Renew(b.key)
		synctest.Wait()
		if n := len(tp.of("a>b", typeInitiation)); n != 0 {
			t.Errorf("%d initiations to a peer without a session", n)
		}
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		b.forget(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.knows(a)
		b.t.Update([]identity.NodePublic{a.key})
		b.take()

		a.t.Renew(b.key)
		synctest.Wait()
		if n := len(tp.of("a>b", typeInitiation)); n != 2 {
			t.Errorf("%d initiations, want the first and the renewal", n)
		}
		a.say(t, b, "y")
		b.wantGot(t, a, "y")
	})
}

// A handshake that is under way when the peer is known to have been started again is
// tried anew at once, and what waits for it is not lost.
func TestRenewUnderWay(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		tp := nw.tap()
		a, b := pair(t, nw)
		b.forget(a)
		a.say(t, b, "x")
		synctest.Wait()
		b.knows(a)
		time.Sleep(firstRetries[0] / 2)
		a.t.Renew(b.key)
		synctest.Wait()
		if n := len(tp.of("a>b", typeInitiation)); n != 2 {
			t.Errorf("%d initiations, want the first and one more", n)
		}
		b.wantGot(t, a, "x")
	})
}
