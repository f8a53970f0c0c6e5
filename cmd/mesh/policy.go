package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/policy"
)

var policyGet = &command{
	name: "policy get", short: "print the policy in force, or an older version",
	long: `With --json its version, author and time are there too.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		version := fs.Int64("version", 0, "`N`: that version instead of the one in force")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			p, err := versionOf(ctx, s, *version)
			switch {
			case err != nil:
				return err
			case *asJSON:
				return c.writeJSON(p)
			case p.Version == 0:
				return errors.New("there is no policy: everything is denied; set one with `mesh policy set FILE`")
			}
			_, err = io.WriteString(c.stdout, p.Text)
			return err
		})
	},
}

var policySet = &command{
	name: "policy set", args: "FILE", min: 1, max: 1,
	short: "put a policy in force",
	long: `
FILE is HuJSON; "-" is standard input. A policy with errors, or whose own tests fail,
is refused and the one in force stays. What the new one no longer allows is cut at
once. Every version is kept: see mesh policy history. --expect makes sure that
nobody's edit is lost: it names the version that this one was made from.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		expect := expectFlag(fs)
		force := fs.Bool("force", false, "also if nobody could reach anybody any more")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			set := admin.PolicySet{Text: string(text), Guard: !*force}
			if *expect >= 0 {
				set.Replaces = expect
			}
			p, err := s.SetPolicy(ctx, set)
			if errors.Is(err, admin.ErrInvalid) {
				// The server's word counts, but our own look gives positions.
				if _, perr := policy.Parse(text); perr != nil {
					return complaints(c.args[0], perr)
				}
				return refusal(c.args[0], err)
			}
			if err != nil {
				return err
			}
			c.warn(c.args[0], p.Warnings)
			c.printf("policy version %d is in force\n", p.Version)
			return nil
		})
	},
}

// expectFlag is --expect of all commands that change the policy.
func expectFlag(fs *flag.FlagSet) *int64 {
	return fs.Int64("expect", -1, "refuse if the policy in force has another `VERSION` (0: there is none)")
}

// refusal puts what the server says of a valid policy, such as which of its
// tests fail, into lines.
func refusal(name string, err error) error {
	text := strings.TrimPrefix(err.Error(), "policy refused: ")
	if strings.HasPrefix(text, "nobody could reach anybody") {
		return fmt.Errorf("%w; give --force if that is meant", err)
	}
	if !strings.HasPrefix(text, "tests[") {
		return err
	}
	var lines linesError
	for _, l := range strings.Split(text, "\n") {
		lines = append(lines, shownName(name)+": "+l)
	}
	return lines
}

// warn prints warnings about a policy.
func (c *call) warn(name string, warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(c.stderr, "%s: warning: %s\n", shownName(name), oneLine(plain(strings.TrimSpace(w))))
	}
}

// versionOf returns a version of the policy; 0 is the one in force.
func versionOf(ctx context.Context, s *admin.Client, version int64) (admin.Policy, error) {
	switch {
	case version < 0:
		return admin.Policy{}, usageError{"versions count from 1"}
	case version == 0:
		return s.Policy(ctx)
	}
	return s.PolicyVersion(ctx, version)
}

var policyHistory = &command{
	name: "policy history", short: "list the versions of the policy",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			list, err := s.PolicyHistory(ctx)
			if err != nil {
				return err
			}
			if *asJSON {
				return c.writeJSON(list)
			}
			now := time.Now()
			t := newTable(c.stdout, "VERSION", "SET", "BY", "NOTE")
			for i, p := range list {
				note := p.Note
				if i == 0 {
					note = strings.TrimSuffix("in force, "+note, ", ")
				}
				t.row(strconv.FormatInt(p.Version, 10), ago(p.Created, now), p.Author, note)
			}
			t.flush()
			if grants, err := s.Grants(ctx, false); err == nil && len(grants) > 0 {
				c.printf("\nbeside it are grants for a time, %d: see `mesh grant list`\n", len(grants))
			}
			return nil
		})
	},
}

