package path_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"mesh/internal/vnet"
)

var (
	soakFor  = flag.Duration("vnet.soak", 4*time.Minute, "virtual time of random faults")
	soakSeed = flag.Uint64("vnet.seed", 1, "of the random faults")
)

// stuckAfter is how long after the last fault has healed everybody must hear
// everybody again.
const stuckAfter = 10 * time.Second

// TestVnetSoak does all that may happen to a network to agents that talk, one or
// two things at a time, and wants everybody to be heard again soon after.
func TestVnetSoak(t *testing.T) {
	t.Parallel()
	if raceDetector {
		*soakFor /= 4
	}
	inWorld(t, 2, func(t *testing.T, w *world) {
		rng := rand.New(rand.NewPCG(*soakSeed, 0))
		specs := []vnet.NAT{vnet.Home(), vnet.Home(), vnet.Symmetric(), vnet.FullCone(), vnet.Masquerade(), vnet.UDPBlocked()}
		specs[0].IPv6, specs[2].IPv6 = vnet.FirewalledIPv6, vnet.FirewalledIPv6
		var sites []site
		for k, spec := range specs {
			sites = append(sites, w.home(fmt.Sprint("agent", k), spec))
		}
		fault := func() (what string, heal func()) {
			s := &sites[rng.IntN(len(sites))]
			r := w.relays[1+rng.IntN(2)]
			links := []vnet.Link{
				{Loss: 0.3}, {Loss: 0.2, Burst: 5}, {Reorder: 0.3}, {Duplicate: 0.5}, {Latency: 300 * time.Millisecond},
				{Jitter: 200 * time.Millisecond}, {MTU: 1280, NoFragments: true}, {BlackHole: 1280}, {Bandwidth: 50_000},
				{Block: []vnet.Match{{Proto: vnet.UDP}}}, {Block: []vnet.Match{{Proto: vnet.TCP}}},
			}
			switch rng.IntN(11) {
			case 0, 1, 2:
				l := links[rng.IntN(len(links))]
				l.Latency += wanLatency
				router := s.router
				router.SetLink(l)
				return fmt.Sprintf("link of %s %+v", s.name, l), func() { router.SetLink(vnet.Link{Latency: wanLatency}) }
			case 3:
				router := s.router
				router.Cut(true)
				return "cut of " + s.name, func() { router.Cut(false) }
			case 4:
				s.router.Rebind()
				return "rebinding of " + s.name, func() {}
			case 5:
				s.router.NewWAN()
				return "new WAN of " + s.name, func() {}
			case 6:
				s.router = w.n.NAT(specs[rng.IntN(len(specs))])
				s.host.Move(s.router)
				return "move of " + s.name, func() {}
			case 7:
				h := s.host
				h.SetUp(false)
				return "down of " + s.name, func() { h.SetUp(true) }
			case 8:
				r.kill()
				return fmt.Sprint("kill of relay ", r.region), r.start
			case 9:
				r.cut(true)
				return fmt.Sprint("cut of relay ", r.region), func() { r.cut(false) }
			default:
				w.setMute(true)
				return "control dead", func() { w.setMute(false) }
			}
		}
		time.Sleep(time.Second)
		say := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * every) {
				for _, a := range sites {
					for _, b := range sites {
						if a.agent != b.agent {
							a.say(b.agent, dataLen)
						}
					}
				}
			}
			synctest.Wait()
		}
		say(5 * time.Second)
		var worst time.Duration
		faults := 0
		for end := time.Now().Add(*soakFor); time.Now().Before(end); {
			var what []string
			var heals []func()
			for range 1 + rng.IntN(2) {
				text, heal := fault()
				what = append(what, text)
				heals = append(heals, heal)
				say(time.Duration(rng.Int64N(int64(10 * time.Second))))
				faults++
			}
			for _, heal := range heals {
				heal()
			}
			w.setMute(false)
			healed := time.Now()
			all := func() bool {
				for _, a := range sites {
					for _, b := range sites {
						if a.agent != b.agent && !a.heardSince(b.agent, healed) {
							return false
						}
					}
				}
				return true
			}
			for time.Since(healed) < stuckAfter && !all() {
				say(5 * every)
			}
			d := time.Since(healed)
			worst = max(worst, d)
			if d >= stuckAfter {
				for _, a := range sites {
					for _, b := range sites {
						if a.agent != b.agent && !a.heardSince(b.agent, healed) {
							t.Errorf("after %v: %s hears nothing of %s: %s", what, a.name, b.name, how(a.agent, b.agent))
						}
					}
				}
				if t.Failed() {
					break
				}
			}
			say(2 * time.Second)
		}
		t.Logf("%d faults in %v; all heard all again after %v at most", faults, *soakFor, worst)
	})
}

func (a *agent) heardSince(b *agent, since time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.flowLocked(b.key).last.After(since)
}
