package loadtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"mesh/control/admin"
)

// Phase is what one phase took.
type Phase struct {
	Name  string
	Count int             // of changes
	Took  time.Duration   // from begin to end
	Each  []time.Duration // how long each node took to see each change
	CPU   time.Duration   // of the server, in all
	Bytes int64           // of map messages that nodes received
	Msgs  int             // map messages that nodes received
	Usage Usage           // at the end
	Lost  int64           // map streams that ended by themselves
	Busy  int64           // answers that asked to come back later
	Notes []string        // what else was seen
	Err   error
}

// measure runs f as a phase and checks every view after it.
func (m *Mesh) measure(name string, count int, f func() ([]time.Duration, error)) Phase {
	m.cfg.Log("%s …", name)
	before, _ := m.usage()
	lost, busy := m.streamsLost.Load(), m.busy.Load()
	msgs, bytes := m.received()
	began := time.Now()
	each, err := f()
	p := Phase{Name: name, Count: count, Took: time.Since(began), Each: each, Err: err}
	p.Usage, _ = m.usage()
	p.CPU = p.Usage.CPU - before.CPU
	msgs2, bytes2 := m.received()
	p.Msgs, p.Bytes = msgs2-msgs, bytes2-bytes
	p.Lost, p.Busy = m.streamsLost.Load()-lost, m.busy.Load()-busy
	if p.Lost > 0 {
		if e := m.lastLoss.Load(); e != nil {
			p.Err = errors.Join(p.Err, fmt.Errorf("map streams were lost, the last one by: %w", *e))
		}
	}
	p.Err = errors.Join(p.Err, m.Check())
	m.mu.Lock()
	for _, c := range m.complaints {
		p.Err = errors.Join(p.Err, errors.New(c))
	}
	m.complaints = nil
	m.mu.Unlock()
	m.cfg.Log("%s", p)
	return p
}

func (m *Mesh) usage() (Usage, error) {
	if m.cfg.Usage == nil {
		return Usage{}, nil
	}
	return m.cfg.Usage()
}

// received returns how many map messages all nodes have received, and their
// bytes.
func (m *Mesh) received() (msgs int, bytes int64) {
	for _, n := range m.nodes {
		n.view.mu.Lock()
		msgs += n.view.news
		bytes += n.view.bytes
		n.view.mu.Unlock()
	}
	return msgs + m.gone.msgs, bytes + m.gone.bytes
}

