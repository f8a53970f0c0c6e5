package interop

import (
	"fmt"
	"sync"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// Three stock nodes and three of ours in one mesh: every ordered pair exchanges
// an HTTP request and a body of 16 MiB, once directly and once by relay only.
func TestMixedMesh(t *testing.T) {
	for _, c := range []struct {
		path string
		env  []string
		opt  func(*mesh.Node)
	}{
		{"direct", nil, func(*mesh.Node) {}},
		{"relay", stockRelayOnly, relayOnly},
	} {
		t.Run(c.path, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			var members []member
			for i := range 3 {
				members = append(members,
					stockOf(t, m, fmt.Sprintf("stock-%d", i), []string{"tag:s"}, c.env),
					startAgent(t, m, fmt.Sprintf("agent-%d", i), []string{"tag:a"}, c.opt))
			}
			know(t, members...)
			size := bulk(16 << 20)
			// Each round has every member ask one other, and be asked by one.
			for round := 1; round < len(members); round++ {
				var wg sync.WaitGroup
				for i, from := range members {
					to := members[(i+round)%len(members)]
					wg.Go(func() { mixedExchange(t, from, to, c.path, size) })
				}
				wg.Wait()
				if t.Failed() {
					return
				}
			}
		})
	}
}

// mixedExchange has one member ask another who it is and fetch a body, by the
// path that is wanted.
func mixedExchange(t *testing.T, from, to member, path string, size int64) {
	where := from.label() + " and " + to.label()
	url := "http://" + port(to, false, 80)
	took := happens(func() bool {
		_, err := from.fetch(url+"/whois", 0)
		return err == nil && from.pathTo(to) == path
	})
	if !took {
		t.Errorf("%s: no %s path", where, path)
		return
	}
	r, err := from.fetch(url+"/whois", 0)
	if err != nil || r.Status != 200 {
		t.Errorf("%s: %+v, %v", where, r, err)
		return
	}
	r, err = from.fetch(fmt.Sprintf("%s/bytes?n=%d", url, size), 0)
	if err != nil || r.Bytes != size || r.SHA256 != sumOf(size) {
		t.Errorf("%s: body of %d bytes, %v", where, r.Bytes, err)
		return
	}
	if p := from.pathTo(to); p != path {
		t.Errorf("%s: after the transfer the path is %q, want %s", where, p, path)
	}
}
