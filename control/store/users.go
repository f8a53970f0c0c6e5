package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"mesh/control/wire"
)

// CreateUser implements Store.
func (s *database) CreateUser(ctx context.Context, by, name string, now time.Time) (User, error) {
	u := User{Name: name, Role: RoleMember, Created: now}
	err := s.tx(ctx, fmt.Sprintf("create user %q", name), func(ctx context.Context, tx *sql.Tx) error {
		var n int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM users`).Scan(&n); err != nil {
			return err
		}
		if n == 0 {
			u.Role = RoleOwner
		}
		id, err := insert(ctx, tx, `INSERT INTO users (name, role, created) VALUES ($1,$2,$3)`, u.Name, u.Role, stamp(now))
		if err != nil {
			return err
		}
		u.ID = wire.UserID(id)
		return noteChange(ctx, tx, now, by, "user.create", name, "", u.Role)
	})
	if err != nil {
		return User{}, err
	}
	return u, nil
}

// Users implements Store.
func (s *database) Users(ctx context.Context) ([]User, error) {
	return query(ctx, s, "list users", `SELECT `+userColumns+` FROM users ORDER BY id`, func(r *sql.Rows) (User, error) {
		return scanUser(r.Scan)
	})
}

const userColumns = `id, name, role, created, suspended`

func scanUser(scan func(...any) error) (u User, err error) {
	var created, suspended int64
	err = scan(&u.ID, &u.Name, &u.Role, &created, &suspended)
	u.Created, u.Suspended = unstamp(created), unstamp(suspended)
	return u, err
}

// SuspendUser implements Store.
func (s *database) SuspendUser(ctx context.Context, by string, id wire.UserID, suspended bool, now time.Time) (u User, err error) {
	err = s.tx(ctx, fmt.Sprintf("suspend user %d", id), func(ctx context.Context, tx *sql.Tx) error {
		u, err = scanUser(tx.QueryRowContext(ctx, `SELECT `+userColumns+` FROM users WHERE id = $1`, id).Scan)
		if err != nil || suspended == !u.Suspended.IsZero() {
			return err
		}
		action, before, after := "user.resume", "suspended", "active"
		u.Suspended = time.Time{}
		if suspended {
			action, before, after = "user.suspend", "active", "suspended"
			u.Suspended = now
		}
		if _, err := tx.ExecContext(ctx, `UPDATE users SET suspended = $1 WHERE id = $2`, stamp(u.Suspended), id); err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, action, u.Name, before, after)
	})
	return u, err
}

// RemoveUser implements Store.
func (s *database) RemoveUser(ctx context.Context, by string, id wire.UserID, now time.Time) error {
	return s.tx(ctx, fmt.Sprintf("remove user %d", id), func(ctx context.Context, tx *sql.Tx) error {
		var name string
		if err := tx.QueryRowContext(ctx, `SELECT name FROM users WHERE id = $1`, id).Scan(&name); err != nil {
			return err
		}
		var nodes int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM nodes WHERE user_id = $1`, id).Scan(&nodes); err != nil {
			return err
		}
		if nodes > 0 {
			return fmt.Errorf("%w: user %q still has %d nodes; remove them first", ErrConflict, name, nodes)
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM users WHERE id = $1`, id); err != nil {
			return err
		}
		return note(ctx, tx, now, by, "user.remove", name, "")
	})
}

// CreateKey implements Store.
func (s *database) CreateKey(ctx context.Context, by string, k Key) (Key, string, error) {
	secret, hash, err := newSecret()
	if err != nil {
		return Key{}, "", fmt.Errorf("create key: %w", err)
	}
	k.Revoked, k.Used, k.UsedBy = time.Time{}, time.Time{}, 0
	k.Tags = slices.Clone(k.Tags)
	slices.Sort(k.Tags)
	k.Tags = slices.Compact(k.Tags)
	tags, err := encodeList(k.Tags)
	if err != nil {
		return Key{}, "", err
	}
	err = s.tx(ctx, "create key", func(ctx context.Context, tx *sql.Tx) error {
		var err error
		k.ID, err = insert(ctx, tx, `INSERT INTO keys (kind, hash, user_id, tags, reusable, ephemeral, created, expires, node_expiry) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9)`,
			string(k.Kind), hash, nullID(k.User), tags, flag(k.Reusable), flag(k.Ephemeral), stamp(k.Created), stamp(k.Expires), int64(k.NodeExpiry))
		if err != nil {
			return err
		}
		about, err := keyAbout(ctx, tx, k)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, k.Created, by, "key.create", strconv.FormatInt(k.ID, 10), "", about)
	})
	if err != nil {
		return Key{}, "", err
	}
	return k, keyText(k.Kind, k.ID, secret), nil
}

const keyColumns = `id, kind, coalesce(user_id, 0), tags, reusable, ephemeral, created, expires, revoked, used, used_by, node_expiry`

func scanKey(scan func(...any) error, more ...any) (k Key, err error) {
	var tags, kind string
	var created, expires, revoked, used int64
	err = scan(append([]any{&k.ID, &kind, &k.User, &tags, &k.Reusable, &k.Ephemeral, &created, &expires, &revoked, &used, &k.UsedBy, &k.NodeExpiry}, more...)...)
	if err != nil {
		return Key{}, err
	}
	k.Kind = KeyKind(kind)
	k.Created, k.Expires, k.Revoked, k.Used = unstamp(created), unstamp(expires), unstamp(revoked), unstamp(used)
	return k, decode(tags, &k.Tags)
}

// Keys implements Store.
func (s *database) Keys(ctx context.Context) ([]Key, error) {
	return query(ctx, s, "list keys", `SELECT `+keyColumns+` FROM keys ORDER BY id`, func(r *sql.Rows) (Key, error) {
		return scanKey(r.Scan)
	})
}

// keyAbout says what a key is good for, in the audit record.
func keyAbout(ctx context.Context, tx *sql.Tx, k Key) (string, error) {
	words := []string{"for relays"}
	if k.Kind == KeyNode {
		owner, err := ownerText(ctx, tx, k.User, k.Tags)
		if err != nil {
			return "", err
		}
		words = []string{"for nodes of " + owner}
	}
	if k.Reusable {
		words = append(words, "reusable")
	}
	if k.Ephemeral {
		words = append(words, "ephemeral")
	}
	if k.Expires.IsZero() {
		return strings.Join(append(words, "never expires"), ", "), nil
	}
	return strings.Join(append(words, "until "+k.Expires.UTC().Format(time.RFC3339)), ", "), nil
}

// RevokeKey implements Store.
func (s *database) RevokeKey(ctx context.Context, by string, id int64, now time.Time) (k Key, err error) {
	err = s.tx(ctx, fmt.Sprintf("revoke key %d", id), func(ctx context.Context, tx *sql.Tx) error {
		k, err = scanKey(tx.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM keys WHERE id = $1`, id).Scan)
		if err != nil || !k.Revoked.IsZero() {
			return err
		}
		k.Revoked = now
		if _, err := tx.ExecContext(ctx, `UPDATE keys SET revoked = $1 WHERE id = $2`, stamp(now), id); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET key_life = 0 WHERE auth_key = $1`, id); err != nil {
			return err
		}
		about, err := keyAbout(ctx, tx, k)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "key.revoke", strconv.FormatInt(id, 10), about, "revoked")
	})
	return k, err
}

// VerifyKey implements Store.
func (s *database) VerifyKey(ctx context.Context, kind KeyKind, text string, now time.Time) (Key, error) {
	var k Key
	var refusal error
	err := s.read(ctx, "look up key", func(ctx context.Context) (err error) {
		k, err = verifyKey(ctx, s.db, kind, text, now)
		if wire.CodeOf(err) != "" {
			refusal, err = err, nil // as it is: nothing around it may tell more
		}
		return err
	})
	if err != nil {
		return Key{}, err
	}
	return k, refusal
}

type rowQuerier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func verifyKey(ctx context.Context, q rowQuerier, kind KeyKind, text string, now time.Time) (Key, error) {
	id, hash, ok := parseKeyText(kind, text)
	if !ok {
		return Key{}, errUnknownKey(kind)
	}
	var stored []byte
	k, err := scanKey(q.QueryRowContext(ctx, `SELECT `+keyColumns+`, hash FROM keys WHERE id = $1 AND kind = $2`, id, string(kind)).Scan, &stored)
	if err != nil {
		if errors.Is(err, sql.ErrNoRows) {
			err = errUnknownKey(kind)
		}
		return Key{}, err
	}
	if !sameHash(hash[:], stored) {
		return Key{}, errUnknownKey(kind)
	}
	return k, k.State(now)
}

func nullID(id wire.UserID) any {
	if id == 0 {
		return nil
	}
	return int64(id)
}

func encodeList[T any](l []T) (string, error) {
	if l == nil {
		return "[]", nil
	}
	return encode(l)
}

func encode(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

func decode(text string, v any) error {
	if err := json.Unmarshal([]byte(text), v); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}
