package main

import (
	"fmt"

	"mesh/internal/bench/load"
)

// scenario measures one thing of one stack.
type scenario struct {
	name string
	run  func(b *bench, s *stack) error
	not  string // the stack that cannot
	ours bool   // only this library can
	most int    // rounds that are enough; 0 = all
}

var scenarios = []scenario{
	{name: "same", run: same},
	{name: "equal", run: equal},
	{name: "two", run: two},
	{name: "relay", run: relayed, not: "wg"},
	{name: "join", run: join, not: "wg"},
	{name: "short", run: short, most: 1},   // tsnet hangs for seconds in some
	{name: "close", run: closing, most: 1}, // as it does here
	{name: "idle", run: idle},
	{name: "fleet", run: fleet, ours: true, most: 1},
	{name: "ten", run: ten, most: 3},
	{name: "box", run: box, most: 3},
	{name: "lossy", run: lossyStreams, ours: true, most: 2},
	{name: "repeat", run: repeated, ours: true, most: 1},
	{name: "map1000", run: func(b *bench, s *stack) error { return netmap(b, s, 1000) }, not: "wg"},
	{name: "map10000", run: func(b *bench, s *stack) error { return netmap(b, s, 10000) }, not: "wg"},
	{name: "apply", run: applied, ours: true},
	{name: "alone", run: relayAlone, not: "wg", most: 3},
	{name: "binary", run: binary, not: "wg", most: 1},
}

func scenarioNames() (names []string) {
	for _, s := range scenarios {
		names = append(names, s.name)
	}
	return names
}

func same(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "same", 1, nil)
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range []int{1, 8} {
		if err := w.stream("same", from, to, n); err != nil {
			return err
		}
	}
	if err := w.calls("same", from, to); err != nil {
		return err
	}
	var t load.Times
	if err := from.p.call("dials", load.CountArgs{Node: from.name, Addr: to.addr, Count: 200}, &t); err != nil {
		return err
	}
	b.add(s, "warm dial p50 µs", t.P50)
	b.add(s, "warm dial p99 µs", t.P99)
	var u load.Usage
	if err := from.p.call("usage", load.UsageArgs{Collect: true}, &u); err != nil {
		return err
	}
	b.add(s, "after the burst, two nodes: RSS MB", u.RSS/1e6)
	b.add(s, "after the burst, two nodes: heap MB", u.Heap/1e6)
	return nil
}

// equal is on links of 1,500 bytes, as most are: there this library, too, has to
// make do with packets of 1,280 bytes. The loopback of the other scenarios lets it
// find out that larger ones pass.
func equal(b *bench, s *stack) error {
	if err := loopback(1500); err != nil {
		return err
	}
	defer loopback(loopbackMTU)
	w, from, to, err := twoNodes(b, s, "equal", 1, nil)
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range []int{1, 8} {
		if err := w.stream("equal MTU 1280", from, to, n); err != nil {
			return err
		}
	}
	return nil
}

func two(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "two", 2, nil)
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range []int{1, 8} {
		if err := w.stream("two processes", from, to, n); err != nil {
			return err
		}
	}
	return w.calls("two processes", from, to)
}

// relayed is with TLS, and the relay in a process of its own; CPU time is that
// of both ends and of the relay.
func relayed(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "relay", 1, func(w *world) { w.relayed = true })
	if err != nil {
		return err
	}
	defer w.close()
	for _, n := range []int{1, 8} {
		if err := w.stream("relay", from, to, n); err != nil {
			return err
		}
	}
	return w.calls("relay", from, to)
}

// join measures nodes that come up, and first connections.
func join(b *bench, s *stack) error {
	const each = 5
	w, err := newWorld(b, s, "join", 1, s)
	if err != nil {
		return err
	}
	defer w.close()
	from, to, err := w.pair(1)
	if err != nil {
		return err
	}
	dial := func(n place, to place) (float64, error) {
		var t load.Times
		err := n.p.call("dials", load.CountArgs{Node: n.name, Addr: to.addr, Count: 1}, &t)
		return t.P50 / 1e3, err
	}
	var fresh []place
	for i := range each {
		n, err := w.node(from.p, fmt.Sprintf("new%d", i))
		if err != nil {
			return err
		}
		b.add(s, "join ms", n.seconds*1e3)
		// The server's netmap has to have it, too: a dial waits for that.
		first, err := dial(n, to)
		if err != nil {
			return err
		}
		b.add(s, "new node to first dial ms", n.seconds*1e3+first)
		fresh = append(fresh, n)
	}
	for _, n := range fresh {
		if err := n.p.call("serve", load.NodeName{Node: n.name}, nil); err != nil {
			return err
		}
	}
	if err := from.p.call("peers", load.PeersArgs{Node: from.name, Count: 1 + each}, nil); err != nil {
		return err
	}
	for _, n := range fresh {
		ms, err := dial(from, n)
		if err != nil {
			return err
		}
		b.add(s, "cold dial, settled pair ms", ms)
	}
	return nil
}

