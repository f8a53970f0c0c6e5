package e2e

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// Without its control server a node goes on for as long as it likes, or for as
// long as it may: then it begins nothing new, then it ends what there is, and it
// is back with the server.
func TestMaxStale(t *testing.T) {
	const limit = 2 * time.Second
	for _, by := range []string{"field", "policy"} {
		t.Run(by, func(t *testing.T) {
			policy := openPolicy
			if by == "policy" {
				policy = `{
					"tagOwners": {"tag:a": [], "tag:b": []},
					"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
					"nodeAttrs": [{"target": ["tag:b"], "attr": ["max-stale:2s"]}],
				}`
			}
			m := meshtest.Start(t, policy)
			tag := map[bool]string{true: "tag:a", false: "tag:b"}[by == "field"]
			a, a2 := m.Node("a", []string{"tag:a"}), m.Node("a2", []string{"tag:a"})
			b := m.Node("b", []string{tag}, func(n *mesh.Node) {
				if by == "field" {
					n.MaxStale = limit
				}
			})
			meshtest.Up(t, a, a2, b)
			know(t, a, a2, b)
			toB, atB := connect(t, a, b)
			toA2, atA2 := connect(t, a, a2)
			l, err := b.Listen("tcp", ":7")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			m.Stop()
			gone := time.Now()
			var cut time.Time
			meshtest.Until(t, "b to be stale", func() bool {
				cut = time.Now()
				_, err := b.Dial(t.Context(), "tcp", "a:1")
				return errors.Is(err, mesh.ErrStale)
			})
			if cut.Sub(gone) < limit-time.Second {
				t.Errorf("cut off after %v", cut.Sub(gone))
			}
			if st := b.Status(); st.Running || !strings.Contains(st.Control, "cut off") {
				t.Errorf("status %v, %q", st.Running, st.Control)
			}
			if _, err := a.Dial(t.Context(), "tcp", "b:7"); err == nil {
				t.Error("it accepts connections")
			} else {
				t.Logf("dial to it: %v", err)
			}
			if err := readUntilError(atB); !errors.Is(err, mesh.ErrStale) {
				t.Errorf("its connection: %v", err)
			}
			readUntilError(toB)
			t.Logf("refused after %v, cut after %v", cut.Sub(gone), time.Since(gone))
			// The others go on, and it is back with the server.
			if err := exchange(toA2, atA2, 1<<16); err != nil {
				t.Error(err)
			}
			m.Restart()
			meshtest.Until(t, "it to be back", func() bool { return b.Status().Running && b.Status().Control == "" })
			for _, p := range [][2]*mesh.Node{{a, b}, {b, a}} {
				out, in := connect(t, p[0], p[1])
				if err := exchange(out, in, 1<<16); err != nil {
					t.Error(err)
				}
				out.Close()
				in.Close()
			}
			// A node that starts without the server is as old as what it saved.
			b.Close()
			m.Stop()
			again := m.Node("b", nil, func(n *mesh.Node) { n.Dir, n.MaxStale = b.Dir, b.MaxStale })
			meshtest.Until(t, "b to be stale again", func() bool {
				_, err := again.Up(t.Context())
				if err != nil && !errors.Is(err, mesh.ErrStale) {
					t.Fatal(err)
				}
				return err != nil
			})
			m.Restart()
			meshtest.Until(t, "it to be back", func() bool { _, err := again.Up(t.Context()); return err == nil })
		})
	}
}

// A control server that is there but says nothing is asked; one whose connection
// is dead is found out in the node's own time, long before that counts as lost.
func TestSilentControl(t *testing.T) {
	const limit = 2 * time.Second
	m := meshtest.Start(t, openPolicy)
	silence := make(chan struct{})
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", []string{"tag:a"}, func(n *mesh.Node) {
		n.MaxStale, n.DialTCP = limit, dialUntil(silence)
	})
	meshtest.Up(t, a, b)
	know(t, a, b)
	_, atB := connect(t, a, b)
	for quiet := time.Now(); time.Since(quiet) < 2*limit; {
		if err := atB.SetReadDeadline(time.Now().Add(limit / 8)); err != nil {
			t.Fatal(err)
		}
		if _, err := atB.Read(make([]byte, 1)); errors.Is(err, mesh.ErrStale) {
			t.Fatalf("a control server that is there: %v", err)
		}
	}
	atB.SetReadDeadline(time.Time{})
	close(silence)
	gone := time.Now()
	if err := readUntilError(atB); !errors.Is(err, mesh.ErrStale) {
		t.Errorf("its connection: %v", err)
	}
	took := time.Since(gone)
	if took > time.Minute {
		t.Errorf("cut off after %v", took)
	}
	t.Logf("cut off after %v", took)
}

// Goal 13: a node that cannot hear of it is put out by its peers all the same.
func TestRemovedWhileCutOff(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	silence := make(chan struct{})
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", []string{"tag:a"}, func(n *mesh.Node) { n.DialTCP = dialUntil(silence) })
	meshtest.Up(t, a, b)
	know(t, a, b)
	atA, atB := connect(t, a, b)
	meshtest.Until(t, "a direct path", func() bool { return pathTo(b, a) == "direct" })
	l, err := a.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	close(silence)
	if err := m.Admin.RemoveNode(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{"the peer's": atA, "its own": atB} {
		if err := readUntilError(c); !errors.Is(err, mesh.ErrRevoked) {
			t.Errorf("%s end: %v", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if c, err := b.Dial(ctx, "tcp", "a:7"); err == nil {
		c.Close()
		t.Error("it gets in again")
	}
}

// dialUntil returns a dialler whose connections bring nothing any more, and which
// makes no others, from silence on.
func dialUntil(silence <-chan struct{}) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		select {
		case <-silence:
			<-ctx.Done()
			return nil, ctx.Err()
		default:
		}
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &mutable{Conn: c, silence: silence, closed: make(chan struct{})}, nil
	}
}

// mutable is a connection by which nothing comes any more after silence.
type mutable struct {
	net.Conn
	silence <-chan struct{}
	closed  chan struct{}
	once    sync.Once
}

func (c *mutable) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	select {
	case <-c.silence:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (c *mutable) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
