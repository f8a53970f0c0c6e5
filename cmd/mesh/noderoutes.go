package main

import (
	"context"
	"flag"
	"net/netip"
	"slices"

	"mesh/control/admin"
)

var nodeRoutes = &command{
	name: "node routes", args: "NAME", min: 1, max: 1,
	short: "list, approve or withdraw the networks behind a node",
	long: `
` + nodeNames + ` A route counts when the node
advertises it and the policy's autoApprovers, or --approve, approve exactly it. What
--approve gave, --withdraw takes back. Of several routers of one network one is in
charge, before those that are offline.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var approve, withdraw texts
		fs.Var(&approve, "approve", "`NETWORK`, such as 10.0.0.0/8; may be given several times")
		fs.Var(&withdraw, "withdraw", "`NETWORK` that was approved; may be given several times")
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			more, err := parseNetworks("--approve", approve)
			if err != nil {
				return err
			}
			less, err := parseNetworks("--withdraw", withdraw)
			if err != nil {
				return err
			}
			n, err := s.Node(ctx, c.args[0])
			if err != nil {
				return err
			}
			if len(more)+len(less) > 0 {
				var approved []netip.Prefix
				for _, r := range n.Routes {
					if r.Approved == "administrator" && !slices.Contains(less, r.Prefix) {
						approved = append(approved, r.Prefix)
					}
				}
				for _, r := range more {
					if !slices.Contains(approved, r) {
						approved = append(approved, r)
					}
				}
				if _, err := s.ApproveRoutes(ctx, string(n.StableID), approved); err != nil {
					return err
				}
				if n, err = s.Node(ctx, string(n.StableID)); err != nil {
					return err
				}
			}
			if *asJSON {
				if n.Routes == nil {
					n.Routes = []admin.NodeRoute{}
				}
				return c.writeJSON(n.Routes)
			}
			t := newTable(c.stdout, "NETWORK", "ADVERTISED", "APPROVED BY", "IN CHARGE")
			for _, r := range n.Routes {
				t.row(r.Prefix.String(), yesNo(r.Advertised), r.Approved, yesNo(r.Primary))
			}
			t.flush()
			return nil
		})
	},
}

func parseNetworks(flag string, list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() {
			return nil, usageError{flag + " " + s + ": want a network such as 10.0.0.0/8"}
		}
		out = append(out, p)
	}
	return out, nil
}
