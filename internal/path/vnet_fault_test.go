package path_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/internal/path"
	"mesh/internal/vnet"
)

// site is an agent with what is around it.
type site struct {
	*agent
	host   *vnet.Host
	router *vnet.Router
}

// home starts an agent behind a router of its own.
func (w *world) home(name string, spec vnet.NAT) site {
	w.t.Helper()
	r := w.n.NAT(spec)
	h := r.Host()
	return site{w.agent(name, h), h, r}
}

// settled lets a pair talk until it is as it will stay.
func settled(t *testing.T, a, b *agent, direct bool) {
	t.Helper()
	time.Sleep(time.Second)
	talkUntil(a, b, 8*time.Second, dataLen, func() bool { return direct && bothDirect(a, b) })
	talk(a, b, 3*time.Second)
	if bothDirect(a, b) != direct {
		t.Fatalf("direct %v: %s", !direct, how(a, b))
	}
	a.resetGap(b)
	b.resetGap(a)
}

// recovery is how a pair got over a fault.
type recovery struct {
	gap    time.Duration // the longest time that either heard nothing
	direct time.Duration // until both heard the other directly, for good
	moved  int           // how often either had another direct path, or none
}

// watch lets a pair talk after a fault.
func watch(a, b *agent, d time.Duration) (r recovery) {
	began := time.Now()
	was := [2]netip.AddrPort{a.Status(b.key).Direct, b.Status(a.key).Direct}
	talkUntil(a, b, d, dataLen, func() bool {
		if is := [2]netip.AddrPort{a.Status(b.key).Direct, b.Status(a.key).Direct}; is != was {
			was = is
			r.moved++
		}
		if a.silence(b) > 3*every || b.silence(a) > 3*every {
			r.direct = time.Since(began)
		}
		return false
	})
	r.gap = max(a.gapFrom(b), b.gapFrom(a))
	return r
}

// silence is how long nothing came from a peer directly.
func (a *agent) silence(from *agent) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Since(a.flowLocked(from.key).udp)
}

// within logs a time to recover and fails when it is more than ten times the
// goal: machines differ, and so does luck, but not by that.
func within(t *testing.T, what string, d, goal time.Duration) {
	t.Helper()
	t.Logf("%-44s %8v (goal %v)", what, d.Round(time.Millisecond), goal)
	if d > 10*goal {
		t.Errorf("%s: %v is more than ten times %v", what, d, goal)
	}
}

// noUDP drops UDP to and from an address.
func noUDP(link time.Duration, a netip.Addr) vnet.Link {
	return vnet.Link{Latency: link, Block: []vnet.Match{{Proto: vnet.UDP, Host: netip.PrefixFrom(a, a.BitLen())}}}
}

const wanLatency = 5 * time.Millisecond

func TestVnetPathDeath(t *testing.T) {
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		a.router.SetLink(noUDP(wanLatency, b.router.WAN()))
		r := watch(a.agent, b.agent, 30*time.Second)
		within(t, "direct path dies, relay alive", r.gap, 3*time.Second)
		if bothDirect(a.agent, b.agent) {
			t.Error("still direct")
		}
		a.resetGap(b.agent)
		b.resetGap(a.agent)
		a.router.SetLink(vnet.Link{Latency: wanLatency})
		r = watch(a.agent, b.agent, 30*time.Second)
		within(t, "direct path healed: gap", r.gap, 500*time.Millisecond)
		within(t, "direct path healed: direct again", r.direct, 5*time.Second)
	})
	inWorld(t, 1, func(t *testing.T, w *world) { // one direction only
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		// What b's router sees as source is a; what comes back is another match,
		// so the block sits on the port that a's packets go to.
		st := a.Status(b.key)
		a.router.SetLink(vnet.Link{Latency: wanLatency, Block: []vnet.Match{{
			Proto: vnet.UDP, Host: netip.PrefixFrom(st.Direct.Addr(), 32), Longer: 80,
		}}})
		within(t, "all but small packets of a path die", watch(a.agent, b.agent, 15*time.Second).gap, 3*time.Second)
	})
}

