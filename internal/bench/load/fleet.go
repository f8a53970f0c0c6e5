package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"sync"
)

// FleetArgs tell how to make many nodes in the process, each with a listener
// and somebody who waits for connections.
type FleetArgs struct {
	First, Count int
	Control      string
	Keys         []string // of the groups, which the nodes join in turn
}

// FleetName is the name of a node of a fleet.
func FleetName(i int) string { return fmt.Sprintf("fleet%d", i) }

// fleet brings nodes up, a few at a time.
func (a *agent) fleet(ctx context.Context, f FleetArgs) (any, error) {
	const atOnce = 8
	var wg sync.WaitGroup
	errs := make([]error, f.Count)
	turn := make(chan struct{}, atOnce)
	for k := range f.Count {
		i := f.First + k
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			errs[k] = a.fleetNode(ctx, NodeArgs{
				Name: FleetName(i), Index: i + 1, Control: f.Control, AuthKey: f.Keys[i%len(f.Keys)],
			})
		})
	}
	wg.Wait()
	return nil, errors.Join(errs...)
}

func (a *agent) fleetNode(ctx context.Context, n NodeArgs) error {
	if _, err := a.up(ctx, n); err != nil {
		return err
	}
	l, err := a.node(n.Name).Listen(SinkPort)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return nil
}

// VisitArgs say how many nodes a fleet has, and in how many groups.
type VisitArgs struct{ Count, Groups int }

// visit has each node of a fleet call the next of its group once.
func (a *agent) visit(ctx context.Context, v VisitArgs) (any, error) {
	for i := range v.Count {
		next := i + v.Groups
		if next >= v.Count {
			next = i % v.Groups
		}
		c, err := a.node(FleetName(i)).Dial(ctx, at2(FleetName(next), SinkPort))
		if err != nil {
			return nil, err
		}
		if err := c.Close(); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// GroupsArgs say how many groups to make.
type GroupsArgs struct{ Count int }

func (a *agent) groups(_ context.Context, g GroupsArgs) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.servers.Groups(g.Count)
}

// DumpArgs name the files for what is alive in the process, and the memory it has.
type DumpArgs struct{ Prefix string }

func (a *agent) dump(_ context.Context, d DumpArgs) (any, error) {
	if err := os.MkdirAll(filepath.Dir(d.Prefix), 0o755); err != nil {
		return nil, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	text, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(d.Prefix+"-memstats.json", text, 0o644); err != nil {
		return nil, err
	}
	for _, name := range []string{"goroutine", "heap"} {
		f, err := os.Create(d.Prefix + "-" + name + ".pprof")
		if err != nil {
			return nil, err
		}
		if err := errors.Join(pprof.Lookup(name).WriteTo(f, 0), f.Close()); err != nil {
			return nil, err
		}
	}
	return nil, nil
}
