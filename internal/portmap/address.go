package portmap

import (
	"net/netip"
	"slices"
)

// Ranges in which there is no host at all.
var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8")
	reserved    = netip.MustParsePrefix("240.0.0.0/4")
)

// notPublic are the ranges beside those that netip knows in which no host of
// the internet can be reached.
var notPublic = []netip.Prefix{
	thisNetwork, reserved,
	netip.MustParsePrefix("100.64.0.0/10"), // between subscribers and their provider
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("fec0::/10"),
}

// isPublic reports whether an address is one of the internet. Those reserved
// for documentation count: networks under test use them.
func isPublic(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsGlobalUnicast() && !a.IsPrivate() &&
		!slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(a) })
}

// sensible reports whether a host may have an address and port, be it behind
// another NAT.
func sensible(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.Port() != 0 && ip.IsGlobalUnicast() && ip.Zone() == "" &&
		!thisNetwork.Contains(ip) && !reserved.Contains(ip)
}

// plausible reports whether a gateway may be asked: it is another host, a
// single one, and speaks our family.
func plausible(l link) bool {
	ok := func(a netip.Addr) bool {
		return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() &&
			(!a.Is4() || !thisNetwork.Contains(a) && !reserved.Contains(a))
	}
	return ok(l.gw) && ok(l.self) && l.gw.Is4() == l.self.Is4() && l.gw.WithZone("") != l.self.WithZone("")
}
