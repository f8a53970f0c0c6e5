package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// database is the Store in any SQL database. All statements are written in
// what SQLite and PostgreSQL have in common, with numbered parameters, and
// booleans as integers; the little that differs is in the dialect.
//
// Writers are one at a time, in SQLite by its nature and in PostgreSQL by a lock
// of the whole database that each takes first. So what a transaction has read
// stays true until it is committed, and changes are committed in the order of
// their numbers.
type database struct {
	db      *sql.DB
	dialect dialect
	gate    gate
	group   group
	watch   atomic.Pointer[func(write bool, took time.Duration, err error)]
}

// Observe implements Store.
func (s *database) Observe(f func(write bool, took time.Duration, err error)) { s.watch.Store(&f) }

// Writable implements Store.
func (s *database) Writable(ctx context.Context) error {
	return s.tx(ctx, "write to see whether that goes", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ('written', $1)
			ON CONFLICT (name) DO UPDATE SET value = excluded.value`, []byte(time.Now().UTC().Format(time.RFC3339)))
		return err
	})
}

// dialect is what differs between databases.
type dialect struct {
	lastNode string                               // query of the highest node ID ever given out
	begin    func(context.Context, *sql.Tx) error // makes a transaction the only writer; nil = it is
	ended    func(error)                          // hears of each commit; nil = nobody
	classify func(error) error                    // adds the error of this package that one of the database stands for
	limit    time.Duration                        // of one operation; 0 = none
}

// tx runs f in a transaction that is committed if f returns nil, perhaps
// together with others.
func (s *database) tx(ctx context.Context, what string, f func(context.Context, *sql.Tx) error) error {
	return s.timed(true, func() error {
		return s.do(ctx, what, func(ctx context.Context) error { return s.group.do(ctx, f, s.commit) })
	})
}

// read runs f, which changes nothing.
func (s *database) read(ctx context.Context, what string, f func(context.Context) error) error {
	return s.timed(false, func() error { return s.do(ctx, what, f) })
}

// timed tells who observes how long an operation took.
func (s *database) timed(write bool, f func() error) error {
	watch := s.watch.Load()
	if watch == nil {
		return f()
	}
	begin := time.Now()
	err := f()
	(*watch)(write, time.Since(begin), err)
	return err
}

func (s *database) do(ctx context.Context, what string, f func(context.Context) error) error {
	err := s.gate.check()
	if err == nil {
		limited, cancel := s.limited(ctx)
		defer cancel()
		err = s.classify(f(limited))
		// That a caller gave up, and its connection with it, says nothing of the
		// database.
		if !errors.Is(ctx.Err(), context.Canceled) {
			s.gate.note(err)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// limited is ctx for as long as one operation may take.
func (s *database) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.dialect.limit > 0 {
		return context.WithTimeout(ctx, s.dialect.limit)
	}
	return context.WithCancel(ctx)
}

// classify adds the error of this package that an error of the database stands
// for.
func (s *database) classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return ErrNotFound
	}
	return s.dialect.classify(err)
}

// query collects the rows of a SELECT.
func query[T any](ctx context.Context, s *database, what, text string, scan func(*sql.Rows) (T, error), args ...any) (out []T, err error) {
	err = s.read(ctx, what, func(ctx context.Context) error {
		out = nil
		rows, err := s.db.QueryContext(ctx, text, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			v, err := scan(rows)
			if err != nil {
				return err
			}
			out = append(out, v)
		}
		return rows.Err()
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// insert runs an INSERT and returns the ID of the new row.
func insert(ctx context.Context, tx *sql.Tx, text string, args ...any) (id int64, err error) {
	err = tx.QueryRowContext(ctx, text+` RETURNING id`, args...).Scan(&id)
	return id, err
}

// flag is a boolean as it is stored.
func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Times are stored as nanoseconds since 1970, the zero time as 0.

func stamp(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func unstamp(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
