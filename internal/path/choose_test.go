package path

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"mesh/internal/disco"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

const ms = time.Millisecond

func TestBetter(t *testing.T) {
	pub1, pub2 := ap("192.0.2.1:1"), ap("192.0.2.2:1")
	for _, c := range []struct {
		a, b   netip.AddrPort
		la, lb time.Duration
		want   bool
	}{
		{pub1, pub1, ms, 9 * ms, false},        // the same
		{pub1, netip.AddrPort{}, ms, 0, true},  // against nothing
		{netip.AddrPort{}, pub1, 0, ms, false}, // nothing
		{pub1, pub2, 10 * ms, 20 * ms, true},   // 50 points
		{pub1, pub2, 20 * ms, 10 * ms, false},  //
		{pub1, pub2, 99 * ms, 100 * ms, false}, // 1 point: hysteresis
		{pub1, pub2, 91 * ms, 100 * ms, false}, // 9 points
		{pub1, pub2, 90 * ms, 100 * ms, true},  // 10 points
		{pub1, pub2, ms / 5, ms / 2, false},    // no difference to speak of
		{pub1, pub2, 0, 0, false},              // no time at all
		{ap("127.0.0.1:1"), pub2, 10 * ms, 10 * ms, true},
		{ap("127.0.0.1:1"), pub2, 21 * ms, 10 * ms, false},       // 50 against 53
		{ap("192.168.0.1:1"), pub2, 11 * ms, 10 * ms, true},      // 20 against 10
		{ap("192.168.0.1:1"), pub2, 12 * ms, 10 * ms, false},     // 20 against 17
		{ap("169.254.0.1:1"), ap("192.168.0.1:1"), ms, ms, true}, // 30 against 20
		{ap("[2001:db8::1]:1"), pub2, 10 * ms, 10 * ms, true},    // 10 against 0
		{ap("[fd00::1]:1"), ap("192.168.0.1:1"), ms, ms, true},   // 30 against 20
		{ap("[::1]:1"), ap("127.0.0.1:1"), ms, ms, true},         // 60 against 50
		{ap("127.0.0.1:1"), ap("[::1]:1"), 95 * ms, 100 * ms, false},
	} {
		if got := better(route{c.a, c.la}, route{c.b, c.lb}); got != c.want {
			t.Errorf("%v %v better than %v %v: %v", c.a, c.la, c.b, c.lb, got)
		}
	}
}

// start is the time at which chooser tests begin.
const start instant = epochAge

type chooserTest struct {
	*testing.T
	c   chooser
	b   budget
	now instant
	out todo

	lastSent instant
	observe  func() // after every tick of run
}

func newChooserTest(t *testing.T, endpoints ...string) *chooserTest {
	ct := &chooserTest{T: t, c: newChooser(start), now: start}
	list := make([]netip.AddrPort, len(endpoints))
	for i, e := range endpoints {
		list[i] = ap(e)
	}
	ct.c.setEndpoints(list, start)
	return ct
}

// take returns the addresses pinged since the last take, by address.
func (ct *chooserTest) take() map[netip.AddrPort]disco.TxID {
	m := make(map[netip.AddrPort]disco.TxID)
	for _, p := range ct.out.pings {
		m[p.to] = p.tx
	}
	ct.out = todo{}
	return m
}

// pass lets time go by, with ticks at the deadlines and packets out all along.
func (ct *chooserTest) pass(d time.Duration, sending bool) {
	end := ct.now + d
	sent := ct.now
	for {
		at, ok := ct.c.deadline()
		if !ok || at > end {
			break
		}
		if at < ct.now {
			ct.Fatalf("deadline %v lies before now %v", at, ct.now)
		}
		ct.now = at
		if sending {
			sent = at
		}
		ct.c.tick(at, sent, 0, &ct.b, &ct.out)
		if next, ok := ct.c.deadline(); ok && next <= at {
			ct.Fatalf("tick at %v leaves a deadline at %v", at, next)
		}
	}
	ct.now = end
}

// world says what becomes of a ping: the time until its pong, 0 = none.
type world func(to netip.AddrPort, full bool, now instant) time.Duration

