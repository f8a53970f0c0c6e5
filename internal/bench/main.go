// Program bench measures this library against what users would take instead:
// tsnet, and WireGuard devices over the stack that comes with them. Each runs in
// processes of its own, one after the other in each round, in a network
// namespace that nothing can leave, and every byte of a stream is checked. It
// prints a table of medians and ratios:
//
//	cd internal/bench && go run .
//	cd internal/bench && go run . -markdown                          what has a target, for the README
//	cd internal/bench && go run . -only '^repeat$' -repeat 100       no stream of 800 is lost
//	cd internal/bench && go run . -race -rounds 1 -seconds 0.3 -stacks ours -only '^(same|lossy)$'
//
// Tests of the relay alone, and programs that show how large they are, come from
// the modules relay, ours/minimal and stock/minimal.
//
// Absolute figures depend on the machine and on what else it does; ratios of
// one run are what it is for.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// options are the flags.
type options struct {
	rounds   int
	seconds  float64
	short    int
	fleet    int
	repeat   int
	markdown bool
	only     *regexp.Regexp
	stacks   *regexp.Regexp
	profiles string
	verbose  bool
}

func main() {
	var o options
	var ours, stock string
	var also stringList
	flag.IntVar(&o.rounds, "rounds", 5, "rounds; the table has the medians")
	flag.Float64Var(&o.seconds, "seconds", 1.5, "length of a stream or of a series of calls")
	flag.IntVar(&o.short, "short", 20_000, "short connections")
	flag.IntVar(&o.repeat, "repeat", 0, "runs of eight streams of this library, none of which may be lost")
	flag.BoolVar(&o.markdown, "markdown", false, "print only what has a target, with the machine, for a README")
	race := flag.Bool("race", false, "build this library's program with the race detector; its figures mean little")
	flag.IntVar(&o.fleet, "fleet", 500, "nodes of the process full of nodes")
	only := flag.String("only", "", "regular expression of the scenarios to run: "+strings.Join(scenarioNames(), ", "))
	stacks := flag.String("stacks", "", "regular expression of the stacks to measure: ours, tsnet, wg")
	flag.StringVar(&ours, "ours", "", "program ours, already built")
	flag.StringVar(&stock, "stock", "", "program stock, already built")
	flag.Var(&also, "also", "NAME=PROGRAM, another build of ours to measure")
	flag.StringVar(&o.profiles, "profiles", "", "directory for CPU profiles of the streams, and for what idle nodes hold")
	flag.BoolVar(&o.verbose, "v", false, "print each figure when it is measured")
	flag.Parse()
	o.only, o.stacks = regexp.MustCompile(*only), regexp.MustCompile(*stacks)
	if os.Getenv(insideEnv) == "" {
		os.Exit(enter(ours, stock, *race))
	}
	if err := network(); err != nil {
		fatal("prepare the network namespace: %v", err)
	}
	list := []*stack{
		{name: "ours", cmd: []string{os.Getenv(oursEnv)}, servers: true, ours: true},
		{name: "tsnet", cmd: []string{os.Getenv(stockEnv), "tsnet"}, servers: true, relayEnv: "TS_DEBUG_NEVER_DIRECT_UDP=1"},
		{name: "wg", cmd: []string{os.Getenv(stockEnv), "wg"}},
	}
	for _, a := range also {
		name, program, ok := strings.Cut(a, "=")
		if !ok {
			fatal("-also %s: want NAME=PROGRAM", a)
		}
		list = append(list, &stack{name: name, cmd: []string{program}, servers: true, ours: true})
	}
	b := &bench{options: o, figures: make(map[string]map[string][]float64)}
	for _, s := range list {
		if o.stacks.MatchString(s.name) {
			b.stacks = append(b.stacks, s)
		}
	}
	begin := time.Now()
	b.run()
	fmt.Printf("%s, %s, %s/%s, %s, %d rounds in %v\n\n", time.Now().Format("2006-01-02"), runtime.Version(),
		runtime.GOOS, runtime.GOARCH, machine(), o.rounds, time.Since(begin).Round(time.Second))
	b.print(os.Stdout)
	if len(b.failures) > 0 {
		fmt.Println("\nFailures:")
		for _, f := range b.failures {
			fmt.Println("-", f)
		}
		os.Exit(1)
	}
}

// machine says what the figures were measured on.
func machine() string {
	model := ""
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(v) + ", "
				break
			}
		}
	}
	return fmt.Sprintf("%s%d CPUs", model, runtime.NumCPU())
}

type stringList []string

func (l *stringList) String() string     { return strings.Join(*l, ",") }
func (l *stringList) Set(s string) error { *l = append(*l, s); return nil }

func fatal(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
	os.Exit(1)
}

// build builds the program of a module below this one.
func build(module, into string, flags ...string) (string, error) {
	program := filepath.Join(into, module)
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", program, ".")...)
	cmd.Dir = module
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s: %w", module, err)
	}
	return program, nil
}

// enter builds what is not built and runs this program again in a network
// namespace of its own. It returns its exit status.
func enter(ours, stock string, race bool) int {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		fatal("%v", err)
	}
	defer os.RemoveAll(dir)
	if ours == "" {
		var flags []string
		if race {
			flags = append(flags, "-race")
		}
		if ours, err = build("ours", dir, flags...); err != nil {
			fatal("%v", err)
		}
	}
	if stock == "" {
		if stock, err = build("stock", dir); err != nil {
			fatal("%v", err)
		}
	}
	relay, err := build("relay", dir)
	if err != nil {
		fatal("%v", err)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"=1", oursEnv+"="+ours, stockEnv+"="+stock, relayEnv+"="+relay)
	isolate(cmd)
	signal.Ignore(os.Interrupt) // the child hears it as well
	if err := cmd.Run(); err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return e.ExitCode()
		}
		fatal("make a network namespace (root or user namespaces are needed): %v", err)
	}
	return 0
}

// loopbackMTU is what Linux gives to loopback.
const loopbackMTU = 65536

const (
	insideEnv = "MESH_BENCH_INSIDE"
	oursEnv   = "MESH_BENCH_OURS"
	stockEnv  = "MESH_BENCH_STOCK"
	relayEnv  = "MESH_BENCH_RELAY"
)
