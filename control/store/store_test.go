package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) {
	if place := os.Getenv(childEnv); place != "" {
		child(place)
		return
	}
	goleak.VerifyTestMain(pgtest.Runner{M: m})
}

var (
	ctx   = context.Background()
	start = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
)

func open(t testing.TB, path string) *SQLite {
	t.Helper()
	s, err := OpenSQLite(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// onEach runs a test of what Store promises on each kind of store. The function
// that it hands over opens a new store the first time, and then the same again.
func onEach(t *testing.T, test func(*testing.T, func() Store)) {
	t.Run("SQLite", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "sub", "mesh.db")
		test(t, func() Store { return open(t, path) })
	})
	t.Run("PostgreSQL", func(t *testing.T) {
		url := pgtest.Database(t)
		test(t, func() Store { return openPostgres(t, url) })
	})
}

// dbOf is the way around the store.
func dbOf(s Store) *sql.DB {
	switch s := s.(type) {
	case *SQLite:
		return s.db
	case *Postgres:
		return s.db
	}
	return nil
}

func openPostgres(t testing.TB, url string) *Postgres {
	t.Helper()
	s, err := OpenPostgres(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// testNode is a node of which everything unique derives from i.
func testNode(i int) Node {
	return Node{
		StableID: identity.StableID(fmt.Sprintf("n%dCNTRL", i)),
		Machine:  identity.NewMachine().Public(),
		Key:      identity.NewNode().Public(),
		Tags:     []string{"tag:a"},
		Hostname: "agent",
		Name:     fmt.Sprintf("agent-%d", i),
		IPv4:     netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}),
		IPv6:     netip.AddrFrom16([16]byte{0xfd, 0x7a, 14: byte(i >> 8), 15: byte(i)}),
		Created:  start,
	}
}

func newKey(t testing.TB, s Store, k Key) (Key, string) {
	t.Helper()
	if k.Kind == "" {
		k.Kind = KeyNode
	}
	k.Created = start
	k, text, err := s.CreateKey(ctx, "test", k)
	if err != nil {
		t.Fatal(err)
	}
	return k, text
}

func TestEverythingSurvivesReopening(t *testing.T) { onEach(t, testEverythingSurvivesReopening) }

func testEverythingSurvivesReopening(t *testing.T, open func() Store) {
	s := open()
	u := must[User](t)(s.CreateUser(ctx, "socket", "alice@example.com", start))
	if u.Role != RoleOwner {
		t.Errorf("first user is %q, want owner", u.Role)
	}
	if v := must[User](t)(s.CreateUser(ctx, "socket", "bob", start)); v.Role != RoleMember {
		t.Errorf("second user is %q, want member", v.Role)
	}
	k, text := newKey(t, s, Key{Tags: []string{"tag:b", "tag:a", "tag:a"}, Reusable: true, Expires: start.Add(time.Hour)})
	n := testNode(1)
	n.NodeState = NodeState{
		Disco:     identity.NewDisco().Public(),
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4"), netip.MustParseAddrPort("[2001:db8::1]:5")},
		HomeDERP:  900, Hostinfo: &wire.Hostinfo{OS: "linux", Hostname: "agent"}, Cap: 131, LastSeen: start, Polled: true,
	}
	n = must[Node](t)(s.RegisterNode(ctx, text, n, start))
	p := must[Policy](t)(s.SetPolicy(ctx, "alice", "{}", "", 0, start))
	rk, _ := newKey(t, s, Key{Kind: KeyRelay, Reusable: true})
	relay := Relay{NodeKey: identity.NewNode().Public(), Region: &wire.DERPRegion{RegionID: 901, Nodes: []*wire.DERPNode{{Name: "901a"}}}, Key: rk.ID, Created: start}
	if err := s.PutRelay(ctx, relay, start); err != nil {
		t.Fatal(err)
	}
	serverKey := must[identity.MachinePrivate](t)(s.ServerKey(ctx))
	secret := must[[]byte](t)(s.Secret(ctx, "relay", func() ([]byte, error) { return []byte("x"), nil }))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open()
	if got := must[identity.MachinePrivate](t)(s.ServerKey(ctx)); !got.Equal(serverKey) {
		t.Error("server key changed")
	}
	if got := must[[]byte](t)(s.Secret(ctx, "relay", func() ([]byte, error) { return []byte("y"), nil })); string(got) != string(secret) {
		t.Errorf("secret is %q, want %q", got, secret)
	}
	if got := must[[]Node](t)(s.Nodes(ctx)); len(got) != 1 || !reflect.DeepEqual(got[0], n) {
		t.Errorf("nodes:\n got %+v\nwant %+v", got, n)
	}
	k.Used, k.UsedBy = start, n.ID
	if got := must[[]Key](t)(s.Keys(ctx)); len(got) != 2 || !reflect.DeepEqual(got[0], k) {
		t.Errorf("key:\n got %+v\nwant %+v", got[0], k)
	}
	if want := []string{"tag:a", "tag:b"}; !reflect.DeepEqual(k.Tags, want) {
		t.Errorf("tags %v, want %v", k.Tags, want)
	}
	if got := must[Policy](t)(s.Policy(ctx)); got != p {
		t.Errorf("policy %+v, want %+v", got, p)
	}
	if got := must[[]Relay](t)(s.Relays(ctx)); len(got) != 1 || !reflect.DeepEqual(got[0], relay) {
		t.Errorf("relays %+v, want %+v", got, relay)
	}
	audit := must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 100))
	for _, e := range audit {
		if strings.Contains(e.Detail+e.Object, text) {
			t.Error("audit holds a secret")
		}
	}
	if len(audit) != 7 {
		t.Errorf("%d audit entries, want 7: %+v", len(audit), audit)
	}
}

