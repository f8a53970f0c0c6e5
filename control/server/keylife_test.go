package server

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// rotate makes m another key, as nodes of ours do: the former one goes on.
func (m *machine) rotate(authKey string) (*wire.RegisterResponse, error) {
	old := m.key.Public()
	m.key = identity.NewNode()
	req := m.registerRequest(authKey)
	req.OldNodeKey, req.MeshKeeps = old, true
	return m.register(req)
}

// The server starts again while a former key goes on: that is a member for the
// rest of its time, and that of a node which did not ask for it is not.
func TestFormerKeyOutlivesServer(t *testing.T) {
	w := newWorld(t, nil)
	key := w.key(store.Key{Reusable: true, NodeExpiry: 30 * 24 * time.Hour})
	a, b := w.machine().join(key), w.machine().join(key)
	kept, dead := a.key.Public(), b.key.Public()
	if resp, err := a.rotate(""); err != nil || !resp.MachineAuthorized {
		t.Fatalf("rotate: %+v %v", resp, err)
	}
	b.key = identity.NewNode()
	req := b.registerRequest("")
	req.OldNodeKey = dead
	if resp, err := b.register(req); err != nil || !resp.MachineAuthorized {
		t.Fatalf("rotate: %+v %v", resp, err)
	}
	w.stop()
	w.start(nil)
	if !w.s.Admit(kept) || !w.s.Admit(a.key.Public()) || !w.s.Admit(b.key.Public()) || w.s.Admit(dead) {
		t.Errorf("members: %v", w.s.Members())
	}
	w.stop()
	w.start(func(c *Config) { c.Now = func() time.Time { return time.Now().Add(wire.KeptKeyFor) } })
	if w.s.Admit(kept) || !w.s.Admit(a.key.Public()) {
		t.Errorf("members after a while: %v", w.s.Members())
	}
}

// A node makes itself another key while the former one is good: that stays a
// member for a while, and peers hear of the new one when the node is there with
// it.
func TestKeyIsReplacedBeforeItEnds(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true, NodeExpiry: 30 * 24 * time.Hour})
		a, b := w.machine().join(key), w.machine().join(key)
		na, nb := a.poll(nil), b.poll(nil)
		id, first, old := na.self.ID, na.self.KeyExpiry, a.key.Public()
		renew := *na.self.MeshRenew
		if life := time.Until(renew); life > 20*24*time.Hour || life < 17*24*time.Hour {
			t.Errorf("to be renewed after %v of 30 days", life)
		}
		time.Sleep(time.Until(renew))
		na.cancel()
		if resp, err := a.rotate(""); err != nil || !resp.MachineAuthorized {
			t.Fatalf("rotate: %+v %v", resp, err)
		}
		synctest.Wait()
		if !w.s.Admit(old) || !w.s.Admit(a.key.Public()) || len(w.s.Members()) != 3 {
			t.Error("not both keys are members")
		}
		seen := nb.count
		na = a.poll(nil)
		nb.until(t, "the new key", func() bool { return nb.peers[id].Key == a.key.Public() })
		if nb.count == seen {
			t.Error("peers heard of the key before the node was there")
		}
		if na.self.Key != a.key.Public() || !na.self.KeyExpiry.After(first) || !na.self.MeshRenew.After(time.Now()) {
			t.Errorf("self %+v", na.self)
		}
		time.Sleep(wire.KeptKeyFor)
		synctest.Wait()
		if w.s.Admit(old) || !w.s.Admit(a.key.Public()) || slices.Contains(w.s.Members(), old) {
			t.Error("the former key is a member for ever")
		}
		// And a removal ends both at once.
		na.cancel()
		second := a.key.Public()
		if _, err := a.rotate(""); err != nil {
			t.Fatal(err)
		}
		w.s.opMu.Lock()
		if err := w.s.remove(context.Background(), "test", id, true); err != nil {
			t.Error(err)
		}
		w.s.opMu.Unlock()
		if w.s.Admit(second) || w.s.Admit(a.key.Public()) {
			t.Error("a key of a removed node is a member")
		}
	})
}

