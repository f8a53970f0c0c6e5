package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/pgserver/pgtest"
)

// replicas opens the store of one database n times, as replicas "0", "1", ….
func replicas(t *testing.T, n int) []*Postgres {
	t.Helper()
	url := pgtest.Database(t)
	var all []*Postgres
	for i := range n {
		s := openPostgres(t, url)
		name := string(rune('0' + i))
		if number, err := s.Join(ctx, name); err != nil || number != i {
			t.Fatalf("replica %s has number %d: %v", name, number, err)
		}
		all = append(all, s)
	}
	return all
}

func TestChangesOfOthers(t *testing.T) {
	r := replicas(t, 2)
	a, b := r[0], r[1]
	_, text := newKey(t, a, Key{Reusable: true})
	pos := must[Position](t)(b.Position(ctx))
	// next is what b sees of a's changes since it looked last.
	next := func() Changes {
		t.Helper()
		c := must[Changes](t)(b.Changes(ctx, pos))
		pos = c.Next
		return c
	}
	if c := next(); len(c.Nodes)+len(c.What) > 0 || c.Lost {
		t.Errorf("nothing happened: %+v", c)
	}
	n := must[Node](t)(a.RegisterNode(ctx, text, testNode(1), start))
	if c := next(); !reflect.DeepEqual(c.Nodes, map[wire.NodeID]bool{n.ID: false}) || len(c.What) > 0 {
		t.Errorf("register: %+v", c)
	}
	must[User](t)(a.CreateUser(ctx, "admin", "alice", start))
	must[Policy](t)(a.SetPolicy(ctx, "admin", "{}", "", -1, start))
	must[Policy](t)(a.SetShadow(ctx, "admin", "{}", start))
	k, _ := newKey(t, a, Key{Kind: KeyRelay, Reusable: true})
	relay := Relay{NodeKey: identity.NewNode().Public(), Region: &wire.DERPRegion{RegionID: 901, Nodes: []*wire.DERPNode{{Name: "901a"}}}, Key: k.ID, Created: start}
	must[Key](t)(a.RevokeKey(ctx, "admin", k.ID, start))
	if err := errors.Join(a.PutRelay(ctx, relay, start), a.PutLogin(ctx, Login{Code: "x", Expires: start.Add(time.Hour)})); err != nil {
		t.Fatal(err)
	}
	must[Grant](t)(a.AddGrant(ctx, Grant{Author: "admin", Until: start.Add(time.Hour)}, start))
	want := map[string]bool{"users": true, "policies": true, "shadow": true, "keys": true, "relays": true, "logins": true, "grants": true}
	if c := next(); !reflect.DeepEqual(c.What, want) || len(c.Nodes) > 0 {
		t.Errorf("got %+v, want %v", c, want)
	}
	if err := a.RemoveNode(ctx, "admin", n.ID, true, start); err != nil {
		t.Fatal(err)
	}
	if c := next(); len(c.Nodes) != 1 {
		t.Errorf("removed: %+v", c)
	}
	must[User](t)(b.CreateUser(ctx, "admin", "bob", start))
	if c := next(); len(c.What) > 0 {
		t.Errorf("its own change came back: %+v", c)
	}
	// A commit was not confirmed: what became of it is looked up, until a later
	// one was.
	b.doubt.committed(errors.New("lost"))
	if c := next(); len(c.What) > 0 {
		t.Errorf("nothing happened: %+v", c)
	}
	must[User](t)(b.CreateUser(ctx, "admin", "carol", start))
	if c := next(); !c.What["users"] {
		t.Errorf("its own change in doubt: %+v", c)
	}
	must[User](t)(b.CreateUser(ctx, "admin", "dave", start))
	if c := next(); len(c.What) > 0 {
		t.Errorf("its own change without doubt: %+v", c)
	}
	// A log that was cut off before what it has seen.
	if _, err := a.db.Exec(`UPDATE mesh_version SET pruned = 1000000`); err != nil {
		t.Fatal(err)
	}
	if c := next(); !c.Lost {
		t.Errorf("cut off: %+v", c)
	}
	if c := next(); c.Lost {
		t.Errorf("once more: %+v", c)
	}
}

// What was decided of a login is not undone by who had not heard of it.
func TestLoginStaysDecided(t *testing.T) {
	r := replicas(t, 2)
	l := Login{Code: "x", Expires: start.Add(time.Hour)}
	decided := l
	decided.State, decided.Node = 1, 7
	if err := errors.Join(r[0].PutLogin(ctx, l), r[1].PutLogin(ctx, decided), r[0].PutLogin(ctx, l)); err != nil {
		t.Fatal(err)
	}
	if got := must[[]Login](t)(r[0].Logins(ctx)); len(got) != 1 || got[0].State != 1 || got[0].Node != 7 {
		t.Errorf("got %+v", got)
	}
}

