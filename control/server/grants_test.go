package server

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
)

const grantPolicy = `{` + owners + `,"acls":[{"action":"accept","src":["tag:c"],"dst":["tag:c:1"]}]}`

// opens counts the ports that a filter opens, with one address each.
func opens(n *netmap) (ports int) {
	for _, r := range n.filter {
		ports += len(r.DstPorts)
	}
	return ports / 2 // IPv4 and IPv6
}

func minutes(n int) time.Duration { return time.Duration(n) * time.Minute }

// A grant is in force at once, is withdrawn when its time is over, and nobody
// else hears of it.
func TestGrantEndsInTime(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.setPolicy(grantPolicy)
		a, b, c := w.tagged("tag:a", "a"), w.tagged("tag:b", "b"), w.tagged("tag:c", "c")
		na, nb, nc := a.poll(nil), b.poll(nil), c.poll(nil)
		start := time.Now()
		g, err := w.s.AddGrant(t.Context(), "admin", admin.GrantAdd{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"tcp:5432"}, For: time.Hour, Reason: "repair"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.s.AddGrant(t.Context(), "admin", admin.GrantAdd{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"tcp:80"}, For: minutes(30)}); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "the grants", func() bool { return opens(nb) == 2 && len(nb.peers) == 1 })
		na.until(t, "its peer", func() bool { return len(na.peers) == 1 })
		if d := time.Since(start); d > time.Second {
			t.Errorf("pushed after %v", d)
		}
		if o := nb.filter[0].MeshOrigins; len(o) == 0 || o[0][0].Rule != "temp[1]" {
			t.Errorf("origins: %v", o)
		}
		if got := w.mark(7, nc)[0]; got != 1 || len(nc.peers) != 0 {
			t.Errorf("a node that no grant names got %d messages", got)
		}
		na.cancel()
		nc.cancel()
		nb.until(t, "the end of one", func() bool { return opens(nb) == 1 })
		if d := time.Since(start); d < minutes(30) || d > minutes(30)+time.Second {
			t.Errorf("the shorter one was withdrawn after %v", d)
		}
		nb.until(t, "the end of the other", func() bool { return len(nb.filter) == 0 && len(nb.peers) == 0 })
		if d := time.Since(start); d < time.Hour || d > time.Hour+time.Second {
			t.Errorf("withdrawn after %v", d)
		}
		ended, err := w.store.Grants(t.Context(), true, 10)
		if err != nil || len(ended) != 2 || ended[0].ID != g.ID || ended[0].Why != "over" || ended[0].EndedBy != "server" {
			t.Errorf("on record: %+v, %v", ended, err)
		}
	})
}

// A restart of the server neither ends a grant nor prolongs it.
func TestGrantSurvivesRestart(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.setPolicy(grantPolicy)
		b := w.tagged("tag:b", "b")
		w.tagged("tag:a", "a")
		start := time.Now()
		add := func(port string, life time.Duration) {
			_, err := w.s.AddGrant(t.Context(), "admin", admin.GrantAdd{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{port}, For: life})
			if err != nil {
				t.Fatal(err)
			}
		}
		add("1", time.Hour)
		add("2", minutes(10))
		b.close()
		w.stop()
		time.Sleep(minutes(20))
		w.start(nil)
		b.connect()
		nb := b.poll(nil)
		if len(nb.filter) != 1 {
			t.Fatalf("after the restart: %v", nb.filter)
		}
		nb.until(t, "the end", func() bool { return len(nb.filter) == 0 })
		if d := time.Since(start); d < time.Hour || d > time.Hour+time.Second {
			t.Errorf("withdrawn after %v", d)
		}
		ended, err := w.store.Grants(t.Context(), true, 10)
		if err != nil || len(ended) != 2 || ended[0].Why != "over" || ended[1].Why != "over" {
			t.Errorf("on record: %+v, %v", ended, err)
		}
	})
}

