package interop

import (
	"context"
	"io"
	"testing"
	"time"

	"mesh/internal/meshtest"
)

// A server that forgets everything gives live nodes new numbers and addresses,
// now and then each other's: they reach each other by them at once.
func TestOnStockSwapsAddresses(t *testing.T) {
	s := serveStock(t)
	a, b := s.agent("a"), s.agent("b")
	waitFor(t, a.Node, s.findOurs(b.Node).Key)
	waitFor(t, b.Node, s.findOurs(a.Node).Key)
	swaps := 0
	for round := 0; swaps < 3 && round < 12; round++ {
		was := [2]string{a.at(false).String(), b.at(false).String()}
		// With connections that go on, that were closed, and none.
		switch round % 3 {
		case 0:
			dialEcho(t, a.Node, port(b, false, 7))
		case 1:
			talk(t, a, b, false)
		}
		s.do("stop", nil, nil)
		until(t, "the outage to be noticed", func() bool { return a.Status().Control != "" && b.Status().Control != "" })
		s.do("start", map[string]any{"Forget": true}, nil)
		until(t, "both to be known again", func() bool { return len(s.nodes()) == 2 })
		until(t, "both to be back", func() bool { return a.Status().Control == "" && b.Status().Control == "" })
		for _, n := range []*agent{a, b} {
			k := s.findOurs(n.Node)
			until(t, n.Hostname+" to take the addresses that it has now", func() bool { return n.at(false) == k.Addresses[0].Addr() })
		}
		waitFor(t, a.Node, s.findOurs(b.Node).Key)
		waitFor(t, b.Node, s.findOurs(a.Node).Key)
		swapped := a.at(false).String() == was[1] && b.at(false).String() == was[0]
		if swapped {
			swaps++
		}
		for _, p := range [][2]*agent{{a, b}, {b, a}} {
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
			c, err := p[0].Dial(ctx, "tcp", port(p[1], false, 7))
			cancel()
			took := time.Since(begin)
			if err != nil {
				t.Fatalf("round %d, swapped %v: %s to %s after %v: %v", round, swapped, p[0].Hostname, p[1].Hostname, took, err)
			}
			if _, err := io.WriteString(c, "x"); err != nil {
				t.Error(err)
			}
			c.Close()
			if took > 5*time.Second {
				t.Errorf("round %d, swapped %v: %s to %s took %v", round, swapped, p[0].Hostname, p[1].Hostname, took)
			}
			t.Logf("round %d, swapped %v: %s to %s took %v", round, swapped, p[0].Hostname, p[1].Hostname, took.Round(time.Millisecond))
		}
	}
	if swaps == 0 {
		t.Log("the addresses were never swapped")
	}
}
