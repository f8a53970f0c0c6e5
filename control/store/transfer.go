package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// tableOrder has the tables that others refer to before those.
var tableOrder = []string{"meta", "users", "keys", "nodes"}

// Transfer copies all of a SQLite store into a PostgreSQL store that nobody has
// used yet, compares the two, and only then makes the copy valid. It returns how
// many rows were copied. ErrConflict: the target has users, nodes or keys, or
// was set up otherwise.
func Transfer(ctx context.Context, from *SQLite, to *Postgres) (rows int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy the store: %w", to.classify(from.classify(err)))
		}
	}()
	src, err := from.db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer src.Rollback()
	dst, err := to.db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer dst.Rollback()
	if err := to.onlyWriter(ctx, dst); err != nil {
		return 0, err
	}
	var used int
	if err := dst.QueryRowContext(ctx, `SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM nodes) + (SELECT count(*) FROM keys) +
		(SELECT count(*) FROM audit) + (SELECT count(*) FROM policies)`).Scan(&used); err != nil {
		return 0, err
	}
	if used > 0 {
		return 0, fmt.Errorf("%w: the target is in use: give an empty database", ErrConflict)
	}
	tables, err := tablesOf(ctx, src)
	if err != nil {
		return 0, err
	}
	// What a fresh store has of its own.
	for _, table := range tables {
		if table == "meta" || table == "audit_head" {
			if _, err := dst.ExecContext(ctx, `DELETE FROM `+table); err != nil {
				return 0, err
			}
		}
	}
	for _, table := range tables {
		n, err := copyTable(ctx, src, dst, table)
		if err != nil {
			return 0, fmt.Errorf("table %s: %w", table, err)
		}
		rows += n
	}
	if err := copySequences(ctx, src, dst); err != nil {
		return 0, err
	}
	return rows, dst.Commit()
}

// tablesOf lists the tables of a SQLite store.
func tablesOf(ctx context.Context, tx *sql.Tx) (tables []string, err error) {
	rows, err := tx.QueryContext(ctx, `SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		tables = append(tables, name)
	}
	place := func(t string) int {
		if i := slices.Index(tableOrder, t); i >= 0 {
			return i
		}
		return len(tableOrder)
	}
	slices.SortStableFunc(tables, func(a, b string) int { return place(a) - place(b) })
	return tables, rows.Err()
}

// copyTable copies one table and compares the copy.
func copyTable(ctx context.Context, src, dst *sql.Tx, table string) (n int, err error) {
	var insert *sql.Stmt
	columns := ""
	before, err := contents(ctx, src, `SELECT * FROM `+table, func(names []string, values []any) error {
		if insert == nil {
			columns = strings.Join(names, ", ")
			var marks []string
			for i := range names {
				marks = append(marks, fmt.Sprint("$", i+1))
			}
			if insert, err = dst.PrepareContext(ctx, `INSERT INTO `+table+` (`+columns+`) VALUES (`+strings.Join(marks, ", ")+`)`); err != nil {
				return err
			}
		}
		_, err := insert.ExecContext(ctx, values...)
		return err
	})
	if err != nil || insert == nil {
		return 0, err
	}
	defer insert.Close()
	after, err := contents(ctx, dst, `SELECT `+columns+` FROM `+table, func([]string, []any) error { return nil })
	if err != nil {
		return 0, err
	}
	if !slices.Equal(before, after) {
		return 0, fmt.Errorf("%w: the copy is not what was copied", ErrCorrupt)
	}
	return len(before), nil
}

// contents hands each row to f and returns the hashes of all, sorted.
func contents(ctx context.Context, tx *sql.Tx, query string, f func(names []string, values []any) error) (sums []string, err error) {
	rows, err := tx.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	names, err := rows.Columns()
	if err != nil {
		return nil, err
	}
	for rows.Next() {
		values, into := make([]any, len(names)), make([]any, len(names))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		if err := f(names, values); err != nil {
			return nil, err
		}
		sum := sha256.Sum256(rowBytes(values))
		sums = append(sums, string(sum[:]))
	}
	slices.Sort(sums)
	return sums, rows.Err()
}

// rowBytes encodes a row so that different ones differ.
func rowBytes(values []any) (b []byte) {
	for _, v := range values {
		text := fmt.Sprintf("%T %v", v, v)
		if raw, ok := v.([]byte); ok {
			text = fmt.Sprintf("bytes %x", raw)
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		b = append(b, text...)
	}
	return b
}

// copySequences makes sure that no number is given out twice.
func copySequences(ctx context.Context, src, dst *sql.Tx) error {
	rows, err := src.QueryContext(ctx, `SELECT name, seq FROM sqlite_sequence WHERE seq > 0`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		var seq int64
		if err := rows.Scan(&name, &seq); err != nil {
			return err
		}
		_, err := dst.ExecContext(ctx, `SELECT setval(pg_get_serial_sequence($1, a.attname), $2) FROM pg_attribute AS a
			WHERE a.attrelid = $1::text::regclass AND a.attidentity <> ''`, name, seq)
		if err != nil {
			return fmt.Errorf("numbers of %s: %w", name, err)
		}
	}
	return rows.Err()
}
