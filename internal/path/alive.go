package path

import "time"

// liveness says whether the best path still answers. The protocol's heartbeats
// alone would let seconds of packets vanish on a path that died. Here packets
// out that nothing answers are a reason to ping at once, a pong missed is a
// reason to send by relay as well, and several in a row end the path. What is
// lost now and then does no harm but a few packets that go twice.
type liveness struct {
	missed int     // pongs in a row
	asked  instant // when the ping was sent whose pong is awaited, 0 = none
	began  instant // when that began, or the first of those that were missed
	pong   instant // the last one

	watching bool    // packets out are watched
	look     instant // when to look next
	looked   instant // and when we did
}

func (l *liveness) answered(now instant) { l.missed, l.asked, l.pong = 0, 0, now }

// Datagrams up to minDatagram pass every link of the smallest MTU that IPv6
// allows, 1280. A full datagram, which carries a packet of the mesh's own MTU of
// 1280, is larger: it goes only where a ping of its size was answered.
const (
	minDatagram  = 1280 - 40 - 8
	fullDatagram = 1280 + 32

	fullTries = 4                // padded pings to a new path
	fullEvery = 20 * time.Second // and between later ones to a path that takes none
	fullLost  = 6                // padded pongs missed in a row until a path takes none
)

// fullness says whether the best path takes full datagrams.
type fullness struct {
	proven bool
	until  instant // full datagrams go this way alone until then
	asked  instant // when the padded ping was sent whose pong is awaited, 0 = none
	missed int     // in a row
	next   instant // when to try, if not proven
	tries  int
}

func (f *fullness) answered(pr probe, now instant) {
	if pr.full {
		*f = fullness{proven: true, until: now + trustFor}
	}
}

// patience is how long a pong of the best path is waited for.
func (c *chooser) patience() time.Duration {
	return min(max(2*c.latency+100*time.Millisecond, answerMin), answerMax)
}

// watch looks from now on whether packets out are answered.
func (c *chooser) watch(now instant) {
	if l := &c.alive; !l.watching {
		l.watching, l.looked, l.look = true, now, now+unansweredFor
	}
}

// check asks the best path whether it is there, unless that is being done.
func (c *chooser) check(now instant, out *todo) {
	if l := &c.alive; l.asked == 0 && c.best.IsValid() {
		l.asked, l.began = now, now
		c.inquire(now, out)
	}
}

// inquire pings the best path: by one padded ping as long as all is well, else small
// and padded ones tell what still passes.
func (c *chooser) inquire(now instant, out *todo) {
	k := c.candidates[c.best]
	if k == nil {
		return
	}
	if c.size.proven && c.size.missed == 0 && c.alive.missed == 0 {
		if c.size.asked == 0 {
			c.size.asked = now
		}
		c.pingOne(c.best, k, true, now, out)
		return
	}
	c.pingOne(c.best, k, false, now, out)
	if !c.size.proven && now >= c.size.next {
		c.tryFull(now, out)
	}
}

// tryFull sends a padded ping to a path that has not answered one yet.
func (c *chooser) tryFull(now instant, out *todo) {
	f, k := &c.size, c.candidates[c.best]
	if k == nil {
		return
	}
	f.tries++
	f.next = now + c.patience()
	if f.tries >= fullTries {
		f.next = now + fullEvery
	}
	c.pingOne(c.best, k, true, now, out)
}

// suspect asks the best path at once: something says that it may be dead.
func (c *chooser) suspect(now instant, out *todo) {
	if c.active && c.best.IsValid() && now-c.alive.pong >= unansweredFor {
		c.check(now, out)
	}
}

// stayAlive does what is due for the best path.
func (c *chooser) stayAlive(now, lastSent, lastHeard instant, out *todo) {
	l, f := &c.alive, &c.size
	if l.watching && now >= l.look {
		answered := max(lastHeard, l.pong)
		if lastHeard < l.pong-confirmedFor {
			answered = l.pong + confirmedFor - unansweredFor // traffic one way only
		}
		next := unansweredFor
		switch {
		case lastSent < l.looked:
			l.watching = false
		case lastSent <= answered:
		case now-answered >= unansweredFor:
			c.check(now, out)
		default: // look when it will have been too long
			next = max(answered+unansweredFor-now, lookLeast)
		}
		l.looked, l.look = now, now+next
	}
	if !c.best.IsValid() {
		return
	}
	if f.asked != 0 && now-f.asked >= c.patience() {
		f.missed++
		f.until = min(f.until, now-1)
		f.asked = 0
		if f.missed >= fullLost {
			c.tooLarge(now)
		} else if k := c.candidates[c.best]; k != nil {
			f.asked = now
			c.pingOne(c.best, k, true, now, out)
		}
	}
	if !f.proven && f.tries > 0 && now >= f.next && c.trusted >= f.next {
		c.tryFull(now, out)
	}
	if l.asked == 0 || now-l.asked < c.patience() {
		return
	}
	l.missed++
	limit := dead
	if now-lastHeard < unansweredFor {
		limit = deadHeard
	}
	if l.missed >= limit {
		c.clearBest(now, "path silent")
		c.replace(now)
		return
	}
	if l.missed >= moved {
		c.replace(now)
	}
	c.alive.asked = now // of what replaced it, maybe
	c.inquire(now, out)
}

// nextLook is when stayAlive has something to do; ok is false for never.
func (c *chooser) nextLook() (at instant, ok bool) {
	soon := func(t instant) {
		if !ok || t < at {
			at, ok = t, true
		}
	}
	if c.alive.watching {
		soon(c.alive.look)
	}
	if c.best.IsValid() {
		if c.alive.asked != 0 {
			soon(c.alive.asked + c.patience())
		}
		if f := &c.size; f.asked != 0 {
			soon(f.asked + c.patience())
		} else if !f.proven && f.tries > 0 && c.trusted >= f.next {
			soon(f.next)
		}
	}
	return at, ok
}

// replace takes the best of the other addresses that answered lately instead of
// a path that is silent.
func (c *chooser) replace(now instant) {
	var found route
	for a, k := range c.candidates {
		if a == c.best || k.ponged == 0 || k.ponged < k.pinged || now-k.ponged > answeredLate {
			continue
		}
		if c.best.IsValid() && c.alive.missed < doubtful && k.seen < c.alive.began {
			continue
		}
		if r := (route{a, k.latency}); better(r, found) {
			found = r
		}
	}
	if !found.to.IsValid() {
		return
	}
	why := "path silent"
	if c.best.IsValid() {
		why = c.best.String() + " is silent"
	}
	at := c.candidates[found.to].ponged
	c.setBest(found.to, now, why)
	c.latency = found.latency
	c.trusted = at + trustFor
	c.alive.missed = 1 // both ways until it answers again
}

// usableSize is the largest datagram that the best path takes, 0 = none.
func (c *chooser) usableSize() int {
	switch {
	case !c.best.IsValid():
		return 0
	case c.size.proven:
		return fullDatagram
	}
	return minDatagram
}

// tooLarge notes that the system refuses full datagrams.
func (c *chooser) tooLarge(now instant) {
	c.size = fullness{tries: fullTries, next: now + fullEvery}
}
