package main

import (
	"context"
	"encoding/json"
	"flag"
	"net/netip"
	"slices"

	"mesh/control/policy"
	"mesh/control/wire"
)

// compiledNode is what a policy means for a node.
type compiledNode struct {
	Filter     []wire.FilterRule            `json:"filter"`
	Peers      map[string]compiledPeer      `json:"peers"`
	SelfCapMap map[string][]json.RawMessage `json:"self_capmap,omitempty"`
}

// compiledPeer is what the node is told about another.
type compiledPeer struct {
	AllowedIPs    []netip.Prefix `json:"allowed_ips"`
	PrimaryRoutes []netip.Prefix `json:"primary_routes,omitempty"`
}

var policyCompile = &command{
	name: "policy compile", args: "POLICY", min: 1, max: 1,
	short: "print what a policy means for each node; needs no server",
	long: `
POLICY is HuJSON; "-" is standard input. The topology is JSON:
  {"users": [{"id", "name", "email", "role"}],
   "nodes": {NAME: {"user", "tags", "ipv4", "ipv6", "routable_ips", "approved_routes"}}}
Printed is, for each node, its packet filter in the form of the wire, what it is told
about its peers, and the attributes that the policy gives it:
  {NAME: {"filter": […], "peers": {NAME: {"allowed_ips", "primary_routes"}},
          "self_capmap": {…}}}
A policy that is not valid, or whose own tests fail, is refused.
` + "`mesh policy topology`" + ` prints the topology of a running server.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		file := fs.String("topology", "", "`FILE` with users and nodes; required")
		return func(_ context.Context, c *call) error {
			if *file == "" {
				return usageError{"give --topology"}
			}
			if *file == "-" && c.args[0] == "-" {
				return usageError{"policy and topology cannot both be standard input"}
			}
			t, err := readTopology(c, *file)
			if err != nil {
				return err
			}
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			p, err := t.valid(c.args[0], text)
			if err != nil {
				return err
			}
			return c.writeJSON(t.compile(p))
		}
	},
}

// compile applies a policy to all nodes.
func (t *topology) compile(p *policy.Policy) map[string]compiledNode {
	compiled := policy.Compile(p, t.nodes)
	byID := make(map[wire.NodeID]policy.Node, len(t.nodes))
	for _, n := range t.nodes {
		byID[n.ID] = n
	}
	out := make(map[string]compiledNode, len(t.nodes))
	for _, n := range t.nodes {
		r := compiledNode{Filter: compiled.Filter(n.ID), Peers: make(map[string]compiledPeer), SelfCapMap: compiled.Attributes(n.ID)}
		for _, id := range compiled.Visible(n.ID) {
			var peer compiledPeer
			for _, a := range byID[id].Addrs {
				peer.AllowedIPs = append(peer.AllowedIPs, netip.PrefixFrom(a, a.BitLen()))
			}
			for _, route := range compiled.Routes(n.ID, id) {
				peer.AllowedIPs = append(peer.AllowedIPs, route)
				// Several exit nodes may be offered at once: none is primary.
				if route.Bits() > 0 {
					peer.PrimaryRoutes = append(peer.PrimaryRoutes, route)
				}
			}
			slices.SortFunc(peer.AllowedIPs, comparePrefixes)
			r.Peers[t.names[id]] = peer
		}
		out[t.names[n.ID]] = r
	}
	return out
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
