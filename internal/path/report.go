package path

import (
	"fmt"
	"reflect"
	"slices"

	"mesh/control/wire"
)

// tellReport calls Report if there is something new. It is the errand of
// p.reporting, which alone uses p.reported.
func (p *Path) tellReport() {
	r, ok := p.snapshot()
	if !ok || p.cfg.Report == nil || p.ctx.Err() != nil || p.reported != nil && same(*p.reported, r) {
		return
	}
	p.reported = &r
	p.cfg.Report(r)
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
