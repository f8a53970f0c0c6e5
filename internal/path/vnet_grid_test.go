package path_test

import (
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh/internal/vnet"
)

// kind is a place where an agent may live.
type kind struct {
	name string
	make func(n *vnet.Net) *vnet.Host
}

func behind(spec vnet.NAT) func(n *vnet.Net) *vnet.Host {
	return func(n *vnet.Net) *vnet.Host {
		r := n.NAT(spec)
		r.SetLink(vnet.Link{Latency: *gridLatency})
		return r.Host()
	}
}

// kinds are the rows and columns of the grid.
var kinds = []kind{
	{"public", func(n *vnet.Net) *vnet.Host {
		h := n.Host(vnet.V4)
		h.SetLink(vnet.Link{Latency: *gridLatency})
		return h
	}},
	{"full", behind(vnet.FullCone())},
	{"addr", behind(vnet.AddressRestricted())},
	{"port", behind(vnet.PortRestricted())},
	{"drop", behind(vnet.Home())},
	{"bare", behind(vnet.Masquerade())},
	{"sym", behind(vnet.Symmetric())},
	{"seq", behind(vnet.SymmetricSequential())},
	{"cgnat", func(n *vnet.Net) *vnet.Host {
		r := n.NAT(vnet.CGN())
		r.SetLink(vnet.Link{Latency: *gridLatency})
		return r.NAT(vnet.Home()).Host()
	}},
	{"udpblk", behind(vnet.UDPBlocked())},
}

// expect says what becomes of a pair. Masquerades without a firewall (bare) are
// punched only since both sides begin at the same moment.
func expect(a, b string) string {
	is := func(names ...string) bool { return slices.Contains(names, a) || slices.Contains(names, b) }
	other := a
	if a == "sym" || a == "seq" {
		other = b
	}
	switch {
	case is("udpblk"), is("sym", "seq") && !slices.Contains([]string{"public", "full", "addr"}, other):
		return "relay"
	}
	return "direct"
}

// outcome is what became of a pair.
type outcome struct {
	direct   bool
	first    time.Duration // until both heard something
	toDirect time.Duration // until both use a direct path
	gap      time.Duration // the longest time that either heard nothing
	how      string
}

// starts are who sends first: both, a, or b.
var starts = []string{"together", "a first", "b first"}

const headStart = 400 * time.Millisecond

// punch lets a pair talk and tells what became of it. If the pair is to be
// direct it takes no longer than limit; otherwise it watches that long.
func punch(t *testing.T, w *world, ha, hb *vnet.Host, start string, limit time.Duration) (o outcome) {
	t.Helper()
	a, b := w.agent("a", ha), w.agent("b", hb)
	time.Sleep(time.Second) // control tells
	began := time.Now()
	for d := time.Duration(0); d < limit && !bothDirect(a, b); d = time.Since(began) {
		if d%every == 0 && (start != "b first" || d >= headStart) {
			a.say(b, dataLen)
		}
		if d%every == 0 && (start != "a first" || d >= headStart) {
			b.say(a, dataLen)
		}
		time.Sleep(every / 8)
	}
	o.toDirect = time.Since(began)
	talk(a, b, 2*time.Second) // it stays so
	o.direct = bothDirect(a, b)
	o.how = how(a, b)
	fa, _, _ := a.heardFrom(b)
	fb, _, _ := b.heardFrom(a)
	if fa.IsZero() || fb.IsZero() {
		o.first, o.gap = time.Hour, time.Hour
		return o
	}
	o.first = max(fa.Sub(began), fb.Sub(began))
	o.gap = max(a.gapFrom(b), b.gapFrom(a))
	return o
}

// noGap is how long an agent may hear nothing while a path is found, beside
// the time that datagrams take.
const noGap = 500 * time.Millisecond

func (o outcome) check(t *testing.T, want string) {
	t.Helper()
	if want == "direct" && !o.direct || want == "relay" && o.direct {
		t.Errorf("want %s: %s", want, o.how)
	}
	if o.first > time.Second+10**gridLatency {
		t.Errorf("first data after %v", o.first)
	}
	if o.gap > noGap+10**gridLatency {
		t.Errorf("nothing arrived for %v", o.gap)
	}
}

