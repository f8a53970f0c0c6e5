package netmap

import (
	"testing"
	"time"

	"mesh/control/wire"
)

// Keys expire by the clock of control, which set the expiry, but not by one that
// cannot be right.
func TestExpiryByWhichClock(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.DateOnly, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, tt := range []struct {
		name, local, control, expiry string
		expired                      bool
		next                         string // by the local clock; "" = never
	}{
		{"both right, before", "2026-05-01", "2026-05-01", "2026-06-01", false, "2026-06-01"},
		{"both right, after", "2026-06-02", "2026-06-02", "2026-06-01", true, ""},
		{"control of 2020, before", "2026-05-01", "2020-01-01", "2026-06-01", false, "2026-06-01"},
		{"control of 2020, after", "2026-06-02", "2020-01-01", "2026-06-01", true, ""},
		{"we are of 1970, before", "1970-01-01", "2026-05-01", "2026-05-03", false, "1970-01-03"},
		{"we are of 1970, after", "1970-01-01", "2026-06-02", "2026-06-01", true, ""},
		{"we are ahead, before", "2036-05-01", "2026-05-01", "2026-05-03", false, "2036-05-03"},
		{"nobody can be right", "1970-01-01", "1999-01-01", "1998-01-01", false, ""},
		{"nobody can be right, later", "1970-01-01", "1999-01-01", "2026-01-01", false, ""},
		{"absurd expiry", "2026-05-01", "2026-05-01", "1970-05-01", false, ""},
		{"control does not say", "2026-06-02", "", "2026-06-01", true, ""},
	} {
		n := node(2)
		n.KeyExpiry = at(tt.expiry)
		r := first(node(1), n)
		now := at(tt.local)
		if tt.control != "" {
			control := at(tt.control)
			r.ControlTime = &control
		}
		m, _, err := ApplyAt(nil, r, now)
		if err != nil {
			t.Fatal(err)
		}
		p, _ := m.PeerByID(2)
		if m.Expired(p.Node, now) != tt.expired {
			t.Errorf("%s: expired %v", tt.name, !tt.expired)
		}
		want := time.Time{}
		if tt.next != "" {
			want = at(tt.next)
		}
		if next := m.NextExpiry(now); !next.Equal(want) {
			t.Errorf("%s: next %v, want %v", tt.name, next, want)
		}
		marked := m.Expire(now)
		p, ok := marked.PeerByID(2)
		if !ok || p.Expired != tt.expired || (marked != m) != tt.expired || marked.Expire(now) != marked {
			t.Errorf("%s: marked %v", tt.name, p.Expired)
		}
	}
}

func TestExpire(t *testing.T) {
	n := node(2)
	n.KeyExpiry = start.Add(time.Minute)
	m, _ := apply(t, nil, first(node(1), n, node(3)))
	later := m.Expire(start.Add(time.Minute))
	d := Rebase(m, later)
	if len(d.Changed) != 1 || d.Changed[0].New.ID != 2 || !d.Changed[0].New.Expired || d.Changed[0].Old.Expired || d.Filter || d.Self || len(d.Added)+len(d.Removed) != 0 {
		t.Errorf("%+v", d)
	}
	if p, _ := m.PeerByID(2); p.Expired {
		t.Error("the first map changed")
	}
	if p, ok := later.PeerByName("n2"); !ok || p.ID != 2 {
		t.Error("the expired peer has no name any more")
	}
	// A new key ends it.
	renewed := start.Add(time.Hour)
	next, _ := apply(t, m, &wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, KeyExpiry: &renewed}}})
	if next.Expire(start.Add(time.Minute)) != next {
		t.Error("still expired with another expiry")
	}
}
