package server

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"mesh/control/store"
)

// Goal 20: an edit of the policy that touches every node is with every node
// soon; how soon is reported. MESH_FULL=1 has 1,000 nodes.
func TestPolicyReachesEveryNode(t *testing.T) {
	nodes, edits := 100, 3
	if os.Getenv("MESH_FULL") == "1" {
		nodes, edits = 1000, 10
	}
	w := newWorld(t, nil)
	policy := func(port int) string {
		return fmt.Sprintf(`{"tagOwners": {"tag:a": [], "tag:hub": []}, "acls": [{"action": "accept", "src": ["tag:hub"], "dst": ["tag:a:%d"]}]}`, port)
	}
	set := func(port int) {
		if _, err := w.s.SetPolicy(context.Background(), "test", policy(port), -1); err != nil {
			t.Error(err)
		}
	}
	set(80)
	hub := w.machine().join(w.key(store.Key{Tags: []string{"tag:hub"}, Reusable: true})).poll(nil)
	go func() {
		for hub.read() == nil { // it hears of all of them
		}
	}()
	key := w.key(store.Key{Tags: []string{"tag:a"}, Reusable: true})
	all := make([]*netmap, nodes)
	for i := range all {
		all[i] = w.machine().join(key).poll(nil)
	}
	port := func(n *netmap) uint16 {
		if len(n.filter) == 1 && len(n.filter[0].DstPorts) > 0 {
			return n.filter[0].DstPorts[0].Ports.First
		}
		return 0
	}
	var took []time.Duration
	for e := range edits {
		want := uint16(1000 + e)
		var mu sync.Mutex // guards took
		var wg sync.WaitGroup
		begin := time.Now()
		for _, n := range all {
			wg.Go(func() {
				n.until(t, "the edit", func() bool { return port(n) == want })
				d := time.Since(begin)
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
			})
		}
		set(int(want))
		wg.Wait()
	}
	slices.Sort(took)
	t.Logf("%d edits at %d nodes: median %v, p99 %v, worst %v", edits, nodes, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	hub.cancel()
}
