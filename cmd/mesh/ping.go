package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"time"

	"mesh"
	"mesh/identity"
)

const (
	// pingEvery is the time between two pings.
	pingEvery = time.Second
	// maxPings bounds --count.
	maxPings = 1000000
)

var pingCommand = &command{
	name: "ping", args: "NAME", min: 1, max: 1,
	short: "show by which paths a peer answers, and how fast",
	long: `
It comes up as a node like mesh status --control and pings the peer, once a second, by
its relay and at all its addresses. Each line tells the best way that answered: at
first that is the relay, and a direct path once one is found. The policy must let
the two nodes see each other; nothing has to run at NAME but its node.
It fails if the peer never answers, and with --until-direct if no direct path is found.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		control := fs.String("control", "", "`URL` of the control server (default $MESH_CONTROL_URL)")
		count := fs.Int("count", 5, "how `MANY` times")
		until := fs.Bool("until-direct", false, "stop at the first answer by a direct path")
		return func(ctx context.Context, c *call) error {
			if *count < 1 || *count > maxPings {
				return usageError{fmt.Sprintf("--count: want a number between 1 and %d", maxPings)}
			}
			n, err := comeUp(ctx, *control, "mesh-ping")
			if err != nil {
				return err
			}
			defer n.Close()
			return ping(ctx, c, n, *count, *until, *asJSON)
		}
	},
}

// pingReport is the JSON form of what mesh ping found.
type pingReport struct {
	ID      identity.StableID `json:"id"`
	Name    string            `json:"name"`
	Address string            `json:"address"`
	Sent    int               `json:"sent"`
	Pongs   []pathReport      `json:"pongs"` // the best one of each ping that was answered
	Direct  bool              `json:"direct"`
}

// ping pings a peer for a user.
func ping(ctx context.Context, c *call, n *mesh.Node, count int, until, asJSON bool) error {
	name := c.args[0]
	r := pingReport{Pongs: []pathReport{}}
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	var silent error
	for r.Sent < count && !(until && r.Direct) {
		if r.Sent > 0 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		r.Sent++
		var best mesh.Pong
		err := n.Ping(ctx, name, func(g mesh.Pong) {
			if best.Kind == "" || best.Kind == "relay" && g.Kind == "direct" {
				best = g
			}
		})
		var timeout interface{ Timeout() bool }
		if err != nil && (!errors.As(err, &timeout) || ctx.Err() != nil) {
			return err // it cannot be pinged at all
		}
		if err != nil {
			silent = err
			if !asJSON {
				c.printf("no answer from %s\n", plain(name))
			}
			continue
		}
		r.add(best)
		if !asJSON {
			c.printf("%s\n", pongLine(best))
		}
	}
	if asJSON {
		if err := c.writeJSON(r); err != nil {
			return err
		}
	}
	switch {
	case len(r.Pongs) == 0:
		return silent
	case until && !r.Direct:
		return fmt.Errorf("no direct path to %s was found", name)
	}
	return nil
}

func (r *pingReport) add(g mesh.Pong) {
	r.ID, r.Name = g.Peer.ID, g.Peer.Name
	if len(g.Peer.Addresses) > 0 {
		r.Address = g.Peer.Addresses[0].String()
	}
	r.Pongs = append(r.Pongs, reportPath(g.Path))
	r.Direct = g.Kind == "direct"
}

// pongLine tells an answer to people.
func pongLine(g mesh.Pong) string {
	who := plain(g.Peer.ShortName())
	if len(g.Peer.Addresses) > 0 {
		who += " (" + g.Peer.Addresses[0].String() + ")"
	}
	p := reportPath(g.Path)
	via := p.Endpoint
	if p.Path == "relay" {
		via = fmt.Sprintf("relay %d", p.Relay)
	}
	return fmt.Sprintf("pong from %s via %s in %s", who, via, p.latency())
}
