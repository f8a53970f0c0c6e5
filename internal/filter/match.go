package filter

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
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
	ids     map[string]bool    // IDs of all rules of the policy in here
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
	origins     []identity.Rule // the rules of the policy behind it; none = unknown
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
		origins := r.origins(w, j)
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
		c.dsts = append(c.dsts, dst{addrs, d.Ports.First, d.Ports.Last, origins})
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

// maxOrigins bounds the rules of the policy that one destination is said to
// come from.
const maxOrigins = 256

// origins reads where destination j of a rule comes from.
func (r *Rules) origins(w wire.FilterRule, j int) []identity.Rule {
	if j >= len(w.MeshOrigins) {
		return nil
	}
	from := w.MeshOrigins[j]
	from = from[:min(len(from), maxOrigins)]
	var out []identity.Rule
	for _, o := range from {
		out = append(out, identity.Rule{Policy: r.version, Name: o.Rule, ID: o.ID, Line: o.Line})
		if o.ID != "" {
			if r.ids == nil {
				r.ids = make(map[string]bool)
			}
			r.ids[o.ID] = true
		}
	}
	return out
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

// Capabilities lists the node capabilities that "cap:" sources of the rules
// name, see Peers.Caps.
func (r *Rules) Capabilities() []string { return slices.Sorted(maps.Keys(r.caps)) }

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

// match tells whether the rules let the query in, and the origins of the first
// rule, in the order of the wire, that does. The local address must have been
// checked.
func (r *Rules) match(q query) (origins []identity.Rule, ok bool) {
	if len(r.rules) == 0 || r.peers.Jailed[q.peer] {
		return nil, false
	}
	best, bestDst := int32(len(r.rules)), -1
	try := func(list []int32) {
		for _, i := range list {
			if i >= best {
				return
			}
			if d := r.rules[i].find(q, 0); d >= 0 {
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
		return nil, false
	}
	return r.rules[best].dsts[bestDst].origins, true
}

// stillAllowed tells whether a flow that old admitted by the rules of was goes
// on: one of them is in force and still lets it in. It returns those that do,
// as they are called now. A flow whose rules are not known, then or now, goes
// on if any rule lets it in.
func (r *Rules) stillAllowed(q query, was []identity.Rule, old *Rules) (origins []identity.Rule, ok bool) {
	first, ok := r.match(q)
	if !ok || len(was) == 0 || len(first) == 0 {
		return first, ok
	}
	var kept []identity.Rule
	keep := func(list []identity.Rule) {
		for _, o := range list {
			if slices.ContainsFunc(was, func(w identity.Rule) bool { return r.continues(w, o, old) }) && !slices.Contains(kept, o) {
				kept = append(kept, o)
			}
		}
	}
	keep(first)
	if len(kept) == len(was) {
		if len(kept) == len(first) {
			return first, true // shared, where nothing differs
		}
		return kept, true
	}
	// The first rule that matches is another one, or does not name all.
	unnamed := false
	try := func(list []int32) {
		for _, i := range list {
			for d := r.rules[i].find(q, 0); d >= 0; d = r.rules[i].find(q, d+1) {
				o := r.rules[i].dsts[d].origins
				unnamed = unnamed || len(o) == 0
				keep(o)
			}
		}
	}
	for _, bits := range r.sources.lens(q.remote) {
		try(r.sources.at(q.remote, bits))
	}
	for name, list := range r.caps {
		if r.peers.Caps[name][q.peer] {
			try(list)
		}
	}
	if len(kept) == 0 && unnamed {
		return nil, true
	}
	return kept, len(kept) > 0
}

// continues reports whether the rule is of r is the rule was of old: what it
// says is the same, or it was edited where it stands. Rules without an ID may be
// any.
func (r *Rules) continues(was, is identity.Rule, old *Rules) bool {
	switch {
	case was.ID == "" || is.ID == "":
		return true
	case was.ID == is.ID:
		return true
	}
	return was.Name == is.Name && was.Name != "" && old != nil && !old.ids[is.ID] && !r.ids[was.ID]
}

// find returns the first destination of the rule, from number i on, that covers
// q, or -1.
func (c *rule) find(q query, i int) int {
	icmp := q.proto == ProtoICMP || q.proto == ProtoICMPv6
	if !icmp && !c.hasProto(q.proto) {
		return -1
	}
	for ; i < len(c.dsts); i++ {
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