// gridRuns is how often each cell is played: more runs, with other seeds, make
// a benchmark of the times until paths are direct. Benchmarks themselves cannot
// run in virtual time.
var (
	gridRuns    = flag.Int("vnet.runs", 1, "play each cell of the grid so often, and print medians")
	gridLatency = flag.Duration("vnet.latency", 5*time.Millisecond, "from each agent of the grid to the internet's core")
)

// The grid: each pair of kinds, started three ways. Data flows in each cell all
// the time, directly wherever that can be.
func TestVnetGrid(t *testing.T) {
	t.Parallel()
	const limit = 6 * time.Second
	cells := make(map[string]string)
	directs, punches := 0, 0
	var firsts []time.Duration
	for i, ka := range kinds {
		for _, kb := range kinds[i:] {
			t.Run(ka.name+" "+kb.name, func(t *testing.T) {
				var text []string
				starts := starts
				if raceDetector {
					starts = starts[len(cells)%3:][:1]
				}
				for _, start := range starts {
					var times []time.Duration
					relayed := 0
					for run := range *gridRuns {
						inWorld(t, 1, func(t *testing.T, w *world) {
							o := punch(t, w, ka.make(w.n), kb.make(w.n), start, limit)
							o.check(t, expect(ka.name, kb.name))
							firsts = append(firsts, o.first)
							if punches++; o.direct {
								directs++
								times = append(times, o.toDirect)
							} else {
								relayed++
							}
						}, uint64(run))
					}
					switch {
					case relayed == *gridRuns:
						text = append(text, "R")
					case relayed > 0:
						text = append(text, fmt.Sprintf("%d(%dR)", median(times).Milliseconds(), relayed))
					default:
						text = append(text, fmt.Sprint(median(times).Milliseconds()))
					}
				}
				cells[ka.name+" "+kb.name] = strings.Join(text, "/")
			})
		}
	}
	var table strings.Builder
	fmt.Fprintf(&table, "median ms from the first datagram to a direct path both ways, or R for relay: together/a first/b first\n%-8s", "")
	for _, k := range kinds {
		fmt.Fprintf(&table, " %-15s", k.name)
	}
	for i, ka := range kinds {
		fmt.Fprintf(&table, "\n%-8s", ka.name)
		for j, kb := range kinds {
			text := ""
			if j >= i {
				text = cells[ka.name+" "+kb.name]
			}
			fmt.Fprintf(&table, " %-15s", text)
		}
	}
	t.Logf("%d of %d direct; first data both ways after %v in the median, %v at worst\n%s",
		directs, punches, median(firsts), slices.Max(firsts), table.String())
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// Pairs that have more in common, or less, than the pairs of the grid.
func TestVnetPairs(t *testing.T) {
	t.Parallel()
	six := func(s vnet.NAT, how vnet.IPv6) vnet.NAT { s.IPv6 = how; return s }
	only6 := func(how vnet.IPv6) vnet.NAT { return vnet.NAT{NoIPv4: true, IPv6: how} }
	hairpin := func(s vnet.NAT) vnet.NAT { s.Hairpin = true; return s }
	lan := func(s vnet.NAT) vnet.NAT { s.LAN = netip.MustParsePrefix("192.168.1.0/24"); return s }
	type places func(n *vnet.Net) (a, b *vnet.Host)
	same := func(spec vnet.NAT) places {
		return func(n *vnet.Net) (a, b *vnet.Host) { r := n.NAT(spec); return r.Host(), r.Host() }
	}
	two := func(sa, sb vnet.NAT) places {
		return func(n *vnet.Net) (a, b *vnet.Host) { return n.NAT(sa).Host(), n.NAT(sb).Host() }
	}
	carrier := func(cgn, home vnet.NAT) places {
		return func(n *vnet.Net) (a, b *vnet.Host) {
			c := n.NAT(cgn)
			return c.NAT(home).Host(), c.NAT(home).Host()
		}
	}
	for nr, c := range []struct {
		name   string
		places places
		want   string
		via    string // prefix of the address that a uses
	}{
		{"same LAN", same(vnet.Home()), "direct", "192.168."},
		{"same LAN, symmetric", same(vnet.Symmetric()), "direct", "192.168."},
		{"same LAN, hairpin", same(hairpin(vnet.FullCone())), "direct", "192.168."},
		{"same LAN, UDP blocked", same(vnet.UDPBlocked()), "direct", "192.168."},
		{"same LAN, IPv6 too", same(six(vnet.Home(), vnet.FirewalledIPv6)), "direct", ""},
		{"same addresses in two homes", two(lan(vnet.Home()), lan(vnet.Home())), "direct", "203.0."},
		{"same CGN", carrier(vnet.CGN(), vnet.Home()), "relay", ""},
		{"same CGN with hairpin", carrier(hairpin(vnet.CGN()), vnet.Home()), "direct", "203.0."},
		{"same CGN, symmetric homes, hairpin", carrier(hairpin(vnet.CGN()), vnet.Symmetric()), "relay", ""},
		{"IPv6 only to dual stack", two(only6(vnet.FirewalledIPv6), six(vnet.Home(), vnet.FirewalledIPv6)), "direct", "[2001:"},
		{"IPv6 only to IPv6 only", two(only6(vnet.FirewalledIPv6), only6(vnet.FirewalledIPv6)), "direct", "[2001:"},
		{"IPv6 only to IPv4 only", two(only6(vnet.OpenIPv6), vnet.FullCone()), "relay", ""},
		{"symmetric, but IPv6", two(six(vnet.Symmetric(), vnet.FirewalledIPv6), six(vnet.Symmetric(), vnet.FirewalledIPv6)), "direct", "[2001:"},
		{"corporate to home", two(vnet.Corporate(), vnet.Home()), "relay", ""},
		{"corporate to corporate", two(vnet.Corporate(), vnet.Corporate()), "relay", ""},
		{"public dual stack to IPv6 only", func(n *vnet.Net) (a, b *vnet.Host) {
			return n.Host(vnet.Dual), n.NAT(only6(vnet.FirewalledIPv6)).Host()
		}, "direct", "[2001:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for k, start := range starts {
				if raceDetector && k != nr%3 {
					continue
				}
				inWorld(t, 1, func(t *testing.T, w *world) {
					a, b := c.places(w.n)
					o := punch(t, w, a, b, start, 6*time.Second)
					o.check(t, c.want)
					t.Logf("%s: %s after %v", start, o.how, o.toDirect)
					if !strings.HasPrefix(o.how, c.via) {
						t.Errorf("%s, want %s", o.how, c.via)
					}
				})
			}
		})
	}
}

