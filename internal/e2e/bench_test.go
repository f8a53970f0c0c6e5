package e2e

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// report gives the median and the slowest of some durations.
func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/median")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms/worst")
	b.ReportMetric(0, "ns/op")
}

// accept takes connections and drops them.
func accept(b *testing.B, n *mesh.Node, addr string) net.Listener {
	l, err := n.Listen("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	})
	b.Cleanup(func() { l.Close(); wg.Wait() })
	return l
}

// BenchmarkJoin measures Up of a node that is new, on an idle server.
func BenchmarkJoin(b *testing.B) {
	m := meshtest.Start(b, openPolicy)
	key := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Ephemeral: true})
	var took []time.Duration
	for b.Loop() {
		n := &mesh.Node{Hostname: "n", ControlURL: m.Host.URL(), AuthKey: key, Ephemeral: true}
		begin := time.Now()
		if _, err := n.Up(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
		n.Close()
	}
	report(b, took)
}

// BenchmarkRejoin measures Up of a node that has its state.
func BenchmarkRejoin(b *testing.B) {
	m := meshtest.Start(b, openPolicy)
	key := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
	store := new(identity.MemoryStore)
	var took []time.Duration
	for b.Loop() {
		n := &mesh.Node{Hostname: "n", ControlURL: m.Host.URL(), AuthKey: key, Store: store}
		begin := time.Now()
		if _, err := n.Up(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
		n.Close()
	}
	report(b, took)
}

// BenchmarkColdDial measures the first connection between two nodes that are
// up and new to each other, with nothing waited for in between; goal 1.
func BenchmarkColdDial(b *testing.B) {
	for _, p := range paths {
		b.Run(p.name, func(b *testing.B) {
			m := meshtest.Start(b, openPolicy)
			server := m.Node("server", []string{"tag:a"}, p.opt)
			meshtest.Up(b, server)
			accept(b, server, ":1")
			key := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Ephemeral: true})
			var took []time.Duration
			for b.Loop() {
				n := &mesh.Node{Hostname: "n", ControlURL: m.Host.URL(), AuthKey: key, Ephemeral: true}
				p.opt(n)
				meshtest.Up(b, n)
				begin := time.Now()
				c, err := n.Dial(b.Context(), "tcp", "server:1")
				if err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
				c.Close()
				n.Close()
			}
			report(b, took)
		})
	}
}

// BenchmarkDial measures connections over a tunnel that is there, allowed and
// denied.
func BenchmarkDial(b *testing.B) {
	for _, p := range paths {
		m := meshtest.Start(b, narrowPolicy)
		client, server := m.Node("client", []string{"tag:a"}, p.opt), m.Node("server", []string{"tag:b"}, p.opt)
		meshtest.Up(b, client, server)
		know(b, client, server)
		accept(b, server, ":1000")
		meshtest.Until(b, "the path to be "+p.want, func() bool {
			c, err := client.Dial(b.Context(), "tcp", "server:1000")
			if err != nil {
				b.Fatal(err)
			}
			c.Close()
			return pathTo(client, server) == p.want
		})
		for _, port := range []int{1000, 1001} {
			b.Run(fmt.Sprintf("%s/%s", p.name, map[int]string{1000: "warm", 1001: "denied"}[port]), func(b *testing.B) {
				var took []time.Duration
				for b.Loop() {
					begin := time.Now()
					c, err := client.Dial(b.Context(), "tcp", fmt.Sprintf("server:%d", port))
					took = append(took, time.Since(begin))
					if (err == nil) != (port == 1000) {
						b.Fatal(err)
					}
					if err == nil {
						c.Close()
					}
				}
				report(b, took)
			})
		}
		client.Close()
		server.Close()
		m.Stop()
	}
}

// BenchmarkIdleNode measures what one more idle node costs in a process: of
// many, that share servers in another process.
func BenchmarkIdleNode(b *testing.B) {
	const nodes = 10
	for b.Loop() {
		w := startWorld(b, openPolicy)
		key := w.key(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Ephemeral: true})
		start := func() *mesh.Node {
			n := &mesh.Node{Hostname: "n", ControlURL: w.ready.URL, AuthKey: key, Ephemeral: true}
			meshtest.Up(b, n)
			return n
		}
		all := []*mesh.Node{start()} // with it comes what is made once
		before := measure(b)
		for range nodes {
			all = append(all, start())
		}
		know(b, all...)
		after := measure(b)
		b.ReportMetric(float64(after.goroutines-before.goroutines)/nodes, "goroutines/node")
		b.ReportMetric(float64(int64(after.heap)-int64(before.heap))/1024/nodes, "heap-KB/node")
		b.ReportMetric(float64(after.files-before.files)/nodes, "fds/node")
		for _, n := range all {
			n.Close()
		}
		runtime.GC()
		w.relay.Stop()
		w.control.Stop()
	}
	b.ReportMetric(0, "ns/op")
}