func TestVnetNATChanges(t *testing.T) {
	for _, c := range []struct {
		name   string
		spec   vnet.NAT
		change func(r *vnet.Router)
	}{
		{"NAT rebinding", vnet.Home(), (*vnet.Router).Rebind},
		{"NAT restart, ports kept", vnet.Home(), (*vnet.Router).Flush},
		{"WAN address change", vnet.Home(), func(r *vnet.Router) { r.NewWAN() }},
		{"NAT rebinding, port restricted", vnet.PortRestricted(), (*vnet.Router).Rebind},
	} {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := w.home("a", c.spec), w.home("b", vnet.Home())
			settled(t, a.agent, b.agent, true)
			c.change(a.router)
			r := watch(a.agent, b.agent, 15*time.Second)
			within(t, c.name+": gap", r.gap, 2*time.Second)
			within(t, c.name+": direct again", r.direct, 10*time.Second)
		})
	}
	for _, c := range []struct {
		name   string
		change func(r *vnet.Router)
	}{
		{"symmetric NAT flushed", (*vnet.Router).Flush},
		{"symmetric NAT, new WAN address", func(r *vnet.Router) { r.NewWAN() }},
	} {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := w.home("a", vnet.Symmetric()), w.agent("b", w.n.Host(vnet.V4))
			settled(t, a.agent, b, true)
			c.change(a.router)
			r := watch(a.agent, b, 15*time.Second)
			within(t, c.name+": gap", r.gap, 2*time.Second)
			within(t, c.name+": direct again", r.direct, 10*time.Second)
		})
	}
}

func TestVnetRoaming(t *testing.T) {
	t.Parallel()
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		other := w.n.NAT(vnet.Home())
		settled(t, a.agent, b.agent, true)
		a.host.Move(other)
		r := watch(a.agent, b.agent, 15*time.Second)
		within(t, "roaming to another router: gap", r.gap, 2*time.Second)
		within(t, "roaming to another router: direct again", r.direct, 3*time.Second)
		a.resetGap(b.agent)
		b.resetGap(a.agent)

		// Into b's own network.
		a.host.Move(b.router)
		r = watch(a.agent, b.agent, 15*time.Second)
		within(t, "roaming into the peer's LAN: gap", r.gap, 2*time.Second)
		within(t, "roaming into the peer's LAN: direct again", r.direct, 3*time.Second)
		a.resetGap(b.agent)
		b.resetGap(a.agent)

		a.host.Move(w.n.NAT(vnet.UDPBlocked()))
		within(t, "roaming to where UDP is blocked: gap", watch(a.agent, b.agent, 15*time.Second).gap, 2*time.Second)
	})
	inWorld(t, 1, func(t *testing.T, w *world) {
		w.deaf = true
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		a.host.Move(w.n.NAT(vnet.Home()))
		r := watch(a.agent, b.agent, 15*time.Second)
		within(t, "roaming, found by polling: gap", r.gap, 6*time.Second)
		within(t, "roaming, found by polling: direct again", r.direct, 10*time.Second)
	})
	inWorld(t, 1, func(t *testing.T, w *world) { // at the same moment
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		a.host.Move(w.n.NAT(vnet.Home()))
		b.host.Move(w.n.NAT(vnet.Home()))
		r := watch(a.agent, b.agent, 15*time.Second)
		within(t, "both roam at once: gap", r.gap, 2*time.Second)
		within(t, "both roam at once: direct again", r.direct, 3*time.Second)
	})
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Symmetric())
		settled(t, a.agent, b.agent, false)
		a.host.Move(w.n.NAT(vnet.Home()))
		within(t, "roaming of a relayed pair: gap", watch(a.agent, b.agent, 15*time.Second).gap, 2*time.Second)
	})
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		a.host.SetUp(false)
		watch(a.agent, b.agent, 10*time.Second)
		a.resetGap(b.agent)
		b.resetGap(a.agent)
		a.host.SetUp(true)
		within(t, "interface down 10 s, then up: data again", watchAgain(a.agent, b.agent, 15*time.Second), 2*time.Second)
		r := watch(a.agent, b.agent, 15*time.Second)
		within(t, "interface down 10 s, then up: direct again", r.direct, 3*time.Second)
	})
}

