package main

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"mesh/control/policy"
	"mesh/control/wire"
)

// explanation is policy.Explanation for programs.
type explanation struct {
	From    string   `json:"from"`
	To      string   `json:"to"`
	Proto   int      `json:"proto"`
	Port    uint16   `json:"port"`
	Allowed bool     `json:"allowed"`
	Rules   []match  `json:"rules"`
	Nearest *match   `json:"nearest,omitempty"`
	Missing string   `json:"missing,omitempty"` // what the nearest rule lacks
	Notes   []string `json:"notes,omitempty"`
	Version int64    `json:"version,omitempty"` // of the policy in force
}

// match is policy.Match for programs.
type match struct {
	Rule  string `json:"rule"`
	ID    string `json:"id"`
	Line  int    `json:"line,omitempty"`
	Src   string `json:"src,omitempty"`
	Dst   string `json:"dst,omitempty"`
	SrcBy string `json:"srcBy,omitempty"`
	DstBy string `json:"dstBy,omitempty"`
}

func (t *topology) matchOf(m policy.Match) match {
	return match{m.Rule, m.ID, m.Line, m.Src, m.Dst, t.named(m.SrcBy), t.named(m.DstBy)}
}

var policyExplain = &command{
	name: "policy explain", short: "say why somebody may reach something, or why not",
	long: `
X and Y are names of nodes, users, tags or addresses. Printed is which rule lets X in,
at which line of the file, and through which group, tag or host; or, if none does,
what the nearest rule lacks. The policy in force on the server counts, with the
grants beside it, unless --policy gives a file.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		from := fs.String("from", "", "`X`, who wants to reach; required")
		to := fs.String("to", "", "`Y:PORT` to be reached; required")
		protoName := fs.String("proto", "tcp", "`PROTOCOL`: tcp, udp, icmp, another name or a number")
		asJSON := jsonFlag(fs)
		where := bindSituation(fs)
		return func(ctx context.Context, c *call) error {
			if *from == "" || *to == "" {
				return usageError{"give --from and --to"}
			}
			proto, err := parseProto(*protoName)
			if err != nil {
				return usageError{err.Error()}
			}
			host, port, err := target(*to, proto)
			if err != nil {
				return usageError{"--to " + err.Error()}
			}
			s, err := where.read(ctx, c)
			if err != nil {
				return err
			}
			src, err := s.endpoint(*from)
			if err != nil {
				return fmt.Errorf("--from: %w", err)
			}
			dst, err := s.endpoint(host)
			if err != nil {
				return fmt.Errorf("--to: %w", err)
			}
			e := policy.Compile(s.policy, s.nodes).Explain(src, dst, proto, port)
			e.Notes = append(e.Notes, s.grantNotes(e.Rules, time.Now())...)
			if !*asJSON {
				what := *protoName
				if hasPorts(proto) {
					what += " port " + strconv.Itoa(int(port))
				}
				c.printf("%s to %s, %s: %s", plain(*from), plain(host), plain(what), s.named(e.String()))
				if s.version != 0 {
					c.printf("  as of policy version %d\n", s.version)
				}
				return nil
			}
			out := explanation{From: *from, To: host, Proto: proto, Port: port, Allowed: e.Allowed, Rules: []match{}, Missing: s.named(e.Missing), Version: s.version}
			for _, m := range e.Rules {
				out.Rules = append(out.Rules, s.matchOf(m))
			}
			if e.Near != nil {
				near := s.matchOf(*e.Near)
				out.Nearest = &near
			}
			for _, n := range e.Notes {
				out.Notes = append(out.Notes, s.named(n))
			}
			return c.writeJSON(out)
		}
	},
}

// target reads "Y:PORT", or for protocols without ports also "Y".
func target(to string, proto int) (host string, port uint16, err error) {
	host, text, err := splitPort(to)
	if !hasPorts(proto) {
		if err != nil || text == "*" {
			return strings.TrimSuffix(to, ":*"), 0, nil
		}
		if _, err := strconv.ParseUint(text, 10, 16); err != nil {
			return to, 0, nil // the end of a name with a colon, such as a tag's
		}
	}
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: want a port between 0 and 65535 after the last colon", to)
	}
	return host, uint16(n), nil
}

// grantNotes says when the grants among rules end.
func (s *situation) grantNotes(rules []policy.Match, now time.Time) (out []string) {
	for _, m := range rules {
		for _, g := range s.grants {
			if m.Rule == fmt.Sprintf("temp[%d]", g.ID) {
				note := fmt.Sprintf("%s is grant %d of %s, which ends %s", m.Rule, g.ID, g.Author, ago(g.Until, now))
				if g.Reason != "" {
					note += ": " + g.Reason
				}
				out = append(out, note)
			}
		}
	}
	return out
}

var policyDiff = &command{
	name: "policy diff", args: "OLD [NEW]", min: 1, max: 2,
	short: "say who gains and who loses access between two policies",
	long: `
OLD and NEW are files, "-" for standard input, or versions by number; alone, a policy
is compared with the one in force. Nodes of one user, or with the same tags, are one
identity. Each line is

  + SRC → DST: ACCESS (RULES)   access that only the new policy gives
  - SRC → DST: ACCESS (RULES)   access that only the old one gave

Users and nodes are those of the server, or of a topology file (see mesh policy
compile).`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		topologyFile := fs.String("topology", "", "`FILE` with users and nodes (default: those of the server)")
		asJSON := jsonFlag(fs)
		none := ""
		where := situationFlags{&none, topologyFile, dataFlag(fs)}
		return func(ctx context.Context, c *call) error {
			ctx, cancel := context.WithTimeout(ctx, adminTimeout)
			defer cancel()
			oldName, newName := "", c.args[0]
			if len(c.args) == 2 {
				oldName, newName = c.args[0], c.args[1]
			}
			old, err := where.policyOf(ctx, c, oldName)
			if err != nil {
				return err
			}
			new, err := where.policyOf(ctx, c, newName)
			if err != nil {
				return err
			}
			t, err := where.who(ctx, c)
			if err != nil {
				return err
			}
			changes, complete := policy.Diff(old, new, t.withAbsent(old, new))
			if *asJSON {
				out := differences{Complete: complete, Changes: []difference{}}
				for _, ch := range changes {
					out.Changes = append(out.Changes, difference{ch.Gained, ch.Src, ch.Dst, ch.Access, ch.Rules})
				}
				return c.writeJSON(out)
			}
			for _, ch := range changes {
				c.printf("%s\n", plain(ch.String()))
			}
			switch {
			case !complete:
				fmt.Fprintln(c.stderr, "there is more than is shown")
			case len(changes) == 0:
				c.printf("nobody gains or loses anything\n")
			}
			return nil
		}
	},
}

// withAbsent returns the nodes, and one more for each user and tag without any:
// what a policy gives them counts, too.
func (t *topology) withAbsent(policies ...*policy.Policy) []policy.Node {
	nodes := slices.Clone(t.nodes)
	next := wire.NodeID(1)
	for _, n := range nodes {
		next = max(next, n.ID+1)
	}
	add := func(n policy.Node) {
		n.ID = next
		next++
		// Who has no address reaches nothing. This one is nobody's.
		a := netip.MustParseAddr("fd7a:115c:a1e0:ffff::").As16()
		for i := range 8 {
			a[15-i] = byte(n.ID >> (8 * i))
		}
		n.Addrs = []netip.Addr{netip.AddrFrom16(a)}
		nodes = append(nodes, n)
	}
	for _, u := range t.users {
		has := func(n policy.Node) bool { return len(n.Tags) == 0 && strings.EqualFold(n.User, u.Name) }
		if !slices.ContainsFunc(t.nodes, has) {
			add(policy.Node{User: u.Name, Email: u.Email, Role: u.Role})
		}
	}
	seen := make(map[string]bool)
	for _, p := range policies {
		if p == nil {
			continue
		}
		for _, tag := range p.Tags() {
			has := func(n policy.Node) bool { return slices.Equal(n.Tags, []string{tag}) }
			if !seen[tag] && !slices.ContainsFunc(t.nodes, has) {
				add(policy.Node{Tags: []string{tag}})
			}
			seen[tag] = true
		}
	}
	return nodes
}

// differences is what policy diff prints for programs.
type differences struct {
	Complete bool         `json:"complete"` // else there is more
	Changes  []difference `json:"changes"`
}

// difference is policy.Change for programs.
type difference struct {
	Gained bool              `json:"gained"` // else lost
	Src    []string          `json:"src"`
	Dst    string            `json:"dst"`
	Access []string          `json:"access"`
	Rules  []wire.RuleOrigin `json:"rules"`
}

// policyOf reads a policy from a file, or by its version from the server; "" is
// the one in force, without the grants beside it. nil = there is none.
func (f situationFlags) policyOf(ctx context.Context, c *call, name string) (*policy.Policy, error) {
	version, err := strconv.ParseInt(name, 10, 64)
	if name != "" && (err != nil || version < 1) {
		text, err := readPolicy(c, name)
		if err != nil {
			return nil, err
		}
		p, err := policy.Parse(text)
		if err != nil {
			return nil, complaints(name, err)
		}
		return p, nil
	}
	s, err := f.server()
	if err != nil {
		return nil, err
	}
	p, err := versionOf(ctx, s, version)
	if err != nil || p.Version == 0 {
		return nil, err
	}
	parsed, err := policy.Parse([]byte(p.Text))
	if err != nil {
		return nil, fmt.Errorf("policy version %d: %w", p.Version, err)
	}
	return parsed, nil
}
