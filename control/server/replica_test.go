package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/internal/pgserver/pgtest"
)

// replicasOf starts n servers over one database.
func replicasOf(t *testing.T, url string, n int, change func(i int, c *Config)) []*world {
	t.Helper()
	var all []*world
	for i := range n {
		w := &world{t: t, path: url}
		w.start(func(c *Config) {
			c.DERPMap = &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900 + i: {RegionID: 900 + i, Nodes: []*wire.DERPNode{{Name: fmt.Sprintf("%da", 900+i), RegionID: 900 + i, HostName: "127.0.0.1"}}}}}
			if change != nil {
				change(i, c)
			}
		})
		t.Cleanup(w.stop)
		all = append(all, w)
	}
	return all
}

// at is the same machine, which talks to another replica.
func (m *machine) at(w *world) *machine {
	c := *m
	c.w = w
	c.connect()
	return &c
}

// What is done at one replica is on the nodes of another.
func TestReplicasShareChanges(t *testing.T) {
	r := replicasOf(t, pgtest.Database(t), 2, nil)
	a, b := r[0], r[1]
	if a.s.Key() != b.s.Key() {
		t.Fatal("replicas have different keys")
	}
	allow(a)
	key := a.key(store.Key{Reusable: true})
	// y enrols at one and polls at the other at once.
	y := b.machine()
	y.at(a).join(key)
	ny := y.poll(nil)
	x := a.machine().join(key)
	nx := x.poll(nil)
	id := nx.self.ID
	ny.until(t, "x to be online", func() bool { return online(ny.peers[id]) })
	nx.until(t, "y to be online", func() bool { return online(nx.peers[ny.self.ID]) })

	ep := netip.MustParseAddrPort("192.0.2.1:4")
	x.lite(func(r *wire.MapRequest) { r.Endpoints = []netip.AddrPort{ep} })
	ny.until(t, "x's endpoints", func() bool { p := ny.peers[id]; return len(p.Endpoints) == 1 && p.Endpoints[0] == ep })
	ny.until(t, "the relay of the other replica", func() bool { return len(ny.derp.Regions) == 2 })

	ctx := t.Context()
	if err := b.s.RenameNode(ctx, "admin", "agent-1", "ex"); err != nil {
		t.Fatal(err)
	}
	nx.until(t, "its new name", func() bool { return nx.self.Name == "ex.mesh.internal." })
	ny.until(t, "x's new name", func() bool { return ny.peers[id].Name == "ex.mesh.internal." })
	if err := a.s.SetOwner(ctx, "admin", "ex", "", []string{"tag:b"}); err != nil {
		t.Fatal(err)
	}
	ny.until(t, "x's new tag", func() bool { return fmt.Sprint(ny.peers[id].Tags) == "[tag:b]" })
	u := a.user("alice")
	if err := b.s.SetOwner(ctx, "admin", "ex", "alice", nil); err != nil {
		t.Fatal(err) // b knows a user that a made just now
	}
	ny.until(t, "x's owner", func() bool { return ny.peers[id].User == u.ID && ny.users[u.ID].LoginName == "alice" })

	if err := b.s.SuspendUser(ctx, "admin", "alice", true); err != nil {
		t.Fatal(err)
	}
	if code := nx.end(t); code != wire.CodeUserSuspended {
		t.Errorf("x's stream ended with %q", code)
	}
	if err := a.s.SuspendUser(ctx, "admin", "alice", false); err != nil {
		t.Fatal(err)
	}
	nx = x.poll(nil)
	ny.until(t, "x to be back", func() bool { p := ny.peers[id]; return online(p) && !p.Expired })
	if err := b.s.ExpireNode(ctx, "admin", "ex", time.Now()); err != nil {
		t.Fatal(err)
	}
	if code := nx.end(t); code != wire.CodeNodeKeyExpired {
		t.Errorf("x's stream ended with %q", code)
	}
	if err := a.s.ExpireNode(ctx, "admin", "ex", time.Time{}); err != nil {
		t.Fatal(err)
	}
	nx = x.poll(nil)
	ny.until(t, "x to be back", func() bool { p := ny.peers[id]; return online(p) && !p.Expired })

	// A policy of the other replica, and access for a time beside it.
	deny := strings.Replace(allowAll, `["*:*"]`, `["192.0.2.1:1"]`, 1)
	if _, err := a.s.SetPolicy(ctx, "admin", deny, -1); err != nil {
		t.Fatal(err)
	}
	ny.until(t, "x to be out of sight", func() bool { return ny.peers[id] == nil })
	g, err := b.s.AddGrant(ctx, "admin", admin.GrantAdd{Src: []string{"ex"}, Dst: []string{"agent"}, IP: []string{"tcp:22"}, For: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	nx.until(t, "y by the grant", func() bool { return nx.peers[ny.self.ID] != nil })
	if _, err := a.s.RevokeGrant(ctx, "admin", g.ID); err != nil {
		t.Fatal(err)
	}
	nx.until(t, "y to be out of sight", func() bool { return nx.peers[ny.self.ID] == nil })
	allow(b)
	ny.until(t, "x by the policy", func() bool { return ny.peers[id] != nil })

	if err := b.s.RemoveNode(ctx, "admin", "ex"); err != nil {
		t.Fatal(err)
	}
	if code := nx.end(t); code != wire.CodeNodeRevoked {
		t.Errorf("x's stream ended with %q", code)
	}
	a.s.lockOps()
	a.s.opMu.Unlock()
	if a.s.Admit(x.key.Public()) {
		t.Error("the relay of the other replica admits a removed node")
	}
}

// A node moves between replicas, and one replica dies: peers see it online where
// it is, and offline when it is nowhere.
func TestNodeMovesBetweenReplicas(t *testing.T) {
	r := replicasOf(t, pgtest.Database(t), 2, func(_ int, c *Config) { c.OfflineGrace = 100 * time.Millisecond })
	a, b := r[0], r[1]
	allow(a)
	key := a.key(store.Key{Reusable: true})
	x, y, z := a.machine().join(key), b.machine().join(key), b.machine().join(key)
	nx := x.poll(nil)
	first := y.poll(nil)
	id, left := first.self.ID, z.poll(nil).self.ID
	nx.until(t, "y and z to be online", func() bool { return online(nx.peers[id]) && online(nx.peers[left]) })
	// Who waits until y is cut off is told that x does not say and z, elsewhere,
	// is not asked.
	a.s.lockOps()
	rec, err := a.s.withdraw([]wire.NodeID{id}, true, func() error { return nil })
	a.s.opMu.Unlock()
	if err != nil || rec.told.Elsewhere != 1 || rec.told.Mute != 1 || rec.told.Peers != 0 {
		t.Errorf("x and z cannot tell: %+v, %v", rec.told, err)
	}
	moved := y.at(a)
	ny := moved.poll(nil)
	if code := first.end(t); code != wire.CodeCloned {
		t.Errorf("the former poll ended with %q", code)
	}
	back := y.poll(nil)
	ny.end(t)
	nx.until(t, "y to be online", func() bool { return online(nx.peers[id]) })

	// b dies: it tells nobody anything any more. y comes to a, z does not.
	b.store.Close()
	b.dead = true
	ny = moved.poll(nil)
	db, err := pgx.Connect(t.Context(), a.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(t.Context())
	if _, err := db.Exec(t.Context(), `UPDATE replicas SET seen = seen - interval '1 minute' WHERE name <> $1`, a.s.replica.name()); err != nil {
		t.Fatal(err) // its lease is over
	}
	nx.until(t, "z to be offline", func() bool { return !online(nx.peers[left]) })
	if !online(nx.peers[id]) {
		t.Error("who moved is offline")
	}
	back.cancel()
	ny.cancel()
}

// Another process is this replica by now.
func TestReplicaIsReplaced(t *testing.T) {
	replaced := make(chan error, 1)
	w := replicasOf(t, pgtest.Database(t), 1, func(_ int, c *Config) { c.OnReplaced = func(err error) { replaced <- err } })[0]
	db, err := pgx.Connect(t.Context(), w.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(t.Context())
	if _, err := db.Exec(t.Context(), `UPDATE replicas SET process = 'another'`); err != nil {
		t.Fatal(err)
	}
	if err := <-replaced; !errors.Is(err, store.ErrLocked) {
		t.Error(err)
	}
}

// Machines race for names, addresses and a key that is good for one of them.
func TestReplicasEnrolTogether(t *testing.T) {
	r := replicasOf(t, pgtest.Database(t), 2, nil)
	key, once := r[0].key(store.Key{Reusable: true}), r[1].key(store.Key{})
	const each = 15
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range each {
		for _, w := range r {
			m, late := w.machine(), w.machine()
			wg.Go(func() {
				if resp, err := m.register(m.registerRequest(key)); err != nil || !resp.MachineAuthorized {
					t.Errorf("machine %d: %+v, %v", i, resp, err)
				}
			})
			wg.Go(func() {
				resp, err := late.register(late.registerRequest(once))
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil:
					t.Error(err)
				case resp.MachineAuthorized:
					won++
				case resp.MeshCode != wire.CodeAuthKeyUsed:
					t.Errorf("%+v", resp)
				}
			})
		}
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("the one-time key let %d in", won)
	}
	for _, w := range r {
		w.s.lockOps()
		w.s.opMu.Unlock()
		w.s.mu.Lock()
		if n, m := len(w.s.nodes.byID), len(w.s.nodes.names.ids); n != 2*each+1 || m != n {
			t.Errorf("%d nodes with %d names, want %d", n, m, 2*each+1)
		}
		w.s.mu.Unlock()
	}
}

// waitsFor waits until n machines wait to be let in.
func (w *world) waitsFor(n int) {
	w.t.Helper()
	over := time.After(time.Minute)
	for {
		w.s.mu.Lock()
		have := w.s.logins.waiting
		w.s.mu.Unlock()
		if have == n {
			return
		}
		select {
		case <-over:
			w.t.Fatalf("%d wait, want %d", have, n)
		case <-time.After(time.Millisecond):
		}
	}
}

// An administrator answers at another replica than the one that the machine asks.
func TestReplicasShareLogins(t *testing.T) {
	r := replicasOf(t, pgtest.Database(t), 2, func(_ int, c *Config) { withLogin(c) })
	a, b := r[0], r[1]
	a.user("alice")
	m, other := a.machine(), a.machine()
	url := m.ask(nil)
	waits := m.follow(url, nil)
	a.waitsFor(1)
	ctx := t.Context()
	if _, err := b.s.ApproveLogin(ctx, "admin", url, "alice", nil); err != nil {
		t.Fatal(err)
	}
	if got := <-waits; got.err != nil || !got.MachineAuthorized {
		t.Errorf("approved elsewhere: %+v, %v", got.RegisterResponse, got.err)
	}
	if _, err := a.s.ApproveLogin(ctx, "admin", url, "alice", nil); !errors.Is(err, store.ErrConflict) {
		t.Errorf("approved twice: %v", err)
	}
	// The machine itself goes elsewhere while it waits.
	url = other.ask(nil)
	moved := other.at(b)
	waits = moved.follow(url, nil)
	b.waitsFor(1)
	if err := a.s.RejectLogin(ctx, "admin", url); err != nil {
		t.Fatal(err)
	}
	if got := <-waits; got.err != nil || got.MeshCode != wire.CodeLoginRejected {
		t.Errorf("rejected elsewhere: %+v, %v", got.RegisterResponse, got.err)
	}
}

// The database goes away: nodes keep what they have and hear of each other, what
// needs the database is refused with a reason, and all goes on when it is back.
func TestDatabaseAway(t *testing.T) {
	pg := pgtest.Server(t)
	w := replicasOf(t, pg.URL("postgres"), 1, nil)[0]
	allow(w)
	key := w.key(store.Key{Reusable: true})
	x, y := w.machine().join(key), w.machine().join(key)
	nx, ny := x.poll(nil), y.poll(nil)
	id := nx.self.ID
	ny.until(t, "x", func() bool { return online(ny.peers[id]) })
	pg.Stop()

	ep := netip.MustParseAddrPort("192.0.2.1:4")
	if status, code := x.lite(func(r *wire.MapRequest) { r.Endpoints = []netip.AddrPort{ep} }); status != http.StatusOK {
		t.Errorf("a report: %d %s", status, code)
	}
	ny.until(t, "x's endpoints", func() bool { return len(ny.peers[id].Endpoints) == 1 })
	if n := y.clone().poll(nil); len(n.peers) != 1 {
		t.Errorf("a new poll sees %d peers", len(n.peers))
	}
	if err := w.s.RenameNode(t.Context(), "admin", "agent", "ex"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("rename: %v", err)
	}
	late := w.machine()
	if _, err := late.register(late.registerRequest(key)); err == nil || !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("enrol: %v", err)
	}

	if status, code := late.lite(nil); status != http.StatusServiceUnavailable {
		t.Errorf("a report of a machine that nobody here knows: %d %s", status, code)
	}

	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for err := errors.New(""); err != nil && ctx.Err() == nil; { // until it is tried again
		if err = w.s.RenameNode(t.Context(), "admin", "agent", "ex"); err != nil && !errors.Is(err, store.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	late.join(key)
	// What was reported meanwhile is stored.
	for {
		nodes, err := w.store.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if nodes[0].Name == "ex" && len(nodes[0].Endpoints) == 1 {
			break
		}
		<-time.After(10 * time.Millisecond)
	}
}
