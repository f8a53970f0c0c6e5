package path_test

import (
	"testing"
	"time"

	"mesh/internal/path"
	"mesh/internal/vnet"
)

// TestGuessPorts: a port-restricted NAT and one that maps by destination find a
// direct path if both users allow it to be guessed, and none otherwise.
func TestGuessPorts(t *testing.T) {
	may := func(c *path.Config) { c.GuessPorts = true }
	for _, c := range []struct {
		name   string
		easy   vnet.NAT
		a, b   bool
		direct bool
	}{
		{"port restricted", vnet.PortRestricted(), true, true, true},
		{"home", vnet.Home(), true, true, true},
		{"one side only", vnet.Home(), true, false, false},
		{"other side only", vnet.Home(), false, true, false},
		{"both symmetric", vnet.Symmetric(), true, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(3) {
				inWorld(t, 1, func(t *testing.T, w *world) {
					opts := func(on bool) []func(*path.Config) {
						if on {
							return []func(*path.Config){may}
						}
						return nil
					}
					a := w.agent("a", w.n.NAT(c.easy).Host(), opts(c.a)...)
					b := w.agent("b", w.n.NAT(vnet.Symmetric()).Host(), opts(c.b)...)
					time.Sleep(time.Second)
					began := time.Now()
					talkUntil(a, b, 25*time.Second, dataLen, func() bool { return bothDirect(a, b) })
					took := time.Since(began)
					if bothDirect(a, b) != c.direct {
						t.Fatalf("direct %v: %s", !c.direct, how(a, b))
					}
					if !c.direct {
						return
					}
					t.Logf("direct after %v", took)
					a.resetGap(b)
					b.resetGap(a)
					r := watch(a, b, time.Minute)
					if r.gap > time.Second || !bothDirect(a, b) {
						t.Errorf("gap %v: %s", r.gap, how(a, b))
					}
					talkUntil(a, b, 5*time.Second, fullLen, func() bool { return false })
				}, seed)
			}
		})
	}
}
