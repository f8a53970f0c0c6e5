package vnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Router joins a site to the internet, or to the site of another router.
type Router struct {
	n   *Net
	nat *table
	// All under Net.mu.
	wan   *iface
	lan   *subnet
	inner *iface // towards the LAN
	self  *Host  // what the router answers by itself, on its LAN address
	v4    netip.Prefix
	v6    netip.Prefix
	last4 netip.Addr // given out last
	last6 netip.Addr
	flows map[flow]time.Time // of IPv6, until when; local is inside
}

// NAT returns a new site behind a router of a kind, 5 ms away from the core.
func (n *Net) NAT(spec NAT) *Router {
	n.mu.Lock()
	defer n.mu.Unlock()
	var addrs []netip.Prefix
	if !spec.NoIPv4 {
		addrs = append(addrs, netip.PrefixFrom(n.public4Locked(), 24))
	}
	if spec.IPv6 != NoIPv6 {
		addrs = append(addrs, netip.PrefixFrom(n.public6Locked(), 64))
	}
	return n.siteLocked(spec, n.core, publicLink, addrs)
}

// NAT returns a site whose router is behind r, as behind a carrier's NAT. It
// has IPv6 of its own if both routers have it.
func (r *Router) NAT(spec NAT) *Router {
	n := r.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if !r.v6.IsValid() {
		spec.IPv6 = NoIPv6
	}
	addrs := r.addrsLocked(Dual)
	site := n.siteLocked(spec, r.lan, lanLink, addrs)
	if site.v6.IsValid() {
		// All the way up the new prefix lies behind these routers.
		for up, behind := r, site.wan; ; {
			up.lan.routes[site.v6] = behind
			next, ok := up.wan.net.gatewayRouter()
			behind = up.wan
			if !ok {
				n.core.routes[site.v6] = behind
				break
			}
			up = next
		}
	}
	return site
}

// gatewayRouter returns the router of a subnet; the core has none.
func (s *subnet) gatewayRouter() (*Router, bool) {
	if s.gateway == nil {
		return nil, false
	}
	r, ok := s.gateway.owner.(*Router)
	return r, ok
}

func (n *Net) siteLocked(spec NAT, up *subnet, link Link, addrs []netip.Prefix) *Router {
	n.sites++
	r := &Router{n: n, nat: newTable(spec, n.randLocked()), lan: newSubnet(n), flows: make(map[flow]time.Time)}
	r.wan = up.attach(r, link, addrs...)
	r.inner = r.lan.attach(r, Link{})
	r.lan.gateway = r.inner
	var own []netip.Prefix
	if !spec.NoIPv4 {
		r.v4 = spec.LAN
		if !r.v4.IsValid() {
			r.v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(n.sites), 0}), 24)
			if n.sites > 254 {
				r.v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n.sites >> 8), byte(n.sites), 0}), 24)
			}
		}
		r.last4 = r.v4.Masked().Addr().Next()
		own = append(own, netip.PrefixFrom(r.last4, r.v4.Bits()))
	}
	if spec.IPv6 != NoIPv6 {
		a := netip.MustParseAddr("2001:db8::").As16()
		a[6], a[7] = byte(n.sites>>8)|0x80, byte(n.sites)
		r.v6 = netip.PrefixFrom(netip.AddrFrom16(a), 64)
		r.last6 = r.v6.Addr().Next()
		own = append(own, netip.PrefixFrom(r.last6, 64))
		if up == n.core {
			n.core.routes[r.v6] = r.wan
		}
	}
	r.self = n.newHostLocked()
	r.self.ifaces = []*iface{r.lan.attach(r.self, Link{}, own...)}
	return r
}

// addrsLocked gives out addresses of the router's LAN.
func (r *Router) addrsLocked(f Family) (out []netip.Prefix) {
	if f&V4 != 0 && r.v4.IsValid() {
		r.last4 = r.last4.Next()
		out = append(out, netip.PrefixFrom(r.last4, r.v4.Bits()))
	}
	if f&V6 != 0 && r.v6.IsValid() {
		r.last6 = r.last6.Next()
		out = append(out, netip.PrefixFrom(r.last6, 64))
	}
	return out
}