// Without control, agents tell each other where they are.
func TestVnetControlDead(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(w *world, a site)
	}{
		{"WAN address change", func(_ *world, a site) { a.router.NewWAN() }},
		{"NAT rebinding", func(_ *world, a site) { a.router.Rebind() }},
		{"roaming", func(w *world, a site) { a.host.Move(w.n.NAT(vnet.Home())) }},
	} {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
			settled(t, a.agent, b.agent, true)
			w.setMute(true)
			c.change(w, a)
			r := watch(a.agent, b.agent, 15*time.Second)
			within(t, c.name+" without control: gap", r.gap, 2*time.Second)
			within(t, c.name+" without control: direct again", r.direct, 10*time.Second)
			if !bothDirect(a.agent, b.agent) {
				t.Error(how(a.agent, b.agent))
			}
		})
	}
}

// Mappings that live shortly stay alive while there is traffic, also of one
// side only.
func TestVnetShortMappings(t *testing.T) {
	spec := vnet.Home()
	spec.Timeout, spec.Unreplied = 10*time.Second, 5*time.Second
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", spec), w.home("b", spec)
		settled(t, a.agent, b.agent, true)
		for range 60 {
			a.say(b.agent, dataLen)
			time.Sleep(2 * time.Second)
		}
		_, direct, relayed := b.heardFrom(a.agent)
		t.Logf("2 min of one datagram in 2 s, one way: %d direct, %d by relay", direct, relayed)
		if direct+relayed < 60 || relayed > 3 {
			t.Error(how(a.agent, b.agent))
		}
	})
}

// A path dies while traffic goes one way only, as in a transfer of datagrams.
func TestVnetOneWay(t *testing.T) {
	inWorld(t, 1, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		settled(t, a.agent, b.agent, true)
		one := func(d time.Duration) time.Duration {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(every) {
				a.say(b.agent, dataLen)
			}
			synctest.Wait()
			return b.gapFrom(a.agent)
		}
		if gap := one(30 * time.Second); gap > 2*every {
			t.Error("gap", gap)
		}
		a.router.SetLink(noUDP(wanLatency, b.router.WAN()))
		within(t, "path dies under traffic one way", one(30*time.Second), 3*time.Second)
	})
}

// Each of a relayed pair is at home in another region.
func TestVnetTwoHomes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		fault func(w *world, a site)
	}{
		{"a's relay dies", func(w *world, a site) { w.relays[1].kill() }},
		{"b's relay dies", func(w *world, a site) { w.relays[2].kill() }},
		{"a's WAN address changes", func(w *world, a site) { a.router.NewWAN() }},
	} {
		inWorld(t, 2, func(t *testing.T, w *world) {
			a := w.home("a", vnet.Symmetric())
			// b is where the other relay is nearer.
			rb := w.n.NAT(vnet.Symmetric())
			hb := rb.Host()
			near := w.relays[1]
			rb.SetLink(vnet.Link{Latency: wanLatency, Block: []vnet.Match{
				{Proto: vnet.UDP, Host: netip.PrefixFrom(near.host.Addr(), 32)},
				{Proto: vnet.UDP, Host: netip.PrefixFrom(near.other.Addr(), 32)},
			}})
			b := w.agent("b", hb)
			settled(t, a.agent, b, false)
			if a.HomeRegion() != 1 || b.HomeRegion() != 2 {
				t.Fatal("home", a.HomeRegion(), b.HomeRegion())
			}
			c.fault(w, a)
			r := watch(a.agent, b, 30*time.Second)
			within(t, "two home regions, "+c.name, r.gap, 2*time.Second)
		})
	}
}

// The connection to the home relay leads nowhere any more, and nobody has
// noticed since nothing is sent by it. Whoever then begins to talk to a peer of
// another region hears no answer, and has to find out why.
func TestVnetHomeLost(t *testing.T) {
	inWorld(t, 2, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.UDPBlocked()), w.home("b", vnet.UDPBlocked())
		time.Sleep(time.Second)
		w.relays[a.HomeRegion()].kill() // so that they part
		time.Sleep(5 * time.Second)
		w.relays[1].start()
		w.relays[2].start()
		c := w.home("c", vnet.Symmetric()) // nearer to 1
		time.Sleep(5 * time.Second)
		if c.HomeRegion() != 1 || b.HomeRegion() != 2 {
			t.Fatal("home", c.HomeRegion(), b.HomeRegion())
		}
		c.router.NewWAN()
		began := time.Now()
		heard := func() bool { first, _, _ := c.heardFrom(b.agent); return !first.IsZero() }
		for !heard() && time.Since(began) < 2*time.Minute {
			c.say(b.agent, dataLen)
			b.mu.Lock()
			up := b.flowLocked(c.key).up
			b.mu.Unlock()
			if up {
				b.say(c.agent, dataLen)
			}
			time.Sleep(every)
			synctest.Wait()
		}
		within(t, "home relay lost in silence: first data", time.Since(began), 2*time.Second)
	})
}

