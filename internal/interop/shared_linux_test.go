package interop

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// conversation are connections between a stock node and one of ours, one opened
// by each side.
type conversation struct {
	out net.Conn
	in  string
}

func converse(t testing.TB, laptop *stockNode, a *agent) conversation {
	t.Helper()
	c := conversation{out: echoConn(t, a, laptop), in: "from " + a.label()}
	laptop.do("open", map[string]any{"Name": c.in, "Addr": port(a, false, 7)}, nil)
	return c
}

func (c conversation) goesOn(t testing.TB, laptop *stockNode) {
	t.Helper()
	const size = 20_000
	if sum, err := echoOver(c.out, size); err != nil || sum != sumOf(size) {
		t.Fatalf("our connection: %v", err)
	}
	var sum string
	laptop.do("exchange", map[string]any{"Name": c.in, "Bytes": size, "Seconds": seconds}, &sum)
	if sum != sumOf(size) {
		t.Fatal("the stock node's connection brought something else")
	}
}

// portOf is the UDP port at which a stock node reaches one of ours.
func portOf(t testing.TB, laptop *stockNode, a *agent) (number uint16) {
	t.Helper()
	know(t, laptop, a)
	until(t, "a direct path to "+a.label(), func() bool {
		talk(t, a, laptop, false) // or our side would look for no path
		r, err := laptop.ping(a.at(false), "disco")
		if err != nil {
			return false
		}
		at, err := netip.ParseAddrPort(r.Endpoint)
		number = at.Port()
		return err == nil
	})
	return number
}

// sharers starts agents until two are at one port, and returns those.
func sharers(t testing.TB, m *meshtest.Mesh, laptop *stockNode) (pair []*agent, number uint16) {
	t.Helper()
	at := make(map[uint16]*agent)
	for i := range runtime.GOMAXPROCS(0) + 1 {
		a := startAgent(t, m, fmt.Sprintf("agent%d", i), []string{"tag:a"})
		number := portOf(t, laptop, a)
		if other := at[number]; other != nil {
			know(t, a, other)
			return []*agent{other, a}, number
		}
		at[number] = a
	}
	t.Fatal("no two nodes share a socket")
	return nil, 0
}

// Two nodes of ours that share a socket are two nodes to a stock client: it talks
// with both directly, by relay when UDP is cut, and directly again, over
// connections that see nothing of it, which either side opened.
func TestStockTalksToSharers(t *testing.T) {
	t.Parallel()
	m := meshtest.Start(t, openPolicy)
	own := freePort(t)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil, "-port", fmt.Sprint(own))
	both, shared := sharers(t, m, laptop)
	ports := [2]uint16{own, shared}

	var talks []conversation
	for _, a := range both {
		talks = append(talks, converse(t, laptop, a))
	}
	becomes := func(path string) {
		t.Helper()
		until(t, "all paths to be "+path, func() bool {
			ok := true
			for i, a := range both {
				talks[i].goesOn(t, laptop)
				ok = ok && a.pathTo(laptop) == path && laptop.pathTo(a) == path
			}
			return ok
		})
	}
	becomes("direct")
	for _, a := range both {
		transfer(t, laptop, a, bulk(32<<20))
		transfer(t, a, laptop, bulk(32<<20))
		talk(t, laptop, a, false)
		talk(t, a, laptop, true)
	}
	alone := startAgent(t, m, "alone", []string{"tag:a"}, func(n *mesh.Node) { n.OwnSockets = true })
	if portOf(t, laptop, alone) == shared {
		t.Error("a node with sockets of its own shares them")
	}
	restore := cut(t, m, "", ports)
	becomes("relay")
	restore()
	becomes("direct")
	for _, a := range both {
		if got := portOf(t, laptop, a); got != shared {
			t.Errorf("%s is at port %d now, was at %d", a.label(), got, shared)
		}
	}
	// They talk with each other by that socket, too.
	transfer(t, both[0], both[1], bulk(32<<20))
	until(t, "a direct path between them", func() bool {
		talk(t, both[1], both[0], false)
		return both[0].pathTo(both[1]) == "direct" && both[1].pathTo(both[0]) == "direct"
	})
	// One goes; the other stays where it is.
	name, dir := both[1].Hostname, both[1].Dir
	both[1].Close()
	both, talks = both[:1], talks[:1]
	becomes("direct")
	// The one that went comes back, somewhere.
	again := startAgent(t, m, name, nil, func(n *mesh.Node) { n.Dir = dir })
	know(t, laptop, both[0], again)
	talk(t, laptop, again, false)
	talk(t, again, laptop, true)
	talk(t, again, both[0], false)
	becomes("direct")
	if said := laptop.complains(); said != "" {
		t.Errorf("the stock node: %s", said)
	}
}

// A stock client of old forgets the WireGuard side of a peer that was silent for
// five minutes until it hears of it, and takes what comes from an address for the
// peer that it saw there last: here another, which talks all the time.
func TestStockHearsOfSilentSharer(t *testing.T) {
	if os.Getenv("MESH_FULL") == "" {
		t.Skip("takes seven minutes; set MESH_FULL=1")
	}
	t.Parallel()
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil, "-port", fmt.Sprint(freePort(t)))
	both, _ := sharers(t, m, laptop)
	busy := converse(t, laptop, both[0])
	silence := time.NewTimer(7 * time.Minute)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for silent := true; silent; {
		select {
		case <-tick.C:
			busy.goesOn(t, laptop)
		case <-silence.C:
			silent = false
		}
	}
	begin := time.Now()
	talk(t, both[1], laptop, false)
	t.Logf("heard after %v", time.Since(begin))
	talk(t, laptop, both[1], false)
	until(t, "direct paths", func() bool {
		busy.goesOn(t, laptop)
		talk(t, both[1], laptop, true)
		return both[1].pathTo(laptop) == "direct" && both[0].pathTo(laptop) == "direct" && laptop.pathTo(both[1]) == "direct"
	})
}
