package main

import (
	"context"
	"flag"
	"strings"
	"time"

	"mesh/control/admin"
)

var nodePending = &command{
	name: "node pending", short: "list machines that ask to be let in",
	long: `
A machine that registers without an auth key gets the URL of a page that shows its
code. What it says about itself (name, system, tags) is not proven. It waits for
an hour; mesh node approve lets it in, mesh node reject turns it away.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			logins, err := s.Logins(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(logins)
			}
			now := time.Now()
			t := newTable(c.stdout, "CODE", "NAME", "SYSTEM", "ASKS FOR", "RENEWS", "FROM", "ASKED", "EXPIRES")
			for _, l := range logins {
				t.row(l.Code, l.Hostname, l.OS, strings.Join(l.Tags, " "), l.Renews, l.From, ago(l.Asked, now), ago(l.Expires, now))
			}
			t.flush()
			return nil
		})
	},
}

// loginCode is the code in what was pasted: itself, or the URL of its page.
func loginCode(arg string) string { return arg[strings.LastIndexByte(arg, '/')+1:] }

var nodeApprove = &command{
	name: "node approve", args: "CODE", min: 1, max: 1,
	short: "let a machine in that asks with a login URL",
	long: `
CODE is what the page at the login URL and mesh node pending show; the URL does
as well. The machine becomes a node of the user, with the tags that it asks
for if the policy's tagOwners let the user give them; or, with --tag, a node of
these tags. A node whose key had expired is the same node again if its owner is.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var who admin.NodeOwner
		fs.StringVar(&who.User, "user", "", "`NAME` of the user whom it belongs to")
		tagFlag(fs, &who.Tags, "`TAG` for it, \"tag:db\"; may be repeated")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if (who.User == "") == (len(who.Tags) == 0) {
				return usageError{"a node belongs to a user or carries tags: give --user or --tag, and not both"}
			}
			n, err := s.ApproveLogin(ctx, loginCode(c.args[0]), who)
			if err != nil {
				return err
			}
			address := ""
			if len(n.Addresses) > 0 {
				address = n.Addresses[0].String()
			}
			c.printf("node %s (%s) is in, owner %s\n", n.Name, address, owner(n.User, n.Tags))
			return nil
		})
	},
}

var nodeReject = &command{
	name: "node reject", args: "CODE", min: 1, max: 1,
	short: "turn a machine away that asks with a login URL",
	long:  `CODE is what mesh node pending shows, or the login URL.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if err := s.RejectLogin(ctx, loginCode(c.args[0])); err != nil {
				return err
			}
			c.printf("rejected\n")
			return nil
		})
	},
}
