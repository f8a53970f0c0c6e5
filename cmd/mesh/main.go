// Command mesh runs and administers a mesh: the control plane with relay and
// STUN (serve), relays of their own (relay), and the commands of its
// administrators (key, user, node, policy, status).
//
// Exit status: 0 done, 1 refused or failed (one line on stderr says why), 2
// used wrongly.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit statuses.
const (
	exitDone  = 0
	exitFail  = 1
	exitUsage = 2
)

// command is one thing that the program does.
type command struct {
	name     string // as typed, "key create"
	args     string // positional arguments as the usage line shows them, "NAME"
	min, max int    // how many of them
	short    string // what it does, for the list of commands
	long     string // more for its own help, or ""
	// setup binds the flags and returns what runs once they are parsed.
	setup func(fs *flag.FlagSet) func(context.Context, *call) error
}

// commands lists all, in the order of the help text.
func commands() []*command {
	return []*command{
		serveCommand, relayCommand, statusCommand, pingCommand, netcheckCommand,
		keyCreate, keyList, keyRevoke,
		userCreate, userList, userSuspend, userResume, userRemove,
		nodeList, nodeShow, nodeRename, nodeTag, nodeExpire, nodeRemove,
		nodePending, nodeApprove, nodeReject,
		nodeRoutes,
		policyGet, policySet, policyCheck, policyCompile, policyExplain, policyDiff, policyHistory, policyRollback, policyTopology,
		shadowSet, shadowGet, shadowReport, shadowClear,
		grantAdd, grantList, grantRevoke,
		relayList, relayRemove,
		backupCommand, migrateCommand,
		auditCommand, auditVerify,
	}
}

// call is one use of a command.
type call struct {
	args           []string // positional
	stdin          io.Reader
	stdout, stderr io.Writer
}

// printf writes to stdout. Who does not read it has reasons of their own.
func (c *call) printf(format string, args ...any) { fmt.Fprintf(c.stdout, format, args...) }

// usageError is a wrong use of the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

// linesError is a failure that takes several lines, such as the list of what is
// wrong with a file.
type linesError []string

func (e linesError) Error() string { return strings.Join(e, "\n") }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	code := run(ctx, os.Args[1:], &call{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr})
	stop()
	os.Exit(code)
}

// run does what the arguments say and returns the exit status.
func run(ctx context.Context, args []string, c *call) int {
	if len(args) == 0 {
		writeOverview(c.stderr)
		return exitUsage
	}
	if args[0] == "help" || isHelpFlag(args[0]) {
		return help(args[1:], c)
	}
	cmd, rest := find(args)
	if cmd == nil {
		if group := inGroup(args[0]); len(group) > 0 {
			if len(rest) > 0 && isHelpFlag(rest[0]) {
				writeGroup(c.stdout, args[0], group)
				return exitDone
			}
			fmt.Fprintf(c.stderr, "mesh %s: what to do with it is missing or unknown\n\n", args[0])
			writeGroup(c.stderr, args[0], group)
			return exitUsage
		}
		fmt.Fprintf(c.stderr, "mesh: unknown command %q\n\n", args[0])
		writeOverview(c.stderr)
		return exitUsage
	}
	fs := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	do := cmd.setup(fs)
	var err error
	if c.args, err = parse(fs, rest); errors.Is(err, flag.ErrHelp) {
		writeHelp(c.stdout, cmd)
		return exitDone
	}
	switch {
	case err != nil:
		err = usageError{err.Error()}
	case len(c.args) < cmd.min:
		err = usageError{"missing argument: " + cmd.args}
	case len(c.args) > cmd.max:
		err = usageError{fmt.Sprintf("unexpected argument %q", c.args[cmd.max])}
	default:
		err = do(ctx, c)
	}
	return c.finish(cmd, err)
}

// finish says what went wrong, if anything did.
func (c *call) finish(cmd *command, err error) int {
	var usage usageError
	var lines linesError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage):
		fmt.Fprintf(c.stderr, "mesh %s: %s\n\n", cmd.name, oneLine(usage.text))
		writeUsage(c.stderr, cmd)
		return exitUsage
	case errors.As(err, &lines):
		for _, l := range lines {
			fmt.Fprintln(c.stderr, oneLine(l))
		}
	default:
		fmt.Fprintf(c.stderr, "mesh %s: %s\n", cmd.name, oneLine(err.Error()))
	}
	return exitFail
}

func oneLine(s string) string { return strings.Join(strings.FieldsFunc(s, isNewline), "; ") }

func isNewline(r rune) bool { return r == '\n' || r == '\r' }

func isHelpFlag(s string) bool { return s == "-h" || s == "-help" || s == "--help" }

// find returns the command that args begin with, and what follows its name.
func find(args []string) (*command, []string) {
	for n := min(len(args), 3); n > 1; n-- {
		name := strings.Join(args[:n], " ")
		for _, cmd := range commands() {
			if cmd.name == name {
				return cmd, args[n:]
			}
		}
	}
	for _, cmd := range commands() {
		if cmd.name == args[0] {
			return cmd, args[1:]
		}
	}
	return nil, args[1:]
}

// inGroup returns the commands whose first word is word.
func inGroup(word string) (group []*command) {
	for _, cmd := range commands() {
		if first, _, two := strings.Cut(cmd.name, " "); two && first == word {
			group = append(group, cmd)
		}
	}
	return group
}

// parse reads flags wherever they stand and returns the other arguments. "--"
// ends the flags.
func parse(fs *flag.FlagSet, args []string) (positional []string, err error) {
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		rest := fs.Args()
		if n := len(args) - len(rest); len(rest) == 0 || n > 0 && args[n-1] == "--" {
			return append(positional, rest...), nil
		}
		positional, args = append(positional, rest[0]), rest[1:]
	}
}
