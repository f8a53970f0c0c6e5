package path

import (
	"math"
	"net/netip"
	"time"

	"mesh/internal/disco"
)

// The timings of path choice, from the disco protocol.
const (
	heartbeat      = 3 * time.Second         // ping the best path of an active session this often
	sessionTimeout = 45 * time.Second        // a session is active this long after the last packet out
	trustFor       = 6500 * time.Millisecond // a pong makes its path the only one for this long
	pingTimeout    = 5 * time.Second         // a pong that has not come by then never does
	pingSpacing    = 5 * time.Second         // between discovery pings to one endpoint
	upgradeEvery   = 60 * time.Second        // search for better although a direct path works
	goodEnough     = 5 * time.Millisecond    // latency at which that search stops
	learnedFor     = 45 * time.Second        // life of an endpoint learned from a ping
)

// Bounds against hostile peers.
const (
	maxCandidates = 100 // endpoints kept of a peer
	maxPending    = 256 // pings of a peer waiting for pongs
	maxSameIP     = 8   // endpoints with one IP address taken from one list
	// A CallMeMaybe makes us ping everything at once; more often than this
	// it is only noted. Holes in two NATs need two or three in a row.
	forcedBurst = 3
	forcedEvery = 2 * time.Second
)

// instant is a point in time as the duration since the path's epoch, which lies
// so far back that 0 means long ago.
type instant = time.Duration

// candidate is an address at which a peer may be reached.
type candidate struct {
	control bool          // control lists it
	called  bool          // the last CallMeMaybe lists it
	learned instant       // a ping came from here: keep until then
	pinged  instant       // our last ping
	heard   [4]disco.TxID // the peer's last pings, which are answered once
	next    int           // where the following one goes in heard
}

func (c *candidate) listed(now instant) bool { return c.control || c.called || now < c.learned }

type probe struct {
	to netip.AddrPort
	at instant
}

// ping is a Ping to send.
type ping struct {
	to netip.AddrPort
	tx disco.TxID
}

// todo collects what an event asks the path to do.
type todo struct {
	pings []ping
	call  bool // send a CallMeMaybe by relay
}

// chooser decides over the direct path to one peer. It is a function of events
// and time: it has no clock, no lock and does no I/O.
type chooser struct {
	candidates map[netip.AddrPort]*candidate
	pending    map[disco.TxID]probe

	best    netip.AddrPort // zero = none
	latency time.Duration  // of best, by its last pong
	trusted instant        // best alone is used until then
	since   instant        // when best became what it is
	why     string         // and the reason, for Status

	active bool    // heartbeats run
	beat   instant // the next one
	full   instant // last discovery
	called instant // last CallMeMaybe of ours

	forced     int // of forcedBurst, used up
	forcedFrom instant
}

func newChooser(now instant) chooser {
	return chooser{
		candidates: make(map[netip.AddrPort]*candidate),
		pending:    make(map[disco.TxID]probe),
		since:      now,
		why:        "nothing tried yet",
	}
}

// hasDirect reports whether best is to be used exclusively.
func (c *chooser) hasDirect(now instant) bool { return c.best.IsValid() && now <= c.trusted }

// setEndpoints takes the list of endpoints that control gives. It reports
// whether one of them is new.
func (c *chooser) setEndpoints(list []netip.AddrPort, now instant) (added bool) {
	for _, k := range c.candidates {
		k.control = false
	}
	for _, a := range bounded(list) {
		k, isNew := c.candidate(a, now)
		if k != nil {
			k.control = true
			added = added || isNew
		}
	}
	c.prune(now)
	return added
}

// callMeMaybe takes the peer's own list, which replaces an earlier one, and
// pings everything at once.
func (c *chooser) callMeMaybe(list []netip.AddrPort, now instant, b *budget, out *todo) {
	for _, k := range c.candidates {
		k.called = false
	}
	for _, a := range bounded(list) {
		if a.Addr().Is6() && a.Addr().IsLinkLocalUnicast() {
			continue
		}
		if k, _ := c.candidate(a, now); k != nil {
			k.called = true
		}
	}
	c.prune(now)
	if n := int((now - c.forcedFrom) / forcedEvery); n > 0 {
		c.forced = max(c.forced-n, 0)
		c.forcedFrom = now
	}
	if c.forced < forcedBurst {
		c.forced++
		c.ping(now, 0, b, out)
	}
}

