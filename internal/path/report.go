package path

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// reporter calls Report when there is something new.
func (p *Path) reporter() {
	var last Report
	first := true
	for {
		select {
		case <-p.report:
		case <-p.ctx.Done():
			return
		}
		r, ok := p.snapshot()
		if !ok || p.cfg.Report == nil || !first && same(last, r) {
			continue
		}
		first, last = false, r
		p.cfg.Report(r)
	}
}

// same reports whether control need not hear of b after a. Latencies change
// all the time and are only sent along.
func same(a, b Report) bool {
	a.NetInfo.DERPLatency, b.NetInfo.DERPLatency = nil, nil
	return slices.Equal(a.Endpoints, b.Endpoints) && slices.Equal(a.Types, b.Types) &&
		reflect.DeepEqual(a.NetInfo, b.NetInfo)
}

// snapshot returns the current report; ok is false before there is one.
func (p *Path) snapshot() (r Report, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, h := &p.ends, &p.home
	if !h.haveMap || e.at == 0 {
		return r, false
	}
	hasIPv6 := p.socks.Load().v6 != nil
	r = Report{
		Endpoints: e.list,
		Types:     e.types,
		NetInfo: wire.NetInfo{
			MappingVariesByDestIP: e.varies,
			WorkingIPv6:           e.ip6Works,
			OSHasIPv6:             &hasIPv6,
			WorkingUDP:            e.udpWorks,
			PreferredDERP:         h.region,
		},
	}
	now := p.now()
	for id, l := range e.latency {
		if r.NetInfo.DERPLatency == nil {
			r.NetInfo.DERPLatency = make(map[string]float64)
		}
		if l.at4 != 0 && now-l.at4 < latencyMemory {
			r.NetInfo.DERPLatency[fmt.Sprintf("%d-v4", id)] = l.v4.Seconds()
		}
		if l.at6 != 0 && now-l.at6 < latencyMemory {
			r.NetInfo.DERPLatency[fmt.Sprintf("%d-v6", id)] = l.v6.Seconds()
		}
	}
	return r, true
}

// PeerStatus tells how a peer is reached.
type PeerStatus struct {
	// Direct is the best UDP address; zero while only the relay is used.
	Direct netip.AddrPort
	// Trusted says that Direct is used exclusively.
	Trusted bool
	// Region is the relay region used beside or instead of Direct, 0 = none.
	Region       int
	Latency      time.Duration // of Direct, 0 = unknown
	Since        time.Time     // when Direct became what it is
	Why          string        // and the reason
	Active       bool          // traffic went out lately: paths are kept alive
	LastReceived time.Time     // zero = nothing yet
	LastSent     time.Time
	Candidates   int // addresses at which the peer may be
}

// Status tells how a peer is reached. The zero PeerStatus means that there was
// no traffic lately.
func (p *Path) Status(key identity.NodePublic) PeerStatus {
	pe := p.peers.get(key)
	if pe == nil {
		return PeerStatus{}
	}
	region := p.relayOf(pe)
	now := p.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &pe.ch
	st := PeerStatus{
		Direct:       c.best,
		Trusted:      c.hasDirect(now),
		Region:       region,
		Latency:      c.latency,
		Since:        p.time(c.since),
		Why:          c.why,
		Active:       c.active,
		LastReceived: p.time(instant(pe.received.Load())),
		LastSent:     p.time(instant(pe.sent.Load())),
		Candidates:   len(c.candidates),
	}
	if st.Trusted {
		st.Region = 0
	}
	return st
}
