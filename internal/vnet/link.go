package vnet

import (
	"math/rand/v2"
	"net/netip"
	"time"
)

// Link says what a link does to packets, in each direction by itself. The zero
// Link is perfect and instant.
type Link struct {
	// Latency of one direction.
	Latency time.Duration
	// Jitter is the most that chance adds to Latency. Packets stay in order.
	Jitter time.Duration
	// Loss is the share of packets lost, 0 to 1.
	Loss float64
	// Burst is the mean number of packets lost in a row; up to 1 means that
	// each is lost for itself.
	Burst float64
	// Duplicate is the share of packets that arrive twice.
	Duplicate float64
	// Reorder is the share of packets that are overtaken: they take ReorderBy
	// longer, 0 = 10 ms.
	Reorder   float64
	ReorderBy time.Duration
	// Bandwidth in bytes per second, 0 = unlimited. Packets queue for it as
	// long as there are no more than Queue bytes, 0 = 64 KiB.
	Bandwidth int
	Queue     int
	// MTU is the largest IP packet, header included, 0 = any. The sender is
	// told of larger ones, as by ICMP "fragmentation needed": after the first
	// loss it sends fragments, or gets EMSGSIZE if it asked for none.
	MTU int
	// BlackHole is the size of IP packets above which they vanish silently,
	// 0 = none.
	BlackHole int
	// NoFragments drops fragments.
	NoFragments bool
	// Block lists what is dropped silently.
	Block []Match
}

// Match selects packets. All of its fields that are set must fit.
type Match struct {
	Proto Proto
	// Host is one end of the packet, whichever.
	Host netip.Prefix
	// Port is the port of that end, of either if Host is not set.
	Port uint16
	// Longer is the size above which packets match, IP header included.
	Longer int
}

func (m *Match) fits(p *packet) bool {
	end := func(a netip.AddrPort) bool {
		return (!m.Host.IsValid() || m.Host.Contains(a.Addr())) && (m.Port == 0 || m.Port == a.Port())
	}
	return (m.Proto == AnyProto || m.Proto == p.proto) && p.size() > m.Longer && (end(p.src) || end(p.dst))
}

const (
	defaultReorderBy = 10 * time.Millisecond
	defaultQueue     = 64 << 10
)

// pipe is one direction of a link.
type pipe struct {
	rng   *rand.Rand
	burst bool      // within a burst of losses
	last  time.Time // arrival of the last packet in order
	free  time.Time // when the bandwidth is free again
}

// lose decides the fate of the next packet.
func (p *pipe) lose(l *Link) bool {
	if l.Loss <= 0 {
		return false
	}
	if l.Burst <= 1 {
		return p.rng.Float64() < l.Loss
	}
	// Two states: all packets of the bad one are lost. Bad ones last Burst
	// packets; the good ones as long as makes the share right.
	leave := 1 / l.Burst
	enter := min(1, l.Loss/(1-min(l.Loss, 0.999))*leave)
	if r := p.rng.Float64(); p.burst {
		p.burst = r >= leave
	} else {
		p.burst = r < enter
	}
	return p.burst
}

// transmit takes a packet over one direction of the link.
func (i *iface) transmit(pi *pipe, p *packet, arrive func(*packet)) {
	n, l := i.net.n, &i.link
	if i.cut || i.stops(p) || pi.lose(l) {
		n.stats.Lost++
		return
	}
	now := time.Now()
	at := now
	if l.Bandwidth > 0 {
		queue := l.Queue
		if queue == 0 {
			queue = defaultQueue
		}
		if pi.free.Before(now) {
			pi.free = now
		}
		if waiting := pi.free.Sub(now).Seconds() * float64(l.Bandwidth); int(waiting)+p.size() > queue {
			n.stats.Lost++
			return
		}
		pi.free = pi.free.Add(time.Duration(float64(p.size()) / float64(l.Bandwidth) * float64(time.Second)))
		at = pi.free
	}
	at = at.Add(l.Latency)
	if l.Jitter > 0 {
		at = at.Add(time.Duration(pi.rng.Int64N(int64(l.Jitter) + 1)))
	}
	if l.Reorder > 0 && pi.rng.Float64() < l.Reorder {
		by := l.ReorderBy
		if by == 0 {
			by = defaultReorderBy
		}
		at = at.Add(by)
	} else {
		if at.Before(pi.last) {
			at = pi.last
		}
		pi.last = at
	}
	copies := 1
	if l.Duplicate > 0 && pi.rng.Float64() < l.Duplicate {
		copies = 2
	}
	for range copies {
		p := *p
		_, host := i.owner.(*Host)
		if !at.After(now) && !host {
			arrive(&p) // not to a host, which may answer at once and so for ever
			continue
		}
		n.atLocked(at, func() { arrive(&p) })
	}
}

// stops reports whether the link does not take such a packet, and tells the
// sender if that is how it is.
func (i *iface) stops(p *packet) bool {
	l := &i.link
	piece := p.piece()
	switch {
	case l.BlackHole > 0 && piece > l.BlackHole, l.NoFragments && p.frag > 0 && p.size() > p.frag:
		return true
	case l.MTU > 0 && piece > l.MTU:
		if p.origin != nil {
			p.origin.learnMTU(p, l.MTU)
		}
		return true
	}
	for k := range l.Block {
		if l.Block[k].fits(p) {
			return true
		}
	}
	return false
}
