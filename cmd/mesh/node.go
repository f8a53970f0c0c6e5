package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"mesh/control/admin"
)

var nodeList = &command{
	name: "node list", short: "list nodes",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			nodes, err := s.Nodes(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(nodes)
			}
			now := time.Now()
			t := newTable(c.stdout, "NAME", "ADDRESS", "OWNER", "SEEN", "KEY EXPIRES", "CREATED")
			for _, n := range nodes {
				address := ""
				if len(n.Addresses) > 0 {
					address = n.Addresses[0].String()
				}
				t.row(n.Name, address, owner(n.User, n.Tags), seen(n, now), ago(n.Expires, now), ago(n.Created, now))
			}
			t.flush()
			st, err := s.Status(ctx)
			if err == nil && st.Pending > 0 {
				c.printf("\n%d more to be let in: see mesh node pending\n", st.Pending)
			}
			return err
		})
	},
}

// seen tells whether a node is there, and since when it is not.
func seen(n admin.Node, now time.Time) string {
	s := "offline, seen " + ago(n.LastSeen, now)
	switch {
	case n.Online:
		s = "online"
	case n.LastSeen.IsZero():
		s = "never"
	}
	if n.Expired {
		s += ", key expired"
	}
	return s
}

var nodeShow = &command{
	name: "node show", args: "NAME", min: 1, max: 1,
	short: "show all about a node",
	long:  nodeNames,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			n, err := s.Node(ctx, c.args[0])
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(n)
			}
			now := time.Now()
			relay := "none"
			if n.HomeRelay != 0 {
				relay = fmt.Sprintf("region %d", n.HomeRelay)
			}
			expires := ago(n.Expires, now)
			if n.Expired {
				expires = "expired " + expires
			}
			name := n.FullName
			if n.Named {
				name += ", given by an administrator (host: " + n.Hostname + ")"
			}
			writeFields(c, [][2]string{
				{"name", name},
				{"id", string(n.StableID)},
				{"owner", owner(n.User, n.Tags)},
				{"addresses", list(n.Addresses)},
				{"key", n.NodeKey.String()},
				{"seen", seen(n, now)},
				{"created", ago(n.Created, now)},
				{"key expires", expires},
				{"ephemeral", yesNo(n.Ephemeral)},
				{"system", n.OS},
				{"home relay", relay},
				{"endpoints", list(n.Endpoints)},
				{"may see", strings.Join(n.Peers, " ")},
			})
			return nil
		})
	},
}

// writeFields prints names and values, aligned.
func writeFields(c *call, fields [][2]string) {
	t := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	for _, f := range fields {
		fmt.Fprintf(t, "%s\t%s\n", f[0], plain(f[1]))
	}
	t.Flush()
}

var nodeRemove = &command{
	name: "node remove", args: "NAME", min: 1, max: 1,
	short: "revoke a node: it is cut off at once",
	long: `
` + nodeNames + ` All connections of the node
end; it cannot come back without another key.
` + waitHelp,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		wait := waitFlags(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			removed, err := s.RemoveNodeAndWait(ctx, c.args[0], wait())
			if err != nil {
				return err
			}
			c.printf("node %s removed\n", c.args[0])
			return c.applied(removed.Applied)
		})
	},
}