func TestGrantsByHand(t *testing.T) {
	w := newWorld(t, nil)
	c := w.admin()
	ctx := t.Context()
	add := func(src, dst, ip string) (admin.Grant, error) {
		return c.AddGrant(ctx, admin.GrantAdd{Src: []string{src}, Dst: []string{dst}, IP: []string{ip}, For: time.Hour})
	}
	if _, err := add("tag:a", "tag:b", "22"); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "no policy") {
		t.Errorf("without a policy: %v", err)
	}
	w.setPolicy(grantPolicy)
	a, b := w.tagged("tag:a", "a"), w.tagged("tag:b", "b")
	na, nb := a.poll(nil), b.poll(nil)
	for _, bad := range []admin.GrantAdd{
		{Src: []string{"tag:x"}, Dst: []string{"tag:b"}, IP: []string{"22"}, For: 1},
		{Src: []string{"tag:a"}, Dst: []string{"nobody"}, IP: []string{"22"}, For: 1},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"70000"}, For: 1},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, For: 1},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"22"}},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"22"}, For: -1},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"22"}, For: 1000 * 24 * time.Hour},
		{Src: []string{"tag:a"}, Dst: []string{"tag:b"}, IP: []string{"22"}, For: 1, Reason: "a\nb"},
		{Src: make([]string, 101), Dst: []string{"tag:b"}, IP: []string{"22"}, For: 1},
	} {
		if _, err := c.AddGrant(ctx, bad); !errors.Is(err, admin.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	// Nodes are named by address, and the grant goes with the node.
	g := must[admin.Grant](t)(add("a", "b.mesh.internal", "tcp:22"))
	if len(g.Src) != 2 || len(g.Dst) != 2 || g.From[0] != "a" {
		t.Errorf("grant: %+v", g)
	}
	h := must[admin.Grant](t)(add("tag:a", "tag:b", "tcp:23"))
	nb.until(t, "both", func() bool { return sourced(nb.filter, na.self) && len(nb.filter) == 2 })
	if list := must[[]admin.Grant](t)(c.Grants(ctx, false)); len(list) != 2 {
		t.Errorf("grants: %+v", list)
	}
	if over := must[admin.Grant](t)(c.RevokeGrant(ctx, h.ID)); over.Why != "revoked" {
		t.Errorf("revoked: %+v", over)
	}
	nb.until(t, "one", func() bool { return len(nb.filter) == 1 })
	if _, err := c.RevokeGrant(ctx, h.ID); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("revoked twice: %v", err)
	}
	if _, err := c.RevokeGrant(ctx, 99); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("no such grant: %v", err)
	}
	// A policy edit keeps what is granted, and one that does not know the
	// grant's tags is refused.
	third := must[admin.Grant](t)(add("tag:a", "tag:b", "tcp:24"))
	w.setPolicy(grantPolicy + "\n")
	if _, err := c.SetPolicy(ctx, admin.PolicySet{Text: `{"acls":[]}`}); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "revoke") {
		t.Errorf("a policy without the tags of a grant: %v", err)
	}
	if err := w.s.RemoveNode(ctx, "admin", "a"); err != nil {
		t.Fatal(err)
	}
	nb.until(t, "no rule for the removed node", func() bool { return !sourced(nb.filter, na.self) && len(nb.peers) == 0 })
	list := must[[]admin.Grant](t)(c.Grants(ctx, true))
	if len(list) != 3 || list[0].Why != "a node that it names was removed" || list[2].ID != third.ID || !list[2].Ended.IsZero() {
		t.Errorf("after the removal: %+v", list)
	}
	log := must[[]admin.AuditEntry](t)(c.Audit(ctx, time.Time{}, 0))
	count := map[string]int{}
	for _, e := range log {
		count[e.Action]++
	}
	if count["grant.add"] != 3 || count["grant.end"] != 2 {
		t.Errorf("on record: %v", count)
	}
}

// fullStore cannot put the end of a grant on record while it is full.
type fullStore struct {
	store.Store
	full atomic.Bool
}

func (s *fullStore) EndGrant(ctx context.Context, by string, id int64, why string, now time.Time) (store.Grant, error) {
	if s.full.Load() {
		return store.Grant{}, store.ErrFull
	}
	return s.Store.EndGrant(ctx, by, id, why, now)
}

// A grant to a user's name ends in time also if the disk is full, and goes on
// record when that is over.
func TestGrantEndsOnFullDisk(t *testing.T) {
	full := new(fullStore)
	bubble(t, func(c *Config) { full.Store, c.Store = c.Store, full }, func(t *testing.T, w *world) {
		w.setPolicy(grantPolicy)
		alice := w.user("alice")
		b := w.tagged("tag:b", "b")
		w.machine().join(w.key(store.Key{User: alice.ID}))
		nb := b.poll(nil)
		_, err := w.s.AddGrant(t.Context(), "admin", admin.GrantAdd{Src: []string{"alice@"}, Dst: []string{"b"}, IP: []string{"22"}, For: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		nb.until(t, "the grant", func() bool { return len(nb.filter) == 1 })
		full.full.Store(true)
		start := time.Now()
		nb.until(t, "the end", func() bool { return len(nb.filter) == 0 })
		if d := time.Since(start); d > time.Hour+time.Second {
			t.Errorf("withdrawn after %v", d)
		}
		if in, _ := w.store.Grants(t.Context(), false, 0); len(in) != 1 {
			t.Errorf("on record: %+v", in)
		}
		full.full.Store(false)
		time.Sleep(endRetry + time.Second)
		if in, _ := w.store.Grants(t.Context(), false, 0); len(in) != 0 {
			t.Errorf("later on record: %+v", in)
		}
	})
}
