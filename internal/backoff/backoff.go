// Package backoff spaces out attempts at something that fails: further and
// further apart, never in step with others who fail alike, and as a server asks
// for.
package backoff

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

// Defaults of Backoff.
const (
	DefaultMin = 500 * time.Millisecond
	DefaultMax = 30 * time.Second
)

// maxRetryAfter is the longest wait that a server may ask for; what is longer
// is ignored, since it is a mistake or an attack.
const maxRetryAfter = time.Hour

// Backoff counts failures in a row. The zero value is ready to use; it belongs
// to one goroutine.
type Backoff struct {
	Min time.Duration // of the first wait before jitter; 0 = DefaultMin
	Max time.Duration // of any wait; 0 = DefaultMax

	failures int
}

// Next counts a failure and returns how long to wait: between half and all of
// Min, of twice Min, of four times Min, and so on, up to Max.
func (b *Backoff) Next() time.Duration {
	d, most := b.Min, b.Max
	if d <= 0 {
		d = DefaultMin
	}
	if most <= 0 {
		most = DefaultMax
	}
	for range b.failures {
		if d *= 2; d >= most {
			break
		}
	}
	d = min(d, most)
	b.failures++
	return d/2 + rand.N(d/2+1)
}

// Failures returns the number of failures since the last Reset.
func (b *Backoff) Failures() int { return b.failures }

// Reset forgets the failures, after a success.
func (b *Backoff) Reset() { b.failures = 0 }

// Wait counts a failure and waits: as long as Next says, or atLeast if that is
// longer, until ctx ends or now gives something. It returns ctx's cause with
// cause, the failure that led here, added; nil after the wait. atLeast is what
// a server asked for, 0 = nothing; now may be nil.
func (b *Backoff) Wait(ctx context.Context, atLeast time.Duration, now <-chan struct{}, cause error) error {
	t := time.NewTimer(max(b.Next(), atLeast))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-now:
		return nil
	case <-ctx.Done():
		if cause == nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w; last error: %w", context.Cause(ctx), cause)
	}
}

// RetryAfter reads the HTTP header of that name, seconds or a date, at the
// moment now. It is 0 for what is absent, malformed, past or over an hour. Some
// jitter is added, as all others were told the same.
func RetryAfter(header string, now time.Time) time.Duration {
	var d time.Duration
	if s, err := strconv.ParseUint(header, 10, 31); err == nil {
		d = time.Duration(s) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		d = at.Sub(now)
	}
	if d <= 0 || d > maxRetryAfter {
		return 0
	}
	return d + rand.N(d/4+1)
}
