package loadtest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mesh/internal/pgserver"
)

// Replicas are servers over one database, each in a process of its own.
type Replicas struct {
	All []*Process

	dir      string           // of the database
	database *pgserver.Server // nil = a single server has a file
	ended    Usage            // of those that were killed
}

// startPatience is how long PostgreSQL may take to start.
const startPatience = 2 * time.Minute

// StartReplicas starts n servers: one over a file, several over a PostgreSQL
// server that is started for them. See Start.
func StartReplicas(ctx context.Context, n int) (_ *Replicas, err error) {
	r := new(Replicas)
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	url := ""
	if n > 1 {
		bin, err := pgserver.Find()
		if err != nil {
			return nil, err
		}
		if r.dir, err = os.MkdirTemp("", "load"); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, startPatience)
		defer cancel()
		if r.database, err = pgserver.Start(ctx, bin, filepath.Join(r.dir, "pg")); err != nil {
			return nil, err
		}
		url = r.database.URL("postgres")
	}
	for i := range n {
		p, err := Start(url)
		if err != nil {
			return nil, fmt.Errorf("replica %d: %w", i, err)
		}
		r.All = append(r.All, p)
	}
	return r, nil
}

// Config is what New needs to put the replicas under load.
func (r *Replicas) Config() Config {
	var urls []string
	for _, p := range r.All {
		urls = append(urls, p.URL)
	}
	last := r.Last()
	return Config{URL: strings.Join(urls, ","), Key: last.Key, Admin: last.Admin, Usage: r.Usage}
}

// Last returns the replica that no phase kills.
func (r *Replicas) Last() *Process { return r.All[len(r.All)-1] }

// Usage measures the replicas, all in all; of those that were killed, the time
// until then.
func (r *Replicas) Usage() (Usage, error) {
	sum := r.ended
	for _, p := range r.All {
		if p.killed {
			continue
		}
		u, err := p.Usage()
		if err != nil {
			return sum, err
		}
		sum.CPU += u.CPU
		sum.RSS += u.RSS
		sum.Peak += u.Peak
	}
	return sum, nil
}

// kill ends a replica without a word to it.
func (r *Replicas) kill(i int) error {
	u, err := r.All[i].Usage()
	r.ended.CPU += u.CPU
	return errors.Join(err, r.All[i].Kill())
}

// Close ends all replicas and their database.
func (r *Replicas) Close() error {
	var errs []error
	for _, p := range r.All {
		errs = append(errs, p.Close())
	}
	if r.database != nil {
		r.database.Stop()
	}
	if r.dir != "" {
		errs = append(errs, os.RemoveAll(r.dir))
	}
	return errors.Join(errs...)
}

// addr returns the replica that the node uses.
func (n *node) addr() string { return n.mesh.addrs[n.place.Load()] }

// dialAny opens a connection to the replica that the node used last, or to the
// next that answers.
func (n *node) dialAny(ctx context.Context) (conn *http.ClientConn, err error) {
	for range n.mesh.addrs {
		var busy errBusy
		if conn, err = n.dial(ctx); err == nil || ctx.Err() != nil || errors.As(err, &busy) {
			return conn, err
		}
		n.place.Store((n.place.Load() + 1) % int32(len(n.mesh.addrs)))
	}
	return nil, err
}
