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

// The timings that are ours: they find out sooner than the protocol demands
// what became of a path, see alive.go.
const (
	unansweredFor = 300 * time.Millisecond  // packets out and none in for so long: is the path still there?
	answerMin     = 200 * time.Millisecond  // a pong of the best path is missed after twice its latency,
	answerMax     = 1500 * time.Millisecond // within these bounds
	lookLeast     = 100 * time.Millisecond  // between two looks
	confirmedFor  = 900 * time.Millisecond  // the same after a pong: traffic one way only is watched less closely
	doubtful      = 6                       // pongs missed in a row before another path replaces the best
	silent        = 5                       // and before it does not count as working, see Status
	moved         = 2                       // the same when the peer sends from that other path
	dead          = 8                       // and before the best is none any more
	deadHeard     = 14                      // the same while packets come from there
	restunAt      = 2                       // and before our own addresses are asked for again,
	restunTries   = 4                       // so many times as long as no path answers,
	restunAgain   = 2100 * time.Millisecond // after this, twice that and so on: a NAT may take a while
	answeredLate  = trustFor                // how long a pong speaks for a path that was not chosen
	quickRetry    = 400 * time.Millisecond  // addresses that do not answer at once are pinged again after this
	quickRetries  = 2                       // so many times
	quickMost     = 16                      // unless there are more of them than this
	workedSpacing = 2 * time.Second         // between discovery pings to an address that answered before
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
	// A ping from where we have no path is answered with one of our own, up to
	// so many: it may be a replay.
	backBurst = 4
	backEvery = time.Second
)

// Why there is no direct path yet.
const (
	whyNew   = "nothing tried yet"
	whyTried = "no answer yet"
)

// instant is a point in time as the duration since the path's epoch, which lies
// so far back that 0 means long ago.
type instant = time.Duration

// candidate is an address at which a peer may be reached.
type candidate struct {
	control bool          // control lists it
	called  bool          // the last CallMeMaybe lists it
	learned instant       // a ping came from here: keep until then
	seen    instant       // when that, or a datagram of the peer, last came
	pinged  instant       // our last ping
	heard   [4]disco.TxID // the peer's last pings, which are answered once
	next    int           // where the following one goes in heard
	ponged  instant       // last answer to a ping of ours, 0 = none yet
	latency time.Duration // by that answer
}

func (c *candidate) listed(now instant) bool { return c.control || c.called || now < c.learned }

type probe struct {
	to    netip.AddrPort // zero: by relay
	at    instant
	full  bool // padded to the size of a full datagram
	asked bool // by a user, see Ping
}

// ping is a Ping to send.
type ping struct {
	to   netip.AddrPort // zero: by relay
	tx   disco.TxID
	full bool
}

// todo collects what an event asks the path to do.
type todo struct {
	pings []ping
	call  bool        // send a CallMeMaybe by relay
	meet  *disco.Meet // send this by relay; the endpoints are filled in
	stale bool        // our own addresses may have changed
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
	alive   liveness       // of best
	size    fullness       // of best
	relayed time.Duration  // round trip by relay, 0 = unknown

	active bool    // heartbeats run
	beat   instant // the next one
	full   instant // last discovery
	callAt instant // last CallMeMaybe of ours
	lost   lostPath
	meet   meeting
	guess  guessed

	retries int     // quick ones still to be made
	retry   instant // the next one

	forced allowance // pings for CallMeMaybes
	back   allowance // pings for pings
}

// lostPath is the search for our own addresses after the best path fell silent.
type lostPath struct {
	tries int
	next  instant // 0 = no search
}

// allowance counts what others make us do.
type allowance struct {
	used int
	from instant
}

// take reports whether there is some left of burst, of which one comes back
// in each period of every.
func (a *allowance) take(now instant, burst int, every time.Duration) bool {
	if n := int((now - a.from) / every); n > 0 {
		a.used = max(a.used-n, 0)
		a.from = now
	}
	if a.used >= burst {
		return false
	}
	a.used++
	return true
}

