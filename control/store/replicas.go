package store

// schema7Postgres has what replicas share. Triggers write the log of changes, so
// that nothing can be changed without a word in it, by whatever program. What
// nodes report is not in the log: each node's row says when it was last written.
//
// A number of the log is given out under the lock of all writers, which lasts
// until the transaction is over: who sees a number sees all that are lower.
const schema7Postgres = `
ALTER TABLE mesh_version ADD COLUMN pruned BIGINT NOT NULL DEFAULT 0;

CREATE TABLE changes (
	seq     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	replica TEXT NOT NULL,
	what    TEXT NOT NULL,
	id      BIGINT NOT NULL,
	at      TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE INDEX changes_at ON changes (at);
CREATE INDEX nodes_state_seq ON nodes (state_seq);

CREATE TABLE replicas (
	name   TEXT PRIMARY KEY,
	number BIGINT NOT NULL UNIQUE,
	about  TEXT NOT NULL,
	seen   TIMESTAMPTZ NOT NULL
);

CREATE TABLE logins (
	code    TEXT PRIMARY KEY,
	about   TEXT NOT NULL,
	expires BIGINT NOT NULL
);

CREATE FUNCTION mesh_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	reported CONSTANT TEXT[] := ARRAY['disco', 'endpoints', 'home_derp', 'hostinfo', 'cap', 'last_seen', 'polled', 'instance', 'replica', 'state_by', 'state_seq'];
	node BIGINT := 0;
BEGIN
	IF TG_TABLE_NAME = 'nodes' THEN
		IF TG_OP = 'DELETE' THEN
			node := OLD.id;
		ELSE
			node := NEW.id;
		END IF;
		IF TG_OP = 'UPDATE' THEN
			IF to_jsonb(OLD) - reported = to_jsonb(NEW) - reported THEN
				RETURN NULL;
			END IF;
		END IF;
	END IF;
	PERFORM pg_advisory_xact_lock(hashtextextended('mesh ' || TG_TABLE_SCHEMA, 0));
	INSERT INTO changes (replica, what, id) VALUES (coalesce(current_setting('mesh.replica', true), ''), TG_TABLE_NAME, node);
	PERFORM pg_notify('mesh_' || TG_TABLE_SCHEMA, '');
	RETURN NULL;
END $$;

CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON nodes FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON users FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER UPDATE OF revoked OR DELETE ON keys FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON policies FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON grants FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON shadow FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON relays FOR EACH ROW EXECUTE FUNCTION mesh_changed();
CREATE TRIGGER mesh_changed AFTER INSERT OR UPDATE OR DELETE ON logins FOR EACH ROW EXECUTE FUNCTION mesh_changed();
`

// schema8Postgres: which process a replica is.
const schema8Postgres = `
ALTER TABLE replicas ADD COLUMN process TEXT NOT NULL DEFAULT '';
`
