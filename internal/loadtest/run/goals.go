package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"mesh/internal/loadtest"
)

// goal is what a phase is to reach on two cores that server and load share.
type goal struct {
	phase string // its name in -phases
	what  string
	most  float64
	unit  string
	is    func(loadtest.Phase) float64
}

func took(p loadtest.Phase) float64 { return p.Took.Seconds() }
func cpu(p loadtest.Phase) float64  { return p.CPU.Seconds() }
func peak(p loadtest.Phase) float64 { return float64(p.Usage.Peak) / (1 << 20) }

// cpuEach is the server's CPU time for each change, in milliseconds.
func cpuEach(p loadtest.Phase) float64 { return p.CPU.Seconds() * 1000 / float64(max(p.Count, 1)) }

// busy is the share of one core that the server used, in percent.
func busy(p loadtest.Phase) float64 { return 100 * p.CPU.Seconds() / max(p.Took.Seconds(), 1e-9) }

func each(q float64) func(loadtest.Phase) float64 {
	return func(p loadtest.Phase) float64 { return float64(p.Quantile(q)) / float64(time.Millisecond) }
}

// goalsOf returns the goals for a mesh of that size; those of 1,000 nodes that
// all see each other and of 10,000 in groups of 100 are decided, and no others.
func goalsOf(nodes, group, replicas int) []goal {
	switch {
	case replicas > 1 && nodes == 1000 && (group == 0 || group >= nodes):
		return []goal{{"kill", "back at another replica, slowest", 10000, "ms", each(1)}}
	case replicas > 1:
		return nil
	case nodes == 1000 && (group == 0 || group >= nodes):
		return []goal{
			{"join", "join until all see all", 15, "s", took},
			{"join", "server CPU", 20, "s", cpu},
			{"join", "peak RSS", 400, "MB", peak},
			{"endpoints", "endpoint change, p50", 60, "ms", each(0.5)},
			{"endpoints", "endpoint change, p99", 250, "ms", each(0.99)},
			{"endpoints", "server CPU of each", 25, "ms", cpuEach},
			{"more", "one more node, p99", 1000, "ms", each(0.99)},
			{"more", "server CPU of each", 500, "ms", cpuEach},
			{"reconnect", "all reconnect", 5, "s", took},
			{"revoke", "revocation, slowest", 1000, "ms", each(1)},
		}
	case nodes == 10000 && group == 100:
		return []goal{
			{"join", "join", 120, "s", took},
			{"join", "peak RSS", 3072, "MB", peak},
			{"idle", "CPU while idle", 2, "% of a core", busy},
			{"endpoints", "endpoint change, p99", 300, "ms", each(0.99)},
			{"policy", "edit of one rule, slowest", 1000, "ms", each(1)},
		}
	}
	return nil
}

// printGoals compares what was measured, by the name of the phase.
func printGoals(w io.Writer, goals []goal, measured map[string]loadtest.Phase) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nphase\twhat\tmeasured\tgoal\tmet")
	for _, g := range goals {
		p, ok := measured[g.phase]
		if !ok {
			continue
		}
		met := "yes"
		if g.is(p) > g.most || p.Err != nil {
			met = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%.4g %s\t≤ %g %s\t%s\n", g.phase, g.what, g.is(p), g.unit, g.most, g.unit, met)
	}
	t.Flush()
}
