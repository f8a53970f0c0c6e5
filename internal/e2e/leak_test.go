package e2e

import (
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh"
	"mesh/control/admin"
	"mesh/identity"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// footprint is what a process holds.
type footprint struct {
	goroutines, files int // files is -1 where they cannot be counted
	heap              uint64
}

func measure(t testing.TB) footprint {
	t.Helper()
	runtime.GC()
	runtime.GC() // the first one empties pools, the second what was in them
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	f := footprint{goroutines: runtime.NumGoroutine(), files: -1, heap: ms.HeapAlloc}
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		f.files = len(entries)
	}
	return f
}

// Goal 25 and G 82: a node that was started, used and closed leaves nothing.
// The servers and the peer are processes of their own, so that all that grows
// here is the node's.
func TestStartCloseCycles_G82(t *testing.T) {
	cycles := 100
	if full() {
		cycles = 1000
	}
	w := startWorld(t, openPolicy)
	peer := w.node("peer", false, true)
	peer.Must("serve", 7, nil)
	key := w.key(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Ephemeral: true})
	before := goleak.IgnoreCurrent()
	cycle := func(i int) {
		n := &mesh.Node{Hostname: "n", ControlURL: w.ready.URL, AuthKey: key, Ephemeral: true, RelayOnly: i%4 == 3}
		defer func() {
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
		defer cancel()
		l, err := n.Listen("tcp", ":1")
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			defer l.Close() // else Close finds it open
		}
		pc, err := n.ListenPacket("udp", ":1")
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			defer pc.Close()
		}
		c, err := actor.Open(ctx, n, "peer:7")
		if err != nil {
			t.Fatal(err)
		}
		if err := actor.Round(c, uint64(i), 10000); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			defer c.Close()
		}
	}
	for i := range 8 { // what is made once and kept
		cycle(i)
	}
	base := measure(t)
	begin := time.Now()
	for i := range cycles {
		cycle(i)
	}
	t.Logf("%d cycles in %v", cycles, time.Since(begin))
	end := measure(t)
	t.Logf("before %+v, after %+v", base, end)
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
	if end.files > base.files {
		t.Errorf("%d file descriptors, before %d", end.files, base.files)
	}
	// What net/http keeps of a connection, some 50 KB, goes when a timer of its
	// own fires, after 65 seconds. The full form waits for that; a node that
	// leaks is more than 1 MB.
	heap := base.heap + 1<<20 + uint64(cycles)*100<<10
	if full() {
		heap = base.heap + 1<<20
		for over := time.Now().Add(2 * time.Minute); end.heap > heap && time.Now().Before(over); <-time.After(time.Second) {
			end = measure(t)
		}
		t.Logf("later %+v", end)
	}
	if end.heap > heap {
		t.Errorf("the heap has grown from %d KB to %d KB", base.heap>>10, end.heap>>10)
	}
	peer.Stop()
	w.relay.Stop()
	w.control.Stop()
}

// What never comes up leaves nothing either.
func TestFailedStartsLeaveNothing_G82(t *testing.T) {
	cycle := func() {
		n := &mesh.Node{Hostname: "n", ControlURL: "http://127.0.0.1:1", Store: new(identity.MemoryStore), AuthKey: "mesh-auth-1-x"}
		if _, err := n.Up(t.Context()); err == nil {
			t.Fatal("started at a port where nobody is")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := n.Up(ctx); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		n.Close()
	}
	for range 10 {
		cycle()
	}
	base := measure(t)
	for range 200 {
		cycle()
	}
	end := measure(t)
	if err := goleak.Find(); err != nil {
		t.Error(err)
	}
	if end.files > base.files || end.heap > base.heap+1<<20 {
		t.Errorf("before %+v, after %+v", base, end)
	}
}
