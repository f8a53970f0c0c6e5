package path

import (
	"errors"
	"net/netip"
	"time"

	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

// writeUDP sends datagrams by the socket that fits the address.
func (p *Path) writeUDP(to netip.AddrPort, datagrams [][]byte) error {
	if m := p.ways.Load(); m != nil {
		if s := (*m)[to]; s != nil {
			return s.write(to, datagrams)
		}
	}
	s := p.socks.Load().to(to.Addr())
	if s == nil {
		return errNoSocket
	}
	return s.write(to, datagrams)
}

var errNoSocket = errors.New("no UDP socket of this address family")

// fromUDP sorts datagrams of one source: STUN, disco and, in runs, WireGuard.
func (p *Path) fromUDP(from netip.AddrPort, datagrams [][]byte) {
	start := 0
	for i, b := range datagrams {
		isStun := stun.IsSTUN(b)
		if !isStun && !isDisco(b) {
			continue
		}
		p.wireguardUDP(from, datagrams[start:i])
		start = i + 1
		if isStun {
			p.stunAnswer(from, b)
		} else {
			p.discoUDP(from, b)
		}
	}
	p.wireguardUDP(from, datagrams[start:])
}

// isDisco reports whether a datagram is no WireGuard: too short disco packets
// are nothing at all, but not for WireGuard either.
func isDisco(b []byte) bool {
	return len(b) >= len(disco.Magic) && string(b[:len(disco.Magic)]) == disco.Magic
}

func (p *Path) wireguardUDP(from netip.AddrPort, datagrams [][]byte) {
	if len(datagrams) == 0 || p.cfg.Receive == nil {
		return
	}
	pe, several := p.peers.whoAt(from)
	if !several || p.cfg.Whose == nil {
		p.wireguardOf(pe, from, datagrams)
		return
	}
	start := 0
	var who identity.NodePublic
	for i, b := range datagrams {
		if i > 0 && sameSession(b, datagrams[i-1]) {
			continue
		}
		key, _ := p.cfg.Whose(b)
		if i == 0 || key != who {
			p.wireguardOf(pe, from, datagrams[start:i])
			start, who = i, key
			if pe = p.peers.get(key); pe != nil && !p.peers.uses(pe, from) {
				pe = nil
			}
		}
	}
	p.wireguardOf(pe, from, datagrams[start:])
}

// sameSession reports whether two messages with data have the same index.
func sameSession(a, b []byte) bool {
	return len(a) >= 8 && len(b) >= 8 && a[0] == 4 && string(a[:8]) == string(b[:8])
}

// wireguardOf delivers what one peer sent from an address; nil if that is not
// known.
func (p *Path) wireguardOf(pe *peer, from netip.AddrPort, datagrams [][]byte) {
	if len(datagrams) == 0 {
		return
	}
	src := Source{Addr: from}
	if pe == nil {
		for _, b := range datagrams {
			if isInitiation(b) {
				p.hold(heldPacket{src: src}, b) // of somebody whom the netmap names soon, maybe
			}
		}
	} else {
		src.Peer = pe.key
		now := int64(p.now())
		pe.received.Store(now)
		if d := pe.direct.Load(); d != nil && *d == from {
			pe.heardUDP.Store(now)
		}
		for _, b := range datagrams {
			if isInitiation(b) {
				pe.asked.Store(askedByUDP)
			}
		}
	}
	p.cfg.Receive(src, datagrams)
}

// relayPackets implements relayEvents.
func (p *Path) relayPackets(region int, from identity.NodePublic, datagrams [][]byte) {
	pe := p.open(from)
	if pe == nil {
		for _, b := range datagrams {
			p.holdRelayed(region, from, b)
		}
		return
	}
	pe.received.Store(int64(p.now()))
	if pe.heard.Load() != int32(region) {
		pe.heard.Store(int32(region))
	}
	if pe.away.Load() == int32(region) {
		pe.away.Store(0)
	}
	p.doubt(pe)
	start := 0
	for i, b := range datagrams {
		if isInitiation(b) {
			pe.asked.Store(askedByRelay)
		}
		if !isDisco(b) {
			continue
		}
		p.wireguardRelay(region, from, datagrams[start:i])
		start = i + 1
		p.discoRelay(region, from, b)
	}
	p.wireguardRelay(region, from, datagrams[start:])
}

// doubt looks whether the direct path works when packets come by relay in spite
// of it: the peer may have lost it.
func (p *Path) doubt(pe *peer) {
	now := p.now()
	if int64(now) > pe.trusted.Load() || int64(now) < pe.doubted.Load() {
		return
	}
	pe.doubted.Store(int64(now + unansweredFor))
	var out todo
	p.mu.Lock()
	if !pe.gone {
		pe.ch.suspect(now, &out)
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
}

func (p *Path) wireguardRelay(region int, from identity.NodePublic, datagrams [][]byte) {
	if len(datagrams) > 0 && p.cfg.Receive != nil {
		p.cfg.Receive(Source{Peer: from, Region: region}, datagrams)
	}
}

// relayPeerGone implements relayEvents: the way by which a peer was heard is
// no way back any more.
func (p *Path) relayPeerGone(region int, key identity.NodePublic) {
	if pe := p.peers.get(key); pe != nil {
		pe.heard.CompareAndSwap(int32(region), 0)
		pe.away.Store(int32(region))
	}
}

// Packets of peers that the netmap does not know yet: a peer often hears of us
// before we hear of it, and its first packets come within milliseconds.
const (
	holdFor       = 3 * time.Second
	maxHeldKind   = 32 // packets held that came by UDP, and as many by relay
	maxHeldSender = 4  // of one sender
)

// heldPacket is a disco packet, or a handshake initiation. Of initiations that
// came by UDP nobody knows the sender before WireGuard has looked inside: a few
// are handed over once more when the netmap changed.
type heldPacket struct {
	at    instant
	src   Source               // Peer set: by relay
	disco identity.DiscoPublic // sender of a disco packet
	data  []byte
}

func (h *heldPacket) relayed() bool { return h.src.Region != 0 }

// initiationLen is the length of WireGuard's first message, of type 1.
const initiationLen = 148

func (p *Path) holdRelayed(region int, from identity.NodePublic, b []byte) {
	h := heldPacket{src: Source{Peer: from, Region: region}}
	var ok bool
	if h.disco, ok = disco.Sender(b); !ok && (len(b) != initiationLen || b[0] != 1) {
		return
	}
	p.hold(h, b)
}

// hold keeps a copy of a packet for a while, within bounds.
func (p *Path) hold(h heldPacket, b []byte) {
	if len(b) > maxHeldSize {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return
	}
	kind, sender := 0, 0
	for i := range p.held {
		o := &p.held[i]
		if o.relayed() != h.relayed() {
			continue
		}
		kind++
		if h.relayed() && o.src.Peer == h.src.Peer || !h.relayed() && o.disco == h.disco {
			sender++
		}
	}
	if kind >= maxHeldKind || sender >= maxHeldSender {
		return
	}
	h.at = p.now()
	h.data = append([]byte(nil), b...)
	p.held = append(p.held, h)
	if len(p.held) == 1 {
		p.poke()
	}
}

const maxHeldSize = 2048

// dueHeld forgets held packets whose time is over.
func (p *Path) dueHeld(now instant) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for n < len(p.held) && now-p.held[n].at >= holdFor {
		n++
	}
	if n == len(p.held) {
		p.held = nil
	} else {
		p.held = p.held[n:]
	}
}

// replay processes the held packets whose sender is known by now.
func (p *Path) replay() {
	p.mu.Lock()
	held := p.held
	p.held = nil
	p.mu.Unlock()
	now := p.now()
	var rest []heldPacket
	for _, h := range held {
		switch {
		case now-h.at >= holdFor:
		case h.relayed():
			if info, ok := p.cfg.Lookup(h.src.Peer); !ok || !h.disco.IsZero() && info.Disco != h.disco {
				rest = append(rest, h)
			} else {
				p.relayPackets(h.src.Region, h.src.Peer, [][]byte{h.data})
			}
		case h.disco.IsZero():
			if p.cfg.Receive != nil {
				p.cfg.Receive(h.src, [][]byte{h.data})
			}
		case len(p.cfg.LookupDisco(h.disco)) == 0:
			rest = append(rest, h)
		default:
			p.discoUDP(h.src.Addr, h.data)
		}
	}
	if len(rest) == 0 {
		return
	}
	p.mu.Lock()
	p.held = append(rest, p.held...) // oldest first; at most twice the bounds for a moment
	p.mu.Unlock()
	p.poke()
}
