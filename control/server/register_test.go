package server

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// refused registers and wants the refusal with the given code, and its exact
// text.
func (m *machine) refused(req *wire.RegisterRequest, want wire.ErrorCode) {
	m.t.Helper()
	resp, err := m.register(req)
	if err != nil {
		m.t.Error(err)
		return
	}
	if resp.MeshCode != want || resp.Error != want.Err().Error() || resp.MachineAuthorized {
		m.t.Errorf("got %q (%s), want %q (%s)", resp.Error, resp.MeshCode, want.Err(), want)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, nil)
	good := w.key(store.Key{})
	expired := w.key(store.Key{Expires: time.Now().Add(-time.Second)})
	used := w.key(store.Key{})
	w.machine().join(used)
	revoked := w.key(store.Key{})
	keys, err := w.store.Keys(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.store.RevokeKey(context.Background(), "test", keys[len(keys)-1].ID, time.Now()); err != nil {
		t.Fatal(err)
	}
	foreign := newWorld(t, nil).key(store.Key{}) // its number is that of a key here
	flip := func(key string) string {
		b := []byte(key)
		i := len(b) - 10
		if b[i] == 'A' {
			b[i] = 'B'
		} else {
			b[i] = 'A'
		}
		return string(b)
	}
	for _, c := range []struct {
		name, key string
		want      wire.ErrorCode
	}{
		{"none", "", wire.CodeNeedsLogin},
		{"garbage", "tskey-auth-x", wire.CodeAuthKeyUnknown},
		{"of another mesh", foreign, wire.CodeAuthKeyUnknown},
		{"expired", expired, wire.CodeAuthKeyExpired},
		{"revoked", revoked, wire.CodeAuthKeyRevoked},
		{"used", used, wire.CodeAuthKeyUsed},
		// Whoever does not hold the whole secret learns nothing of the above.
		{"expired, flipped", flip(expired), wire.CodeAuthKeyUnknown},
		{"revoked, flipped", flip(revoked), wire.CodeAuthKeyUnknown},
		{"used, flipped", flip(used), wire.CodeAuthKeyUnknown},
		{"used, cut", used[:len(used)-4], wire.CodeAuthKeyUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := w.machine()
			m.t = t
			m.refused(m.registerRequest(c.key), c.want)
		})
	}
	old := w.machine()
	req := old.registerRequest(good)
	req.Version = 100
	old.refused(req, wire.CodeVersionTooOld)
	w.machine().join(good) // and still unused
}

func TestOneTimeKeyRace(t *testing.T) {
	// All come from one address: its limit on failures is not what is tested.
	w := newWorld(t, func(c *Config) { c.FailureBurst = 100000 })
	const hosts = 200
	rounds := 3
	if os.Getenv("MESH_FULL") != "" {
		rounds = 50
	}
	machines := make([]*machine, hosts)
	for i := range machines {
		machines[i] = w.machine()
	}
	for round := range rounds {
		key := w.key(store.Key{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		codes := map[string]int{}
		for _, m := range machines {
			m.key = identity.NewNode()
			wg.Go(func() {
				resp, err := m.register(m.registerRequest(key))
				// On a busy machine 200 handshakes at once take longer than
				// the server waits: the client tries again.
				for try := 0; err != nil && !strings.Contains(err.Error(), "429") && try < 5; try++ {
					resp, err = m.register(m.registerRequest(key))
				}
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil && strings.Contains(err.Error(), "429"):
					codes["429"]++
				case err != nil:
					t.Error(err)
				case resp.MachineAuthorized:
					codes["in"]++
				default:
					codes[string(resp.MeshCode)]++
				}
			})
		}
		wg.Wait()
		if codes["in"] != 1 || codes["in"]+codes[string(wire.CodeAuthKeyUsed)]+codes["429"] != hosts {
			t.Errorf("round %d: %v, want exactly one in", round, codes)
		}
	}
	if nodes, _ := w.store.Nodes(context.Background()); len(nodes) != rounds {
		t.Errorf("%d nodes, want %d", len(nodes), rounds)
	}
}

func TestLostAnswer(t *testing.T) {
	w := newWorld(t, nil)
	key := w.key(store.Key{})
	m := w.machine().join(key)
	// The answer did not arrive, and the client tries again with another key.
	m.key = identity.NewNode()
	m.join(key)
	if nodes, _ := w.store.Nodes(context.Background()); len(nodes) != 1 || nodes[0].Key != m.key.Public() {
		t.Errorf("nodes: %+v", nodes)
	}
	// Once the node has polled, the answer was not lost.
	m.poll(nil)
	m.key = identity.NewNode()
	m.refused(m.registerRequest(key), wire.CodeAuthKeyUsed)
	w.machine().refused(w.machine().registerRequest(key), wire.CodeAuthKeyUsed)
}

func TestForeignMachine(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a := w.machine().join(key)
	na := a.poll(nil)
	b := w.machine()
	b.key = a.key // the node key leaked, the machine key did not

	b.refused(b.registerRequest(""), wire.CodeMachineMismatch)
	b.refused(b.registerRequest(key), wire.CodeMachineMismatch)
	logout := b.registerRequest("")
	logout.Expiry = wire.LogoutExpiry
	b.refused(logout, wire.CodeMachineMismatch)
	rotate := b.registerRequest(key)
	rotate.OldNodeKey, rotate.NodeKey = a.key.Public(), identity.NewNode().Public()
	b.refused(rotate, wire.CodeMachineMismatch)
	for _, change := range []func(*wire.MapRequest){
		nil,
		func(r *wire.MapRequest) { r.OmitPeers = false },
		func(r *wire.MapRequest) { r.OmitPeers, r.Stream = false, true },
	} {
		if status, code := b.lite(change); status != 403 || code != wire.CodeMachineMismatch {
			t.Errorf("map request: %d %s", status, code)
		}
	}
	// And nothing happened to a.
	a.lite(func(r *wire.MapRequest) { r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900} })
	na.until(t, "a's own update", func() bool { return na.self.HomeDERP == 900 })
	if na.self.DiscoKey != a.disco.Public() {
		t.Error("another machine changed a's disco key")
	}
}

