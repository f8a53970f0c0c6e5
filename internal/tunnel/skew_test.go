package tunnel

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// skews and trips are how far apart two begin, and how long a datagram takes.
var (
	skews = []time.Duration{0, 1, 2, 5, 10, 15, 20, 25, 30, 40, 49, 50}
	trips = []time.Duration{0, 1, 5, 10, 20, 25, 50}
)

// Two that begin a handshake at nearly the same moment, whatever the distance in
// time and space: what both said arrives as soon as light permits, and neither
// sends more than one initiation.
func TestCrossingAtAnySkew(t *testing.T) {
	skews, trips := skews, trips
	if raceEnabled {
		skews, trips = []time.Duration{0, 1, 10, 25, 50}, []time.Duration{0, 1, 10, 25}
	}
	for _, kind := range []string{"two nodes", "Device first", "node first"} {
		t.Run(kind, func(t *testing.T) {
			for _, trip := range trips {
				for _, skew := range skews {
					crossing(t, kind, trip*time.Millisecond, skew*time.Millisecond)
				}
			}
		})
	}
}

func crossing(t *testing.T, kind string, trip, skew time.Duration) {
	bubble(t, func(t *testing.T, nw *network) {
		var initiations atomic.Int64
		wire := func(_, _ identity.NodePublic, d []byte) []time.Duration {
			if d[0] == typeInitiation {
				initiations.Add(1)
			}
			return []time.Duration{trip}
		}
		var sayX, sayY func()
		var gotX, gotY func() int
		if kind == "two nodes" {
			e := newEther()
			e.wire = wire
			a, b := e.add(t, nw, "a", 1), e.add(t, nw, "b", 2)
			a.knows(b)
			b.knows(a)
			sayX, sayY = func() { a.say(t, b, "x") }, func() { b.say(t, a, "y") }
			gotX, gotY = func() int { return len(a.take()) }, func() int { return len(b.take()) }
		} else {
			e, n, s := duo(t, nw)
			defer s.close()
			e.mu.Lock()
			e.wire = wire
			e.mu.Unlock()
			sayX, sayY = func() { n.t.Send(s.key, [][]byte{packet(n.v4, s.v4, "x")}) }, func() { s.say(n.v4, "y") }
			gotX, gotY = func() int { return len(n.take()) }, func() int { return len(s.take()) }
			if kind == "Device first" {
				sayX, sayY, gotX, gotY = sayY, sayX, gotY, gotX
			}
		}
		begin := time.Now()
		sayX()
		time.Sleep(skew)
		sayY()
		// A Device that gets an initiation and a response at the very same moment
		// works on them at once and may make one session of two, which cannot be
		// heard. Then the first packet is lost, but not those of seconds later.
		mixed := kind != "two nodes" && skew == trip
		var x, y int
		for i := 1; (x == 0 || y == 0) && time.Since(begin) < time.Minute; i++ {
			synctest.Wait()
			x += gotX()
			y += gotY()
			if x == 0 || y == 0 {
				time.Sleep(time.Millisecond)
			}
			if mixed && i%500 == 0 {
				sayX()
				sayY()
			}
		}
		// An initiation there, a response back, the packet there; and once more
		// half of it where the other one's handshake has to carry ours.
		limit := skew + 4*trip + 3*time.Millisecond
		if mixed {
			limit += 5 * time.Second
			initiations.Store(0)
		}
		if took := time.Since(begin); took > limit || initiations.Load() > 2 {
			t.Errorf("%s, %v apart, %v away: %v, at most %v; %d initiations; %d %d", kind, skew, trip, took, limit, initiations.Load(), x, y)
		}
		if mixed {
			time.Sleep(time.Second)
			synctest.Wait()
			gotX()
			gotY()
		}
		// Both go on.
		for range 3 {
			sayX()
			sayY()
			time.Sleep(2*trip + time.Millisecond)
			synctest.Wait()
			if x, y := gotX(), gotY(); x != 1 || y != 1 {
				t.Errorf("%s, %v apart, %v away: %d and %d packets after it", kind, skew, trip, x, y)
			}
		}
	})
}

