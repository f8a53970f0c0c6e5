package path

import (
	"net/netip"
	"time"
)

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
	switch d := a.latency - b.latency; {
	case d < -noise:
		pa += advantage(a.latency, b.latency)
	case d > noise:
		pb += advantage(b.latency, a.latency)
	}
	return pa > pb+hysteresis
}

// The protocol's own hysteresis is one point. Ours is larger, since latencies
// are single samples that vary by more; both ends choose for themselves.
const (
	hysteresis = 9                      // points
	noise      = 300 * time.Microsecond // less is no difference
)

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
