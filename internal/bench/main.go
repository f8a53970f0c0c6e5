// Program bench measures this library against what users would take instead:
// tsnet, and WireGuard devices over the stack that comes with them. Each runs in
// processes of its own, one after the other in each round, in a network
// namespace that nothing can leave, and every byte of a stream is checked. It
// prints a table of medians and ratios:
//
//	cd internal/bench && go run .
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
	flag.IntVar(&o.short, "short", 2000, "short connections per round")
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
		os.Exit(enter(ours, stock))
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
	fmt.Printf("%s, %s, %s/%s, %d CPUs, %d rounds in %v\n\n", time.Now().Format("2006-01-02"), runtime.Version(),
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), o.rounds, time.Since(begin).Round(time.Second))
	b.print(os.Stdout)
	if len(b.failures) > 0 {
		fmt.Println("\nFailures:")
		for _, f := range b.failures {
			fmt.Println("-", f)
		}
		os.Exit(1)
	}
}

type stringList []string

func (l *stringList) String() string     { return strings.Join(*l, ",") }
func (l *stringList) Set(s string) error { *l = append(*l, s); return nil }

func fatal(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
	os.Exit(1)
}

// build builds the program of a module below this one.
func build(module, into string) (string, error) {
	program := filepath.Join(into, module)
	cmd := exec.Command("go", "build", "-o", program, ".")
	cmd.Dir = module
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s: %w", module, err)
	}
	return program, nil
}

// enter builds what is not built and runs this program again in a network
// namespace of its own. It returns its exit status.
func enter(ours, stock string) int {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		fatal("%v", err)
	}
	defer os.RemoveAll(dir)
	if ours == "" {
		if ours, err = build("ours", dir); err != nil {
			fatal("%v", err)
		}
	}
	if stock == "" {
		if stock, err = build("stock", dir); err != nil {
			fatal("%v", err)
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideEnv+"=1", oursEnv+"="+ours, stockEnv+"="+stock)
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

const (
	insideEnv = "MESH_BENCH_INSIDE"
	oursEnv   = "MESH_BENCH_OURS"
	stockEnv  = "MESH_BENCH_STOCK"
)
