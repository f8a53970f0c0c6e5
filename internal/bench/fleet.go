package main

import (
	"fmt"

	"mesh/internal/bench/load"
)

// fleet measures many idle nodes in one process, each with a listener: in groups
// of eleven that see only their own, and all seeing all. The servers are another
// process.
func fleet(b *bench, s *stack) error {
	const group = 11
	for _, f := range []struct {
		name   string
		groups int
	}{
		{fmt.Sprintf("%d nodes that see 10: ", b.fleet), max(1, b.fleet/group)},
		{fmt.Sprintf("%d nodes that see all: ", b.fleet), 1},
	} {
		if err := fleetOf(b, s, f.name, f.groups); err != nil {
			return fmt.Errorf("%s%w", f.name, err)
		}
	}
	return nil
}

func fleetOf(b *bench, s *stack, prefix string, groups int) error {
	const step = 50 // nodes that come up in one call
	w, err := newWorld(b, s, "fleet", b.fleet, s)
	if err != nil {
		return err
	}
	defer w.close()
	var keys []string
	if err := w.servers.call("groups", load.GroupsArgs{Count: groups}, &keys); err != nil {
		return err
	}
	p, err := w.process("nodes")
	if err != nil {
		return err
	}
	var none, all load.Usage
	if err := p.call("usage", load.UsageArgs{Collect: true}, &none); err != nil {
		return err
	}
	for i := 0; i < b.fleet; i += step {
		if err := p.call("fleet", load.FleetArgs{
			First: i, Count: min(step, b.fleet-i), Control: w.info.Control, Keys: keys,
		}, nil); err != nil {
			return err
		}
	}
	for i := range b.fleet {
		own := (b.fleet - 1 - i%groups) / groups // others of its group
		if err := p.call("peers", load.PeersArgs{Node: load.FleetName(i), Count: own}, nil); err != nil {
			return err
		}
	}
	if err := p.call("usage", load.UsageArgs{Collect: true}, &all); err != nil {
		return err
	}
	if b.profiles != "" {
		if err := p.call("dump", load.DumpArgs{Prefix: fmt.Sprintf("%s/%s-fleet-%d-in-%d", b.profiles, s.name, b.fleet, groups)}, nil); err != nil {
			return err
		}
	}
	n := float64(b.fleet)
	b.add(s, prefix+"RSS KB each", (all.RSS-none.RSS)/n/1e3)
	b.add(s, prefix+"heap KB each", (all.Heap-none.Heap)/n/1e3)
	b.add(s, prefix+"goroutines each", (all.Goroutines-none.Goroutines)/n-1) // but for the one that waits in Accept
	b.add(s, prefix+"descriptors each", (all.Files-none.Files)/n)
	b.add(s, prefix+"CPU ms to come up, each", (all.CPU-none.CPU)*1e3/n)
	if groups == 1 {
		return nil
	}
	if err := p.call("visit", load.VisitArgs{Count: b.fleet, Groups: groups}, nil); err != nil {
		return err
	}
	if err := p.call("usage", load.UsageArgs{Collect: true}, &all); err != nil {
		return err
	}
	b.add(s, prefix+"RSS KB each, when all have called and were", (all.RSS-none.RSS)/n/1e3)
	b.add(s, prefix+"goroutines each, when all have called and were", (all.Goroutines-none.Goroutines)/n-1)
	return nil
}
