package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"mesh/internal/bench/load"
)

// closing closes a node with many connections that were closed by it first, or
// half closed.
func closing(b *bench, s *stack) error {
	const each = 1000
	w, from, to, err := twoNodes(b, s, "close", 1, nil)
	if err != nil {
		return err
	}
	defer w.close()
	if err := from.p.call("halves", load.HalvesArgs{Node: from.name, Addr: to.addr, Closed: each, Half: each}, nil); err != nil {
		return err
	}
	var c load.Closed
	if err := to.p.call("down", load.NodeName{Node: to.name}, &c); err != nil {
		return err
	}
	if c.Hung && s.ours {
		b.fail("%s: close: it has not returned after %.0f s", s.name, c.Seconds)
	}
	b.add(s, "Close with 2,000 closed or half-closed connections, ms", c.Seconds*1e3)
	return nil
}

// box moves nine times 64 MiB between two processes of one node each, as two
// agents do in sandboxes.
func box(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "box", 2, nil)
	if err != nil {
		return err
	}
	defer w.close()
	args := load.SpreadArgs{Node: from.name, Bytes: 64 << 20}
	for range 9 {
		args.Addrs = append(args.Addrs, to.port(load.SinkPort))
	}
	var moved load.Streamed
	if err := from.p.call("spread", args, &moved); err != nil {
		return err
	}
	var sunk load.Sunk
	if err := to.p.call("sunk", load.None{}, &sunk); err != nil {
		return err
	}
	for _, l := range append(moved.Lost, sunk.Failed...) {
		b.fail("%s: box: %s", s.name, l)
	}
	for name, p := range map[string]*process{"sends": from.p, "receives": to.p} {
		var u load.Usage
		if err := p.call("usage", load.UsageArgs{}, &u); err != nil {
			return err
		}
		b.add(s, "one node, nine 64 MiB transfers: peak RSS MB of who "+name, u.Peak/1e6)
	}
	return nil
}

// lossyStreams moves checked bytes over a network that loses and reorders.
func lossyStreams(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "lossy", 1, func(w *world) { w.lossy = true })
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range []int{1, 8} {
		if err := w.stream("with loss and reordering", from, to, n); err != nil {
			return err
		}
	}
	return nil
}

// repeated runs eight streams again and again.
func repeated(b *bench, s *stack) error {
	if b.repeat == 0 {
		return nil
	}
	w, from, to, err := twoNodes(b, s, "repeat", 1, nil)
	if err != nil {
		return err
	}
	defer w.close()
	lost := 0
	for i := range b.repeat {
		var moved load.Streamed
		if err := from.p.call("stream", load.StreamArgs{
			Node: from.name, Addr: to.port(load.SinkPort), Streams: 8, Seconds: min(b.seconds, 0.5),
		}, &moved); err != nil {
			return err
		}
		lost += len(moved.Lost)
		for _, l := range moved.Lost {
			b.fail("%s: run %d of 8 streams: %s", s.name, i+1, l)
		}
	}
	b.add(s, fmt.Sprintf("streams lost in %d runs of 8", b.repeat), float64(lost))
	return nil
}

// applied measures what becomes of a map once it is decoded.
func applied(b *bench, s *stack) error {
	p, err := start(s, "node")
	if err != nil {
		return err
	}
	defer p.stop()
	for _, peers := range []int{1000, 10_000} {
		var a load.Applied
		if err := p.call("apply", load.ApplyArgs{Peers: peers}, &a); err != nil {
			return err
		}
		prefix := fmt.Sprintf("map of %d peers: ", peers)
		b.add(s, prefix+"applied in ms", a.First*1e3)
		b.add(s, prefix+"change of one peer ms", a.Delta*1e3)
		b.add(s, prefix+"heap MB", a.Heap/1e6)
	}
	return nil
}

// binary measures the smallest program that listens and dials.
func binary(b *bench, s *stack) error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	module := map[bool]string{true: "ours", false: "stock"}[s.ours]
	run := func(args ...string) (string, error) {
		var out, errs bytes.Buffer
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = module, &out, &errs
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("go %s: %w: %s", args[0], err, &errs)
		}
		return out.String(), nil
	}
	program := filepath.Join(dir, "minimal")
	if _, err := run("build", "-ldflags=-s -w", "-o", program, "./minimal"); err != nil {
		return err
	}
	st, err := os.Stat(program)
	if err != nil {
		return err
	}
	b.add(s, "smallest program that listens and dials: MB", float64(st.Size())/1e6)
	list, err := run("list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./minimal")
	if err != nil {
		return err
	}
	n := 0
	for p := range strings.FieldsSeq(list) {
		if p != "mesh" && !strings.HasPrefix(p, "mesh/") {
			n++
		}
	}
	b.add(s, "smallest program that listens and dials: packages beside std and our own", float64(n))
	return nil
}

// relayLine is a line that the program of the module relay prints.
var relayLine = regexp.MustCompile(`(?m)^(.{34}) (?:stock|ours) +(\d+) +(\d+) `)

// relayAlone loads a relay with frames, without nodes.
func relayAlone(b *bench, s *stack) error {
	kind := map[bool]string{true: "ours", false: "stock"}[s.ours]
	for _, name := range []string{"1 pair, window 256", "8 pairs, flood", "16 clients to all, runs of 16"} {
		var out, errs bytes.Buffer
		cmd := exec.Command(os.Getenv(relayEnv), "-rounds", "1", "-for", "1s", "-kinds", kind, "-only", name)
		cmd.Stdout, cmd.Stderr = &out, &errs
		together(cmd)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%w: %s", err, &errs)
		}
		m := relayLine.FindStringSubmatch(out.String())
		if m == nil {
			return fmt.Errorf("no figures in %q", out.String())
		}
		for i, what := range []string{"frames/s", "frames per CPU second"} {
			v, err := strconv.ParseFloat(m[2+i], 64)
			if err != nil {
				return err
			}
			b.add(s, "relay alone, "+name+": "+what, v)
		}
	}
	return nil
}