// parallel calls f for each node, so many at a time, and joins the errors.
func parallel(nodes []*node, most int, f func(*node) error) error {
	var wg sync.WaitGroup
	var failed atomic.Int64
	var first atomic.Pointer[error]
	tokens := make(chan struct{}, most)
	for _, n := range nodes {
		tokens <- struct{}{}
		wg.Go(func() {
			defer func() { <-tokens }()
			if err := f(n); err != nil {
				failed.Add(1)
				first.CompareAndSwap(nil, &err)
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return fmt.Errorf("%d nodes failed, the first with: %w", failed.Load(), *err)
	}
	return nil
}

// truly wants a node to be seen as it is.
func truly(n *node) func(*peer) bool {
	return func(p *peer) bool { return p != nil && p.is(n) }
}

// Join has all nodes register and poll, until each knows all that it may see.
func (m *Mesh) Join(ctx context.Context) Phase {
	name := fmt.Sprintf("join of %d", m.cfg.Nodes)
	return m.measure(name, m.cfg.Nodes, func() ([]time.Duration, error) {
		if !m.tagged() {
			m.user = "load"
			if _, err := m.cfg.Admin.CreateUser(ctx, m.user); err != nil && !errors.Is(err, admin.ErrConflict) {
				return nil, err
			}
		}
		if _, err := m.cfg.Admin.SetPolicy(ctx, admin.PolicySet{Text: m.policy(nil)}); err != nil {
			return nil, err
		}
		keys := make([]string, m.groups())
		for g := range keys {
			var err error
			if keys[g], err = m.authKey(ctx, g, false); err != nil {
				return nil, err
			}
		}
		byGroup := make([][]*node, m.groups())
		for i := range m.cfg.Nodes {
			g := i % m.groups()
			n := m.newNode(fmt.Sprintf("n%d", i), g)
			m.nodes = append(m.nodes, n)
			byGroup[g] = append(byGroup[g], n)
		}
		var watches []*watch
		for _, n := range m.nodes {
			watches = append(watches, m.watch(n, byGroup[n.group], truly(n)))
		}
		err := parallel(m.nodes, m.cfg.Parallel, func(n *node) error {
			if err := n.register(ctx, keys[n.group]); err != nil {
				return err
			}
			n.start(ctx)
			return nil
		})
		var each []time.Duration
		for _, w := range watches {
			took, werr := w.wait(ctx)
			each = append(each, took...)
			err = errors.Join(err, werr)
			if ctx.Err() != nil {
				break
			}
		}
		return each, err
	})
}

// pick returns count nodes, evenly spread.
func (m *Mesh) pick(count int) (out []*node) {
	for i := range count {
		out = append(out, m.nodes[(i*len(m.nodes)/count+i)%len(m.nodes)])
	}
	return out
}

// Endpoints has nodes change their endpoints, one after the other.
func (m *Mesh) Endpoints(ctx context.Context, count int) Phase {
	return m.measure(fmt.Sprintf("%d endpoint changes", count), count, func() (each []time.Duration, err error) {
		for _, n := range m.pick(count) {
			n.truth.Store(&truth{n.truth.Load().disco, m.endpoints()})
			w := m.watch(n, m.viewers(n.group), truly(n))
			err = n.report(ctx)
			took, werr := w.wait(ctx)
			each = append(each, took...)
			if err = errors.Join(err, werr); err != nil {
				break
			}
			// A steady pace: what follows without a break is a burst.
			wait(ctx, changeEvery-time.Since(w.began))
		}
		return each, err
	})
}

// changeEvery is the pace of endpoint changes.
const changeEvery = 250 * time.Millisecond

// Newcomers has more nodes come, one after the other. Each is known to its peers
// when they have it online, with its endpoints.
func (m *Mesh) Newcomers(ctx context.Context, count int) Phase {
	return m.measure(fmt.Sprintf("%d more nodes", count), count, func() (each []time.Duration, err error) {
		for i := range count {
			g := i % m.groups()
			key, err := m.authKey(ctx, g, false)
			if err != nil {
				return each, err
			}
			n := m.newNode(fmt.Sprintf("more%d", m.extra), g)
			m.extra++
			viewers := m.viewers(g)
			m.nodes = append(m.nodes, n)
			w := m.watch(n, viewers, truly(n))
			if err := n.register(ctx, key); err != nil {
				n.done = nil
				return each, err
			}
			n.start(ctx)
			took, err := w.wait(ctx)
			each = append(each, took...)
			if err = errors.Join(err, n.upTo(ctx, 1)); err != nil {
				return each, err
			}
		}
		return each, nil
	})
}

// Policy edits one rule, that of the first group, and wants these nodes to have
// another filter and nobody else to get a byte.
func (m *Mesh) Policy(ctx context.Context) Phase {
	return m.measure("edit of one rule", 1, func() (each []time.Duration, err error) {
		type state struct {
			filter uint64
			news   int
		}
		was := make(map[*node]state)
		for _, n := range m.nodes {
			n.view.mu.Lock()
			was[n] = state{n.view.filter["base"], n.view.news}
			n.view.mu.Unlock()
		}
		began := time.Now()
		if _, err := m.cfg.Admin.SetPolicy(ctx, admin.PolicySet{Text: m.policy(map[int]string{0: "22,80"})}); err != nil {
			return nil, err
		}
		left := m.viewers(0)
		err = waitEach(ctx, &left, func(n *node) bool {
			n.view.mu.Lock()
			defer n.view.mu.Unlock()
			if n.view.filter["base"] == was[n].filter {
				return false
			}
			each = append(each, time.Since(began))
			return true
		})
		for _, n := range m.nodes {
			n.view.mu.Lock()
			if n.group != 0 && n.view.news != was[n].news {
				m.complain("%s is not concerned by the edit and got %d messages", n.name, n.view.news-was[n].news)
			}
			n.view.mu.Unlock()
		}
		return each, err
	})
}

// waitEach looks at nodes again and again until ok holds for each.
func waitEach(ctx context.Context, left *[]*node, ok func(*node) bool) error {
	for {
		var rest []*node
		for _, n := range *left {
			if !ok(n) {
				rest = append(rest, n)
			}
		}
		if *left = rest; len(rest) == 0 {
			return nil
		}
		if wait(ctx, 5*time.Millisecond) != nil {
			return fmt.Errorf("%d nodes did not hear of it", len(rest))
		}
	}
}

// Reconnect cuts all connections at once. The time of each is until it has its
// map again.
func (m *Mesh) Reconnect(ctx context.Context) Phase {
	return m.measure("reconnect of all", len(m.nodes), func() (each []time.Duration, err error) {
		lost := m.streamsLost.Load()
		streams := make(map[*node]int)
		for _, n := range m.nodes {
			n.mu.Lock()
			streams[n] = n.streams
			n.mu.Unlock()
		}
		began := time.Now()
		for _, n := range m.nodes {
			n.cut()
		}
		var mu sync.Mutex // guards each
		err = parallel(m.nodes, len(m.nodes), func(n *node) error {
			err := n.upTo(ctx, streams[n]+1)
			mu.Lock()
			defer mu.Unlock()
			each = append(each, time.Since(began))
			return err
		})
		// Some were called offline meanwhile.
		err = errors.Join(err, m.settled(ctx))
		// These we have cut ourselves.
		if now := m.streamsLost.Load(); now-lost <= int64(len(m.nodes)) {
			m.streamsLost.Store(lost)
		}
		return each, err
	})
}

// settled waits until all know what they should.
func (m *Mesh) settled(ctx context.Context) error {
	return waitFor(ctx, 100*time.Millisecond, func() (bool, error) { return m.Check() == nil, nil })
}

// Churn has ephemeral nodes come, rate a second, for a time. Each stays for
// stay; every other one leaves without a word.
func (m *Mesh) Churn(ctx context.Context, rate int, during, stay time.Duration) Phase {
	total := int(during.Seconds() * float64(rate))
	return m.measure(fmt.Sprintf("%d ephemeral nodes, %d/s", total, rate), total, func() (each []time.Duration, err error) {
		keys := make([]string, m.groups())
		for g := range keys {
			if keys[g], err = m.authKey(ctx, g, true); err != nil {
				return nil, err
			}
		}
		var wg sync.WaitGroup
		var mu sync.Mutex // guards each
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		for i := range total {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
			n := m.newNode(fmt.Sprintf("e%d", m.extra), i%m.groups())
			m.extra++
			wg.Go(func() {
				began := time.Now()
				if err := n.register(ctx, keys[n.group]); err != nil {
					m.complain("%s could not register: %v", n.name, err)
					return
				}
				n.start(ctx)
				defer n.stop()
				if err := n.upTo(ctx, 1); err != nil {
					m.complain("%s: no map: %v", n.name, err)
					return
				}
				mu.Lock()
				each = append(each, time.Since(began))
				mu.Unlock()
				wait(ctx, stay)
				if i%2 == 0 {
					if err := n.register(ctx, ""); err != nil {
						m.complain("%s could not leave: %v", n.name, err)
					}
				}
			})
		}
		wg.Wait()
		// The server forgets those that left without a word, too. The list is
		// long, and to ask for it is load.
		err = waitFor(ctx, time.Second, func() (bool, error) {
			list, err := m.cfg.Admin.Nodes(ctx)
			return len(list) == len(m.nodes), err
		})
		err = errors.Join(err, m.settled(ctx))
		m.peers.forget()
		m.changes.forget()
		return each, err
	})
}

// Revoke removes nodes, one after the other. The time of each peer is until it
// knows.
func (m *Mesh) Revoke(ctx context.Context, count int) Phase {
	return m.measure(fmt.Sprintf("revocation of %d", count), count, func() (each []time.Duration, err error) {
		for range count {
			n := m.nodes[len(m.nodes)-1]
			m.nodes = m.nodes[:len(m.nodes)-1]
			w := m.watch(n, m.viewers(n.group), func(p *peer) bool { return p == nil })
			if err := m.cfg.Admin.RemoveNode(ctx, n.name); err != nil {
				return each, err
			}
			took, err := w.wait(ctx)
			each = append(each, took...)
			if err != nil {
				return each, err
			}
			select {
			case <-n.done:
				each = append(each, time.Since(w.began))
				m.gone.msgs += n.view.news
				m.gone.bytes += n.view.bytes
			case <-ctx.Done():
				return each, fmt.Errorf("%s was removed and goes on", n.name)
			}
		}
		return each, nil
	})
}

// Idle does nothing for a time.
func (m *Mesh) Idle(ctx context.Context, during time.Duration) Phase {
	return m.measure(fmt.Sprintf("idle for %v", during), 1, func() ([]time.Duration, error) {
		return nil, wait(ctx, during)
	})
}

// Quantile returns what a share q of the times in Each does not exceed, 0 if
// there are none.
func (p Phase) Quantile(q float64) time.Duration {
	if len(p.Each) == 0 {
		return 0
	}
	each := slices.Sorted(slices.Values(p.Each))
	return each[min(int(q*float64(len(each))), len(each)-1)]
}

// String is a line about a phase.
func (p Phase) String() string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
	s := fmt.Sprintf("%-28s %7.2f s  p50 %s p99 %s max %s", p.Name, p.Took.Seconds(), ms(p.Quantile(0.5)), ms(p.Quantile(0.99)), ms(p.Quantile(1)))
	s += fmt.Sprintf("  cpu %.2f s (%s each)  rss %d MB peak %d MB", p.CPU.Seconds(), ms(p.CPU/time.Duration(max(p.Count, 1))), p.Usage.RSS>>20, p.Usage.Peak>>20)
	s += fmt.Sprintf("  %d msgs %.1f MB", p.Msgs, float64(p.Bytes)/1e6)
	if p.Lost > 0 || p.Busy > 0 {
		s += fmt.Sprintf("  lost %d busy %d", p.Lost, p.Busy)
	}
	for _, note := range p.Notes {
		s += "  " + note
	}
	if p.Err != nil {
		s += fmt.Sprintf("  WRONG: %v", p.Err)
	}
	return s
}
