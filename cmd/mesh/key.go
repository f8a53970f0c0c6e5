package main

import (
	"context"
	"flag"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/wire"
)

var keyCreate = &command{
	name:  "key create",
	short: "create a key that enrols nodes (or relays) and print it",
	long: `
A key belongs to a user (--user) or carries tags (--tag), which nodes that enrol
with it get; one of the two is needed. Tags must be in the policy's tagOwners.
Without --reusable a key is good for one node. The key is printed alone, this
once: the server keeps no copy. Give it to an agent as MESH_AUTHKEY.

With --relay the key admits relay processes (see mesh help relay); it is
reusable and does not expire unless --expires says so.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var k admin.KeyCreate
		fs.BoolVar(&k.Reusable, "reusable", false, "good for many nodes")
		fs.BoolVar(&k.Ephemeral, "ephemeral", false, "nodes are forgotten soon after they leave")
		fs.BoolVar(&k.Relay, "relay", false, "for relays instead of nodes")
		fs.StringVar(&k.User, "user", "", "`NAME` of the user whom nodes belong to")
		tagFlag(fs, &k.Tags, "`TAG` for nodes, \"tag:db\"; may be repeated")
		fs.Func("expires", "how `LONG` the key is good for: \"24h\", \"30d\" (default 90d)", func(s string) (err error) {
			k.Expires, err = wire.ParseSpan(s)
			return err
		})
		nodeExpiryFlag(fs, &k.NodeExpiry, "how `LONG` its nodes' keys live: \"30d\" or \"never\"")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			switch {
			case k.Relay && (k.User != "" || len(k.Tags) > 0 || k.Ephemeral || k.NodeExpiry != 0):
				return usageError{"a relay key has no user or tags, is not ephemeral and enrols no nodes"}
			case !k.Relay && (k.User == "") == (len(k.Tags) == 0):
				return usageError{"a key belongs to a user or carries tags: give --user or --tag, and not both"}
			}
			key, err := s.CreateKey(ctx, k)
			if err != nil {
				return err
			}
			c.printf("%s\n", key.Secret)
			return nil
		})
	},
}

// tagFlag binds a flag that takes a tag, or several with commas, and may be
// repeated.
func tagFlag(fs *flag.FlagSet, tags *[]string, usage string) {
	fs.Func("tag", usage, func(s string) error {
		list, err := parseTags(s)
		*tags = append(*tags, list...)
		return err
	})
}

// nodeExpiryFlag binds --node-expiry: negative is never, 0 is not given.
func nodeExpiryFlag(fs *flag.FlagSet, d *time.Duration, usage string) {
	fs.Func("node-expiry", usage, func(s string) (err error) {
		if s == "never" {
			*d = -1
			return nil
		}
		*d, err = wire.ParseSpan(s)
		return err
	})
}

var keyList = &command{
	name: "key list", short: "list keys, without their secrets",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			keys, err := s.Keys(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(keys)
			}
			now := time.Now()
			t := newTable(c.stdout, "ID", "FOR", "OWNER", "KIND", "STATE", "CREATED", "EXPIRES", "LAST USED", "NODE KEYS")
			for _, k := range keys {
				kind := "one use"
				if k.Reusable {
					kind = "reusable"
				}
				if k.Ephemeral {
					kind += ", ephemeral"
				}
				use := "nodes"
				if k.Kind == "relay" {
					use = "relays"
				}
				t.row(strconv.FormatInt(k.ID, 10), use, owner(k.User, k.Tags), kind, k.State, ago(k.Created, now), ago(k.Expires, now), ago(k.Used, now), nodeKeys(k))
			}
			t.flush()
			return nil
		})
	},
}

// nodeKeys tells how long the keys of a key's nodes live.
func nodeKeys(k admin.Key) string {
	switch {
	case k.Kind == "relay":
		return ""
	case k.NodeExpiry < 0:
		return "never expire"
	case k.NodeExpiry > 0:
		return "expire after " + span(k.NodeExpiry)
	}
	return "default"
}

var keyRevoke = &command{
	name: "key revoke", args: "ID", min: 1, max: 1,
	short: "make a key useless; nodes that enrolled with it stay",
	long: `
ID is the number that mesh key list shows. A relay that uses the key is cut off. Nodes
that enrolled with it stay, since who holds a key and who is a node are two things, until
their own keys expire, which they cannot put off any more;
--nodes removes them all as mesh node remove does, for a key that fell into wrong hands.
` + waitHelp,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		nodes := fs.Bool("nodes", false, "remove the nodes that enrolled with it, too")
		wait := waitFlags(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			id, err := strconv.ParseInt(c.args[0], 10, 64)
			if err != nil || id <= 0 {
				// Not the argument itself: it may be the secret.
				return usageError{"want the number of a key, which `mesh key list` shows"}
			}
			if !*nodes {
				if wait() > 0 {
					return usageError{"--wait is for --nodes: the key alone is revoked when the command returns"}
				}
				if _, err := s.RevokeKey(ctx, id); err != nil {
					return err
				}
				c.printf("key %d revoked\n", id)
				return nil
			}
			k, err := s.RevokeKeyAndNodes(ctx, id, wait())
			if err != nil {
				return err
			}
			c.printf("key %d revoked, and %s removed", id, count(len(k.Removed), "node"))
			if len(k.Removed) > 0 {
				c.printf(": %s", plain(strings.Join(k.Removed, " ")))
			}
			c.printf("\n")
			return c.applied(k.Applied)
		})
	},
}