func TestRotation(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	nb := b.poll(nil)
	before := a.poll(nil).self
	old := a.key
	a.key = identity.NewNode()
	req := a.registerRequest("")
	req.OldNodeKey = old.Public()
	if resp, err := a.register(req); err != nil || !resp.MachineAuthorized {
		t.Fatalf("rotate: %+v %v", resp, err)
	}
	after := a.poll(nil).self
	if after.ID != before.ID || after.Addresses[0] != before.Addresses[0] || after.StableID != before.StableID || after.Key != a.key.Public() {
		t.Errorf("after rotation %+v, before %+v", after, before)
	}
	nb.until(t, "the new key", func() bool { return nb.peers[after.ID].Key == a.key.Public() })
	if w.s.Admit(old.Public()) || !w.s.Admit(a.key.Public()) {
		t.Error("members do not follow the rotation")
	}
	stale := *a
	stale.key = old
	if status, code := stale.lite(nil); status != 404 || code != wire.CodeNodeUnknown {
		t.Errorf("old key: %d %s", status, code)
	}
	if resp, err := stale.register(stale.registerRequest(key)); err != nil || !resp.NodeKeyExpired || resp.MachineAuthorized {
		t.Errorf("old key registers: %+v %v", resp, err)
	}
}

func TestLogoutAndReturn(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	na, nb := a.poll(nil), b.poll(nil)
	self := na.self
	req := a.registerRequest(key) // an auth key does not prevent it
	req.Expiry = wire.LogoutExpiry
	if resp, err := a.register(req); err != nil || !resp.NodeKeyExpired {
		t.Fatalf("logout: %+v %v", resp, err)
	}
	if code := na.end(t); code != wire.CodeNodeKeyExpired {
		t.Errorf("own stream ended with %q", code)
	}
	if !na.self.Expired || na.self.KeyExpiry.IsZero() {
		t.Errorf("self after logout: %+v", na.self)
	}
	nb.until(t, "a to be expired and offline", func() bool {
		p := nb.peers[self.ID]
		return p.Expired && p.Online != nil && !*p.Online && p.LastSeen != nil
	})
	if w.s.Admit(a.key.Public()) {
		t.Error("relays still admit a node that logged out")
	}
	if status, code := a.lite(nil); status != 401 || code != wire.CodeNodeKeyExpired {
		t.Errorf("map request: %d %s", status, code)
	}
	if resp, err := a.register(a.registerRequest(key)); err != nil || !resp.NodeKeyExpired {
		t.Fatalf("register with the expired key: %+v %v", resp, err)
	}
	old := a.key.Public()
	a.key = identity.NewNode()
	req = a.registerRequest("")
	req.OldNodeKey = old
	a.refused(req, wire.CodeNeedsLogin)
	req = a.registerRequest(key)
	req.OldNodeKey = old
	if resp, err := a.register(req); err != nil || !resp.MachineAuthorized {
		t.Fatalf("return: %+v %v", resp, err)
	}
	if again := a.poll(nil).self; again.ID != self.ID || again.Addresses[0] != self.Addresses[0] || again.Expired {
		t.Errorf("returned as %+v, was %+v", again, self)
	}
	nb.until(t, "a to be back", func() bool { p := nb.peers[self.ID]; return p != nil && !p.Expired && *p.Online })
}

