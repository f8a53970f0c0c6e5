package interop

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// stockRelayOnly and relayOnly keep nodes off direct paths; a stock node only
// if its peers do not look for one either.
var stockRelayOnly = []string{"TS_DEBUG_NEVER_DIRECT_UDP=1"}

func relayOnly(n *mesh.Node) { n.RelayOnly = true }

// pairOn starts a stock node and one of ours on free UDP ports, which are
// returned.
func pairOn(t testing.TB, m *meshtest.Mesh) (laptop *stockNode, ours *agent, ports [2]uint16) {
	t.Helper()
	ports = [2]uint16{freePort(t), freePort(t)}
	laptop = stockOf(t, m, "laptop", []string{"tag:s"}, nil, "-port", fmt.Sprint(ports[0]))
	ours = startAgent(t, m, "agent", []string{"tag:a"}, func(n *mesh.Node) { n.Port = ports[1] })
	know(t, laptop, ours)
	return laptop, ours, ports
}

// cut drops what the namespace sends to the UDP ports of nodes, but for what
// STUN answers and if which is "" of both families; else which is "ipv4" or
// "ipv6". The returned function ends that; it may be called again.
func cut(t testing.TB, m *meshtest.Mesh, which string, ports [2]uint16) (restore func()) {
	t.Helper()
	table := fmt.Sprintf("cut%d", ports[0])
	family := ""
	if which != "" {
		family = "meta nfproto " + which + " "
	}
	nft(t, fmt.Sprintf(`table inet %s {
		chain in {
			type filter hook input priority 0;
			%sudp sport { %d, %d } udp dport { %d, %d } drop
		}
	}`, table, family, ports[0], ports[1], ports[0], ports[1]))
	var once sync.Once
	restore = func() { once.Do(func() { nft(t, "delete table inet "+table) }) }
	t.Cleanup(restore)
	return restore
}

func nft(t testing.TB, script string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("nft %s: %v: %s", script, err, out)
	}
}

// A path between a stock node and one of ours goes from relay to direct, back
// to the relay when UDP is cut and direct again, and the connections that both
// opened at the start see nothing of it.
func TestMixedPathChanges(t *testing.T) {
	t.Parallel()
	m := meshtest.Start(t, openPolicy)
	ports := [2]uint16{freePort(t), freePort(t)}
	restore := cut(t, m, "", ports)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil, "-port", fmt.Sprint(ports[0]))
	ours := startAgent(t, m, "agent", []string{"tag:a"}, func(n *mesh.Node) { n.Port = ports[1] })
	know(t, laptop, ours)

	out := echoConn(t, ours, laptop)
	laptop.do("open", map[string]any{"Name": "in", "Addr": port(ours, false, 7)}, nil)
	becomes := func(path string) {
		t.Helper()
		until(t, "both paths to be "+path, func() bool {
			const size = 20_000
			if sum, err := echoOver(out, size); err != nil || sum != sumOf(size) {
				t.Fatalf("our connection: %v", err)
			}
			var sum string
			laptop.do("exchange", map[string]any{"Name": "in", "Bytes": size, "Seconds": seconds}, &sum)
			if sum != sumOf(size) {
				t.Fatal("the stock node's connection brought something else")
			}
			return ours.pathTo(laptop) == path && laptop.pathTo(ours) == path
		})
	}
	becomes("relay")
	restore()
	becomes("direct")
	restore = cut(t, m, "", ports)
	becomes("relay")
	restore()
	becomes("direct")
}

// Where one family is cut the other one carries the direct path.
func TestMixedPathFamilies(t *testing.T) {
	t.Parallel()
	for which, want := range map[string]string{"ipv4": "[", "ipv6": "1"} {
		t.Run("without "+which, func(t *testing.T) {
			t.Parallel()
			m := meshtest.Start(t, openPolicy)
			ports := [2]uint16{freePort(t), freePort(t)}
			cut(t, m, which, ports)
			laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil, "-port", fmt.Sprint(ports[0]))
			ours := startAgent(t, m, "agent", []string{"tag:a"}, func(n *mesh.Node) { n.Port = ports[1] })
			know(t, laptop, ours)
			until(t, "a direct path", func() bool {
				talk(t, laptop, ours, false)
				talk(t, ours, laptop, true)
				p, _ := ours.peer("laptop")
				r, err := laptop.ping(ours.at(false), "disco")
				return strings.HasPrefix(p.Path.Endpoint.String(), want) && err == nil && strings.HasPrefix(r.Endpoint, want)
			})
		})
	}
}

