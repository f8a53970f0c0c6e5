// Package vnet is an internet in memory for tests: hosts with UDP and TCP
// sockets, links that delay, lose and reorder, routers with NATs and firewalls
// of every kind. It needs no rights and opens no real socket. All waits are on
// channels and timers, so that it runs under virtual time inside a
// testing/synctest bubble as well as in real time.
//
//	n := vnet.New(1)
//	defer n.Close()
//	server := n.Host(vnet.V4)        // on the public internet
//	router := n.NAT(vnet.Home())     // a site with a router of a kind
//	laptop := router.Host()          // behind it
//	pc, err := laptop.ListenUDP(ctx, "udp4", ":0")
//	ln, err := server.ListenTCP("tcp4", ":443")
//	conn, err := laptop.DialTCP(ctx, "tcp", server.Addr().String()+":443")
//	router.SetLink(vnet.Link{Latency: 150 * time.Millisecond, Loss: 0.05})
//	router.Flush()                   // forgets its mappings
//	laptop.Move(otherRouter)         // roams
//
// Times are those of one direction. A packet from a host crosses the host's
// link, the link of each router on the way, and the link of the host it goes
// to. Nothing but the network's own timer moves packets: there is no goroutine
// for a host, a link or a packet.
package vnet

import (
	"container/heap"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

// Family says which versions of IP a host or a site has.
type Family uint8

// The families.
const (
	V4   Family    = 1 << iota // IPv4
	V6                         // IPv6
	Dual = V4 | V6             // both
)

// Proto is a protocol above IP.
type Proto uint8

// The protocols; AnyProto matches each of them.
const (
	AnyProto Proto = iota
	UDP
	TCP
)

// Net is one internet. All its methods, and those of what it makes, may be
// called from any goroutine.
type Net struct {
	seed uint64

	mu     sync.Mutex // guards all state of the net, its hosts, routers and sockets
	events events
	order  uint64 // of events, so that those due at one time run as they were made
	timer  *time.Timer
	armed  time.Time // when timer fires, zero = it is stopped
	closed bool

	core    *subnet
	next4   netip.Addr // addresses given out last
	next6   netip.Addr
	sites   int
	streams uint64 // random streams given out
	stats   Stats
	hosts   []*Host
}

// Stats counts what happened since New.
type Stats struct {
	Packets uint64 // sent by hosts, retransmissions of TCP included
	Lost    uint64 // dropped by links: at random, too large, queue full, cut
	Refused uint64 // dropped by routers: filtered, no mapping, no such host
	Sockets int    // open now: UDP sockets, listeners and TCP connections
	Pending int    // packets and timers of TCP on their way now
}

// New returns an internet without hosts. All randomness of links and routers
// comes from seed: the n-th packet on a link meets the same fate in every run.
func New(seed uint64) *Net {
	n := &Net{
		seed:  seed,
		next4: netip.AddrFrom4([4]byte{203, 0, 113, 0}),
		next6: netip.MustParseAddr("2001:db8::ff:0"),
	}
	n.core = newSubnet(n)
	return n
}

// Close closes all sockets and forgets all packets. Links, hosts and routers
// are of no use afterwards.
func (n *Net) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for _, h := range n.hosts {
		h.closeAllLocked()
	}
	n.events = nil
	if n.timer != nil {
		n.timer.Stop()
	}
}

// Stats returns the counters.
func (n *Net) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.stats
	s.Pending = len(n.events)
	for _, h := range n.hosts {
		s.Sockets += h.openLocked()
	}
	return s
}

// event is something to do at a time. It runs with Net.mu held.
type event struct {
	at    time.Time
	order uint64
	run   func()
	index int // in the heap; -1 = not there
}

type events []*event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	if e[i].at.Equal(e[j].at) {
		return e[i].order < e[j].order
	}
	return e[i].at.Before(e[j].at)
}
func (e events) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].index, e[j].index = i, j
}
func (e *events) Push(x any) {
	ev := x.(*event)
	ev.index = len(*e)
	*e = append(*e, ev)
}
func (e *events) Pop() any {
	old := *e
	ev := old[len(old)-1]
	old[len(old)-1] = nil
	*e = old[:len(old)-1]
	ev.index = -1
	return ev
}

// atLocked plans an event.
func (n *Net) atLocked(at time.Time, run func()) *event {
	ev := &event{at: at, order: n.order, run: run, index: -1}
	n.order++
	if n.closed {
		return ev
	}
	heap.Push(&n.events, ev)
	n.armLocked()
	return ev
}

// cancelLocked forgets an event, nil included.
func (n *Net) cancelLocked(ev *event) {
	if ev != nil && ev.index >= 0 && len(n.events) > ev.index && n.events[ev.index] == ev {
		heap.Remove(&n.events, ev.index)
	}
}

// armLocked makes the timer fire for the first event.
func (n *Net) armLocked() {
	if len(n.events) == 0 {
		return // a timer that fires for nothing does no harm
	}
	at := n.events[0].at
	if !n.armed.IsZero() && !at.Before(n.armed) {
		return
	}
	n.armed = at
	// Never at once: the race detector of Go 1.26 crashes when timers of a
	// synctest bubble that are due already are set by several goroutines.
	after := max(time.Until(at), 1)
	if n.timer == nil {
		n.timer = time.AfterFunc(after, n.run)
	} else {
		n.timer.Reset(after)
	}
}

