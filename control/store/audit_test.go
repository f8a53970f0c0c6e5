package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// verify checks the whole record of a store.
func verify(t *testing.T, s Store, anchor AuditHead) (AuditHead, error) {
	t.Helper()
	c := AuditCheck{Anchor: anchor}
	for _, e := range must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 1<<20)) {
		c.Add(e)
	}
	head := must[AuditHead](t)(s.AuditHead(ctx))
	err := c.End(head)
	if err == nil && anchor.ID > 0 && !c.Anchored {
		t.Error("the anchor was not found, and nobody said so")
	}
	return head, err
}

// Each way to tamper with the record is found and named, whoever did it knowing
// of the chain or not.
func TestAuditChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.db")
	for _, test := range []struct {
		name    string
		sql     []string
		rehash  int64 // an entry whose hash is made to fit
		anchor  bool
		problem string // "" = none
	}{
		{name: "nothing"},
		{name: "nothing, anchored", anchor: true},
		{name: "edit", sql: []string{`UPDATE audit SET actor = 'mallory' WHERE id = 4`}, problem: "entry 4 was edited"},
		{name: "edit of the source", sql: []string{`UPDATE audit SET source = '' WHERE id = 4`}, problem: "entry 4 was edited"},
		{name: "shift between fields", sql: []string{`UPDATE audit SET object = 'note', detail = 'object 4' WHERE id = 4`}, problem: "entry 4 was edited"},
		{name: "edit with a new hash", sql: []string{`UPDATE audit SET actor = 'mallory' WHERE id = 4`}, rehash: 4, problem: "entry 5 does not follow from entry 4"},
		{name: "edit of the last with a new hash", sql: []string{`UPDATE audit SET actor = 'mallory' WHERE id = 9`}, rehash: 9, problem: "entry 9 is not the head"},
		{name: "removal of one", sql: []string{`DELETE FROM audit WHERE id = 4`}, problem: "entry 4 was removed"},
		{name: "removal of the first", sql: []string{`DELETE FROM audit WHERE id = 1`}, problem: "entry 1 was removed"},
		{name: "removal of several", sql: []string{`DELETE FROM audit WHERE id IN (4, 5)`}, problem: "entries 4 to 5 were removed"},
		{name: "removal of the newest", sql: []string{`DELETE FROM audit WHERE id > 7`}, problem: "entries 8 to 9, the newest, were removed"},
		{name: "removal of the newest, head too", sql: []string{`DELETE FROM audit WHERE id > 7`,
			`UPDATE audit_head SET last = 7, hash = (SELECT hash FROM audit WHERE id = 7)`}, anchor: true, problem: "entry 9, which the anchor names, is not there"},
		{name: "other order", sql: []string{`UPDATE audit SET id = 100 WHERE id = 4`, `UPDATE audit SET id = 4 WHERE id = 5`, `UPDATE audit SET id = 5 WHERE id = 100`}, problem: "entry 4 was edited"},
		{name: "renumbering after removal", sql: []string{`DELETE FROM audit WHERE id = 4`, `UPDATE audit SET id = 4 WHERE id = 9`}, problem: "entry 4 was edited"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := path + strings.ReplaceAll(test.name, " ", "-")
			s := open(t, path)
			from := WithSource(ctx, "192.0.2.7")
			for i := range 9 {
				if err := s.Note(from, "admin", "test.note", fmt.Sprint("object ", i+1), "", start.Add(time.Duration(i))); err != nil {
					t.Fatal(err)
				}
			}
			anchor, err := verify(t, s, AuditHead{})
			if err != nil || anchor.ID != 9 {
				t.Fatalf("untouched: %v, head %v", err, anchor)
			}
			if !test.anchor {
				anchor = AuditHead{}
			}
			s.Close()
			tamper(t, path, test.rehash, append([]string{`DROP TRIGGER audit_no_update`, `DROP TRIGGER audit_no_delete`}, test.sql...)...)
			s = open(t, path)
			defer s.Close()
			_, err = verify(t, s, anchor)
			if test.problem == "" && err != nil || test.problem != "" && (!errors.Is(err, ErrAudit) || !strings.Contains(err.Error(), test.problem)) {
				t.Errorf("got %v, want %q", err, test.problem)
			}
		})
	}
}

