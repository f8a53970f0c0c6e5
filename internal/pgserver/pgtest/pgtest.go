// Package pgtest gives tests databases of a real PostgreSQL server, which runs
// for as long as the test program.
package pgtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mesh/internal/pgserver"
)

// patience is how long the server may take to start.
const patience = 2 * time.Minute

// program is the server of this test program, started when first asked for.
var program struct {
	once   sync.Once
	err    error
	dir    string
	server *pgserver.Server

	mu    sync.Mutex // guards count
	count int
}

// Runner is a testing.M that ends the server after the tests.
type Runner struct{ M *testing.M }

// Run runs the tests.
func (r Runner) Run() int {
	code := r.M.Run()
	if program.server != nil {
		program.server.Stop()
	}
	if program.dir != "" {
		os.RemoveAll(program.dir)
	}
	return code
}

// Database returns the URL of a new and empty database. It skips the test on
// machines without PostgreSQL. The package's TestMain must use Runner.
func Database(t testing.TB) string {
	t.Helper()
	bin, err := pgserver.Find()
	if err != nil {
		t.Skip(err)
	}
	program.once.Do(func() {
		if program.dir, program.err = os.MkdirTemp("", "meshpg"); program.err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		program.server, program.err = pgserver.Start(ctx, bin, filepath.Join(program.dir, "pg"))
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	program.mu.Lock()
	program.count++
	name := fmt.Sprintf("test%d", program.count)
	program.mu.Unlock()
	if err := program.server.Create(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	return program.server.URL(name)
}

// Server starts a server of the test's own, with one database "postgres", that
// the test may stop. It skips the test on machines without PostgreSQL.
func Server(t testing.TB) *pgserver.Server {
	t.Helper()
	bin, err := pgserver.Find()
	if err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "meshpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := pgserver.Start(ctx, bin, filepath.Join(dir, "pg"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}
