// Command run puts a control server under load and prints what that costs:
//
//	go run ./internal/loadtest/run -nodes 1000
//	go run ./internal/loadtest/run -nodes 10000 -group 100
//	go run ./internal/loadtest/run -replicas 2 -phases join,endpoints,kill
//
// Several replicas share a PostgreSQL server that is started for them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"time"

	"mesh/internal/loadtest"
)

func main() {
	if loadtest.Served() {
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(1)
	}
}

func run() error {
	nodes := flag.Int("nodes", 1000, "how `MANY` nodes")
	group := flag.Int("group", 0, "how `MANY` nodes see each other (default all)")
	phases := flag.String("phases", "join,idle,endpoints,more,policy,reconnect,churn,revoke", "`WHICH` phases, in this order")
	changes := flag.Int("changes", 50, "how `MANY` endpoint changes, new nodes and revocations (a fifth of these)")
	rate := flag.Int("rate", 100, "ephemeral `NODES` a second")
	churn := flag.Duration("churn", 30*time.Second, "how `LONG` ephemeral nodes come")
	idle := flag.Duration("idle", 70*time.Second, "how `LONG` to be idle: keep-alives come once a minute")
	limit := flag.Duration("limit", 30*time.Minute, "most `TIME` that all may take")
	replicas := flag.Int("replicas", 1, "how `MANY` servers; phase kill needs two")
	resume := flag.Bool("resume", true, "nodes resume their map sessions")
	profile := flag.String("profile", "", "`DIR` for profiles: CPU of server and load program in each phase, and the server's heap after it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()

	servers, err := loadtest.StartReplicas(ctx, max(*replicas, 1))
	if err != nil {
		return err
	}
	defer servers.Close()
	server := servers.Last()
	cfg := servers.Config()
	cfg.Nodes, cfg.Group, cfg.Resume = *nodes, *group, *resume
	m, err := loadtest.New(cfg)
	if err != nil {
		return err
	}
	defer m.Close()
	table := map[string]func(context.Context) loadtest.Phase{
		"join":      m.Join,
		"idle":      func(ctx context.Context) loadtest.Phase { return m.Idle(ctx, *idle) },
		"endpoints": func(ctx context.Context) loadtest.Phase { return m.Endpoints(ctx, *changes) },
		"more":      func(ctx context.Context) loadtest.Phase { return m.Newcomers(ctx, max(*changes/5, 1)) },
		"policy":    m.Policy,
		"reconnect": m.Reconnect,
		"churn":     func(ctx context.Context) loadtest.Phase { return m.Churn(ctx, *rate, *churn, 2*time.Second) },
		"kill":      func(ctx context.Context) loadtest.Phase { return m.Kill(ctx, servers) },
		"revoke":    func(ctx context.Context) loadtest.Phase { return m.Revoke(ctx, max(*changes/5, 1)) },
	}
	failed := false
	measured := make(map[string]loadtest.Phase)
	for name := range strings.SplitSeq(*phases, ",") {
		f := table[name]
		if f == nil {
			return fmt.Errorf("no phase %q", name)
		}
		stop, heapFile := func() error { return nil }, ""
		if *profile != "" {
			if stop, err = profiles(server, filepath.Join(*profile, name)); err != nil {
				return err
			}
			heapFile = filepath.Join(*profile, name+".heap.prof")
		}
		p := f(ctx)
		if err := stop(); err != nil {
			return err
		}
		heap, goroutines, err := server.Heap(heapFile)
		if err != nil {
			return err
		}
		fmt.Printf("%s  heap %d MB, %d goroutines\n", p, heap>>20, goroutines)
		measured[name] = p
		failed = failed || p.Err != nil
	}
	if goals := goalsOf(*nodes, *group, *replicas); goals != nil {
		printGoals(os.Stdout, goals, measured)
	}
	if failed {
		return fmt.Errorf("something is wrong")
	}
	return nil
}

// profiles writes CPU profiles of the server and of this program until stop is
// called.
func profiles(server *loadtest.Process, name string) (stop func() error, err error) {
	own, err := os.Create(name + ".load.prof")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(server.Profile(name+".prof"), pprof.StartCPUProfile(own)); err != nil {
		own.Close()
		return nil, err
	}
	return func() error {
		pprof.StopCPUProfile()
		return errors.Join(own.Close(), server.Profile(""))
	}, nil
}
