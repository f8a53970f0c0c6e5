package e2e

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"mesh"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// keyPolicy lets nodes of tag:b live with keys of that age, and others with such
// that do not expire.
func keyPolicy(expiry string) string {
	return fmt.Sprintf(`{
		"tagOwners": {"tag:a": [], "tag:b": []},
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
		"nodeAttrs": [{"target": ["tag:b"], "attr": ["key-expiry:%s"]}],
	}`, expiry)
}

// chatter exchanges small messages by a connection until stopped, and counts
// them; the longest time between two is its gap.
type chatter struct {
	n    atomic.Int64
	gap  atomic.Int64
	err  chan error
	stop chan struct{}
}

func chat(out, in net.Conn) *chatter {
	c := &chatter{err: make(chan error, 2), stop: make(chan struct{})}
	go func() {
		_, err := io.Copy(in, in)
		c.err <- err
	}()
	go func() {
		var b [64]byte
		last := time.Now()
		for {
			select {
			case <-c.stop:
				c.err <- nil
				return
			default:
			}
			if _, err := out.Write(b[:]); err != nil {
				c.err <- fmt.Errorf("write: %w", err)
				return
			}
			if _, err := io.ReadFull(out, b[:]); err != nil {
				c.err <- fmt.Errorf("read: %w", err)
				return
			}
			now := time.Now()
			c.gap.Store(max(c.gap.Load(), int64(now.Sub(last))))
			last = now
			c.n.Add(1)
		}
	}()
	return c
}

