// Package filter decides which packets from peers reach a node's network stack.
//
// Default is deny: a packet gets in if it belongs to a flow that this node
// began, or to one that a rule admitted and still admits, or if a rule admits
// it now. Unlike a stock filter this one tracks TCP: a segment of no known
// flow is judged like a connection attempt, so that a peer without permission
// learns nothing and reaches nothing by sending odd segments.
//
// Every admitted flow is remembered with the peer and the rules of the policy
// that admitted it, and belongs to them: it ends when none of them is left,
// even where another rule would let a new flow in. Edits of other rules leave
// it alone, see Rules.stillAllowed.
package filter

import (
	"net/netip"
	"sync"
	"time"

	"mesh/identity"
)

// Action is what to do with a packet. The zero value drops it.
type Action uint8

// Actions.
const (
	Drop    Action = iota // say nothing
	Accept                // hand it to the network stack
	Reject                // drop it and tell the sender, see AppendRejected
	Control               // a message for the engine (TSMP), never for the stack
)

// String returns the action's name.
func (a Action) String() string {
	switch a {
	case Accept:
		return "accept"
	case Reject:
		return "reject"
	case Control:
		return "control"
	}
	return "drop"
}

// Verdict is the decision on an inbound packet.
type Verdict struct {
	Action Action
	// Withdrawn is true for a rejected packet of a flow that was admitted once:
	// the sender missed that it was cut.
	Withdrawn bool
	Policy    int64           // of the rules by which a packet is rejected, 0 = unknown
	Rules     []identity.Rule // what admitted the flow; none for flows that we began and unnamed rules
	Reason    string          // for counters and logs; one of the Reason constants
}

// Rule returns the first of the rules that admitted the flow, zero if there are
// none.
func (v Verdict) Rule() identity.Rule { return firstOf(v.Rules) }

func firstOf(rules []identity.Rule) identity.Rule {
	if len(rules) == 0 {
		return identity.Rule{}
	}
	return rules[0]
}

// Reasons of verdicts.
const (
	ReasonFlow      = "known flow"
	ReasonRule      = "rule"
	ReasonNoRule    = "no rule allows it"
	ReasonNoRules   = "no rules yet"
	ReasonWithdrawn = "no longer allowed"
	ReasonNotLocal  = "destination is not this node"
	ReasonForbidden = "destination never allowed"
	ReasonFragment  = "fragment of an unknown datagram"
	ReasonICMP      = "ICMP about no flow of this node"
	ReasonControl   = "message between nodes"
)

// Config configures a Filter. The zero value is usable.
type Config struct {
	Now             func() time.Time // nil: time.Now
	MaxFlows        int              // of the whole table; 0: 65,536
	MaxFlowsPerPeer int              // begun by one peer; 0: 4,096
}

// Filter applies Rules to packets and tracks flows. It is safe for concurrent
// use. Until the first Swap it lets nothing in.
type Filter struct {
	now func() time.Time

	mu     sync.Mutex // guards what follows; held for a lookup, never across a call out
	rules  *Rules     // nil: nothing gets in
	flows  *table
	frags  fragTable
	counts Stats
	// attempts are noted for Attempts; nil: they are not.
	attempts attempts
}

// Stats counts packets and flows since the start.
type Stats struct {
	Flows                                      int // now in the table
	Evicted                                    uint64
	Accepted, Dropped, Rejected, ControlPassed uint64
	// Held counts outbound datagrams of flows that a change of rules cut.
	Held uint64
}

// New returns a filter that lets nothing in.
func New(c Config) *Filter {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.MaxFlows <= 0 {
		c.MaxFlows = 65536
	}
	if c.MaxFlowsPerPeer <= 0 {
		c.MaxFlowsPerPeer = 4096
	}
	return &Filter{now: c.Now, flows: newTable(c.MaxFlows, c.MaxFlowsPerPeer)}
}

// In judges a packet from a peer, after decryption and after the check that its
// source address is the peer's.
func (f *Filter) In(p *Packet, peer identity.NodePublic) Verdict {
	now := f.now().UnixNano()
	f.mu.Lock()
	v := f.in(p, &peer, now)
	switch v.Action {
	case Accept:
		f.counts.Accepted++
	case Reject:
		f.counts.Rejected++
	case Control:
		f.counts.ControlPassed++
	default:
		f.counts.Dropped++
	}
	f.mu.Unlock()
	return v
}