func newChooser(now instant) chooser {
	return chooser{
		candidates: make(map[netip.AddrPort]*candidate),
		pending:    make(map[disco.TxID]probe),
		since:      now,
		why:        whyNew,
	}
}

// hasDirect reports whether best is to be used exclusively.
func (c *chooser) hasDirect(now instant) bool {
	return c.best.IsValid() && now <= c.trusted && c.alive.missed == 0
}

// works reports whether best counts as working: a few pongs that got lost do
// not change that, while packets go by relay as well.
func (c *chooser) works(now, lastHeard instant) bool {
	return c.best.IsValid() && now <= c.trusted && (c.alive.missed < silent || now-lastHeard < unansweredFor)
}

// callMeMaybe takes the peer's own list, which replaces an earlier one, and
// pings everything at once.
func (c *chooser) callMeMaybe(list []netip.AddrPort, now instant, b *budget, out *todo) {
	c.called(list, now, out)
	if c.forced.take(now, forcedBurst, forcedEvery) {
		c.ping(now, 0, b, out)
	}
}

// called takes the list of endpoints that the peer itself sent.
func (c *chooser) called(list []netip.AddrPort, now instant, out *todo) {
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
	if k := c.candidates[c.best]; k != nil && !k.called && !k.control {
		c.alive.missed = max(c.alive.missed, 1) // it has gone elsewhere: both ways until best answers
	}
	if c.active {
		c.check(now, out) // the peer searches: does it hear us?
	}
}

// pinged notes a Ping from an address; fresh is false when it has been seen
// before and gets no second answer. From an address that is no path of ours yet
// it shows one that may work: while the session is active that is tried at once,
// since the peer's hole in its NAT is open now.
func (c *chooser) pinged(from netip.AddrPort, tx disco.TxID, now instant, b *budget, out *todo) (fresh bool) {
	k, added := c.candidate(from, now)
	if k == nil {
		return true
	}
	for _, old := range k.heard {
		if old == tx {
			return false
		}
	}
	k.heard[k.next] = tx
	k.next = (k.next + 1) % len(k.heard)
	k.learned = now + learnedFor
	c.seen(from, k, added, now, b, out)
	return true
}

// authenticated notes a datagram of the peer from an address. WireGuard proves
// who made it, not who sent it here: the address is worth a ping, no more.
func (c *chooser) authenticated(from netip.AddrPort, now instant, b *budget, out *todo) {
	if k, added := c.candidate(from, now); k != nil {
		k.learned = now + learnedFor
		c.seen(from, k, added, now, b, out)
	}
}

// seen tries an address that the peer seems to use now.
func (c *chooser) seen(from netip.AddrPort, k *candidate, added bool, now instant, b *budget, out *todo) {
	k.seen = now
	if c.holds(from, k) {
		c.release(now, b, out) // the peer has begun
		return
	}
	if !c.active || from == c.best || c.hasDirect(now) && !added || now-k.pinged < backEvery && k.ponged >= k.pinged {
		return
	}
	if now-k.pinged < 5*time.Millisecond || !c.back.take(now, backBurst, backEvery) || !b.allows(from, now) {
		return
	}
	c.pingOne(from, k, false, now, out)
	if c.hasDirect(now) {
		c.check(now, out) // has it moved away from where we believe it to be?
	}
}

// pong takes the answer to one of our pings. ok is false if it answers none.
func (c *chooser) pong(tx disco.TxID, now instant, out *todo) (pr probe, ok bool) {
	pr, ok = c.pending[tx]
	if !ok || !pr.to.IsValid() {
		return pr, false // what came by UDP does not answer what went by relay
	}
	delete(c.pending, tx)
	k := c.candidates[pr.to]
	if k == nil {
		return pr, false // meanwhile nobody says it is the peer's
	}
	k.ponged, k.latency = now, now-pr.at
	switch {
	case pr.to == c.best:
	case !c.best.IsValid():
		c.setBest(pr.to, now, "first pong")
	case c.alive.missed >= doubtful || c.alive.missed >= moved && k.seen >= c.alive.began:
		c.setBest(pr.to, now, c.best.String()+" is silent")
	case better(route{pr.to, k.latency}, route{c.best, c.latency}):
		c.setBest(pr.to, now, "better latency than "+c.best.String())
	default:
		return pr, true
	}
	c.latency = k.latency
	c.trusted = now + trustFor
	c.alive.answered(now)
	c.size.answered(pr, now)
	if c.active && !c.size.proven && now >= c.size.next {
		c.tryFull(now, out)
	}
	return pr, true
}

