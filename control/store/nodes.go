package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

const nodeColumns = `id, stable_id, machine_key, node_key, coalesce(user_id, 0), tags, hostname, name, named, ipv4, ipv6,
	ephemeral, created, expires, auth_key, disco, endpoints, home_derp, hostinfo, cap, last_seen, polled, routes,
	key_life, instance, replica`

func scanNode(scan func(...any) error) (n Node, err error) {
	var tags, ipv4, ipv6, endpoints, hostinfo, routes string
	var machine, key, disco []byte
	var created, expires, seen int64
	err = scan(&n.ID, &n.StableID, &machine, &key, &n.User, &tags, &n.Hostname, &n.Name, &n.Named, &ipv4, &ipv6,
		&n.Ephemeral, &created, &expires, &n.AuthKey, &disco, &endpoints, &n.HomeDERP, &hostinfo, &n.Cap, &seen, &n.Polled, &routes,
		&n.KeyLife, &n.Instance, &n.Replica)
	if err != nil {
		return n, err
	}
	n.Created, n.Expires, n.LastSeen = unstamp(created), unstamp(expires), unstamp(seen)
	var m, k, d [identity.KeyLen]byte
	v4, err4 := netip.ParseAddr(ipv4)
	v6, err6 := netip.ParseAddr(ipv6)
	err = errors.Join(copyKey(&m, machine), copyKey(&k, key), err4, err6, decode(tags, &n.Tags), decode(endpoints, &n.Endpoints), decode(hostinfo, &n.Hostinfo), decode(routes, &n.Routes))
	if len(disco) > 0 {
		err = errors.Join(err, copyKey(&d, disco))
	}
	if err != nil {
		return n, fmt.Errorf("%w: node %d: %w", ErrCorrupt, n.ID, err)
	}
	n.Machine, n.Key, n.Disco = identity.MachinePublicFrom(m), identity.NodePublicFrom(k), identity.DiscoPublicFrom(d)
	n.IPv4, n.IPv6 = v4, v6
	if len(n.Routes) == 0 {
		n.Routes = nil
	}
	return n, nil
}

func copyKey(dst *[identity.KeyLen]byte, b []byte) error {
	if len(b) != identity.KeyLen {
		return fmt.Errorf("key of %d bytes", len(b))
	}
	copy(dst[:], b)
	return nil
}

func keyBytes[K interface{ Bytes() [identity.KeyLen]byte }](k K) []byte {
	b := k.Bytes()
	return b[:]
}

// Nodes implements Store.
func (s *database) Nodes(ctx context.Context) ([]Node, error) {
	return query(ctx, s, "list nodes", `SELECT `+nodeColumns+` FROM nodes ORDER BY id`, func(r *sql.Rows) (Node, error) {
		return scanNode(r.Scan)
	})
}

// LastNodeID implements Store.
func (s *database) LastNodeID(ctx context.Context) (wire.NodeID, error) {
	var id int64
	err := s.read(ctx, "last node ID", func(ctx context.Context) error { return s.db.QueryRowContext(ctx, s.dialect.lastNode).Scan(&id) })
	return wire.NodeID(id), err
}

