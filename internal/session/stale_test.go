package session

import (
	"encoding/json"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

// The age of what a node knows grows while the machine sleeps, and when the clock
// was put back.
func TestAge(t *testing.T) {
	then := time.Now()
	for _, c := range []struct {
		now  time.Time
		want time.Duration
	}{
		{then.Add(time.Hour), time.Hour},
		{then.Add(time.Minute).Round(0), time.Minute},
		{then.Round(0).Add(-time.Hour), -time.Hour}, // nothing better is known
	} {
		if got := age(then, c.now); got != c.want {
			t.Errorf("%v, want %v", got, c.want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		then := time.Now()
		time.Sleep(time.Hour)
		if got := age(then, time.Now()); got != time.Hour {
			t.Error(got)
		}
		saved := then.Round(0).Add(-24 * time.Hour) // by a process before
		if got := age(saved, time.Now()); got != 25*time.Hour {
			t.Error(got)
		}
	})
}

func TestMaxStale(t *testing.T) {
	for _, c := range []struct {
		own   time.Duration
		attrs []string
		want  time.Duration
	}{
		{0, nil, 0},
		{time.Hour, nil, time.Hour},
		{time.Hour, []string{"max-stale:30m", "max-stale:2h"}, 30 * time.Minute},
		{time.Minute, []string{"max-stale:30m"}, time.Minute},
		{0, []string{"max-stale:1d", "max-stale:never"}, 24 * time.Hour},
		{time.Hour, []string{"max-stale:never", "max-stale:nonsense"}, time.Hour},
	} {
		caps := map[string][]json.RawMessage{}
		for _, a := range c.attrs {
			caps[a] = nil
		}
		m, _, err := netmap.Apply(nil, &wire.MapResponse{Node: &wire.Node{ID: 1, Key: identity.NewNode().Public(), CapMap: caps}})
		if err != nil {
			t.Fatal(err)
		}
		s := &Session{cfg: Config{MaxStale: c.own}}
		if got := s.maxStale(m); got != c.want {
			t.Errorf("%v %v: %v", c.own, c.attrs, got)
		}
	}
}

// Who is cut off hears it at once; listeners stay.
func TestWaitWhileStale(t *testing.T) {
	s := &Session{up: make(chan struct{}), ended: make(chan struct{}), turned: make(chan struct{})}
	close(s.up)
	s.stale = ErrStale
	if err := s.Wait(t.Context()); !errors.Is(err, ErrStale) {
		t.Errorf("%v", err)
	}
	if err := s.WaitStack(t.Context()); err != nil {
		t.Errorf("listen: %v", err)
	}
	s.stale = nil
	if err := s.Wait(t.Context()); err != nil {
		t.Errorf("%v", err)
	}
	// And who waits for an administrator says so.
	s = &Session{up: make(chan struct{}), ended: make(chan struct{}), turned: make(chan struct{}), barred: ErrNotApproved}
	if st := s.Starting(); st.Control != ErrNotApproved.Error() {
		t.Errorf("%+v", st)
	}
	synctest.Test(t, func(t *testing.T) {
		if err := s.stillWaiting(errors.New("time is up")); !errors.Is(err, ErrNotApproved) {
			t.Errorf("%v", err)
		}
	})
}
