package server

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// A suspended user's nodes are out at once, all of them and nobody else's, no
// way back in is open, and they are what they were when the user is resumed,
// also if the server was started anew meanwhile.
func TestSuspend(t *testing.T) {
	bubble(t, withLogin, func(t *testing.T, w *world) {
		w.setPolicy(changePolicy)
		alice := w.user("alice")
		reusable := w.key(store.Key{User: alice.ID, Reusable: true})
		a, a2, b := w.machine().join(reusable), w.machine().join(reusable), w.tagged("tag:b", "b")
		na, na2, nb := a.poll(nil), a2.poll(nil), b.poll(nil)
		one, two := na.self.ID, na2.self.ID
		nb.until(t, "both", func() bool { return nb.peers[one] != nil && nb.peers[two] != nil })
		codes := make(chan wire.ErrorCode, 2)
		go func() { codes <- na.end(t) }()
		go func() { codes <- na2.end(t) }()

		if err := w.s.SuspendUser(t.Context(), "test", "Alice", true); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "the suspension", func() bool { return nb.peers[one].Expired && nb.peers[two].Expired })
		nb.until(t, "a filter without them", func() bool { return !sourced(nb.filter, na.self) && !sourced(nb.filter, na2.self) })
		for range 2 {
			if code := <-codes; code != wire.CodeUserSuspended {
				t.Errorf("a stream ended with %q", code)
			}
		}
		refused := func() {
			t.Helper()
			if w.s.Admit(a.key.Public()) || slices.Contains(w.s.Members(), a.key.Public()) || !w.s.Admit(b.key.Public()) {
				t.Error("relays admit it, or not the other")
			}
			if status, code := a.lite(nil); status != 403 || code != wire.CodeUserSuspended {
				t.Errorf("its update: %d %s", status, code)
			}
			a.refused(a.registerRequest(""), wire.CodeUserSuspended)
			fresh := w.machine()
			fresh.refused(fresh.registerRequest(reusable), wire.CodeUserSuspended)
			rotated := a.clone()
			rotated.key = identity.NewNode()
			req := rotated.registerRequest("")
			req.OldNodeKey = a.key.Public()
			rotated.refused(req, wire.CodeUserSuspended)
			if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Time{}); err != nil {
				t.Fatal(err)
			}
			if w.s.Admit(a.key.Public()) {
				t.Error("an expiry to come brings a suspended node back")
			}
			ask := w.machine()
			resp, err := ask.register(ask.registerRequest(""))
			if err != nil || resp.AuthURL == "" {
				t.Fatalf("login: %+v %v", resp, err)
			}
			if _, err := w.s.ApproveLogin(t.Context(), "test", resp.AuthURL, "alice", nil); !errors.Is(err, store.ErrConflict) {
				t.Errorf("approval for a suspended user: %v", err)
			}
			if err := w.s.SetOwner(t.Context(), "test", "b", "alice", nil); !errors.Is(err, store.ErrConflict) {
				t.Errorf("node given to a suspended user: %v", err)
			}
		}
		refused()
		// A policy that comes now does not let them in either.
		w.setPolicy(changePolicy + " ")
		w.stop()
		w.start(withLogin)
		b.clone()
		a, a2, b = a.clone(), a2.clone(), b.clone()
		nb = b.poll(nil)
		if sourced(nb.filter, na.self) {
			t.Error("after a restart the filter lets it in")
		}
		refused()

		// One of them is given to tags: no business of alice's any more.
		if err := w.s.SetOwner(t.Context(), "test", "agent-1", "", []string{"tag:b"}); err != nil {
			t.Fatal(err)
		}
		if !w.s.Admit(a2.key.Public()) {
			t.Error("a node with tags stays suspended with its former user")
		}
		if err := w.s.SuspendUser(t.Context(), "test", "alice", false); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "its return", func() bool { return nb.peers[one] != nil && !nb.peers[one].Expired && sourced(nb.filter, na.self) })
		if na = a.poll(nil); na.self.Expired || na.self.ID != one {
			t.Errorf("after it: %+v", na.self)
		}
		w.machine().join(reusable)
	})
}

func TestSuspendAdmin(t *testing.T) {
	w := newWorld(t, nil)
	w.setPolicy(changePolicy)
	w.user("alice")
	c := w.admin()
	if _, err := c.SuspendUser(t.Context(), "bob", 0); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("unknown user: %v", err)
	}
	u := must[admin.User](t)(c.SuspendUser(t.Context(), "alice", 0))
	if u.Suspended.IsZero() || u.Applied != nil {
		t.Errorf("suspended: %+v", u)
	}
	if _, err := c.CreateKey(t.Context(), admin.KeyCreate{User: "alice"}); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("key for a suspended user: %v", err)
	}
	if u := must[admin.User](t)(c.ResumeUser(t.Context(), "alice")); !u.Suspended.IsZero() {
		t.Errorf("resumed: %+v", u)
	}
	if _, err := c.SuspendUser(t.Context(), "alice", time.Hour); !errors.Is(err, admin.ErrInvalid) {
		t.Errorf("an hour's wait: %v", err)
	}
}

