package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
)

// maxGroup is how many changes are committed together at most.
const maxGroup = 128

// group joins changes that come at the same time into one transaction: what
// takes time is that the disk, or the network, confirms it. Each change is
// behind a savepoint, so that one that fails takes nothing else with it, and
// none is reported as done before all are confirmed.
type group struct {
	mu      sync.Mutex // guards the members below
	busy    bool       // somebody commits, and will look at waiting again
	waiting []*change
}

// change is one that waits for its commit.
type change struct {
	ctx  context.Context
	f    func(context.Context, *sql.Tx) error
	turn chan struct{} // closed when it is over, or is to lead the next group
	over bool
	err  error
}

// do runs f in a transaction, alone or with others; commit runs several.
func (g *group) do(ctx context.Context, f func(context.Context, *sql.Tx) error, commit func([]*change) error) error {
	c := &change{ctx: ctx, f: f, turn: make(chan struct{})}
	g.mu.Lock()
	g.waiting = append(g.waiting, c)
	if g.busy {
		g.mu.Unlock()
		<-c.turn
		if c.over {
			return c.err
		}
		g.mu.Lock()
	}
	g.busy = true
	// This one is the first of those that wait.
	n := min(len(g.waiting), maxGroup)
	lead := g.waiting[:n:n]
	g.waiting = append([]*change(nil), g.waiting[n:]...)
	g.mu.Unlock()

	g.run(lead, c, commit)
	return c.err
}

// errAborted is what the changes of a transaction get when one of them panics.
var errAborted = errors.New("another change of the same transaction panicked")

// run commits changes, own among them, tells the others how that went, and gives
// the turn to those that wait: also if it panics.
func (g *group) run(lead []*change, own *change, commit func([]*change) error) {
	err := errAborted
	defer func() {
		for _, x := range lead {
			if x.err == nil {
				x.err = err
			}
			if x.over = true; x != own {
				close(x.turn)
			}
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.busy = len(g.waiting) > 0; g.busy {
			close(g.waiting[0].turn)
		}
	}()
	err = commit(lead)
}

// commit runs changes in one transaction. What it returns concerns all of them;
// what concerns one is in its err.
func (s *database) commit(changes []*change) error {
	// The transaction belongs to several callers: none of them ends it.
	ctx, cancel := s.limited(context.WithoutCancel(changes[0].ctx))
	defer cancel()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if s.dialect.begin != nil {
		if err := s.dialect.begin(ctx, tx); err != nil {
			return err
		}
	}
	if len(changes) == 1 {
		if err := changes[0].run(tx); err != nil {
			return err
		}
		return s.end(tx)
	}
	for _, c := range changes {
		if _, err := tx.ExecContext(ctx, `SAVEPOINT one`); err != nil {
			return err
		}
		if c.err = c.run(tx); c.err != nil {
			if _, err := tx.ExecContext(ctx, `ROLLBACK TO SAVEPOINT one`); err != nil {
				// Why that one failed is no reason that others may take for theirs.
				return fmt.Errorf("%w, after: %v", err, c.err)
			}
		}
		if _, err := tx.ExecContext(ctx, `RELEASE SAVEPOINT one`); err != nil {
			return err
		}
	}
	return s.end(tx)
}

// end commits. An error does not say that nothing was committed: the answer may
// have been lost.
func (s *database) end(tx *sql.Tx) error {
	err := tx.Commit()
	if s.dialect.ended != nil {
		s.dialect.ended(err)
	}
	return err
}

func (c *change) run(tx *sql.Tx) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	return c.f(context.WithoutCancel(c.ctx), tx)
}
