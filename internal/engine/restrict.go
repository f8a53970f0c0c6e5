package engine

import "net/netip"

// Restriction says what an Engine keeps from happening, whatever the snapshot in
// force allows.
type Restriction int32

// Restrictions, each with those before it.
const (
	Unrestricted Restriction = iota
	NothingNew               // peers begin no flow
	Nothing                  // no packet gets in or out
)

// restriction is what is in force, and why.
type restriction struct {
	Restriction
	why error
}

// Restrict puts a restriction in force until the next call. Nothing ends all
// connections with why, which is also what dials that begin under it hear.
func (e *Engine) Restrict(r Restriction, why error) {
	if e.restricted.Load().Restriction == r {
		return
	}
	e.applying.Lock()
	defer e.applying.Unlock()
	if r == Nothing {
		e.restricted.Store(&restriction{NothingNew, why})
		e.CutAll(why)
	}
	e.restricted.Store(&restriction{r, why})
	e.barrier()
	if r != Nothing {
		return
	}
	// What was begun since CutAll would neither get anywhere nor hear why.
	e.link.Abort(func(uint8, netip.AddrPort, netip.AddrPort) bool { return true }, why)
	if e.rules != nil {
		// For when the restriction is lifted: until then no packet gets there.
		e.filter.Swap(e.rules.WithPeers(peerCaps(e.Map(), e.rules.Capabilities(), nil)))
	}
}

func (e *Engine) isRestricted(r Restriction) bool { return e.restricted.Load().Restriction >= r }
