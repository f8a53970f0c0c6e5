package store

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/pgserver/pgtest"
)

// filled is a store with something in every table.
func filled(t *testing.T, path string) *SQLite {
	t.Helper()
	s := open(t, path)
	u := must[User](t)(s.CreateUser(ctx, "admin", "alice", start))
	must[User](t)(s.CreateUser(ctx, "admin", "bob", start))
	_, text := newKey(t, s, Key{Reusable: true, Tags: []string{"tag:a"}})
	newKey(t, s, Key{User: u.ID})
	var last Node
	for i := range 5 {
		last = must[Node](t)(s.RegisterNode(ctx, text, testNode(i+1), start))
	}
	st := full(1)
	st.Replica = ""
	rk, _ := newKey(t, s, Key{Kind: KeyRelay, Reusable: true})
	must[Policy](t)(s.SetPolicy(ctx, "admin", `{"acls":[]} // ü`, "", -1, start))
	must[Policy](t)(s.SetShadow(ctx, "admin", "{}", start))
	must[Grant](t)(s.AddGrant(ctx, Grant{Author: "admin", Until: start.Add(time.Hour)}, start))
	if err := errors.Join(
		s.SaveStates(ctx, map[wire.NodeID]NodeState{1: st}),
		s.RotateNodeKey(ctx, 2, identity.NewNode().Public(), time.Time{}, start.Add(time.Minute), start),
		s.RemoveNode(ctx, "admin", last.ID, true, start), // its number is not given out again
		s.PutRelay(ctx, Relay{NodeKey: identity.NewNode().Public(), Region: &wire.DERPRegion{RegionID: 901, Nodes: []*wire.DERPNode{{Name: "901a"}}}, Key: rk.ID, Created: start}, start),
	); err != nil {
		t.Fatal(err)
	}
	must[[]byte](t)(s.Secret(ctx, "relay", func() ([]byte, error) { return []byte("x"), nil }))
	return s
}

// sameStores compares what two stores answer.
func sameStores(t *testing.T, a, b Store) {
	t.Helper()
	same := func(what string, x, y any) {
		t.Helper()
		if !reflect.DeepEqual(x, y) {
			t.Errorf("%s:\n got %+v\nwant %+v", what, y, x)
		}
	}
	same("users", must[[]User](t)(a.Users(ctx)), must[[]User](t)(b.Users(ctx)))
	same("keys", must[[]Key](t)(a.Keys(ctx)), must[[]Key](t)(b.Keys(ctx)))
	same("nodes", must[[]Node](t)(a.Nodes(ctx)), must[[]Node](t)(b.Nodes(ctx)))
	same("last node", must[wire.NodeID](t)(a.LastNodeID(ctx)), must[wire.NodeID](t)(b.LastNodeID(ctx)))
	same("policies", must[[]Policy](t)(a.Policies(ctx, 10)), must[[]Policy](t)(b.Policies(ctx, 10)))
	same("policy", must[Policy](t)(a.Policy(ctx)), must[Policy](t)(b.Policy(ctx)))
	same("shadow", must[Policy](t)(a.Shadow(ctx)), must[Policy](t)(b.Shadow(ctx)))
	same("grants", must[[]Grant](t)(a.Grants(ctx, true, 10)), must[[]Grant](t)(b.Grants(ctx, true, 10)))
	same("relays", must[[]Relay](t)(a.Relays(ctx)), must[[]Relay](t)(b.Relays(ctx)))
	same("audit", must[[]AuditEntry](t)(a.Audit(ctx, time.Time{}, 0, 1000)), must[[]AuditEntry](t)(b.Audit(ctx, time.Time{}, 0, 1000)))
	same("head", must[AuditHead](t)(a.AuditHead(ctx)), must[AuditHead](t)(b.AuditHead(ctx)))
	same("server key", must[identity.MachinePrivate](t)(a.ServerKey(ctx)), must[identity.MachinePrivate](t)(b.ServerKey(ctx)))
}

func TestTransfer(t *testing.T) {
	from := filled(t, filepath.Join(t.TempDir(), "mesh.db"))
	url := pgtest.Database(t)
	to := openPostgres(t, url)
	if n := must[int](t)(Transfer(ctx, from, to)); n < 20 {
		t.Errorf("%d rows", n)
	}
	sameStores(t, from, to)
	// It goes on where the file ended.
	_, text := newKey(t, to, Key{Reusable: true})
	if n := must[Node](t)(to.RegisterNode(ctx, text, testNode(9), start)); n.ID != 6 {
		t.Errorf("the next node has number %d, want 6", n.ID)
	}
	if p := must[Policy](t)(to.SetPolicy(ctx, "admin", "{}", "", 1, start)); p.Version != 2 {
		t.Errorf("the next policy is version %d, want 2", p.Version)
	}
	if _, err := verify(t, to, AuditHead{}); err != nil {
		t.Error(err)
	}
	if _, err := Transfer(ctx, from, to); !errors.Is(err, ErrConflict) {
		t.Errorf("over a store that is used: %v", err)
	}
}

func TestBackup(t *testing.T) {
	dir := t.TempDir()
	s := filled(t, filepath.Join(dir, "mesh.db"))
	path := filepath.Join(dir, "copy.db")
	if err := s.Backup(ctx, path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi, err)
	}
	if err := s.Backup(ctx, path); !errors.Is(err, ErrExists) {
		t.Errorf("over the former: %v", err)
	}
	if err := s.Backup(ctx, filepath.Join(dir, "none", "copy.db")); err == nil {
		t.Error("into a directory that does not exist")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".mesh-backup-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	sameStores(t, s, open(t, path))
}