// RegisterNode implements Store.
func (s *database) RegisterNode(ctx context.Context, keyText string, n Node, now time.Time) (Node, error) {
	err := s.tx(ctx, fmt.Sprintf("register node %q", n.Name), func(ctx context.Context, tx *sql.Tx) error {
		k, err := verifyKey(ctx, tx, KeyNode, keyText, now)
		if err != nil {
			return err
		}
		n.AuthKey = k.ID
		action := "node.register"
		if n.ID != 0 {
			action = "node.renew"
		}
		if err := putNode(ctx, tx, &n, now); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE keys SET used = $1, used_by = $2 WHERE id = $3`, stamp(now), n.ID, k.ID); err != nil {
			return err
		}
		owner, err := ownerText(ctx, tx, n.User, n.Tags)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, now, fmt.Sprintf("key %d", k.ID), action, n.Name, "", n.IPv4.String()+" for "+owner)
	})
	if err != nil {
		return Node{}, err
	}
	return n, nil
}

// AdmitNode implements Store.
func (s *database) AdmitNode(ctx context.Context, by string, n Node, now time.Time) (Node, error) {
	n.AuthKey = 0
	err := s.tx(ctx, fmt.Sprintf("admit node %q", n.Name), func(ctx context.Context, tx *sql.Tx) error {
		if err := putNode(ctx, tx, &n, now); err != nil {
			return err
		}
		owner, err := ownerText(ctx, tx, n.User, n.Tags)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.approve", n.Name, "", n.IPv4.String()+" for "+owner)
	})
	if err != nil {
		return Node{}, err
	}
	return n, nil
}

// putNode stores n, as a new node if its ID is 0.
func putNode(ctx context.Context, tx *sql.Tx, n *Node, now time.Time) error {
	tags, err := encodeList(n.Tags)
	if err != nil {
		return err
	}
	state, err := encodeState(n.NodeState)
	if err != nil {
		return err
	}
	if err := notDead(ctx, tx, n.Key); err != nil {
		return err
	}
	if n.ID != 0 {
		if err := retire(ctx, tx, n.ID, false, now); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `UPDATE nodes SET node_key = $1, expires = $2, auth_key = $3, ephemeral = $4, key_life = $5 WHERE id = $6`,
			keyBytes(n.Key), stamp(n.Expires), n.AuthKey, flag(n.Ephemeral), int64(n.KeyLife), n.ID)
		if err != nil {
			return err
		}
		return saveState(ctx, tx, n.ID, state)
	}
	id, err := insert(ctx, tx, `INSERT INTO nodes (stable_id, machine_key, node_key, user_id, tags, hostname, name, named, ipv4, ipv6,
		ephemeral, created, expires, auth_key, key_life) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14,$15)`,
		string(n.StableID), keyBytes(n.Machine), keyBytes(n.Key), nullID(n.User), tags, n.Hostname, n.Name, flag(n.Named), n.IPv4.String(), n.IPv6.String(),
		flag(n.Ephemeral), stamp(n.Created), stamp(n.Expires), n.AuthKey, int64(n.KeyLife))
	if err != nil {
		return err
	}
	n.ID = wire.NodeID(id)
	return saveState(ctx, tx, n.ID, state)
}

// ownerText names a user, or tags, in the audit record.
func ownerText(ctx context.Context, tx *sql.Tx, user wire.UserID, tags []string) (name string, err error) {
	if len(tags) > 0 {
		return strings.Join(tags, " "), nil
	}
	if user == 0 {
		return "nobody", nil
	}
	err = tx.QueryRowContext(ctx, `SELECT name FROM users WHERE id = $1`, user).Scan(&name)
	return name, err
}

// nodeOwner returns the name of a node and of whom it belongs to.
func nodeOwner(ctx context.Context, tx *sql.Tx, id wire.NodeID) (name, owner string, err error) {
	var user wire.UserID
	var text string
	var tags []string
	if err := tx.QueryRowContext(ctx, `SELECT name, coalesce(user_id, 0), tags FROM nodes WHERE id = $1`, id).Scan(&name, &user, &text); err != nil {
		return "", "", err
	}
	if err := decode(text, &tags); err != nil {
		return "", "", err
	}
	owner, err = ownerText(ctx, tx, user, tags)
	return name, owner, err
}

// retire moves the present key of a node to the dead ones, and ends what is left
// of the key before.
func retire(ctx context.Context, tx *sql.Tx, id wire.NodeID, removed bool, now time.Time) error {
	if _, err := tx.ExecContext(ctx, `UPDATE dead_keys SET kept = 0 WHERE node_id = $1 AND kept <> 0`, id); err != nil {
		return err
	}
	r, err := tx.ExecContext(ctx, `INSERT INTO dead_keys (node_key, machine_key, removed, auth_key, at, node_id)
		SELECT node_key, machine_key, $1, auth_key, $2, id FROM nodes WHERE id = $3
		ON CONFLICT (node_key) DO UPDATE SET machine_key = excluded.machine_key, removed = excluded.removed, auth_key = excluded.auth_key,
			at = excluded.at, node_id = excluded.node_id`, flag(removed), stamp(now), id)
	if err != nil {
		return err
	}
	return mustAffect(r)
}

func notDead(ctx context.Context, tx *sql.Tx, key identity.NodePublic) error {
	var n int
	err := tx.QueryRowContext(ctx, `SELECT count(*) FROM dead_keys WHERE node_key = $1`, keyBytes(key)).Scan(&n)
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: the node key is no longer valid", ErrConflict)
	}
	return err
}

func mustAffect(r sql.Result) error {
	n, err := r.RowsAffected()
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	return err
}

// keyOf returns the name of a node and the short form of its key.
func keyOf(ctx context.Context, tx *sql.Tx, id wire.NodeID) (name, key string, err error) {
	var b []byte
	if err := tx.QueryRowContext(ctx, `SELECT name, node_key FROM nodes WHERE id = $1`, id).Scan(&name, &b); err != nil {
		return "", "", err
	}
	var k [identity.KeyLen]byte
	if err := copyKey(&k, b); err != nil {
		return "", "", fmt.Errorf("%w: node %d: %w", ErrCorrupt, id, err)
	}
	return name, identity.NodePublicFrom(k).Short(), nil
}

// keptKeys is how many former keys of a node that makes new ones are known: for
// whoever comes back with a saved state that is old.
const keptKeys = 16

// RotateNodeKey implements Store.
func (s *database) RotateNodeKey(ctx context.Context, id wire.NodeID, key identity.NodePublic, expires, kept, now time.Time) error {
	return s.tx(ctx, fmt.Sprintf("rotate key of node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		if err := notDead(ctx, tx, key); err != nil {
			return err
		}
		name, old, err := keyOf(ctx, tx, id)
		if err != nil {
			return err
		}
		if err := retire(ctx, tx, id, false, now); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `UPDATE dead_keys SET kept = $1 WHERE node_key = (SELECT node_key FROM nodes WHERE id = $2)`, stamp(kept), id)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET node_key = $1, expires = $2 WHERE id = $3`, keyBytes(key), stamp(expires), id); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM dead_keys WHERE node_id = $1 AND removed = 0 AND node_key NOT IN
			(SELECT node_key FROM dead_keys WHERE node_id = $1 ORDER BY at DESC LIMIT $2)`, id, keptKeys)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, now, "node", "node.rotate", name, old, key.Short())
	})
}

func expiryText(at time.Time) string {
	if at.IsZero() {
		return "never"
	}
	return at.UTC().Format(time.RFC3339)
}

// ExpireNode implements Store.
func (s *database) ExpireNode(ctx context.Context, by string, id wire.NodeID, at, now time.Time) error {
	return s.tx(ctx, fmt.Sprintf("expire node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		var name string
		var old int64
		if err := tx.QueryRowContext(ctx, `SELECT name, expires FROM nodes WHERE id = $1`, id).Scan(&name, &old); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET expires = $1, key_life = CASE WHEN $2 <> 0 THEN key_life ELSE 0 END WHERE id = $3`, stamp(at), flag(at.IsZero()), id); err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.expire", name, expiryText(unstamp(old)), expiryText(at))
	})
}

