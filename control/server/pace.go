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
	// The others are held back for so many times the present lag, and for as many
	// times Config.Gather as gatherStreams go into those that are open: what all of
	// them hear of all the time takes a bounded share of a processor. Neither is
	// more than maxHold.
	holdLags      = 4
	gatherStreams = 64
	maxHold       = time.Second
	// lagWeight is the share of one message in the present lag.
	lagWeight = 1.0 / 64
)

// pace decides when streams speak.
type pace struct {
	// There are few turns at the working set, so that others who need it do not
	// wait behind a thousand streams. Streams that begin have turns of their
	// own: who comes does not wait for what the others still have to hear.
	begin, speak turns
	each         time.Duration // how long to hold for each stream that is open
	open         atomic.Int64  // streams
	lag          atomic.Int64  // how late messages are at present, in ns
}

func (p *pace) init(gather time.Duration) {
	p.each = gather / gatherStreams
	n := max(2, runtime.GOMAXPROCS(0)/2)
	p.begin, p.speak = make(turns, n), make(turns, n)
}

// turns has a token for each stream whose turn it is.
type turns chan struct{}

// take waits for a turn. done must be called after it.
func (t turns) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turns) done() { <-t }

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
	return min(max(holdLags*time.Duration(p.lag.Load()), p.each*time.Duration(p.open.Load())), maxHold)
}
