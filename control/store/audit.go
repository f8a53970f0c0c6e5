package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// AuditEntry records one change. Entries form a chain: each holds the hash of
// the one before it, so that none can be edited, removed or moved without
// breaking the chain from there on.
type AuditEntry struct {
	ID     int64 // counts from 1 without gaps
	At     time.Time
	Actor  string // who did it
	Source string // where it came from: an address, "unix socket", "" = this process
	Action string // "node.register", "policy.set", …
	Object string // what it was done to
	Detail string // never a secret
	Before string // what a change replaced, "" = nothing or not told
	After  string // what it became
	Prev   AuditHash
	Hash   AuditHash // of all the rest, Prev included
}

// AuditHash is a hash in the chain of the audit record. Its text is
// hexadecimal; the zero value is what the first entry names as the one before.
type AuditHash [sha256.Size]byte

// String returns the hash in hexadecimal.
func (h AuditHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText returns what String does.
func (h AuditHash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (h *AuditHash) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) {
		return fmt.Errorf("hash of %d digits, want %d", len(text), 2*len(h))
	}
	if _, err := hex.Decode(h[:], text); err != nil {
		return fmt.Errorf("hash: %w", err)
	}
	return nil
}

// Sum is the hash that the entry must have.
func (e *AuditEntry) Sum() (sum AuditHash) {
	b := append([]byte("mesh audit 1\n"), e.Prev[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(e.ID))
	b = binary.BigEndian.AppendUint64(b, uint64(stamp(e.At)))
	for _, s := range []string{e.Actor, e.Source, e.Action, e.Object, e.Detail, e.Before, e.After} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	return sha256.Sum256(b)
}

// AuditHead names the newest entry. Who keeps it elsewhere can tell later
// whether the record up to it is still the same.
type AuditHead struct {
	ID   int64     `json:"id"` // 0 = the record is empty
	Hash AuditHash `json:"hash"`
}

// String returns "ID:HASH".
func (h AuditHead) String() string { return fmt.Sprintf("%d:%s", h.ID, h.Hash) }

type sourceKey struct{}

// WithSource returns a context whose changes are recorded as coming from source.
func WithSource(ctx context.Context, source string) context.Context {
	return context.WithValue(ctx, sourceKey{}, source)
}

// note writes an entry of the audit record.
func note(ctx context.Context, tx *sql.Tx, now time.Time, by, action, object, detail string) error {
	return record(ctx, tx, AuditEntry{At: now, Actor: by, Action: action, Object: object, Detail: detail})
}

// noteChange writes an entry about something that was one thing and is another.
func noteChange(ctx context.Context, tx *sql.Tx, now time.Time, by, action, object, before, after string) error {
	return record(ctx, tx, AuditEntry{At: now, Actor: by, Action: action, Object: object, Before: before, After: after})
}

// record appends e to the chain. The head is a row of its own, so that
// transactions which append wait for each other, whatever the database.
func record(ctx context.Context, tx *sql.Tx, e AuditEntry) error {
	e.Source, _ = ctx.Value(sourceKey{}).(string)
	var prev []byte
	if err := tx.QueryRowContext(ctx, `SELECT last, hash FROM audit_head WHERE id = 1`).Scan(&e.ID, &prev); err != nil {
		return fmt.Errorf("head of the audit record: %w", err)
	}
	if len(prev) != len(e.Prev) {
		return fmt.Errorf("head of the audit record: %w", ErrCorrupt)
	}
	copy(e.Prev[:], prev)
	e.ID++
	e.At = unstamp(stamp(e.At))
	e.Hash = e.Sum()
	_, err := tx.ExecContext(ctx, `INSERT INTO audit (id, at, actor, source, action, object, detail, before, after, prev, hash) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11)`,
		e.ID, stamp(e.At), e.Actor, e.Source, e.Action, e.Object, e.Detail, e.Before, e.After, e.Prev[:], e.Hash[:])
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `UPDATE audit_head SET last = $1, hash = $2 WHERE id = 1`, e.ID, e.Hash[:])
	return err
}

const auditColumns = `id, at, actor, source, action, object, detail, before, after, prev, hash`

func scanAudit(r *sql.Rows) (e AuditEntry, err error) {
	var at int64
	var prev, hash []byte
	if err := r.Scan(&e.ID, &at, &e.Actor, &e.Source, &e.Action, &e.Object, &e.Detail, &e.Before, &e.After, &prev, &hash); err != nil {
		return e, err
	}
	e.At = unstamp(at)
	// What is too short or long cannot verify, which is for AuditCheck to say.
	copy(e.Prev[:], prev)
	copy(e.Hash[:], hash)
	return e, nil
}