// end stops the chatter and reports what went wrong.
func (c *chatter) end(t *testing.T, name string, out, in net.Conn) {
	t.Helper()
	before := c.n.Load()
	meshtest.Until(t, name+" to go on", func() bool { return c.n.Load() > before+20 || len(c.err) > 0 })
	close(c.stop)
	err := <-c.err
	out.Close()
	in.Close()
	if e := <-c.err; err == nil && c.n.Load() <= before {
		err = e
	}
	t.Logf("%s: %d messages, longest gap %v", name, c.n.Load(), time.Duration(c.gap.Load()).Round(time.Millisecond))
	if err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// Nodes replace their keys when the control server says that it is time, and
// connections do not notice, whichever end does it, and if both do.
func TestKeysAreReplacedUnderConnections(t *testing.T) {
	for _, relayed := range []bool{false, true} {
		t.Run(map[bool]string{false: "direct", true: "by relay"}[relayed], func(t *testing.T) {
			m := meshtest.Start(t, keyPolicy("1h"))
			options := func(n *mesh.Node) { n.RelayOnly = relayed }
			a, b, b2 := m.Node("a", []string{"tag:a"}, options), m.Node("b", []string{"tag:b"}, options), m.Node("b2", []string{"tag:b"}, options)
			nodes := []*mesh.Node{a, b, b2}
			meshtest.Up(t, nodes...)
			know(t, nodes...)
			before := map[string]identity.NodePublic{}
			for _, n := range nodes {
				before[n.Hostname] = n.Status().Self.Key
			}
			type pair struct {
				name    string
				out, in net.Conn
				*chatter
			}
			var pairs []pair
			for _, p := range [][2]*mesh.Node{{a, b}, {b, a}, {b, b2}} {
				out, in := connect(t, p[0], p[1])
				pairs = append(pairs, pair{p[0].Hostname + " to " + p[1].Hostname, out, in, chat(out, in)})
			}
			for range 2 {
				now := map[string]identity.NodePublic{}
				for _, n := range nodes {
					now[n.Hostname] = n.Status().Self.Key
				}
				// Longer-lived keys are due now.
				expiry := []string{"3h", "10h"}[len(before)%2]
				if now["b"] != before["b"] {
					expiry = "100h"
				}
				m.SetPolicy(keyPolicy(expiry))
				meshtest.Until(t, "both to have new keys", func() bool {
					return b.Status().Self.Key != now["b"] && b2.Status().Self.Key != now["b2"]
				})
				meshtest.Until(t, "a to know them", func() bool {
					for _, p := range a.Status().Peers {
						if p.ShortName() == "b" && p.Key != b.Status().Self.Key || p.ShortName() == "b2" && p.Key != b2.Status().Self.Key {
							return false
						}
					}
					return true
				})
			}
			if a.Status().Self.Key != before["a"] {
				t.Error("a key that does not expire was replaced")
			}
			if st := b.Status(); time.Until(st.KeyExpiry) < 99*time.Hour || !st.Running {
				t.Errorf("status %+v", st)
			}
			for _, p := range pairs {
				p.end(t, p.name, p.out, p.in)
			}
			// And new ones are made by the new keys.
			for _, p := range [][2]*mesh.Node{{a, b}, {b, a}} {
				out, in := connect(t, p[0], p[1])
				if err := exchange(out, in, 1<<16); err != nil {
					t.Error(err)
				}
				out.Close()
				in.Close()
			}
			// Started again it is the same node.
			self := b.Status().Self
			b.Close()
			again := m.Node("b", nil, options, func(n *mesh.Node) { n.Dir = b.Dir })
			meshtest.Up(t, again)
			if got := again.Status().Self; got.Key != self.Key || got.ID != self.ID {
				t.Errorf("started again it is %v, was %v", got, self)
			}
		})
	}
}

// Whatever was saved when a node died while its key was replaced, it is the same
// node when it starts again; so it is with a state from a backup.
func TestDiesWhileKeyIsReplaced(t *testing.T) {
	m := meshtest.Start(t, keyPolicy("1h"))
	a, b := m.Node("a", []string{"tag:a"}), m.Node("b", []string{"tag:b"})
	meshtest.Up(t, a, b)
	self, dir := b.Status().Self, b.Dir
	b.Close()
	edit := func(f func(*identity.State)) (st identity.State) {
		t.Helper()
		s, err := identity.OpenFileStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if st, err = identity.LoadState(s); err != nil {
			t.Fatal(err)
		}
		f(&st)
		if err := st.Save(s); err != nil {
			t.Fatal(err)
		}
		return st
	}
	first := edit(func(*identity.State) {}).Node
	next := identity.NewNode()
	for _, c := range []struct {
		name string
		edit func(*identity.State)
		key  func(identity.NodePublic) bool
	}{
		{"before the new key was registered", func(st *identity.State) { st.Next = next },
			func(k identity.NodePublic) bool { return k == next.Public() }},
		{"after that, before it was saved", func(st *identity.State) { st.Node, st.Next = first, next },
			func(k identity.NodePublic) bool { return k == next.Public() }},
		{"long ago: a backup", func(st *identity.State) { st.Node, st.Next = first, identity.NodePrivate{} },
			func(k identity.NodePublic) bool { return k != first.Public() && k != next.Public() }},
	} {
		edit(c.edit)
		n := m.Node("b", nil, func(n *mesh.Node) { n.Dir = dir })
		meshtest.Up(t, n)
		meshtest.Until(t, "its key", func() bool { return c.key(n.Status().Self.Key) }) // until then by the saved map
		if got := n.Status().Self; got.ID != self.ID || got.Addresses[0] != self.Addresses[0] {
			t.Errorf("died %s: it is %v with %v, was %v", c.name, got, got.Key, self)
		}
		out, in := connect(t, a, n)
		if err := exchange(out, in, 1000); err != nil {
			t.Errorf("died %s: %v", c.name, err)
		}
		n.Close()
		if st := edit(func(*identity.State) {}); !st.Next.IsZero() || !st.Enrolled {
			t.Errorf("died %s: saved is %+v", c.name, st.Enrolled)
		}
	}

	// Without its server it comes up with the key that it had, and takes the
	// other when the server is there.
	edit(func(st *identity.State) { st.Next = identity.NewNode() })
	m.Stop()
	n := m.Node("b", nil, func(n *mesh.Node) { n.Dir = dir })
	meshtest.Up(t, n)
	had := n.Status().Self.Key
	m.Restart()
	meshtest.Until(t, "the other key", func() bool { return n.Status().Self.Key != had && n.Status().Control == "" })
	meshtest.Until(t, "a to know it", func() bool {
		for _, p := range a.Status().Peers {
			if p.Key == n.Status().Self.Key {
				return true
			}
		}
		return false
	})
	out, in := connect(t, a, n)
	defer out.Close()
	defer in.Close()
	if err := exchange(out, in, 1000); err != nil {
		t.Error(err)
	}
}
