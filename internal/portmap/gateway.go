package portmap

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"io"
	"mesh/internal/hostaddr"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Flags of routes.
const (
	routeUp      = 1
	routeGateway = 2
)

// maxRoutes bounds the lines of a routing table that are read.
const maxRoutes = 10000

// route is a default route.
type route struct {
	iface   string
	gateway netip.Addr
	metric  uint64
}

// defaultRoute4 finds the best default route of the kernel's table of IPv4
// routes, /proc/net/route.
func defaultRoute4(r io.Reader) (best route, ok bool) {
	eachRoute(r, func(f []string) {
		// iface destination gateway flags refcnt use metric mask …
		if len(f) < 8 || f[1] != "00000000" || f[7] != "00000000" {
			return
		}
		gw, err := hex.DecodeString(f[2])
		flags, err2 := strconv.ParseUint(f[3], 16, 16)
		metric, err3 := strconv.ParseUint(f[6], 10, 32)
		if err != nil || err2 != nil || err3 != nil || len(gw) != 4 || flags&(routeUp|routeGateway) != routeUp|routeGateway {
			return
		}
		if ok && metric >= best.metric {
			return
		}
		// The kernel prints the number as it lies in memory.
		var a [4]byte
		binary.NativeEndian.PutUint32(a[:], binary.BigEndian.Uint32(gw))
		best, ok = route{f[0], netip.AddrFrom4(a), metric}, true
	})
	return best, ok
}

// defaultRoute6 finds the best default route of the kernel's table of IPv6
// routes, /proc/net/ipv6_route.
func defaultRoute6(r io.Reader) (best route, ok bool) {
	const zero = "00000000000000000000000000000000"
	eachRoute(r, func(f []string) {
		// destination length source length next-hop metric refcnt use flags iface
		if len(f) < 10 || f[0] != zero || f[1] != "00" || f[3] != "00" || f[4] == zero {
			return
		}
		gw, err := hex.DecodeString(f[4])
		metric, err2 := strconv.ParseUint(f[5], 16, 32)
		flags, err3 := strconv.ParseUint(f[8], 16, 32)
		if err != nil || err2 != nil || err3 != nil || len(gw) != 16 || flags&(routeUp|routeGateway) != routeUp|routeGateway {
			return
		}
		if ok && metric >= best.metric {
			return
		}
		a := netip.AddrFrom16([16]byte(gw))
		if a.IsLinkLocalUnicast() {
			a = a.WithZone(f[9])
		}
		best, ok = route{f[9], a, metric}, true
	})
	return best, ok
}

func eachRoute(r io.Reader, do func(fields []string)) {
	lines := bufio.NewScanner(r)
	for n := 0; n < maxRoutes && lines.Scan(); n++ {
		do(strings.Fields(lines.Text()))
	}
}

// prefixesOf returns the addresses of an interface.
func prefixesOf(name string) []netip.Prefix {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	return hostaddr.Of(i)
}

// pickSelf returns our address towards a gateway: one of the subnet that the
// gateway is in. For an IPv6 gateway with a link-local address it is a global
// one, as mappings are for these.
func pickSelf(list []netip.Prefix, gw netip.Addr) (self netip.Addr, ok bool) {
	for _, p := range list {
		a := p.Addr()
		if gw.IsLinkLocalUnicast() && gw.Is6() {
			if a.Is6() && a.IsGlobalUnicast() && !a.IsPrivate() {
				return a, true
			}
		} else if p.Contains(gw) && a != gw {
			return a, true
		}
	}
	return self, false
}

// guessGateway takes the first address of the subnet of an address for the
// gateway, as most networks have it.
func guessGateway(p netip.Prefix) (gw netip.Addr, ok bool) {
	if !p.Addr().Is4() || !p.Addr().IsPrivate() || p.Bits() > 30 || p.Bits() < 8 {
		return gw, false
	}
	gw = p.Masked().Addr().Next()
	return gw, gw != p.Addr()
}
