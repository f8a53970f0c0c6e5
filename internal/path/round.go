package path

import (
	"net/netip"
	"slices"
	"time"

	"mesh/control/wire"
	"mesh/internal/stun"
)

const (
	tryEvery    = 100 * time.Millisecond
	maxTries    = 3
	settleGrace = 20 * time.Millisecond   // after the first answer; the nearest region answers first
	settleAfter = 500 * time.Millisecond  // without an answer UDP counts as blocked
	settleHurry = 200 * time.Millisecond  // if a relay has been connected meanwhile
	settleNames = 1500 * time.Millisecond // if names had to be resolved
	roundLen    = 2 * time.Second         // later answers are not waited for

	maxTargets      = 64
	nodesPerRegion  = 2
	defaultSTUNPort = 3478
)

// target is a region to be asked over one address family.
type target struct {
	region   int
	v6       bool
	nodes    []*wire.DERPNode
	tries    int
	answered bool
}

type stunProbe struct {
	region int
	v6     bool
	to     netip.AddrPort
	at     instant
}

// round is one gathering of endpoints: each region is asked a few times until
// it answers.
type round struct {
	began   instant
	targets []target
	names   []string // to be resolved first
	probes  map[stun.TxID]stunProbe
	lastTry instant

	hurry    bool    // a relay is connected: do not keep the node waiting
	first    instant // first answer, 0 = none yet
	grace    time.Duration
	settled  bool // the result is out; late answers improve it
	over     bool
	answers  int
	answers6 int
	mapped   map[netip.AddrPort]netip.AddrPort // by STUN server, IPv4
}

func newRound(now instant, targets []target, names []string) *round {
	return &round{
		began:   now,
		targets: targets,
		names:   names,
		probes:  make(map[stun.TxID]stunProbe),
		mapped:  make(map[netip.AddrPort]netip.AddrPort),
	}
}

func (r *round) complete() bool {
	return !slices.ContainsFunc(r.targets, func(t target) bool { return !t.answered })
}

func (r *round) answer(pr stunProbe, mapped netip.AddrPort, now instant) {
	r.answers++
	if pr.v6 {
		r.answers6++
	} else {
		r.mapped[pr.to] = mapped
	}
	for i := range r.targets {
		if t := &r.targets[i]; t.region == pr.region && t.v6 == pr.v6 {
			t.answered = true
		}
	}
}

// mute reports whether nobody answered over a family that relays are to be asked
// over, or nobody's name could be resolved, and the host has an address of it.
func (r *round) mute(local []netip.Prefix) bool {
	asked := func(v6 bool) bool {
		return slices.ContainsFunc(r.targets, func(t target) bool { return t.v6 == v6 }) &&
			slices.ContainsFunc(local, func(n netip.Prefix) bool {
				a := n.Addr().Unmap()
				return a.Is6() == v6 && a.IsGlobalUnicast() && !isMesh(a)
			})
	}
	return asked(false) && r.answers == r.answers6 || asked(true) && r.answers6 == 0
}

// others4 reports whether other regions are asked over IPv4.
func (r *round) others4(t *target) bool {
	return slices.ContainsFunc(r.targets, func(o target) bool { return !o.v6 && o.region != t.region })
}

// varies reports whether different destinations see different addresses of
// ours; ok is false while fewer than two have answered.
func (r *round) varies() (varies, ok bool) {
	var one netip.AddrPort
	for _, m := range r.mapped {
		if one.IsValid() && m != one {
			return true, true
		}
		one = m
	}
	return false, len(r.mapped) > 1
}

// settleAt is when the round settles although answers are missing.
func (r *round) settleAt() instant {
	switch {
	case r.first != 0:
		return r.first + r.grace
	case len(r.names) > 0:
		return r.began + settleNames
	case r.hurry:
		return r.began + settleHurry
	}
	return r.began + settleAfter
}

// next is when the round has to be looked at.
func (r *round) next(now instant) instant {
	if r.over {
		return 0
	}
	at := r.began + roundLen
	if !r.settled {
		at = min(at, r.settleAt())
	}
	if slices.ContainsFunc(r.targets, func(t target) bool { return !t.answered && t.tries < maxTries }) {
		at = min(at, r.lastTry+tryEvery)
	}
	return at
}

// request is a STUN request to send.
type request struct {
	to netip.AddrPort
	tx stun.TxID
}