// Accepted counts n packets that Continues joined to one that In accepted.
func (f *Filter) Accepted(n int) {
	f.mu.Lock()
	f.counts.Accepted += uint64(n)
	f.mu.Unlock()
}

func (f *Filter) in(p *Packet, peer *identity.NodePublic, now int64) Verdict {
	if f.rules == nil {
		return Verdict{Reason: ReasonNoRules}
	}
	tracked := false
	var key flowKey
	var e *flow
	switch p.Proto {
	case ProtoTCP, ProtoUDP, ProtoSCTP:
		if p.Fragment == LaterFragment {
			break
		}
		tracked = true
		key = keyOf(p.Proto, p.Dst, p.Src)
		if e = f.flows.find(&key, peer, now); e != nil && e.state != stateRefused && !p.isSYN() {
			// Only addresses that were local when a rule said yes are in the
			// table, and Swap takes out those that no longer are.
			if p.Proto == ProtoTCP {
				e.tcp(p.Flags, true)
			}
			f.flows.touch(e, now)
			f.noteFragment(p, now)
			return Verdict{Action: Accept, Rules: e.rules, Reason: ReasonFlow}
		}
	}
	switch to := p.Dst.Addr(); {
	case forbidden(to):
		return Verdict{Reason: ReasonForbidden}
	case !f.rules.isLocal(to):
		return Verdict{Reason: ReasonNotLocal}
	}
	if p.Fragment == LaterFragment {
		if f.frags.covers(p, now) {
			return Verdict{Action: Accept, Reason: ReasonFlow}
		}
		return Verdict{Reason: ReasonFragment}
	}
	switch p.Proto {
	case ProtoTSMP:
		return Verdict{Action: Control, Reason: ReasonControl}
	case ProtoICMP, ProtoICMPv6:
		return f.inICMP(p, peer, now)
	}
	refused := e != nil && e.state == stateRefused
	if refused && p.Proto == ProtoTCP && !p.isSYN() {
		// Whatever the rules say of a new connection, this one is over.
		f.flows.touch(e, now)
		return f.withdrawn()
	}
	rules, ok := f.rules.match(query{p.Proto, p.Src.Addr(), p.Dst.Addr(), p.Dst.Port(), *peer})
	if f.attempts != nil && !(ok && tracked) {
		f.attempts.note(p, ok)
	}
	switch {
	case ok:
	case refused && p.Proto == ProtoUDP:
		return f.withdrawn()
	case p.isSYN(), p.Proto == ProtoUDP:
		return Verdict{Action: Reject, Policy: f.rules.version, Reason: ReasonNoRule}
	default:
		return Verdict{Reason: ReasonNoRule}
	}
	if tracked {
		f.admit(p, peer, key, e, rules, now)
	}
	f.noteFragment(p, now)
	return Verdict{Action: Accept, Rules: rules, Reason: ReasonRule}
}

func (f *Filter) withdrawn() Verdict {
	return Verdict{Action: Reject, Withdrawn: true, Policy: f.rules.version, Reason: ReasonWithdrawn}
}

// admit notes a flow that a rule let in; e is what the table holds for it.
func (f *Filter) admit(p *Packet, peer *identity.NodePublic, key flowKey, e *flow, rules []identity.Rule, now int64) {
	if e != nil && e.state != stateRefused {
		// A connection attempt within a known flow: repeated, or a fresh one
		// after the last was closed. Only the latter begins anew.
		if e.state != stateClosed && e.state != stateWait {
			f.flows.touch(e, now)
			return
		}
	}
	if f.attempts != nil {
		f.attempts.note(p, true)
	}
	state := stateOpen
	if p.Proto == ProtoTCP {
		state = stateHalf
	}
	f.flows.add(key, *peer, true, state, now).rules = rules
}