// full is a state with something in each field.
func full(i int) NodeState {
	return NodeState{
		Disco: identity.NewDisco().Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4")}, HomeDERP: 900 + i,
		Hostinfo: &wire.Hostinfo{OS: "linux", Hostname: "a\\u0000'\"\n"}, Cap: 131, LastSeen: start, Polled: true, Instance: "i", Replica: "0",
	}
}

// Both ways to store what nodes report store all of it.
func TestReportsAreWhole(t *testing.T) { onEach(t, testReportsAreWhole) }

func testReportsAreWhole(t *testing.T, open func() Store) {
	s := open()
	_, text := newKey(t, s, Key{Reusable: true})
	want := make(map[wire.NodeID]NodeState)
	for i := range 3 {
		st := full(i)
		for f, v := 0, reflect.ValueOf(st); f < v.NumField(); f++ {
			if v.Field(f).IsZero() {
				t.Errorf("the test forgets %s", v.Type().Field(f).Name)
			}
		}
		if _, shared := s.(Shared); !shared {
			st.Replica = ""
		}
		want[must[Node](t)(s.RegisterNode(ctx, text, testNode(i+1), start)).ID] = st
	}
	want[99] = full(99) // which is gone
	if err := s.SaveStates(ctx, want); err != nil {
		t.Fatal(err)
	}
	for _, n := range must[[]Node](t)(s.Nodes(ctx)) {
		if !reflect.DeepEqual(n.NodeState, want[n.ID]) {
			t.Errorf("got %+v\nwant %+v", n.NodeState, want[n.ID])
		}
	}
}