// bounded drops the addresses of a list that cannot be a peer's and the excess
// of those that share one IP address.
func bounded(list []netip.AddrPort) []netip.AddrPort {
	out := make([]netip.AddrPort, 0, min(len(list), disco.MaxEndpoints))
	perIP := make(map[netip.Addr]int)
	for _, a := range list {
		a = unmap(a)
		if len(out) == disco.MaxEndpoints {
			break
		}
		if usable(a) && perIP[a.Addr()] < maxSameIP {
			perIP[a.Addr()]++
			out = append(out, a)
		}
	}
	return out
}

// candidate returns the entry of an address, making one if there is room; nil
// if there is none.
func (c *chooser) candidate(a netip.AddrPort, now instant) (k *candidate, added bool) {
	if k := c.candidates[a]; k != nil {
		return k, !k.listed(now) && a != c.best
	}
	if len(c.candidates) >= maxCandidates {
		// Only what pings told may give way: lists are bounded themselves.
		var oldest netip.AddrPort
		for b, k := range c.candidates {
			if k.control || k.called || b == c.best {
				continue
			}
			if !oldest.IsValid() || k.learned < c.candidates[oldest].learned {
				oldest = b
			}
		}
		if !oldest.IsValid() {
			return nil, false
		}
		delete(c.candidates, oldest)
	}
	k = &candidate{}
	c.candidates[a] = k
	return k, true
}

// prune forgets candidates that nothing speaks for any more.
func (c *chooser) prune(now instant) {
	for a, k := range c.candidates {
		if k.learned <= now {
			k.learned = 0
		}
		if a != c.best && !k.listed(now) {
			delete(c.candidates, a)
		}
	}
}

// pinged notes a Ping from an address; fresh is false when it has been seen
// before and gets no second answer.
func (c *chooser) pinged(from netip.AddrPort, tx disco.TxID, now instant) (fresh, added bool) {
	k, added := c.candidate(from, now)
	if k == nil {
		return true, false
	}
	for _, old := range k.heard {
		if old == tx {
			return false, false
		}
	}
	k.heard[k.next] = tx
	k.next = (k.next + 1) % len(k.heard)
	k.learned = now + learnedFor
	return true, added
}

// pong takes the answer to one of our pings. ok is false if it answers none.
func (c *chooser) pong(tx disco.TxID, now instant) (to netip.AddrPort, ok bool) {
	pr, ok := c.pending[tx]
	if !ok {
		return to, false
	}
	delete(c.pending, tx)
	latency := now - pr.at
	switch {
	case pr.to == c.best:
	case c.candidates[pr.to] == nil:
		return to, false // meanwhile nobody says it is the peer's
	case !c.hasDirect(now):
		c.setBest(pr.to, now, "answered first")
	case better(route{pr.to, latency}, route{c.best, c.latency}):
		c.setBest(pr.to, now, "better than "+c.best.String())
	default:
		return pr.to, true
	}
	c.latency = latency
	c.trusted = now + trustFor
	return pr.to, true
}

func (c *chooser) setBest(a netip.AddrPort, now instant, why string) {
	c.best, c.since, c.why = a, now, why
	c.latency, c.trusted = 0, 0
}

func (c *chooser) clearBest(now instant, why string) {
	if c.best.IsValid() {
		c.setBest(netip.AddrPort{}, now, why)
	}
}

// sent is called for packets out when no direct path is trusted, or when the
// session is not active.
func (c *chooser) sent(now instant, b *budget, out *todo) {
	if !c.active {
		c.active = true
		c.beat = now + heartbeat
	}
	if !c.hasDirect(now) {
		c.discover(now, b, out)
	}
}

// tick does what is due. lastSent is when the last packet went out.
func (c *chooser) tick(now, lastSent instant, b *budget, out *todo) {
	for tx, pr := range c.pending {
		if now-pr.at < pingTimeout {
			continue
		}
		delete(c.pending, tx)
		if pr.to == c.best && !c.hasDirect(now) {
			c.clearBest(now, "no answer from "+pr.to.String())
		}
	}
	c.prune(now)
	if !c.active {
		return
	}
	if now-lastSent > sessionTimeout {
		c.active = false
		return
	}
	if now < c.beat {
		return
	}
	c.beat = now + heartbeat
	if k := c.candidates[c.best]; k != nil {
		c.pingOne(c.best, k, now, out)
	}
	if !c.hasDirect(now) || c.latency > goodEnough && now-c.full >= upgradeEvery {
		c.discover(now, b, out)
	}
}