func TestVnetRelayDeath(t *testing.T) {
	t.Parallel()
	// A pair that cannot be direct, at home at the nearer of two relays.
	relayed := func(t *testing.T, w *world) (a, b site) {
		a, b = w.home("a", vnet.Symmetric()), w.home("b", vnet.Symmetric())
		settled(t, a.agent, b.agent, false)
		if a.HomeRegion() != 1 || b.HomeRegion() != 1 {
			t.Fatal("home", a.HomeRegion(), b.HomeRegion())
		}
		return a, b
	}
	t.Run("killed, two relays", func(t *testing.T) {
		inWorld(t, 2, func(t *testing.T, w *world) {
			a, b := relayed(t, w)
			w.relays[1].kill()
			r := watch(a.agent, b.agent, 30*time.Second)
			within(t, "relay killed, two relays", r.gap, 2*time.Second)
			if a.HomeRegion() != 2 || b.HomeRegion() != 2 {
				t.Error("home", a.HomeRegion(), b.HomeRegion())
			}
			a.resetGap(b.agent)
			b.resetGap(a.agent)
			w.relays[1].start()
			r = watch(a.agent, b.agent, 80*time.Second)
			within(t, "the better relay is back: gap", r.gap, 500*time.Millisecond)
			if a.HomeRegion() != 1 || b.HomeRegion() != 1 {
				t.Error("home", a.HomeRegion(), b.HomeRegion())
			}
		})
	})
	t.Run("silent, two relays", func(t *testing.T) {
		inWorld(t, 2, func(t *testing.T, w *world) {
			a, b := relayed(t, w)
			w.relays[1].cut(true)
			within(t, "relay silent, two relays", watch(a.agent, b.agent, 15*time.Second).gap, 3*time.Second)
		})
	})
	t.Run("restart", func(t *testing.T) {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := relayed(t, w)
			w.relays[1].kill()
			watch(a.agent, b.agent, 3*time.Second)
			w.relays[1].start()
			back := watchAgain(a.agent, b.agent, 20*time.Second)
			within(t, "relay restart, one relay: after its return", back, time.Second)
		})
	})
	t.Run("black hole of the relay", func(t *testing.T) {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := relayed(t, w)
			w.relays[1].cut(true)
			watch(a.agent, b.agent, 20*time.Second)
			w.relays[1].cut(false)
			within(t, "relay black hole 20 s: after it healed", watchAgain(a.agent, b.agent, 60*time.Second), 3*time.Second)
		})
	})
	t.Run("black hole of the network", func(t *testing.T) {
		inWorld(t, 1, func(t *testing.T, w *world) {
			a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
			settled(t, a.agent, b.agent, true)
			a.router.Cut(true)
			watch(a.agent, b.agent, 20*time.Second)
			a.router.Cut(false)
			within(t, "network black hole 20 s: after it healed", watchAgain(a.agent, b.agent, 60*time.Second), 3*time.Second)
		})
	})
}

// watchAgain is how long it takes from now until both have heard something.
func watchAgain(a, b *agent, d time.Duration) time.Duration {
	began := time.Now()
	fresh := func(a, b *agent) bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.flowLocked(b.key).last.After(began)
	}
	talkUntil(a, b, d, dataLen, func() bool { return fresh(a, b) && fresh(b, a) })
	return time.Since(began)
}

// Whoever pauses longer than sessions and mappings live is heard at once when
// it goes on.
func TestVnetPause(t *testing.T) {
	for _, spec := range []vnet.NAT{vnet.Home(), vnet.Symmetric()} {
		for _, pause := range []time.Duration{20 * time.Second, time.Minute, 150 * time.Second, 5 * time.Minute} {
			inWorld(t, 1, func(t *testing.T, w *world) {
				a, b := w.home("a", spec), w.home("b", vnet.AddressRestricted())
				settled(t, a.agent, b.agent, true)
				time.Sleep(pause)
				a.say(b.agent, dataLen) // a alone at first
				time.Sleep(300 * time.Millisecond)
				if d := b.silenceAtAll(a.agent); d > 300*time.Millisecond {
					t.Errorf("after %v: nothing heard", pause)
				}
				a.resetGap(b.agent)
				b.resetGap(a.agent)
				r := watch(a.agent, b.agent, 10*time.Second)
				within(t, "pause of "+pause.String()+": direct again", r.direct, 1500*time.Millisecond)
			})
		}
	}
}

