package path

import (
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"
)

const (
	pollActive  = 2 * time.Second  // how often interfaces are looked at where the system tells nothing
	pollIdle    = 15 * time.Second // and while no session is active
	pollAnyway  = 30 * time.Second // and where it does
	changeSpace = 500 * time.Millisecond
	changeWait  = 20 * time.Millisecond // changes come in groups
	sleptFor    = 3 * time.Second       // a timer so late means that the process did not run
)

// networkEvents tells that interfaces, addresses or routes changed.
type networkEvents struct {
	changed chan netChange // capacity 1
	close   func()
}

// netChange says what changed.
type netChange struct {
	addresses bool // addresses or interfaces: worth a look
	route     bool // a default route: everything goes another way
}

func (c *netChange) add(d netChange) {
	c.addresses = c.addresses || d.addresses
	c.route = c.route || d.route
}

// monitor notices changes of the host's network until the path is closed: by
// the events of the system where there are, otherwise by looking now and then.
func (p *Path) monitor(events *networkEvents) {
	var changed <-chan netChange
	if events != nil {
		changed = events.changed
	}
	timer := time.NewTimer(pollIdle)
	defer timer.Stop()
	slow := true
	for {
		var c netChange
		select {
		case <-p.stir:
			if slow && events == nil {
				slow = false
				timer.Reset(pollActive)
			}
			continue
		case c = <-changed:
			if !p.sleep(changeWait) {
				return
			}
			select {
			case more := <-changed:
				c.add(more)
			default:
			}
		case <-timer.C:
		case <-p.ctx.Done():
			return
		}
		if p.look(c.route) && !p.sleep(changeSpace) {
			return
		}
		p.regatherSlowly()
		p.poke() // it looks at the clock, see slept
		wait := pollAnyway
		if events == nil {
			wait = pollIdle
			p.mu.Lock()
			if p.anyActive() {
				wait = pollActive
			}
			p.mu.Unlock()
			slow = wait == pollIdle
		}
		timer.Reset(wait)
	}
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
	if p.broken.Load() {
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
