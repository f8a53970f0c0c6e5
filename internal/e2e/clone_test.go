package e2e

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// A state directory is copied while its node runs, and the copy runs, too: the
// copy is the node from then on, and the first stops and says why. Started again
// it stays out while the copy lives, however often, and is back after it. A node
// that is killed and started again is no copy.
func TestClonedState(t *testing.T) {
	w := startWorld(t, openPolicy)
	peer := w.node("peer", false, true)
	first := w.node("node", false, true)
	self := status(first).Self
	for range 2 { // no copy
		first.Kill()
		first = w.node("node", false, false)
		if got := status(first).Self; got.ID != self.ID || got.Key != self.Key {
			t.Fatalf("after a restart it is %v, was %v", got, self)
		}
	}
	copied := filepath.Join(w.dir, "copy")
	if err := os.CopyFS(copied, os.DirFS(filepath.Join(w.dir, "node"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lock", "state.json", "netmap"} {
		if err := os.Chmod(filepath.Join(copied, name), 0o600); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(copied, 0o700); err != nil {
		t.Fatal(err)
	}
	second := w.node("copy", false, false)
	if got := status(second).Self; got.ID != self.ID {
		t.Fatalf("the copy is %v", got)
	}
	meshtest.Until(t, "the first to stop", func() bool {
		st := status(first)
		return !st.Running && strings.Contains(st.Control, "another copy") && strings.Contains(st.Control, "start this again")
	})
	first.Stop()
	for i := range 3 {
		n := &mesh.Node{Hostname: "node", ControlURL: w.ready.URL, Dir: filepath.Join(w.dir, "node")}
		if _, err := n.Up(t.Context()); !errors.Is(err, mesh.ErrCloned) {
			t.Errorf("start %d: %v", i, err)
		}
		n.Close()
		if st := status(second); !st.Running || st.Control != "" {
			t.Errorf("start %d took the copy away: %q", i, st.Control)
		}
	}
	second.Must("serve", 7, nil)
	addr := netip.AddrPortFrom(self.Addresses[0], 7).String()
	meshtest.Until(t, "the peer to reach the copy", func() bool { return peer.Call(t.Context(), "get", addr, nil) == nil })
	second.Stop()
	meshtest.Until(t, "the first to be let in again", func() bool {
		ids, err := w.admin.Nodes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range ids {
			if n.StableID == self.ID && !n.Online {
				return true
			}
		}
		return false
	})
	first = w.node("node", false, false)
	if got := status(first).Self; got.ID != self.ID {
		t.Errorf("it is %v, was %v", got, self)
	}
}
