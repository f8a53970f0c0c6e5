package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/iprange"
)

// ErrObsolete reports rules of a form that was given up: the whole update that
// contains one is to be refused and everything blocked, since reading it wrongly
// could allow too much.
var ErrObsolete = errors.New("filter rules use the obsolete SrcBits or Bits")

// Rules is a compiled set of filter rules. It is immutable and safe for
// concurrent use.
type Rules struct {
	version int64
	local   prefixTable
	hasAll4 bool // an advertised default route: public destinations are local
	hasAll6 bool

	rules   []rule
	sources prefixTable        // source address → rules
	caps    map[string][]int32 // capability of the peer → rules
	skipped []string

	peers Peers
}

// Peers is what rules may ask about a peer beyond its address. The maps must
// not be changed after they were given to WithPeers.
type Peers struct {
	// Jailed peers start nothing: only replies to our own flows get in.
	Jailed map[identity.NodePublic]bool
	// Caps tells for a node capability which peers have it; "cap:" sources of
	// rules look here.
	Caps map[string]map[identity.NodePublic]bool
}

type rule struct {
	protos [4]uint64 // bit set of IP protocols
	dsts   []dst
}

type dst struct {
	addrs       []iprange.Range // one, or one per family for "*"
	first, last uint16
	origin      identity.Rule
}

func (r *rule) hasProto(n uint8) bool { return r.protos[n>>6]>>(n&63)&1 != 0 }

// Compile reads filter rules in their wire form. local is what packets may be
// addressed to: the node's own addresses and the routes that it advertises;
// for an advertised default route, public addresses only.
//
// Entries that make no sense are left out and listed by Skipped; they never
// allow anything. ErrObsolete refuses the whole set. The rules' capability
// grants are none of the filter's business.
func Compile(rules []wire.FilterRule, policyVersion int64, local []netip.Prefix) (*Rules, error) {
	r := &Rules{version: policyVersion}
	var localRanges []iprange.Range
	for _, p := range local {
		if !p.IsValid() || p.Addr().Is4In6() {
			continue
		}
		switch p = p.Masked(); {
		case p.Bits() > 0:
			r.local.add(p, 0)
		case p.Addr().Is4():
			r.hasAll4 = true
		default:
			r.hasAll6 = true
		}
		localRanges = append(localRanges, iprange.Of(p))
	}
	for i, w := range rules {
		if len(w.SrcBits) > 0 {
			return nil, fmt.Errorf("rule %d: %w", i, ErrObsolete)
		}
		for _, d := range w.DstPorts {
			if d.Bits != nil {
				return nil, fmt.Errorf("rule %d: %w", i, ErrObsolete)
			}
		}
	}
	for i, w := range rules {
		r.addRule(i, w, localRanges)
	}
	return r, nil
}

func (r *Rules) addRule(i int, w wire.FilterRule, local []iprange.Range) {
	var c rule
	for j, d := range w.DstPorts {
		addrs, err := iprange.Parse(d.IP)
		if err != nil {
			r.skip("rule %d, destination %d: %v", i, j, err)
			continue
		}
		if d.Ports.First > d.Ports.Last {
			r.skip("rule %d, destination %d: ports %d-%d are reversed", i, j, d.Ports.First, d.Ports.Last)
			continue
		}
		// What cannot be a local destination cannot match, so it costs nothing.
		if !overlapsAny(addrs, local) {
			continue
		}
		e := dst{addrs: addrs, first: d.Ports.First, last: d.Ports.Last}
		if j < len(w.MeshOrigins) && len(w.MeshOrigins[j]) > 0 {
			o := w.MeshOrigins[j][0]
			e.origin = identity.Rule{Policy: r.version, Name: o.Rule, Line: o.Line}
		}
		c.dsts = append(c.dsts, e)
	}
	protos := w.IPProto
	if len(protos) == 0 {
		protos = []int{ProtoTCP, ProtoUDP, ProtoICMP, ProtoICMPv6}
	}
	for _, n := range protos {
		if n >= 0 && n <= 255 {
			c.protos[n>>6] |= 1 << (n & 63)
		}
	}
	if c.protos == [4]uint64{} {
		return // reserved numbers only: matches nothing, ICMP included
	}
	id := int32(len(r.rules))
	used := false
	for j, s := range w.SrcIPs {
		if name, ok := strings.CutPrefix(s, "cap:"); ok {
			if name == "" {
				r.skip("rule %d, source %d: no capability named", i, j)
				continue
			}
			if len(c.dsts) > 0 {
				if r.caps == nil {
					r.caps = make(map[string][]int32)
				}
				r.caps[name] = append(r.caps[name], id)
				used = true
			}
			continue
		}
		addrs, err := iprange.Parse(s)
		if err != nil {
			r.skip("rule %d, source %d: %v", i, j, err)
			continue
		}
		if len(c.dsts) == 0 {
			continue
		}
		used = true
		for _, a := range addrs {
			for _, p := range a.Prefixes() {
				r.sources.add(p, id)
			}
		}
	}
	if used {
		r.rules = append(r.rules, c)
	}
}

