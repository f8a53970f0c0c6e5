package store

import (
	"context"
	"database/sql"
	"errors"
	"net/netip"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Login is a machine that asks to be let in without a key.
type Login struct {
	Code      string
	Machine   identity.MachinePublic
	Key, Old  identity.NodePublic
	Info      *wire.Hostinfo
	Tags      []string
	Ephemeral bool
	Expiry    time.Time // an earlier expiry that the node wishes for
	Version   int
	Instance  string // of the process that asks
	Source    netip.Prefix
	Asked     time.Time
	Expires   time.Time
	State     int // as the server counts them; 0 = pending
	Node      wire.NodeID
}

// schema8Logins is the table that PostgreSQL has since schema7.
const schema8Logins = `
CREATE TABLE logins (
	code    TEXT PRIMARY KEY,
	about   TEXT NOT NULL,
	expires INTEGER NOT NULL
) STRICT;
`

// PutLogin implements Store. What was decided stays: who tells of a new key of a
// machine that still waits may not have heard of it yet.
func (s *database) PutLogin(ctx context.Context, l Login) error {
	text, err := encode(l)
	if err != nil {
		return err
	}
	return s.tx(ctx, "store login", func(ctx context.Context, tx *sql.Tx) error {
		var about string
		switch err := tx.QueryRowContext(ctx, `SELECT about FROM logins WHERE code = $1`, l.Code).Scan(&about); {
		case err == nil:
			var had Login
			if err := decode(about, &had); err != nil || had.State != 0 {
				return err
			}
		case !errors.Is(err, sql.ErrNoRows):
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO logins (code, about, expires) VALUES ($1,$2,$3)
			ON CONFLICT (code) DO UPDATE SET about = excluded.about, expires = excluded.expires`, l.Code, text, stamp(l.Expires))
		return err
	})
}

// RemoveLogin implements Store.
func (s *database) RemoveLogin(ctx context.Context, code string) error {
	return s.tx(ctx, "remove login", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM logins WHERE code = $1`, code)
		return err
	})
}

// Logins implements Store.
func (s *database) Logins(ctx context.Context) ([]Login, error) {
	return query(ctx, s, "list logins", `SELECT about FROM logins ORDER BY expires`, func(r *sql.Rows) (l Login, err error) {
		var text string
		if err := r.Scan(&text); err != nil {
			return l, err
		}
		return l, decode(text, &l)
	})
}