func (f *Filter) inICMP(p *Packet, peer *identity.NodePublic, now int64) Verdict {
	switch {
	case p.isEchoRequest():
		rules, ok := f.rules.match(query{p.Proto, p.Src.Addr(), p.Dst.Addr(), 0, *peer})
		if f.attempts != nil {
			f.attempts.note(p, ok)
		}
		if !ok {
			return Verdict{Reason: ReasonNoRule}
		}
		f.noteFragment(p, now)
		return Verdict{Action: Accept, Rules: rules, Reason: ReasonRule}
	case p.isEchoReply():
		key := echoKey(p.Proto, p.Dst, p.Src, p.ICMPID)
		if e := f.flows.peek(&key, peer, now); e != nil {
			f.noteFragment(p, now)
			return Verdict{Action: Accept, Reason: ReasonFlow}
		}
	case p.isError() && p.Fragment == Whole:
		// It must quote a packet of ours to that peer. It changes nothing
		// about the flow: what the error means is the stack's judgement.
		var q Packet
		if !p.inner(&q) || q.Src.Addr() != p.Dst.Addr() {
			break
		}
		key := keyOf(q.Proto, q.Src, q.Dst)
		if q.Proto == p.Proto {
			key = echoKey(q.Proto, q.Src, q.Dst, q.ICMPID)
		}
		if e := f.flows.peek(&key, peer, now); e != nil && e.state != stateRefused {
			return Verdict{Action: Accept, Rules: e.rules, Reason: ReasonFlow}
		}
	}
	return Verdict{Reason: ReasonICMP}
}

func echoKey(proto uint8, local, remote netip.AddrPort, id uint16) flowKey {
	return keyOf(proto, netip.AddrPortFrom(local.Addr(), id), remote)
}

// Out notes a packet that the network stack sends to a peer, so that replies
// get in, and reports whether it may leave. Held back are what nobody may send
// (multicast, link-local and unroutable destinations, messages that only the
// engine may send) and the datagrams of a flow that a change of rules cut, as
// long as the local program goes on sending them.
func (f *Filter) Out(p *Packet, peer identity.NodePublic) bool {
	if p.Proto == ProtoTSMP || forbidden(p.Dst.Addr()) {
		return false
	}
	if p.Fragment == LaterFragment {
		return true
	}
	switch p.Proto {
	case ProtoTCP, ProtoUDP, ProtoSCTP:
	case ProtoICMP, ProtoICMPv6:
		if !p.isEchoRequest() {
			return true
		}
	default:
		return true
	}
	now := f.now().UnixNano()
	f.mu.Lock()
	leave := f.out(p, &peer, now)
	if !leave {
		f.counts.Held++
	}
	f.mu.Unlock()
	return leave
}

func (f *Filter) out(p *Packet, peer *identity.NodePublic, now int64) (leave bool) {
	key := keyOf(p.Proto, p.Src, p.Dst)
	if p.Proto == ProtoICMP || p.Proto == ProtoICMPv6 {
		key = echoKey(p.Proto, p.Src, p.Dst, p.ICMPID)
	}
	e := f.flows.find(&key, peer, now)
	if p.Proto == ProtoTCP {
		if e != nil && e.state != stateRefused && !(p.isSYN() && (e.inbound || e.state != stateHalf)) {
			e.tcp(p.Flags, false)
			f.flows.touch(e, now)
			return true
		}
		// Nothing but a connection attempt opens the way for replies: data of
		// a connection that a change of rules cut must not. The reset of that
		// must leave.
		if !p.isSYN() {
			return true
		}
	} else if e != nil {
		f.flows.touch(e, now) // a refused one stays refused
		return e.state != stateRefused
	}
	if f.rules == nil || !f.rules.isLocal(p.Src.Addr()) {
		return true
	}
	state := stateOpen
	if p.Proto == ProtoTCP {
		state = stateHalf
	}
	f.flows.add(key, *peer, false, state, now)
	return true
}

