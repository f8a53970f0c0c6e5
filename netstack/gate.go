package netstack

import (
	"sync"
	"sync/atomic"
)

// gate lets calls through until it is closed, and closing waits for the calls
// that are inside. Unlike a read lock it may be entered again by who is inside.
type gate struct {
	state atomic.Int64 // calls inside, plus gateClosed
	once  sync.Once
	empty chan struct{} // closed when the gate is closed and nobody is inside
}

const gateClosed = 1 << 62

func (g *gate) init() { g.empty = make(chan struct{}) }

// enter reports whether the call may proceed; if so leave must follow.
func (g *gate) enter() bool {
	if g.state.Add(1) < gateClosed {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.state.Add(-1) == gateClosed {
		g.once.Do(func() { close(g.empty) })
	}
}

// close shuts the gate and waits until everybody left.
func (g *gate) close() {
	if old := g.state.Or(gateClosed); old == 0 || old == gateClosed {
		g.once.Do(func() { close(g.empty) })
	}
	<-g.empty
}
