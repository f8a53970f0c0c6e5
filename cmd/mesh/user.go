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
			t := newTable(c.stdout, "NAME", "ROLE", "NODES", "CREATED")
			for _, u := range users {
				t.row(u.Name, u.Role, strconv.Itoa(u.Nodes), ago(u.Created, now))
			}
			t.flush()
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