// short opens connections that the server closes first.
func short(b *bench, s *stack) error {
	w, from, to, err := twoNodes(b, s, "short", 1, nil)
	if err != nil {
		return err
	}
	defer w.close()
	var t load.Times
	if err := from.p.call("short", load.CountArgs{Node: from.name, Addr: to.addr, Count: b.short}, &t); err != nil {
		return err
	}
	b.add(s, "short connections per second", float64(t.Count)/t.Seconds)
	b.add(s, "short connections failed, per 1,000", 1000*float64(t.Failed)/float64(t.Count+t.Failed))
	if t.Failed > 0 {
		b.fail("%s: short: %d of %d connections failed: %s", s.name, t.Failed, t.Count+t.Failed, t.First)
	}
	return nil
}

// idle measures a node that has nothing to do, alone and among ten.
func idle(b *bench, s *stack) error {
	const more = 10
	w, err := newWorld(b, s, "idle", more+1, s)
	if err != nil {
		return err
	}
	defer w.close()
	p, err := w.process("nodes")
	if err != nil {
		return err
	}
	var none, one, all load.Usage
	if err := p.call("usage", load.UsageArgs{Collect: true}, &none); err != nil {
		return err
	}
	n, err := w.node(p, "n0")
	if err != nil {
		return err
	}
	if err := p.call("usage", load.UsageArgs{Collect: true}, &one); err != nil {
		return err
	}
	if b.profiles != "" {
		if err := p.call("dump", load.DumpArgs{Prefix: b.profiles + "/" + s.name + "-idle"}, nil); err != nil {
			return err
		}
	}
	b.add(s, "idle node: heap KB", (one.Heap-none.Heap)/1e3)
	b.add(s, "idle node: goroutines", one.Goroutines-none.Goroutines)
	b.add(s, "idle node: sockets", one.Sockets-none.Sockets)
	b.add(s, "idle node: descriptors", one.Files-none.Files)
	for i := range more {
		if _, err := w.node(p, fmt.Sprintf("n%d", i+1)); err != nil {
			return err
		}
	}
	if err := p.call("peers", load.PeersArgs{Node: n.name, Count: more}, nil); err != nil {
		return err
	}
	if err := p.call("usage", load.UsageArgs{Collect: true}, &all); err != nil {
		return err
	}
	b.add(s, "idle, per node of 10: RSS KB", (all.RSS-one.RSS)/more/1e3)
	b.add(s, "idle, per node of 10: heap KB", (all.Heap-one.Heap)/more/1e3)
	b.add(s, "idle, per node of 10: goroutines", (all.Goroutines-one.Goroutines)/more)
	return nil
}

// ten makes one of ten nodes send 64 MiB to each of the others at once.
func ten(b *bench, s *stack) error {
	const nodes = 10
	w, err := newWorld(b, s, "ten", nodes, s)
	if err != nil {
		return err
	}
	defer w.close()
	p, err := w.process("nodes")
	if err != nil {
		return err
	}
	from, err := w.node(p, "n0")
	if err != nil {
		return err
	}
	var to []place
	for i := 1; i < nodes; i++ {
		n, err := w.node(p, fmt.Sprintf("n%d", i))
		if err != nil {
			return err
		}
		to = append(to, n)
	}
	args := load.SpreadArgs{Node: from.name, Bytes: 64 << 20}
	for _, n := range to {
		if err := w.meet(from, n); err != nil {
			return err
		}
		args.Addrs = append(args.Addrs, n.port(load.SinkPort))
	}
	var moved load.Streamed
	if err := p.call("spread", args, &moved); err != nil {
		return err
	}
	for _, l := range moved.Lost {
		b.fail("%s: ten: %s", s.name, l)
	}
	var u load.Usage
	if err := p.call("usage", load.UsageArgs{}, &u); err != nil {
		return err
	}
	b.add(s, "10 nodes, nine 64 MiB transfers: peak RSS MB", u.Peak/1e6)
	b.add(s, "10 nodes, nine 64 MiB transfers: MB/s", float64(moved.Bytes)/1e6/moved.Seconds)
	return nil
}

// netmap joins a mesh of peers that do not exist, on the same stock test
// server, which is the only one that invents some.
func netmap(b *bench, s *stack, peers int) error {
	serve := b.server()
	if serve == nil {
		return nil
	}
	w, err := newWorld(b, s, fmt.Sprint("map", peers), 1, serve)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.servers.call("fake", load.FakeArgs{Count: peers}, nil); err != nil {
		return err
	}
	p, err := w.process("node")
	if err != nil {
		return err
	}
	var before, after load.Usage
	if err := p.call("usage", load.UsageArgs{Collect: true}, &before); err != nil {
		return err
	}
	n, err := w.node(p, "n")
	if err != nil {
		return err
	}
	var waited float64
	if err := p.call("peers", load.PeersArgs{Node: n.name, Count: peers}, &waited); err != nil {
		return err
	}
	if err := p.call("usage", load.UsageArgs{}, &after); err != nil {
		return err
	}
	prefix := fmt.Sprintf("join with %d peers: ", peers)
	b.add(s, prefix+"ms", (n.seconds+waited)*1e3)
	b.add(s, prefix+"CPU ms", (after.CPU-before.CPU)*1e3)
	if err := p.call("usage", load.UsageArgs{Collect: true}, &after); err != nil {
		return err
	}
	b.add(s, prefix+"heap MB", (after.Heap-before.Heap)/1e6)
	return nil
}
