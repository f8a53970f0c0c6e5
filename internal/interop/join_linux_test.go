package interop

import (
	"encoding/json"
	"io"
	"net/http"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

const openPolicy = `{"tagOwners": {"tag:a": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`

// serveHTTP runs a service on one of our nodes that answers with the name of
// its caller.
func serveHTTP(t *testing.T, n *mesh.Node, port string) {
	t.Helper()
	ln, err := n.Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		ConnContext: mesh.ConnContext,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p, _ := mesh.PeerFromContext(r.Context())
			io.WriteString(w, p.ShortName())
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
}

// A stock node joins our control server with an enrolment key and talks HTTP
// with one of our nodes, both ways.
func TestStockJoinsWithKey(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	s := stock(t, "laptop", m.Host.URL(), m.Key(keyForTag()), nil)
	s.up()
	s.serve("http", 80)
	ours := m.Node("agent", []string{"tag:a"})
	meshtest.Up(t, ours)
	serveHTTP(t, ours, "80")

	if r := s.get("http://" + ours.Status().Self.Addresses[0].String()); r.Body != "laptop" {
		t.Errorf("our node saw %q", r.Body)
	}
	resp, err := ours.HTTPClient().Get("http://laptop/whois")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var who identity
	if err := json.NewDecoder(resp.Body).Decode(&who); err != nil {
		t.Fatal(err)
	}
	if who.Name != "agent.mesh.internal." || len(who.Tags) != 1 || who.Tags[0] != "tag:a" {
		t.Errorf("the stock node saw %+v", who)
	}
}
