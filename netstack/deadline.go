package netstack

import (
	"sync"
	"time"
)

// deadline is a point in time that may be moved while others wait for it.
type deadline struct {
	mu    sync.Mutex // guards the fields below
	timer *time.Timer
	done  chan struct{}
}

func (d *deadline) init() { d.done = make(chan struct{}) }

// wait returns a channel that is closed when the deadline passes. Moving an
// expired deadline makes a new channel, so ask again for each operation.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done
}

// set moves the deadline; the zero time means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	expired := d.timer != nil && !d.timer.Stop() // its channel is closed, or will be at once
	d.timer = nil
	select {
	case <-d.done:
		expired = true
	default:
	}
	if expired {
		d.done = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	done := d.done
	if left := time.Until(t); left > 0 {
		d.timer = time.AfterFunc(left, func() { close(done) })
	} else {
		close(done)
	}
}