// Who may put an expiry off, and by how much.
func TestWhoRenews(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name     string
		key      store.Key
		policy   string
		then     func(*testing.T, *world, string)
		life     time.Duration // 0 = for ever
		renewals bool
	}{
		{name: "tags", key: store.Key{}},
		{name: "a user's", key: store.Key{User: 1}, life: 90 * day, renewals: true},
		{name: "as the auth key says", key: store.Key{NodeExpiry: day}, life: day, renewals: true},
		{name: "as the policy says", policy: `"target": ["tag:a"], "attr": ["key-expiry:2d"]`, life: 2 * day, renewals: true},
		{name: "the auth key before the policy", key: store.Key{NodeExpiry: -1}, policy: `"target": ["tag:a"], "attr": ["key-expiry:2d"]`},
		{name: "the user's by policy", key: store.Key{User: 1}, policy: `"target": ["alice@"], "attr": ["key-expiry:never"]`},
		{name: "the auth key was revoked", key: store.Key{User: 1}, life: 90 * day, then: func(t *testing.T, w *world, _ string) {
			c := w.admin()
			if _, err := c.RevokeKey(t.Context(), 1); err != nil {
				t.Error(err)
			}
		}},
		{name: "an administrator chose", key: store.Key{User: 1}, life: 3 * day, then: func(t *testing.T, w *world, name string) {
			if err := w.s.ExpireNode(t.Context(), "test", name, time.Now().Add(3*day)); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, nil)
			if _, err := w.admin().CreateUser(t.Context(), "alice"); err != nil {
				t.Fatal(err)
			}
			attrs := ""
			if c.policy != "" {
				attrs = `"nodeAttrs": [{` + c.policy + `}],`
			}
			if _, err := w.s.SetPolicy(t.Context(), "test", `{"tagOwners": {"tag:a": []}, `+attrs+` "acls": []}`, -1); err != nil {
				t.Fatal(err)
			}
			text := w.key(c.key)
			m := w.machine().join(text)
			n := m.poll(nil)
			if c.then != nil {
				c.then(t, w, n.self.StableID)
				n.until(t, "to hear of it", func() bool { return n.self.MeshRenew == nil })
			}
			about := func(at time.Time) bool {
				if c.life == 0 {
					return at.IsZero()
				}
				d := time.Until(at)
				return d <= c.life && d > c.life-time.Minute
			}
			if !about(n.self.KeyExpiry) || (n.self.MeshRenew != nil) != c.renewals {
				t.Errorf("expires %v, to renew %v", n.self.KeyExpiry, n.self.MeshRenew)
			}
			was := n.self.KeyExpiry
			n.cancel()
			if resp, err := m.rotate(text); err != nil || !resp.MachineAuthorized {
				t.Fatalf("%+v, %v", resp, err)
			}
			if self := m.poll(nil).self; self.KeyExpiry.After(was) != c.renewals || !about(self.KeyExpiry) {
				t.Errorf("expired %v, and after it %v", was, self.KeyExpiry)
			}
		})
	}
}

// A machine that comes back with a saved state that is old, as from a backup, is
// the node that it was.
func TestOldStateReturns(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	text := w.key(store.Key{})
	a := w.machine().join(text)
	self := a.poll(nil).self
	backup := a.key
	for range 3 {
		if _, err := a.rotate(""); err != nil {
			t.Fatal(err)
		}
	}
	a.key = backup
	if resp, err := a.register(a.registerRequest(text)); err != nil || !resp.NodeKeyExpired {
		t.Fatalf("the old key: %+v, %v", resp, err)
	}
	if resp, err := a.rotate(""); err != nil || !resp.MachineAuthorized {
		t.Fatalf("a new one in its place: %+v, %v", resp, err)
	}
	if got := a.poll(nil).self; got.ID != self.ID {
		t.Errorf("node %d, was %d", got.ID, self.ID)
	}
	// Not so another machine that knows the key.
	b := w.machine()
	b.key = backup
	if resp, err := b.rotate(""); err != nil || resp.MachineAuthorized || resp.MeshCode == "" && resp.AuthURL == "" {
		t.Errorf("another machine: %+v, %v", resp, err)
	}
}

// as makes requests those of a process.
func (m *machine) as(instance string, yield bool) (*wire.RegisterResponse, error) {
	req := m.registerRequest("")
	req.MeshInstance, req.MeshYield = instance, yield
	return m.register(req)
}

func instance(name string) func(*wire.MapRequest) {
	return func(r *wire.MapRequest) { r.MeshInstance = name }
}