// run lets time go by in a world, with a packet out every now and then, 0 = none.
// It returns how many pings went out.
func (ct *chooserTest) run(d, every time.Duration, w world) (pings int) {
	type pong struct {
		at instant
		tx disco.TxID
	}
	end, lastSent, nextSend := ct.now+d, ct.lastSent, ct.now
	var pongs []pong
	for {
		for _, pg := range ct.out.pings {
			pings++
			if l := w(pg.to, pg.full, ct.now); l > 0 {
				pongs = append(pongs, pong{ct.now + l, pg.tx})
			}
		}
		ct.out = todo{}
		slices.SortFunc(pongs, func(a, b pong) int { return cmp.Compare(a.at, b.at) })
		at, ok := ct.c.deadline()
		if ok && at < ct.now {
			ct.Fatalf("deadline %v lies before now %v", at, ct.now)
		}
		if !ok {
			at = end
		}
		if every > 0 {
			at = min(at, nextSend)
		}
		if len(pongs) > 0 {
			at = min(at, pongs[0].at)
		}
		if at >= end {
			ct.now, ct.lastSent = end, lastSent
			return pings
		}
		ct.now = at
		if every > 0 && at == nextSend {
			nextSend += every
			lastSent = at
			if c := &ct.c; !c.active || !c.alive.watching || !c.hasDirect(at) && at >= c.nextDiscovery() {
				c.sent(at, &ct.b, &ct.out)
			}
		}
		if len(pongs) > 0 && pongs[0].at == at {
			if tx := pongs[0].tx; !ct.c.isRelay(tx) {
				ct.c.pong(tx, at, &ct.out)
			}
			pongs = pongs[1:]
		}
		ct.c.tick(at, lastSent, 0, &ct.b, &ct.out)
		if ct.observe != nil {
			ct.observe()
		}
		if next, ok := ct.c.deadline(); ok && next <= at {
			ct.Fatalf("tick at %v leaves a deadline at %v", at, next)
		}
	}
}

func (c *chooser) isRelay(tx disco.TxID) bool { return !c.pending[tx].to.IsValid() }

// up is a world in which some addresses answer after a while.
func up(latency time.Duration, addrs ...string) world {
	return func(to netip.AddrPort, _ bool, _ instant) time.Duration {
		for _, a := range addrs {
			if to == ap(a) {
				return latency
			}
		}
		return 0
	}
}

func TestChooserFindsAndKeeps(t *testing.T) {
	ct := newChooserTest(t, "192.0.2.1:1", "192.0.2.2:1")
	c := &ct.c
	c.sent(ct.now, &ct.b, &ct.out)
	if !ct.out.call || len(ct.out.pings) != 2 {
		t.Fatalf("first packet: %+v", ct.out)
	}
	pings := ct.take()
	c.sent(ct.now, &ct.b, &ct.out)
	if len(ct.out.pings) != 0 || ct.out.call {
		t.Fatal("pinged again at once")
	}
	// The slower one answers first and is used, then the faster one.
	ct.now += 10 * ms
	if pr, ok := c.pong(pings[ap("192.0.2.1:1")], ct.now, &ct.out); !ok || pr.to != ap("192.0.2.1:1") || c.best != pr.to {
		t.Fatal("first pong", pr, ok, c.best)
	}
	if !c.hasDirect(ct.now+trustFor) || c.hasDirect(ct.now+trustFor+1) {
		t.Error("trust has the wrong length")
	}
	if _, ok := c.pong(pings[ap("192.0.2.1:1")], ct.now, &ct.out); ok {
		t.Error("pong accepted twice")
	}
	if _, ok := c.pong(disco.NewTxID(), ct.now, &ct.out); ok {
		t.Error("pong without ping accepted")
	}
	ct.now += 10 * ms
	c.pong(pings[ap("192.0.2.2:1")], ct.now, &ct.out)
	if c.best != ap("192.0.2.1:1") {
		t.Error("slower path taken")
	}
	// Heartbeats to the best; after a minute a search, as it is slow.
	ct.out = todo{}
	searches := 0
	ct.run(75*time.Second, 250*ms, func(to netip.AddrPort, _ bool, _ instant) time.Duration {
		if to != c.best {
			searches++
		}
		return 10 * ms
	})
	if searches != 1 || !c.hasDirect(ct.now) || c.alive.missed != 0 {
		t.Errorf("%d searches, %+v", searches, c.alive)
	}
	if c.usableSize() != fullDatagram {
		t.Errorf("size %d", c.usableSize())
	}
	// Nothing goes out any more: heartbeats end.
	n := ct.run(sessionTimeout+heartbeat, 0, up(10*ms, "192.0.2.1:1"))
	if n < 14 || n > 18 {
		t.Errorf("%d pings of a quiet session", n)
	}
	if n := ct.run(10*time.Minute, 0, up(10*ms)); n != 0 || c.active || len(c.pending) != 0 {
		t.Errorf("idle: %d pings, active %v, %d pending", n, c.active, len(c.pending))
	}
	if _, ok := c.deadline(); ok {
		t.Error("idle but with a deadline")
	}
}