func TestKeyErrors(t *testing.T) { onEach(t, testKeyErrors) }

func testKeyErrors(t *testing.T, open func() Store) {
	s := open()
	_, fresh := newKey(t, s, Key{})
	_, expired := newKey(t, s, Key{Expires: start.Add(-time.Second)})
	rk, revoked := newKey(t, s, Key{})
	_, used := newKey(t, s, Key{})
	_, relay := newKey(t, s, Key{Kind: KeyRelay, Reusable: true})
	if _, err := s.RevokeKey(ctx, "test", rk.ID, start); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RegisterNode(ctx, used, testNode(1), start); err != nil {
		t.Fatal(err)
	}
	// flip changes the last but one character, so that the text stays canonical.
	flip := func(text string) string {
		b := []byte(text)
		if b[len(b)-2] == 'A' {
			b[len(b)-2] = 'B'
		} else {
			b[len(b)-2] = 'A'
		}
		return string(b)
	}
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"fresh":           {fresh, nil},
		"expired":         {expired, wire.ErrAuthKeyExpired},
		"revoked":         {revoked, wire.ErrAuthKeyRevoked},
		"used":            {used, wire.ErrAuthKeyUsed},
		"flipped fresh":   {flip(fresh), wire.ErrAuthKeyUnknown},
		"flipped expired": {flip(expired), wire.ErrAuthKeyUnknown},
		"flipped revoked": {flip(revoked), wire.ErrAuthKeyUnknown},
		"flipped used":    {flip(used), wire.ErrAuthKeyUnknown},
		"truncated":       {used[:len(used)-1], wire.ErrAuthKeyUnknown},
		"longer":          {used + "A", wire.ErrAuthKeyUnknown},
		"no such":         {strings.Replace(fresh, "mesh-auth-1-", "mesh-auth-99-", 1), wire.ErrAuthKeyUnknown},
		"leading zero":    {strings.Replace(fresh, "mesh-auth-1-", "mesh-auth-01-", 1), wire.ErrAuthKeyUnknown},
		"relay key":       {relay, wire.ErrAuthKeyUnknown},
		"renamed relay":   {strings.Replace(relay, "relay", "auth", 1), wire.ErrAuthKeyUnknown},
		"empty":           {"", wire.ErrAuthKeyUnknown},
		"huge":            {"mesh-auth-1-" + strings.Repeat("A", 1<<16), wire.ErrAuthKeyUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			k, err := s.VerifyKey(ctx, KeyNode, c.text, start)
			if !errors.Is(err, c.want) || (c.want != nil && err.Error() != c.want.Error()) {
				t.Errorf("error %v, want exactly %v", err, c.want)
			}
			if c.want == wire.ErrAuthKeyUnknown && k.ID != 0 {
				t.Errorf("an unknown key yields %+v", k)
			}
			if c.want != nil {
				if _, err := s.RegisterNode(ctx, c.text, testNode(2), start); !errors.Is(err, c.want) {
					t.Errorf("register: %v, want %v", err, c.want)
				}
			}
		})
	}
	if n := must[[]Node](t)(s.Nodes(ctx)); len(n) != 1 {
		t.Errorf("%d nodes, want 1", len(n))
	}
}

