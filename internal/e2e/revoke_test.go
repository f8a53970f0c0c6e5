package e2e

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"mesh"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// quickOffline makes the server say at once that a node has gone.
func quickOffline(c *host.Config) { c.OfflineGrace = time.Millisecond }

// readUntilError reads from c until it fails.
func readUntilError(c net.Conn) error {
	c.SetReadDeadline(time.Now().Add(meshtest.Patience))
	b := make([]byte, 512)
	for {
		if _, err := c.Read(b); err != nil {
			return err
		}
	}
}

// A node that is removed loses its open connections, and both ends hear why.
func TestRemovedNodeIsCutOff(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			a, b := pair(t, m, p.opt, p.want)
			out, in := connect(t, a, b)
			if _, err := out.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := m.Admin.RemoveNode(t.Context(), "b"); err != nil {
				t.Fatal(err)
			}
			for name, c := range map[string]net.Conn{"the one that stays": out, "the one removed": in} {
				err := readUntilError(c)
				if !errors.Is(err, mesh.ErrRevoked) || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s read: %v", name, err)
				}
				if _, err := c.Write([]byte("x")); !errors.Is(err, mesh.ErrRevoked) {
					t.Errorf("%s wrote: %v", name, err)
				}
				c.Close()
			}
			ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
			defer cancel()
			meshtest.Until(t, "the removed node to be forgotten", func() bool { return len(a.Status().Peers) == 0 })
			if _, err := a.Dial(ctx, "tcp", "b:1"); !errors.Is(err, mesh.ErrUnknownHost) {
				t.Errorf("dial to the removed node: %v", err)
			}
			if _, err := b.Dial(ctx, "tcp", "a:1"); !errors.Is(err, mesh.ErrRevoked) {
				t.Errorf("dial by the removed node: %v", err)
			}
			if _, err := b.Listen("tcp", ":1"); !errors.Is(err, mesh.ErrRevoked) {
				t.Errorf("listen on the removed node: %v", err)
			}
			// It stays out also after a restart, and says why.
			dir := b.Dir
			b.Close()
			again := m.Node("b", nil, func(n *mesh.Node) { n.Dir = dir })
			if _, err := again.Up(ctx); !errors.Is(err, mesh.ErrRevoked) {
				t.Errorf("start after removal: %v", err)
			}
		})
	}
}

// A policy that no longer allows a connection ends it; others live on.
func TestNarrowedPolicyCutsConnections(t *testing.T) {
	m := meshtest.Start(t, `{
		"tagOwners": {"tag:a": []},
		"acls": [
			{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:1000"]},
			{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:2000"]},
		]}`)
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", []string{"tag:a"})
	meshtest.Up(t, a, b)
	awaitPeers(t, a, b)
	conns := map[string][2]net.Conn{}
	for _, port := range []string{"1000", "2000"} {
		l, err := b.Listen("tcp", ":"+port)
		if err != nil {
			t.Fatal(err)
		}
		out, err := a.Dial(t.Context(), "tcp", "b:"+port)
		if err != nil {
			t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conns[port] = [2]net.Conn{out, in}
	}
	m.SetPolicy(`{
		"tagOwners": {"tag:a": []},
		"acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a:2000"]}]}`)
	if err := readUntilError(conns["1000"][1]); !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("accepting end of what is no longer allowed: %v", err)
	}
	if err := readUntilError(conns["1000"][0]); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("dialling end of what is no longer allowed: %v", err)
	}
	if err := exchange(conns["2000"][0], conns["2000"][1], 1<<20); err != nil {
		t.Errorf("what is still allowed: %v", err)
	}
	if _, err := a.Dial(t.Context(), "tcp", "b:1000"); !errors.Is(err, mesh.ErrDenied) {
		t.Errorf("new dial: %v", err)
	}
	for _, c := range conns {
		c[0].Close()
		c[1].Close()
	}
}

// While the control server is away connections go on, new ones are made, and a
// node that restarts comes up with what it knew.
func TestControlOutage(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	out, in := connect(t, a, b)
	defer out.Close()
	defer in.Close()
	dir := b.Dir
	m.Stop()
	if err := exchange(out, in, 1<<20); err != nil {
		t.Errorf("old connection: %v", err)
	}
	c1, c2 := connect(t, a, b)
	if err := exchange(c1, c2, 1<<20); err != nil {
		t.Errorf("new connection: %v", err)
	}
	c1.Close()
	c2.Close()
	meshtest.Until(t, "the outage to show", func() bool { return a.Status().Control != "" })

	b.Close()
	again := m.Node("b", nil, func(n *mesh.Node) { n.Dir = dir })
	meshtest.Up(t, again)
	if st := again.Status(); len(st.Peers) != 1 || st.Control == "" {
		t.Errorf("after a restart without control: %+v", st)
	}

	m.Restart()
	meshtest.Until(t, "control to be back", func() bool {
		return a.Status().Control == "" && again.Status().Control == ""
	})
	c1, c2 = connect(t, a, again)
	if err := exchange(c1, c2, 1<<20); err != nil {
		t.Errorf("after the outage: %v", err)
	}
	c1.Close()
	c2.Close()
}