func TestChooserCallMeMaybe(t *testing.T) {
	ct := newChooserTest(t, "192.0.2.1:1")
	c := &ct.c
	c.sent(ct.now, &ct.b, &ct.out)
	ct.take()
	c.callMeMaybe([]netip.AddrPort{ap("192.0.2.2:1"), ap("[fe80::1]:1"), ap("224.0.0.1:1"), ap("255.255.255.255:1"), ap("0.0.0.0:1"), ap("192.0.2.3:0"), ap("[::ffff:192.0.2.4]:1")}, ct.now, &ct.b, &ct.out)
	got := ct.take()
	if len(got) != 3 || ct.out.call {
		t.Fatalf("pinged %v", got)
	}
	for _, a := range []string{"192.0.2.1:1", "192.0.2.2:1", "192.0.2.4:1"} {
		if _, ok := got[ap(a)]; !ok {
			t.Errorf("%s not pinged", a)
		}
	}
	// A new list replaces the old one, but not what control says.
	c.callMeMaybe([]netip.AddrPort{ap("192.0.2.5:1")}, ct.now, &ct.b, &ct.out)
	if len(c.candidates) != 2 || c.candidates[ap("192.0.2.5:1")] == nil || c.candidates[ap("192.0.2.1:1")] == nil {
		t.Errorf("candidates %v", c.candidates)
	}
	// A pong for an address that was taken back is none.
	if _, ok := c.pong(got[ap("192.0.2.2:1")], ct.now, &ct.out); ok || c.best.IsValid() {
		t.Error("pong of a withdrawn address accepted")
	}
	// Repeated calls do not make us ping without end.
	ct.take()
	n := 0
	for range 100 {
		c.callMeMaybe([]netip.AddrPort{ap("192.0.2.5:1")}, ct.now, &ct.b, &ct.out)
		n += len(ct.take())
		ct.now += 10 * ms
	}
	if n > 2*(forcedBurst+1) {
		t.Errorf("%d pings for 100 calls in a second", n)
	}
}

func TestChooserBounds(t *testing.T) {
	ct := newChooserTest(t, "192.0.2.1:1")
	c := &ct.c
	// Pings from everywhere, of one who knows the peer's key.
	for i := range 100_000 {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1)
		if fresh := c.pinged(from, disco.NewTxID(), ct.now, &ct.b, &ct.out); !fresh {
			t.Fatal("new ping is old")
		}
	}
	if len(c.candidates) > maxCandidates || c.candidates[ap("192.0.2.1:1")] == nil {
		t.Fatalf("%d candidates", len(c.candidates))
	}
	// Lists of everything, and of one victim.
	var flood, victim []netip.AddrPort
	for i := range 10_000 {
		flood = append(flood, netip.AddrPortFrom(netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)}), 1))
		victim = append(victim, netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, 1}), uint16(i+1)))
	}
	c.callMeMaybe(flood, ct.now, &ct.b, &ct.out)
	c.setEndpoints(flood, ct.now)
	if len(c.candidates) > maxCandidates {
		t.Errorf("%d candidates", len(c.candidates))
	}
	if n := len(bounded(victim)); n != maxSameIP {
		t.Errorf("%d endpoints of one address", n)
	}
	for range 1000 {
		c.ping(ct.now, 0, &ct.b, &ct.out)
	}
	if len(c.pending) > maxPending || len(ct.out.pings) > budgetBurst {
		t.Errorf("%d pending, %d pings", len(c.pending), len(ct.out.pings))
	}
	ct.pass(learnedFor+time.Second, false)
	if len(c.candidates) > maxCandidates || len(c.pending) != 0 {
		t.Errorf("later: %d candidates, %d pending", len(c.candidates), len(c.pending))
	}
}

func TestChooserPings(t *testing.T) {
	ct := newChooserTest(t)
	c := &ct.c
	from, tx := ap("192.0.2.9:9"), disco.NewTxID()
	if !c.pinged(from, tx, ct.now, &ct.b, &ct.out) {
		t.Fatal("first ping is to be answered")
	}
	for range 3 {
		if c.pinged(from, tx, ct.now, &ct.b, &ct.out) {
			t.Fatal("same ping is to be answered twice")
		}
	}
	if c.sent(ct.now, &ct.b, &ct.out); len(ct.out.pings) != 1 {
		t.Fatal("learned address not tried")
	}
	ct.pass(learnedFor, true)
	if len(c.candidates) != 0 {
		t.Error("learned address kept without pings")
	}
	// Nobody told any address: ask the peer to try ours, now and then.
	ct.take()
	if c.sent(ct.now+pingSpacing, &ct.b, &ct.out); !ct.out.call {
		t.Error("no call although there is nothing to ping")
	}
	ct.out = todo{}
	if c.sent(ct.now+pingSpacing+time.Second, &ct.b, &ct.out); ct.out.call {
		t.Error("called again at once")
	}
}

