package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"mesh"
)

const (
	blobs       = 256
	blobSize    = 64 << 10
	connections = 8
	transfers   = 50
)

// connect opens a database connection over the mesh.
func connect(ctx context.Context, n *mesh.Node) (*pgx.Conn, error) {
	// The mesh encrypts and knows both ends: TLS and passwords add nothing.
	cfg, err := pgx.ParseConfig("host=database port=5432 user=agent dbname=postgres sslmode=disable")
	if err != nil {
		return nil, err
	}
	cfg.DialFunc = n.Dial
	// The name is one of the mesh: Dial resolves it, not the host's DNS.
	cfg.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	return pgx.ConnectConfig(ctx, cfg)
}

// use does with the server what programs do with servers.
func use(ctx context.Context, n *mesh.Node) error {
	start := time.Now()
	c, err := connect(ctx, n)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	say("connected", "to database:5432 in %.1f ms", millis(time.Since(start)))
	for _, step := range []func(context.Context, *mesh.Node, *pgx.Conn) error{rows, bulk, concurrent, cancelled} {
		if err := step(ctx, n, c); err != nil {
			return err
		}
	}
	return nil
}

// rows makes a table and asks it.
func rows(ctx context.Context, _ *mesh.Node, c *pgx.Conn) error {
	start := time.Now()
	if _, err := c.Exec(ctx, "create table jobs (id int primary key, name text not null)"); err != nil {
		return err
	}
	batch := &pgx.Batch{}
	for i, name := range []string{"plan", "draw", "review"} {
		batch.Queue("insert into jobs values ($1, $2)", i+1, name)
	}
	if err := c.SendBatch(ctx, batch).Close(); err != nil {
		return err
	}
	var names string
	if err := c.QueryRow(ctx, "select string_agg(name, ' ' order by id) from jobs where id > $1", 1).Scan(&names); err != nil {
		return err
	}
	if names != "draw review" {
		return fmt.Errorf("query answered %q", names)
	}
	var refused *pgconn.PgError
	if _, err := c.Exec(ctx, "insert into jobs values (1, 'again')"); !errors.As(err, &refused) || refused.Code != "23505" {
		return fmt.Errorf("a duplicate was not refused: %w", err)
	}
	say("queried", "table made, rows inserted, read back, duplicate refused: %.1f ms", millis(time.Since(start)))
	return nil
}

// bulk moves random data in by COPY and out by a large result, and compares
// checksums of both ends.
func bulk(ctx context.Context, _ *mesh.Node, c *pgx.Conn) error {
	if _, err := c.Exec(ctx, "create table blobs (id int primary key, data bytea not null)"); err != nil {
		return err
	}
	sum, n := sha256.New(), 0
	start := time.Now()
	copied, err := c.CopyFrom(ctx, pgx.Identifier{"blobs"}, []string{"id", "data"}, pgx.CopyFromFunc(func() ([]any, error) {
		if n == blobs {
			return nil, nil
		}
		n++
		data := make([]byte, blobSize)
		rand.Read(data)
		sum.Write(data)
		return []any{n, data}, nil
	}))
	if err != nil {
		return err
	}
	in := time.Since(start)
	want := hex.EncodeToString(sum.Sum(nil))
	var there string
	if err := c.QueryRow(ctx, "select encode(sha256(string_agg(data, ''::bytea order by id)), 'hex') from blobs").Scan(&there); err != nil {
		return err
	}
	start = time.Now()
	back := sha256.New()
	result, err := c.Query(ctx, "select data from blobs order by id")
	if err != nil {
		return err
	}
	var data []byte
	if _, err := pgx.ForEachRow(result, []any{&data}, func() error { back.Write(data); return nil }); err != nil {
		return err
	}
	out := time.Since(start)
	if got := hex.EncodeToString(back.Sum(nil)); copied != blobs || there != want || got != want {
		return fmt.Errorf("checksums differ: sent %s, server has %s, read back %s", want, there, got)
	}
	mib := float64(blobs*blobSize) / (1 << 20)
	say("copied", "%.0f MiB in at %.0f MiB/s, out at %.0f MiB/s, sha256 %s… at both ends", mib, mib/in.Seconds(), mib/out.Seconds(), want[:16])
	return nil
}

// concurrent moves money between accounts on many connections at once.
func concurrent(ctx context.Context, n *mesh.Node, c *pgx.Conn) error {
	if _, err := c.Exec(ctx, "create table accounts (id int primary key, balance int not null)"); err != nil {
		return err
	}
	if _, err := c.Exec(ctx, "insert into accounts select i, 1000 from generate_series(0, $1::int - 1) i", connections); err != nil {
		return err
	}
	start := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	for i := range connections {
		g.Go(func() error {
			c, err := connect(gctx, n)
			if err != nil {
				return err
			}
			defer c.Close(ctx)
			for range transfers {
				// One statement locks both rows in a fixed order: no deadlock.
				_, err := c.Exec(gctx, `
					with pair as (select id from accounts where id in ($1, $2) order by id for update)
					update accounts set balance = balance + case when accounts.id = $1 then -1 else 1 end
					from pair where accounts.id = pair.id`, i, (i+1)%connections)
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	took := time.Since(start)
	var total, same int
	if err := c.QueryRow(ctx, "select sum(balance), count(*) filter (where balance = 1000) from accounts").Scan(&total, &same); err != nil {
		return err
	}
	if total != connections*1000 || same != connections {
		return fmt.Errorf("accounts do not add up: %d in all, %d as before", total, same)
	}
	say("parallel", "%d connections, %d transactions each: %.1f ms, nothing lost", connections, transfers, millis(took))
	return nil
}

// cancelled ends a query that takes too long. The client library opens another
// connection for that, to the address that this one has.
func cancelled(ctx context.Context, n *mesh.Node, _ *pgx.Conn) error {
	c, err := connect(ctx, n)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	slow := make(chan error, 1)
	go func() {
		_, err := c.PgConn().Exec(ctx, "select pg_sleep(60)").ReadAll()
		slow <- err
	}()
	start := time.Now()
	// A cancel request that comes before the query is for nothing: go on until
	// the query has ended.
	for {
		if err := c.PgConn().CancelRequest(ctx); err != nil {
			return fmt.Errorf("cancel: %w", err)
		}
		select {
		case err := <-slow:
			var ended *pgconn.PgError
			if !errors.As(err, &ended) || ended.Code != "57014" {
				return fmt.Errorf("the slow query ended otherwise: %w", err)
			}
			say("cancelled", "a slow query, by a connection beside it: %.1f ms", millis(time.Since(start)))
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}