func TestOneTimeKeyUnderConcurrency(t *testing.T) { onEach(t, testOneTimeKeyUnderConcurrency) }

func testOneTimeKeyUnderConcurrency(t *testing.T, open func() Store) {
	s := open()
	for round := range 5 {
		_, text := newKey(t, s, Key{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		var won, used, other int
		for i := range 200 {
			wg.Go(func() {
				_, err := s.RegisterNode(ctx, text, testNode(round*200+i), start)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won++
				case errors.Is(err, wire.ErrAuthKeyUsed):
					used++
				default:
					other++
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 || used != 199 {
			t.Errorf("round %d: %d won, %d used, %d other; want 1, 199, 0", round, won, used, other)
		}
	}
}

func TestConflictUsesNothingUp(t *testing.T) { onEach(t, testConflictUsesNothingUp) }

func testConflictUsesNothingUp(t *testing.T, open func() Store) {
	s := open()
	_, a := newKey(t, s, Key{})
	_, b := newKey(t, s, Key{})
	first := must[Node](t)(s.RegisterNode(ctx, a, testNode(1), start))
	for name, spoil := range map[string]func(*Node){
		"name": func(n *Node) { n.Name = first.Name },
		"ipv4": func(n *Node) { n.IPv4 = first.IPv4 },
		"ipv6": func(n *Node) { n.IPv6 = first.IPv6 },
		"key":  func(n *Node) { n.Key = first.Key },
		"id":   func(n *Node) { n.StableID = first.StableID },
	} {
		n := testNode(2)
		spoil(&n)
		if _, err := s.RegisterNode(ctx, b, n, start); !errors.Is(err, ErrConflict) {
			t.Errorf("same %s: %v, want ErrConflict", name, err)
		}
	}
	if _, err := s.RegisterNode(ctx, b, testNode(2), start); err != nil {
		t.Errorf("key was used up by a refused registration: %v", err)
	}
}

func TestNodeIDsAreNeverReused(t *testing.T) { onEach(t, testNodeIDsAreNeverReused) }

func testNodeIDsAreNeverReused(t *testing.T, open func() Store) {
	s := open()
	_, text := newKey(t, s, Key{Reusable: true})
	var last wire.NodeID
	for i := range 5 {
		n := must[Node](t)(s.RegisterNode(ctx, text, testNode(i), start))
		if n.ID <= last {
			t.Fatalf("ID %d after %d", n.ID, last)
		}
		last = n.ID
		if err := s.RemoveNode(ctx, "test", n.ID, i%2 == 0, start); err != nil {
			t.Fatal(err)
		}
		if got := must[wire.NodeID](t)(s.LastNodeID(ctx)); got != last {
			t.Errorf("last ID %d, want %d", got, last)
		}
	}
}

// A node that makes itself new keys for ever does not fill the store.
func TestManyRotations(t *testing.T) { onEach(t, testManyRotations) }

func testManyRotations(t *testing.T, open func() Store) {
	s := open()
	_, text := newKey(t, s, Key{})
	n := must[Node](t)(s.RegisterNode(ctx, text, testNode(1), start))
	old := []identity.NodePublic{n.Key}
	for i := range 2 * keptKeys {
		key := identity.NewNode().Public()
		if err := s.RotateNodeKey(ctx, n.ID, key, time.Time{}, time.Time{}, start.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
		old = append(old, key)
	}
	for i, key := range old {
		_, err := s.DeadKey(ctx, key)
		if known := i >= keptKeys && i < len(old)-1; known != (err == nil) {
			t.Errorf("key %d: %v", i, err)
		}
	}
}

// What a node may do about its key's expiry ends with its auth key, and with an
// expiry that an administrator chose.
func TestKeyLife(t *testing.T) { onEach(t, testKeyLife) }

func testKeyLife(t *testing.T, open func() Store) {
	s := open()
	k, text := newKey(t, s, Key{Reusable: true})
	life := func(i int) time.Duration { return must[[]Node](t)(s.Nodes(ctx))[i].KeyLife }
	var ids []wire.NodeID
	for i := range 2 {
		n := testNode(i + 1)
		n.KeyLife, n.Instance = time.Duration(i)-1, "abc"
		n.Expires = start.Add(time.Hour)
		n = must[Node](t)(s.RegisterNode(ctx, text, n, start))
		ids = append(ids, n.ID)
	}
	if n := must[[]Node](t)(s.Nodes(ctx))[0]; n.KeyLife != -1 || n.Instance != "abc" {
		t.Errorf("%+v", n)
	}
	if err := s.ExpireNode(ctx, "admin", ids[0], time.Time{}, start); err != nil || life(0) != -1 {
		t.Errorf("never: %v, %v", life(0), err)
	}
	if err := s.ExpireNode(ctx, "admin", ids[0], start, start); err != nil || life(0) != 0 {
		t.Errorf("now: %v, %v", life(0), err)
	}
	renewed := must[[]Node](t)(s.Nodes(ctx))[1]
	renewed.Key, renewed.KeyLife = identity.NewNode().Public(), time.Hour
	must[Node](t)(s.RegisterNode(ctx, text, renewed, start))
	if got := must[[]KeptKey](t)(s.KeptKeys(ctx, start)); len(got) != 0 {
		t.Errorf("keys that go on after another key: %+v", got)
	}
	if life(1) != time.Hour {
		t.Errorf("enrolled anew: %v", life(1))
	}
	must[Key](t)(s.RevokeKey(ctx, "admin", k.ID, start))
	if life(1) != 0 {
		t.Errorf("its auth key was revoked: %v", life(1))
	}
}

func TestDeadKeys(t *testing.T) { onEach(t, testDeadKeys) }

func testDeadKeys(t *testing.T, open func() Store) {
	s := open()
	k, text := newKey(t, s, Key{Reusable: true})
	n := must[Node](t)(s.RegisterNode(ctx, text, testNode(1), start))
	if _, err := s.DeadKey(ctx, n.Key); !errors.Is(err, ErrNotFound) {
		t.Fatalf("live key: %v, want ErrNotFound", err)
	}
	old := n.Key
	n.Key = identity.NewNode().Public()
	later := start.Add(time.Hour)
	if err := s.RotateNodeKey(ctx, n.ID, n.Key, later, start.Add(time.Minute), start); err != nil {
		t.Fatal(err)
	}
	if got := must[[]KeptKey](t)(s.KeptKeys(ctx, start)); len(got) != 1 || got[0] != (KeptKey{old, n.ID, start.Add(time.Minute)}) {
		t.Errorf("keys that go on: %+v", got)
	}
	if got := must[[]KeptKey](t)(s.KeptKeys(ctx, start.Add(time.Minute))); len(got) != 0 {
		t.Errorf("keys that go on for too long: %+v", got)
	}
	if got := must[[]Node](t)(s.Nodes(ctx))[0]; got.Key != n.Key || !got.Expires.Equal(later) {
		t.Errorf("rotated: %+v", got)
	}
	d := must[DeadKey](t)(s.DeadKey(ctx, old))
	if d.Removed || d.Machine != n.Machine || d.Node != n.ID {
		t.Errorf("after rotation: %+v", d)
	}
	if err := s.RotateNodeKey(ctx, n.ID, old, later, time.Time{}, start); !errors.Is(err, ErrConflict) {
		t.Errorf("rotate back: %v, want ErrConflict", err)
	}
	renewed := n
	renewed.Key = identity.NewNode().Public()
	must[Node](t)(s.RegisterNode(ctx, text, renewed, start))
	must[DeadKey](t)(s.DeadKey(ctx, n.Key))
	if err := s.RemoveNode(ctx, "test", n.ID, true, start); err != nil {
		t.Fatal(err)
	}
	if d := must[DeadKey](t)(s.DeadKey(ctx, renewed.Key)); !d.Removed {
		t.Errorf("after removal: %+v", d)
	}
	if !must[bool](t)(s.Buried(ctx, n.Machine, k.ID)) || must[bool](t)(s.Buried(ctx, n.Machine, k.ID+1)) {
		t.Error("Buried is wrong")
	}
	again := testNode(1)
	again.Key = renewed.Key
	if _, err := s.RegisterNode(ctx, text, again, start); !errors.Is(err, ErrConflict) {
		t.Errorf("removed key again: %v, want ErrConflict", err)
	}
	renewed.Key = identity.NewNode().Public()
	if _, err := s.RegisterNode(ctx, text, renewed, start); !errors.Is(err, ErrNotFound) {
		t.Errorf("renew a removed node: %v, want ErrNotFound", err)
	}
}

func TestUsersAndPolicies(t *testing.T) { onEach(t, testUsersAndPolicies) }

func testUsersAndPolicies(t *testing.T, open func() Store) {
	s := open()
	u := must[User](t)(s.CreateUser(ctx, "socket", "alice", start))
	if _, err := s.CreateUser(ctx, "socket", "ALICE", start); !errors.Is(err, ErrConflict) {
		t.Errorf("same name: %v, want ErrConflict", err)
	}
	_, text := newKey(t, s, Key{User: u.ID, Reusable: true})
	n := testNode(1)
	n.User, n.Tags = u.ID, nil
	n = must[Node](t)(s.RegisterNode(ctx, text, n, start))
	if err := s.RemoveUser(ctx, "socket", u.ID, start); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "still has 1 nodes") {
		t.Errorf("remove a user with nodes: %v", err)
	}
	if err := s.RemoveNode(ctx, "socket", n.ID, true, start); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveUser(ctx, "socket", u.ID, start); err != nil {
		t.Error(err)
	}
	if _, err := s.VerifyKey(ctx, KeyNode, text, start); !errors.Is(err, wire.ErrAuthKeyUnknown) {
		t.Errorf("key of a removed user: %v", err)
	}
	if err := s.RemoveUser(ctx, "socket", u.ID, start); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove twice: %v, want ErrNotFound", err)
	}

	if _, err := s.Policy(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("no policy: %v, want ErrNotFound", err)
	}
	for i, expect := range []int64{0, 1, -1} {
		if p := must[Policy](t)(s.SetPolicy(ctx, "alice", "{}", "", expect, start)); p.Version != int64(i+1) {
			t.Errorf("version %d, want %d", p.Version, i+1)
		}
	}
	if _, err := s.SetPolicy(ctx, "alice", "{}", "", 1, start); !errors.Is(err, ErrConflict) {
		t.Errorf("stale write: %v, want ErrConflict", err)
	}
}

func TestRelayConflict(t *testing.T) { onEach(t, testRelayConflict) }

func testRelayConflict(t *testing.T, open func() Store) {
	s := open()
	k1, _ := newKey(t, s, Key{Kind: KeyRelay, Reusable: true})
	k2, _ := newKey(t, s, Key{Kind: KeyRelay, Reusable: true})
	put := func(key identity.NodePublic, id int, k Key) error {
		return s.PutRelay(ctx, Relay{NodeKey: key, Region: &wire.DERPRegion{RegionID: id}, Key: k.ID, Created: start}, start)
	}
	a, b, c := identity.NewNode().Public(), identity.NewNode().Public(), identity.NewNode().Public()
	if err := errors.Join(put(a, 901, k1), put(a, 901, k1), put(a, 902, k1), put(b, 901, k2), put(c, 902, k1)); err != nil {
		t.Fatal(err)
	}
	if err := put(b, 902, k2); !errors.Is(err, ErrConflict) {
		t.Errorf("foreign region: %v, want ErrConflict", err)
	}
	if err := put(a, 903, k2); !errors.Is(err, ErrConflict) {
		t.Errorf("relay with another relay key: %v, want ErrConflict", err)
	}
	regions := map[identity.NodePublic]int{}
	for _, r := range must[[]Relay](t)(s.Relays(ctx)) {
		regions[r.NodeKey] = r.Region.RegionID
	}
	if want := map[identity.NodePublic]int{a: 902, b: 901, c: 902}; !reflect.DeepEqual(regions, want) {
		t.Errorf("relays %v, want %v", regions, want)
	}
	if err := s.RemoveRelay(ctx, "test", a, start); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveRelay(ctx, "test", a, start); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove twice: %v", err)
	}
}