// Host returns a new host behind the router, with all families that the router
// offers or those given.
func (r *Router) Host(families ...Family) *Host {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	f := Dual
	if len(families) > 0 {
		f = 0
		for _, g := range families {
			f |= g
		}
	}
	h := r.n.newHostLocked()
	r.joinLocked(h, f)
	return h
}

func (r *Router) joinLocked(h *Host, f Family) {
	h.ifaces = append(h.ifaces, r.lan.attach(h, lanLink, r.addrsLocked(f)...))
}

// WAN returns the router's address towards the internet, invalid without IPv4.
func (r *Router) WAN() netip.Addr {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	return r.wan.addr(false)
}

// Self is the router as a host in its own LAN: whoever listens on it answers
// at the address that hosts take for their gateway, see Gateway.
func (r *Router) Self() *Host { return r.self }

// Gateway returns the router's IPv4 address in its LAN.
func (r *Router) Gateway() netip.Addr { return r.self.Addr() }

// ListenUDP opens a UDP socket on the router's LAN side, for protocols like
// those of port mapping.
func (r *Router) ListenUDP(ctx context.Context, network, addr string) (net.PacketConn, error) {
	return r.self.ListenUDP(ctx, network, addr)
}

// Forward lets everything in that comes to a public port, for a while, as port
// mapping protocols ask for. A public port of 0 means any. The error says that
// the port is in use. A lifetime of 0 or less ends the forwarding.
func (r *Router) Forward(proto Proto, public uint16, to netip.AddrPort, lifetime time.Duration) (netip.AddrPort, error) {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	t, now := r.nat, time.Now()
	if public == 0 {
		for range 1 << 12 {
			public = uint16(firstNATPort + t.rng.IntN(1<<16-firstNATPort))
			if t.fixed[outer{proto: proto, port: public}] == nil {
				break
			}
		}
	}
	key := outer{proto: proto, port: public}
	if m := t.fixed[key]; m != nil && !m.dead(now) && m.inner.local != to {
		return netip.AddrPort{}, fmt.Errorf("forward port %d: it is forwarded to %v", public, m.inner.local)
	}
	if lifetime <= 0 {
		delete(t.fixed, key)
	} else {
		t.fixed[key] = &mapping{inner: inner{proto: proto, local: to}, outer: key, expires: now.Add(lifetime)}
	}
	return netip.AddrPortFrom(r.wan.addr(false), public), nil
}

// SetLink changes the router's link towards the internet.
func (r *Router) SetLink(l Link) {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	r.wan.link = l
}

// Cut cuts the site off from the internet without anybody noticing, or ends
// that. The hosts behind the router still reach each other.
func (r *Router) Cut(on bool) {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	r.wan.cut = on
}

// Flush forgets all mappings, as a restart of the router does. A NAT that
// preserves ports gives the same ones again.
func (r *Router) Flush() {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	r.nat.flush()
	clear(r.flows)
}

// Rebind forgets all UDP mappings and gives others to the same sockets from now
// on: where the NAT preserves ports, another port stands for each.
func (r *Router) Rebind() {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	t := r.nat
	moved := make(map[netip.AddrPort]uint16)
	for _, m := range t.in {
		if m.inner.proto == UDP {
			moved[m.inner.local] = uint16(firstNATPort + t.rng.IntN(1<<16-firstNATPort))
			t.remove(m)
		}
	}
	t.moved = moved
}

