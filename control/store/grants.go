package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// AddGrant implements Store.
func (s *database) AddGrant(ctx context.Context, g Grant, now time.Time) (Grant, error) {
	g.Ended, g.EndedBy, g.Why = time.Time{}, "", ""
	src, err1 := encodeList(g.Src)
	dst, err2 := encodeList(g.Dst)
	ip, err3 := encodeList(g.IP)
	asked, err4 := encode(g.Asked)
	nodes, err5 := encodeList(g.Nodes)
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return Grant{}, err
	}
	err := s.tx(ctx, "store grant", func(ctx context.Context, tx *sql.Tx) error {
		var err error
		g.ID, err = insert(ctx, tx, `INSERT INTO grants (src, dst, ip, asked, nodes, reason, author, created, until) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9)`,
			src, dst, ip, asked, nodes, g.Reason, g.Author, stamp(g.Created), stamp(g.Until))
		if err != nil {
			return err
		}
		detail := g.text() + " until " + g.Until.UTC().Format(time.RFC3339)
		if g.Reason != "" {
			detail += ": " + g.Reason
		}
		return note(ctx, tx, now, g.Author, "grant.add", strconv.FormatInt(g.ID, 10), detail)
	})
	if err != nil {
		return Grant{}, err
	}
	return g, nil
}

// text says who may reach what.
func (g *Grant) text() string {
	list := func(i int) string { return strings.Join(g.Asked[i], ", ") }
	return fmt.Sprintf("%s may reach %s at %s", list(0), list(1), list(2))
}

const grantColumns = `id, src, dst, ip, asked, nodes, reason, author, created, until, ended, ended_by, why`

func scanGrant(scan func(...any) error) (g Grant, err error) {
	var src, dst, ip, asked, nodes string
	var created, until, ended int64
	if err := scan(&g.ID, &src, &dst, &ip, &asked, &nodes, &g.Reason, &g.Author, &created, &until, &ended, &g.EndedBy, &g.Why); err != nil {
		return g, err
	}
	g.Created, g.Until, g.Ended = unstamp(created), unstamp(until), unstamp(ended)
	return g, errors.Join(decode(src, &g.Src), decode(dst, &g.Dst), decode(ip, &g.IP), decode(asked, &g.Asked), decode(nodes, &g.Nodes))
}

// Grants implements Store.
func (s *database) Grants(ctx context.Context, ended bool, limit int) ([]Grant, error) {
	// The newest of those that ended, all that have not.
	return query(ctx, s, "list grants", `SELECT `+grantColumns+` FROM grants WHERE ended = 0 OR $1 <> 0 AND id IN
		(SELECT id FROM grants WHERE ended <> 0 ORDER BY id DESC LIMIT $2) ORDER BY id`, func(r *sql.Rows) (Grant, error) {
		return scanGrant(r.Scan)
	}, flag(ended), limit)
}

// EndGrant implements Store.
func (s *database) EndGrant(ctx context.Context, by string, id int64, why string, now time.Time) (g Grant, err error) {
	err = s.tx(ctx, fmt.Sprintf("end grant %d", id), func(ctx context.Context, tx *sql.Tx) error {
		g, err = scanGrant(tx.QueryRowContext(ctx, `SELECT `+grantColumns+` FROM grants WHERE id = $1`, id).Scan)
		switch {
		case err != nil:
			return err
		case !g.Ended.IsZero():
			return fmt.Errorf("%w: it has ended already (%s)", ErrConflict, g.Why)
		}
		g.Ended, g.EndedBy, g.Why = now, by, why
		if _, err := tx.ExecContext(ctx, `UPDATE grants SET ended = $1, ended_by = $2, why = $3 WHERE id = $4`, stamp(now), by, why, id); err != nil {
			return err
		}
		return note(ctx, tx, now, by, "grant.end", strconv.FormatInt(id, 10), why+": "+g.text())
	})
	return g, err
}
