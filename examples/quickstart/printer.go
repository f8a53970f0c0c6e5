package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// printer writes the story for people.
type printer struct {
	w     io.Writer
	color bool
}

func newPrinter(f *os.File) *printer {
	fi, err := f.Stat()
	tty := err == nil && fi.Mode()&os.ModeCharDevice != 0
	return &printer{w: f, color: tty && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

const (
	bold  = "1"
	green = "32"
	red   = "31"
)

func (p *printer) paint(color, s string) string {
	if !p.color {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

func (p *printer) line(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }

// title begins a chapter.
func (p *printer) title(format string, args ...any) {
	p.line("\n%s", p.paint(bold, fmt.Sprintf(format, args...)))
}

// good and bad are lines that begin with how it went.
func (p *printer) good(word, format string, args ...any) { p.outcome(green, word, format, args...) }
func (p *printer) bad(word, format string, args ...any)  { p.outcome(red, word, format, args...) }

func (p *printer) outcome(color, word, format string, args ...any) {
	p.line("  %s %s", p.paint(color, fmt.Sprintf("%-8s", word)), fmt.Sprintf(format, args...))
}

// result is good with the word, or bad.
func (p *printer) result(ok bool, word, format string, args ...any) {
	if ok {
		p.good(word, format, args...)
	} else {
		p.bad(kindOther, format, args...)
	}
}

// width is what fits most terminals, indent what details are moved in by.
const (
	width  = 92
	indent = 11
)

// detail belongs to the line above and is broken where it is too long.
func (p *printer) detail(format string, args ...any) {
	line := ""
	for _, word := range strings.Fields(fmt.Sprintf(format, args...)) {
		if line != "" && indent+len(line)+1+len(word) > width {
			p.line("%*s%s", indent, "", line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	p.line("%*s%s", indent, "", line)
}

func because(text string) string {
	if text == "" {
		return ""
	}
	return ": " + text
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}

// shorten takes the noise out of a rule.
func shorten(rule string) string {
	return strings.NewReplacer(`{"action": "accept", `, "", "},", "", `"src": `, "", `, "dst": `, " → ", `"`, "").Replace(strings.TrimSpace(rule))
}
