package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

const basicPolicy = `{
	// The founding story: who may reach what.
	"tagOwners": {"tag:planner": [], "tag:db": [], "tag:image": []},
	"acls": [
		{"action": "accept", "src": ["tag:planner"], "dst": ["tag:db:5432", "tag:image:8080"]},
		{"action": "accept", "src": ["tag:image"], "dst": ["tag:db:9187"]},
	],
}`

// serve answers each connection with who it thinks is calling.
func serve(t *testing.T, n *mesh.Node, addr string) {
	t.Helper()
	l, err := n.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p, _ := mesh.PeerOf(c)
			fmt.Fprintf(c, "%s %v %s", p.Name, p.Tags, p.Rule.Name)
			c.Close()
		}
	}()
}

func TestFoundingStory(t *testing.T) {
	m := meshtest.Start(t, basicPolicy)
	planner := m.Node("planner", []string{"tag:planner"})
	db := m.Node("database", []string{"tag:db"})
	image := m.Node("image", []string{"tag:image"})
	meshtest.Up(t, planner, db, image)
	know(t, planner, db)
	know(t, planner, image)
	know(t, image, db)
	serve(t, db, ":5432")
	serve(t, db, ":9187")
	serve(t, image, ":8080")

	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	get := func(n *mesh.Node, addr string) (string, error) {
		c, err := n.Dial(ctx, "tcp", addr)
		if err != nil {
			return "", err
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		return string(b), err
	}
	for _, test := range []struct {
		from *mesh.Node
		addr string
		want string
	}{
		{planner, "database:5432", "planner.mesh.internal [tag:planner] acls[0]"},
		{planner, "image.mesh.internal:8080", "planner.mesh.internal [tag:planner] acls[0]"},
		{image, "database:9187", "image.mesh.internal [tag:image] acls[1]"},
		{planner, net.JoinHostPort(db.Status().Self.Addresses[0].String(), "5432"), "planner.mesh.internal [tag:planner] acls[0]"},
		{planner, net.JoinHostPort(db.Status().Self.Addresses[1].String(), "5432"), "planner.mesh.internal [tag:planner] acls[0]"},
	} {
		got, err := get(test.from, test.addr)
		if err != nil || got != test.want {
			t.Errorf("dial %s: got %q, %v; want %q", test.addr, got, err, test.want)
		}
	}

	_, err := get(image, "database:5432")
	var denied *mesh.DeniedError
	if !errors.Is(err, mesh.ErrDenied) || !errors.As(err, &denied) || denied.Peer.Name != "database.mesh.internal" || denied.Port != 5432 {
		t.Errorf("refused call: %v", err)
	}
	if _, err := get(planner, "database:9999"); !errors.Is(err, mesh.ErrDenied) {
		t.Errorf("port that no rule names: %v", err)
	}
	if _, err := get(planner, "nobody:80"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("unknown name: %v", err)
	}
	if _, err := get(planner, "127.0.0.1:80"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("address outside the mesh: %v", err)
	}
	// Allowed, but nobody listens.
	l, err := image.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	m.SetPolicy(`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`)
	meshtest.Until(t, "the wider policy", func() bool { return planner.Status().PolicyVersion == 2 && image.Status().PolicyVersion == 2 })
	if _, err := get(planner, "image:4444"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("port that nobody listens on: %v", err)
	}
	if l, err = image.Listen("tcp4", ":80"); err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ConnContext: mesh.ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, _ := mesh.PeerFromContext(r.Context())
		io.WriteString(w, p.Name)
	})}
	go srv.Serve(l)
	defer srv.Close()
	resp, err := planner.HTTPClient().Get("http://image/")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(b) != "planner.mesh.internal" {
		t.Errorf("HTTP server saw %q", b)
	}
}
