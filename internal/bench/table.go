package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
)

// bench collects figures.
type bench struct {
	options
	stacks   []*stack
	names    []string                        // of the figures, in order
	figures  map[string]map[string][]float64 // by name and stack
	failures []string
}

func (b *bench) add(s *stack, name string, v float64) {
	if b.figures[name] == nil {
		b.figures[name] = make(map[string][]float64)
		b.names = append(b.names, name)
	}
	b.figures[name][s.name] = append(b.figures[name][s.name], v)
	if b.verbose {
		fmt.Fprintf(os.Stderr, "  %-8s %-45s %10.4g\n", s.name, name, v)
	}
}

func (b *bench) fail(format string, args ...any) {
	b.failures = append(b.failures, fmt.Sprintf(format, args...))
	fmt.Fprintln(os.Stderr, "bench:", b.failures[len(b.failures)-1])
}

// server is the stack whose servers invent peers.
func (b *bench) server() *stack {
	for _, s := range b.stacks {
		if s.name == "tsnet" {
			return s
		}
	}
	return nil
}

// run measures every scenario of every stack, round by round, so that what the
// machine does besides hits all of them alike.
func (b *bench) run() {
	for round := range b.rounds {
		for _, sc := range scenarios {
			if !b.only.MatchString(sc.name) {
				continue
			}
			for i := range b.stacks {
				s := b.stacks[(i+round)%len(b.stacks)]
				if s.name == sc.not || sc.ours && !s.ours || sc.most > 0 && round >= sc.most {
					continue
				}
				fmt.Fprintf(os.Stderr, "round %d: %s: %s\n", round+1, sc.name, s.name)
				if err := sc.run(b, s); err != nil {
					b.fail("%s: %s: %v", s.name, sc.name, err)
				}
			}
		}
	}
}

// goal is what the project wants a figure to be: at most or at least so many
// times tsnet's.
type goal struct {
	factor   float64
	atMost   bool
	absolute float64 // instead of factor
}

var goals = map[string]goal{
	"equal MTU 1280 1 stream MB/s":                 {factor: 2.2},
	"equal MTU 1280 1 stream CPU-s/GB":             {factor: 0.45, atMost: true},
	"same 1 stream MB/s":                           {factor: 2.5},
	"same 8 stream MB/s":                           {factor: 3},
	"same 8 streams lost":                          {absolute: 0, atMost: true},
	"two processes 1 stream MB/s":                  {factor: 2},
	"relay 1 stream MB/s":                          {factor: 6},
	"relay 1 stream CPU-s/GB":                      {factor: 0.2, atMost: true},
	"same 1 byte RTT p50 µs":                       {factor: 0.5, atMost: true},
	"same HTTP 1 req/s":                            {factor: 1.7},
	"same HTTP 64 req/s":                           {factor: 1.7},
	"warm dial p50 µs":                             {factor: 0.6, atMost: true},
	"cold dial, settled pair ms":                   {factor: 1, atMost: true},
	"new node to first dial ms":                    {factor: 1, atMost: true},
	"idle node: goroutines":                        {absolute: 12, atMost: true},
	"idle node: heap KB":                           {absolute: 1049, atMost: true},
	"idle node: sockets":                           {absolute: 4, atMost: true},
	"idle, per node of 10: RSS KB":                 {absolute: 300, atMost: true},
	"idle, per node of 10: goroutines":             {absolute: 10, atMost: true},
	"500 nodes that see 10: RSS KB each":           {absolute: 300, atMost: true},
	"500 nodes that see 10: goroutines each":       {absolute: 10, atMost: true},
	"10 nodes, nine 64 MiB transfers: peak RSS MB": {absolute: 150, atMost: true},
	"join with 10000 peers: heap MB":               {absolute: 25, atMost: true},
	"short connections failed, per 1,000":          {absolute: 0, atMost: true},
	"streams lost in 100 runs of 8":                {absolute: 0, atMost: true},

	"Close with 2,000 closed or half-closed connections, ms":                   {absolute: 100, atMost: true},
	"one node, nine 64 MiB transfers: peak RSS MB of who sends":                {absolute: 128, atMost: true},
	"one node, nine 64 MiB transfers: peak RSS MB of who receives":             {absolute: 128, atMost: true},
	"map of 10000 peers: applied in ms":                                        {absolute: 150, atMost: true},
	"map of 10000 peers: change of one peer ms":                                {absolute: 1, atMost: true},
	"map of 10000 peers: heap MB":                                              {absolute: 25, atMost: true},
	"relay alone, 1 pair, window 256: frames per CPU second":                   {factor: 4},
	"relay alone, 8 pairs, flood: frames per CPU second":                       {factor: 4},
	"relay alone, 16 clients to all, runs of 16: frames per CPU second":        {factor: 4},
	"smallest program that listens and dials: MB":                              {absolute: 14, atMost: true},
	"smallest program that listens and dials: packages beside std and our own": {absolute: 90, atMost: true},
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	return (v[len(v)/2] + v[(len(v)-1)/2]) / 2
}

