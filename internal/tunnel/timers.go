package tunnel

import (
	"container/heap"
	"sync"
	"time"

	"mesh/identity"
)

// Timers of a session: section 6 of the WireGuard paper.
const (
	keepaliveAfter = 10 * time.Second
	silenceAfter   = keepaliveAfter + rekeyTimeout // data without any answer
)

// alarms says which peers have something due and when. A peer has many timers
// and one alarm, which rings at the first of them or before.
type alarms struct {
	poke chan struct{} // capacity 1: there is an earlier one

	mu   sync.Mutex // guards heap, and the alarms of peers
	heap alarmHeap
}

type alarmEntry struct {
	at   int64 // since Tunnel.epoch
	peer *peer
}

type alarmHeap []alarmEntry

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].at < h[j].at }
func (h alarmHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *alarmHeap) Push(x any)        { *h = append(*h, x.(alarmEntry)) }
func (h *alarmHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = alarmEntry{}
	*h = old[:len(old)-1]
	return x
}

// instant is now since epoch, never 0.
func (t *Tunnel) instant() int64 { return t.since(time.Now()) }

func (t *Tunnel) since(now time.Time) int64 { return int64(now.Sub(t.epoch)) + 1 }

func (t *Tunnel) wake(p *peer, at time.Time) { t.ring(p, t.since(at)) }

// ring makes p's alarm ring at an instant at the latest.
func (t *Tunnel) ring(p *peer, at int64) {
	if a := p.alarm.Load(); a != 0 && a <= at {
		return
	}
	t.alarms.mu.Lock()
	defer t.alarms.mu.Unlock()
	if a := p.alarm.Load(); a != 0 && a <= at {
		return
	}
	p.alarm.Store(at)
	heap.Push(&t.alarms.heap, alarmEntry{at, p})
	if t.alarms.heap[0].peer == p {
		t.summon(t.alarms.poke)
	}
}

// due takes out the peers whose alarms ring, and says how long until the next;
// 0 when there is none.
func (a *alarms) due(now int64) (peers []*peer, next time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.heap) > 0 {
		e := a.heap[0]
		if e.peer.alarm.Load() != e.at {
			heap.Pop(&a.heap) // there was an earlier one since
			continue
		}
		if e.at > now {
			return peers, time.Duration(e.at - now)
		}
		heap.Pop(&a.heap)
		e.peer.alarm.Store(0)
		peers = append(peers, e.peer)
	}
	return peers, 0
}

// tend does what is due for a peer and sets its next alarm.
func (t *Tunnel) tend(p *peer) {
	if p.dead.Load() {
		return
	}
	now := time.Now()
	at := t.since(now)

	p.mu.Lock()
	s := p.current.Load()
	t.prune(p, now)
	again := p.begun != nil && !now.Before(p.retry)
	stuck := p.begun == nil && len(p.staged) > 0
	p.mu.Unlock()

	if owed := p.owed.Load(); owed != 0 && at >= owed+int64(keepaliveAfter) {
		p.owed.Store(0)
		if s != nil && s.usable(now) {
			t.keepalive(p, s)
		}
	}
	silent := false
	if since := p.unanswered.Load(); since != 0 && at >= since+int64(silenceAfter) {
		p.unanswered.Store(0)
		silent = true
	}
	switch {
	case again:
		t.begin(p, true)
	case silent || stuck:
		t.begin(p, false)
	}

	// The next one.
	if owed := p.owed.Load(); owed != 0 {
		t.ring(p, owed+int64(keepaliveAfter))
	}
	if since := p.unanswered.Load(); since != 0 {
		t.ring(p, since+int64(silenceAfter))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.begun != nil {
		t.wake(p, p.retry)
	} else if len(p.staged) > 0 {
		t.wake(p, now.Add(firstRetries[0]))
	}
	for _, s := range append([]*session{p.current.Load(), p.next}, p.old...) {
		if s != nil {
			t.wake(p, s.born.Add(rejectAfter))
		}
	}
}

// prune forgets sessions whose time is over. The caller holds p.mu.
func (t *Tunnel) prune(p *peer, now time.Time) {
	over := func(s *session) bool {
		if now.Sub(s.born) < rejectAfter {
			return false
		}
		t.dropIndex(s.index)
		return true
	}
	if s := p.current.Load(); s != nil && over(s) {
		p.current.Store(nil)
	}
	if p.next != nil && over(p.next) {
		p.next = nil
	}
	kept := p.old[:0]
	for _, s := range p.old {
		if !over(s) {
			kept = append(kept, s)
		}
	}
	clear(p.old[len(kept):])
	p.old = kept
}

const (
	// greetEvery is how often one peer is greeted at most.
	greetEvery = 5 * time.Second
	// maxGreeted bounds the peers whose last greeting is remembered; when
	// there are more nobody is greeted until some of it is over.
	maxGreeted = 1024
)

// greet begins a handshake with a peer that sends data of a session which we do
// not have: we were restarted, or let go of it as idle. WireGuard alone leaves
// such a peer talking to nobody for 15 seconds. The path says who it is, and
// may be wrong, so this is done rarely and costs the one greeted no more than
// any handshake does. Only the worker calls it.
func (t *Tunnel) greet(key identity.NodePublic) {
	now := time.Now()
	if last, ok := t.greeted[key]; ok && now.Sub(last) < greetEvery {
		return
	}
	if len(t.greeted) >= maxGreeted {
		for k, at := range t.greeted {
			if now.Sub(at) >= greetEvery {
				delete(t.greeted, k)
			}
		}
		if len(t.greeted) >= maxGreeted {
			return
		}
	}
	p, err := t.obtain(key, now)
	if err != nil {
		return
	}
	t.greeted[key] = now
	t.begin(p, false)
	t.stats.greeted.Add(1)
}