// tamper changes the file behind the store's back.
func tamper(t *testing.T, path string, rehash int64, statements ...string) {
	t.Helper()
	db := must[*sql.DB](t)(sql.Open("sqlite", path))
	defer db.Close()
	for _, text := range statements {
		if _, err := db.Exec(text); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	if rehash == 0 {
		return
	}
	rows := must[*sql.Rows](t)(db.Query(`SELECT `+auditColumns+` FROM audit WHERE id = ?`, rehash))
	rows.Next()
	e := must[AuditEntry](t)(scanAudit(rows))
	rows.Close()
	sum := e.Sum()
	if _, err := db.Exec(`UPDATE audit SET hash = ? WHERE id = ?`, sum[:], rehash); err != nil {
		t.Fatal(err)
	}
}

// The store itself takes entries and nothing else.
func TestAuditIsAppendOnly(t *testing.T) { onEach(t, testAuditIsAppendOnly) }

func testAuditIsAppendOnly(t *testing.T, open func() Store) {
	s := open()
	if err := s.Note(ctx, "admin", "test.note", "x", "", start); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{`UPDATE audit SET actor = 'x'`, `DELETE FROM audit`} {
		if _, err := dbOf(s).Exec(text); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// What changed is told as before and after, with where it came from.
func TestAuditTellsBeforeAndAfter(t *testing.T) { onEach(t, testAuditTellsBeforeAndAfter) }

func testAuditTellsBeforeAndAfter(t *testing.T, open func() Store) {
	s := open()
	from := WithSource(ctx, "unix socket")
	u := must[User](t)(s.CreateUser(from, "admin", "alice", start))
	k, text := newKey(t, s, Key{User: u.ID})
	n := must[Node](t)(s.RegisterNode(WithSource(ctx, "192.0.2.7"), text, named(testNode(1), "a"), start))
	if err := errors.Join(
		s.RenameNode(from, "admin", n.ID, "a", "b", true, start),
		s.ExpireNode(from, "admin", n.ID, start, start),
		s.SetOwner(from, "admin", n.ID, 0, []string{"tag:x"}, time.Time{}, start),
	); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second changes nothing
		u = must[User](t)(s.SuspendUser(from, "admin", u.ID, true, start))
	}
	if !u.Suspended.Equal(start) || !must[[]User](t)(s.Users(ctx))[0].Suspended.Equal(start) {
		t.Errorf("suspended: %+v", u)
	}
	must[User](t)(s.SuspendUser(from, "admin", u.ID, false, start))
	must[Key](t)(s.RevokeKey(from, "admin", k.ID, start))
	if err := s.RemoveNode(from, "admin", n.ID, true, start); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 100)) {
		got = append(got, fmt.Sprintf("%s %s %s: %q to %q", e.Source, e.Action, e.Object, e.Before, e.After))
	}
	for _, want := range []string{
		`192.0.2.7 node.register a: "" to "100.64.0.1 for `,
		`unix socket node.rename a: "a" to "b"`,
		`unix socket node.expire b: "never" to "` + start.UTC().Format(time.RFC3339) + `"`,
		`unix socket node.tag b: "tag:a" to "tag:x"`,
		`unix socket user.suspend alice: "active" to "suspended"`,
		`unix socket user.resume alice: "suspended" to "active"`,
		`unix socket key.revoke 1: "for nodes of alice, never expires" to "revoked"`,
		`unix socket node.remove b: "node 1 of tag:x" to ""`,
	} {
		if !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("%s is not in\n%s", want, strings.Join(got, "\n"))
		}
	}
	if len(got) != 10 {
		t.Errorf("%d entries: %s", len(got), strings.Join(got, "\n"))
	}
	if _, err := verify(t, s, AuditHead{}); err != nil {
		t.Error(err)
	}
}

// The record of a file from before the chain is taken into it.
func TestOldAuditIsChained(t *testing.T) {
	path := oldFile(t)
	s := open(t, path)
	defer s.Close()
	if head, err := verify(t, s, AuditHead{}); err != nil || head.ID != 7 {
		t.Errorf("head %v: %v", head, err)
	}
	if err := s.Note(context.Background(), "admin", "test.note", "x", "", start); err != nil {
		t.Fatal(err)
	}
	if head, err := verify(t, s, AuditHead{}); err != nil || head.ID != 8 {
		t.Errorf("with one more: head %v: %v", head, err)
	}
}

func FuzzAuditHash(f *testing.F) {
	f.Add(AuditHash{1, 2}.String())
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		var h, again AuditHash
		if h.UnmarshalText([]byte(text)) != nil {
			return
		}
		b, err := json.Marshal(h)
		if err != nil || json.Unmarshal(b, &again) != nil || again != h {
			t.Errorf("%q: %s, %v", text, b, err)
		}
	})
}

func named(n Node, name string) Node {
	n.Name, n.Hostname = name, name
	return n
}
