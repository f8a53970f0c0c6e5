package path

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"mesh/control/wire"
	"mesh/internal/demux"
)

// Stats counts what was ignored and withheld since New, for who wants to know
// whether somebody tries something. Strays of the past count too.
type Stats struct {
	DiscoUnknown uint64 // disco packets of senders in no netmap, or by relay not of that node
	DiscoForged  uint64 // whose box did not open, or with nothing sensible inside
	DiscoByUDP   uint64 // CallMeMaybes that did not come by relay, and so prove nothing
	PongsStray   uint64 // pongs that answer no ping of ours
	STUNStray    uint64 // STUN answers to no request of ours, or from elsewhere
	PingsHeld    uint64 // pings not sent: bounds against reflection, or forbidden addresses
	// Of a port that nodes share, for all of them together.
	SharedStrays  uint64 // datagrams for none of them
	SharedRefused uint64 // datagrams that are for one of them maybe, but more than the bounds let try
}

type counters struct {
	discoUnknown, discoForged, discoByUDP, pongsStray, stunStray atomic.Uint64
}

// Stats returns the counts so far.
func (p *Path) Stats() Stats {
	p.mu.Lock()
	held := p.budget.held
	p.mu.Unlock()
	var shared demux.Stats
	if p.share != nil {
		shared = p.share.port.table.Stats()
	}
	return Stats{
		SharedStrays:  shared.Strays,
		SharedRefused: shared.Refused,

		DiscoUnknown: p.counts.discoUnknown.Load(),
		DiscoForged:  p.counts.discoForged.Load(),
		DiscoByUDP:   p.counts.discoByUDP.Load(),
		PongsStray:   p.counts.pongsStray.Load(),
		STUNStray:    p.counts.stunStray.Load(),
		PingsHeld:    held,
	}
}

// Endpoint is an address of this node that something other than path knows.
type Endpoint struct {
	Addr netip.AddrPort
	Type wire.EndpointType
}

// SetEndpoints takes the addresses at which this node can be reached by what
// others know: port mappings, static ones that the user gave. The list replaces
// the one before; the first go first. Control and the peers of active sessions
// hear of it at once.
func (p *Path) SetEndpoints(list []Endpoint) {
	p.setEndpoints(func() { p.ends.extra = append([]Endpoint(nil), list...) })
	if p.share != nil {
		mapped := slices.DeleteFunc(slices.Clone(list), func(e Endpoint) bool { return e.Type != wire.EndpointPortMapped })
		p.share.lend(p, mapped)
	}
}

// setEndpoints has what set does, under the lock, be the node's endpoints.
func (p *Path) setEndpoints(set func()) {
	p.mu.Lock()
	now := p.now()
	set()
	settled := p.ends.at != 0
	if settled {
		p.listLocked(now)
		for _, pe := range p.peers.all() {
			if pe.ch.active && !pe.ch.hasDirect(now) && !p.cfg.RelayOnly {
				p.calls[pe] = struct{}{}
			}
		}
	}
	p.mu.Unlock()
	if settled {
		p.flushCalls()
		p.reporting.Ask()
	}
}

// Avoid names addresses that are no peer's whatever peers say, such as control's:
// no ping goes there. The list replaces the one before. Relays of the map need
// not be named.
func (p *Path) Avoid(addrs []netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.avoid = append([]netip.AddrPort(nil), addrs...)
	p.forbidLocked()
}

// forbidLocked tells the budget of pings where none may go.
func (p *Path) forbidLocked() {
	b := &p.budget
	b.never = make(map[netip.AddrPort]struct{})
	b.neverIP = make(map[netip.Addr]struct{})
	for _, a := range p.avoid {
		b.never[unmap(a)] = struct{}{}
	}
	for _, def := range p.home.defs {
		for _, n := range def.Nodes {
			if n == nil {
				continue
			}
			for _, v6 := range []bool{false, true} {
				a, ok, named := stunHost(n, v6)
				if !ok || named {
					continue
				}
				for _, port := range []int{n.STUNPort, defaultSTUNPort} {
					if port > 0 && port < 1<<16 {
						b.never[netip.AddrPortFrom(a.Unmap(), uint16(port))] = struct{}{}
					}
				}
			}
		}
	}
	for _, n := range p.ends.local {
		if n = netip.PrefixFrom(n.Addr().Unmap(), n.Bits()); n.Addr().Is4() && n.IsValid() && n.Bits() < 31 {
			ip := n.Masked().Addr().As4()
			for i := n.Bits(); i < 32; i++ {
				ip[i/8] |= 0x80 >> (i % 8)
			}
			b.neverIP[netip.AddrFrom4(ip)] = struct{}{}
		}
	}
}
