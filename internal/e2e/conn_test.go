package e2e

import (
	"context"
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"mesh"
	"mesh/internal/meshtest"
)

const openPolicy = `{
	"tagOwners": {"tag:a": []},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}`

// paths are the two ways traffic can go; the same tests run over both.
var paths = []struct {
	name string
	opt  func(*mesh.Node)
	want string
}{
	{"direct", func(*mesh.Node) {}, "direct"},
	{"relay", func(n *mesh.Node) { n.RelayOnly = true }, "relay"},
}

// pair returns two nodes that may do all, with the path between them as named.
func pair(t *testing.T, m *meshtest.Mesh, opt func(*mesh.Node), path string) (a, b *mesh.Node) {
	t.Helper()
	a = m.Node("a", []string{"tag:a"}, opt)
	b = m.Node("b", []string{"tag:a"}, opt)
	meshtest.Up(t, a, b)
	awaitPeers(t, a, b)
	awaitPath(t, a, b, path)
	return a, b
}

// awaitPeers waits until all nodes see each other.
func awaitPeers(t testing.TB, nodes ...*mesh.Node) {
	t.Helper()
	for _, n := range nodes {
		meshtest.Until(t, n.Hostname+" to see its peers", func() bool { return len(n.Status().Peers) >= len(nodes)-1 })
	}
}

// awaitPath keeps a little traffic going until it takes the path.
func awaitPath(t *testing.T, from, to *mesh.Node, path string) {
	t.Helper()
	know(t, from, to)
	l, err := to.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	addr := dialAddr(to, l)
	meshtest.Until(t, "the path to be "+path, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
		defer cancel()
		c, err := from.Dial(ctx, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		return pathTo(from, to) == path
	})
}

func pathTo(from, to *mesh.Node) string {
	for _, p := range from.Status().Peers {
		if p.Key == to.Status().Self.Key {
			return p.Path.Kind
		}
	}
	return "unknown peer"
}

// dialAddr is how others dial a listener of n.
func dialAddr(n *mesh.Node, l net.Listener) string {
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return net.JoinHostPort(n.Status().Self.Name, port)
}

// connect makes one connection between two nodes.
func connect(t testing.TB, from, to *mesh.Node) (dialled, accepted net.Conn) {
	t.Helper()
	know(t, from, to)
	dialled, accepted, err := tryConnect(t.Context(), from, to)
	if err != nil {
		t.Fatal(err)
	}
	return dialled, accepted
}

func tryConnect(ctx context.Context, from, to *mesh.Node) (dialled, accepted net.Conn, err error) {
	l, err := to.Listen("tcp", ":0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	type result struct {
		c   net.Conn
		err error
	}
	ch := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		ch <- result{c, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, meshtest.Patience)
	defer cancel()
	if dialled, err = from.Dial(ctx, "tcp", dialAddr(to, l)); err != nil {
		l.Close()
		if r := <-ch; r.c != nil {
			r.c.Close()
		}
		return nil, nil, err
	}
	r := <-ch
	return dialled, r.c, r.err
}

func TestConnBehavesAsNet(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			a, b := pair(t, m, p.opt, p.want)
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				c1, c2, err = tryConnect(context.Background(), a, b)
				if err != nil {
					return nil, nil, nil, err
				}
				return c1, c2, func() { c1.Close(); c2.Close() }, nil
			})
		})
	}
}