// Three of our nodes and two Devices, any two of which talk, for an hour under
// random loss and delay: nothing comes twice or to somebody else, most arrives,
// and in the end everybody hears everybody.
func TestMixedHour(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		e := newEther()
		rng := rand.New(rand.NewPCG(5, 6))
		lossy := true
		e.wire = func(_, _ identity.NodePublic, _ []byte) []time.Duration {
			if lossy && rng.IntN(20) == 0 {
				return nil
			}
			return []time.Duration{time.Duration(1+rng.IntN(20)) * time.Millisecond}
		}
		type member struct {
			say func(to int, text string)
			got func() []string
		}
		var members [5]member
		var nodes [3]*node
		var devices [2]*stock
		var all [5]*node // as netmaps see them
		for i := range nodes {
			nodes[i] = e.add(t, nw, fmt.Sprint("n", i), byte(i+1))
			all[i] = nodes[i]
		}
		for i := range devices {
			devices[i] = e.stock(t, identity.NewNode(), byte(i+4))
			defer devices[i].close()
			all[i+3] = devices[i].asNode()
		}
		for i := range all {
			for k := range all {
				if i == k {
					continue
				}
				if i < 3 {
					nodes[i].knows(all[k])
				} else {
					devices[i-3].knows(t, all[k].key, all[k].v4, psk{})
				}
			}
			members[i] = member{
				say: func(to int, text string) {
					if i < 3 {
						if err := nodes[i].t.Send(all[to].key, [][]byte{packet(all[i].v4, all[to].v4, text)}); err != nil {
							t.Error(err)
						}
					} else {
						devices[i-3].say(all[to].v4, text)
					}
				},
				got: func() (texts []string) {
					if i >= 3 {
						return devices[i-3].take()
					}
					for _, g := range nodes[i].take() {
						texts = append(texts, payload(g.packet))
					}
					return texts
				},
			}
		}
		seen := make(map[string]int)
		collect := func() {
			synctest.Wait()
			for i, m := range members {
				for _, text := range m.got() {
					var from, to, number int
					fmt.Sscan(text, &from, &to, &number)
					if to != i {
						t.Fatalf("%q came to %d", text, i)
					}
					seen[text]++
				}
			}
		}
		sent := 0
		own := rand.New(rand.NewPCG(7, 8)) // the other is guarded by the ether
		for begin := time.Now(); time.Since(begin) < time.Duration(unlessRace(60, 15))*time.Minute; sent++ {
			from := own.IntN(5)
			to := (from + 1 + own.IntN(4)) % 5
			members[from].say(to, fmt.Sprint(from, to, sent))
			time.Sleep(time.Duration(own.ExpFloat64() * float64(time.Second)))
			if sent%100 == 0 {
				collect()
			}
		}
		time.Sleep(10 * time.Second)
		collect()
		for text, times := range seen {
			if times != 1 {
				t.Errorf("%q came %d times", text, times)
			}
		}
		t.Logf("%d of %d arrived", len(seen), sent)
		if len(seen) < sent*93/100 {
			t.Errorf("%d of %d arrived", len(seen), sent)
		}
		e.mu.Lock()
		lossy = false
		e.mu.Unlock()
		time.Sleep(3 * time.Minute) // whatever is broken is noticed and renewed
		clear(seen)
		// All begin at once, and a Device that crosses with somebody may make one
		// session of two (see crossing): then what was said first is lost, and what
		// is said seconds later is not.
		for i := range 4 {
			for from := range members {
				for to := range members {
					if from != to {
						members[from].say(to, fmt.Sprint(from, to, i))
					}
				}
			}
			time.Sleep(10 * time.Second)
		}
		collect()
		for from := range members {
			for to := range members {
				heard := func(i int) bool { return seen[fmt.Sprint(from, to, i)] == 1 }
				// Two Devices that begin at once take some more seconds.
				if from != to && !heard(3) && (from < 3 || to < 3) {
					t.Errorf("%d does not hear %d in the end", to, from)
				}
			}
		}
		for _, n := range nodes {
			n.t.mu.RLock()
			for key, p := range n.t.peers {
				if !slices.ContainsFunc(all[:], func(n *node) bool { return n.key == key }) || len(p.indexes) > 8 {
					t.Errorf("%s keeps %d indexes", n.name, len(p.indexes))
				}
			}
			n.t.mu.RUnlock()
		}
	})
}

// A Device goes on with a session that we left, as if it had mixed up two
// handshakes. We begin another one, within seconds; and if the way is long we do
// not begin one after the other.
func TestPartedSessions(t *testing.T) {
	for _, trip := range []time.Duration{0, 20 * time.Millisecond, 3 * time.Second} {
		t.Run(trip.String(), func(t *testing.T) {
			x, y := newPuppets(t)
			now := time.Now()
			y.take(fuzzSource, x.again(y))
			settle(x, y)
			px := x.t.peers[y.key]
			old := y.t.peers[x.key].current.Load()
			y.take(fuzzSource, x.again(y))
			x.take(fuzzSource, y.left()...)
			x.left() // y never hears of the new session
			current := px.current.Load()
			current.trip = 2 * trip
			data := func() []byte {
				b, _ := old.sealTo(nil, packet(y.v4, x.v4, "old"), new([12]byte))
				return b
			}
			begun := func(at time.Duration) bool {
				current.born = now.Add(-at)
				px.since = time.Time{}
				x.take(fuzzSource, data())
				out := x.left()
				return len(out) > 0 && out[0][0] == typeInitiation
			}
			if begun(time.Second + 3*trip) {
				t.Error("begun before the peer could have used the session")
			}
			if !begun(4*time.Second + 4*trip) {
				t.Error("not begun")
			}
			x.t.giveUp(px)
			if begun(5*time.Second + 4*trip) {
				t.Error("begun twice for one session")
			}
		})
	}
}

// Sessions of crossing handshakes are replaced by one, so that two that talk do
// not begin two handshakes every two minutes for ever.
func TestCrossingEnds(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		initiations := 0
		e := newEther()
		e.wire = func(_, _ identity.NodePublic, d []byte) []time.Duration {
			if d[0] == typeInitiation {
				initiations++
			}
			return []time.Duration{20 * time.Millisecond}
		}
		a, b := e.add(t, nw, "a", 1), e.add(t, nw, "b", 2)
		a.knows(b)
		b.knows(a)
		for range 1200 {
			a.say(t, b, "x")
			b.say(t, a, "y")
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if n, m := len(a.take()), len(b.take()); n != 1200 || m != 1200 {
			t.Errorf("%d and %d packets of 1200", n, m)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		// Two that cross, one that ends it, one every two minutes.
		if t.Logf("%d initiations in 20 minutes", initiations); initiations > 2+1+10 {
			t.Errorf("%d initiations in 20 minutes", initiations)
		}
	})
}