// relayPong takes the answer to a ping that went by relay.
func (c *chooser) relayPong(tx disco.TxID, now instant) (pr probe, ok bool) {
	pr, ok = c.pending[tx]
	if !ok || pr.to.IsValid() {
		return pr, false
	}
	delete(c.pending, tx)
	c.relayed = now - pr.at
	return pr, true
}

func (c *chooser) setBest(a netip.AddrPort, now instant, why string) {
	c.best, c.since, c.why = a, now, why
	c.latency, c.trusted = 0, 0
	c.alive, c.size = liveness{watching: c.alive.watching, look: c.alive.look, looked: c.alive.looked}, fullness{}
}

func (c *chooser) clearBest(now instant, why string) {
	if c.best.IsValid() {
		c.setBest(netip.AddrPort{}, now, why)
	}
}

// sent is called for packets out when no direct path is trusted, or when the
// session is not active or not watched.
func (c *chooser) sent(now instant, b *budget, out *todo) {
	if !c.active {
		c.active = true
		c.beat = now + heartbeat
		c.check(now, out)
		c.retries, c.retry = quickRetries, now+quickRetry
		c.ask(now, out)
	}
	c.watch(now)
	if !c.hasDirect(now) {
		c.discover(now, b, out)
	}
}

// tick does what is due. lastSent is when the last packet went out, lastHeard
// when the last one came by UDP.
func (c *chooser) tick(now, lastSent, lastHeard instant, b *budget, out *todo) {
	for tx, pr := range c.pending {
		if now-pr.at >= pingTimeout {
			delete(c.pending, tx)
		}
	}
	c.prune(now)
	if c.meet.phase != 0 && now >= c.meet.until {
		c.release(now, b, out)
	}
	if !c.active {
		return
	}
	if now-lastSent > sessionTimeout {
		c.active, c.retries, c.lost = false, 0, lostPath{}
		c.alive, c.size.asked = liveness{}, 0
		return
	}
	missed := c.alive.missed
	c.stayAlive(now, lastSent, lastHeard, out)
	if missed < restunAt && c.alive.missed == restunAt {
		c.lost = lostPath{next: now}
	}
	c.searchLost(now, b, out)
	if c.retries > 0 && now >= c.retry {
		c.retries--
		c.retry = now + 2*quickRetry
		if c.hasDirect(now) || len(c.candidates) > quickMost {
			c.retries = 0
		} else {
			c.ping(now, quickRetry*3/4, b, out)
		}
	}
	if now < c.beat {
		return
	}
	c.beat = now + heartbeat
	if c.best.IsValid() {
		c.check(now, out)
	}
	if !c.hasDirect(now) {
		c.pingRelay(now, out)
	}
	if !c.hasDirect(now) || c.latency > goodEnough && now-c.full >= upgradeEvery {
		c.discover(now, b, out)
	}
}

