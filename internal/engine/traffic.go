package engine

import (
	"hash/maphash"
	"net/netip"
	"sync/atomic"

	"golang.org/x/time/rate"

	"mesh/identity"
	"mesh/internal/filter"
	"mesh/internal/tunnel"
)

// counters count packets that went nowhere.
type counters struct {
	malformed, noPeer, spoofed, told, untold, refused atomic.Uint64
}

// Dropped counts packets that were dropped, by cause.
type Dropped struct {
	Malformed uint64 // not an IP packet that we understand
	NoPeer    uint64 // to an address that no peer has
	Spoofed   uint64 // from an address that is not the sender's, or is changing hands
	Filtered  uint64 // not allowed in
	Rejected  uint64 // not allowed in, and the sender was told
	Held      uint64 // own datagrams of a flow that is no longer allowed
	// Refused counts refusals by peers that nobody waits for: of what a
	// PacketConn sent.
	Refused uint64
}

// Dropped returns the counts since the start.
func (e *Engine) Dropped() Dropped {
	return Dropped{
		Malformed: e.counts.malformed.Load(),
		NoPeer:    e.counts.noPeer.Load(),
		Spoofed:   e.counts.spoofed.Load() + e.tunnel.Stats().DropSource,
		Filtered:  e.filter.Stats().Dropped + e.counts.untold.Load(),
		Rejected:  e.counts.told.Load(),
		Held:      e.filter.Stats().Held,
		Refused:   e.counts.refused.Load(),
	}
}

// Out takes packets from the stack and sends each to the peer that has its
// destination address. The slices are lent for the call. It may wait for room,
// but never for the stack.
func (e *Engine) Out(packets [][]byte) {
	for len(packets) > 0 {
		to, n, ok := e.judgeOut(packets)
		if ok {
			// An error means the peer has gone or we are closing: the
			// stack learns it by silence or by Abort.
			_ = e.tunnel.Send(to, packets[:n])
		}
		if !ok && to.IsZero() {
			e.nowhere(packets[0])
		}
		packets = packets[n:]
	}
}

// PacketSize returns how large the packets of bulk data for an address may be at
// present, in bytes; 0 means tunnel.MTU.
func (e *Engine) PacketSize(dst netip.Addr) int {
	p, ok := e.Map().PeerByAddr(dst)
	if !ok {
		return 0
	}
	return tunnel.PacketSize(e.path.DatagramSize(p.Key))
}

// nowhere tells whoever dials that the address has no peer that can be reached:
// it had one when the dial began. Or the node may reach nobody.
func (e *Engine) nowhere(b []byte) {
	var pkt filter.Packet
	if pkt.Decode(b) != nil || pkt.Proto != filter.ProtoTCP && pkt.Proto != filter.ProtoUDP || pkt.Fragment == filter.LaterFragment {
		return
	}
	if r := e.restricted.Load(); r.Restriction == Nothing {
		e.link.Reject(pkt.Proto, pkt.Src, pkt.Dst, r.why)
		return
	}
	m := e.Map()
	err := &RevokedError{Policy: m.PolicyVersion(), Reason: reasonLeft}
	if p, ok := m.PeerByAddr(pkt.Dst.Addr()); ok && !p.Expired {
		return // it can be reached by now
	} else if ok {
		err.Peer, err.Reason = m.Identity(p), reasonExpired
	}
	e.link.Reject(pkt.Proto, pkt.Src, pkt.Dst, err)
}

