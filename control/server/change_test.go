package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

const changePolicy = `{
	"groups":    {"group:ops": ["alice@"]},
	"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
	"acls": [
		{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:1"]},
		{"action": "accept", "src": ["group:ops"], "dst": ["tag:b:2"]},
	],
}`

// sourced reports whether any rule lets the node in.
func sourced(filter []wire.FilterRule, n *wire.Node) bool {
	for _, r := range filter {
		for _, src := range r.SrcIPs {
			if strings.TrimSuffix(src, "/32") == n.Addresses[0].Addr().String() {
				return true
			}
		}
	}
	return false
}

func TestRename(t *testing.T) {
	w := newWorld(t, nil)
	w.setPolicy(changePolicy)
	a, b := w.tagged("tag:a", "a"), w.tagged("tag:b", "b")
	na, nb := a.poll(nil), b.poll(nil)
	id := na.self.ID
	ctx := t.Context()
	if err := w.s.RenameNode(ctx, "test", "a", "front"); err != nil {
		t.Fatal(err)
	}
	na.until(t, "its own new name", func() bool { return na.self.Name == "front.mesh.internal." })
	nb.until(t, "the peer's new name", func() bool { return nb.peers[id] != nil && nb.peers[id].Name == "front.mesh.internal." })
	for to, want := range map[string]error{
		"b": store.ErrConflict, "B.mesh.internal.": store.ErrConflict, "-x": admin.ErrInvalid, "x-": admin.ErrInvalid, "x.y": admin.ErrInvalid,
		"ä": admin.ErrInvalid, strings.Repeat("x", 64): admin.ErrInvalid, "front": nil,
	} {
		if err := w.s.RenameNode(ctx, "test", "front", to); !errors.Is(err, want) {
			t.Errorf("rename to %q: %v, want %v", to, err, want)
		}
	}
	if err := w.s.RenameNode(ctx, "test", "a", "x"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the former name: %v", err)
	}
	// What the node says about its host does not undo it, ...
	host := func(name string, home int) {
		a.lite(func(r *wire.MapRequest) {
			r.Hostinfo.Hostname, r.Hostinfo.NetInfo = name, &wire.NetInfo{PreferredDERP: home}
		})
		na.until(t, "its own report", func() bool { return na.self.HomeDERP == home })
	}
	host("other", 1)
	if na.self.Name != "front.mesh.internal." {
		t.Errorf("the node renamed itself to %s", na.self.Name)
	}
	// ... nor does a restart of the server and of the node.
	na.cancel()
	nb.cancel()
	w.stop()
	w.start(nil)
	a.connect()
	if resp, err := a.register(a.registerRequest("")); err != nil || !resp.MachineAuthorized {
		t.Fatal(resp, err)
	}
	na = a.poll(nil)
	host("other", 2)
	if na.self.Name != "front.mesh.internal." {
		t.Errorf("after a restart it is %s", na.self.Name)
	}
	// The name of another node's host is free for it; given back, it follows.
	if err := w.s.RenameNode(ctx, "test", "front", ""); err != nil {
		t.Fatal(err)
	}
	na.until(t, "the host's name", func() bool { return na.self.Name == "other.mesh.internal." })
	host("another", 3)
	na.until(t, "the host's next name", func() bool { return na.self.Name == "another.mesh.internal." })
	var renames []string
	log, err := w.store.Audit(ctx, time.Time{}, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range log {
		if e.Action == "node.rename" {
			renames = append(renames, e.Actor+": "+e.Object+" "+e.After)
		}
	}
	want := "[test: a front test: front front test: front other node: other another]"
	if fmt.Sprint(renames) != want {
		t.Errorf("on record %v, want %v", renames, want)
	}
}

// A change of owner changes peers, filters and profiles at once.
func TestSetOwner(t *testing.T) {
	w := newWorld(t, nil)
	w.setPolicy(changePolicy)
	alice := w.user("alice")
	a, b := w.tagged("tag:c", "a"), w.tagged("tag:b", "b")
	na, nb := a.poll(nil), b.poll(nil)
	id, ctx := na.self.ID, t.Context()
	if len(na.peers)+len(nb.peers) != 0 {
		t.Fatalf("peers %v, %v", na.peers, nb.peers)
	}
	set := func(user string, tags ...string) {
		t.Helper()
		if err := w.s.SetOwner(ctx, "test", "a", user, tags); err != nil {
			t.Fatal(err)
		}
	}
	set("", "tag:a")
	na.until(t, "itself with the tag", func() bool { return fmt.Sprint(na.self.Tags) == "[tag:a]" })
	na.until(t, "its peer", func() bool { return len(na.peers) == 1 })
	nb.until(t, "the node with the tag", func() bool {
		p := nb.peers[id]
		return p != nil && fmt.Sprint(p.Tags) == "[tag:a]" && p.User == wire.TaggedUser && len(nb.filter) == 1 && sourced(nb.filter, p)
	})
	if nb.users[wire.TaggedUser].DisplayName != "Tagged Devices" {
		t.Errorf("users: %+v", nb.users)
	}
	set("alice")
	na.until(t, "itself as alice's", func() bool { return na.self.User == alice.ID && len(na.self.Tags) == 0 && !na.self.KeyExpiry.IsZero() })
	nb.until(t, "the node as alice's", func() bool {
		p := nb.peers[id]
		return p.User == alice.ID && len(p.Tags) == 0 && nb.users[alice.ID].LoginName == "alice" && nb.filter[0].DstPorts[0].Ports.First == 2
	})
	if fmt.Sprint(nb.users[alice.ID].Groups) != "[group:ops]" {
		t.Errorf("alice's groups: %+v", nb.users[alice.ID])
	}
	expires := na.self.KeyExpiry
	set("alice")
	set("", "tag:c", "tag:a", "tag:c")
	na.until(t, "both tags", func() bool { return fmt.Sprint(na.self.Tags) == "[tag:a tag:c]" && na.self.KeyExpiry.IsZero() })
	nb.until(t, "no expiry", func() bool { return len(nb.peers[id].Tags) == 2 && nb.peers[id].KeyExpiry.IsZero() })
	set("", "tag:c")
	nb.until(t, "the node to be gone", func() bool { return nb.peers[id] == nil && !sourced(nb.filter, na.self) })
	na.until(t, "the peer to be gone", func() bool { return len(na.peers) == 0 })
	if expires.IsZero() {
		t.Error("alice's node had no expiry")
	}
	for _, c := range []struct {
		name, user string
		tags       []string
		want       error
	}{
		{"a", "", nil, admin.ErrInvalid}, {"a", "alice", []string{"tag:a"}, admin.ErrInvalid}, {"a", "", []string{"tag:z"}, admin.ErrInvalid},
		{"a", "nobody", nil, store.ErrNotFound}, {"z", "alice", nil, store.ErrNotFound},
	} {
		if err := w.s.SetOwner(ctx, "test", c.name, c.user, c.tags); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if n, _ := w.store.Nodes(ctx); fmt.Sprint(n[0].Tags) != "[tag:c]" || n[0].User != 0 {
		t.Errorf("stored: %+v", n[0])
	}
}

// Groups come with the policy, and change with it.
func TestGroups(t *testing.T) {
	w := newWorld(t, nil)
	alice := w.user("alice")
	w.setPolicy(`{"groups": {"group:x": ["alice@"]}}`)
	a, b := w.machine().join(w.key(store.Key{User: alice.ID})), w.machine().join(w.key(store.Key{User: alice.ID}))
	b.poll(nil)
	na := a.poll(nil)
	if fmt.Sprint(na.users[alice.ID].Groups) != "[group:x]" {
		t.Errorf("users: %+v", na.users)
	}
	w.setPolicy(`{"groups": {"group:y": ["alice@"], "group:x": ["alice@"]}}`)
	na.until(t, "another group", func() bool { return fmt.Sprint(na.users[alice.ID].Groups) == "[group:x group:y]" })
	w.setPolicy(`{"groups": {"group:y": ["bob@"]}}`)
	na.until(t, "no group", func() bool { return len(na.users[alice.ID].Groups) == 0 })
}

// When the time comes, and when an administrator says so, a node is out:
// peers hear of it, filters let it in no more, relays refuse it; and it comes
// back with the same key if that turns out to be good.
func TestExpiryWithdraws(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		w.setPolicy(changePolicy)
		alice := w.user("alice")
		key := w.key(store.Key{User: alice.ID, NodeExpiry: time.Hour})
		a, b := w.machine().join(key), w.tagged("tag:b", "b")
		na, nb := a.poll(nil), b.poll(nil)
		self := na.self
		if d := time.Until(self.KeyExpiry); d > time.Hour || d < 59*time.Minute {
			t.Errorf("key expires in %v, want the auth key's hour", d)
		}
		if !sourced(nb.filter, self) {
			t.Fatalf("filter %+v", nb.filter)
		}
		relay := make(chan string, 10) // what a relay hears of a
		defer w.s.Subscribe(func(added, removed []identity.NodePublic) {
			if slices.Contains(added, a.key.Public()) {
				relay <- "in"
			}
			if slices.Contains(removed, a.key.Public()) {
				relay <- "out"
			}
		})()
		hears := func(want string) {
			t.Helper()
			if got := <-relay; got != want {
				t.Errorf("a relay hears %q, want %q", got, want)
			}
		}
		hears("in")
		done := make(chan wire.ErrorCode, 1)
		go func() { done <- na.end(t) }()
		nb.until(t, "the expiry", func() bool { return nb.peers[self.ID].Expired })
		nb.until(t, "a filter without it", func() bool { return !sourced(nb.filter, self) })
		if code := <-done; code != wire.CodeNodeKeyExpired || !na.self.Expired {
			t.Errorf("its stream ended with %q, expired %v", code, na.self.Expired)
		}
		if w.s.Admit(a.key.Public()) {
			t.Error("relays admit it")
		}
		hears("out")
		// A policy that comes now does not let it in either.
		w.setPolicy(strings.Replace(changePolicy, "tag:b:2", "tag:b:3", 1))
		nb.until(t, "the policy", func() bool { return nb.policy == 2 })
		if sourced(nb.filter, self) || nb.peers[self.ID] == nil {
			t.Errorf("with another policy: %+v", nb.filter)
		}

		if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Time{}); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "its return", func() bool {
			p := nb.peers[self.ID]
			return !p.Expired && p.KeyExpiry.IsZero() && sourced(nb.filter, self)
		})
		if !w.s.Admit(a.key.Public()) {
			t.Error("relays refuse it")
		}
		hears("in")
		na = a.poll(nil)
		if na.self.Expired || !na.self.KeyExpiry.IsZero() {
			t.Errorf("self: %+v", na.self)
		}
		at := time.Now().Add(24 * time.Hour)
		if err := w.s.ExpireNode(t.Context(), "test", "agent", at); err != nil {
			t.Fatal(err)
		}
		na.until(t, "its own expiry", func() bool { return na.self.KeyExpiry.Equal(at) })
		nb.until(t, "the peer's expiry", func() bool { return nb.peers[self.ID].KeyExpiry.Equal(at) })
		if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
		nb.until(t, "the end", func() bool { return nb.peers[self.ID].Expired && !sourced(nb.filter, self) })
	})
}

