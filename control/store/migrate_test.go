package store

import (
	"database/sql"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// version1Key is the text of the first key in testdata/version1.sql.
const version1Key = "mesh-auth-1-nDad8m2-5XKC25jnyN0VDHWLqX5kMXmBFFTIj9OXgB8"

// oldFile makes a store as the first version of this program left it: what it
// wrote is in testdata/version1.sql.
func oldFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mesh.db")
	text, err := os.ReadFile("testdata/version1.sql")
	if err != nil {
		t.Fatal(err)
	}
	db := must[*sql.DB](t)(sql.Open("sqlite", path))
	defer db.Close()
	if _, err := db.Exec(string(text)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOldFileIsMigrated(t *testing.T) {
	path := oldFile(t)
	for range 2 { // the second time it is not old any more
		s := open(t, path)
		nodes := must[[]Node](t)(s.Nodes(ctx))
		if len(nodes) != 1 {
			t.Fatalf("nodes: %+v", nodes)
		}
		n := nodes[0]
		if n.Name != "laptop" || n.Named || n.User != 1 || n.IPv4 != netip.MustParseAddr("100.64.0.1") || !n.Expires.Equal(start.AddDate(0, 0, 90)) ||
			n.HomeDERP != 900 || n.Cap != 131 || !n.Polled || n.Hostinfo.OS != "linux" || n.Disco.IsZero() || len(n.Endpoints) != 1 {
			t.Errorf("node: %+v", n)
		}
		keys := must[[]Key](t)(s.Keys(ctx))
		if len(keys) != 2 || keys[0].NodeExpiry != 0 || keys[1].NodeExpiry != 0 || keys[1].Tags[0] != "tag:web" || !keys[1].Ephemeral || keys[1].UsedBy != 2 {
			t.Errorf("keys: %+v", keys)
		}
		if k, err := s.VerifyKey(ctx, KeyNode, version1Key, start); err != nil || k.ID != 1 {
			t.Errorf("an old key: %+v, %v", k, err)
		}
		if p := must[Policy](t)(s.Policy(ctx)); p.Version != 1 {
			t.Errorf("policy: %+v", p)
		}
		if id := must[wire.NodeID](t)(s.LastNodeID(ctx)); id != 2 {
			t.Errorf("last node %d, want 2", id)
		}
		must[identity.MachinePrivate](t)(s.ServerKey(ctx))
		if log := must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 100)); len(log) != 7 {
			t.Errorf("audit: %+v", log)
		}
		s.Close()
	}
	// And the new columns work in it.
	s := open(t, path)
	if err := s.RenameNode(ctx, "admin", 1, "laptop", "desk", true, start); err != nil {
		t.Fatal(err)
	}
	k, _ := newKey(t, s, Key{User: 1, NodeExpiry: -1})
	s.Close()
	s = open(t, path)
	if n := must[[]Node](t)(s.Nodes(ctx))[0]; !n.Named || n.Name != "desk" || n.Hostname != "laptop" {
		t.Errorf("renamed node: %+v", n)
	}
	if keys := must[[]Key](t)(s.Keys(ctx)); keys[2].ID != k.ID || keys[2].NodeExpiry != -1 {
		t.Errorf("key %+v, want %+v", keys[2], k)
	}
}

func TestAdmitNodeAndOwners(t *testing.T) { onEach(t, testAdmitNodeAndOwners) }

func testAdmitNodeAndOwners(t *testing.T, open func() Store) {
	s := open()
	u := must[User](t)(s.CreateUser(ctx, "admin", "alice", start))
	n := testNode(1)
	n.User, n.Tags, n.Expires = u.ID, nil, start.Add(time.Hour)
	n = must[Node](t)(s.AdmitNode(ctx, "admin", n, start))
	if _, err := s.AdmitNode(ctx, "admin", testNode(1), start); !errors.Is(err, ErrConflict) {
		t.Errorf("the same name again: %v", err)
	}
	// The same node with another key, as after its expiry.
	old := n.Key
	n.Key, n.Expires = identity.NewNode().Public(), start.Add(2*time.Hour)
	n = must[Node](t)(s.AdmitNode(ctx, "admin", n, start))
	if d := must[DeadKey](t)(s.DeadKey(ctx, old)); d.Removed || d.Machine != n.Machine {
		t.Errorf("former key: %+v", d)
	}
	dead := n
	dead.Key = old
	if _, err := s.AdmitNode(ctx, "admin", dead, start); !errors.Is(err, ErrConflict) {
		t.Errorf("a dead key: %v", err)
	}
	if err := s.SetOwner(ctx, "admin", n.ID, 0, []string{"tag:a", "tag:b"}, time.Time{}, start); err != nil {
		t.Fatal(err)
	}
	got := must[[]Node](t)(s.Nodes(ctx))[0]
	if got.User != 0 || !reflect.DeepEqual(got.Tags, []string{"tag:a", "tag:b"}) || !got.Expires.IsZero() || got.AuthKey != 0 {
		t.Errorf("tagged: %+v", got)
	}
	if err := s.SetOwner(ctx, "admin", n.ID, u.ID, nil, start, start); err != nil {
		t.Fatal(err)
	}
	if got := must[[]Node](t)(s.Nodes(ctx))[0]; got.User != u.ID || len(got.Tags) > 0 || !got.Expires.Equal(start) {
		t.Errorf("given back: %+v", got)
	}
	for what, err := range map[string]error{
		"owner":  s.SetOwner(ctx, "admin", 99, u.ID, nil, start, start),
		"rename": s.RenameNode(ctx, "admin", 99, "a", "b", true, start),
		"expire": s.ExpireNode(ctx, "admin", 99, start, start),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of no node: %v", what, err)
		}
	}
	if err := s.Note(ctx, "admin", "node.reject", "x", "", start); err != nil {
		t.Fatal(err)
	}
	var actions []string
	for _, e := range must[[]AuditEntry](t)(s.Audit(ctx, start, 0, 100)) {
		actions = append(actions, e.Action)
	}
	if want := []string{"user.create", "node.approve", "node.approve", "node.tag", "node.tag", "node.reject"}; !reflect.DeepEqual(actions, want) {
		t.Errorf("on record %q, want %q", actions, want)
	}
}
