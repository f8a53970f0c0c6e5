package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/wire"
)

const nodeNames = `NAME is a name, full name, stable ID or mesh address.`

var nodeRename = &command{
	name: "node rename", args: "NAME [NEW]", min: 1, max: 2,
	short: "give a node another name, or the one of its host back",
	long: `
` + nodeNames + ` NEW is a DNS label. The node and
its peers hear of it at once. A node that was renamed keeps that name whatever its
host is called; --reset gives it the name that its host asks for, and lets it
follow the host again.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		reset := fs.Bool("reset", false, "back to the name that the node's host asks for")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if *reset == (len(c.args) == 2) {
				return usageError{"give the new name, or --reset"}
			}
			to := ""
			if len(c.args) == 2 {
				if to = c.args[1]; to == "" {
					return usageError{"the new name is empty"}
				}
			}
			n, err := s.RenameNode(ctx, c.args[0], to)
			if err != nil {
				return err
			}
			c.printf("node %s is %s now\n", c.args[0], n.FullName)
			return nil
		})
	},
}

var nodeTag = &command{
	name: "node tag", args: "NAME [TAG…]", min: 1, max: 64,
	short: "give a node to tags instead of a user, or to a user",
	long: `
` + nodeNames + ` It gets exactly the given tags,
which must be in the policy's tagOwners, and belongs to no user any more; its key
does not expire then. --user gives it to a user, without tags, and its key
expires again. What it may reach, and who may reach it, changes at once.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		user := fs.String("user", "", "`NAME` of the user to give it to")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			var tags []string
			for _, arg := range c.args[1:] {
				list, err := parseTags(arg)
				if err != nil {
					return usageError{err.Error()}
				}
				tags = append(tags, list...)
			}
			if (*user == "") == (len(tags) == 0) {
				return usageError{"give tags, or --user, and not both"}
			}
			n, err := s.SetNodeOwner(ctx, c.args[0], admin.NodeOwner{User: *user, Tags: tags})
			if err != nil {
				return err
			}
			c.printf("node %s belongs to %s now\n", n.Name, owner(n.User, n.Tags))
			return nil
		})
	},
}

// parseTags reads "tag:a" or "tag:a,tag:b".
func parseTags(s string) ([]string, error) {
	tags := strings.Split(s, ",")
	for _, tag := range tags {
		if !strings.HasPrefix(tag, "tag:") || tag == "tag:" {
			return nil, fmt.Errorf("tag %q: want \"tag:NAME\"", tag)
		}
	}
	return tags, nil
}

var nodeExpire = &command{
	name: "node expire", args: "NAME", min: 1, max: 1,
	short: "make the key of a node expire, now or later",
	long: `
` + nodeNames + ` Without a flag the key expires now:
the node is cut off until it logs in again, with an auth key or by a login that is
approved; it is the same node then. --never also brings back a node whose key
has expired.
` + waitHelp,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var when admin.NodeExpire
		given := 0
		wait := waitFlags(fs)
		fs.Func("at", "at a `TIME` like 2027-01-31 or 2027-01-31T18:00:00Z", func(s string) (err error) {
			given++
			when.At, err = parseTime(s)
			return err
		})
		fs.Func("in", "after so `LONG`: \"24h\", \"30d\"", func(s string) (err error) {
			given++
			when.In, err = wire.ParseSpan(s)
			return err
		})
		fs.BoolFunc("never", "not at all", func(s string) error {
			if s != "true" {
				return fmt.Errorf("takes no value")
			}
			given++
			when.Never = true
			return nil
		})
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if given > 1 {
				return usageError{"give one of --at, --in and --never"}
			}
			n, err := s.ExpireNodeAndWait(ctx, c.args[0], when, wait())
			if err != nil {
				return err
			}
			if n.Expired {
				c.printf("the key of node %s has expired\n", n.Name)
			} else {
				c.printf("the key of node %s expires %s\n", n.Name, ago(n.Expires, time.Now()))
			}
			return c.applied(n.Applied)
		})
	},
}

// parseTime reads a day in local time, or a moment.
func parseTime(s string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	t, err := time.ParseInLocation("2006-01-02", s, time.Local)
	if err != nil {
		return t, fmt.Errorf("want a time like 2027-01-31 or 2027-01-31T18:00:00Z")
	}
	return t, nil
}
