package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"

	"mesh"
	"mesh/identity"
)

// An agent that serves: whoever connects was let in by the policy, and is known.
func ExampleNode_Listen() {
	n := &mesh.Node{Hostname: "db", ControlURL: "https://mesh.example.com", AuthKey: "mesh-key-…"}
	defer n.Close()
	l, err := n.Listen("tcp", ":5432")
	if err != nil {
		log.Fatal(err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer c.Close()
			peer, _ := mesh.PeerOf(c)
			fmt.Fprintf(c, "hello %s, you come in by %s\n", peer.Name, peer.Rule)
		}()
	}
}

// An agent that calls. Errors say what happened and match a few values.
func ExampleNode_Dial() {
	n := &mesh.Node{Hostname: "planner", ControlURL: "https://mesh.example.com", AuthKey: "mesh-key-…"}
	defer n.Close()
	c, err := n.Dial(context.Background(), "tcp", "db:5432")
	var denied *mesh.DeniedError
	switch {
	case errors.As(err, &denied):
		log.Fatalf("ask for access to port %d of %s", denied.Port, denied.Peer.Name)
	case errors.Is(err, mesh.ErrUnknownHost):
		log.Fatal("no such agent, or none that this one may see")
	case errors.Is(err, mesh.ErrPeerOffline):
		log.Fatal("try again later: ", err)
	case err != nil:
		log.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "select 1")
}

// Up waits until peers can reach the node, and fails at once if it cannot enrol.
func ExampleNode_Up() {
	n := &mesh.Node{ControlURL: "https://mesh.example.com", AuthKey: "mesh-key-…", Tags: []string{"tag:worker"}, Ephemeral: true}
	defer n.Close()
	st, err := n.Up(context.Background())
	switch {
	case errors.Is(err, mesh.ErrAuthKeyExpired), errors.Is(err, mesh.ErrAuthKeyUsed):
		log.Fatal("get a new key: ", err)
	case err != nil:
		log.Fatal(err)
	}
	fmt.Println("I am", st.Self.Name, "at", st.Self.Addresses)
}

// Requests over the mesh go to peers by name and never anywhere else.
func ExampleNode_HTTPClient() {
	n := &mesh.Node{Hostname: "planner"} // the rest comes from MESH_* variables
	defer n.Close()
	resp, err := n.HTTPClient().Get("http://images:8080/render?text=hello")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status)
}

// An HTTP server knows who asks, and what the policy grants to whom.
func ExampleConnContext() {
	type tool struct {
		Name string `json:"name"`
	}
	n := &mesh.Node{Hostname: "images"}
	defer n.Close()
	l, err := n.Listen("tcp", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	srv := &http.Server{
		ConnContext: mesh.ConnContext,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			peer, ok := mesh.PeerFromContext(r.Context())
			if !ok {
				http.Error(w, "not from the mesh", http.StatusForbidden)
				return
			}
			tools, err := identity.CapabilitiesOf[tool](peer, "example.com/cap/tools")
			if err != nil || len(tools) == 0 {
				http.Error(w, "no tools for "+peer.Name, http.StatusForbidden)
				return
			}
			fmt.Fprintln(w, "you may use", tools)
		}),
	}
	log.Fatal(srv.Serve(l))
}

// Datagrams carry the identity of their sender, too.
func ExampleNode_ListenPacket() {
	n := &mesh.Node{Hostname: "clock"}
	defer n.Close()
	pc, err := n.ListenPacket("udp", ":123")
	if err != nil {
		log.Fatal(err)
	}
	buf := make([]byte, 1500)
	for {
		size, from, err := pc.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(size, "bytes from", from.(*mesh.Addr).Peer.Name)
	}
}

// The package's own functions use a node that MESH_* variables configure.
func Example() {
	l, err := mesh.Listen("tcp", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(l, nil))
}
