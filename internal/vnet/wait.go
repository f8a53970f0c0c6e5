package vnet

import (
	"context"
	"os"
	"sync"
	"time"
)

// waiters are goroutines that wait for a change of what Net.mu guards.
type waiters struct{ changed chan struct{} }

// wait releases mu until something changed, the deadline passed (then the
// error is os.ErrDeadlineExceeded) or ctx ended. A zero deadline is none.
func (w *waiters) wait(ctx context.Context, mu *sync.Mutex, deadline time.Time) error {
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded
	}
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	changed := w.changed
	mu.Unlock()
	defer mu.Lock()
	var late <-chan time.Time
	if !deadline.IsZero() {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		late = t.C
	}
	select {
	case <-changed:
		return nil
	case <-late:
		return os.ErrDeadlineExceeded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wake ends all waits.
func (w *waiters) wake() {
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}
