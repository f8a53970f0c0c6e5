// Package errand runs what has to be done now and then on a goroutine that
// exists only meanwhile: a process holds many nodes that have nothing to do.
package errand

import "sync"

// Errand is something to do whenever it is asked for. Make one with New.
type Errand struct {
	do func()

	mu      sync.Mutex // guards what follows; not held while do runs
	running bool
	again   bool // asked for since do began
	closed  bool
	idle    sync.Cond // running has become false
}

// New returns an Errand that nobody has asked for yet.
func New(do func()) *Errand {
	e := &Errand{do: do}
	e.idle.L = &e.mu
	return e
}

// Ask has do run once more, beginning after this call, and does not wait for it.
// Runs never overlap, and one may serve many calls. After Close it does nothing.
// It may be called from do.
func (e *Errand) Ask() {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
	case e.running:
		e.again = true
	default:
		e.running = true
		go e.run()
	}
}

func (e *Errand) run() {
	for {
		e.do()
		e.mu.Lock()
		if !e.again || e.closed {
			e.running = false
			e.idle.Broadcast()
			e.mu.Unlock()
			return
		}
		e.again = false
		e.mu.Unlock()
	}
}

// Close lets no further run begin and waits for the one under way. It may be
// called again, but not from do.
func (e *Errand) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for e.running {
		e.idle.Wait()
	}
}
