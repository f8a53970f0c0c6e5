package store

import (
	"context"
	"database/sql"
	"fmt"

	"mesh/identity"
)

// migration brings tables from one version to the next. Tables and columns are
// only ever added, with defaults, so that a program which does not know them can
// go on: that is how replicas of two versions run beside each other.
type migration struct {
	ddl string // in SQLite's words; see postgresDDL
	// then runs after ddl, nil = nothing.
	then func(context.Context, *sql.Tx) error
	// sqlite and postgres run last, each in its own words.
	sqlite, postgres string
	// breaks says that programs which do not know this version must not use the
	// tables any more.
	breaks bool
}

// migrations lead from version i to version i+1. One that was released is never
// changed.
var migrations = []migration{
	// The key is made here, and only here: a store that lost its key must not
	// come back under a new one that no node trusts.
	{ddl: schema1, then: makeServerKey, postgres: `CREATE UNIQUE INDEX users_lower ON users (lower(name))`, breaks: true},
	{ddl: schema2, breaks: true},
	{ddl: schema3, breaks: true},
	{ddl: schema4, breaks: true},
	{ddl: schema5, then: chainAudit, sqlite: schema5Sealed, postgres: schema5SealedPostgres, breaks: true},
	{ddl: schema6, breaks: true},
	{ddl: schema7, postgres: schema7Postgres, breaks: true},
	{ddl: schema8, sqlite: schema8Logins, postgres: schema8Postgres},
}

func makeServerKey(ctx context.Context, tx *sql.Tx) error {
	key := identity.NewMachine().Secret()
	_, err := tx.ExecContext(ctx, `INSERT INTO meta (name, value) VALUES ('server-key', $1)`, []byte(key))
	return err
}

// run applies what leads on from a version.
func run(ctx context.Context, tx *sql.Tx, version int, postgres bool) error {
	for _, m := range migrations[version:] {
		ddl, own := m.ddl, m.sqlite
		if postgres {
			ddl, own = postgresDDL.Replace(ddl), m.postgres
		}
		if _, err := tx.ExecContext(ctx, ddl); err != nil {
			return err
		}
		if m.then != nil {
			if err := m.then(ctx, tx); err != nil {
				return err
			}
		}
		if own != "" {
			if _, err := tx.ExecContext(ctx, own); err != nil {
				return err
			}
		}
	}
	return nil
}

// schema8: until when a key that a node replaced goes on beside the new one.
const schema8 = `
ALTER TABLE dead_keys ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;
`

// schema7: which replica a node has its poll at, and by whom and when what it
// reports was written.
const schema7 = `
ALTER TABLE nodes ADD COLUMN replica TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN state_by TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN state_seq INTEGER NOT NULL DEFAULT 0;
`

// schema6: nodes renew their keys by themselves, say which of their processes
// they are, and are known by the keys that they had.
const schema6 = `
ALTER TABLE nodes ADD COLUMN key_life INTEGER NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN instance TEXT NOT NULL DEFAULT '';
ALTER TABLE dead_keys ADD COLUMN node_id INTEGER NOT NULL DEFAULT 0;
CREATE INDEX dead_keys_node ON dead_keys (node_id);
`

// schema5: users can be suspended; the audit record is a chain, says where
// changes came from, and takes no other change than one more entry.
const schema5 = `
ALTER TABLE users ADD COLUMN suspended INTEGER NOT NULL DEFAULT 0;
ALTER TABLE audit ADD COLUMN source TEXT NOT NULL DEFAULT '';
ALTER TABLE audit ADD COLUMN before TEXT NOT NULL DEFAULT '';
ALTER TABLE audit ADD COLUMN after TEXT NOT NULL DEFAULT '';
ALTER TABLE audit ADD COLUMN prev BLOB NOT NULL DEFAULT x'';
ALTER TABLE audit ADD COLUMN hash BLOB NOT NULL DEFAULT x'';

CREATE TABLE audit_head (
	id   INTEGER PRIMARY KEY CHECK (id = 1),
	last INTEGER NOT NULL,
	hash BLOB NOT NULL
) STRICT;
`

const schema5Sealed = `
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END;
`

const schema5SealedPostgres = `
CREATE FUNCTION audit_sealed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the audit record is append-only'; END $$;
CREATE TRIGGER audit_sealed BEFORE UPDATE OR DELETE OR TRUNCATE ON audit EXECUTE FUNCTION audit_sealed();
`

// schema4: a region may have several relays.
const schema4 = `
ALTER TABLE relays RENAME TO relays_of_one;
CREATE TABLE relays (
	node_key  BLOB PRIMARY KEY,
	region_id INTEGER NOT NULL,
	region    TEXT NOT NULL,
	key_id    INTEGER NOT NULL REFERENCES keys (id),
	created   INTEGER NOT NULL
) STRICT;
INSERT INTO relays SELECT node_key, region_id, region, key_id, created FROM relays_of_one;
DROP TABLE relays_of_one;
CREATE INDEX relays_region ON relays (region_id);
`