func TestBudget(t *testing.T) {
	var b budget
	victim := netip.MustParseAddr("203.0.113.1")
	count := func(ip func(i int) netip.Addr, tries int, d time.Duration, at instant) (n int) {
		for i := range tries {
			if b.take(ip(i), at+d*time.Duration(i)/time.Duration(tries)) {
				n++
			}
		}
		return n
	}
	one := func(int) netip.Addr { return victim }
	if n := count(one, 100_000, 10*time.Second, start); n > 3*windowPublic {
		t.Errorf("%d pings to one victim in 10 s", n)
	}
	b = budget{}
	all := func(i int) netip.Addr {
		return netip.AddrFrom4([4]byte{20, byte(rand.Uint32()), byte(rand.Uint32()), byte(i)})
	}
	n := count(all, 1_000_000, 10*time.Second, start)
	if n > budgetBurst+10*budgetRate || len(b.perIP) > windowMax {
		t.Errorf("%d pings in 10 s, %d addresses", n, len(b.perIP))
	}
	if n < budgetBurst {
		t.Errorf("only %d pings", n)
	}
}

func TestElect(t *testing.T) {
	type lat = map[int]time.Duration
	none := func(int) bool { return false }
	for i, c := range []struct {
		v      electorate
		target int
		race   bool
	}{
		{electorate{}, 0, false},
		{electorate{regions: []int{5}}, 5, false}, // nothing to choose
		{electorate{regions: []int{1, 2}}, 0, false},
		{electorate{regions: []int{1, 2}, settled: true}, 0, true},
		{electorate{regions: []int{1, 2}, settled: true, home: 2}, 2, false},
		{electorate{regions: []int{1, 2}, latency: lat{1: 50 * ms, 2: 20 * ms}}, 2, false},
		{electorate{regions: []int{1, 2}, latency: lat{1: 29 * ms, 2: 20 * ms}, home: 1, connected: true}, 1, false},  // < 10 ms
		{electorate{regions: []int{1, 2}, latency: lat{1: 100 * ms, 2: 80 * ms}, home: 1, connected: true}, 1, false}, // > 2/3
		{electorate{regions: []int{1, 2}, latency: lat{1: 100 * ms, 2: 60 * ms}, home: 1, connected: true}, 2, false}, //
		{electorate{regions: []int{1, 2}, latency: lat{1: 29 * ms, 2: 20 * ms}, home: 1, connected: false}, 2, false}, // dead
		{electorate{regions: []int{1, 2}, latency: lat{2: 20 * ms}, home: 1, connected: true}, 1, false},              // no answer, but alive
		{electorate{regions: []int{1, 2}, latency: lat{1: 5 * ms, 2: 20 * ms}, bad: func(r int) bool { return r == 1 }}, 2, false},
		{electorate{regions: []int{1, 2}, latency: lat{1: 5 * ms}, home: 1, bad: func(r int) bool { return r == 1 }, settled: true}, 2, false},
		{electorate{regions: []int{1, 2}, latency: lat{1: 5 * ms}, bad: func(int) bool { return true }}, 1, false}, // all are
	} {
		if c.v.bad == nil {
			c.v.bad = none
		}
		if target, race := elect(c.v); target != c.target || race != c.race {
			t.Errorf("%d: %d %v, want %d %v", i, target, race, c.target, c.race)
		}
	}
}

func TestLocalAddresses(t *testing.T) {
	for _, c := range []struct {
		in   string
		loop bool
		want string
	}{
		{"127.0.0.1/8 ::1/128", false, "[]"},
		{"127.0.0.1/8 ::1/128", true, "[127.0.0.1 ::1]"},
		{"10.0.0.2/24 127.0.0.1/8", false, "[10.0.0.2]"},
		{"10.0.0.2/24 127.0.0.1/8", true, "[10.0.0.2 127.0.0.1]"},
		{"100.64.0.1/32 fd7a:115c:a1e0::1/128 192.0.2.1/24", false, "[192.0.2.1]"}, // the mesh itself
		{"fe80::1/64 192.0.2.1/24", false, "[192.0.2.1]"},
		{"fd00::1/64 169.254.1.1/16", false, "[169.254.1.1 fd00::1]"}, // nothing better
		{"fd00::1/64 192.0.2.1/24", false, "[192.0.2.1]"},
		{"2001:db8::1/64 2001:db8::2/64 2001:db8::3/64 2001:db8:1::1/64", false, "[2001:db8::1 2001:db8::2 2001:db8:1::1]"},
		{"192.0.2.1/24 192.0.2.1/32 0.0.0.0/0 224.0.0.1/32", false, "[192.0.2.1]"},
	} {
		var in []netip.Prefix
		for rest := c.in; rest != ""; {
			var s string
			if n, _ := fmt.Sscan(rest, &s); n == 0 {
				break
			}
			rest = rest[min(len(s)+1, len(rest)):]
			in = append(in, netip.MustParsePrefix(s))
		}
		if got := fmt.Sprint(localAddresses(in, c.loop)); got != c.want {
			t.Errorf("%s: %s, want %s", c.in, got, c.want)
		}
	}
}
