package main

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/wire"
)

// texts is a flag that may be given several times.
type texts []string

func (t *texts) String() string { return strings.Join(*t, ",") }

// Set implements flag.Value.
func (t *texts) Set(s string) error {
	*t = append(*t, s)
	return nil
}

var grantAdd = &command{
	name: "grant add", short: "give somebody access for a time, beside the policy",
	long: `
X is a node's name, or what policies know: a user, group:…, tag:…, a host or an
address. Y is the same; PORT is a port, a range such as 8000-8100, or *. Both may be
given several times. The grant is in force at once and ends by itself, on the
second; connections that it alone allowed are cut then. A node that a grant names
takes it along when it is removed.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		var src, dst texts
		fs.Var(&src, "src", "`X`, who gets access; required")
		fs.Var(&dst, "dst", "`Y:PORT` to be reached; required")
		proto := fs.String("proto", "", "`PROTOCOL`: tcp, udp, … (default: TCP, UDP and ICMP)")
		var life time.Duration
		fs.Func("for", "`TIME` until it ends, such as 30m, 8h or 2d; required", func(s string) (err error) {
			life, err = wire.ParseSpan(s)
			return err
		})
		reason := fs.String("reason", "", "`TEXT` for the record")
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			in := admin.GrantAdd{Src: src, For: life, Reason: *reason}
			switch {
			case len(src) == 0 || len(dst) == 0:
				return usageError{"give --src and --dst"}
			case life <= 0:
				return usageError{"give --for, a time such as 30m or 8h"}
			}
			ports := ""
			for _, d := range dst {
				host, port, err := splitPort(d)
				if err != nil {
					return usageError{"--dst " + err.Error()}
				}
				if ports != "" && ports != port {
					return usageError{"all of --dst need the same ports; add one grant for each"}
				}
				ports = port
				in.Dst = append(in.Dst, host)
			}
			if *proto != "" {
				if _, err := parseProto(*proto); err != nil {
					return usageError{err.Error()}
				}
				ports = strings.ToLower(*proto) + ":" + ports
			}
			in.IP = []string{ports}
			g, err := s.AddGrant(ctx, in)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(g)
			}
			c.printf("grant %d: %s until %s\n", g.ID, grantText(g), g.Until.Local().Format(time.RFC3339))
			return nil
		})
	},
}

// grantText is who may reach what.
func grantText(g admin.Grant) string {
	var to []string
	for _, d := range g.To {
		if strings.Count(d, ":") > 1 {
			d = "[" + d + "]"
		}
		for _, ip := range g.IP {
			proto, port, ok := strings.Cut(ip, ":")
			if !ok {
				proto, port = "", ip
			}
			to = append(to, strings.TrimSpace(fmt.Sprintf("%s:%s %s", d, port, proto)))
		}
	}
	return fmt.Sprintf("%s may reach %s", strings.Join(g.From, ", "), strings.Join(to, ", "))
}

var grantList = &command{
	name: "grant list", short: "list access that is given for a time",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		all := fs.Bool("all", false, "also grants that have ended")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			list, err := s.Grants(ctx, *all)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(list)
			}
			now := time.Now()
			t := newTable(c.stdout, "ID", "GRANT", "ENDS", "BY", "REASON")
			for _, g := range list {
				ends := ago(g.Until, now)
				if !g.Ended.IsZero() {
					ends = fmt.Sprintf("%s %s", g.Why, ago(g.Ended, now))
				}
				t.row(strconv.FormatInt(g.ID, 10), grantText(g), ends, g.Author, g.Reason)
			}
			t.flush()
			return nil
		})
	},
}

var grantRevoke = &command{
	name: "grant revoke", args: "ID", min: 1, max: 1,
	short: "end a grant before its time",
	long:  `Connections that it alone allowed are cut at once.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			id, err := strconv.ParseInt(c.args[0], 10, 64)
			if err != nil {
				return usageError{fmt.Sprintf("%q: want the number of a grant", c.args[0])}
			}
			g, err := s.RevokeGrant(ctx, id)
			if err != nil {
				return err
			}
			c.printf("grant %d is over: %s no more\n", g.ID, grantText(g))
			return nil
		})
	},
}

var shadowSet = &command{
	name: "policy shadow set", args: "FILE", min: 1, max: 1,
	short: "evaluate a candidate beside the policy, on real connection attempts",
	long: `
FILE is HuJSON; "-" is standard input. Nodes report which connections others attempt,
and mesh policy shadow report tells what the candidate would newly deny or allow.
Nothing else changes. A new candidate starts a new report. Only this project's nodes
report, and only attempts between nodes that may see each other now.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			p, err := s.SetShadow(ctx, string(text))
			if err != nil {
				if lines := parseComplaints(c.args[0], text); lines != nil {
					return lines
				}
				return err
			}
			c.warn(c.args[0], p.Warnings)
			c.printf("%s is evaluated beside the policy in force; see `mesh policy shadow report`\n", shownName(c.args[0]))
			return nil
		})
	},
}

var shadowGet = &command{
	name: "policy shadow get", short: "print the candidate beside the policy",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			p, err := s.Shadow(ctx)
			switch {
			case err != nil:
				return err
			case *asJSON:
				return c.writeJSON(p)
			case p.Text == "":
				return errNoShadow
			}
			c.printf("%s", p.Text)
			return nil
		})
	},
}

var errNoShadow = fmt.Errorf("there is no candidate; set one with `mesh policy shadow set FILE`")

var shadowClear = &command{
	name: "policy shadow clear", short: "take the candidate away, and its report",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			if err := s.ClearShadow(ctx); err != nil {
				return err
			}
			c.printf("no candidate is evaluated any more\n")
			return nil
		})
	},
}

var shadowReport = &command{
	name: "policy shadow report", short: "say what the candidate would newly deny or allow",
	long: `Counted are attempts to open a connection or flow since the candidate was set.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			r, err := s.ShadowReport(ctx)
			switch {
			case isNotFound(err):
				return errNoShadow
			case err != nil:
				return err
			case *asJSON:
				return c.writeJSON(r)
			}
			now := time.Now()
			c.printf("%d attempts since %s; the candidate decides %d kinds of them otherwise\n", r.Attempts, ago(r.Since, now), len(r.Pairs))
			if len(r.Pairs) > 0 {
				c.printf("\n")
				t := newTable(c.stdout, "WOULD", "FROM", "TO", "PORT", "ATTEMPTS", "LAST", "RULE")
				for _, p := range r.Pairs {
					would, rule := "deny", ""
					if p.Allowed {
						would = "allow"
					}
					for _, o := range p.Rules {
						rule += fmt.Sprintf(" %s:%d", o.Rule, o.Line)
					}
					t.row(would, p.Src, p.Dst, portText(p.Proto, p.Port), strconv.FormatInt(p.Attempts, 10), ago(p.Last, now), strings.TrimSpace(rule))
				}
				t.flush()
			}
			if r.Dropped > 0 {
				c.printf("%d further attempts found no room in the report\n", r.Dropped)
			}
			return nil
		})
	},
}

// portText is "tcp 22".
func portText(proto int, port uint16) string {
	name := strconv.Itoa(proto)
	var names []string
	for n, p := range protocols {
		if p == proto {
			names = append(names, n)
		}
	}
	if slices.Sort(names); len(names) > 0 {
		name = names[0]
	}
	if hasPorts(proto) {
		name += " " + strconv.Itoa(int(port))
	}
	return name
}
