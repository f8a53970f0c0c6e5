package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// A user asks by which paths a peer answers, and what a connection takes.
func TestPing(t *testing.T) {
	for _, tc := range paths {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel() // it waits for a peer to be missed
			m := meshtest.Start(t, openPolicy)
			a, b := m.Node("a", []string{"tag:a"}, tc.opt), m.Node("b", []string{"tag:a"}, tc.opt)
			meshtest.Up(t, a, b)
			began := time.Now()
			meshtest.Until(t, "an answer by "+tc.want, func() (ok bool) {
				err := a.Ping(t.Context(), "b", func(g mesh.Pong) {
					if g.Peer.ID != b.Status().Self.ID || g.Latency <= 0 || g.Kind == "direct" != g.Endpoint.IsValid() || g.Kind == "relay" && g.Relay != 900 {
						t.Errorf("%+v", g)
					}
					ok = ok || g.Kind == tc.want
				})
				if err != nil {
					t.Fatal(err)
				}
				return ok
			})
			awaitPath(t, a, b, tc.want)
			out, in := connect(t, a, b)
			defer out.Close()
			defer in.Close()
			p := out.(*mesh.Conn).Path()
			if p.Kind != tc.want || p.Since.Before(began) || p.Since.After(time.Now()) || p.Why == "" {
				t.Errorf("%+v", p)
			}
			if p.String() != map[string]string{"direct": "direct " + p.Endpoint.String(), "relay": "relay 900"}[tc.want] {
				t.Errorf("%v", p)
			}
			for _, s := range a.Status().Peers {
				if s.Name == "b.mesh.internal" && s.Path.Kind != tc.want {
					t.Errorf("%+v", s)
				}
			}

			never := func(mesh.Pong) { t.Error("a pong") }
			if err := a.Ping(t.Context(), "nobody", never); !errors.Is(err, mesh.ErrUnknownHost) {
				t.Errorf("of nobody: %v", err)
			}
			if err := a.Ping(t.Context(), "a", never); err == nil {
				t.Error("a node pinged itself")
			}
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			if err := a.Ping(gone, "b", func(mesh.Pong) {}); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
			b.Close()
			meshtest.Until(t, "b to be offline", func() bool { return !a.Status().Peers[0].Online })
			if err := a.Ping(t.Context(), "b", never); !errors.Is(err, mesh.ErrPeerOffline) {
				t.Errorf("offline: %v", err)
			}
			a.Close()
			if err := a.Ping(t.Context(), "b", never); !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
		})
	}
}

// Who is told that a peer is up can dial it, although the netmap is still on its
// way; what has no name is found out quickly.
func TestDialRightAfterUp(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a := m.Node("a", []string{"tag:a"})
	meshtest.Up(t, a)
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	for i := range 5 {
		name := fmt.Sprintf("new%d", i)
		b := m.Node(name, []string{"tag:a"})
		l, err := b.Listen("tcp", ":7")
		if err != nil {
			t.Fatal(err)
		}
		meshtest.Up(t, b)
		began := time.Now()
		c, err := a.Dial(ctx, "tcp", name+":7")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		back, err := b.Dial(ctx, "tcp", "a:9")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s back: %v", name, err)
		}
		if err == nil {
			back.Close()
		}
		t.Logf("both ways after %v", time.Since(began))
		c.Close()
		l.Close()
	}
	if _, err := a.Dial(ctx, "tcp", "nobody:7"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("nobody: %v", err)
	}
}
