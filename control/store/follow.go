package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"mesh/control/wire"
)

var _ Shared = (*Postgres)(nil)

// logLife is how long the log of changes reaches back: a replica that was cut
// off for longer reads everything anew.
const logLife = time.Hour

// Replica implements Shared.
func (s *Postgres) Replica() string { return s.replica }

// certainlyDead is for how long a replica is silent at least before another
// process may be it.
const certainlyDead = 2*BeatEvery + time.Second

// Join makes this server a replica, under a name that it has kept since its
// first start, and returns its number among the replicas: the smallest that was
// free, and the same at each start. Whatever an earlier process of that name had
// is let go. If that was killed a moment ago, Join waits until it is certain.
// ErrLocked: another process of that name lives, with a copy of what this one has
// kept; nothing was changed, and another name will do.
func (s *Postgres) Join(ctx context.Context, name string) (number int, err error) {
	var first time.Time // when the other process was last seen
	for began := time.Now(); ; {
		other, silent, err := s.rival(ctx, name)
		switch {
		case err != nil:
			return 0, err
		case silent > certainlyDead, time.Since(began) > certainlyDead && other.Equal(first): // if the database's clock was set back
			return s.become(ctx, name)
		case first.IsZero():
			first = other
		case !other.Equal(first):
			return 0, fmt.Errorf("join the replicas as %s: %w by another process, which lives", name, ErrLocked)
		}
		t := time.NewTimer(min(max(certainlyDead-silent, 0)+time.Millisecond, BeatEvery/4))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return 0, ctx.Err()
		}
	}
}

// rival returns when another process said last that it is the replica of that
// name, and how long it has been silent: for ever, if there is none.
func (s *Postgres) rival(ctx context.Context, name string) (seen time.Time, silent time.Duration, err error) {
	var seconds float64
	err = s.read(ctx, "look for the replica's last process", func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT seen, extract(epoch FROM now() - seen)::float8 FROM replicas WHERE name = $1 AND process <> $2`, name, s.process).Scan(&seen, &seconds)
	})
	if errors.Is(err, ErrNotFound) {
		return time.Time{}, Lease, nil
	}
	return seen, time.Duration(seconds * float64(time.Second)), err
}

// become takes over a name.
func (s *Postgres) become(ctx context.Context, name string) (number int, err error) {
	err = s.tx(ctx, "join the replicas", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO replicas (name, number, about, seen, process)
			SELECT $1, (SELECT min(n) FROM generate_series(0, (SELECT count(*) FROM replicas)) AS n WHERE n NOT IN (SELECT number FROM replicas)), '{}', now(), $2
			ON CONFLICT (name) DO UPDATE SET seen = now(), process = $2`, name, s.process)
		if err != nil {
			return err
		}
		if err := tx.QueryRowContext(ctx, `SELECT number FROM replicas WHERE name = $1`, name).Scan(&number); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `UPDATE nodes SET replica = '', state_by = $1, state_seq = nextval('changes_seq_seq') WHERE replica = $1`, name)
		return err
	})
	s.replica = name
	return number, err
}

// Beat implements Shared.
func (s *Postgres) Beat(ctx context.Context, about ReplicaInfo) (map[string]ReplicaInfo, error) {
	text, err := encode(about)
	if err != nil {
		return nil, err
	}
	others := make(map[string]ReplicaInfo)
	err = s.do(ctx, "tell the other replicas", func(ctx context.Context) error {
		done, err := s.db.ExecContext(ctx, `UPDATE replicas SET about = $2, seen = now() WHERE name = $1 AND process = $3`, s.replica, text, s.process)
		if err != nil {
			return err
		}
		if n, err := done.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, fmt.Errorf("replica %s is %w by another process", s.replica, ErrLocked))
		}
		rows, err := s.db.QueryContext(ctx, `SELECT name, about FROM replicas WHERE name <> $1 AND seen > now() - make_interval(secs => $2)`, s.replica, Lease.Seconds())
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var name, about string
			var info ReplicaInfo
			if err := rows.Scan(&name, &about); err != nil {
				return err
			}
			if err := decode(about, &info); err != nil {
				return err
			}
			others[name] = info
		}
		return rows.Err()
	})
	if err != nil {
		return nil, err
	}
	return others, s.tidy(ctx)
}

