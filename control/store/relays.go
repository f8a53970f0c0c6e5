package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"time"

	"mesh/identity"
)

// ServerKey implements Store.
func (s *database) ServerKey(ctx context.Context) (identity.MachinePrivate, error) {
	b, err := s.Secret(ctx, "server-key", nil)
	if err != nil {
		return identity.MachinePrivate{}, err
	}
	k, err := identity.ParseMachinePrivate(string(b))
	if err != nil {
		return k, fmt.Errorf("server key: %w: %w", ErrCorrupt, err)
	}
	return k, nil
}

// Secret implements Store. A nil fresh makes a missing secret ErrNotFound.
func (s *database) Secret(ctx context.Context, name string, fresh func() ([]byte, error)) (value []byte, err error) {
	err = s.tx(ctx, "read secret "+name, func(ctx context.Context, tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT value FROM meta WHERE name = $1`, name).Scan(&value)
		if fresh == nil || !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if value, err = fresh(); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ($1,$2)`, name, value)
		return err
	})
	return value, err
}

// PutRelay implements Store.
func (s *database) PutRelay(ctx context.Context, r Relay, now time.Time) error {
	region, err := encode(r.Region)
	if err != nil {
		return err
	}
	id := r.Region.RegionID
	return s.tx(ctx, fmt.Sprintf("store relay of region %d", id), func(ctx context.Context, tx *sql.Tx) error {
		var others int
		err := tx.QueryRowContext(ctx, `SELECT count(*) FROM relays WHERE (region_id = $1 OR node_key = $2) AND key_id <> $3`,
			id, keyBytes(r.NodeKey), r.Key).Scan(&others)
		if err != nil {
			return err
		}
		if others > 0 {
			return fmt.Errorf("%w: another relay, with another relay key, has region %d", ErrConflict, id)
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO relays (node_key, region_id, region, key_id, created) VALUES ($1,$2,$3,$4,$5)
			ON CONFLICT (node_key) DO UPDATE SET region_id = excluded.region_id, region = excluded.region`,
			keyBytes(r.NodeKey), id, region, r.Key, stamp(r.Created))
		if err != nil {
			return err
		}
		return note(ctx, tx, now, fmt.Sprintf("key %d", r.Key), "relay.put", strconv.Itoa(id), r.NodeKey.Short())
	})
}

// Relays implements Store.
func (s *database) Relays(ctx context.Context) ([]Relay, error) {
	return query(ctx, s, "list relays", `SELECT node_key, region, key_id, created FROM relays ORDER BY region_id, created, node_key`, func(rows *sql.Rows) (r Relay, err error) {
		var key []byte
		var region string
		var created int64
		if err := rows.Scan(&key, &region, &r.Key, &created); err != nil {
			return r, err
		}
		var k [identity.KeyLen]byte
		if err := errors.Join(copyKey(&k, key), decode(region, &r.Region)); err != nil {
			return r, err
		}
		r.NodeKey, r.Created = identity.NodePublicFrom(k), unstamp(created)
		return r, nil
	})
}

// RemoveRelay implements Store.
func (s *database) RemoveRelay(ctx context.Context, by string, key identity.NodePublic, now time.Time) error {
	return s.tx(ctx, "remove relay "+key.Short(), func(ctx context.Context, tx *sql.Tx) error {
		var region int
		err := tx.QueryRowContext(ctx, `DELETE FROM relays WHERE node_key = $1 RETURNING region_id`, keyBytes(key)).Scan(&region)
		if err != nil {
			return err
		}
		return note(ctx, tx, now, by, "relay.remove", strconv.Itoa(region), key.Short())
	})
}
