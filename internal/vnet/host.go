package vnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Host is a machine with sockets.
type Host struct {
	n *Net
	// All under Net.mu.
	ifaces   []*iface // the first that is up has the default route
	udp      []*udpConn
	listened []*listener
	tcp      map[flow]*tcpConn
	pmtu     map[netip.Addr]int // learned from links
	nextPort uint16
	changed  waiters
	changes  uint64
}

// flow names a connection as one end sees it.
type flow struct {
	proto         Proto
	local, remote netip.AddrPort
}

const (
	firstPort = 32768 // of those given out when 0 is asked for
	lastPort  = 60999
)

// publicLink is the link of a host or router on the public internet, lanLink
// that of a host behind a router.
var (
	publicLink = Link{Latency: 5 * time.Millisecond}
	lanLink    = Link{Latency: 200 * time.Microsecond}
)

// Host returns a new host on the public internet with an address of each
// family, 5 ms away from the core.
func (n *Net) Host(f Family) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.newHostLocked()
	h.joinCoreLocked(f)
	return h
}

func (n *Net) newHostLocked() *Host {
	h := &Host{n: n, tcp: make(map[flow]*tcpConn), pmtu: make(map[netip.Addr]int)}
	h.nextPort = uint16(firstPort + n.randLocked().IntN(lastPort-firstPort))
	n.hosts = append(n.hosts, h)
	return h
}

func (h *Host) joinCoreLocked(f Family) {
	var addrs []netip.Prefix
	if f&V4 != 0 {
		addrs = append(addrs, netip.PrefixFrom(h.n.public4Locked(), 24))
	}
	if f&V6 != 0 {
		addrs = append(addrs, netip.PrefixFrom(h.n.public6Locked(), 64))
	}
	h.ifaces = append(h.ifaces, h.n.core.attach(h, publicLink, addrs...))
}

// Addr returns the host's first address, invalid if it has none.
func (h *Host) Addr() netip.Addr {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for _, i := range h.ifaces {
		if len(i.addrs) > 0 {
			return i.addrs[0].Addr()
		}
	}
	return netip.Addr{}
}

// Addr6 returns the host's first IPv6 address, invalid if it has none.
func (h *Host) Addr6() netip.Addr {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for _, i := range h.ifaces {
		if a := i.addr(true); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

// Interfaces lists the addresses of the interfaces that are up, with the
// loopback ones. The error is always nil.
func (h *Host) Interfaces() ([]netip.Prefix, error) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	out := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")}
	for _, i := range h.ifaces {
		if !i.down {
			out = append(out, i.addrs...)
		}
	}
	return out, nil
}

// WaitChange waits until the host's interfaces or addresses are others than
// after the given number of changes, and returns their new number: what an
// operating system tells by netlink and the like. The number of a new host is
// 0. The error is that of ctx.
func (h *Host) WaitChange(ctx context.Context, after uint64) (uint64, error) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for h.changes == after {
		if err := h.changed.wait(ctx, &h.n.mu, time.Time{}); err != nil {
			return h.changes, err
		}
	}
	return h.changes, nil
}

func (h *Host) changeLocked() {
	h.changes++
	h.pmtu = make(map[netip.Addr]int)
	h.changed.wake()
}

// SetLink changes the link of the host's first interface.
func (h *Host) SetLink(l Link) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	h.ifaces[0].link = l
}

// SetUp takes all interfaces up or down. While they are down, writes fail with
// ENETUNREACH and TCP connections wait.
func (h *Host) SetUp(up bool) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for _, i := range h.ifaces {
		i.down = !up
	}
	h.changeLocked()
}

// Cut cuts the host off without anybody noticing, or ends that.
func (h *Host) Cut(on bool) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for _, i := range h.ifaces {
		i.cut = on
	}
}

// Move takes the host out of the networks where it is to another router's. It
// gets new addresses; sockets stay open.
func (h *Host) Move(to *Router) { h.move(func() { to.joinLocked(h, Dual) }) }

// MoveOut takes the host to the public internet.
func (h *Host) MoveOut(f Family) { h.move(func() { h.joinCoreLocked(f) }) }

func (h *Host) move(join func()) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	for _, i := range h.ifaces {
		i.net.detach(i)
	}
	h.ifaces = nil
	join()
	h.changeLocked()
}

// Join gives the host one more interface, in another router's network. The
// interfaces that it had before are preferred as long as they are up.
func (h *Host) Join(r *Router) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	r.joinLocked(h, Dual)
	h.changeLocked()
}

// SetInterfaceUp takes one interface up or down, counted from 0 in the order
// in which the host joined.
func (h *Host) SetInterfaceUp(number int, up bool) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	h.ifaces[number].down = !up
	h.changeLocked()
}

// routeLocked finds the way to a destination. iface is nil for the host itself.
func (h *Host) routeLocked(dst netip.Addr) (i *iface, src netip.Addr, err error) {
	if dst.IsLoopback() || h.ownsLocked(dst) {
		return nil, dst, nil
	}
	var def *iface
	for _, i := range h.ifaces {
		src := i.addr(dst.Is6())
		if i.down || !src.IsValid() {
			continue
		}
		for _, a := range i.addrs {
			if a.Contains(dst) {
				return i, src, nil
			}
		}
		if def == nil {
			def = i
		}
	}
	if def == nil || dst.IsLinkLocalUnicast() {
		return nil, netip.Addr{}, syscall.ENETUNREACH
	}
	return def, def.addr(dst.Is6()), nil
}

func (h *Host) ownsLocked(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	for _, i := range h.ifaces {
		if !i.down && slices.ContainsFunc(i.addrs, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return true
		}
	}
	return false
}