// run does everything that is due.
func (n *Net) run() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for now := time.Now(); len(n.events) > 0 && !n.events[0].at.After(now); now = time.Now() {
		heap.Pop(&n.events).(*event).run()
	}
	n.armed = time.Time{}
	n.armLocked()
}

// randLocked returns the next stream of random numbers.
func (n *Net) randLocked() *rand.Rand {
	n.streams++
	return rand.New(rand.NewPCG(n.seed, n.streams))
}

// public4Locked returns a fresh public IPv4 address.
func (n *Net) public4Locked() netip.Addr {
	for {
		n.next4 = n.next4.Next()
		if last := n.next4.As4()[3]; last != 0 && last != 255 && n.core.ifaces[n.next4] == nil {
			return n.next4
		}
	}
}

func (n *Net) public6Locked() netip.Addr {
	n.next6 = n.next6.Next()
	return n.next6
}

// packet is an IP packet on its way. It is not changed once sent: routers
// send changed copies. data is shared.
type packet struct {
	proto    Proto
	src, dst netip.AddrPort
	data     []byte
	tcp      segment // of TCP
	frag     int     // sent in fragments of at most this size, 0 = in one piece
	origin   *Host   // learns from links that the packet is too large
	hops     int
}

const (
	udpHeader  = 8
	tcpHeader  = 20
	ip4Header  = 20
	ip6Header  = 40
	minMTU     = 1280
	defaultMTU = 1500
	maxHops    = 16
)

// size is the length of the packet with its IP header.
func (p *packet) size() int {
	n := len(p.data) + ip4Header
	if p.dst.Addr().Is6() {
		n = len(p.data) + ip6Header
	}
	if p.proto == UDP {
		return n + udpHeader
	}
	return n + tcpHeader
}

// piece is the length of the largest fragment.
func (p *packet) piece() int {
	if s := p.size(); p.frag == 0 || s < p.frag {
		return s
	}
	return p.frag
}

// station is what has interfaces: a host or a router.
type station interface {
	// input takes a packet that arrived, with Net.mu held.
	input(p *packet, on *iface)
}

// subnet joins interfaces; the internet's core is one.
type subnet struct {
	n       *Net
	ifaces  map[netip.Addr]*iface
	routes  map[netip.Prefix]*iface // networks behind routers
	gateway *iface                  // nil for the core
	used    map[netip.Addr]bool     // addresses ever given out
}

func newSubnet(n *Net) *subnet {
	return &subnet{
		n: n, ifaces: make(map[netip.Addr]*iface), routes: make(map[netip.Prefix]*iface),
		used: make(map[netip.Addr]bool),
	}
}

// iface joins a station to a subnet.
type iface struct {
	owner   station
	net     *subnet
	addrs   []netip.Prefix
	down    bool
	cut     bool
	link    Link
	out, in pipe
}

// addr returns the address of a family, invalid if there is none.
func (i *iface) addr(v6 bool) netip.Addr {
	for _, a := range i.addrs {
		if a.Addr().Is6() == v6 {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

// attach joins a station to the subnet under addresses.
func (s *subnet) attach(owner station, link Link, addrs ...netip.Prefix) *iface {
	i := &iface{owner: owner, net: s, addrs: addrs, link: link}
	i.out.rng, i.in.rng = s.n.randLocked(), s.n.randLocked()
	for _, a := range addrs {
		s.ifaces[a.Addr()] = i
		s.used[a.Addr()] = true
	}
	return i
}

func (s *subnet) detach(i *iface) {
	for _, a := range i.addrs {
		if s.ifaces[a.Addr()] == i {
			delete(s.ifaces, a.Addr())
		}
	}
	for p, r := range s.routes {
		if r == i {
			delete(s.routes, p)
		}
	}
	i.net = nil
}

// send puts a packet on the interface's link.
func (i *iface) send(p *packet) {
	if i.down || i.net == nil {
		i.lose()
		return
	}
	i.transmit(&i.out, p, func(p *packet) {
		if i.net != nil {
			i.net.carry(p, i)
		}
	})
}

func (i *iface) lose() {
	if i.net != nil {
		i.net.n.stats.Lost++
	}
}

// carry takes a packet to the interface that has its destination.
func (s *subnet) carry(p *packet, from *iface) {
	to := s.ifaces[p.dst.Addr()]
	if to == nil {
		for prefix, i := range s.routes {
			if prefix.Contains(p.dst.Addr()) {
				to = i
			}
		}
	}
	if to == nil {
		to = s.gateway
	}
	if p.hops++; to == nil || to == from || to.down || p.hops > maxHops {
		s.n.stats.Refused++
		return
	}
	to.transmit(&to.in, p, func(p *packet) {
		if to.net == nil || to.down {
			s.n.stats.Lost++
			return
		}
		to.owner.input(p, to)
	})
}