// RenameNode implements Store.
func (s *database) RenameNode(ctx context.Context, by string, id wire.NodeID, hostname, name string, named bool, now time.Time) error {
	return s.tx(ctx, fmt.Sprintf("rename node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		var old string
		if err := tx.QueryRowContext(ctx, `SELECT name FROM nodes WHERE id = $1`, id).Scan(&old); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET hostname = $1, name = $2, named = $3 WHERE id = $4`, hostname, name, flag(named), id); err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.rename", old, old, name)
	})
}

// SetOwner implements Store.
func (s *database) SetOwner(ctx context.Context, by string, id wire.NodeID, user wire.UserID, tags []string, expires, now time.Time) error {
	text, err := encodeList(tags)
	if err != nil {
		return err
	}
	return s.tx(ctx, fmt.Sprintf("set owner of node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		name, before, err := nodeOwner(ctx, tx, id)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET user_id = $1, tags = $2, expires = $3 WHERE id = $4`, nullID(user), text, stamp(expires), id); err != nil {
			return err
		}
		owner, err := ownerText(ctx, tx, user, tags)
		if err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.tag", name, before, owner)
	})
}

func routesText(routes []netip.Prefix) string {
	if len(routes) == 0 {
		return "none"
	}
	return strings.Trim(fmt.Sprint(routes), "[]")
}

// ApproveRoutes implements Store.
func (s *database) ApproveRoutes(ctx context.Context, by string, id wire.NodeID, routes []netip.Prefix, now time.Time) error {
	text, err := encodeList(routes)
	if err != nil {
		return err
	}
	return s.tx(ctx, fmt.Sprintf("approve routes of node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		var name, old string
		if err := tx.QueryRowContext(ctx, `SELECT name, routes FROM nodes WHERE id = $1`, id).Scan(&name, &old); err != nil {
			return err
		}
		var before []netip.Prefix
		if err := decode(old, &before); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `UPDATE nodes SET routes = $1 WHERE id = $2`, text, id); err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.routes", name, routesText(before), routesText(routes))
	})
}

