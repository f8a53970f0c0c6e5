package main

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// TestBench runs the program as a user would, for a moment: every stack moves
// checked bytes and answers calls, and the table has ours. Others may fail, as
// tsnet does when it loses a stream.
func TestBench(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs network namespaces of Linux")
	}
	program := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var out, errs bytes.Buffer
	cmd := exec.Command(program, "-rounds", "1", "-seconds", "0.2", "-only", "^(same|relay|idle)$")
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	failures := regexp.MustCompile(`(?m)^- .*`).FindAllString(out.String(), -1)
	ours := slices.ContainsFunc(failures, func(f string) bool { return strings.HasPrefix(f, "- ours:") })
	if err != nil && (ours || len(failures) == 0) {
		t.Fatalf("%v\n%s\n%s", err, &out, &errs)
	}
	for _, row := range []string{"same 1 stream MB/s", "same 8 stream CPU-s/GB", "relay 1 stream MB/s", "idle node: heap KB"} {
		if !regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(row) + ` +\| +[0-9.]+ \|`).MatchString(out.String()) {
			t.Errorf("no figures for %q", row)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

// TestBenchUnderRace moves checked bytes over a network that loses and reorders,
// with this library built with the race detector, and reports no figure but that.
func TestBenchUnderRace(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs network namespaces of Linux")
	}
	if testing.Short() {
		t.Skip("builds with the race detector")
	}
	program := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	out, err := exec.Command(program, "-race", "-rounds", "1", "-seconds", "0.3", "-stacks", "ours", "-only", "^lossy$").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, row := range []string{"with loss and reordering 1 streams lost", "with loss and reordering 8 streams lost"} {
		if !regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(row) + ` +\| +0 `).Match(out) {
			t.Errorf("no zero for %q in\n%s", row, out)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{3, 1, 2}, 2}, {[]float64{4, 1, 2, 3}, 2.5}, {[]float64{7}, 7}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}

func TestTable(t *testing.T) {
	tsnet := &stack{name: "tsnet"}
	ours := &stack{name: "ours"}
	b := &bench{stacks: []*stack{ours, tsnet}, figures: make(map[string]map[string][]float64)}
	b.add(ours, "same 1 stream MB/s", 900)
	b.add(tsnet, "same 1 stream MB/s", 300)
	b.add(ours, "idle node: goroutines", 20)
	b.add(ours, "same HTTP 1 p99 µs", 20)
	var short strings.Builder
	b.markdown = true
	if b.print(&short); strings.Contains(short.String(), "p99") || !strings.Contains(short.String(), "idle node") {
		t.Errorf("the short table has other rows than those with a target:\n%s", &short)
	}
	b.markdown = false
	var out strings.Builder
	b.print(&out)
	for _, want := range []string{
		"| same 1 stream MB/s    |  900 |   300 |            3 | ≥ 2.50× | yes |",
		"| idle node: goroutines |   20 |       |              |    ≤ 12 |  no |",
	} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("no line %q in\n%s", want, out.String())
		}
	}
}