// NewWAN gives the router another public IPv4 address and returns it. Mappings
// are forgotten, as after a new connection to the provider.
func (r *Router) NewWAN() netip.Addr {
	n := r.n
	n.mu.Lock()
	defer n.mu.Unlock()
	up := r.wan.net
	old := r.wan.addr(false)
	a := n.public4Locked()
	if r2, ok := up.gatewayRouter(); ok {
		a = r2.addrsLocked(V4)[0].Addr()
	}
	delete(up.ifaces, old)
	r.wan.addrs = slices.Clone(r.wan.addrs)
	for k, p := range r.wan.addrs {
		if p.Addr() == old {
			r.wan.addrs[k] = netip.PrefixFrom(a, p.Bits())
		}
	}
	up.ifaces[a] = r.wan
	r.nat.flush()
	return a
}

// Mappings returns how many mappings of UDP are alive.
func (r *Router) Mappings() (alive int) {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	now := time.Now()
	for _, m := range r.nat.in {
		if m.inner.proto == UDP && !m.dead(now) {
			alive++
		}
	}
	return alive
}

// input implements station.
func (r *Router) input(p *packet, on *iface) {
	now := time.Now()
	forwarded := false
	switch {
	case p.dst.Addr().Is6() && on == r.wan:
		forwarded = r.in6(p, now)
	case p.dst.Addr().Is6():
		forwarded = r.out6(p, now)
	case on == r.wan:
		forwarded = p.dst.Addr() == r.wan.addr(false) && r.in4(p, now)
	default:
		forwarded = r.out4(p, now)
	}
	if !forwarded {
		r.n.stats.Refused++
	}
}

// allows reports whether a packet may go from inside to the internet.
func (r *Router) allows(p *packet) bool {
	if p.proto == UDP {
		return !r.nat.BlockUDP
	}
	return r.nat.TCPPorts == nil || slices.Contains(r.nat.TCPPorts, p.dst.Port())
}

func (r *Router) out4(p *packet, now time.Time) bool {
	wan := r.wan.addr(false)
	if !r.allows(p) || !wan.IsValid() || r.v4.Contains(p.dst.Addr()) {
		return false
	}
	hairpin := p.dst.Addr() == wan
	if hairpin && !r.nat.Hairpin {
		return false
	}
	port, ok := r.nat.outgoing(p.proto, p.src, p.dst, now)
	if !ok {
		return false
	}
	q := *p
	q.src = netip.AddrPortFrom(wan, port)
	if hairpin {
		return r.in4(&q, now)
	}
	r.wan.send(&q)
	return true
}

func (r *Router) in4(p *packet, now time.Time) bool {
	if p.proto == UDP && r.nat.BlockUDP {
		return false
	}
	local, ok := r.nat.incoming(p.proto, p.dst.Port(), p.src, now)
	if !ok {
		if p.proto == TCP && r.nat.NoInputFilter && !p.tcp.rst {
			r.refuse(p)
		}
		return false
	}
	q := *p
	q.dst = local
	r.inner.send(&q)
	return true
}

// refuse answers a segment for a router without a firewall.
func (r *Router) refuse(p *packet) {
	r.wan.send(&packet{proto: TCP, src: p.dst, dst: p.src, tcp: segment{rst: true, hasAck: true, seq: p.tcp.ack, ack: p.tcp.seq + 1}})
}

func (r *Router) out6(p *packet, now time.Time) bool {
	if !r.v6.IsValid() || !r.allows(p) || r.v6.Contains(p.dst.Addr()) || p.dst.Addr().IsLinkLocalUnicast() {
		return false
	}
	life := r.nat.Timeout
	if p.proto == TCP {
		life = tcpTimeout
	}
	if len(r.flows) > 1<<12 {
		for f, until := range r.flows {
			if now.After(until) {
				delete(r.flows, f)
			}
		}
	}
	r.flows[flow{p.proto, p.src, p.dst}] = now.Add(life)
	r.wan.send(p)
	return true
}

func (r *Router) in6(p *packet, now time.Time) bool {
	if p.proto == UDP && r.nat.BlockUDP {
		return false
	}
	if r.nat.IPv6 == FirewalledIPv6 {
		f := flow{p.proto, p.dst, p.src}
		if until, ok := r.flows[f]; !ok || now.After(until) {
			return false
		}
	}
	r.inner.send(p)
	return true
}
