package engine

// Restriction says what an Engine keeps from happening, whatever the snapshot in
// force allows.
type Restriction int32

// Restrictions, each with those before it.
const (
	Unrestricted Restriction = iota
	NothingNew               // peers begin no flow
	Nothing                  // no packet gets in or out
)

// Restrict puts a restriction in force until the next call. Nothing ends all
// connections with why.
func (e *Engine) Restrict(r Restriction, why error) {
	if Restriction(e.restricted.Load()) == r {
		return
	}
	e.applying.Lock()
	defer e.applying.Unlock()
	if r == Nothing {
		e.restricted.Store(int32(NothingNew))
		e.CutAll(why)
	}
	e.restricted.Store(int32(r))
	e.barrier()
	if r == Nothing && e.rules != nil {
		// For when the restriction is lifted: until then no packet gets there.
		e.filter.Swap(e.rules.WithPeers(peerCaps(e.Map(), e.rules.Capabilities(), nil)))
	}
}

func (e *Engine) isRestricted(r Restriction) bool { return Restriction(e.restricted.Load()) >= r }