// silenceAtAll is how long nothing came from a peer.
func (a *agent) silenceAtAll(from *agent) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return time.Since(a.flowLocked(from.key).last)
}

// Agents of all kinds in two regions, each talking to each: everybody is
// heard all the time, also while one after the other moves.
func TestVnetCrowd(t *testing.T) {
	t.Parallel()
	inWorld(t, 2, func(t *testing.T, w *world) {
		var all []*agent
		for _, k := range kinds {
			all = append(all, w.agent(k.name, k.make(w.n)))
		}
		only6 := w.n.NAT(vnet.NAT{NoIPv4: true, IPv6: vnet.FirewalledIPv6})
		all = append(all, w.agent("six", only6.Host()))
		time.Sleep(time.Second)
		round := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * every) {
				for _, a := range all {
					for _, b := range all {
						if a != b {
							a.say(b, dataLen)
						}
					}
				}
			}
			synctest.Wait()
		}
		check := func(what string, most time.Duration) {
			t.Helper()
			direct := 0
			for i, a := range all {
				for _, b := range all[i+1:] {
					if gap := max(a.gapFrom(b), b.gapFrom(a)); gap > most {
						t.Errorf("%s: %s and %s: nothing for %v: %s", what, a.name, b.name, gap, how(a, b))
					}
					a.resetGap(b)
					b.resetGap(a)
					if bothDirect(a, b) {
						direct++
					}
				}
			}
			t.Logf("%s: %d of %d pairs direct", what, direct, len(all)*(len(all)-1)/2)
		}
		round(10 * time.Second)
		check("at first", time.Second)
		all[4].host.Move(w.n.NAT(vnet.Home()))
		round(10 * time.Second)
		check("one moved", 10*time.Second)
		w.relays[1].kill()
		round(10 * time.Second)
		check("the nearer relay died", 20*time.Second)
	})
}

// After ten idle minutes a pair costs nothing: no datagram but what keeps the
// home relay, no mapping, no peer.
func TestVnetIdle(t *testing.T) {
	inWorld(t, 2, func(t *testing.T, w *world) {
		a, b := w.home("a", vnet.Home()), w.home("b", vnet.Home())
		time.Sleep(time.Second)
		synctest.Wait()
		before, goroutines := w.n.Stats(), countGoroutines()
		settled(t, a.agent, b.agent, true)
		time.Sleep(10 * time.Minute)
		// A keep-alive of the relay may be on its way at any moment.
		now, left := w.n.Stats(), ""
		for range 10 {
			synctest.Wait()
			now = w.n.Stats()
			left = ""
			if k := countGoroutines(); k > goroutines {
				left += fmt.Sprintf("%d goroutines, %d before; ", k, goroutines)
			}
			if now.Sockets > before.Sockets || now.Pending != 0 {
				left += fmt.Sprintf("%+v, before %+v; ", now, before)
			}
			if left == "" {
				break
			}
			time.Sleep(time.Second)
		}
		if left != "" {
			t.Error("left:", left)
		}
		if st := a.Status(b.key); st != (path.PeerStatus{}) {
			t.Errorf("a peer is left: %+v", st)
		}
		if k := a.router.Mappings() + b.router.Mappings(); k != 0 {
			t.Errorf("%d mappings are kept alive", k)
		}
		time.Sleep(10 * time.Minute)
		sent := w.n.Stats().Packets - now.Packets
		t.Logf("%d packets of two idle nodes in 10 minutes", sent)
		if sent > 100 {
			t.Error("too many")
		}
		a.resetGap(b.agent)
		// And the first word after that is heard at once.
		if d := watchAgain(a.agent, b.agent, 10*time.Second); d > time.Second {
			t.Error("first word after", d)
		}
	})
}

// countGoroutines leaves out those of the runtime, which NumGoroutine counts at
// times.
func countGoroutines() int {
	b := make([]byte, 4<<20)
	return strings.Count(string(b[:runtime.Stack(b, true)]), "\n\ngoroutine ")
}
