package backoff

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNext(t *testing.T) {
	for _, b := range []Backoff{{}, {Min: time.Second, Max: 3 * time.Second}, {Min: time.Minute, Max: time.Second}, {Min: 1, Max: 1}} {
		least, most := b.Min, b.Max
		if least == 0 {
			least, most = DefaultMin, DefaultMax
		}
		for i := range 100 {
			want := most
			if i < 20 {
				want = min(least<<i, most)
			}
			if d := b.Next(); d < want/2 || d > want {
				t.Fatalf("%v, wait %d: %v, want %v to %v", b, i, d, want/2, want)
			}
		}
		if b.Failures() != 100 {
			t.Errorf("%d failures", b.Failures())
		}
		b.Reset()
		if d := b.Next(); d > min(least, most) {
			t.Errorf("after Reset: %v", d)
		}
	}
}

func TestJitter(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 100 {
		var b Backoff
		seen[b.Next()] = true
	}
	if len(seen) < 50 {
		t.Errorf("only %d different waits", len(seen))
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Backoff
		start := time.Now()
		if err := b.Wait(t.Context(), 0, nil, nil); err != nil {
			t.Error(err)
		}
		if d := time.Since(start); d < DefaultMin/2 || d > DefaultMin {
			t.Errorf("waited %v", d)
		}
		start = time.Now()
		if b.Wait(t.Context(), time.Minute, nil, nil); time.Since(start) != time.Minute {
			t.Errorf("waited %v, a server asked for a minute", time.Since(start))
		}
		now := make(chan struct{}, 1)
		now <- struct{}{}
		start = time.Now()
		if err := b.Wait(t.Context(), time.Minute, now, nil); err != nil || time.Since(start) != 0 {
			t.Errorf("waited %v in spite of a reason to go on: %v", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		broken := errors.New("line is dead")
		start = time.Now()
		err := b.Wait(ctx, time.Hour, nil, broken)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, broken) || time.Since(start) != time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		if err := b.Wait(ctx, 0, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "0": 0, "-1": 0, "3600": time.Hour, "3601": 0, "99999999999999999999": 0, "soon": 0, "1.5": 0,
		"Fri, 01 May 2026 12:00:30 GMT": 30 * time.Second, "Fri, 01 May 2026 11:00:00 GMT": 0, "Fri, 01 May 2027 11:00:00 GMT": 0,
	} {
		if d := RetryAfter(header, now); d < want || d > want+want/4 {
			t.Errorf("%q: %v, want %v", header, d, want)
		}
	}
}
