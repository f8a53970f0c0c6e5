package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mesh/internal/pgserver/pgtest"
)

// The data of a server goes to a copy, back, and on to PostgreSQL.
func TestBackupAndMigrate(t *testing.T) {
	s := startServer(t)
	s.ok("user", "create", "alice")
	copied := filepath.Join(t.TempDir(), "copy.db")
	s.ok("backup", copied)
	s.fails([]string{"backup", copied}, "exists already")
	s.ok("user", "create", "bob")
	s.process.terminate()

	file := filepath.Join(s.data, "mesh.db")
	b, err := os.ReadFile(copied)
	if err != nil {
		t.Fatal(err)
	}
	for _, companion := range []string{"-wal", "-shm"} {
		os.Remove(file + companion)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s.listen(s.addr)
	key := s.key
	if out := s.ok("user", "list"); !strings.Contains(out, "alice") || strings.Contains(out, "bob") {
		t.Errorf("restored: %s", out)
	}

	url := pgtest.Server(t).URL("postgres")
	s.fails([]string{"migrate", "--from", file, "--to", url}, "already in use")
	s.process.terminate()
	if out := s.ok("migrate", "--from", file, "--to", url); !strings.Contains(out, "rows copied and compared") {
		t.Errorf("migrate: %s", out)
	}
	s.fails([]string{"migrate", "--from", file, "--to", url}, "in use")
	s.args = append(s.args, "--database", url)
	s.listen(s.addr)
	if out := s.ok("user", "list"); !strings.Contains(out, "alice") || s.key != key {
		t.Errorf("on PostgreSQL: %s", out)
	}
	s.fails([]string{"backup", copied + "2"}, "pg_dump")
	s.process.terminate()
}
