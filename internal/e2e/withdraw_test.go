package e2e

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/meshtest"
)

// Suspending a user cuts the live connections of all the user's nodes, by
// whatever path they go; peers say when that is in force at them; and the nodes
// work again, without a restart, once the user is resumed.
func TestSuspendedUserIsCutOff(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy, quickOffline)
			if _, err := m.Admin.CreateUser(t.Context(), "alice"); err != nil {
				t.Fatal(err)
			}
			hers := m.Key(admin.KeyCreate{User: "alice", Reusable: true})
			own := func(n *mesh.Node) { n.AuthKey = hers }
			a := m.Node("a", nil, own, p.opt)
			a2 := m.Node("a2", nil, own, p.opt)
			b := m.Node("b", []string{"tag:a"}, p.opt)
			c := m.Node("c", []string{"tag:a"}, p.opt)
			meshtest.Up(t, a, a2, b, c)
			awaitPeers(t, a, a2, b, c)
			awaitPath(t, a, b, p.want)
			out, in := connect(t, a, b)
			out2, in2 := connect(t, c, a2)
			kept, keptIn := connect(t, b, c)

			u, err := m.Admin.SuspendUser(t.Context(), "alice", 20*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if w := u.Applied; w == nil || w.Peers != 2 || w.Applied != 2 || len(w.Missing) > 0 || !slices.Contains([]string{"b", "c"}, w.SlowestNode) {
				t.Errorf("applied: %+v", w)
			} else {
				t.Logf("in force at both peers after %v", w.Slowest)
			}
			for name, conn := range map[string]net.Conn{"accepted from a": in, "dialled to a2": out2, "a's": out, "a2's": in2} {
				if err := readUntilError(conn); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s connection lives on", name)
				}
				conn.Close()
			}
			if err := exchange(kept, keptIn, 1<<16); err != nil {
				t.Errorf("who has nothing to do with it: %v", err)
			}
			late := m.Node("late", nil, own)
			if _, err := late.Up(t.Context()); err == nil {
				t.Error("a node enrols with the key of a suspended user")
			}

			if _, err := m.Admin.ResumeUser(t.Context(), "alice"); err != nil {
				t.Fatal(err)
			}
			meshtest.Until(t, "a to be back", func() bool {
				n, err := m.Admin.Node(t.Context(), "a")
				return err == nil && n.Online && !n.Expired
			})
			l, err := b.Listen("tcp", ":7")
			if err != nil {
				t.Fatal(err)
			}
			var again net.Conn
			meshtest.Until(t, "a to reach b again", func() bool {
				again, err = a.Dial(t.Context(), "tcp", "b:7")
				return err == nil
			})
			accepted, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if err := exchange(again, accepted, 1<<16); err != nil {
				t.Error(err)
			}
			for _, c := range []net.Conn{again, accepted, kept, keptIn} {
				c.Close()
			}
		})
	}
}

// The word of a peer that a removal is in force comes after its connections are
// cut, not before.
func TestAppliedMeansCut(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	out, in := connect(t, a, b)
	defer in.Close()
	defer out.Close()
	done, err := m.Admin.RemoveNodeAndWait(t.Context(), "b", 20*time.Second)
	if err != nil || done.Applied == nil || done.Applied.Applied != 1 || done.Applied.SlowestNode != "a" {
		t.Fatalf("%+v, %v", done.Applied, err)
	}
	t.Logf("in force after %v", done.Applied.Slowest)
	out.SetReadDeadline(time.Now())
	if _, err := out.Read(make([]byte, 1)); !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("once it is in force, the connection reads %v", err)
	}
}

// A server that is told to end tells the nodes to come back; connections between
// them go on as if nothing had happened, and the nodes are back when it is.
func TestGracefulRestart(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	for range 2 {
		out, in := connect(t, a, b)
		moving := make(chan error, 1)
		go func() { moving <- exchange(out, in, 8<<20) }()
		m.Stop()
		m.Restart()
		if err := <-moving; err != nil {
			t.Fatalf("over a restart: %v", err)
		}
		out.Close()
		in.Close()
		for _, name := range []string{"a", "b"} {
			meshtest.Until(t, name+" to be back", func() bool {
				n, err := m.Admin.Node(t.Context(), name)
				return err == nil && n.Online
			})
		}
	}
}
