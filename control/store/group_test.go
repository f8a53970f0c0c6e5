package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
)

// Many changes at a time, some of which fail: what is reported as done is there,
// what failed left nothing, and fewer commits were needed than changes.
func TestGroupCommit(t *testing.T) {
	ctx := context.Background()
	s, err := OpenSQLite(ctx, filepath.Join(t.TempDir(), "mesh.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put := func(i int) func(context.Context, *sql.Tx) error {
		return func(ctx context.Context, tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ($1, $2)`, fmt.Sprint("group", i), []byte{1}); err != nil {
				return err
			}
			if i%3 == 0 {
				return errors.New("no")
			}
			return nil
		}
	}
	const count = 200
	commits := 0
	var wg sync.WaitGroup
	first := make(chan struct{})
	errs := make([]error, count)
	for i := range count {
		wg.Go(func() {
			if i > 0 {
				<-first // so that the rest waits behind it
			}
			errs[i] = s.group.do(ctx, func(ctx context.Context, tx *sql.Tx) error {
				if i == 0 {
					close(first)
				}
				return put(i)(ctx, tx)
			}, func(c []*change) error {
				commits++
				return s.commit(c)
			})
		})
	}
	wg.Wait()
	for i, err := range errs {
		var n int
		if err := s.db.QueryRowContext(ctx, `SELECT count(*) FROM meta WHERE name = $1`, fmt.Sprint("group", i)).Scan(&n); err != nil {
			t.Fatal(err)
		}
		if failed := i%3 == 0; (err != nil) != failed || (n == 0) != failed {
			t.Errorf("change %d: %v, and %d rows are there", i, err, n)
		}
	}
	if commits >= count {
		t.Errorf("%d commits for %d changes", commits, count)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.group.do(ended, put(1000), s.commit); !errors.Is(err, context.Canceled) {
		t.Errorf("a change that nobody wants any more: %v", err)
	}
}

// A commit that fails is the failure of all whom it concerns.
func TestGroupCommitFails(t *testing.T) {
	var g group
	lost := errors.New("lost")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			err := g.do(context.Background(), nil, func([]*change) error { return lost })
			if !errors.Is(err, lost) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if g.busy || len(g.waiting) > 0 {
		t.Error("somebody still waits")
	}
}

// A change that panics takes its transaction with it and holds up nobody.
func TestGroupCommitPanics(t *testing.T) {
	ctx := t.Context()
	s, err := OpenSQLite(ctx, filepath.Join(t.TempDir(), "mesh.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		s.group.do(ctx, func(context.Context, *sql.Tx) error { panic("a bug") }, s.commit)
	}()
	err = s.group.do(ctx, func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ($1, $2)`, "after", []byte{1})
		return err
	}, s.commit)
	if err != nil {
		t.Error(err)
	}
}

// Who gives up while it connects closes the way to the database for nobody else.
func TestCallerGivesUp(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "mesh.db"))
	connect := func(up func()) func(context.Context) error {
		return func(context.Context) error {
			up()
			return fmt.Errorf("connect: %w", ErrUnavailable)
		}
	}
	giving, up := context.WithCancel(ctx)
	if err := s.read(giving, "look", connect(up)); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	must[[]Node](t)(s.Nodes(ctx))
	s.read(ctx, "look", connect(func() {}))
	if _, err := s.Nodes(ctx); !errors.Is(err, ErrUnavailable) {
		t.Errorf("asked at once again: %v", err)
	}
}
