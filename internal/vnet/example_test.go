package vnet_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"mesh/internal/vnet"
)

// Two homes with usual routers: the first packet of each opens the way for the
// other's. Inside a testing/synctest bubble the same takes no time at all.
func Example() {
	n := vnet.New(1)
	defer n.Close()
	listen := func(h *vnet.Host, addr string) net.PacketConn {
		pc, err := h.ListenUDP(context.Background(), "udp4", addr)
		if err != nil {
			panic(err)
		}
		return pc
	}
	ra, rb := n.NAT(vnet.Home()), n.NAT(vnet.Home())
	a, b := listen(ra.Host(), ":4000"), listen(rb.Host(), ":5000")
	ra.SetLink(vnet.Link{Latency: 20 * time.Millisecond})

	toB := net.UDPAddrFromAddrPort(netip.AddrPortFrom(rb.WAN(), 5000))
	toA := net.UDPAddrFromAddrPort(netip.AddrPortFrom(ra.WAN(), 4000))
	a.WriteTo([]byte("a knocks"), toB) // lost at b's router, but now b may answer
	time.Sleep(50 * time.Millisecond)
	b.WriteTo([]byte("b answers"), toA)

	buf := make([]byte, 100)
	k, from, err := a.ReadFrom(buf)
	fmt.Printf("%s, from %v, %v\n", buf[:k], from, err)
	// Output: b answers, from 203.0.113.2:5000, <nil>
}
