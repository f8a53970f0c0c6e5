package filter

import (
	"net/netip"
	"time"

	"mesh/identity"
)

// Flow is a conversation between a local and a remote address.
type Flow struct {
	Proto         uint8
	Local, Remote netip.AddrPort // Local's port is the identifier for ICMP echoes
	Peer          identity.NodePublic
	Inbound       bool // the peer began it
}

// How long a flow without packets is remembered.
const (
	idleTCPHalf   = 30 * time.Second // not yet answered
	idleTCP       = 24 * time.Hour   // the table's bound evicts idle ones earlier if it must
	idleTCPClosed = 10 * time.Second // reset
	idleTCPWait   = time.Minute      // closed from both ends
	idleUDP       = 5 * time.Minute
	idleEcho      = time.Minute
	idleRefused   = time.Minute
)

type flowState uint8

const (
	stateHalf        flowState = iota // TCP: nobody but the beginner has spoken
	stateEstablished                  // TCP: both have
	stateClosed                       // TCP: reset
	stateWait                         // TCP: closed from both ends
	stateOpen                         // everything without connections
	// stateRefused remembers a flow that a change of rules cut off: the local
	// program's late answers must not open it again from our side, and a peer
	// that did not hear of it is told when it goes on.
	stateRefused
)

// flowKey holds no pointers: the collector does not look into the table's keys.
type flowKey struct {
	local, remote         [16]byte
	localPort, remotePort uint16
	proto                 uint8
	six                   bool
}

func keyOf(proto uint8, local, remote netip.AddrPort) flowKey {
	return flowKey{
		local: local.Addr().As16(), remote: remote.Addr().As16(),
		localPort: local.Port(), remotePort: remote.Port(),
		proto: proto, six: local.Addr().Is6(),
	}
}

func (k *flowKey) addrs() (local, remote netip.AddrPort) {
	l, r := netip.AddrFrom16(k.local), netip.AddrFrom16(k.remote)
	if !k.six {
		l, r = l.Unmap(), r.Unmap()
	}
	return netip.AddrPortFrom(l, k.localPort), netip.AddrPortFrom(r, k.remotePort)
}

type flow struct {
	key           flowKey
	owner         *peerFlows
	prev, next    *flow           // neighbours in the owner's list
	seen          int64           // unix nanoseconds of the last packet
	rules         []identity.Rule // that admitted it; shared with Rules
	state         flowState
	inbound       bool
	finIn, finOut bool
}

func (e *flow) public() Flow {
	local, remote := e.key.addrs()
	return Flow{Proto: e.key.proto, Local: local, Remote: remote, Peer: e.owner.peer, Inbound: e.inbound}
}

func (e *flow) idle() time.Duration {
	switch e.state {
	case stateHalf:
		return idleTCPHalf
	case stateEstablished:
		return idleTCP
	case stateClosed:
		return idleTCPClosed
	case stateWait:
		return idleTCPWait
	case stateRefused:
		return idleRefused
	}
	if e.key.proto == ProtoICMP || e.key.proto == ProtoICMPv6 {
		return idleEcho
	}
	return idleUDP
}

func (e *flow) expired(now int64) bool { return now-e.seen > int64(e.idle()) }

// flowList is a list of flows, the most recently used first.
type flowList struct {
	head, tail *flow
	n          int
}

func (l *flowList) push(e *flow) {
	e.prev, e.next = nil, l.head
	if l.head != nil {
		l.head.prev = e
	} else {
		l.tail = e
	}
	l.head = e
	l.n++
}

func (l *flowList) remove(e *flow) {
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		l.head = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		l.tail = e.prev
	}
	e.prev, e.next = nil, nil
	l.n--
}

// peerFlows are the flows of one peer. Those that the peer began and those that
// we began are bounded apart, so that a peer can crowd out nothing but its own.
type peerFlows struct {
	peer    identity.NodePublic
	in, out flowList
}

func (p *peerFlows) list(inbound bool) *flowList {
	if inbound {
		return &p.in
	}
	return &p.out
}

// table is the set of flows. It is not safe for concurrent use.
type table struct {
	flows      map[flowKey]*flow
	peers      map[identity.NodePublic]*peerFlows
	max        int // of all flows
	maxIn      int // of those that one peer began
	maxOut     int // of those to one peer that we began
	sinceSweep int
	evicted    uint64
}

