//go:build !linux

package portmap

import (
	"mesh/internal/hostaddr"
	"net"
	"net/netip"
)

// SystemGateway guesses the default gateway, as the first address of the
// private IPv4 network that packets to the internet leave by, and returns it
// with this host's address there.
func SystemGateway() (gw, self netip.Addr, ok bool) {
	// Connecting a UDP socket sends nothing: the system picks a route. The
	// address is one reserved for documentation.
	nc, err := net.Dial("udp4", "192.0.2.1:9")
	if err != nil {
		return gw, self, false
	}
	defer nc.Close()
	a, isUDP := nc.LocalAddr().(*net.UDPAddr)
	if !isUDP {
		return gw, self, false
	}
	self = a.AddrPort().Addr().Unmap()
	ifs, err := net.Interfaces()
	if err != nil {
		return gw, self, false
	}
	for _, i := range ifs {
		for _, p := range hostaddr.Of(&i) {
			if p.Addr() == self {
				gw, ok = guessGateway(p)
				return gw, self, ok
			}
		}
	}
	return gw, self, false
}