// A one-time key brings an expired node back once, also if the first answer
// was lost and the node made another key.
func TestReturnWithOneTimeKey(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	alice := w.user("alice")
	m := w.machine().join(w.key(store.Key{User: alice.ID}))
	was := m.poll(nil).self
	if err := w.s.ExpireNode(t.Context(), "test", "agent", time.Now()); err != nil {
		t.Fatal(err)
	}
	key, old := w.key(store.Key{User: alice.ID}), m.key.Public()
	for range 2 {
		m.key = identity.NewNode()
		req := m.registerRequest(key)
		req.OldNodeKey = old
		if resp, err := m.register(req); err != nil || !resp.MachineAuthorized {
			t.Fatalf("%+v %v", resp, err)
		}
	}
	if self := m.poll(nil).self; self.ID != was.ID || self.Addresses[0] != was.Addresses[0] || self.Expired {
		t.Errorf("came back as %+v, was %+v", self, was)
	}
	m.key = identity.NewNode()
	m.refused(m.registerRequest(key), wire.CodeAuthKeyUsed)
	// Another owner's key does not take the node over.
	if err := w.s.ExpireNode(context.Background(), "test", "agent", time.Now()); err != nil {
		t.Fatal(err)
	}
	m.join(w.key(store.Key{}))
	if self := m.poll(nil).self; self.ID == was.ID || self.User != wire.TaggedUser {
		t.Errorf("with a tagged key it is %+v", self)
	}
}

