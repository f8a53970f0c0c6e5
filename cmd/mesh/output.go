package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// jsonFlag asks for output for programs.
func jsonFlag(fs *flag.FlagSet) *bool { return fs.Bool("json", false, "print JSON") }

// writeJSON prints v for programs; times are RFC 3339.
func (c *call) writeJSON(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// table prints rows under a header, aligned.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, header ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	t.row(header...)
	return t
}

func (t table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = plain(cell)
	}
	fmt.Fprintln(t.w, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
}

func (t table) flush() { t.w.Flush() }

// plain replaces what would disturb a terminal: names come from nodes.
func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' {
			return '?'
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s
}

// ago tells a time as people do, relative to now.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	if d := now.Sub(t); d >= 0 {
		if d < time.Second {
			return "just now"
		}
		return span(d) + " ago"
	}
	return "in " + span(t.Sub(now))
}

// span is a duration in its biggest unit, rounded.
func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Round(time.Second)/time.Second))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Round(time.Minute)/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Round(time.Hour)/time.Hour))
	}
	return fmt.Sprintf("%dd", int((d+12*time.Hour)/(24*time.Hour)))
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// owner is who a node or key belongs to.
func owner(user string, tags []string) string {
	if len(tags) > 0 {
		return strings.Join(tags, " ")
	}
	return user
}

// list joins values for people.
func list[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, " ")
}