// Of two processes with one identity the newer is the node, whatever the older
// one tries.
func TestClones(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.OfflineGrace = time.Millisecond })
	allow(w)
	text := w.key(store.Key{Reusable: true})
	a, other := w.machine().join(text), w.machine().join(text)
	welcome := func(m *machine, name string, yield, replaced bool) {
		t.Helper()
		if resp, err := m.as(name, yield); err != nil || !resp.MachineAuthorized || resp.MeshReplaced != replaced {
			t.Errorf("%s: %+v, %v", name, resp, err)
		}
	}
	cloned := func(m *machine, name string, yield bool) {
		t.Helper()
		if resp, err := m.as(name, yield); err != nil || resp.MeshCode != wire.CodeCloned || resp.MachineAuthorized {
			t.Errorf("%s: %+v, %v", name, resp, err)
		}
	}
	welcome(a, "one", false, false)
	na := a.poll(instance("one"))
	id := na.self.ID
	// The same process by another connection is no copy.
	nb := a.clone().poll(instance("one"))
	if code := na.end(t); code != "" {
		t.Errorf("replaced by itself: %q", code)
	}
	b := a.clone()
	welcome(b, "two", false, true)
	if code := nb.end(t); code != wire.CodeCloned {
		t.Errorf("the older one's stream ended with %q", code)
	}
	nb = b.poll(instance("two"))
	// The older one tries everything.
	cloned(a, "one", false)
	cloned(a, "one", true)
	for _, change := range []func(*wire.MapRequest){nil, func(r *wire.MapRequest) { r.OmitPeers, r.Stream = false, true }} {
		status, code := a.lite(func(r *wire.MapRequest) {
			r.DiscoKey, r.MeshInstance = identity.NewDisco().Public(), "one"
			if change != nil {
				change(r)
			}
		})
		if status != 403 || code != wire.CodeCloned {
			t.Errorf("map request: %d %s", status, code)
		}
	}
	steal := *a
	steal.key = identity.NewNode()
	req := steal.registerRequest(text)
	req.OldNodeKey, req.MeshInstance = a.key.Public(), "one"
	steal.refused(req, wire.CodeCloned)
	// Started again it knows that it was the older one, and yields.
	cloned(a, "three", true)
	b.lite(func(r *wire.MapRequest) {
		r.MeshInstance, r.Hostinfo.NetInfo = "two", &wire.NetInfo{PreferredDERP: 900}
	})
	nb.until(t, "the newer one lives", func() bool { return nb.self.HomeDERP == 900 })
	if w.s.Admit(steal.key.Public()) || !w.s.Admit(a.key.Public()) {
		t.Error("members are wrong")
	}
	// Once the newer one is gone it is welcome.
	no := other.poll(nil)
	if p := no.peers[id]; p.Online == nil || !*p.Online {
		t.Errorf("it is %+v", p)
	}
	nb.cancel()
	no.until(t, "it left", func() bool { return no.peers[id].Online != nil && !*no.peers[id].Online })
	welcome(a, "four", true, false)
	a.poll(instance("four")).cancel()
	cloned(b, "two", false)
	// The server remembers.
	w.stop()
	w.start(nil)
	a, b = a.clone(), b.clone()
	welcome(a, "four", false, false)
	cloned(b, "two", false)
	if entries, err := w.store.Audit(t.Context(), time.Time{}, 0, 100); err != nil || !slices.ContainsFunc(entries, func(e store.AuditEntry) bool { return e.Action == "node.replaced" }) {
		t.Errorf("not on record: %v", err)
	}
}

// Odd names count as none.
func TestInstanceNames(t *testing.T) {
	for name, want := range map[string]string{"": "", "aZ09": "aZ09", "a,b": "", "a b": "", strings.Repeat("a", 33): "", "ä": ""} {
		if got := cleanInstance(name); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
	n := &node{}
	s := &Server{unsaved: map[wire.NodeID]struct{}{}}
	for _, c := range "abcdefghijklmnop" {
		if _, err := s.claim(n, string(c), false); err != nil {
			t.Error(err)
		}
	}
	if len(instances(n)) != keptInstances || !superseded(n, "o") || superseded(n, "p") || superseded(n, "a") {
		t.Errorf("kept %q", n.Instance)
	}
}

// A machine key that enrols a second node while the first is there is noted.
func TestMachineKeyReuse(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	text := w.key(store.Key{Reusable: true})
	a := w.machine().join(text)
	a.poll(nil)
	b := a.clone()
	b.key = identity.NewNode()
	b.join(text)
	entries := []store.AuditEntry{}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		entries, _ = w.store.Audit(t.Context(), time.Time{}, 0, 100)
		if slices.ContainsFunc(entries, func(e store.AuditEntry) bool { return e.Action == "node.machine-reuse" }) {
			return
		}
	}
	t.Errorf("not on record: %+v", entries)
}