// roundLocked does what is due of the current round.
func (p *Path) roundLocked(now instant) (send []request, settled bool) {
	e := &p.ends
	r := e.round
	if now-r.lastTry >= tryEvery || r.lastTry == 0 {
		r.lastTry = now
		for i := range r.targets {
			t := &r.targets[i]
			if t.answered || t.tries >= maxTries {
				continue
			}
			to, ok := p.stunAddrLocked(t)
			if !ok {
				continue // the name is being resolved
			}
			t.tries++
			tx := p.newTx()
			r.probes[tx] = stunProbe{t.region, t.v6, to, now}
			send = append(send, request{to, tx})
			if t.tries != 1 || t.v6 || len(t.nodes) < 2 || r.others4(t) {
				continue
			}
			// Only two servers tell whether the NAT maps by destination.
			if other, ok := p.stunAddrLocked(t); ok && other != to {
				tx := p.newTx()
				r.probes[tx] = stunProbe{t.region, t.v6, other, now}
				send = append(send, request{other, tx})
			}
		}
	}
	if !r.settled && (r.complete() || now >= r.settleAt()) {
		r.settled = true
		p.settleRoundLocked(now)
		settled = true
	}
	if r.settled && (r.complete() || now >= r.began+roundLen) {
		r.over = true
	}
	e.next = r.next(now)
	if r.over {
		e.afterRoundLocked(now)
	}
	return send, settled
}

func (p *Path) sendRequests(list []request) {
	for _, q := range list {
		var b [stun.RequestLen]byte
		p.writeUDP(q.to, [][]byte{stun.AppendRequest(b[:0], q.tx)})
	}
}

// stunTargetsLocked lists whom to ask, and the names to resolve before.
func (p *Path) stunTargetsLocked(now instant) (targets []target, names []string) {
	s := p.socks.Load()
	for _, id := range p.home.measured {
		def := p.home.defs[id]
		var nodes4, nodes6 []*wire.DERPNode
		for _, n := range def.Nodes {
			if n == nil || n.STUNPort < 0 || n.STUNPort > 65535 {
				continue
			}
			_, by4, named4 := stunHost(n, false)
			_, by6, named6 := stunHost(n, true)
			if s.v4 != nil && by4 && len(nodes4) < nodesPerRegion {
				nodes4 = append(nodes4, n)
			}
			if s.v6 != nil && by6 && len(nodes6) < nodesPerRegion {
				nodes6 = append(nodes6, n)
			}
			if (named4 || named6) && !slices.Contains(names, n.HostName) {
				if r, ok := p.ends.names[n.HostName]; !ok || now-r.at > resolveFor {
					names = append(names, n.HostName)
				}
			}
		}
		if len(nodes4) > 0 {
			targets = append(targets, target{region: id, nodes: nodes4})
		}
		if len(nodes6) > 0 {
			targets = append(targets, target{region: id, v6: true, nodes: nodes6})
		}
		if len(targets) >= maxTargets {
			break
		}
	}
	return targets, names
}

// stunHost says how a node's STUN server is reached over a family: at an
// address, or (named) at what its name resolves to; ok is false if not at all.
func stunHost(n *wire.DERPNode, v6 bool) (a netip.Addr, ok, named bool) {
	if n.STUNTestIP != "" {
		a, err := netip.ParseAddr(n.STUNTestIP)
		return a, err == nil && a.Is6() == v6, false
	}
	text := n.IPv4
	if v6 {
		text = n.IPv6
	}
	if text != "" {
		a, err := netip.ParseAddr(text)
		return a, err == nil && a.Is6() == v6, false
	}
	if a, err := netip.ParseAddr(n.HostName); err == nil {
		return a, a.Is6() == v6, false
	}
	return a, n.HostName != "", n.HostName != ""
}

// stunAddrLocked returns where the next try of a target goes.
func (p *Path) stunAddrLocked(t *target) (to netip.AddrPort, ok bool) {
	n := t.nodes[t.tries%len(t.nodes)]
	port := n.STUNPort
	if port == 0 {
		port = defaultSTUNPort
	}
	a, ok, named := stunHost(n, t.v6)
	if named {
		ok = false
		for _, b := range p.ends.names[n.HostName].addrs {
			if b = b.Unmap(); b.Is6() == t.v6 {
				a, ok = b, true
				break
			}
		}
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(port)), ok && a.IsValid()
}