// Nodes that start at the same moment, and one wants to talk to the other at
// once: all is still to be learned, relays, endpoints and each other.
func TestVnetCold(t *testing.T) {
	far := vnet.Link{Latency: 40 * time.Millisecond}
	for _, c := range []struct {
		name string
		a, b vnet.NAT
		late time.Duration // b starts so much later
	}{
		{"homes", vnet.Home(), vnet.Home(), 0},
		{"homes, the other later", vnet.Home(), vnet.Home(), 700 * time.Millisecond},
		{"symmetric", vnet.Symmetric(), vnet.Symmetric(), 0},
		{"UDP blocked", vnet.UDPBlocked(), vnet.Home(), 0},
		{"corporate", vnet.Corporate(), vnet.Corporate(), 0},
	} {
		inWorld(t, 2, func(t *testing.T, w *world) {
			ra, rb := w.n.NAT(c.a), w.n.NAT(c.b)
			ra.SetLink(far)
			rb.SetLink(far)
			a := w.agentNoWait("a", ra.Host())
			time.Sleep(c.late)
			b := w.agentNoWait("b", rb.Host())
			began := time.Now()
			heard := func() bool {
				fa, _, _ := a.heardFrom(b)
				fb, _, _ := b.heardFrom(a)
				return !fa.IsZero() && !fb.IsZero()
			}
			talkUntil(a, b, 20*time.Second, dataLen, heard)
			within(t, "cold start, "+c.name+": data both ways", time.Since(began), time.Second)
		})
	}
}
