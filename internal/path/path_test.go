package path

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// pair is two nodes that know each other, both at home in region 1.
func pair(t *testing.T) (n *memNet, a, b *node) {
	n = newMemNet(t)
	n.relay(1)
	n.stuns[stunServer(1)] = 4 * time.Millisecond
	a, b = n.node("192.0.2.1"), n.node("192.0.2.2")
	a.SetRelays(relayMap(1))
	b.SetRelays(relayMap(1))
	a.knows(b.peer(1))
	b.knows(a.peer(1))
	for _, nd := range []*node{a, b} {
		if err := nd.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return n, a, b
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func settle(d time.Duration) {
	time.Sleep(d) // virtual
	synctest.Wait()
}

func TestRelayFirstThenDirect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		a.send(t, b, "one")
		settle(100 * time.Millisecond)
		got := b.take()
		if len(got) != 1 || got[0].data != "one" || got[0].src != (Source{Peer: a.key(), Region: 1}) {
			t.Fatalf("first packet: %+v", got)
		}
		st := a.Status(b.key())
		if st.Direct != b.addr || !st.Trusted || st.Region != 0 || st.Latency != 2*time.Millisecond {
			t.Fatalf("status %+v", st)
		}
		relayed := n.relays[1].carried()
		a.send(t, b, "two")
		settle(100 * time.Millisecond)
		got = b.take()
		if len(got) != 1 || got[0].data != "two" || got[0].src != (Source{Peer: a.key(), Addr: a.addr}) {
			t.Fatalf("second packet: %+v", got)
		}
		if n.relays[1].carried() != relayed {
			t.Error("sent by relay although the direct path is trusted")
		}
	})
}

func TestDirectDiesSilently(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a, b := pair(t)
		talk := func(d time.Duration) (longest time.Duration) {
			last := time.Now()
			for end := time.Now().Add(d); time.Now().Before(end); {
				a.send(t, b, "x")
				settle(50 * time.Millisecond)
				if len(b.take()) > 0 {
					longest = max(longest, time.Since(last))
					last = time.Now()
				}
			}
			return max(longest, time.Since(last))
		}
		talk(20 * time.Second)
		if st := a.Status(b.key()); !st.Trusted {
			t.Fatalf("no direct path: %+v", st)
		}
		n.block(a.addr.Addr(), b.addr.Addr(), true)
		if gap := talk(30 * time.Second); gap > time.Second {
			t.Errorf("nothing arrived for %v", gap)
		}
		if st := a.Status(b.key()); st.Direct.IsValid() || st.Region != 1 {
			t.Errorf("still direct: %+v", st)
		}
		n.block(a.addr.Addr(), b.addr.Addr(), false)
		if gap := talk(10 * time.Second); gap > 100*time.Millisecond {
			t.Errorf("recovery lost packets for %v", gap)
		}
		if st := a.Status(b.key()); st.Direct != b.addr || !st.Trusted {
			t.Errorf("not direct again: %+v", st)
		}
	})
}

func TestReport(t *testing.T) {
	bubble(t, func(t *testing.T) {
		_, a, _ := pair(t)
		settle(time.Second)
		r := a.lastReport()
		want := []netip.AddrPort{a.addr}
		if len(r.Endpoints) != 1 || r.Endpoints[0] != want[0] || len(r.Types) != 1 {
			t.Errorf("endpoints %v %v", r.Endpoints, r.Types)
		}
		if r.NetInfo.PreferredDERP != 1 || r.NetInfo.WorkingUDP == nil || !*r.NetInfo.WorkingUDP {
			t.Errorf("net info %+v", r.NetInfo)
		}
		if a.HomeRegion() != 1 || a.LocalPort() != 41641 {
			t.Error(a.HomeRegion(), a.LocalPort())
		}
	})
}
