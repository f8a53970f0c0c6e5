package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"mesh/control/admin"
	"mesh/control/policy"
)

var policyGet = &command{
	name: "policy get", short: "print the policy in force",
	long: `With --json its version, author and time are there too.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		asJSON := jsonFlag(fs)
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			p, err := s.Policy(ctx)
			if err != nil {
				return err
			}
			switch {
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
FILE is HuJSON; "-" is standard input. A policy with errors is refused and the one
in force stays. What the new one no longer allows is cut at once.`,
	setup: func(fs *flag.FlagSet) func(context.Context, *call) error {
		replaces := fs.Int64("replaces", -1, "refuse if the policy in force has another `VERSION` (0: there is none)")
		return withServer(fs, func(ctx context.Context, c *call, s *admin.Client) error {
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			set := admin.PolicySet{Text: string(text)}
			if *replaces >= 0 {
				set.Replaces = replaces
			}
			p, err := s.SetPolicy(ctx, set)
			if errors.Is(err, admin.ErrInvalid) {
				// The server's word counts, but our own look gives positions.
				if _, perr := policy.Parse(text); perr != nil {
					return complaints(c.args[0], perr)
				}
			}
			if err != nil {
				return err
			}
			for _, w := range p.Warnings {
				fmt.Fprintf(c.stderr, "%s: warning: %s\n", c.args[0], oneLine(plain(w)))
			}
			c.printf("policy version %d is in force\n", p.Version)
			return nil
		})
	},
}

var policyCheck = &command{
	name: "policy check", args: "FILE", min: 1, max: 1,
	short: "say what is wrong with a policy; needs no server",
	long:  `FILE is HuJSON; "-" is standard input. Each error is a line FILE:LINE:COLUMN: TEXT.`,
	setup: func(*flag.FlagSet) func(context.Context, *call) error {
		return func(_ context.Context, c *call) error {
			text, err := readPolicy(c, c.args[0])
			if err != nil {
				return err
			}
			if _, err := policy.Parse(text); err != nil {
				return complaints(c.args[0], err)
			}
			c.printf("%s is valid\n", c.args[0])
			return nil
		}
	},
}

// readPolicy reads a file, or standard input for "-".
func readPolicy(c *call, name string) ([]byte, error) {
	in := c.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, admin.MaxPolicy+1))
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	if len(b) > admin.MaxPolicy {
		return nil, fmt.Errorf("%s: a policy has at most %d bytes", name, admin.MaxPolicy)
	}
	return b, nil
}

// complaints puts what policy.Parse has to say as a compiler would.
func complaints(name string, err error) linesError {
	if name == "-" {
		name = "<stdin>"
	}
	var lines linesError
	for _, e := range separate(err) {
		lines = append(lines, name+":"+complaint(e))
	}
	return lines
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
