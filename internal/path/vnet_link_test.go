package path_test

import (
	"testing"
	"time"

	"mesh/internal/vnet"
)

// Links that lose, reorder, delay or are narrow: a direct path is found and kept.
func TestVnetLinks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		link vnet.Link
		gap  time.Duration // goal
		flap bool          // may lose its direct path
	}{
		{"5 % loss", vnet.Link{Latency: wanLatency, Loss: 0.05}, time.Second, false},
		{"10 % loss", vnet.Link{Latency: wanLatency, Loss: 0.1}, time.Second, false},
		{"20 % loss", vnet.Link{Latency: wanLatency, Loss: 0.2}, time.Second, true},
		{"10 % loss in bursts", vnet.Link{Latency: wanLatency, Loss: 0.1, Burst: 8}, time.Second, true},
		{"reordering", vnet.Link{Latency: wanLatency, Reorder: 0.2, ReorderBy: 30 * time.Millisecond}, time.Second, false},
		{"duplication", vnet.Link{Latency: wanLatency, Duplicate: 0.3}, time.Second, false},
		{"300 ms latency", vnet.Link{Latency: 300 * time.Millisecond}, time.Second, false},
		{"100 ms and 200 ms jitter", vnet.Link{Latency: 100 * time.Millisecond, Jitter: 200 * time.Millisecond}, time.Second, false},
		{"100 kB/s", vnet.Link{Latency: wanLatency, Bandwidth: 100_000}, time.Second, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorld(t, 1, func(t *testing.T, w *world) {
				ra, rb := w.n.NAT(vnet.Home()), w.n.NAT(vnet.Home())
				ra.SetLink(c.link)
				a, b := w.agent("a", ra.Host()), w.agent("b", rb.Host())
				time.Sleep(2 * time.Second)
				began := time.Now()
				talkUntil(a, b, 30*time.Second, dataLen, func() bool { return bothDirect(a, b) })
				within(t, c.name+": direct", time.Since(began), 1500*time.Millisecond)
				a.resetGap(b)
				b.resetGap(a)
				r := watch(a, b, time.Minute)
				within(t, c.name+": longest gap in a minute", r.gap, c.gap)
				if r.moved != 0 && !c.flap {
					t.Errorf("the direct path changed %d times: %s", r.moved, how(a, b))
				}
				_, direct, relayed := a.heardFrom(b)
				t.Logf("%d datagrams direct, %d by relay", direct, relayed)
			})
		})
	}
}

// Datagrams of full size arrive although links or black holes take only small
// ones.
func TestVnetMTU(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		link vnet.Link
	}{
		{"MTU 1500", vnet.Link{Latency: wanLatency}},
		{"MTU 1280", vnet.Link{Latency: wanLatency, MTU: 1280}},
		{"MTU 1280, no fragments", vnet.Link{Latency: wanLatency, MTU: 1280, NoFragments: true}},
		{"black hole above 1280", vnet.Link{Latency: wanLatency, BlackHole: 1280}},
	} {
		t.Run(c.name, func(t *testing.T) {
			inWorld(t, 1, func(t *testing.T, w *world) {
				a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
				settled(t, a.agent, b.agent, true)
				full := func(what string) {
					t.Helper()
					a.resetGap(b.agent)
					b.resetGap(a.agent)
					talkUntil(a.agent, b.agent, 20*time.Second, fullLen, func() bool { return false })
					within(t, c.name+", "+what, max(a.gapFrom(b.agent), b.gapFrom(a.agent)), 500*time.Millisecond)
					_, direct, relayed := a.heardFrom(b.agent)
					t.Logf("%d datagrams direct, %d by relay; %s", direct, relayed, how(a.agent, b.agent))
				}
				full("before")
				a.router.SetLink(c.link)
				full("after the link became so")
			})
			inWorld(t, 1, func(t *testing.T, w *world) {
				ra, rb := w.n.NAT(vnet.Home()), w.n.NAT(vnet.Home())
				ra.SetLink(c.link)
				a, b := w.agent("a", ra.Host()), w.agent("b", rb.Host())
				time.Sleep(time.Second)
				talkUntil(a, b, 20*time.Second, fullLen, func() bool { return false })
				within(t, c.name+", from the start", max(a.gapFrom(b), b.gapFrom(a)), 500*time.Millisecond)
				_, direct, relayed := a.heardFrom(b)
				t.Logf("%d datagrams direct, %d by relay; %s", direct, relayed, how(a, b))
			})
		})
	}
}