// A stock client that was removed and logs in again does not repeat its network
// report, since nothing changed for it: its home relay must be known all the same.
func TestRemovedNodeKeepsItsHome(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	a, b := w.machine().join(w.key(store.Key{})), w.machine().join(w.key(store.Key{}))
	na := a.poll(nil)
	b.lite(func(r *wire.MapRequest) { r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900} })
	if err := w.s.RemoveNode(t.Context(), "test", string(b.poll(nil).self.StableID)); err != nil {
		t.Fatal(err)
	}
	b.key = identity.NewNode()
	b.join(w.key(store.Key{}))
	id := b.poll(nil).self.ID
	b.lite(nil)
	na.until(t, "b with its home relay", func() bool { return na.peers[id] != nil && na.peers[id].HomeDERP == 900 })
	// Somebody else's machine is at home nowhere.
	c := w.machine().join(w.key(store.Key{}))
	c.lite(nil)
	if home := c.poll(nil).self.HomeDERP; home != 0 {
		t.Errorf("a machine that nobody knew is at home at %d", home)
	}
}

func TestRemovedNode(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	na, nb := a.poll(nil), b.poll(nil)
	id, addr := nb.self.ID, nb.self.Addresses[0]
	cut := make(chan identity.NodePublic, 10)
	cancel := w.s.Subscribe(func(_, removed []identity.NodePublic) {
		for _, k := range removed {
			cut <- k
		}
	})
	defer cancel()
	if err := w.s.RemoveNode(context.Background(), "test", nb.self.Name); err != nil {
		t.Fatal(err)
	}
	if k := <-cut; k != b.key.Public() || w.s.Admit(k) {
		t.Error("relays do not hear of the removal")
	}
	na.until(t, "b to be gone", func() bool { return na.peers[id] == nil })
	if code := nb.end(t); code != wire.CodeNodeRevoked {
		t.Errorf("b's stream ended with %q", code)
	}
	// In one message, so that nobody takes it for a mere expiry who knows the code.
	if m := nb.last; m.MeshCode != wire.CodeNodeRevoked || m.Node == nil || !m.Node.Expired || m.Node.KeyExpiry.IsZero() {
		t.Errorf("b's last message: %+v", m)
	}
	if status, code := b.lite(nil); status != 403 || code != wire.CodeNodeRevoked {
		t.Errorf("map request: %d %s", status, code)
	}
	b.refused(b.registerRequest(""), wire.CodeNodeRevoked)
	b.refused(b.registerRequest(key), wire.CodeNodeRevoked)
	// Another node key of the same machine does not help either, ...
	old := b.key
	b.key = identity.NewNode()
	b.refused(b.registerRequest(key), wire.CodeNodeRevoked)
	req := b.registerRequest("")
	req.OldNodeKey = old.Public()
	b.refused(req, wire.CodeNodeRevoked)
	// ... a new auth key does, but not with the old node key.
	fresh := w.key(store.Key{Reusable: true})
	b.key = old
	if resp, err := b.register(b.registerRequest(fresh)); err != nil || !resp.NodeKeyExpired {
		t.Fatalf("removed key with a new auth key: %+v %v", resp, err)
	}
	b.key = identity.NewNode()
	b.join(fresh)
	if self := b.poll(nil).self; self.ID == id || self.Addresses[0] == addr {
		t.Errorf("came back as %d %v, which it was before", self.ID, self.Addresses[0])
	}
}

const tagPolicy = `{
	"groups":    {"group:ops": ["olga@example.com"]},
	"tagOwners": {"tag:a": ["alice@example.com"], "tag:b": ["group:ops"], "tag:c": []},
	"acls":      [],
}`