// bulk is how much large transfers move.
func bulk(full int64) int64 {
	if testing.Short() || raceEnabled {
		return full / 16
	}
	return full
}

// 64 MiB arrive whole, both ways, by direct and by relayed paths, whichever
// side it is that has no UDP.
func TestMixedLargeTransfers(t *testing.T) {
	for name, c := range map[string]struct {
		path string
		env  []string
		opt  func(*mesh.Node)
	}{
		"direct": {"direct", nil, func(*mesh.Node) {}},
		// Without a socket: clients of 1.90 that go direct never themselves
		// answer pings all the same.
		"stock by relay only": {"relay", []string{"TS_DEBUG_ALWAYS_USE_DERP=1"}, func(*mesh.Node) {}},
		"ours by relay only":  {"relay", nil, relayOnly},
	} {
		t.Run(name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			laptop := stockOf(t, m, "laptop", []string{"tag:s"}, c.env)
			ours := startAgent(t, m, "agent", []string{"tag:a"}, c.opt)
			know(t, laptop, ours)
			until(t, "the path to be "+c.path, func() bool {
				talk(t, laptop, ours, false)
				talk(t, ours, laptop, false)
				return laptop.pathTo(ours) == c.path && ours.pathTo(laptop) == c.path
			})
			size := bulk(64 << 20)
			transfer(t, laptop, ours, size)
			transfer(t, ours, laptop, size)
			// On a busy machine a stock client's pings may take seconds beside that.
			until(t, "the path to be "+c.path+" after it", func() bool {
				return laptop.pathTo(ours) == c.path && ours.pathTo(laptop) == c.path
			})
		})
	}
}

// A stock node is killed and started again: peers reach the new process as soon
// as it is up, and the other way round.
func TestStockRestarts(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	talk(t, ours, laptop, false)
	before := laptop.Status.Self
	laptop.kill()
	laptop.again()
	if now := laptop.Status.Self; now.ID != before.ID || now.PublicKey != before.PublicKey {
		t.Errorf("after the restart it is %+v, was %+v", now, before)
	}
	know(t, laptop, ours)
	talk(t, ours, laptop, false)
	talk(t, laptop, ours, true)
}

// A node of ours is started again, with the session that the stock node still
// uses gone: our greeting, an extra, begins another, and the stock node takes it
// for what it is.
func TestOursRestarts(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	talk(t, laptop, ours, false)
	dir := ours.Dir
	ours.Close()
	ours = startAgent(t, m, "agent", nil, func(n *mesh.Node) { n.Dir = dir })
	know(t, laptop, ours)
	talk(t, laptop, ours, false)
	talk(t, ours, laptop, true)
}

// Connections outlive several handshakes of WireGuard, which come every two
// minutes.
func TestMixedRekey(t *testing.T) {
	if testing.Short() {
		t.Skip("takes more than two minutes")
	}
	t.Parallel()
	life := 130 * time.Second
	if os.Getenv("MESH_FULL") != "" {
		life = 390 * time.Second
	}
	m := meshtest.Start(t, openPolicy)
	laptop, ours, _ := pairOn(t, m)
	out := echoConn(t, ours, laptop)
	laptop.do("open", map[string]any{"Name": "in", "Addr": port(ours, false, 7)}, nil)
	handshakes := func() int {
		return laptop.logged("Received handshake response") + laptop.logged("Sending handshake response")
	}
	first := handshakes()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	rounds := 0
	for end := time.Now().Add(life); time.Now().Before(end); rounds++ {
		const size = 5000
		if sum, err := echoOver(out, size); err != nil || sum != sumOf(size) {
			t.Fatalf("our connection after %d rounds: %v", rounds, err)
		}
		var sum string
		laptop.do("exchange", map[string]any{"Name": "in", "Bytes": size, "Seconds": seconds}, &sum)
		if sum != sumOf(size) {
			t.Fatalf("the stock node's connection after %d rounds brought something else", rounds)
		}
		<-tick.C // as a connection that says a little every now and then
	}
	if n := handshakes() - first; n < int(life/(125*time.Second)) {
		t.Errorf("%d handshakes in %v", n, life)
	} else {
		t.Logf("%d rounds and %d more handshakes in %v", rounds, n, life)
	}
}
