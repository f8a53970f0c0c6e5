package path

import (
	"net/netip"
	"time"
)

// Bounds of the discovery pings of a node, whoever asks for them. A peer that
// lists a victim's address must not turn the mesh against it.
const (
	budgetBurst   = 512             // pings at once
	budgetRate    = 512             // pings a second
	windowLen     = 5 * time.Second // over which pings to one IP address are counted
	windowPublic  = 64              // pings to one public address in a window
	windowPrivate = 1024            // and to a private or loopback one, where many agents may live
	windowMax     = 4096            // addresses counted at a time; more get nothing
)

// budget bounds discovery pings. The zero value is full.
type budget struct {
	used   float64 // of budgetBurst
	last   instant
	window instant // start
	perIP  map[netip.Addr]int
	held   uint64 // pings refused

	never   map[netip.AddrPort]struct{} // where no ping may go
	neverIP map[netip.Addr]struct{}
}

// allows is take for one port, where pings may be forbidden.
func (b *budget) allows(a netip.AddrPort, now instant) bool {
	_, no := b.never[a]
	_, noIP := b.neverIP[a.Addr()]
	ok := !no && !noIP && b.take(a.Addr(), now)
	if !ok {
		b.held++
	}
	return ok
}

// take reports whether a discovery ping to ip may go out now, and counts it.
func (b *budget) take(ip netip.Addr, now instant) bool {
	b.used = max(b.used-(now-b.last).Seconds()*budgetRate, 0)
	b.last = now
	if b.used+1 > budgetBurst {
		return false
	}
	if b.perIP == nil || now-b.window >= windowLen {
		b.window = now
		b.perIP = make(map[netip.Addr]int)
	}
	limit := windowPublic
	if ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
		limit = windowPrivate
	}
	n, counted := b.perIP[ip]
	if n >= limit || !counted && len(b.perIP) >= windowMax {
		return false
	}
	b.perIP[ip] = n + 1
	b.used++
	return true
}