// judgeOut notes the flows of the first n packets, which go to one peer. It
// reports false if they go nowhere: with the zero key, as nobody has the address
// or the node may reach nobody.
func (e *Engine) judgeOut(packets [][]byte) (to identity.NodePublic, n int, ok bool) {
	e.judging.RLock()
	defer e.judging.RUnlock()
	if e.isRestricted(Nothing) {
		e.counts.noPeer.Add(1)
		return to, 1, false
	}
	var pkt filter.Packet
	var dst netip.Addr
	for i, b := range packets {
		if i > 0 && filter.Continues(packets[i-1], b) {
			continue
		}
		if pkt.Decode(b) != nil {
			if i == 0 {
				e.counts.malformed.Add(1)
				return to, 1, false
			}
			return to, i, true
		}
		a := pkt.Dst.Addr()
		if i == 0 {
			p, ok := e.Map().PeerByAddr(a)
			if !ok || p.Expired {
				e.counts.noPeer.Add(1)
				return to, 1, false
			}
			dst, to = a, p.Key
		}
		if a != dst {
			return to, i, true
		}
		if !e.filter.Out(&pkt, to) {
			if i == 0 {
				return to, 1, false
			}
			return to, i, true
		}
	}
	return to, len(packets), true
}

// deliver takes decrypted packets of one peer. The slices are lent for the
// call.
func (e *Engine) deliver(from identity.NodePublic, packets [][]byte) {
	scratch := e.scratch.Get().(*[][]byte)
	accepted := (*scratch)[:0]
	var control, rejected [][]byte // rare

	e.judging.RLock()
	m, blocked := e.Map(), e.blocked.Load()
	var pkt filter.Packet
	var src netip.Addr
	shut := e.isRestricted(NothingNew)
	if e.isRestricted(Nothing) {
		packets = nil
	}
	owned, jailed := false, false
	var let []byte // the last packet, if it was let in
	again := 0     // packets like it
	for _, b := range packets {
		if len(b) == 0 {
			continue // a keepalive
		}
		if let != nil && filter.Continues(let, b) {
			accepted = append(accepted, b)
			again++
			continue
		}
		let = nil
		if err := pkt.Decode(b); err != nil {
			e.counts.malformed.Add(1)
			continue
		}
		// The tunnel has checked the source against the peer's addresses as
		// it knows them; this is the check against the snapshot that the
		// filter goes with.
		if a := pkt.Src.Addr(); a != src {
			src = a
			p, ok := m.PeerByAddr(a)
			owned = ok && p.Key == from && !p.Expired && !(blocked != nil && contains(*blocked, a))
			jailed = ok && p.IsJailed || shut
		}
		if !owned {
			e.counts.spoofed.Add(1)
			continue
		}
		v := e.filter.In(&pkt, from)
		if jailed && v.Action == filter.Accept && v.Reason == filter.ReasonRule {
			// Only what we began may come from this peer, whatever the rules say.
			e.filter.Close(filter.Flow{Proto: pkt.Proto, Local: pkt.Dst, Remote: pkt.Src})
			v.Action = filter.Reject
		}
		switch v.Action {
		case filter.Accept:
			accepted = append(accepted, b)
			let = b
		case filter.Reject:
			if !e.mayTell(from) {
				e.counts.untold.Add(1)
				continue
			}
			e.counts.told.Add(1)
			if v.Withdrawn {
				f := filter.Flow{Proto: pkt.Proto, Local: pkt.Dst, Remote: pkt.Src}
				rejected = append(rejected, filter.AppendWithdrawn(nil, f, filter.WithdrawnByPolicy, v.Policy))
				continue
			}
			var reason byte = filter.RejectedPolicy
			if shut {
				reason = filter.RejectedShields
			}
			rejected = append(rejected, filter.AppendRejected(nil, &pkt, reason, v.Policy))
		case filter.Control:
			control = append(control, b)
		}
	}
	e.judging.RUnlock()
	if again > 0 {
		e.filter.Accepted(again)
	}

	// Messages first: one that ends a connection says more than the reset that
	// follows it.
	for _, b := range control {
		e.control(from, b)
	}
	if len(accepted) > 0 {
		e.link.In(accepted)
	}
	clear(accepted)
	*scratch = accepted[:0]
	e.scratch.Put(scratch)
	if len(rejected) > 0 {
		_ = e.tunnel.Send(from, rejected)
	}
}

// mayTell bounds the rejections, for each peer so that one that asks for many
// takes none away from others: but for the few that share its limit by chance.
func (e *Engine) mayTell(peer identity.NodePublic) bool {
	limit := &e.rejections[maphash.Comparable(e.seed, peer)%uint64(len(e.rejections))]
	l := limit.Load()
	if l == nil {
		limit.CompareAndSwap(nil, rate.NewLimiter(1000, 200))
		l = limit.Load()
	}
	return l.Allow()
}