// tidy forgets what nobody needs any more, once a minute.
func (s *Postgres) tidy(ctx context.Context) error {
	s.tidyMu.Lock()
	due := time.Since(s.tidied) > time.Minute
	if due {
		s.tidied = time.Now()
	}
	s.tidyMu.Unlock()
	if !due {
		return nil
	}
	return s.tx(ctx, "tidy up the log", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `WITH gone AS (DELETE FROM changes WHERE at < now() - make_interval(secs => $1) RETURNING seq)
			UPDATE mesh_version SET pruned = greatest(pruned, (SELECT coalesce(max(seq), 0) FROM gone))`, logLife.Seconds())
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `DELETE FROM logins WHERE expires < $1`, stamp(time.Now().Add(-logLife))); err != nil {
			return err
		}
		// The number of a replica that was away for a month is free.
		_, err = tx.ExecContext(ctx, `DELETE FROM replicas WHERE seen < now() - interval '30 days'`)
		return err
	})
}

// Leave implements Shared.
func (s *Postgres) Leave(ctx context.Context) error {
	return s.do(ctx, "leave the replicas", func(ctx context.Context) error {
		_, err := s.db.ExecContext(ctx, `UPDATE replicas SET seen = now() - interval '1 day' WHERE name = $1 AND process = $2`, s.replica, s.process)
		return err
	})
}

// doubt is whether a commit of ours may have happened that was not confirmed,
// and that nobody here knows of then. The zero doubt is none.
type doubt struct{ state atomic.Int32 }

const (
	certain int32 = iota
	doubted       // a commit was not confirmed
	settled       // but a later one was: it waited until that was over
)

// committed learns what became of a commit.
func (d *doubt) committed(err error) {
	if err != nil {
		d.state.Store(doubted)
	} else {
		d.state.CompareAndSwap(doubted, settled)
	}
}

