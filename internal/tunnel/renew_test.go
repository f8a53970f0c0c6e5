package tunnel

import (
	"testing"
	"testing/synctest"

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
