package main

import (
	"flag"
	"fmt"
	"strings"
	"time"

	"mesh/control/admin"
)

// waitHelp says what --wait does.
const waitHelp = `
With --wait the command returns when every connected node that could see what is
withdrawn has that in force, and says how long the slowest took. It fails, and names
them, if some have not said so in time. Nodes of other makers do not say, and those
connected to another replica of the server are not asked: both are counted, apart.`

// waitFlags binds --wait and --wait-for, and returns how long to wait, 0 = not at
// all.
func waitFlags(fs *flag.FlagSet) func() time.Duration {
	wait := fs.Bool("wait", false, "until all peers have it in force")
	limit := fs.Duration("wait-for", 10*time.Second, "how `LONG` at most, up to 25s (default 10s)")
	return func() time.Duration {
		if !*wait {
			return 0
		}
		return *limit
	}
}

// applied tells how far a withdrawal is in force. It is an error if it is not
// everywhere.
func (c *call) applied(a *admin.Applied) error {
	if a == nil {
		return nil // nobody waited
	}
	mute := ""
	if a.Mute > 0 {
		mute = fmt.Sprintf("; %s cannot tell", count(a.Mute, "node"))
	}
	if a.Elsewhere > 0 {
		mute += fmt.Sprintf("; %s at other replicas not asked", count(a.Elsewhere, "node"))
	}
	switch {
	case a.Peers == 0 && a.Elsewhere > 0:
		c.printf("no peer connected to this replica had to hear of it%s\n", mute)
	case a.Peers == 0:
		c.printf("no connected peer had to hear of it%s\n", mute)
	case a.Applied == a.Peers:
		c.printf("in force at %s, the slowest after %v: %s%s\n", count(a.Peers, "peer"), a.Slowest.Round(100*time.Microsecond), plain(a.SlowestNode), mute)
	default:
		names := plain(strings.Join(a.Missing, " "))
		if more := a.Peers - a.Applied - len(a.Missing); more > 0 {
			names += fmt.Sprintf(" and %d more", more)
		}
		return fmt.Errorf("done, but in force at only %d of %s so far%s; not yet at %s", a.Applied, count(a.Peers, "peer"), mute, names)
	}
	return nil
}

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
