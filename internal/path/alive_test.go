package path

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// TestChooserLosesSilentPath measures how soon a path that dies under traffic
// is doubted (packets go by relay as well) and given up.
func TestChooserLosesSilentPath(t *testing.T) {
	for _, latency := range []time.Duration{ms, 40 * ms, 300 * ms, 600 * ms} {
		ct := newChooserTest(t, "192.0.2.1:1")
		c := &ct.c
		ct.run(30*time.Second, 20*ms, up(latency, "192.0.2.1:1"))
		if !c.hasDirect(ct.now) {
			t.Fatal("no path")
		}
		died := ct.now
		var doubted, lost time.Duration
		ct.observe = func() {
			if doubted == 0 && !c.hasDirect(ct.now) {
				doubted = ct.now - died
			}
			if lost == 0 && !c.best.IsValid() {
				lost = ct.now - died
			}
		}
		ct.run(20*time.Second, 20*ms, up(latency))
		t.Logf("latency %v: doubted after %v, given up after %v", latency, doubted, lost)
		if limit := confirmedFor + unansweredFor + 3*latency; doubted == 0 || doubted > limit {
			t.Errorf("latency %v: doubted after %v", latency, doubted)
		}
		if lost == 0 || lost > 13*time.Second || c.why != "path silent" {
			t.Errorf("latency %v: given up after %v: %s", latency, lost, c.why)
		}
		// It is tried on, at the pace of the protocol, and comes back.
		ct.observe = nil
		if n := ct.run(50*time.Second, 20*ms, up(latency)); n > 50/2+50/3+2 {
			t.Errorf("%d pings in 50 s", n)
		}
		ct.run(pingSpacing+2*latency, 20*ms, up(latency, "192.0.2.1:1"))
		if !c.hasDirect(ct.now) {
			t.Errorf("latency %v: not back", latency)
		}
	}
}

// TestChooserDoesNotFlap lets a tenth of all packets get lost each way, for
// traffic of both kinds.
func TestChooserDoesNotFlap(t *testing.T) {
	for _, latency := range []time.Duration{ms, 50 * ms, 300 * ms} {
		for _, every := range []time.Duration{20 * ms, time.Second} {
			for seed := range uint64(5) {
				rng := rand.New(rand.NewPCG(seed, 1))
				ct := newChooserTest(t, "192.0.2.1:1", "192.0.2.2:1")
				c := &ct.c
				lossy := func(to netip.AddrPort, _ bool, _ instant) time.Duration {
					if rng.Float64() < 0.19 {
						return 0
					}
					if to == ap("192.0.2.2:1") {
						return latency * 21 / 20
					}
					return latency + time.Duration(rng.Int64N(int64(latency)/20+1))
				}
				ct.run(10*time.Second, every, lossy)
				best, since := c.best, c.since
				inDoubt, n := 0, 0
				ct.observe = func() {
					n++
					if !c.hasDirect(ct.now) {
						inDoubt++
					}
				}
				ct.run(10*time.Minute, every, lossy)
				if c.best != best || c.since != since {
					t.Errorf("latency %v, seed %d: path changed to %v: %s", latency, seed, c.best, c.why)
				}
				if !c.size.proven {
					t.Errorf("latency %v, seed %d: full datagrams no more", latency, seed)
				}
				if inDoubt > n/2 {
					t.Errorf("latency %v, seed %d: in doubt %d of %d ticks", latency, seed, inDoubt, n)
				}
			}
		}
	}
}

// TestChooserTakesTheOther moves to another address that answers when the best
// falls silent, without going without.
func TestChooserTakesTheOther(t *testing.T) {
	ct := newChooserTest(t, "192.0.2.1:1", "192.0.2.2:1")
	c := &ct.c
	ct.run(10*time.Second, 20*ms, func(to netip.AddrPort, _ bool, _ instant) time.Duration {
		if to == ap("192.0.2.1:1") {
			return 10 * ms
		}
		return 30 * ms
	})
	if c.best != ap("192.0.2.1:1") {
		t.Fatal(c.best)
	}
	died, moved := ct.now, time.Duration(0)
	ct.observe = func() {
		if moved == 0 && c.best == ap("192.0.2.2:1") {
			moved = ct.now - died
		}
	}
	ct.run(10*time.Second, 20*ms, up(30*ms, "192.0.2.2:1"))
	t.Logf("moved after %v: %s", moved, c.why)
	if moved == 0 || moved > 2*time.Second || !c.hasDirect(ct.now) {
		t.Errorf("moved after %v, best %v", moved, c.best)
	}
}

// TestChooserFullSize: full datagrams go only where a ping of their size was
// answered, and no longer than that is so.
func TestChooserFullSize(t *testing.T) {
	const small, all = false, true
	way := func(what bool) world {
		return func(_ netip.AddrPort, full bool, _ instant) time.Duration {
			if full && what == small {
				return 0
			}
			return 10 * ms
		}
	}
	ct := newChooserTest(t, "192.0.2.1:1")
	c := &ct.c
	n := ct.run(60*time.Second, 20*ms, way(small))
	if !c.hasDirect(ct.now) || c.usableSize() != minDatagram {
		t.Fatalf("best %v size %d", c.best, c.usableSize())
	}
	if n > 300 {
		t.Errorf("%d pings in a minute", n)
	}
	since := c.since
	ct.run(fullEvery+time.Second, 20*ms, way(all))
	if c.usableSize() != fullDatagram || ct.now > c.size.until {
		t.Fatalf("size %d although large pings are answered", c.usableSize())
	}
	// A black hole opens: both ways soon, the relay alone later.
	began := ct.now
	var doubted, given time.Duration
	ct.observe = func() {
		if doubted == 0 && ct.now > c.size.until {
			doubted = ct.now - began
		}
		if given == 0 && !c.size.proven {
			given = ct.now - began
		}
	}
	ct.run(20*time.Second, 20*ms, way(small))
	t.Logf("black hole: doubted after %v, given up after %v", doubted, given)
	if doubted == 0 || doubted > time.Second || given == 0 || given > 4*time.Second {
		t.Errorf("black hole: doubted after %v, given up after %v", doubted, given)
	}
	if c.since != since || !c.hasDirect(ct.now) {
		t.Errorf("path lost for a black hole of large packets: %s", c.why)
	}
}

// A path that fell silent has our own addresses asked for at once and some times
// again, until a path answers; then and after a while it is left alone.
func TestLostPathAsksForOurAddresses(t *testing.T) {
	for _, heals := range []bool{false, true} {
		const a = "192.0.2.1:1"
		ct := newChooserTest(t, a)
		ct.run(10*time.Second, 100*ms, up(10*ms, a))
		lost := ct.now
		var asked []time.Duration
		ct.observe = func() {
			if ct.out.stale && ct.out.call {
				asked = append(asked, ct.now-lost)
			}
		}
		world := up(10*ms, "192.0.2.9:9")
		if heals {
			ct.run(3*time.Second, 100*ms, world)
			world = up(10*ms, a)
		}
		ct.run(2*time.Minute, 100*ms, world)
		want := restunTries
		if heals {
			want = 2
		}
		if len(asked) != want || asked[0] > 2*time.Second || asked[1]-asked[0] > 3*time.Second {
			t.Errorf("heals %v: asked after %v", heals, asked)
		}
	}
}
