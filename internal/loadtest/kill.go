package loadtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"mesh/control/admin"
)

// Steady changes.
const (
	changesFor   = 3 * time.Second // before the kill, and after all are back
	writeEvery   = 50 * time.Millisecond
	writesOfNode = 20 // one of so many writes at a replica is a new node
)

// ledger is what was acknowledged while replicas were at work, to be looked for
// afterwards.
type ledger struct {
	mu      sync.Mutex // guards the members below
	writes  int
	users   map[string]bool
	nodes   []*node
	removed map[*node]bool
	open    map[*node]bool // whose removal was asked for and not acknowledged
}

// note runs f with the ledger for itself, after a write was acknowledged.
func (l *ledger) note(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes++
	f()
}

// write makes changes at one replica until stop is closed or the replica does
// not answer: users, nodes that come, and nodes that are removed again.
func (m *Mesh) write(ctx context.Context, l *ledger, at int, a *admin.Client, key string, stop <-chan struct{}) error {
	tick := time.NewTicker(writeEvery)
	defer tick.Stop()
	var last *node // that came here and is still there
	for k := 0; ; k++ {
		select {
		case <-stop:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		switch k % (2 * writesOfNode) {
		case 0, writesOfNode:
			n := m.newNode(fmt.Sprintf("late%d-%d", at, k), 0)
			n.place.Store(int32(at))
			if err := n.register(ctx, key); err != nil {
				return err
			}
			n.start(ctx)
			last = n
			l.note(func() { l.nodes = append(l.nodes, n) })
		case writesOfNode / 2:
			l.mu.Lock()
			l.open[last] = true
			l.mu.Unlock()
			if err := a.RemoveNode(ctx, last.name); err != nil {
				return err
			}
			l.note(func() {
				delete(l.open, last)
				l.removed[last] = true
			})
		default:
			name := fmt.Sprintf("u%d-%d", at, k)
			if _, err := a.CreateUser(ctx, name); err != nil {
				return err
			}
			l.note(func() { l.users[name] = true })
		}
	}
}

// move has nodes change their endpoints, steadily, until stop is closed.
func (m *Mesh) move(ctx context.Context, l *ledger, stop <-chan struct{}) error {
	tick := time.NewTicker(changeEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		n := m.nodes[rand.N(len(m.nodes))]
		n.truth.Store(&truth{n.truth.Load().disco, m.endpoints()})
		if err := n.report(ctx); err != nil {
			return fmt.Errorf("%s could not report: %w", n.name, err)
		}
		l.note(func() {})
	}
}

// Kill has changes go on steadily at all replicas, and data between real nodes;
// then it kills the first replica, whose relay real nodes prefer. The time of each node that was there is until
// it has its map at another. Nothing that was acknowledged may be lost, no node
// of another replica may notice, and no connection between real nodes may break.
func (m *Mesh) Kill(ctx context.Context, r *Replicas) Phase {
	var pairs []*pair
	name := fmt.Sprintf("SIGKILL 1 of %d replicas", len(r.All))
	if len(r.All) < 2 {
		return Phase{Name: name, Err: errors.New("there is no other replica")}
	}
	key, err := m.cfg.Admin.CreateKey(ctx, admin.KeyCreate{Reusable: true, Ephemeral: true, Tags: []string{realTag}})
	for i, how := range []string{"directly", "relayed"} {
		if err == nil {
			var p *pair
			if p, err = m.newPair(ctx, how, i == 1, key.Secret); err == nil {
				pairs = append(pairs, p)
			}
		}
	}
	l := &ledger{users: make(map[string]bool), removed: make(map[*node]bool), open: make(map[*node]bool)}
	var p Phase
	if err == nil {
		p = m.measure(name, len(m.nodes), func() ([]time.Duration, error) { return m.kill(ctx, r, l) })
		p.Notes = append(p.Notes, fmt.Sprintf("acknowledged: %d writes, of them %d users, %d nodes, %d removals", l.writes, len(l.users), len(l.nodes), len(l.removed)))
	} else {
		p = Phase{Name: name, Err: err}
	}
	for _, pair := range pairs {
		note, err := pair.stop()
		p.Notes = append(p.Notes, note)
		p.Err = errors.Join(p.Err, err)
	}
	return p
}

func (m *Mesh) kill(ctx context.Context, r *Replicas, l *ledger) (each []time.Duration, err error) {
	const dies = 0
	key, err := m.authKey(ctx, 0, false)
	if err != nil {
		return nil, err
	}
	stop := make(chan struct{})
	var changing sync.WaitGroup
	for i, p := range r.All {
		changing.Go(func() {
			if err := m.write(ctx, l, i, p.Admin, key, stop); err != nil && i != dies {
				m.complain("replica %d, which lives, refused a write: %v", i, err)
			}
		})
	}
	changing.Go(func() {
		if err := m.move(ctx, l, stop); err != nil {
			m.complain("%v", err)
		}
	})
	ended := sync.OnceFunc(func() {
		close(stop)
		changing.Wait()
	})
	defer ended()
	if err := wait(ctx, changesFor); err != nil {
		return nil, err
	}

	lost := m.streamsLost.Load()
	streams := make(map[*node]int)
	var there []*node
	for _, n := range m.nodes {
		n.mu.Lock()
		streams[n] = n.streams
		n.mu.Unlock()
		if int(n.place.Load()) == dies {
			there = append(there, n)
		}
	}
	began := time.Now()
	if err := r.kill(dies); err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards each
	err = parallel(there, len(there), func(n *node) error {
		err := n.upTo(ctx, streams[n]+1)
		mu.Lock()
		defer mu.Unlock()
		each = append(each, time.Since(began))
		return err
	})
	err = errors.Join(err, wait(ctx, changesFor))
	ended()
	if err != nil {
		return each, err
	}
	for _, n := range there {
		delete(streams, n)
	}
	for n, had := range streams {
		n.mu.Lock()
		if n.streams != had {
			m.complain("%s lost its stream at a replica that lives", n.name)
		}
		n.mu.Unlock()
	}
	// One for each node that was there, the newcomers among them.
	if now := m.streamsLost.Load(); now-lost <= int64(len(there)+len(l.nodes)) {
		m.streamsLost.Store(lost)
	}
	return each, m.audit(ctx, l)
}

// audit looks for all that was acknowledged.
func (m *Mesh) audit(ctx context.Context, l *ledger) error {
	users, err := m.cfg.Admin.Users(ctx)
	if err != nil {
		return err
	}
	nodes, err := m.cfg.Admin.Nodes(ctx)
	if err != nil {
		return err
	}
	missing := make(map[string]bool)
	for name := range l.users {
		missing[name] = true
	}
	for _, u := range users {
		delete(missing, u.Name)
	}
	there := make(map[string]bool)
	for _, n := range nodes {
		there[n.Name] = true
	}
	var back, lost int
	for _, n := range l.nodes {
		switch {
		case l.removed[n] || l.open[n] && !there[n.name]:
			if there[n.name] {
				back++
			}
			select {
			case <-n.done:
			case <-ctx.Done():
				return fmt.Errorf("%s was removed and goes on", n.name)
			}
		case !there[n.name]:
			lost++
			n.stop()
		default:
			m.nodes = append(m.nodes, n)
		}
	}
	if len(missing)+lost+back > 0 {
		return fmt.Errorf("acknowledged and lost: %d users, %d nodes, %d removals", len(missing), lost, back)
	}
	return m.settled(ctx)
}