// RemoveNode implements Store.
func (s *database) RemoveNode(ctx context.Context, by string, id wire.NodeID, bury bool, now time.Time) error {
	return s.tx(ctx, fmt.Sprintf("remove node %d", id), func(ctx context.Context, tx *sql.Tx) error {
		name, owner, err := nodeOwner(ctx, tx, id)
		if err != nil {
			return err
		}
		if bury {
			if err := retire(ctx, tx, id, true, now); err != nil {
				return err
			}
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM nodes WHERE id = $1`, id); err != nil {
			return err
		}
		return noteChange(ctx, tx, now, by, "node.remove", name, fmt.Sprintf("node %d of %s", id, owner), "")
	})
}

// encodedState is a NodeState as column values.
type encodedState struct {
	disco               any
	endpoints, hostinfo string
	home, cap           int
	seen                int64
	polled              bool
	instance            string
}

func encodeState(st NodeState) (e encodedState, err error) {
	if !st.Disco.IsZero() {
		e.disco = keyBytes(st.Disco)
	}
	if e.endpoints, err = encodeList(st.Endpoints); err != nil {
		return e, err
	}
	e.hostinfo = "{}"
	if st.Hostinfo != nil {
		if e.hostinfo, err = encode(st.Hostinfo); err != nil {
			return e, err
		}
	}
	e.home, e.cap, e.seen, e.polled, e.instance = st.HomeDERP, st.Cap, stamp(st.LastSeen), st.Polled, st.Instance
	return e, nil
}

func saveState(ctx context.Context, tx *sql.Tx, id wire.NodeID, e encodedState) error {
	_, err := tx.ExecContext(ctx, `UPDATE nodes SET disco = $1, endpoints = $2, home_derp = $3, hostinfo = $4, cap = $5, last_seen = $6, polled = $7, instance = $8 WHERE id = $9`,
		e.disco, e.endpoints, e.home, e.hostinfo, e.cap, e.seen, flag(e.polled), e.instance, id)
	return err
}

// SaveStates implements Store.
func (s *database) SaveStates(ctx context.Context, states map[wire.NodeID]NodeState) error {
	if len(states) == 0 {
		return nil
	}
	encoded := make(map[wire.NodeID]encodedState, len(states))
	for id, st := range states {
		e, err := encodeState(st)
		if err != nil {
			return fmt.Errorf("save state of node %d: %w", id, err)
		}
		encoded[id] = e
	}
	return s.tx(ctx, "save node states", func(ctx context.Context, tx *sql.Tx) error {
		for id, e := range encoded {
			if err := saveState(ctx, tx, id, e); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeadKey implements Store.
func (s *database) DeadKey(ctx context.Context, key identity.NodePublic) (DeadKey, error) {
	d := DeadKey{Key: key}
	var machine []byte
	var m [identity.KeyLen]byte
	err := s.read(ctx, "look up node key", func(ctx context.Context) error {
		err := s.db.QueryRowContext(ctx, `SELECT machine_key, removed, auth_key, node_id FROM dead_keys WHERE node_key = $1`, keyBytes(key)).
			Scan(&machine, &d.Removed, &d.AuthKey, &d.Node)
		if err == nil {
			err = copyKey(&m, machine)
		}
		return err
	})
	if err != nil {
		return DeadKey{}, err
	}
	d.Machine = identity.MachinePublicFrom(m)
	return d, nil
}

// KeptKeys implements Store.
func (s *database) KeptKeys(ctx context.Context, now time.Time) ([]KeptKey, error) {
	return query(ctx, s, "list keys that go on", `SELECT node_key, node_id, kept FROM dead_keys WHERE kept > $1 AND removed = 0 ORDER BY node_id`, func(r *sql.Rows) (k KeptKey, err error) {
		var key []byte
		var until int64
		var raw [identity.KeyLen]byte
		if err := r.Scan(&key, &k.Node, &until); err != nil {
			return k, err
		}
		if err := copyKey(&raw, key); err != nil {
			return k, err
		}
		k.Key, k.Until = identity.NodePublicFrom(raw), unstamp(until)
		return k, nil
	}, stamp(now))
}

// Buried implements Store.
func (s *database) Buried(ctx context.Context, machine identity.MachinePublic, authKey int64) (bool, error) {
	var n int
	err := s.read(ctx, "look up machine", func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT count(*) FROM dead_keys WHERE machine_key = $1 AND removed <> 0 AND auth_key = $2`,
			keyBytes(machine), authKey).Scan(&n)
	})
	return n > 0, err
}
