package e2e

import (
	"context"
	"errors"
	"io"
	"syscall"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// A node with as many connections as it may have refuses the next, its own with
// an error of a type, and goes on with those that it has.
func TestNodeLimits(t *testing.T) {
	m := meshtest.Start(t, `{"tagOwners": {"tag:a": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`)
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", []string{"tag:a"}, func(n *mesh.Node) { n.Limits.Connections = 3 })
	meshtest.Up(t, a, b)
	awaitPeers(t, a, b)
	la, err := a.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer la.Close()
	type both struct{ a, b io.ReadWriteCloser }
	var open []both
	for range 3 {
		ca, cb := connect(t, a, b)
		open = append(open, both{ca, cb})
	}
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	if _, err := b.Dial(ctx, "tcp", dialAddr(a, la)); !errors.Is(err, mesh.ErrTooManyConnections) {
		t.Errorf("a dial beyond the limit: %v", err)
	}
	lb, err := b.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer lb.Close()
	c, err := a.Dial(ctx, "tcp", dialAddr(b, lb))
	if err == nil { // the handshake was over before there was something to refuse
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a peer's dial beyond the limit: %v", err)
	}
	for _, c := range open {
		if _, err := c.a.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(c.b, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	open[0].b.Close()
	c, err = b.Dial(ctx, "tcp", dialAddr(a, la))
	if err != nil {
		t.Fatalf("a dial when there is room again: %v", err)
	}
	c.Close()
	for _, c := range open {
		c.a.Close()
		c.b.Close()
	}

	bad := m.Node("bad", []string{"tag:a"}, func(n *mesh.Node) { n.Limits.ReceiveMemory = 1000 })
	if _, err := bad.Up(ctx); err == nil {
		t.Error("a node with no memory to receive came up")
	}
}
