package host

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"mesh/control/store"
)

// C 42: a database that was put back from an older copy is found to be one, once.
func TestOlderCopyIsFound_C42(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	run := func(f func(s store.Store)) (restored int) {
		t.Helper()
		h, err := Start(Config{DataDir: dir, Listen: "127.0.0.1:0", STUN: "off"})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if f != nil {
			f(h.store)
		}
		log, err := h.store.Audit(ctx, time.Time{}, 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range log {
			if e.Action == "store.restored" {
				restored++
			}
		}
		return restored
	}
	user := func(name string) func(store.Store) {
		return func(s store.Store) {
			if _, err := s.CreateUser(ctx, "admin", name, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
	}
	old := filepath.Join(t.TempDir(), "old.db")
	run(user("alice"))
	run(func(s store.Store) {
		if err := s.(*store.SQLite).Backup(ctx, old); err != nil {
			t.Fatal(err)
		}
	})
	if n := run(user("bob")); n != 0 {
		t.Errorf("%d restores on record, and there was none", n)
	}
	file := filepath.Join(dir, databaseName)
	for _, companion := range []string{"", "-wal", "-shm"} {
		os.Remove(file + companion)
	}
	if err := os.Rename(old, file); err != nil {
		t.Fatal(err)
	}
	if n := run(nil); n != 1 {
		t.Errorf("%d restores on record", n)
	}
	// It goes on from there.
	if n := run(user("carol")); n != 1 {
		t.Errorf("%d restores on record", n)
	}
}
