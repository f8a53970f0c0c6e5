package session

import (
	"encoding/json"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"mesh/control"
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

// A connection to the control server that brings nothing is asked at half the
// time, and no proof that the server is there when that is over.
func TestSilenceIsStale(t *testing.T) {
	const limit = time.Minute
	asked := 0
	s := &Session{cfg: Config{MaxStale: limit}, log: zap.NewNop(), turned: make(chan struct{}), disco: identity.NewDisco(), ask: func() { asked++ }}
	s.cfg.RelayOnly = true
	if err := s.startStack(); err != nil {
		t.Fatal(err)
	}
	defer s.stack.Close()
	client, err := control.New(control.Config{URL: "http://127.0.0.1:1", Machine: identity.NewMachine()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	e := &enrolment{cfg: s.cfg, client: client, state: identity.State{Node: identity.NewNode()}, savedAt: time.Now()}
	if err := s.startEngine(e); err != nil {
		t.Fatal(err)
	}
	defer s.closeEngine()
	m, _, err := netmap.Apply(nil, &wire.MapResponse{Node: &wire.Node{ID: 1, Key: identity.NewNode().Public()}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		old, next time.Duration
		asked     int
		stale     bool
	}{
		{0, limit / 8, 0, false},
		{limit/2 + 1, limit / 8, 1, false},
		{limit - 1, 2, 2, false},
		{limit + 1, limit / 8, 3, true},
		{limit + limit/4 - 1, staleLookLeast, 4, true},
		{2 * limit, limit / 8, 5, true},
		{0, limit / 8, 5, false},
	} {
		now := e.savedAt.Add(c.old)
		next := s.checkStale(e, m, now).Sub(now)
		if stale := errors.Is(s.isStale(), ErrStale); stale != c.stale || asked != c.asked || next != max(c.next, staleLookLeast) {
			t.Errorf("after %v: %v, asked %d times, looks again after %v", c.old, s.isStale(), asked, next)
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

// Until an administrator approves the node it is of no use, and says so; so it is
// when the approval is taken back.
func TestNotApproved(t *testing.T) {
	cfg := config(t)
	cfg.RelayOnly = true
	s := &Session{cfg: cfg, log: zap.NewNop(), up: make(chan struct{}), ended: make(chan struct{}), turned: make(chan struct{}), another: make(chan struct{})}
	if err := s.startStack(); err != nil {
		t.Fatal(err)
	}
	defer s.stack.Close()
	s.disco = identity.NewDisco()
	client, err := control.New(control.Config{URL: cfg.ControlURL, Machine: identity.NewMachine()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := s.startEngine(&enrolment{cfg: cfg, client: client, state: identity.State{Node: identity.NewNode()}}); err != nil {
		t.Fatal(err)
	}
	defer s.closeEngine()
	self := func(approved bool) *netmap.Map {
		m, _, err := netmap.Apply(nil, &wire.MapResponse{Node: &wire.Node{ID: 1, Key: identity.NewNode().Public(), MachineAuthorized: approved}})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	for range 2 {
		if s.admit(self(false)) || s.Starting().Control != ErrNotApproved.Error() {
			t.Errorf("not approved: %+v", s.Starting())
		}
	}
	if !s.admit(self(true)) || s.isBarred() != nil {
		t.Errorf("approved: %v", s.isBarred())
	}
	close(s.up)
	if s.admit(self(false)) || s.Status().Running || s.Status().Control != ErrNotApproved.Error() {
		t.Errorf("no longer approved: %+v", s.Status())
	}
}