// ratio compares two stacks: the median of what each round says, since what the
// machine is capable of changes more from minute to minute than within a round.
func ratio(a, b []float64) float64 {
	if len(a) != len(b) { // a round failed
		return median(a) / median(b)
	}
	each := make([]float64, len(a))
	for i := range a {
		each[i] = a[i] / b[i]
	}
	return median(each)
}

// print writes the table: medians, and the ratio of the first stack to the
// others.
func (b *bench) print(w io.Writer) {
	if len(b.stacks) == 0 {
		return
	}
	head := []string{"median"}
	for _, s := range b.stacks {
		head = append(head, s.name)
	}
	for _, s := range b.stacks[1:] {
		head = append(head, b.stacks[0].name+" / "+s.name)
	}
	head = append(head, "goal", "met")
	rows := [][]string{head}
	for _, name := range b.names {
		row := []string{name}
		var m []float64
		for _, s := range b.stacks {
			m = append(m, median(b.figures[name][s.name]))
			row = append(row, number(m[len(m)-1]))
		}
		vs := math.NaN() // tsnet
		for _, s := range b.stacks[1:] {
			r := ratio(b.figures[name][b.stacks[0].name], b.figures[name][s.name])
			row = append(row, number(r))
			if s.name == "tsnet" {
				vs = r
			}
		}
		text, met := "", ""
		g, ok := goals[name]
		if ok {
			text, met = g.judge(m[0], vs)
		} else if b.markdown {
			continue
		}
		rows = append(rows, append(row, text, met))
	}
	width := make([]int, len(head))
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	for i, r := range rows {
		var line strings.Builder
		for j, c := range r {
			pad := strings.Repeat(" ", width[j]-len([]rune(c)))
			if j == 0 {
				c += pad
			} else {
				c = pad + c
			}
			line.WriteString("| " + c + " ")
		}
		fmt.Fprintln(w, line.String()+"|")
		if i == 0 {
			for j := range r {
				right := ":"
				if j == 0 {
					right = "-"
				}
				fmt.Fprint(w, "|"+strings.Repeat("-", width[j]+1)+right)
			}
			fmt.Fprintln(w, "|")
		}
	}
}

// judge says what the goal is and whether it is met.
func (g goal) judge(value, ratio float64) (text, met string) {
	sign, v, unit, want := "≥", ratio, "×", g.factor
	if g.factor == 0 {
		v, unit, want = value, "", g.absolute
	}
	if g.atMost {
		sign = "≤"
	}
	text = sign + " " + number(want) + unit
	switch {
	case math.IsNaN(v):
	case g.atMost && v <= want, !g.atMost && v >= want:
		met = "yes"
	default:
		met = "no"
	}
	return text, met
}

// number writes three digits that matter.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return ""
	case v == math.Trunc(v) || math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
