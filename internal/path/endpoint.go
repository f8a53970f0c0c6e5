package path

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"mesh/control/wire"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

const (
	endpointsFresh = 27 * time.Second // older ones are gathered again before a CallMeMaybe
	regatherMin    = 20 * time.Second // while peers are active
	regatherMax    = 26 * time.Second //
	regatherIdle   = 20 * time.Minute // while none is: home and what control knows stay right
	regatherMute   = 2 * time.Second  // if nobody answered, then twice that and so on
	muteTries      = 5                // before that counts as how the network is
	doubtEvery     = 2 * time.Second
	endpointMemory = 5*time.Minute + 10*time.Second // an address that STUN told stays advertised
	maxEndpoints   = disco.MaxEndpoints
	maxSeen        = 16 // addresses remembered from STUN
)

// endpoints is what the node knows of its own addresses; guarded by Path.mu.
type endpoints struct {
	list  []netip.AddrPort // replaced, never changed
	types []wire.EndpointType
	at    instant // when list was last confirmed by a settled round
	next  instant // when something is due, 0 = nothing

	doubted instant // what was gathered before may be wrong

	mute  int    // rounds in a row in which nobody answered over a family
	want  bool   // a round is asked for
	round *round // the current one, or the last
	local []netip.Prefix
	extra []Endpoint // told by SetEndpoints

	natted bool // STUN sees an IPv4 address that is none of the host's

	seen     map[netip.AddrPort]instant // told by STUN, and when
	names    map[string]resolved
	latency  map[int]*regionLatency
	udpWorks *bool // nil = unknown
	ip6Works *bool
	varies   *bool // the NAT maps by destination
}

// regionLatency is the measured way to a region.
type regionLatency struct {
	v4, v6     time.Duration // 0 = not measured
	at4, at6   instant
	map4, map6 netip.AddrPort // our address as seen there
}

// latencyMemory is how long a measurement counts.
const latencyMemory = 5 * time.Minute

// best returns the better of what is still valid.
func (l *regionLatency) best(now instant) (d time.Duration, ok bool) {
	if l.at4 != 0 && now-l.at4 < latencyMemory {
		d, ok = l.v4, true
	}
	if l.at6 != 0 && now-l.at6 < latencyMemory && (!ok || l.v6 < d) {
		d, ok = l.v6, true
	}
	return d, ok
}

func (e *endpoints) init() {
	e.seen = make(map[netip.AddrPort]instant)
	e.names = make(map[string]resolved)
	e.latency = make(map[int]*regionLatency)
}

// forget drops what was true of the old network.
func (e *endpoints) forget() {
	clear(e.seen)
	clear(e.names)
	clear(e.latency)
	e.at = 0
	e.mute = 0
	e.round = nil
	e.udpWorks, e.ip6Works, e.varies = nil, nil, nil
}

func (e *endpoints) fresh(now instant) bool {
	return e.at != 0 && now-e.at < endpointsFresh && e.at >= e.doubted
}

// doubtEndpointsLocked has the endpoints gathered anew: a path fell silent,
// maybe since a NAT gave us another address.
func (p *Path) doubtEndpointsLocked(now instant) {
	if e := &p.ends; now-e.at > doubtEvery && now-e.doubted > doubtEvery {
		e.doubted = now
		p.gatherLocked(now)
		p.poke()
	}
}

// gatherLocked asks for a round unless one is running that has not settled.
func (p *Path) gatherLocked(now instant) {
	e := &p.ends
	if !p.home.haveMap || e.round != nil && !e.round.settled {
		return
	}
	e.want = true
	e.next = now
}

// wakeEndpointsLocked resumes the rounds that pause while no peer is active.
func (p *Path) wakeEndpointsLocked(now instant) {
	e := &p.ends
	if e.next == 0 && p.home.haveMap {
		e.next = max(e.at+regatherMin, now)
		p.poke()
	}
}