// searchLost has our own addresses asked for and told to the peer again when the
// best path has fallen silent: a NAT may have given us another one.
func (c *chooser) searchLost(now instant, b *budget, out *todo) {
	l := &c.lost
	if l.next == 0 || now < l.next {
		return
	}
	if c.hasDirect(now) {
		*l = lostPath{}
		return
	}
	out.stale = true
	c.discover(now, b, out)
	out.call = true // also when all have been pinged lately
	c.callAt = now
	l.next = now + restunAgain<<l.tries
	if l.tries++; l.tries == restunTries {
		*l = lostPath{}
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
		if c.retries > 0 {
			soon(c.retry)
		}
		if c.lost.next != 0 {
			soon(c.lost.next)
		}
		if t, ok := c.nextLook(); ok {
			soon(t)
		}
	}
	if c.meet.phase != 0 {
		soon(c.meet.until)
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
	if c.why == whyNew {
		c.why = whyTried
	}
	n := c.ping(now, -1, b, out)
	if out.meet != nil {
		n++ // addresses held back count as well
	}
	// With no candidate at all the peer may still find us if it hears ours.
	if n > 0 || len(c.candidates) == 0 && now-c.callAt >= pingSpacing {
		out.call = true
		c.callAt = now
	}
}

// nextDiscovery is when discover would do something again.
func (c *chooser) nextDiscovery() instant {
	if len(c.candidates) == 0 {
		return c.callAt + pingSpacing
	}
	at := instant(math.MaxInt64)
	for _, k := range c.candidates {
		at = min(at, k.pinged+k.spacing())
	}
	return at
}

// spacing is the time between discovery pings to an address.
func (k *candidate) spacing() time.Duration {
	if k.ponged != 0 {
		return workedSpacing
	}
	return pingSpacing
}

// ping pings the candidates that have not been pinged for a while: that of the
// protocol if it is negative.
func (c *chooser) ping(now, spacing instant, b *budget, out *todo) (n int) {
	for a, k := range c.candidates {
		wait := spacing
		if wait < 0 {
			wait = k.spacing()
		}
		if wait > 0 && now-k.pinged < wait || c.holds(a, k) {
			continue
		}
		if !b.allows(a, now) {
			if wait > 0 {
				k.pinged = max(k.pinged, now-wait+time.Second) // look again in a second
			}
			continue
		}
		if c.pingOne(a, k, false, now, out) {
			n++
		}
	}
	return n
}

func (c *chooser) pingOne(a netip.AddrPort, k *candidate, full bool, now instant, out *todo) bool {
	if len(c.pending) >= maxPending {
		return false
	}
	tx := disco.NewTxID()
	c.pending[tx] = probe{to: a, at: now, full: full}
	k.pinged = now
	out.pings = append(out.pings, ping{a, tx, full})
	return true
}

// pingRelay measures the way by relay.
func (c *chooser) pingRelay(now instant, out *todo) {
	if len(c.pending) >= maxPending {
		return
	}
	tx := disco.NewTxID()
	c.pending[tx] = probe{at: now}
	out.pings = append(out.pings, ping{tx: tx})
}

// sendFailed notes that the system refuses to send to an address.
func (c *chooser) sendFailed(a netip.AddrPort, now instant, why string) {
	if c.best == a {
		c.clearBest(now, why)
		c.replace(now)
	}
}

// distrust makes best one of several until a pong confirms it.
func (c *chooser) distrust(now instant) { c.trusted = min(c.trusted, now-1) }

// networkChanged doubts what was true of the old network, and tries everything
// anew. The best address is one way of several until it answers: the peer may
// well be there still. keep says of an address whether it can be.
func (c *chooser) networkChanged(now instant, keep func(netip.AddrPort) bool, b *budget, out *todo) {
	if c.best.IsValid() {
		if keep(c.best) {
			c.since, c.why = now, "network changed"
		} else {
			c.clearBest(now, "network changed")
		}
	}
	c.distrust(now)
	c.alive = liveness{watching: c.alive.watching, look: c.alive.look, looked: c.alive.looked}
	c.size = fullness{}
	c.lost = lostPath{}
	clear(c.pending)
	for _, k := range c.candidates {
		k.pinged, k.ponged = 0, min(k.ponged, 1)
	}
	c.callAt = 0
	c.meet.phase, c.meet.last = 0, now
	c.prune(now)
	if c.active {
		if c.best.IsValid() {
			c.check(now, out)
		}
		c.discover(now, b, out)
		c.retries, c.retry = quickRetries, now+quickRetry
	}
}
