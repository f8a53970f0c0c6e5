package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A disk that is really full: writes say so and change nothing, and go on when
// there is room again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("a small disk needs root: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, filepath.Join(dir, "mesh.db"))
	must[User](t)(s.CreateUser(ctx, "test", "alice", start))
	ballast := filepath.Join(dir, "ballast")
	rounds := 3
	if os.Getenv("MESH_FULL") != "" {
		rounds = 50
	}
	version := must[Policy](t)(s.SetPolicy(ctx, "test", strings.Repeat("x", 50000), "", -1, start)).Version
	for range rounds {
		if err := os.WriteFile(ballast, make([]byte, 8<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is not full: %v", err)
		}
		var err error
		for range 100 { // until what the file has left is used up
			var p Policy
			if p, err = s.SetPolicy(ctx, "test", strings.Repeat("x", 50000), "", -1, start); err != nil {
				break
			}
			version = p.Version
		}
		if !errors.Is(err, ErrFull) {
			t.Fatalf("full: %v, want ErrFull", err)
		}
		if p := must[Policy](t)(s.Policy(ctx)); p.Version != version || len(p.Text) != 50000 {
			t.Errorf("policy %d of %d bytes, want %d", p.Version, len(p.Text), version)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		version = must[Policy](t)(s.SetPolicy(ctx, "test", strings.Repeat("y", 50000), "", version, start)).Version
		integrity(t, s)
		// Make room.
		if _, err := s.db.Exec(`DELETE FROM policies WHERE version < $1`, version); err != nil {
			t.Fatal(err)
		}
		if _, err := s.db.Exec(`PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
			t.Fatal(err)
		}
	}
}
