package vnet

import (
	"math/rand/v2"
	"net/netip"
	"time"
)

// Behavior is on what of the remote end a NAT's decision depends; the names
// are those of RFC 4787.
type Behavior uint8

// The behaviours.
const (
	EndpointIndependent Behavior = iota
	AddressDependent
	AddressAndPortDependent
)

// Ports is how a NAT chooses the public port of a new mapping.
type Ports uint8

// The choices of ports.
const (
	PreservePort   Ports = iota // the inner one if it is free, else a random one
	RandomPort                  //
	SequentialPort              // the one after the last
)

// IPv6 is what a router does with IPv6.
type IPv6 uint8

// The kinds of IPv6 service. With one there is a /64 for the hosts behind the
// router, without translation.
const (
	NoIPv6         IPv6 = iota
	OpenIPv6            // forwards everything
	FirewalledIPv6      // lets in only answers to what went out
)

// NAT says what a router does. The zero NAT translates endpoint-independently
// and filters nothing: a full cone.
type NAT struct {
	Mapping   Behavior
	Filtering Behavior
	Ports     Ports
	// Hairpin says that hosts behind the router reach each other by their
	// public addresses, and see those as sources.
	Hairpin bool
	// NoInputFilter is a Linux masquerade without a firewall: an unexpected
	// packet is taken for the router itself, and its flow then owns the port,
	// so that a mapping to the same remote gets another. Only with
	// AddressAndPortDependent mapping.
	NoInputFilter bool
	// Timeout is the life of a UDP mapping after its last packet either way, 0 =
	// 120 s; Unreplied that of one that no answer used yet, 0 = 30 s.
	Timeout   time.Duration
	Unreplied time.Duration
	// BlockUDP lets no UDP through.
	BlockUDP bool
	// TCPPorts are the remote ports that TCP may go to; nil means all.
	TCPPorts []uint16
	// IPv6 is offered beside IPv4, or alone with NoIPv4.
	IPv6   IPv6
	NoIPv4 bool
	// LAN is the network behind the router; zero means a private /24 that no
	// other router has. Real homes often have the same.
	LAN netip.Prefix
}

// FullCone maps and filters independently of the remote endpoint.
func FullCone() NAT { return NAT{Timeout: 300 * time.Second, Unreplied: 300 * time.Second} }

// AddressRestricted lets in what comes from addresses that were sent to.
func AddressRestricted() NAT {
	s := FullCone()
	s.Filtering = AddressDependent
	return s
}

// PortRestricted lets in what comes from endpoints that were sent to.
func PortRestricted() NAT {
	s := FullCone()
	s.Filtering = AddressAndPortDependent
	return s
}

// Home is the usual home router: a Linux masquerade with a firewall. It keeps
// the port, so that it looks endpoint-independent; it filters by endpoint.
func Home() NAT {
	return NAT{Mapping: AddressAndPortDependent, Filtering: AddressAndPortDependent}
}

// Masquerade is Home without a firewall of its own, as a host that masquerades
// for containers often is.
func Masquerade() NAT {
	s := Home()
	s.NoInputFilter = true
	return s
}

// Symmetric gives each remote endpoint a random port of its own.
func Symmetric() NAT {
	s := Home()
	s.Ports = RandomPort
	return s
}

// SymmetricSequential gives each remote endpoint the next port.
func SymmetricSequential() NAT {
	s := Home()
	s.Ports = SequentialPort
	return s
}

// CGN is a carrier's NAT to put other routers behind.
func CGN() NAT {
	s := PortRestricted()
	s.LAN = netip.MustParsePrefix("100.64.0.0/10")
	return s
}

// UDPBlocked is Home without any UDP.
func UDPBlocked() NAT {
	s := Home()
	s.BlockUDP = true
	return s
}

// Corporate lets out TCP to ports 80 and 443 and nothing else.
func Corporate() NAT {
	s := UDPBlocked()
	s.TCPPorts = []uint16{80, 443}
	return s
}

const (
	udpTimeout   = 120 * time.Second
	udpUnreplied = 30 * time.Second
	tcpTimeout   = 2 * time.Hour
	firstNATPort = 1024
)

// table holds the mappings of a router; guarded by Net.mu.
type table struct {
	NAT
	rng    *rand.Rand
	in     map[inner]*mapping
	out    map[outer]*mapping
	fixed  map[outer]*mapping        // by port mapping protocols; remote is zero
	moved  map[netip.AddrPort]uint16 // by local endpoint: what stands for the port to be preserved
	next   uint16                    // of SequentialPort
	sweepN int                       // entries at which the next sweep is due
}

// inner is the key of a mapping as seen from inside, outer as seen from
// outside. remote is as much of the remote endpoint as the mapping depends on.
type inner struct {
	proto  Proto
	local  netip.AddrPort
	remote netip.AddrPort
}

type outer struct {
	proto  Proto
	port   uint16
	remote netip.AddrPort
}

type mapping struct {
	inner   inner // local is zero: a flow to the router itself
	outer   outer
	expires time.Time
	replied bool
	seen    map[netip.AddrPort]bool // remotes sent to, as much as filtering depends on
}

