package store

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// gateTime is how long nobody tries after the database could not be reached.
const gateTime = time.Second

// gate keeps callers from queueing up before a database that is away: after a
// failure all are told so at once for a while. The zero gate is open.
type gate struct {
	mu    sync.Mutex // guards until
	until time.Time
}

func (g *gate) check() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Now().Before(g.until) {
		return fmt.Errorf("%w; it is tried again every second", ErrUnavailable)
	}
	return nil
}

// note learns from the result of an operation.
func (g *gate) note(err error) {
	if !errors.Is(err, ErrUnavailable) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.until = time.Now().Add(gateTime)
}