// An administrator who waits learns when each connected node that could see what
// was withdrawn has that in force, who has not, and who does not say.
func TestWaitUntilApplied(t *testing.T) {
	w := newWorld(t, nil)
	w.setPolicy(changePolicy)
	alice := w.user("alice")
	key := w.key(store.Key{User: alice.ID, Reusable: true})
	a := w.machine().join(key)
	b, stock := w.tagged("tag:b", "b"), w.tagged("tag:b", "stock")
	b2 := w.tagged("tag:b", "b2")
	na := a.poll(nil)
	reports := func(r *wire.MapRequest) { r.MeshReports = true }
	nb, nb2, ns := b.poll(reports), b2.poll(reports), stock.poll(nil)
	c := w.admin()

	type answer struct {
		told *admin.Applied
		err  error
	}
	ask := func(limit time.Duration) chan answer {
		out := make(chan answer, 1)
		go func() {
			n, err := c.ExpireNodeAndWait(context.Background(), "agent", admin.NodeExpire{}, limit)
			out <- answer{n.Applied, err}
		}()
		return out
	}
	version := func(n *netmap, before int64) (v int64) {
		n.until(t, "the question", func() bool {
			v = max(v, n.last.MeshMapVersion)
			return v > before && n.peers[na.self.ID].Expired
		})
		return v
	}
	got := ask(20 * time.Second)
	v := version(nb, 0)
	b.lite(func(r *wire.MapRequest) { r.MeshMapVersion = v - 1 }) // an older one does not count
	b.lite(func(r *wire.MapRequest) { r.MeshMapVersion = v })
	// The other loses its connection before it can tell, and is asked again.
	version(nb2, 0)
	nb2.cancel()
	nb2 = b2.poll(reports)
	if again := nb2.last.MeshMapVersion; again != v {
		t.Errorf("a node that connects anew is asked for %d, want %d", again, v)
	}
	select {
	case r := <-got:
		t.Fatalf("answer before all have it: %+v", r)
	default:
	}
	b2.lite(func(r *wire.MapRequest) { r.MeshMapVersion = v })
	r := <-got
	if r.err != nil || r.told.Peers != 2 || r.told.Applied != 2 || r.told.Mute != 1 || len(r.told.Missing) != 0 || r.told.SlowestNode != "b2" || r.told.Slowest <= 0 {
		t.Errorf("all have it: %+v, %v", r.told, r.err)
	}
	ns.until(t, "the expiry", func() bool { return ns.peers[na.self.ID].Expired })
	if ns.last.MeshMapVersion != 0 {
		t.Error("a node that does not say was asked")
	}

	// Who does not answer is named.
	if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Time{}); err != nil {
		t.Fatal(err)
	}
	got = ask(200 * time.Millisecond)
	v = version(nb, v)
	if r := <-got; r.err != nil || r.told.Peers != 2 || r.told.Applied != 0 || !slices.Equal(r.told.Missing, []string{"agent-1", "agent-2"}) {
		t.Errorf("nobody has it: %+v, %v", r.told, r.err)
	}
	w.s.mu.Lock()
	if len(w.s.receipts.open) != 0 {
		t.Errorf("%d receipts are kept", len(w.s.receipts.open))
	}
	w.s.mu.Unlock()
	// Who is removed meanwhile is not waited for.
	if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Time{}); err != nil {
		t.Fatal(err)
	}
	got = ask(20 * time.Second)
	v = version(nb, v)
	b.lite(func(r *wire.MapRequest) { r.MeshMapVersion = v })
	if err := c.RemoveNode(t.Context(), "agent-2"); err != nil {
		t.Fatal(err)
	}
	if r := <-got; r.err != nil || r.told.Applied != 1 || r.told.Peers != 1 || len(r.told.Missing) != 0 {
		t.Errorf("with one removed: %+v, %v", r.told, r.err)
	}
	// Without a wait nobody is asked.
	if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Time{}); err != nil {
		t.Fatal(err)
	}
	asked := false
	nb.until(t, "the return", func() bool {
		asked = asked || nb.last.MeshMapVersion > v
		return !nb.peers[na.self.ID].Expired
	})
	if asked {
		t.Error("asked although nobody waits")
	}
}

// A key can be revoked alone, or with the nodes that came with it.
func TestRevokeKeyAndNodes(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	leaked, other := w.key(store.Key{Reusable: true}), w.key(store.Key{Reusable: true})
	a, b, c := w.machine().join(leaked), w.machine().join(leaked), w.machine().join(other)
	nc := c.poll(nil)
	cl := w.admin()
	must[admin.Key](t)(cl.RevokeKey(t.Context(), 1))
	if !w.s.Admit(a.key.Public()) {
		t.Fatal("a node went with its key")
	}
	k := must[admin.Key](t)(cl.RevokeKeyAndNodes(t.Context(), 1, 10*time.Second))
	if k.State != "revoked" || !slices.Equal(k.Removed, []string{"agent", "agent-1"}) || k.Applied == nil || k.Applied.Mute != 1 {
		t.Errorf("revoked: %+v", k)
	}
	nc.until(t, "both gone", func() bool { return len(nc.peers) == 0 })
	if w.s.Admit(a.key.Public()) || w.s.Admit(b.key.Public()) || !w.s.Admit(c.key.Public()) {
		t.Error("who was to go stays, or the other way round")
	}
	a.refused(a.registerRequest(leaked), wire.CodeNodeRevoked)
	fresh := w.machine()
	fresh.refused(fresh.registerRequest(leaked), wire.CodeAuthKeyRevoked)
}