func TestNodeExpiryOfKeys(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.KeyExpiry = 48 * time.Hour })
	alice := w.user("alice")
	for _, c := range []struct {
		key  store.Key
		want time.Duration
	}{
		{store.Key{User: alice.ID}, 48 * time.Hour},
		{store.Key{User: alice.ID, NodeExpiry: time.Hour}, time.Hour},
		{store.Key{User: alice.ID, NodeExpiry: -1}, 0},
		{store.Key{}, 0},
		{store.Key{NodeExpiry: time.Hour}, time.Hour},
	} {
		self := w.machine().join(w.key(c.key)).poll(nil).self
		got := time.Duration(0)
		if !self.KeyExpiry.IsZero() {
			got = time.Until(self.KeyExpiry)
		}
		if got > c.want || got < c.want-time.Minute {
			t.Errorf("%+v: key expires in %v, want %v", c.key, got, c.want)
		}
	}
}

// What a policy says about nodes themselves reaches them; who is owner may do
// what the policy lets owners do; and a policy whose own tests fail is refused.
func TestPolicyOfNodes(t *testing.T) {
	w := newWorld(t, nil)
	w.user("olga") // the first one is owner
	w.s.mu.Lock()
	for id, u := range w.s.users {
		if u.Role != store.RoleOwner {
			t.Errorf("first user: %+v", w.s.users[id])
		}
	}
	w.s.mu.Unlock()
	bob := w.user("bob")
	a := w.machine().join(w.key(store.Key{User: bob.ID}))
	na := a.poll(nil)
	if na.self.CapMap != nil {
		t.Errorf("capabilities %v", na.self.CapMap)
	}
	const head = `{"tagOwners": {"tag:a": ["autogroup:owner"]}, "acls": [{"action": "accept", "src": ["bob@"], "dst": ["tag:a:80"]}],`
	w.setPolicy(head + `"nodeAttrs": [{"target": ["bob@"], "attr": ["example.com/x"]}]}`)
	na.until(t, "its attribute", func() bool { _, ok := na.self.CapMap["example.com/x"]; return ok })
	if err := w.s.SetOwner(t.Context(), "test", "agent", "", []string{"tag:a"}); err != nil {
		t.Fatal(err)
	}
	na.until(t, "no attribute", func() bool { return len(na.self.Tags) == 1 && na.self.CapMap == nil })

	c := w.admin()
	bad := head + `"tests": [{"src": "bob@", "accept": ["tag:a:443"]}]}`
	_, err := w.s.SetPolicy(t.Context(), "test", bad, -1)
	if !errors.Is(err, ErrPolicy) || !strings.Contains(err.Error(), "tests[0]") {
		t.Errorf("a policy whose test fails: %v", err)
	}
	if _, err := c.CheckPolicy(t.Context(), bad); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "tests[0]") {
		t.Errorf("check: %v", err)
	}
	if st := w.s.PolicyState(); st.Version != 1 {
		t.Errorf("version %d in force", st.Version)
	}
	w.setPolicy(strings.Replace(bad, "443", "80", 1))

	for name, want := range map[string]bool{"olga": true, "bob": false} {
		w.s.mu.Lock()
		u, _ := w.s.userByName(name)
		got := w.s.policy.tagOwner(u, "tag:a")
		w.s.mu.Unlock()
		if got != want {
			t.Errorf("%s may give tag:a: %v", name, got)
		}
	}
}