// Position implements Shared.
func (s *Postgres) Position(ctx context.Context) (p Position, err error) {
	err = s.read(ctx, "read the log of changes", func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT greatest((SELECT pruned FROM mesh_version), (SELECT coalesce(max(seq), 0) FROM changes)),
			(SELECT coalesce(max(state_seq), 0) FROM nodes)`).Scan(&p.Log, &p.States)
	})
	return p, err
}

// Changes implements Shared. One statement is one look at the database: what was
// decided and what was reported fit each other. While a commit of this replica is
// in doubt, its own decisions are among the changes.
func (s *Postgres) Changes(ctx context.Context, after Position) (Changes, error) {
	c := Changes{Next: after, Nodes: make(map[wire.NodeID]bool), What: make(map[string]bool)}
	doubt := s.doubt.state.Load()
	err := s.read(ctx, "read the log of changes", func(ctx context.Context) error {
		rows, err := s.db.QueryContext(ctx, `SELECT pruned, 'pruned', 0, '' FROM mesh_version WHERE pruned > $1
			UNION ALL SELECT seq, what, id, replica FROM changes WHERE seq > $1
			UNION ALL SELECT state_seq, 'reports', id, state_by FROM nodes WHERE state_seq > $2`, after.Log, after.States)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var seq, id int64
			var what, by string
			if err := rows.Scan(&seq, &what, &id, &by); err != nil {
				return err
			}
			switch {
			case what == "pruned":
				c.Lost = true
				c.Next.Log = max(c.Next.Log, seq)
				continue
			case what == "reports":
				c.Next.States = max(c.Next.States, seq)
			default:
				c.Next.Log = max(c.Next.Log, seq)
			}
			switch {
			case by == s.replica && (doubt == certain || what == "reports"):
			case what == "reports", what == "nodes":
				c.Nodes[wire.NodeID(id)] = c.Nodes[wire.NodeID(id)] || what == "reports"
			default:
				c.What[what] = true
			}
		}
		return rows.Err()
	})
	if err == nil && doubt == settled {
		s.doubt.state.CompareAndSwap(settled, certain)
	}
	return c, err
}

// Listen implements Shared.
func (s *Postgres) Listen(ctx context.Context, wake func()) error {
	conf := s.conf.Copy()
	delete(conf.RuntimeParams, "statement_timeout")
	conn, err := pgx.ConnectConfig(ctx, conf)
	if err != nil {
		return fmt.Errorf("listen for changes: %w", s.classify(err))
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		conn.Close(closing)
	}()
	var channel string
	if err := conn.QueryRow(ctx, `SELECT quote_ident('mesh_' || current_schema())`).Scan(&channel); err != nil {
		return fmt.Errorf("listen for changes: %w", s.classify(err))
	}
	if _, err := conn.Exec(ctx, `LISTEN `+channel); err != nil {
		return fmt.Errorf("listen for changes: %w", s.classify(err))
	}
	wake() // for what happened until now
	for {
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return fmt.Errorf("listen for changes: %w", s.classify(err))
		}
		wake()
	}
}

// NodesByID implements Shared.
func (s *Postgres) NodesByID(ctx context.Context, ids []wire.NodeID) ([]Node, error) {
	list := make([]int64, 0, len(ids))
	for _, id := range ids {
		list = append(list, int64(id))
	}
	return query(ctx, &s.database, "read nodes", `SELECT `+nodeColumns+` FROM nodes WHERE id = ANY($1::bigint[]) ORDER BY id`,
		func(r *sql.Rows) (Node, error) { return scanNode(r.Scan) }, list)
}

// SaveStates implements Store.
func (s *Postgres) SaveStates(ctx context.Context, states map[wire.NodeID]NodeState) error {
	return s.SaveReports(ctx, states, nil)
}

// report is one row of SaveReports.
type report struct {
	ID        wire.NodeID `json:"id"`
	Disco     []byte      `json:"disco"`
	Endpoints string      `json:"endpoints"`
	Home      int         `json:"home"`
	Hostinfo  string      `json:"hostinfo"`
	Cap       int         `json:"cap"`
	Seen      int64       `json:"seen"`
	Polled    int         `json:"polled"`
	Instance  string      `json:"instance"`
	Replica   string      `json:"replica"`
	Claim     bool        `json:"claim"`
}

// SaveReports implements Shared. Many rows travel in one statement, since the
// writers of all replicas wait for it.
func (s *Postgres) SaveReports(ctx context.Context, states map[wire.NodeID]NodeState, claims map[wire.NodeID]bool) error {
	if len(states) == 0 {
		return nil
	}
	rows := make([]report, 0, len(states))
	for id, st := range states {
		e, err := encodeState(st)
		if err != nil {
			return fmt.Errorf("save state of node %d: %w", id, err)
		}
		disco, _ := e.disco.([]byte)
		rows = append(rows, report{id, disco, e.endpoints, e.home, e.hostinfo, e.cap, e.seen, flag(e.polled), e.instance, st.Replica, claims[id]})
	}
	for part := range slices.Chunk(rows, maxReports) {
		if err := s.saveReports(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// maxReports bounds how long one statement of SaveReports takes.
const maxReports = 1000

func (s *Postgres) saveReports(ctx context.Context, rows []report) error {
	text, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	return s.tx(ctx, "save node states", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `UPDATE nodes SET disco = decode(v.disco, 'base64'), endpoints = v.endpoints, home_derp = v.home, hostinfo = v.hostinfo,
				cap = v.cap, last_seen = v.seen, polled = v.polled, instance = v.instance,
				replica = v.replica, state_by = $2, state_seq = nextval('changes_seq_seq')
			FROM jsonb_to_recordset($1::jsonb) AS v (id bigint, disco text, endpoints text, home bigint, hostinfo text, cap bigint, seen bigint,
				polled bigint, instance text, replica text, claim boolean)
			WHERE nodes.id = v.id AND (v.claim OR nodes.replica IN ('', $2))`, string(text), s.replica)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `SELECT pg_notify('mesh_' || current_schema(), '')`)
		return err
	})
}