func overlapsAny(a, b []iprange.Range) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return true
			}
		}
	}
	return false
}

// maxSkipped bounds the list of complaints about one set of rules.
const maxSkipped = 100

func (r *Rules) skip(format string, args ...any) {
	if len(r.skipped) < maxSkipped {
		r.skipped = append(r.skipped, fmt.Sprintf(format, args...))
	}
}

// Skipped lists, for a log, the entries that Compile left out.
func (r *Rules) Skipped() []string { return r.skipped }

// Version is the policy version that the rules come from, 0 if unknown.
func (r *Rules) Version() int64 { return r.version }

// WithPeers returns the same rules with knowledge about peers. Without it no
// peer is jailed and "cap:" sources match nobody.
func (r *Rules) WithPeers(p Peers) *Rules {
	c := *r
	c.peers = p
	return &c
}

// isLocal reports whether packets to a are meant for this node.
func (r *Rules) isLocal(a netip.Addr) bool {
	if r.local.contains(a) {
		return true
	}
	if a.Is4() && r.hasAll4 || a.Is6() && r.hasAll6 {
		return isPublic(a)
	}
	return false
}

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

func isPublic(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.IsPrivate() && !sharedSpace.Contains(a)
}

// query is a question to the rules: may remote of this peer reach local?
type query struct {
	proto         uint8
	remote, local netip.Addr
	port          uint16 // local port; 0 where there is none
	peer          identity.NodePublic
}

// match returns the first rule, in the order of the wire, that lets the query
// in. The local address must have been checked.
func (r *Rules) match(q query) (identity.Rule, bool) {
	if len(r.rules) == 0 || r.peers.Jailed[q.peer] {
		return identity.Rule{}, false
	}
	best, bestDst := int32(len(r.rules)), -1
	try := func(list []int32) {
		for _, i := range list {
			if i >= best {
				return
			}
			if d := r.rules[i].find(q); d >= 0 {
				best, bestDst = i, d
				return
			}
		}
	}
	for _, bits := range r.sources.lens(q.remote) {
		try(r.sources.at(q.remote, bits))
	}
	if len(r.caps) > 0 {
		for name, list := range r.caps {
			if r.peers.Caps[name][q.peer] {
				try(list)
			}
		}
	}
	if bestDst < 0 {
		return identity.Rule{}, false
	}
	return r.rules[best].dsts[bestDst].origin, true
}

// find returns the first destination of the rule that covers q, or -1.
func (c *rule) find(q query) int {
	icmp := q.proto == ProtoICMP || q.proto == ProtoICMPv6
	if !icmp && !c.hasProto(q.proto) {
		return -1
	}
	for i := range c.dsts {
		d := &c.dsts[i]
		switch q.proto {
		case ProtoICMP, ProtoICMPv6: // address alone decides, as everywhere on the mesh
		case ProtoTCP, ProtoUDP, ProtoSCTP:
			if q.port < d.first || q.port > d.last {
				continue
			}
		default: // no ports: only a rule for every port can mean it
			if d.first != 0 || d.last != 65535 {
				continue
			}
		}
		for _, a := range d.addrs {
			if a.Contains(q.local) {
				return i
			}
		}
	}
	return -1
}
