package loadtest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// watch waits until nodes see a node in a certain way, and notes how long each
// took.
type watch struct {
	mesh   *Mesh
	target *node
	want   func(p *peer) bool // nil = gone
	began  time.Time
	done   chan struct{} // closed when nobody is left

	mu   sync.Mutex // guards the members below
	left map[*node]bool
	took []time.Duration
}

// watch begins to wait for viewers to see target as want says.
func (m *Mesh) watch(target *node, viewers []*node, want func(*peer) bool) *watch {
	w := &watch{mesh: m, target: target, want: want, began: time.Now(), done: make(chan struct{}), left: make(map[*node]bool, len(viewers))}
	for _, v := range viewers {
		if v != target {
			w.left[v] = true
		}
	}
	if len(w.left) == 0 {
		close(w.done)
	}
	m.watches.Store(target.key, w)
	return w
}

func (w *watch) saw(viewer *node, p *peer) {
	if !w.want(p) {
		return
	}
	d := time.Since(w.began)
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.left[viewer] {
		return
	}
	delete(w.left, viewer)
	w.took = append(w.took, d)
	if len(w.left) == 0 {
		close(w.done)
	}
}

// wait waits until all have seen it and returns how long each took.
func (w *watch) wait(ctx context.Context) ([]time.Duration, error) {
	var err error
	select {
	case <-w.done:
	case <-ctx.Done():
		w.mu.Lock()
		err = fmt.Errorf("%d of %d nodes do not see %s as it is", len(w.left), len(w.left)+len(w.took), w.target.name)
		w.mu.Unlock()
	}
	w.mesh.watches.CompareAndDelete(w.target.key, w)
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.took), err
}