// Swap puts new rules in force; nil blocks everything. It returns the flows
// that peers began and that the new rules do not allow, or no longer by a rule
// that they belong to, and all flows of addresses that are no longer local: the
// caller is to cut their connections. Packets judged after Swap returns see
// only the new rules.
func (f *Filter) Swap(r *Rules) (refused []Flow) {
	now := f.now().UnixNano()
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.rules
	f.rules = r
	f.frags = fragTable{}
	f.flows.sweep(now)
	for _, e := range f.flows.flows {
		local, remote := e.key.addrs()
		if e.state == stateRefused {
			continue
		}
		isLocal := r == nil || r.isLocal(local.Addr())
		if r != nil && isLocal {
			if !e.inbound {
				continue
			}
			q := query{e.key.proto, remote.Addr(), local.Addr(), local.Port(), e.owner.peer}
			if rules, ok := r.stillAllowed(q, e.rules, old); ok {
				e.rules = rules
				continue
			}
		}
		refused = append(refused, e.public())
		if e.inbound && isLocal {
			e.state, e.seen, e.rules = stateRefused, now, nil
		} else {
			f.flows.remove(e)
		}
	}
	return refused
}

// Origin tells which peer began an inbound flow and which rule admitted it, the
// first where there are several. Only Proto, Local and Remote of the question
// count.
func (f *Filter) Origin(q Flow) (peer identity.NodePublic, rule identity.Rule, ok bool) {
	key := keyOf(q.Proto, q.Local, q.Remote)
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.flows.flows[key]
	if e == nil || !e.inbound || e.state == stateRefused {
		return identity.NodePublic{}, identity.Rule{}, false
	}
	return e.owner.peer, firstOf(e.rules), true
}

// Allows reports whether a flow may go on: it is known and was not cut, or a
// rule would let the peer begin it. It is for connections of which the table
// may have forgotten the flow, see Stats.Evicted. Only Proto, Local, Remote and
// Peer of the question count.
func (f *Filter) Allows(q Flow) bool {
	key := keyOf(q.Proto, q.Local, q.Remote)
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := f.flows.flows[key]; e != nil {
		return e.state != stateRefused
	}
	if f.rules == nil || !f.rules.isLocal(q.Local.Addr()) {
		return false
	}
	_, ok := f.rules.match(query{q.Proto, q.Remote.Addr(), q.Local.Addr(), q.Local.Port(), q.Peer})
	return ok
}

// Forget removes all flows of a peer, which has gone or lost its address, and
// returns them.
func (f *Filter) Forget(peer identity.NodePublic) []Flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	owner := f.flows.peers[peer]
	if owner == nil {
		return nil
	}
	f.frags = fragTable{}
	var gone []Flow
	for _, l := range []*flowList{&owner.in, &owner.out} {
		for l.head != nil {
			if l.head.state != stateRefused {
				gone = append(gone, l.head.public())
			}
			f.flows.remove(l.head)
		}
	}
	return gone
}

// Rekey hands the flows of a peer over to its new key, so that a rotation of
// keys cuts nothing.
func (f *Filter) Rekey(old, new identity.NodePublic) {
	f.mu.Lock()
	defer f.mu.Unlock()
	owner := f.flows.peers[old]
	if owner == nil || old == new {
		return
	}
	into := f.flows.peers[new]
	if into == nil {
		delete(f.flows.peers, old)
		owner.peer = new
		f.flows.peers[new] = owner
		return
	}
	for _, l := range []*flowList{&owner.in, &owner.out} {
		for e := l.tail; e != nil; e = l.tail {
			l.remove(e)
			e.owner = into
			into.list(e.inbound).push(e)
		}
	}
	delete(f.flows.peers, old)
}

// Close forgets a flow whose connection has ended. Only Proto, Local and Remote
// count.
func (f *Filter) Close(q Flow) {
	key := keyOf(q.Proto, q.Local, q.Remote)
	f.mu.Lock()
	defer f.mu.Unlock()
	if e := f.flows.flows[key]; e != nil && e.state != stateRefused {
		f.flows.remove(e)
	}
}

// Stats returns counters.
func (f *Filter) Stats() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.counts
	s.Flows, s.Evicted = len(f.flows.flows), f.flows.evicted
	return s
}

// noteFragment remembers an accepted first fragment, so that the rest gets in.
func (f *Filter) noteFragment(p *Packet, now int64) {
	if p.Fragment == FirstFragment {
		f.frags.note(p, now)
	}
}
