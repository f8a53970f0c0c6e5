package server

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"
)

// Streams speak at once as long as the server keeps up. When it does not, those
// that have spoken often wait longer, so that what happens meanwhile goes out
// together: the work of a burst is then bounded by its length, not by what
// happens in it.
const (
	// A stream may speak burstMessages times in a row, and messageRate times a
	// second in the long run, without being held back.
	burstMessages = 8
	messageRate   = 4.0
	// The others are held back for so many times the present lag, up to
	// maxHold.
	holdLags = 4
	maxHold  = time.Second
	// lagWeight is the share of one message in the present lag.
	lagWeight = 1.0 / 64
)

// pace decides when streams speak.
type pace struct {
	// turns has a token for each stream that looks at the working set. There
	// are few, so that others who need it do not wait behind a thousand
	// streams.
	turns chan struct{}
	lag   atomic.Int64 // how late messages are at present, in ns
}

func (p *pace) init() { p.turns = make(chan struct{}, max(2, runtime.GOMAXPROCS(0)/2)) }

// turn waits for a turn. done must be called after it.
func (p *pace) turn(ctx context.Context) error {
	select {
	case p.turns <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *pace) done() { <-p.turns }

// late notes how late a message was.
func (p *pace) late(d time.Duration) {
	lag := p.lag.Load()
	// What is lost when two do it at once does not matter.
	p.lag.Store(lag + int64(lagWeight*float64(min(d, maxHold)-time.Duration(lag))))
}

// hold returns how long a stream waits before its next message.
func (p *pace) hold(b *bucket, now time.Time) time.Duration {
	if b.at.IsZero() {
		*b = bucket{burstMessages, now}
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(burstMessages, b.tokens+messageRate*d.Seconds())
		b.at = now
	}
	if b.tokens >= 1 {
		b.tokens--
		return 0
	}
	b.tokens = max(b.tokens-1, -1)
	return min(holdLags*time.Duration(p.lag.Load()), maxHold)
}
