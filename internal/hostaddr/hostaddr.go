// Package hostaddr lists the addresses of the host's network interfaces, and
// tells when they change.
package hostaddr

import (
	"net"
	"net/netip"
)

// Up lists the addresses of the interfaces that are up, the loopback ones too,
// each with the length of its network.
func Up() ([]netip.Prefix, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var list []netip.Prefix
	for _, i := range ifs {
		if i.Flags&net.FlagUp != 0 {
			list = append(list, Of(&i)...)
		}
	}
	return list, nil
}

// Of lists the addresses of an interface; none if it is gone.
func Of(i *net.Interface) (list []netip.Prefix) {
	addrs, err := i.Addrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				bits, _ := n.Mask.Size()
				list = append(list, netip.PrefixFrom(ip.Unmap(), bits))
			}
		}
	}
	return list
}
