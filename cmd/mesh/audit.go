package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
)

func isNotFound(err error) bool { return errors.Is(err, admin.ErrNotFound) }

var auditCommand = &command{
	name: "audit", short: "list who changed what, from where, oldest first",
	long: `
Every change that an administrator, a node or the server itself made to the mesh. The
entries form a chain of hashes; mesh audit verify tells whether it is whole.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		since := fs.Duration("since", 0, "only what happened within this `TIME`, such as 1h")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if *since < 0 {
				return usageError{"--since: want a time such as 1h"}
			}
			var from time.Time
			if *since > 0 {
				from = time.Now().Add(-*since)
			}
			all := []admin.AuditEntry{}
			if err := eachEntry(ctx, s, from, func(e admin.AuditEntry) error {
				all = append(all, e)
				return nil
			}); err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(all)
			}
			t := newTable(c.stdout, "NR", "TIME", "WHO", "FROM", "DID", "TO", "DETAIL")
			for _, e := range all {
				t.row(strconv.FormatInt(e.ID, 10), e.At.Local().Format(time.RFC3339), e.Actor, e.Source, e.Action, e.Object, auditDetail(e))
			}
			t.flush()
			return nil
		})
	},
}

// auditDetail tells what an entry changed.
func auditDetail(e admin.AuditEntry) string {
	// Names of policies' texts are for programs.
	brief := func(s string) string {
		if strings.HasPrefix(s, "sha256:") {
			return s[:min(len(s), 15)] + "…"
		}
		return s
	}
	before, after := brief(e.Before), brief(e.After)
	var words []string
	switch {
	case before != "" && after != "":
		words = append(words, before+" → "+after)
	case before != "":
		words = append(words, "was "+before)
	case after != "":
		words = append(words, after)
	}
	if e.Detail != "" {
		words = append(words, e.Detail)
	}
	return strings.Join(words, "; ")
}

// eachEntry hands the entries since a time to do, oldest first. The server's
// answers are bounded.
func eachEntry(ctx context.Context, s *admin.Client, since time.Time, do func(admin.AuditEntry) error) error {
	var last int64
	for {
		list, err := s.Audit(ctx, since, last)
		if err != nil {
			return err
		}
		for _, e := range list {
			if err := do(e); err != nil {
				return err
			}
			last = e.ID
		}
		if len(list) < admin.MaxAudit {
			return nil
		}
	}
}

var auditVerify = &command{
	name: "audit verify", short: "tell whether the audit record was tampered with",
	long: `
Reads the whole record and recomputes its chain of hashes: an entry that was edited,
removed or moved is named, and the exit status is 1. The computing is done here, not
by the server.

Who can write to the database could compute a new chain. So keep the head, which is
printed at the end, where they cannot write; given as --anchor it shows later whether
the record up to it is still the same. With --file it verifies what mesh audit --json
printed.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var check store.AuditCheck
		fs.Func("anchor", "`HEAD` that was printed earlier, to be found in the record", func(s string) (err error) {
			check.Anchor, err = parseHead(s)
			return err
		})
		file := fs.String("file", "", "`FILE` with the output of mesh audit --json, instead of the server")
		server := withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			// The head first: what comes after it is not missed at the end.
			head, err := s.AuditHead(ctx)
			if err != nil {
				return err
			}
			var kept store.AuditHead
			if kept, err = parseHead(fmt.Sprintf("%d:%s", head.ID, head.Hash)); err != nil {
				return err
			}
			if err := eachEntry(ctx, s, time.Time{}, func(e admin.AuditEntry) error {
				if e.ID > kept.ID && check.Head == kept {
					return nil // written meanwhile
				}
				return addEntry(&check, e)
			}); err != nil {
				return err
			}
			return verified(c, &check, kept)
		})
		return func(ctx context.Context, c *call) error {
			if *file == "" {
				return server(ctx, c)
			}
			b, err := os.ReadFile(*file)
			if err != nil {
				return err
			}
			var all []admin.AuditEntry
			if err := json.Unmarshal(b, &all); err != nil {
				return fmt.Errorf("%s: want what `mesh audit --json` prints: %w", *file, err)
			}
			for _, e := range all {
				if err := addEntry(&check, e); err != nil {
					return err
				}
			}
			return verified(c, &check, check.Head)
		}
	},
}

// parseHead reads "ID:HASH".
func parseHead(s string) (h store.AuditHead, err error) {
	id, hash, ok := strings.Cut(s, ":")
	if h.ID, err = strconv.ParseInt(id, 10, 64); err != nil || !ok || h.Hash.UnmarshalText([]byte(hash)) != nil {
		return h, fmt.Errorf("want NUMBER:HASH, as `mesh audit verify` prints it")
	}
	return h, nil
}

func addEntry(check *store.AuditCheck, e admin.AuditEntry) error {
	out := store.AuditEntry{
		ID: e.ID, At: e.At, Actor: e.Actor, Source: e.Source, Action: e.Action, Object: e.Object, Detail: e.Detail, Before: e.Before, After: e.After,
	}
	if err := errors.Join(out.Prev.UnmarshalText([]byte(e.Prev)), out.Hash.UnmarshalText([]byte(e.Hash))); err != nil {
		return fmt.Errorf("entry %d: %w", e.ID, err)
	}
	check.Add(out)
	return nil
}

// verified tells what came out.
func verified(c *call, check *store.AuditCheck, head store.AuditHead) error {
	if err := check.End(head); err != nil {
		return linesError(append([]string{"mesh audit verify: " + store.ErrAudit.Error()}, check.Problems...))
	}
	c.printf("%d entries: none was edited, removed or moved\n", check.Entries)
	if check.Anchored {
		c.printf("anchor  %s is among them\n", check.Anchor)
	}
	c.printf("head    %s\n", check.Head)
	return nil
}