func newTable(most, maxIn int) *table {
	return &table{
		flows: make(map[flowKey]*flow),
		peers: make(map[identity.NodePublic]*peerFlows),
		max:   most,
		maxIn: maxIn, maxOut: max(1, most/2),
	}
}

// find returns the live flow with that key. One that belongs to another peer is
// none: its address has moved. Nil if there is none.
func (t *table) find(k *flowKey, peer *identity.NodePublic, now int64) *flow {
	e := t.flows[*k]
	if e == nil {
		return nil
	}
	if e.expired(now) || e.owner.peer != *peer {
		t.remove(e)
		return nil
	}
	return e
}

// peek is find for a key that a packet only quotes: it leaves the flows of
// others alone.
func (t *table) peek(k *flowKey, peer *identity.NodePublic, now int64) *flow {
	e := t.flows[*k]
	if e == nil || e.expired(now) || e.owner.peer != *peer {
		return nil
	}
	return e
}

// touch makes e the most recently used of its list.
func (t *table) touch(e *flow, now int64) {
	e.seen = now
	if l := e.owner.list(e.inbound); l.head != e {
		l.remove(e)
		l.push(e)
	}
}

// add makes a new flow in place of one with the same key, evicting the least
// recently used where a bound is reached.
func (t *table) add(k flowKey, peer identity.NodePublic, inbound bool, state flowState, now int64) *flow {
	if old := t.flows[k]; old != nil {
		t.remove(old)
	}
	if t.sinceSweep++; t.sinceSweep > len(t.flows)/2+64 {
		t.sweep(now)
	}
	owner := t.peers[peer]
	if owner == nil {
		owner = &peerFlows{peer: peer}
	}
	list, most := owner.list(inbound), t.maxOut
	if inbound {
		most = t.maxIn
	}
	if list.n >= most {
		t.evict(list)
	} else if len(t.flows) >= t.max {
		t.evictFair(owner)
	}
	// Eviction may have ended the last flow of the owner, or it is new.
	t.peers[peer] = owner
	e := &flow{key: k, owner: owner, inbound: inbound, state: state, seen: now}
	t.flows[k] = e
	list.push(e)
	return e
}

func (t *table) evict(l *flowList) {
	t.evicted++
	t.remove(l.tail)
}

// evictFair makes room in a full table at the cost of the peer that began the
// most flows, or of the asking one if it has its share already. Flows that we
// began go last.
func (t *table) evictFair(asking *peerFlows) {
	if asking.in.n > t.max/(len(t.peers)+1) {
		t.evict(&asking.in)
		return
	}
	var most *flowList
	for _, p := range t.peers {
		if most == nil || p.in.n > most.n {
			most = &p.in
		}
	}
	if most == nil || most.n == 0 {
		for _, p := range t.peers {
			if most == nil || p.out.n > most.n {
				most = &p.out
			}
		}
	}
	t.evict(most)
}

func (t *table) remove(e *flow) {
	delete(t.flows, e.key)
	e.owner.list(e.inbound).remove(e)
	if e.owner.in.n == 0 && e.owner.out.n == 0 {
		delete(t.peers, e.owner.peer)
	}
}

// sweep removes what has expired. Its cost is spread over the additions that
// lead to it.
func (t *table) sweep(now int64) {
	t.sinceSweep = 0
	for _, e := range t.flows {
		if e.expired(now) {
			t.remove(e)
		}
	}
}

// tcp follows a connection: in tells who sent the segment.
func (e *flow) tcp(flags uint8, in bool) {
	switch {
	case flags&TCPRst != 0:
		e.state = stateClosed
		return
	case e.state == stateClosed:
		// A reset that the stack ignored, as it ignores forged ones: only our
		// own data shows that the connection lives.
		if in {
			return
		}
		e.state = stateEstablished
	case e.state == stateHalf && in != e.inbound:
		e.state = stateEstablished
	}
	if flags&TCPFin != 0 {
		if in {
			e.finIn = true
		} else {
			e.finOut = true
		}
	}
	if e.finIn && e.finOut && e.state == stateEstablished {
		e.state = stateWait
	}
}