var policyRollback = &command{
	name: "policy rollback", args: "VERSION", min: 1, max: 1,
	short: "bring an older version of the policy in force again",
	long:  `Its text becomes a new version, with the checks of mesh policy set.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		expect := expectFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			version, err := strconv.ParseInt(c.args[0], 10, 64)
			if err != nil || version < 1 {
				return usageError{fmt.Sprintf("%q: want the number of a version", c.args[0])}
			}
			in := admin.PolicyRollback{Version: version}
			if *expect >= 0 {
				in.Replaces = expect
			}
			p, err := s.RollbackPolicy(ctx, in)
			if errors.Is(err, admin.ErrInvalid) {
				return refusal("version "+c.args[0], err)
			}
			if err != nil {
				return err
			}
			c.printf("policy version %d is in force, with the text of version %d\n", p.Version, version)
			return nil
		})
	},
}

var policyCheck = &command{
	name: "policy check", args: "FILE", min: 1, max: 1,
	short: "say what is wrong with a policy; needs no server",
	long: `
FILE is HuJSON; "-" is standard input. Each error is a line FILE:LINE:COLUMN: TEXT.
With a topology (see mesh policy compile), or with --live the mesh of the running
server, the policy's own tests are run too, and users that do not exist are pointed
out.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		file := fs.String("topology", "", "`FILE` with users and nodes")
		live := fs.Bool("live", false, "check against the users and nodes of the server")
		data := dataFlag(fs)
		return func(ctx context.Context, c *call) error {
			if *live && *file != "" {
				return usageError{"give --topology or --live, and not both"}
			}
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			p, err := policy.Parse(text)
			if err != nil {
				return complaints(c.args[0], err)
			}
			if *live || *file != "" {
				none := ""
				t, err := situationFlags{&none, file, data}.who(ctx, c)
				if err != nil {
					return err
				}
				if err := p.Check(t.known); err != nil {
					for _, e := range separate(err) {
						c.warn(c.args[0], []string{complaint(e)})
					}
				}
				if failures := p.Test(t.nodes, t.users); len(failures) > 0 {
					return failedTests(c.args[0], failures)
				}
			}
			c.printf("%s is valid\n", c.args[0])
			return nil
		}
	},
}

var policyTopology = &command{
	name: "policy topology", short: "print users and nodes as mesh policy compile reads them",
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			t, err := s.Topology(ctx)
			if err != nil {
				return err
			}
			return c.writeJSON(t)
		})
	},
}

// readPolicy reads a file, or standard input for "-".
func readPolicy(c *call, name string) ([]byte, error) {
	b, err := readFile(c, name, admin.MaxPolicy)
	if errors.Is(err, errTooLong) {
		return nil, fmt.Errorf("%s: a policy has at most %d bytes", name, admin.MaxPolicy)
	}
	return b, err
}

// shownName is what a file is called in messages.
func shownName(name string) string {
	if name == "-" {
		return "<stdin>"
	}
	return name
}

// complaints puts what policy.Parse has to say as a compiler would.
func complaints(name string, err error) linesError {
	var lines linesError
	for _, e := range separate(err) {
		lines = append(lines, shownName(name)+":"+complaint(e))
	}
	return lines
}

// parseComplaints is complaints about a text, nil if there are none.
func parseComplaints(name string, text []byte) error {
	if _, err := policy.Parse(text); err != nil {
		return complaints(name, err)
	}
	return nil
}

// complaint is "LINE:COLUMN: TEXT", or " TEXT" of what has no position.
func complaint(err error) string {
	var e *policy.Error
	if !errors.As(err, &e) {
		return " " + err.Error()
	}
	s := fmt.Sprintf("%d:%d: %s", e.Line, e.Column, e.Msg)
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	return s
}

// separate undoes errors.Join, also inside of other errors.
func separate(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if joined, ok := e.(interface{ Unwrap() []error }); ok {
			var out []error
			for _, part := range joined.Unwrap() {
				out = append(out, separate(part)...)
			}
			return out
		}
	}
	return []error{err}
}

// startComplaint makes one line of a policy that kept a server from starting.
func startComplaint(file string, err error) error {
	all := separate(err)
	var found []error
	for _, e := range all {
		var p *policy.Error
		if errors.As(e, &p) {
			found = append(found, e)
		}
	}
	if len(found) == 0 {
		return err
	}
	text := fmt.Sprintf("policy %s:%s", file, complaint(found[0]))
	if len(found) > 1 {
		text += fmt.Sprintf(" (and %d more: see `mesh policy check %s`)", len(found)-1, file)
	}
	return errors.New(strings.TrimSpace(text))
}