// deadline is when tick has something to do next; ok is false for never.
func (c *chooser) deadline() (at instant, ok bool) {
	soon := func(t instant) {
		if !ok || t < at {
			at, ok = t, true
		}
	}
	if c.active {
		soon(c.beat)
	}
	for _, pr := range c.pending {
		soon(pr.at + pingTimeout)
	}
	for _, k := range c.candidates {
		if k.learned > 0 && !k.control && !k.called {
			soon(k.learned)
		}
	}
	return at, ok
}

// discover pings every candidate that was not pinged lately and asks the peer
// to do the same.
func (c *chooser) discover(now instant, b *budget, out *todo) {
	c.full = now
	n := c.ping(now, pingSpacing, b, out)
	// With no candidate at all the peer may still find us if it hears ours.
	if n > 0 || len(c.candidates) == 0 && now-c.called >= pingSpacing {
		out.call = true
		c.called = now
	}
}

// nextDiscovery is when discover would do something again.
func (c *chooser) nextDiscovery() instant {
	if len(c.candidates) == 0 {
		return c.called + pingSpacing
	}
	at := instant(math.MaxInt64)
	for _, k := range c.candidates {
		at = min(at, k.pinged+pingSpacing)
	}
	return at
}

func (c *chooser) ping(now, spacing instant, b *budget, out *todo) (n int) {
	for a, k := range c.candidates {
		if spacing > 0 && now-k.pinged < spacing {
			continue
		}
		if !b.take(a.Addr(), now) {
			if spacing > 0 {
				k.pinged = max(k.pinged, now-spacing+time.Second) // look again in a second
			}
			continue
		}
		if c.pingOne(a, k, now, out) {
			n++
		}
	}
	return n
}

func (c *chooser) pingOne(a netip.AddrPort, k *candidate, now instant, out *todo) bool {
	if len(c.pending) >= maxPending {
		return false
	}
	tx := disco.NewTxID()
	c.pending[tx] = probe{a, now}
	k.pinged = now
	out.pings = append(out.pings, ping{a, tx})
	return true
}

// sendFailed notes that the system refuses to send to an address.
func (c *chooser) sendFailed(a netip.AddrPort, now instant, why string) {
	if c.best == a {
		c.clearBest(now, why)
	}
}

// distrust makes best one of several until a pong confirms it.
func (c *chooser) distrust(now instant) { c.trusted = min(c.trusted, now-1) }

// networkChanged forgets what was true of the old network.
func (c *chooser) networkChanged(now instant) {
	c.clearBest(now, "network changed")
	clear(c.pending)
	for _, k := range c.candidates {
		k.pinged = 0
	}
	c.called = 0
	c.prune(now)
}

// route is an address and its measured latency.
type route struct {
	to      netip.AddrPort
	latency time.Duration
}

// better reports whether a is so much better than b that it should replace it.
func better(a, b route) bool {
	if a.to == b.to || !a.to.IsValid() {
		return false
	}
	if !b.to.IsValid() {
		return true
	}
	pa, pb := bonus(a.to.Addr()), bonus(b.to.Addr())
	switch {
	case a.latency < b.latency:
		pa += advantage(a.latency, b.latency)
	case b.latency < a.latency:
		pb += advantage(b.latency, a.latency)
	}
	if pa <= 1 && pb == 0 {
		return false // hysteresis
	}
	return pa > pb
}

// advantage is by how many percent fast is faster than slow.
func advantage(fast, slow time.Duration) int {
	if slow <= 0 {
		return 0
	}
	return 100 - int(fast*100/slow)
}

// bonus prefers addresses that stay close.
func bonus(a netip.Addr) int {
	n := 0
	switch {
	case a.IsLoopback():
		n = 50
	case a.IsLinkLocalUnicast():
		n = 30
	case a.IsPrivate():
		n = 20
	}
	if a.Is6() {
		n += 10
	}
	return n
}

// usable reports whether an address can be a peer's at all.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.Port() != 0 && ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast() && ip != broadcast
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// unmap returns IPv4 addresses in IPv4 form.
func unmap(a netip.AddrPort) netip.AddrPort {
	if a.Addr().Is4In6() {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return a
}
