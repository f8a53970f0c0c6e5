package main

import (
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// help answers `mesh help [COMMAND]`.
func help(args []string, c *call) int {
	if len(args) == 0 || isHelpFlag(args[0]) {
		writeOverview(c.stdout)
		return exitDone
	}
	if cmd, rest := find(args); cmd != nil && len(rest) == 0 {
		writeHelp(c.stdout, cmd)
		return exitDone
	}
	if group := inGroup(args[0]); len(group) > 0 && len(args) == 1 {
		writeGroup(c.stdout, args[0], group)
		return exitDone
	}
	fmt.Fprintf(c.stderr, "mesh help: unknown command %q\n\n", strings.Join(args, " "))
	writeOverview(c.stderr)
	return exitUsage
}

func writeOverview(w io.Writer) {
	fmt.Fprintln(w, "mesh runs and administers a private, zero-trust network of agents.")
	fmt.Fprintln(w)
	fmt.Fprintln(w, "Usage: mesh COMMAND [FLAGS] [ARGUMENTS]")
	fmt.Fprintln(w)
	writeCommands(w, commands())
	fmt.Fprintln(w)
	fmt.Fprintln(w, "`mesh help COMMAND` tells more. Commands of administrators talk to the server on this")
	fmt.Fprintln(w, "machine through the unix socket in its data directory: --data, or $MESH_DATA, or")
	fmt.Fprintln(w, "mesh-server in the user's config directory.")
	fmt.Fprintln(w, "Exit status: 0 done, 1 refused or failed, 2 used wrongly.")
}

func writeGroup(w io.Writer, word string, group []*command) {
	fmt.Fprintf(w, "Usage: mesh %s COMMAND [FLAGS] [ARGUMENTS]\n\n", word)
	writeCommands(w, group)
}

func writeCommands(w io.Writer, list []*command) {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, cmd := range list {
		fmt.Fprintf(t, "  %s\t%s\n", strings.TrimSpace(cmd.name+" "+cmd.args), cmd.short)
	}
	t.Flush()
}

// writeHelp is all there is to say about a command.
func writeHelp(w io.Writer, cmd *command) {
	fmt.Fprintf(w, "%s\n\n", cmd.short)
	writeUsage(w, cmd)
	if cmd.long != "" {
		fmt.Fprintf(w, "\n%s\n", strings.TrimSpace(cmd.long))
	}
}

// writeUsage is the line of usage with the flags.
func writeUsage(w io.Writer, cmd *command) {
	fs := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	cmd.setup(fs)
	line, any := "Usage: mesh "+cmd.name, false
	fs.VisitAll(func(*flag.Flag) { any = true })
	if any {
		line += " [FLAGS]"
	}
	if cmd.args != "" {
		line += " " + cmd.args
	}
	fmt.Fprintln(w, line)
	if !any {
		return
	}
	fmt.Fprintln(w, "\nFlags:")
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fs.VisitAll(func(f *flag.Flag) {
		value, text := flag.UnquoteUsage(f)
		dash := "--"
		if len(f.Name) == 1 {
			dash = "-"
		}
		fmt.Fprintf(t, "  %s\t%s\n", strings.TrimSpace(dash+f.Name+" "+value), text)
	})
	t.Flush()
}