// chainAudit puts the entries that there are into the chain.
func chainAudit(ctx context.Context, tx *sql.Tx) error {
	rows, err := tx.QueryContext(ctx, `SELECT `+auditColumns+` FROM audit ORDER BY id`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var all []AuditEntry
	var head AuditHead
	for rows.Next() {
		e, err := scanAudit(rows)
		if err != nil {
			return err
		}
		e.Prev = head.Hash
		e.Hash = e.Sum()
		head = AuditHead{e.ID, e.Hash}
		all = append(all, e)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, e := range all {
		if _, err := tx.ExecContext(ctx, `UPDATE audit SET prev = $1, hash = $2 WHERE id = $3`, e.Prev[:], e.Hash[:], e.ID); err != nil {
			return err
		}
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO audit_head (id, last, hash) VALUES (1, $1, $2)`, head.ID, head.Hash[:])
	return err
}

// Note implements Store.
func (s *database) Note(ctx context.Context, by, action, object, detail string, now time.Time) error {
	return s.tx(ctx, "record "+action, func(ctx context.Context, tx *sql.Tx) error { return note(ctx, tx, now, by, action, object, detail) })
}

// Audit implements Store.
func (s *database) Audit(ctx context.Context, since time.Time, after int64, limit int) ([]AuditEntry, error) {
	return query(ctx, s, "read audit", `SELECT `+auditColumns+` FROM audit WHERE at >= $1 AND id > $2 ORDER BY id LIMIT $3`,
		scanAudit, stamp(since), after, limit)
}

// AuditHead implements Store.
func (s *database) AuditHead(ctx context.Context) (h AuditHead, err error) {
	var hash []byte
	err = s.read(ctx, "read the head of the audit record", func(ctx context.Context) error {
		return s.db.QueryRowContext(ctx, `SELECT last, hash FROM audit_head WHERE id = 1`).Scan(&h.ID, &hash)
	})
	copy(h.Hash[:], hash)
	return h, err
}

// AuditCheck verifies the chain of an audit record: Add every entry in order,
// then End. The zero value is ready for use.
type AuditCheck struct {
	Entries  int       // that were added
	Head     AuditHead // the last of them
	Problems []string  // what is wrong, in order, maxProblems at most
	Anchored bool      // an entry is the one that Anchor names
	Anchor   AuditHead // kept elsewhere, to be found in the record; zero = none
}

// maxProblems bounds AuditCheck.Problems: from the first on the record is not
// to be trusted.
const maxProblems = 20

// ErrAudit reports an audit record whose chain is broken.
var ErrAudit = errors.New("the audit record was tampered with")

func (c *AuditCheck) problem(format string, args ...any) {
	if len(c.Problems) < maxProblems {
		c.Problems = append(c.Problems, fmt.Sprintf(format, args...))
	}
}

// Add looks at the next entry.
func (c *AuditCheck) Add(e AuditEntry) {
	last := c.Head
	switch edited := e.Sum() != e.Hash; {
	case edited:
		c.problem("entry %d was edited: it does not fit its own hash", e.ID)
	case e.Prev == last.Hash:
	case e.ID > last.ID+2:
		c.problem("entries %d to %d were removed", last.ID+1, e.ID-1)
	case e.ID == last.ID+2:
		c.problem("entry %d was removed", last.ID+1)
	case e.ID <= last.ID:
		c.problem("entry %d stands after entry %d: the order was changed", e.ID, last.ID)
	case last.ID == 0:
		c.problem("entry %d does not begin the chain: it was rewritten", e.ID)
	default:
		c.problem("entry %d does not follow from entry %d: one of them was rewritten", e.ID, last.ID)
	}
	if c.Anchor.ID == e.ID && e.ID > 0 {
		if c.Anchored = c.Anchor.Hash == e.Hash; !c.Anchored {
			c.problem("entry %d is not the one that the anchor names: it or one before it was rewritten", e.ID)
		}
	}
	c.Entries++
	c.Head = AuditHead{e.ID, e.Hash}
}

// End compares the last entry with the head that the store keeps apart, and
// returns nil or an ErrAudit with all problems.
func (c *AuditCheck) End(head AuditHead) error {
	switch {
	case head.ID > c.Head.ID:
		c.problem("entries %d to %d, the newest, were removed", c.Head.ID+1, head.ID)
	case head != c.Head:
		c.problem("entry %d is not the head %s that the store keeps apart", c.Head.ID, head)
	}
	if c.Anchor.ID > c.Head.ID {
		c.problem("entry %d, which the anchor names, is not there: the newest entries were removed", c.Anchor.ID)
	}
	if len(c.Problems) == 0 {
		return nil
	}
	errs := []error{ErrAudit}
	for _, p := range c.Problems {
		errs = append(errs, errors.New(p))
	}
	return errors.Join(errs...)
}
