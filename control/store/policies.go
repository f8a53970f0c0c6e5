package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Policy implements Store.
func (s *database) Policy(ctx context.Context) (Policy, error) {
	var p Policy
	err := s.read(ctx, "read policy", func(ctx context.Context) (err error) {
		p, err = newestPolicy(ctx, s.db)
		return err
	})
	if err != nil {
		return Policy{}, err
	}
	return p, nil
}

func newestPolicy(ctx context.Context, q rowQuerier) (p Policy, err error) {
	var created int64
	err = q.QueryRowContext(ctx, `SELECT version, text, author, created, note FROM policies ORDER BY version DESC LIMIT 1`).
		Scan(&p.Version, &p.Text, &p.Author, &created, &p.Note)
	p.Created = unstamp(created)
	return p, err
}

// PolicyVersion implements Store.
func (s *database) PolicyVersion(ctx context.Context, version int64) (p Policy, err error) {
	var created int64
	err = s.read(ctx, fmt.Sprintf("policy version %d", version), func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT version, text, author, created, note FROM policies WHERE version = $1`, version).
			Scan(&p.Version, &p.Text, &p.Author, &created, &p.Note)
	})
	if err != nil {
		return Policy{}, err
	}
	p.Created = unstamp(created)
	return p, nil
}

// Policies implements Store.
func (s *database) Policies(ctx context.Context, limit int) ([]Policy, error) {
	return query(ctx, s, "list policies", `SELECT version, author, created, note FROM policies ORDER BY version DESC LIMIT $1`,
		func(r *sql.Rows) (p Policy, err error) {
			var created int64
			err = r.Scan(&p.Version, &p.Author, &created, &p.Note)
			p.Created = unstamp(created)
			return p, err
		}, limit)
}

// SetPolicy implements Store.
func (s *database) SetPolicy(ctx context.Context, by, text, why string, expect int64, now time.Time) (Policy, error) {
	p := Policy{Text: text, Author: by, Created: now, Note: why}
	err := s.tx(ctx, "store policy", func(ctx context.Context, tx *sql.Tx) error {
		old, err := newestPolicy(ctx, tx)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if expect >= 0 && old.Version != expect {
			return fmt.Errorf("%w: the policy was changed meanwhile: its version is %d by now, not %d", ErrConflict, old.Version, expect)
		}
		p.Version = old.Version + 1
		if _, err := tx.ExecContext(ctx, `INSERT INTO policies (version, text, author, created, note) VALUES ($1,$2,$3,$4,$5)`, p.Version, text, by, stamp(now), why); err != nil {
			return err
		}
		e := AuditEntry{At: now, Actor: by, Action: "policy.set", Object: strconv.FormatInt(p.Version, 10), Detail: why, After: textSum(text)}
		if old.Version > 0 {
			e.Before = textSum(old.Text)
		}
		return record(ctx, tx, e)
	})
	if err != nil {
		return Policy{}, err
	}
	return p, nil
}

// textSum names a policy's text in the audit record, so that the record also
// vouches for the texts in the table of versions.
func textSum(text string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text))) }

// Shadow implements Store.
func (s *database) Shadow(ctx context.Context) (p Policy, err error) {
	var created int64
	err = s.read(ctx, "read shadow policy", func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT text, author, created FROM shadow`).Scan(&p.Text, &p.Author, &created)
	})
	if err != nil {
		return Policy{}, err
	}
	p.Created = unstamp(created)
	return p, nil
}

// SetShadow implements Store.
func (s *database) SetShadow(ctx context.Context, by, text string, now time.Time) (Policy, error) {
	p := Policy{Text: text, Author: by, Created: now}
	err := s.tx(ctx, "store shadow policy", func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM shadow`); err != nil {
			return err
		}
		if text == "" {
			return note(ctx, tx, now, by, "policy.shadow.clear", "shadow", "")
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO shadow (id, text, author, created) VALUES (1,$1,$2,$3)`, text, by, stamp(now)); err != nil {
			return err
		}
		return note(ctx, tx, now, by, "policy.shadow.set", "shadow", textSum(text))
	})
	if err != nil {
		return Policy{}, err
	}
	return p, nil
}
