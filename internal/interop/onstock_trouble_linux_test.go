package interop

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"mesh"
	"mesh/control"
	"mesh/internal/meshtest"
)

// A server that fails, is busy, goes away, breaks connections or comes back
// without its memory: nodes that are up go on, and follow it again.
func TestOnStockTrouble(t *testing.T) {
	s := serveStock(t)
	// While a node enrols its caller hears of it at once, with what to do.
	n := s.node("a")
	for _, code := range []int{http.StatusInternalServerError, http.StatusTooManyRequests} {
		s.fault("/machine/register", false, code, 1, "7")
		var st *control.StatusError
		if _, err := n.Up(t.Context()); !errors.As(err, &st) || st.Status != code || control.RetryAfter(err) == 0 || !strings.Contains(err.Error(), "as the test wants it") {
			t.Errorf("with status %d: %v", code, err)
		}
	}
	s.fault("/machine/map", true, http.StatusServiceUnavailable, 1, "1")
	s.fault("/machine/map", false, http.StatusInternalServerError, 2, "")
	meshtest.Up(t, n)
	a := &agent{n, t}
	a.services()
	b := s.agent("b")
	waitFor(t, a.Node, s.findOurs(b.Node).Key)
	waitFor(t, b.Node, s.findOurs(a.Node).Key)
	line := dialEcho(t, a.Node, port(b, false, 7))
	back := func() {
		t.Helper()
		until(t, "both to be back", func() bool { return a.Status().Control == "" && b.Status().Control == "" })
	}
	polls := func() int { return s.requests()["POLL /machine/map"] }

	before := polls()
	s.fault("/machine/map", true, http.StatusInternalServerError, 2, "")
	s.do("cut", nil, nil)
	until(t, "new polls after a cut", func() bool { return polls() >= before+4 })
	back()
	line.works("after cut connections")

	s.do("stop", nil, nil)
	until(t, "the outage to be noticed", func() bool { return a.Status().Control != "" && b.Status().Control != "" })
	line.works("without a server")
	talk(t, b, a, false)
	s.do("start", nil, nil)
	back()
	line.works("after an outage")

	// A server that was started without its memory has another key, and takes
	// its nodes back, perhaps with each other's addresses.
	s.do("stop", nil, nil)
	until(t, "the outage to be noticed", func() bool { return a.Status().Control != "" && b.Status().Control != "" })
	s.do("start", map[string]any{"Forget": true}, nil)
	until(t, "both to be known again", func() bool { return len(s.nodes()) == 2 })
	back()
	for _, n := range []*agent{a, b} {
		k := s.findOurs(n.Node)
		until(t, n.Hostname+" to take the addresses that it has now", func() bool { return n.at(false) == k.Addresses[0].Addr() })
	}

	// Ping requests are answered at the server itself and nowhere else; what
	// else a server may ask for by them is not offered, and harms nothing.
	me := s.findOurs(a.Node)
	ping := func(m map[string]any) {
		t.Helper()
		s.do("ping", map[string]any{"NodeKey": me.Key, "Request": m}, nil)
	}
	ping(map[string]any{"URL": "https://unused/ping/inside", "URLIsNoise": true})
	until(t, "the answer to a ping", func() bool { return s.requests()["HEAD /ping/inside"] == 1 })
	ping(map[string]any{"URL": "https://unused/ping/c2n", "Types": "c2n", "Payload": []byte("GET /echo HTTP/1.1\r\n\r\n")})
	ping(map[string]any{"URL": "https://unused/ping/last", "URLIsNoise": true})
	until(t, "the answer to a ping", func() bool { return s.requests()["HEAD /ping/last"] == 1 })
	if got := s.requests(); got["HEAD /ping/c2n"]+got["POST /ping/c2n"] != 0 {
		t.Errorf("requests %v", got)
	}
}

// A node with a saved map comes up while its server is busy, and waits for it.
func TestOnStockBusyAtStart(t *testing.T) {
	s := serveStock(t)
	first := s.ours("a")
	dir := first.Dir
	first.Close()
	s.fault("/machine/register", false, http.StatusTooManyRequests, 2, "1")
	s.ours("a", func(n *mesh.Node) { n.Dir = dir })
	if got := s.requests(); got["POST /machine/register"] < 2 {
		t.Errorf("requests %v", got)
	}
}