func contains(list []netip.Prefix, a netip.Addr) bool {
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// control handles a message between nodes: TSMP, IP protocol 99.
func (e *Engine) control(from identity.NodePublic, b []byte) {
	var pkt filter.Packet
	if pkt.Decode(b) != nil {
		return
	}
	msg, err := filter.ParseTSMP(&pkt)
	if err != nil {
		e.counts.malformed.Add(1)
		return
	}
	switch {
	case msg.Rejected.Proto != 0:
		e.rejectedBy(from, msg.Rejected)
	case msg.Ping:
		pong := filter.AppendPong(nil, pkt.Dst.Addr(), pkt.Src.Addr(), msg.Data, 0)
		_ = e.tunnel.Send(from, [][]byte{pong})
	}
}

// rejectedBy hands a peer's refusal to whoever waits for that connection. It is
// believed only from the peer that owns the address at the other end, and for a
// connection that is pending; that one is over which was allowed is believed
// also of an established one, which the peer could reset as well.
func (e *Engine) rejectedBy(from identity.NodePublic, r filter.Rejected) {
	m := e.Map()
	p, ok := m.PeerByAddr(r.Dst.Addr())
	if !ok || p.Key != from {
		e.counts.spoofed.Add(1)
		return
	}
	if r.Proto != filter.ProtoTCP && r.Proto != filter.ProtoUDP || r.MaybeBroken {
		return // nothing of ours, or nothing that is sure
	}
	if r.Withdrawn != 0 {
		err := &RevokedError{Peer: m.Identity(p), Policy: r.Policy, Reason: withdrawal(r.Withdrawn)}
		if !e.link.AbortFlow(r.Proto, r.Src, r.Dst, err) {
			e.counts.refused.Add(1)
		}
		e.filter.Close(filter.Flow{Proto: r.Proto, Local: r.Src, Remote: r.Dst})
		return
	}
	reason := "not allowed by policy"
	switch r.Reason {
	case filter.RejectedShields:
		reason = "it accepts no connections at present"
	case filter.RejectedRouting:
		reason = "it forwards nothing at present"
	case filter.RejectedFirewall:
		reason = "the firewall of its host blocks it"
	}
	proto := "tcp"
	if r.Proto == filter.ProtoUDP {
		proto = "udp"
	}
	told := e.link.Reject(r.Proto, r.Src, r.Dst, &DeniedError{
		Peer:   m.Identity(p),
		Proto:  proto,
		Port:   r.Dst.Port(),
		Policy: r.Policy,
		Reason: reason,
	})
	if !told {
		e.counts.refused.Add(1)
	}
}

// withdrawal says what a peer means that ends a connection with this node.
func withdrawal(w filter.Withdrawal) string {
	switch w {
	case filter.WithdrawnFromOwner:
		return reasonSelfOwner
	case filter.WithdrawnExpired:
		return reasonSelfExpiry
	case filter.WithdrawnFromMember:
		return reasonSelfLeft
	case filter.WithdrawnOwnExpired:
		return reasonExpired
	}
	return reasonPolicy
}

// tellOver tells a peer which flows with it are over. It is heard before the
// resets, which are sent after it.
func (e *Engine) tellOver(peer identity.NodePublic, flows []filter.Flow, why filter.Withdrawal, policy int64) {
	const most = 64 // per batch
	batch := make([][]byte, 0, min(len(flows), most))
	for i, f := range flows {
		if f.Proto == filter.ProtoTCP || f.Proto == filter.ProtoUDP {
			batch = append(batch, filter.AppendWithdrawn(nil, f, why, policy))
		}
		if len(batch) == most || i == len(flows)-1 && len(batch) > 0 {
			// An error means that it cannot be reached, and will find out.
			_ = e.tunnel.Send(peer, batch)
			batch = batch[:0]
		}
	}
}
