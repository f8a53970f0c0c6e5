package errand

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// TestRuns checks that each Ask is followed by a run that began after it, that
// runs do not overlap, and that many calls may share one.
func TestRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inside, asked, seen, runs atomic.Int64
		e := New(func() {
			if inside.Add(1) != 1 {
				t.Error("two runs at once")
			}
			runs.Add(1)
			seen.Store(asked.Load())
			inside.Add(-1)
		})
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 1000 {
					asked.Add(1)
					e.Ask()
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if seen.Load() != 8000 {
			t.Errorf("the last run saw %d of 8000 calls", seen.Load())
		}
		if runs.Load() > 8000 {
			t.Errorf("%d runs for 8000 calls", runs.Load())
		}
		e.Close()
	})
}

func TestAskWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		var e *Errand
		e = New(func() {
			if runs++; runs < 3 {
				e.Ask()
			}
		})
		e.Ask()
		synctest.Wait()
		if runs != 3 {
			t.Errorf("%d runs, want 3", runs)
		}
	})
}

// TestClose checks that Close waits for the run under way and lets none begin.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		runs := 0
		e := New(func() {
			runs++
			<-release
		})
		e.Ask()
		synctest.Wait()
		e.Ask() // while it runs
		closed := make(chan struct{})
		go func() {
			e.Close()
			e.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Fatal("Close did not wait")
		default:
		}
		close(release)
		<-closed
		e.Ask()
		synctest.Wait()
		if runs != 1 {
			t.Errorf("%d runs, want 1", runs)
		}
	})
}
