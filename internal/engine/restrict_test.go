package engine

import (
	"errors"
	"testing"

	"mesh/internal/filter"
)

// Whoever dials while nothing may get out hears why, also of a batch; and so does
// what was begun while that was being put in force.
func TestDialUnderRestriction(t *testing.T) {
	a, b := pair(t)
	why := errors.New("cut off")
	late := flow{tcp, port(a.four, 9), port(b.four, 80)}
	begun := false
	a.link.onAbort = func() {
		a.link.mu.Lock()
		defer a.link.mu.Unlock()
		if !begun {
			begun = true
			return
		}
		a.link.flows[late] = nil
	}
	// The hook above runs before the connections are ended: what it adds the
	// second time has begun after the first.
	a.e.Restrict(Nothing, why)
	if err := a.link.errorOf(late); err != why {
		t.Errorf("what was begun meanwhile: %v", err)
	}
	for _, proto := range []uint8{tcp, udp} {
		first, second := flow{proto, port(a.four, 1), port(b.four, 80)}, flow{proto, port(a.six, 2), port(b.six, 80)}
		a.e.Out([][]byte{
			packet(proto, first.local, first.remote, filter.TCPSyn), packet(proto, second.local, second.remote, filter.TCPSyn),
		})
		for _, f := range []flow{first, second} {
			if err := a.link.rejected[f]; err != why {
				t.Errorf("%v: %v", f, err)
			}
		}
	}
	clear(a.link.rejected)
	a.e.Restrict(Unrestricted, nil)
	a.e.Out([][]byte{packet(tcp, port(a.four, 3), port(b.four, 80), filter.TCPSyn)})
	if len(a.link.rejected) != 0 {
		t.Errorf("when it is over: %v", a.link.rejected)
	}
}