// sendLocked sends a packet whose source is set, or is to be set if its
// address is unspecified.
func (h *Host) sendLocked(p *packet) error {
	i, src, err := h.routeLocked(p.dst.Addr())
	if err != nil {
		return err
	}
	if p.src.Addr().IsUnspecified() {
		p.src = netip.AddrPortFrom(src, p.src.Port())
	}
	p.origin = h
	h.n.stats.Packets++
	switch {
	case i == nil:
		h.n.atLocked(time.Now(), func() { h.input(p, nil) })
	case !h.ownsLocked(p.src.Addr()):
		h.n.stats.Lost++ // an address that the host had once
	default:
		i.send(p)
	}
	return nil
}

// learnMTU notes that a link on the way does not take packets larger than mtu.
func (h *Host) learnMTU(p *packet, mtu int) {
	mtu = max(mtu, 576)
	if old, ok := h.pmtu[p.dst.Addr()]; !ok || mtu < old {
		h.pmtu[p.dst.Addr()] = mtu
	}
}

// mtuLocked is the largest packet for a destination by what is known.
func (h *Host) mtuLocked(dst netip.Addr) int {
	mtu := defaultMTU
	if i, _, _ := h.routeLocked(dst); i == nil {
		mtu = 1 << 16
	} else if i.link.MTU > 0 {
		mtu = i.link.MTU
	}
	if m, ok := h.pmtu[dst]; ok {
		mtu = min(mtu, m)
	}
	return mtu
}

// input implements station.
func (h *Host) input(p *packet, _ *iface) {
	if !h.ownsLocked(p.dst.Addr()) {
		h.n.stats.Refused++
		return
	}
	if p.proto == TCP {
		h.inputTCP(p)
		return
	}
	if c := h.udpAtLocked(p.dst); c != nil {
		c.deliver(p)
	} else {
		h.n.stats.Refused++
	}
}

// freePortLocked picks a port for a socket that asked for 0.
func (h *Host) freePortLocked(free func(port uint16) bool) (uint16, bool) {
	for range lastPort - firstPort + 1 {
		port := h.nextPort
		if h.nextPort++; h.nextPort > lastPort {
			h.nextPort = firstPort
		}
		if free(port) {
			return port, true
		}
	}
	return 0, false
}

func (h *Host) closeAllLocked() {
	for _, c := range slices.Clone(h.udp) {
		c.closeLocked()
	}
	for _, l := range slices.Clone(h.listened) {
		l.closeLocked()
	}
	for _, c := range h.tcp {
		c.endLocked(net.ErrClosed)
	}
	h.changes++
	h.changed.wake()
}

func (h *Host) openLocked() int {
	return len(h.udp) + len(h.listened) + len(h.tcp)
}

// binding is what a socket is bound to.
type binding struct {
	network string
	v4, v6  bool
	addr    netip.AddrPort
}

// overlaps reports whether packets could be for either.
func (b *binding) overlaps(o *binding) bool {
	if b.addr.Port() != o.addr.Port() || !(b.v4 && o.v4 || b.v6 && o.v6) {
		return false
	}
	return b.addr.Addr() == o.addr.Addr() || b.addr.Addr().IsUnspecified() || o.addr.Addr().IsUnspecified()
}

// takes reports whether the socket receives packets for a.
func (b *binding) takes(a netip.AddrPort) bool {
	if a.Port() != b.addr.Port() || a.Addr().Is6() && !b.v6 || a.Addr().Is4() && !b.v4 {
		return false
	}
	return b.addr.Addr().IsUnspecified() || b.addr.Addr() == a.Addr()
}

// bindLocked checks that b can be had, and gives it a port if it has none. taken
// reports whether b, as it is then, overlaps another socket.
func (h *Host) bindLocked(b *binding, taken func() bool) error {
	if h.n.closed {
		return net.ErrClosed
	}
	if ip := b.addr.Addr(); !ip.IsUnspecified() && !h.ownsLocked(ip) {
		return sysError("bind", syscall.EADDRNOTAVAIL)
	}
	free := func(port uint16) bool {
		b.addr = netip.AddrPortFrom(b.addr.Addr(), port)
		return !taken()
	}
	if port := b.addr.Port(); port != 0 && !free(port) {
		return sysError("bind", syscall.EADDRINUSE)
	} else if port == 0 {
		if _, ok := h.freePortLocked(free); !ok {
			return sysError("bind", syscall.EADDRINUSE)
		}
	}
	return nil
}

// parse reads the network and address that a listener is given.
func parse(proto, network, addr string) (b binding, err error) {
	b.network = network
	rest, ok := strings.CutPrefix(network, proto)
	b.v4, b.v6 = rest != "6", rest != "4"
	if !ok || rest != "" && rest != "4" && rest != "6" {
		return b, net.UnknownNetworkError(network)
	}
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return b, err
	}
	var port uint16
	if portText != "" {
		if _, err := fmt.Sscan(portText, &port); err != nil {
			return b, fmt.Errorf("port %q: %w", portText, err)
		}
	}
	ip := netip.IPv4Unspecified()
	if !b.v4 {
		ip = netip.IPv6Unspecified()
	}
	if host != "" {
		if ip, err = netip.ParseAddr(host); err != nil {
			return b, err
		}
		ip = ip.Unmap()
		if !ip.IsUnspecified() {
			b.v4, b.v6 = b.v4 && ip.Is4(), b.v6 && ip.Is6()
		}
		if !b.v4 && !b.v6 {
			return b, &net.AddrError{Err: "no such address family in " + network, Addr: addr}
		}
	}
	b.addr = netip.AddrPortFrom(ip, port)
	return b, nil
}

// sysError is an error as a system call gives it.
func sysError(call string, err error) error {
	if n, ok := err.(syscall.Errno); ok {
		return os.NewSyscallError(call, n)
	}
	return err
}