func TestTags(t *testing.T) {
	w := newWorld(t, nil)
	ctx := context.Background()
	if _, err := w.s.SetPolicy(ctx, "test", tagPolicy, -1); err != nil {
		t.Fatal(err)
	}
	users := map[string]store.User{}
	for _, name := range []string{"alice@example.com", "olga@example.com"} {
		u, err := w.store.CreateUser(ctx, "test", name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		users[name] = u
		w.s.users[u.ID] = u
	}
	tagged := func(tags ...string) store.Key { return store.Key{Tags: tags} }
	of := func(user string) store.Key { return store.Key{User: users[user].ID} }
	for i, c := range []struct {
		key   store.Key
		ask   []string
		want  []string
		fails bool
	}{
		{key: tagged("tag:a"), want: []string{"tag:a"}},
		{key: tagged("tag:a"), ask: []string{"tag:a"}, want: []string{"tag:a"}},
		{key: tagged("tag:a", "tag:b"), ask: []string{"tag:b"}, want: []string{"tag:a", "tag:b"}},
		{key: tagged("tag:a"), ask: []string{"tag:b"}, fails: true},
		{key: tagged("tag:a"), ask: []string{"tag:a", "tag:b"}, fails: true},
		{key: tagged("tag:a"), ask: []string{"tag:nosuch"}, fails: true},
		{key: of("alice@example.com")},
		{key: of("alice@example.com"), ask: []string{"tag:a"}, want: []string{"tag:a"}},
		{key: of("alice@example.com"), ask: []string{"tag:b"}, fails: true},
		{key: of("alice@example.com"), ask: []string{"tag:a", "tag:b"}, fails: true},
		{key: of("alice@example.com"), ask: []string{"tag:c"}, fails: true},
		{key: of("alice@example.com"), ask: []string{""}, fails: true},
		{key: of("olga@example.com"), ask: []string{"tag:b"}, want: []string{"tag:b"}},
		{key: of("olga@example.com"), ask: []string{"tag:a"}, fails: true},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			key := w.key(c.key)
			m := w.machine()
			m.t = t
			req := m.registerRequest(key)
			req.Hostinfo.RequestTags = c.ask
			resp, err := m.register(req)
			if err != nil {
				t.Fatal(err)
			}
			if c.fails {
				if resp.MeshCode != wire.CodeTagNotAllowed || !strings.HasPrefix(resp.Error, wire.ErrTagNotAllowed.Error()) {
					t.Fatalf("%+v, want a refusal", resp)
				}
				m.join(key) // the key is still good
				return
			}
			if resp.Error != "" {
				t.Fatal(resp.Error)
			}
			n := m.poll(nil)
			if fmt.Sprint(n.self.Tags) != fmt.Sprint(c.want) {
				t.Errorf("tags %v, want %v", n.self.Tags, c.want)
			}
			if tagged := n.self.User == wire.TaggedUser; tagged != (len(c.want) > 0) {
				t.Errorf("owner %d of a node with tags %v", n.self.User, c.want)
			}
			if n.self.KeyExpiry.IsZero() != (len(c.want) > 0) {
				t.Errorf("key expires %v", n.self.KeyExpiry)
			}
			// Later wishes do not count.
			m.lite(func(r *wire.MapRequest) {
				r.Hostinfo.RequestTags = []string{"tag:a", "tag:b", "tag:c"}
				r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900}
			})
			n.until(t, "the update", func() bool { return n.self.HomeDERP == 900 })
			if fmt.Sprint(n.self.Tags) != fmt.Sprint(c.want) {
				t.Errorf("tags after an update: %v, want %v", n.self.Tags, c.want)
			}
		})
	}
}

func TestNames(t *testing.T) {
	w := newWorld(t, nil)
	key := w.key(store.Key{Reusable: true})
	var first *machine
	for i, c := range []struct{ host, want string }{
		{"Bob's Laptop.local", "bobs-laptop"},
		{"bobs-laptop", "bobs-laptop-1"},
		{"BOBS_LAPTOP", "bobs-laptop-2"},
		{"", "node"},
		{"--..--", "node-1"},
		{"käse", "k-se"},
		{"a.b.c", "a-b-c"},
		{strings.Repeat("x", 200), strings.Repeat("x", 63)},
		{strings.Repeat("x", 63), strings.Repeat("x", 61) + "-1"},
		{"evil\nname\x00", "evilname"},
	} {
		m := w.machine()
		req := m.registerRequest(key)
		req.Hostinfo.Hostname = c.host
		if resp, err := m.register(req); err != nil || resp.Error != "" {
			t.Fatal(resp, err)
		}
		if got := m.poll(nil).self.Name; got != c.want+".mesh.internal." {
			t.Errorf("%d: %q became %q, want %q", i, c.host, got, c.want)
		}
		if i == 0 {
			first = m
		}
	}
	// A rename follows the host name and frees the old one.
	n := first.poll(nil)
	first.lite(func(r *wire.MapRequest) { r.Hostinfo.Hostname = "desk" })
	n.until(t, "the rename", func() bool { return n.self.Name == "desk.mesh.internal." })
	m := w.machine()
	req := m.registerRequest(key)
	req.Hostinfo.Hostname = "bobs-laptop"
	if _, err := m.register(req); err != nil {
		t.Fatal(err)
	}
	if got := m.poll(nil).self.Name; got != "bobs-laptop.mesh.internal." {
		t.Errorf("freed name was not given again: %q", got)
	}
}

func TestFlood(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.FailureBurst, c.FailureRate = 5, 0.001 })
	m := w.machine()
	for range 5 {
		m.refused(m.registerRequest("mesh-auth-1-nonsense"), wire.CodeAuthKeyUnknown)
	}
	if _, err := m.register(m.registerRequest("mesh-auth-1-nonsense")); err == nil || !strings.Contains(err.Error(), "429") {
		t.Errorf("sixth failure: %v, want 429", err)
	}
}