// Of two replicas that report about a node, the one that has its newest poll
// counts.
func TestReportsOfTwoReplicas(t *testing.T) {
	r := replicas(t, 2)
	a, b := r[0], r[1]
	_, text := newKey(t, a, Key{})
	id := must[Node](t)(a.RegisterNode(ctx, text, testNode(1), start)).ID
	save := func(s *Postgres, home int, polls, claim bool) {
		t.Helper()
		st := full(home)
		if st.Replica = ""; polls {
			st.Replica = s.Replica()
		}
		if err := s.SaveReports(ctx, map[wire.NodeID]NodeState{id: st}, map[wire.NodeID]bool{id: claim}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(home int, where string) {
		t.Helper()
		n := must[[]Node](t)(b.NodesByID(ctx, []wire.NodeID{id, 99}))
		if len(n) != 1 || n[0].HomeDERP != 900+home || n[0].Replica != where {
			t.Errorf("home %d at %q, want %d at %q", n[0].HomeDERP, n[0].Replica, 900+home, where)
		}
	}
	save(a, 1, true, true)
	check(1, "0")
	save(b, 2, false, false) // which it has no more
	check(1, "0")
	pos := must[Position](t)(a.Position(ctx))
	save(b, 3, true, true) // it came here
	check(3, "1")
	if c := must[Changes](t)(a.Changes(ctx, pos)); !c.Nodes[id] || len(c.What) > 0 {
		t.Errorf("seen at the other: %+v", c)
	}
	save(a, 4, true, false) // a has not noticed yet
	check(3, "1")
	save(a, 5, false, false)
	check(3, "1")
	save(b, 6, false, false)
	check(6, "")
	save(a, 7, false, false)
	check(7, "")
	save(a, 8, true, true)
	// The process is started anew: it has nobody's poll.
	if number, err := a.Join(ctx, "0"); err != nil || number != 0 {
		t.Errorf("number %d: %v", number, err)
	}
	check(8, "")
}

func TestBeat(t *testing.T) {
	r := replicas(t, 3)
	info := ReplicaInfo{Regions: []*wire.DERPRegion{{RegionID: 900}}, Relays: []identity.NodePublic{identity.NewNode().Public()}}
	must[map[string]ReplicaInfo](t)(r[0].Beat(ctx, info))
	if got := must[map[string]ReplicaInfo](t)(r[1].Beat(ctx, ReplicaInfo{})); len(got) != 2 || !reflect.DeepEqual(got["0"], info) {
		t.Errorf("others: %+v", got)
	}
	if err := r[0].Leave(ctx); err != nil {
		t.Fatal(err)
	}
	if got := must[map[string]ReplicaInfo](t)(r[1].Beat(ctx, ReplicaInfo{})); len(got) != 1 {
		t.Errorf("others: %+v", got)
	}
}

// A copy of a replica cannot be it while that lives; and who stood still for so
// long that another took its place is told.
func TestCopyOfReplica(t *testing.T) {
	url := pgtest.Database(t)
	a, b := openPostgres(t, url), openPostgres(t, url)
	if _, err := a.Join(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	living, die := context.WithCancel(ctx)
	var beats sync.WaitGroup
	beats.Go(func() {
		for living.Err() == nil {
			if _, err := a.Beat(ctx, ReplicaInfo{}); err != nil {
				t.Error(err)
			}
		}
	})
	if _, err := b.Join(ctx, "x"); !errors.Is(err, ErrLocked) {
		t.Errorf("a copy of one that lives: %v", err)
	}
	die()
	beats.Wait()
	if number, err := b.Join(ctx, "x"); err != nil || number != 0 {
		t.Errorf("number %d in place of one that is silent: %v", number, err)
	}
	if _, err := a.Beat(ctx, ReplicaInfo{}); !errors.Is(err, ErrLocked) {
		t.Errorf("who stood still: %v", err)
	}
	if err := a.Leave(ctx); err != nil { // which is not its any more
		t.Error(err)
	}
	c := openPostgres(t, url)
	if _, err := c.Join(ctx, "y"); err != nil {
		t.Fatal(err)
	}
	if others := must[map[string]ReplicaInfo](t)(c.Beat(ctx, ReplicaInfo{})); len(others) != 1 {
		t.Errorf("others: %+v", others)
	}
}

// An operation that takes too long is a database that is away, whatever the
// layers between call it.
func TestTakesTooLong(t *testing.T) {
	url := pgtest.Database(t)
	s, other := openPostgres(t, url), openPostgres(t, url)
	tx := must[*sql.Tx](t)(other.db.Begin())
	defer tx.Rollback()
	if err := other.onlyWriter(ctx, tx); err != nil {
		t.Fatal(err)
	}
	s.dialect.limit = 50 * time.Millisecond
	if _, err := s.CreateUser(ctx, "admin", "alice", start); !errors.Is(err, ErrUnavailable) {
		t.Errorf("another writes all the time: %v", err)
	}
	for _, err := range []error{sql.ErrTxDone, sql.ErrConnDone, driver.ErrBadConn, context.DeadlineExceeded} {
		if err := s.classify(fmt.Errorf("commit: %w", err)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("not taken for a database that is away: %v", err)
		}
	}
}

func TestListen(t *testing.T) {
	r := replicas(t, 2)
	listening, stop := context.WithCancel(ctx)
	defer stop()
	woken := make(chan struct{}, 100)
	var done sync.WaitGroup
	done.Go(func() {
		if err := r[1].Listen(listening, func() { woken <- struct{}{} }); listening.Err() == nil {
			t.Error(err)
		}
	})
	<-woken // it listens
	must[User](t)(r[0].CreateUser(ctx, "admin", "alice", start))
	<-woken
	stop()
	done.Wait()
}

// A one-time key is used once and names and addresses are unique, whichever
// replica is asked.
func TestReplicasRace(t *testing.T) {
	r := replicas(t, 3)
	for round := range 5 {
		_, text := newKey(t, r[0], Key{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for i := range 60 {
			wg.Go(func() {
				_, err := r[i%3].RegisterNode(ctx, text, testNode(1000+round*100+i), start)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won++
				case !errors.Is(err, wire.ErrAuthKeyUsed):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Errorf("round %d: %d won", round, won)
		}
	}
	if _, err := verify(t, r[1], AuditHead{}); err != nil {
		t.Error(err)
	}
}

// A database that a newer program has changed: what it added does not matter,
// what it broke does, at once.
func TestNewerTables(t *testing.T) {
	url := pgtest.Database(t)
	s := openPostgres(t, url)
	if _, err := s.db.Exec(`UPDATE mesh_version SET version = 1000`); err != nil {
		t.Fatal(err)
	}
	openPostgres(t, url)
	must[User](t)(s.CreateUser(ctx, "admin", "alice", start))
	if _, err := s.db.Exec(`UPDATE mesh_version SET needs = 1000`); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPostgres(ctx, url); !errors.Is(err, ErrNewer) {
		t.Errorf("open: %v", err)
	}
	if _, err := s.CreateUser(ctx, "admin", "bob", start); !errors.Is(err, ErrNewer) {
		t.Errorf("write: %v", err)
	}
}

// Many programs that find an empty database make its tables once.
func TestMigrateTogether(t *testing.T) {
	url := pgtest.Database(t)
	var wg sync.WaitGroup
	keys := make([]identity.MachinePrivate, 5)
	for i := range keys {
		wg.Go(func() {
			s, err := OpenPostgres(ctx, url)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			keys[i], err = s.ServerKey(ctx)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range keys {
		if !k.Equal(keys[0]) {
			t.Error("two servers have different keys")
		}
	}
}
