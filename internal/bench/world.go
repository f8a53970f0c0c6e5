package main

import (
	"fmt"
	"net"
	"strconv"

	"mesh/internal/bench/load"
)

// world is what one scenario has running of one stack.
type world struct {
	b         *bench
	stack     *stack
	scenario  string
	relayed   bool
	lossy     bool
	servers   *process // nil if the stack needs none
	info      load.ServersInfo
	count     int // nodes to come
	index     int
	processes []*process
}

// newWorld starts the servers that a stack needs, or those of another.
func newWorld(b *bench, s *stack, scenario string, count int, serve *stack) (*world, error) {
	w := &world{b: b, stack: s, scenario: scenario, count: count}
	if !serve.servers {
		return w, nil
	}
	p, err := start(serve, "servers")
	if err != nil {
		return nil, err
	}
	w.processes = append(w.processes, p)
	w.servers = p
	if err := p.call("servers", load.None{}, &w.info); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// twoNodes makes a world of two nodes, in one process or in two, that have found
// the path that they should use. change, if there is one, comes before they start.
func twoNodes(b *bench, s *stack, scenario string, processes int, change func(*world)) (w *world, from, to place, err error) {
	if w, err = newWorld(b, s, scenario, 2, s); err != nil {
		return nil, from, to, err
	}
	if change != nil {
		change(w)
	}
	if from, to, err = w.pair(processes); err != nil {
		w.close()
		return nil, from, to, err
	}
	return w, from, to, nil
}

func (w *world) close() {
	for i := len(w.processes) - 1; i >= 0; i-- {
		w.processes[i].stop()
	}
}

func (w *world) process(name string) (*process, error) {
	var env []string
	if w.relayed && w.stack.relayEnv != "" {
		env = append(env, w.stack.relayEnv)
	}
	p, err := start(w.stack, name, env...)
	if err == nil {
		w.processes = append(w.processes, p)
	}
	return p, err
}

// place is a node somewhere.
type place struct {
	p          *process
	name, addr string
	seconds    float64 // to come up
}

func (w *world) node(p *process, name string) (place, error) {
	w.index++
	var j load.Joined
	err := p.call("up", load.NodeArgs{
		Name: name, Index: w.index, Count: w.count, Control: w.info.Control, AuthKey: w.info.AuthKey, Relay: w.relayed, Lossy: w.lossy,
	}, &j)
	return place{p, name, j.Addr, j.Seconds}, err
}

// pair makes two nodes, in one process or in two, of which the second serves,
// and lets them find the path that they should use.
func (w *world) pair(processes int) (a, b place, err error) {
	pa, err := w.process("a")
	if err != nil {
		return a, b, err
	}
	pb := pa
	if processes == 2 {
		if pb, err = w.process("b"); err != nil {
			return a, b, err
		}
	}
	if a, err = w.node(pa, "a"); err != nil {
		return a, b, err
	}
	if b, err = w.node(pb, "b"); err != nil {
		return a, b, err
	}
	return a, b, w.meet(a, b)
}

func (w *world) meet(a, b place) error {
	if err := b.p.call("serve", load.NodeName{Node: b.name}, nil); err != nil {
		return err
	}
	if w.stack.servers {
		if err := a.p.call("peers", load.PeersArgs{Node: a.name, Count: 1}, nil); err != nil {
			return err
		}
	}
	return a.p.call("settle", load.SettleArgs{Node: a.name, Addr: b.addr, Relay: w.relayed}, nil)
}

func (p place) port(n int) string { return net.JoinHostPort(p.addr, strconv.Itoa(n)) }

// cpu is the sum of what processes have used so far, each counted once.
func cpu(processes ...*process) (float64, error) {
	sum := 0.0
	seen := make(map[*process]bool)
	for _, p := range processes {
		if p == nil || seen[p] {
			continue
		}
		seen[p] = true
		var u load.Usage
		if err := p.call("usage", load.UsageArgs{}, &u); err != nil {
			return 0, err
		}
		sum += u.CPU
	}
	return sum, nil
}

// stream measures streams from a to b.
func (w *world) stream(prefix string, a, b place, streams int) error {
	before, err := cpu(a.p, b.p, w.servers)
	if err != nil {
		return err
	}
	profiled := make(chan error, 1)
	if w.b.profiles != "" {
		file := fmt.Sprintf("%s/%s-%s-%d.pprof", w.b.profiles, w.stack.name, w.scenario, streams)
		go func() { profiled <- b.p.call("profile", load.ProfileArgs{File: file, Seconds: w.b.seconds}, nil) }()
	} else {
		profiled <- nil
	}
	var s load.Streamed
	if err := a.p.call("stream", load.StreamArgs{
		Node: a.name, Addr: b.port(load.SinkPort), Streams: streams, Seconds: w.b.seconds,
	}, &s); err != nil {
		return err
	}
	after, err := cpu(a.p, b.p, w.servers)
	if err != nil {
		return err
	}
	if err := <-profiled; err != nil {
		return err
	}
	var sunk load.Sunk
	if err := b.p.call("sunk", load.None{}, &sunk); err != nil {
		return err
	}
	for _, f := range append(s.Lost, sunk.Failed...) {
		w.b.fail("%s: %s, %d streams: %s", w.stack.name, w.scenario, streams, f)
	}
	gb := float64(s.Bytes) / 1e9
	w.b.add(w.stack, prefix+fmt.Sprintf(" %d stream MB/s", streams), gb*1e3/s.Seconds)
	w.b.add(w.stack, prefix+fmt.Sprintf(" %d stream CPU-s/GB", streams), (after-before)/gb)
	w.b.add(w.stack, prefix+fmt.Sprintf(" %d streams lost", streams), float64(len(s.Lost)))
	return nil
}

// calls measures small calls from a to b.
func (w *world) calls(prefix string, a, b place) error {
	var t load.Times
	if err := a.p.call("pingpong", load.CountArgs{Node: a.name, Addr: b.addr, Count: 3000}, &t); err != nil {
		return err
	}
	w.b.add(w.stack, prefix+" 1 byte RTT p50 µs", t.P50)
	w.b.add(w.stack, prefix+" 1 byte RTT p99 µs", t.P99)
	for _, clients := range []int{1, 64} {
		before, err := cpu(a.p, b.p, w.servers)
		if err != nil {
			return err
		}
		if err := a.p.call("http", load.CountArgs{Node: a.name, Addr: b.addr, Clients: clients, Seconds: w.b.seconds}, &t); err != nil {
			return err
		}
		after, err := cpu(a.p, b.p, w.servers)
		if err != nil {
			return err
		}
		w.b.add(w.stack, fmt.Sprintf("%s HTTP %d req/s", prefix, clients), float64(t.Count)/t.Seconds)
		w.b.add(w.stack, fmt.Sprintf("%s HTTP %d CPU-µs/req", prefix, clients), (after-before)*1e6/float64(t.Count))
		w.b.add(w.stack, fmt.Sprintf("%s HTTP %d p99 µs", prefix, clients), t.P99)
		if t.Failed > 0 {
			w.b.fail("%s: %s: HTTP with %d clients: %d failed: %s", w.stack.name, w.scenario, clients, t.Failed, t.First)
		}
	}
	return nil
}
