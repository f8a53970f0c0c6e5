package portmap

import (
	"net/netip"
	"os"
)

// SystemGateway returns the default gateway and this host's address towards
// it: by IPv4 if there is a default route, else by IPv6.
func SystemGateway() (gw, self netip.Addr, ok bool) {
	if f, err := os.Open("/proc/net/route"); err == nil {
		r, found := defaultRoute4(f)
		f.Close()
		if found {
			if self, ok = pickSelf(prefixesOf(r.iface), r.gateway); ok {
				return r.gateway, self, true
			}
		}
	}
	if f, err := os.Open("/proc/net/ipv6_route"); err == nil {
		r, found := defaultRoute6(f)
		f.Close()
		if found {
			if self, ok = pickSelf(prefixesOf(r.iface), r.gateway); ok {
				return r.gateway, self, true
			}
		}
	}
	return gw, self, false
}