// schema3: approved routes, where policies come from, access for a time, and a
// candidate beside the policy.
const schema3 = `
ALTER TABLE nodes ADD COLUMN routes TEXT NOT NULL DEFAULT '[]';
ALTER TABLE policies ADD COLUMN note TEXT NOT NULL DEFAULT '';

CREATE TABLE grants (
	id       INTEGER PRIMARY KEY AUTOINCREMENT,
	src      TEXT NOT NULL,
	dst      TEXT NOT NULL,
	ip       TEXT NOT NULL,
	asked    TEXT NOT NULL,
	nodes    TEXT NOT NULL,
	reason   TEXT NOT NULL,
	author   TEXT NOT NULL,
	created  INTEGER NOT NULL,
	until    INTEGER NOT NULL,
	ended    INTEGER NOT NULL DEFAULT 0,
	ended_by TEXT NOT NULL DEFAULT '',
	why      TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX grants_ended ON grants (ended);

CREATE TABLE shadow (
	id      INTEGER PRIMARY KEY CHECK (id = 1),
	text    TEXT NOT NULL,
	author  TEXT NOT NULL,
	created INTEGER NOT NULL
) STRICT;
`

// schema2: administrators name nodes, and keys say how long node keys live.
const schema2 = `
ALTER TABLE nodes ADD COLUMN named INTEGER NOT NULL DEFAULT 0;
ALTER TABLE keys ADD COLUMN node_expiry INTEGER NOT NULL DEFAULT 0;
`

const schema1 = `
CREATE TABLE meta (
	name  TEXT PRIMARY KEY,
	value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE users (
	id      INTEGER PRIMARY KEY AUTOINCREMENT,
	name    TEXT NOT NULL UNIQUE COLLATE NOCASE,
	role    TEXT NOT NULL,
	created INTEGER NOT NULL
) STRICT;

CREATE TABLE keys (
	id        INTEGER PRIMARY KEY AUTOINCREMENT,
	kind      TEXT NOT NULL,
	hash      BLOB NOT NULL UNIQUE,
	user_id   INTEGER REFERENCES users (id) ON DELETE CASCADE,
	tags      TEXT NOT NULL,
	reusable  INTEGER NOT NULL,
	ephemeral INTEGER NOT NULL,
	created   INTEGER NOT NULL,
	expires   INTEGER NOT NULL,
	revoked   INTEGER NOT NULL DEFAULT 0,
	used      INTEGER NOT NULL DEFAULT 0,
	used_by   INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX keys_user ON keys (user_id);

CREATE TABLE nodes (
	id          INTEGER PRIMARY KEY AUTOINCREMENT,
	stable_id   TEXT NOT NULL UNIQUE,
	machine_key BLOB NOT NULL,
	node_key    BLOB NOT NULL UNIQUE,
	user_id     INTEGER REFERENCES users (id),
	tags        TEXT NOT NULL,
	hostname    TEXT NOT NULL,
	name        TEXT NOT NULL UNIQUE,
	ipv4        TEXT NOT NULL UNIQUE,
	ipv6        TEXT NOT NULL UNIQUE,
	ephemeral   INTEGER NOT NULL,
	created     INTEGER NOT NULL,
	expires     INTEGER NOT NULL,
	auth_key    INTEGER NOT NULL,
	disco       BLOB,
	endpoints   TEXT NOT NULL DEFAULT '[]',
	home_derp   INTEGER NOT NULL DEFAULT 0,
	hostinfo    TEXT NOT NULL DEFAULT '{}',
	cap         INTEGER NOT NULL DEFAULT 0,
	last_seen   INTEGER NOT NULL DEFAULT 0,
	polled      INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX nodes_user ON nodes (user_id);

CREATE TABLE dead_keys (
	node_key    BLOB PRIMARY KEY,
	machine_key BLOB NOT NULL,
	removed     INTEGER NOT NULL,
	auth_key    INTEGER NOT NULL,
	at          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX dead_keys_machine ON dead_keys (machine_key);

CREATE TABLE policies (
	version INTEGER PRIMARY KEY AUTOINCREMENT,
	text    TEXT NOT NULL,
	author  TEXT NOT NULL,
	created INTEGER NOT NULL
) STRICT;

CREATE TABLE relays (
	region_id INTEGER PRIMARY KEY,
	node_key  BLOB NOT NULL UNIQUE,
	region    TEXT NOT NULL,
	key_id    INTEGER NOT NULL REFERENCES keys (id),
	created   INTEGER NOT NULL
) STRICT;

CREATE TABLE audit (
	id     INTEGER PRIMARY KEY AUTOINCREMENT,
	at     INTEGER NOT NULL,
	actor  TEXT NOT NULL,
	action TEXT NOT NULL,
	object TEXT NOT NULL,
	detail TEXT NOT NULL
) STRICT;
CREATE INDEX audit_at ON audit (at);
`

// applicationID marks the file as ours ("mesh").
const applicationID = 0x6d657368

func (s *SQLite) migrate(ctx context.Context) error {
	return s.tx(ctx, "prepare tables", func(ctx context.Context, tx *sql.Tx) error {
		var app, version, tables int
		err := tx.QueryRowContext(ctx, `SELECT (SELECT application_id FROM pragma_application_id),
			(SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_schema)`).Scan(&app, &version, &tables)
		if err != nil {
			return err
		}
		switch {
		case version == 0 && tables > 0, version > 0 && app != applicationID:
			return fmt.Errorf("%w: the file is a database of something else", ErrCorrupt)
		case version > len(migrations):
			return fmt.Errorf("%w: tables have version %d, this program knows %d", ErrNewer, version, len(migrations))
		case version == len(migrations):
			return nil
		}
		if err := run(ctx, tx, version, false); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA application_id = %d; PRAGMA user_version = %d`, applicationID, len(migrations)))
		return err
	})
}
