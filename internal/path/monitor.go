package path

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/internal/hostaddr"
)

const (
	pollActive  = 2 * time.Second  // how often interfaces are looked at where the system tells nothing
	pollIdle    = 15 * time.Second // and while no session is active
	pollAnyway  = 30 * time.Second // and where it does
	changeSpace = 500 * time.Millisecond
	changeWait  = 20 * time.Millisecond // changes come in groups
	sleptFor    = 3 * time.Second       // a timer so late means that the process did not run
)

// watch is what mind knows of watching the host's network.
type watch struct {
	told  bool          // the system tells of changes; not changed once sockets are open
	noted atomic.Uint32 // what it told since the last look: notedAddresses, notedRoute

	// Of mind alone.
	changeAt instant // when to look because of what was told, 0 = nothing was
	quietTo  instant // not before

	pollAt instant // when to look anyway; guarded by Path.mu
}

const (
	notedAddresses = 1 << iota
	notedRoute
)

// noteChange is told by the system of changes of the host's network.
func (p *Path) noteChange(c hostaddr.Change) {
	var bits uint32
	if c.Addresses {
		bits |= notedAddresses
	}
	if c.Route {
		bits |= notedRoute
	}
	if bits != 0 && p.watch.noted.Or(bits)&bits != bits {
		p.poke()
	}
}

// stirLocked notes that a session has become active: where the system tells
// nothing, interfaces are looked at more often.
func (p *Path) stirLocked(now instant) {
	if w := &p.watch; !w.told && w.pollAt > now+pollActive {
		w.pollAt = now + pollActive
		p.poke()
	}
}

// dueWatch looks at the host's network if there is reason to, by the events of
// the system where there are any and otherwise now and then. It returns when
// that is due again.
func (p *Path) dueWatch() (next instant) {
	w := &p.watch
	now := p.now()
	if w.changeAt == 0 && w.noted.Load() != 0 {
		w.changeAt = max(now+changeWait, w.quietTo)
	}
	p.mu.Lock()
	next = w.pollAt
	p.mu.Unlock()
	if w.changeAt != 0 {
		next = min(next, w.changeAt)
	}
	if now < next {
		return next
	}
	route := w.noted.Swap(0)&notedRoute != 0
	w.changeAt = 0
	if p.look(route) {
		w.quietTo = p.now() + changeSpace
	}
	p.regatherSlowly()
	wait := pollAnyway
	p.mu.Lock()
	defer p.mu.Unlock()
	if !w.told {
		wait = pollIdle
		if p.anyActive() {
			wait = pollActive
		}
	}
	w.pollAt = p.now() + wait
	return w.pollAt
}

// regatherSlowly has the endpoints of an idle node gathered now and then.
func (p *Path) regatherSlowly() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := p.now(); p.ends.at != 0 && now-p.ends.at >= regatherIdle {
		p.gatherLocked(now)
	}
}

// look compares the addresses of the host with those known and does what is to
// be done. It reports whether there was something.
func (p *Path) look(route bool) bool {
	local, err := p.cfg.Interfaces()
	if err != nil {
		p.log.Debug("list interfaces", zap.Error(err))
		return false
	}
	p.mu.Lock()
	if p.ends.local == nil {
		p.mu.Unlock()
		return false // nothing is known yet that could have changed
	}
	lost, gained := compare(p.ends.local, local)
	p.mu.Unlock()
	switch {
	case lost || route:
		p.log.Debug("network changed", zap.Bool("addresses lost", lost), zap.Bool("default route", route))
		if p.lacksSocket(local) {
			p.rebind()
		}
		p.NetworkChanged()
	case gained:
		if p.lacksSocket(local) {
			p.rebind()
		}
		p.mu.Lock()
		p.gatherLocked(p.now())
		p.mu.Unlock()
		p.poke()
		p.changed()
	default:
		return false
	}
	return true
}

func (p *Path) rebind() {
	if err := p.Rebind(); err != nil {
		p.log.Debug("open sockets anew", zap.Error(err))
	}
}

// lacksSocket reports whether there is an address of a family without a socket,
// or a socket that failed.
func (p *Path) lacksSocket(local []netip.Prefix) bool {
	if p.cfg.RelayOnly {
		return false
	}
	if p.port.broken.Load() {
		return true
	}
	s := p.socks.Load()
	return slices.ContainsFunc(local, func(n netip.Prefix) bool {
		a := n.Addr().Unmap()
		return s.to(a) == nil && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !isMesh(a)
	})
}

// compare tells what differs between two lists of addresses; those of the mesh
// itself do not count.
func compare(old, now []netip.Prefix) (lost, gained bool) {
	lacks := func(a, b []netip.Prefix) bool {
		return slices.ContainsFunc(a, func(n netip.Prefix) bool {
			return !isMesh(n.Addr().Unmap()) && !slices.Contains(b, n)
		})
	}
	return lacks(old, now), lacks(now, old)
}

func isMesh(a netip.Addr) bool {
	return slices.ContainsFunc(meshPrefixes, func(m netip.Prefix) bool { return m.Contains(a) })
}

// clock finds out that the process did not run for a while: the host was
// suspended, or the process was stopped.
type clock struct {
	wall time.Time
	mono instant
}

// slept reports it, given when the path planned to be awake (0 = not at all).
func (c *clock) slept(now, planned instant, wall time.Time) bool {
	wall = wall.Round(0) // without its monotonic reading, which stands still in suspend
	passed, ran := wall.Sub(c.wall), now-c.mono
	first := c.wall.IsZero()
	c.wall, c.mono = wall, now
	return !first && passed-ran > sleptFor || planned != 0 && now-planned > sleptFor
}