// dueEndpoints does what is due of gathering.
func (p *Path) dueEndpoints(now instant) {
	var tasks []task
	var local []netip.Prefix
	lost := false
	p.mu.Lock()
	e := &p.ends
	if e.next == 0 || now < e.next {
		p.mu.Unlock()
		return
	}
	if e.round == nil || e.round.over || e.want {
		if !e.want && !p.anyActive() {
			e.next = 0 // wakeEndpointsLocked goes on
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		local, _ = p.cfg.Interfaces() // a system call
		p.mu.Lock()
		tasks, lost = p.startRoundLocked(local, now)
	}
	requests, settled := p.roundLocked(now)
	p.mu.Unlock()
	if lost {
		p.relays.recheck(func(a netip.Addr) bool { return hasAddr(local, a) })
	}
	for _, t := range tasks {
		p.perform(t.pe, &t.out)
	}
	p.sendRequests(requests)
	if lost {
		p.changed()
	}
	if settled {
		p.gathered()
	}
}

func (p *Path) anyActive() bool {
	for _, pe := range p.peers.all() {
		if pe.ch.active {
			return true
		}
	}
	return false
}

// gathered tells everybody who waits for endpoints. No lock is held.
func (p *Path) gathered() {
	p.evaluateHome()
	p.flushCalls()
	p.reporting.Ask()
}

// startRoundLocked begins a round of STUN.
func (p *Path) startRoundLocked(local []netip.Prefix, now instant) (tasks []task, lost bool) {
	e := &p.ends
	e.want = false
	lost, _ = compare(e.local, local)
	e.local = local
	p.forbidLocked()
	if lost {
		// An address went away, and with it the paths that used it.
		tasks = p.startAnewLocked(now)
	}
	targets, names := p.stunTargetsLocked(now)
	e.round = newRound(now, targets, names)
	if len(names) > 0 {
		p.wg.Go(func() { p.resolve(names) }) // from mind, which Close waits for
	}
	return tasks, lost
}

// settleRoundLocked makes the round's result the node's endpoints.
func (p *Path) settleRoundLocked(now instant) {
	e := &p.ends
	e.at = now
	for a, at := range e.seen {
		if now-at > endpointMemory {
			delete(e.seen, a)
		}
	}
	if len(e.round.targets) > 0 {
		works, works6 := e.round.answers > 0, e.round.answers6 > 0
		e.udpWorks, e.ip6Works = &works, &works6
	}
	p.listLocked(now)
}

// listLocked composes the list of endpoints.
func (p *Path) listLocked(now instant) {
	e, s := &p.ends, p.socks.Load()
	var list []netip.AddrPort
	var types []wire.EndpointType
	add := func(a netip.AddrPort, t wire.EndpointType) {
		if usable(a) && !slices.Contains(list, a) && len(list) < maxEndpoints {
			list = append(list, a)
			types = append(types, t)
		}
	}
	if !p.cfg.RelayOnly {
		for _, x := range e.extra {
			add(unmap(x.Addr), x.Type)
		}
		for _, x := range p.lent {
			add(unmap(x.Addr), x.Type)
		}
	}
	// Addresses from STUN, those confirmed last first.
	seen := make([]netip.AddrPort, 0, len(e.seen))
	for a := range e.seen {
		seen = append(seen, a)
	}
	slices.SortFunc(seen, func(a, b netip.AddrPort) int {
		if d := e.seen[b] - e.seen[a]; d != 0 {
			return int(max(min(d, 1), -1))
		}
		return a.Compare(b)
	})
	e.natted = false
	for _, a := range seen {
		e.natted = e.natted || a.Addr().Is4() && !hasAddr(e.local, a.Addr())
		add(a, wire.EndpointSTUN)
		if a.Addr().Is4() && e.varies != nil && *e.varies && p.cfg.Port != 0 {
			// Somebody who configured the port may forward it.
			add(netip.AddrPortFrom(a.Addr(), p.cfg.Port), wire.EndpointSTUNLocalPort)
		}
	}
	loopback := p.cfg.LoopbackEndpoints
	var addrs []netip.Addr
	if !p.cfg.RelayOnly {
		addrs = localAddresses(e.local, loopback)
		if len(addrs) == 0 && len(list) == 0 {
			addrs = localAddresses(e.local, true)
		}
	}
	for _, a := range addrs {
		port := s.port6()
		if a.Is4() {
			port = s.port4()
		}
		add(netip.AddrPortFrom(a, port), wire.EndpointLocal)
	}
	e.list, e.types = list, types
}

// meshPrefixes are the ranges of the mesh itself: a packet must not be carried
// by what it carries.
var meshPrefixes = []netip.Prefix{
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("fd7a:115c:a1e0::/48"),
}

// max6PerSubnet bounds the IPv6 addresses advertised of one subnet; privacy
// extensions make many.
const max6PerSubnet = 2

// localAddresses picks the interface addresses to advertise.
func localAddresses(all []netip.Prefix, loopback bool) []netip.Addr {
	var good, second, loop []netip.Addr
	perSubnet := make(map[netip.Prefix]int)
	for _, pfx := range all {
		a := pfx.Addr().Unmap()
		switch {
		case !a.IsValid() || a.IsUnspecified() || a.IsMulticast():
		case isMesh(a):
		case a.IsLoopback():
			loop = append(loop, a)
		case a.Is6() && a.IsLinkLocalUnicast():
		case a.Is4() && a.IsLinkLocalUnicast() || a.Is6() && a.IsPrivate():
			second = append(second, a)
		case a.Is6():
			if net := pfx.Masked(); perSubnet[net] < max6PerSubnet {
				perSubnet[net]++
				good = append(good, a)
			}
		default:
			good = append(good, a)
		}
	}
	if len(good) == 0 {
		good = second
	}
	if loopback {
		good = append(good, loop...)
	}
	slices.SortFunc(good, netip.Addr.Compare)
	return slices.Compact(good)
}

// hasAddr reports whether an address is one of the host's.
func hasAddr(local []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(local, func(n netip.Prefix) bool { return n.Addr().Unmap() == a })
}

// resolved is the result of a look-up of a relay's name.
type resolved struct {
	addrs []netip.Addr
	at    instant
}

const (
	resolveFor  = 5 * time.Minute
	resolveTime = 2 * time.Second
)

// resolve looks up names of relays with the host's resolver.
func (p *Path) resolve(names []string) {
	ctx, cancel := context.WithTimeout(p.ctx, resolveTime)
	defer cancel()
	for _, name := range names {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		p.mu.Lock()
		if err == nil {
			p.ends.names[name] = resolved{addrs, p.now()}
		}
		p.ends.next = p.now()
		p.mu.Unlock()
		p.poke()
	}
}

// stunAnswer takes a STUN datagram.
func (p *Path) stunAnswer(from netip.AddrPort, b []byte) {
	tx, mapped, err := stun.ParseResponse(b)
	if err != nil {
		p.counts.stunStray.Add(1)
		return
	}
	mapped = unmap(mapped)
	now := p.now()
	p.mu.Lock()
	settled, changed := p.answerLocked(tx, from, mapped, now)
	p.mu.Unlock()
	if settled {
		p.gathered()
	} else if changed {
		p.reporting.Ask()
	}
	p.poke()
}

func (p *Path) answerLocked(tx stun.TxID, from, mapped netip.AddrPort, now instant) (settled, changed bool) {
	e := &p.ends
	r := e.round
	if r == nil || !usable(mapped) {
		p.counts.stunStray.Add(1)
		return false, false
	}
	pr, ok := r.probes[tx]
	if !ok || pr.to != from {
		p.counts.stunStray.Add(1)
		return false, false
	}
	delete(r.probes, tx)
	r.answer(pr, mapped, now)

	l := e.latency[pr.region]
	if l == nil {
		l = &regionLatency{}
		e.latency[pr.region] = l
	}
	if from.Addr().Is4() {
		l.v4, l.at4, l.map4 = now-pr.at, now, mapped
	} else {
		l.v6, l.at6, l.map6 = now-pr.at, now, mapped
	}
	if v, ok := r.varies(); ok {
		e.varies = &v
	}
	if _, ok := e.seen[mapped]; ok || len(e.seen) < maxSeen {
		e.seen[mapped] = now
	}
	if r.settled {
		p.settleRoundLocked(now)
		return false, true
	}
	if r.complete() || r.first == 0 {
		if r.first == 0 {
			r.first = now
			r.grace = max(now-pr.at, settleGrace)
		}
		if r.complete() {
			r.settled = true
			p.settleRoundLocked(now)
			settled = true
		}
	}
	e.next = r.next(now)
	return settled, false
}

// afterRoundLocked plans what follows a round. One in which nobody answered is
// soon repeated, also while no peer is active: the few requests of the first may
// be lost on a host that only comes up, and an idle node would not know its
// address until a peer wants it.
func (e *endpoints) afterRoundLocked(now instant) {
	e.next = now + regatherIn()
	if !e.round.mute(e.local) {
		e.mute = 0
		return
	}
	if e.mute++; e.mute <= muteTries {
		e.want = true
		e.next = now + regatherMute<<(e.mute-1)
	}
}

// regatherIn spreads the periodic rounds of many nodes.
func regatherIn() time.Duration { return regatherMin + rand.N(regatherMax-regatherMin) }
