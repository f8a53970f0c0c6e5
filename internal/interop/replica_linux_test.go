package interop

import (
	"io"
	"net"
	"sync"
	"testing"

	"mesh/control/host"
	"mesh/internal/meshtest"
	"mesh/internal/pgserver/pgtest"
)

// A stock node knows one address of the control server, behind which there are two
// replicas. When its one dies it goes on at the other: connections outlive that, it
// hears of what changes there, and others of what it changes.
func TestStockMovesToAnotherReplica(t *testing.T) {
	t.Parallel()
	database := pgtest.Server(t).URL("postgres")
	door := openDoor(t)
	replica := func() *meshtest.Mesh {
		return meshtest.Start(t, "", func(c *host.Config) {
			c.Database, c.NoRelay, c.URL = database, true, "http://"+door.listener.Addr().String()
		})
	}
	first := replica()
	door.lead(first.Host.Addr())
	first.SetPolicy(openPolicy)
	startRelay(t, first, 910)
	laptop := stockOf(t, first, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, first, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	out := echoConn(t, ours, laptop)
	second := replica()
	door.lead(second.Host.Addr()) // what goes to the first one breaks
	first.Stop()
	late := startAgent(t, second, "late", []string{"tag:a"})
	know(t, laptop, ours, late)
	talk(t, laptop, late, false)
	talk(t, late, laptop, true)
	if sum, err := echoOver(out, 1000); err != nil || sum != sumOf(1000) {
		t.Errorf("a connection from before: %v", err)
	}
	if err := second.Admin.RemoveNode(t.Context(), "late"); err != nil {
		t.Fatal(err)
	}
	until(t, "the stock node to hear of a removal", func() bool { return !laptop.knows("late") })
}

// door is one address for whatever serves at present.
type door struct {
	listener net.Listener

	mu    sync.Mutex // guards what follows
	to    string
	conns map[net.Conn]bool
}

// openDoor opens one on loopback until the test ends.
func openDoor(t testing.TB) *door {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{listener: ln, conns: make(map[net.Conn]bool)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { d.pass(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		d.lead("")
		wg.Wait()
	})
	return d
}

// lead has new connections go there, and ends those that there are.
func (d *door) lead(to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to = to
	for c := range d.conns {
		c.Close()
	}
}

// pass carries a connection until either end is over.
func (d *door) pass(in net.Conn) {
	defer in.Close()
	d.mu.Lock()
	to := d.to
	d.conns[in] = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.conns, in)
	}()
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer out.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(out, in)
		out.Close()
	}()
	io.Copy(in, out)
	in.Close()
	<-done
}