func newTable(spec NAT, rng *rand.Rand) *table {
	t := &table{NAT: spec, rng: rng}
	if t.Timeout == 0 {
		t.Timeout = udpTimeout
	}
	if t.Unreplied == 0 {
		t.Unreplied = min(udpUnreplied, t.Timeout)
	}
	t.flush()
	return t
}

// flush forgets all mappings but the fixed ones.
func (t *table) flush() {
	t.in, t.out = make(map[inner]*mapping), make(map[outer]*mapping)
	if t.fixed == nil {
		t.fixed = make(map[outer]*mapping)
	}
	t.next = uint16(20000 + t.rng.IntN(30000))
	t.sweepN = 1024
}

// part is as much of a remote endpoint as a behaviour depends on.
func (b Behavior) part(remote netip.AddrPort) netip.AddrPort {
	switch b {
	case AddressDependent:
		return netip.AddrPortFrom(remote.Addr(), 0)
	case AddressAndPortDependent:
		return remote
	}
	return netip.AddrPort{}
}

// behavior is the mapping and filtering for a protocol. Connections of TCP are
// tracked one by one.
func (t *table) behavior(proto Proto) (mapping, filtering Behavior) {
	if proto == TCP {
		return AddressAndPortDependent, AddressAndPortDependent
	}
	return t.Mapping, t.Filtering
}

func (m *mapping) dead(now time.Time) bool { return !now.Before(m.expires) }

// touch lets a mapping live on.
func (t *table) touch(m *mapping, now time.Time) {
	d := t.Timeout
	switch {
	case m.outer.proto == TCP:
		d = tcpTimeout
	case !m.replied:
		d = t.Unreplied
	}
	m.expires = now.Add(d)
}

func (t *table) remove(m *mapping) {
	if t.in[m.inner] == m {
		delete(t.in, m.inner)
	}
	if t.out[m.outer] == m {
		delete(t.out, m.outer)
	}
}

// sweep removes what is dead once there is much.
func (t *table) sweep(now time.Time) {
	if len(t.out) < t.sweepN {
		return
	}
	for _, m := range t.out {
		if m.dead(now) {
			t.remove(m)
		}
	}
	t.sweepN = max(1024, 2*len(t.out))
}

// free reports whether a mapping may use a port towards a remote.
func (t *table) free(o outer, now time.Time) bool {
	if t.fixed[outer{proto: o.proto, port: o.port}] != nil {
		return false
	}
	m := t.out[o]
	return m == nil || m.dead(now)
}

// outgoing returns the public port for a packet from inside.
func (t *table) outgoing(proto Proto, local, remote netip.AddrPort, now time.Time) (uint16, bool) {
	t.sweep(now)
	for o, m := range t.fixed {
		if o.proto == proto && m.inner.local == local && !m.dead(now) {
			return o.port, true
		}
	}
	mapped, filtered := t.behavior(proto)
	key := inner{proto, local, mapped.part(remote)}
	m := t.in[key]
	if m != nil && m.dead(now) {
		t.remove(m)
		m = nil
	}
	if m == nil {
		port, ok := t.choose(proto, local, mapped.part(remote), now)
		if !ok {
			return 0, false
		}
		m = &mapping{inner: key, outer: outer{proto, port, mapped.part(remote)}, seen: make(map[netip.AddrPort]bool)}
		if old := t.out[m.outer]; old != nil {
			t.remove(old)
		}
		t.in[key], t.out[m.outer] = m, m
	}
	m.seen[filtered.part(remote)] = true
	t.touch(m, now)
	return m.outer.port, true
}

// choose picks the port of a new mapping.
func (t *table) choose(proto Proto, local, remote netip.AddrPort, now time.Time) (uint16, bool) {
	how := t.Ports
	if proto == TCP && how == SequentialPort {
		how = RandomPort
	}
	if how == PreservePort {
		port := local.Port()
		if p, ok := t.moved[local]; ok && proto == UDP {
			port = p
		}
		if t.free(outer{proto, port, remote}, now) {
			return port, true
		}
	}
	for range 1 << 12 {
		port := uint16(firstNATPort + t.rng.IntN(1<<16-firstNATPort))
		if how == SequentialPort {
			t.next = max(t.next+1, firstNATPort)
			port = t.next
		}
		if t.free(outer{proto, port, remote}, now) {
			return port, true
		}
	}
	return 0, false
}

// incoming returns whom a packet from outside is for; ok is false if it is not
// let in.
func (t *table) incoming(proto Proto, port uint16, remote netip.AddrPort, now time.Time) (local netip.AddrPort, ok bool) {
	mapped, filtered := t.behavior(proto)
	key := outer{proto, port, mapped.part(remote)}
	m := t.out[key]
	if m != nil && m.dead(now) {
		t.remove(m)
		m = nil
	}
	if f := t.fixed[outer{proto: proto, port: port}]; f != nil && !f.dead(now) {
		return f.inner.local, true
	}
	switch {
	case m == nil && t.NoInputFilter && mapped == AddressAndPortDependent:
		// The router takes it for its own: the flow owns the port for a while.
		m = &mapping{outer: key}
		t.out[key] = m
		t.touch(m, now)
		return local, false
	case m == nil:
		return local, false
	case !m.inner.local.IsValid():
		t.touch(m, now)
		return local, false
	case !m.seen[filtered.part(remote)]:
		return local, false
	}
	m.replied = true
	t.touch(m, now)
	return m.inner.local, true
}
