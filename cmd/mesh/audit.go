package main

import (
	"context"
	"errors"
	"flag"
	"time"

	"mesh/control/admin"
)

func isNotFound(err error) bool { return errors.Is(err, admin.ErrNotFound) }

var auditCommand = &command{
	name: "audit", short: "list who changed what, oldest first",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		since := fs.Duration("since", 0, "only what happened within this `TIME`, such as 1h")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if *since < 0 {
				return usageError{"--since: want a time such as 1h"}
			}
			now := time.Now()
			var from time.Time
			if *since > 0 {
				from = now.Add(-*since)
			}
			var all []admin.AuditEntry
			for {
				list, err := s.Audit(ctx, from)
				if err != nil {
					return err
				}
				// The answer is bounded; those of the same moment come again.
				fresh := list
				for len(all) > 0 && len(fresh) > 0 && fresh[0].ID <= all[len(all)-1].ID {
					fresh = fresh[1:]
				}
				all = append(all, fresh...)
				if len(fresh) == 0 || len(list) < admin.MaxAudit {
					break
				}
				from = all[len(all)-1].At
			}
			if *asJSON {
				if all == nil {
					all = []admin.AuditEntry{}
				}
				return c.writeJSON(all)
			}
			t := newTable(c.stdout, "TIME", "WHO", "DID", "TO", "DETAIL")
			for _, e := range all {
				t.row(e.At.Local().Format(time.RFC3339), e.Actor, e.Action, e.Object, e.Detail)
			}
			t.flush()
			return nil
		})
	},
}
