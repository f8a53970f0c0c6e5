package server

import (
	"net/netip"
	"sync"
	"time"
)

// maxSources bounds how many source addresses the limiter remembers.
const maxSources = 4096

// limiter is a token bucket per source address. An IPv6 source is its /64. One
// is charged for every request of a stranger, another for refused registrations
// only.
type limiter struct {
	rate  float64
	burst float64
	now   func() time.Time

	mu      sync.Mutex // guards buckets
	buckets map[netip.Prefix]bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

func (l *limiter) init(rate float64, burst int, now func() time.Time) {
	l.rate, l.burst, l.now = rate, float64(burst), now
	l.buckets = make(map[netip.Prefix]bucket)
}

func source(a netip.Addr) netip.Prefix {
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits)
	return p
}

// fill returns the bucket of a source as it is now.
func (l *limiter) fill(p netip.Prefix, now time.Time) bucket {
	b, ok := l.buckets[p]
	if !ok {
		return bucket{l.burst, now}
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(l.burst, b.tokens+d.Seconds()*l.rate)
	}
	b.at = now
	return b
}

// size is how many sources are remembered.
func (l *limiter) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.buckets)
}

// ok reports whether the source may try.
func (l *limiter) ok(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fill(source(a), l.now()).tokens >= 1
}

// failed charges the source for one refusal.
func (l *limiter) failed(a netip.Addr) { l.take(a) }

// take charges the source for one request, and reports whether it had that.
func (l *limiter) take(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, now := source(a), l.now()
	b := l.fill(p, now)
	had := b.tokens >= 1
	b.tokens = max(0, b.tokens-1)
	if _, ok := l.buckets[p]; !ok && len(l.buckets) >= maxSources {
		l.evict(now)
	}
	l.buckets[p] = b
	return had
}

// evict forgets the source with the most tokens among a few arbitrary ones: the
// one whose bucket matters least.
func (l *limiter) evict(now time.Time) {
	const sample = 8
	var victim netip.Prefix
	most, seen := -1.0, 0
	for p := range l.buckets {
		if t := l.fill(p, now).tokens; t > most {
			victim, most = p, t
		}
		if seen++; seen == sample {
			break
		}
	}
	delete(l.buckets, victim)
}
