package main

import (
	"context"
	"flag"
	"strconv"
	"time"

	"mesh/control/admin"
)

var userCreate = &command{
	name: "user create", args: "NAME", min: 1, max: 1,
	short: "add a user; the first one is owner",
	long:  `NAME is an e-mail address or a plain login name.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			u, err := s.CreateUser(ctx, c.args[0])
			if err != nil {
				return err
			}
			c.printf("user %s created, %s\n", u.Name, u.Role)
			return nil
		})
	},
}

var userList = &command{
	name: "user list", short: "list users",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			users, err := s.Users(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(users)
			}
			now := time.Now()
			t := newTable(c.stdout, "NAME", "ROLE", "STATE", "NODES", "CREATED")
			for _, u := range users {
				state := "active"
				if !u.Suspended.IsZero() {
					state = "suspended " + ago(u.Suspended, now)
				}
				t.row(u.Name, u.Role, state, strconv.Itoa(u.Nodes), ago(u.Created, now))
			}
			t.flush()
			return nil
		})
	},
}

var userSuspend = &command{
	name: "user suspend", args: "NAME", min: 1, max: 1,
	short: "cut off all nodes of a user, until mesh user resume",
	long: `
All connections of the user's nodes end at once; peers, relays and this server refuse
the nodes, and nothing enrols with the user's keys. Nodes with tags belong to no user
and go on.
` + waitHelp,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		wait := waitFlags(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			u, err := s.SuspendUser(ctx, c.args[0], wait())
			if err != nil {
				return err
			}
			c.printf("user %s suspended, with %s\n", u.Name, count(u.Nodes, "node"))
			return c.applied(u.Applied)
		})
	},
}

var userResume = &command{
	name: "user resume", args: "NAME", min: 1, max: 1,
	short: "let the nodes of a suspended user in again, as they were",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			u, err := s.ResumeUser(ctx, c.args[0])
			if err != nil {
				return err
			}
			c.printf("user %s is active, with %s\n", u.Name, count(u.Nodes, "node"))
			return nil
		})
	},
}

var userRemove = &command{
	name: "user remove", args: "NAME", min: 1, max: 1,
	short: "remove a user who has no nodes, and the user's keys",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if err := s.RemoveUser(ctx, c.args[0]); err != nil {
				return err
			}
			c.printf("user %s removed\n", c.args[0])
			return nil
		})
	},
}
