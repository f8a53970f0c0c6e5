package path

import (
	"bytes"
	"errors"
	"net/netip"

	"mesh/identity"
	"mesh/internal/demux"
	"mesh/internal/disco"
)

// maxShared bounds how many peers with one disco key are looked at.
const maxShared = 8

// discoUDP handles a disco packet that came by UDP.
func (p *Path) discoUDP(from netip.AddrPort, packet []byte) {
	key, ok := disco.Sender(packet)
	if !ok || !usable(from) {
		return
	}
	switch p.openDisco(from, key, packet) {
	case demux.Unknown:
		p.holdDisco(from, key, packet)
	case demux.Refused:
		p.counts.discoForged.Add(1)
	}
}

// holdDisco keeps a disco packet of somebody unknown who may be known soon.
func (p *Path) holdDisco(from netip.AddrPort, key identity.DiscoPublic, packet []byte) {
	p.counts.discoUnknown.Add(1)
	p.hold(heldPacket{src: Source{Addr: from}, disco: key}, packet)
}

// openDisco handles a disco packet that came by UDP if it is for this node.
func (p *Path) openDisco(from netip.AddrPort, key identity.DiscoPublic, packet []byte) demux.Verdict {
	known := p.cfg.LookupDisco(key)
	if len(known) == 0 {
		return demux.Unknown
	}
	known = known[:min(len(known), maxShared)]
	_, m, err := p.sealer.Open(packet)
	switch {
	case errors.Is(err, disco.ErrNotForUs):
		return demux.Refused
	case err != nil:
		if !errors.Is(err, disco.ErrUnknownType) {
			p.counts.discoForged.Add(1)
		}
		return demux.Opened
	}
	switch m := m.(type) {
	case disco.Ping:
		p.pingUDP(from, key, known, m)
	case disco.Pong:
		p.pongUDP(from, known, m)
	case disco.Size:
		p.sizeUDP(from, key, known, m)
	default:
		// A CallMeMaybe by UDP is not believed: only the relay proves the sender.
		p.counts.discoByUDP.Add(1)
	}
	return demux.Opened
}

// pingUDP answers a ping and remembers where it came from.
func (p *Path) pingUDP(from netip.AddrPort, key identity.DiscoPublic, known []Peer, m disco.Ping) {
	// Who is it? The node key inside is a hint that tells those apart who
	// share the disco key.
	var who identity.NodePublic
	if len(known) == 1 {
		who = known[0].Key
	}
	for _, k := range known {
		if k.Key == m.Node {
			who = k.Key
		}
	}
	now := p.now()
	fresh := true
	for _, k := range known {
		var pe *peer
		if k.Key == who {
			pe = p.open(k.Key)
		} else {
			pe = p.peers.get(k.Key)
		}
		if pe == nil {
			continue
		}
		var out todo
		p.mu.Lock()
		isFresh := pe.ch.pinged(from, m.TxID, now, &p.budget, &out)
		if pe.key == who {
			fresh = isFresh
		}
		p.settleLocked(pe, now)
		p.mu.Unlock()
		defer p.perform(pe, &out) // the pong goes first
		if isFresh && k.Key == who {
			pe.received.Store(int64(now))
			p.peers.bind(from, pe, false)
		}
	}
	if fresh {
		p.writeUDP(from, [][]byte{p.sealer.Seal(nil, key, disco.Pong{TxID: m.TxID, Src: from})})
	}
}

// pongUDP takes the answer to a ping of ours.
func (p *Path) pongUDP(from netip.AddrPort, known []Peer, m disco.Pong) {
	for _, k := range known {
		pe := p.peers.get(k.Key)
		if pe == nil {
			continue
		}
		now := p.now()
		var out todo
		p.mu.Lock()
		pr, ok := pe.ch.pong(m.TxID, now, &out)
		if !ok {
			ok = pe.ch.guessedRight(from, m.TxID, now, &out)
		}
		if ok {
			p.settleLocked(pe, now)
			if pr.asked {
				p.tellPingersLocked(pe, Pong{Addr: pr.to, Latency: now - pr.at})
			}
		}
		p.mu.Unlock()
		if !ok {
			continue
		}
		p.perform(pe, &out)
		pe.received.Store(int64(now))
		if pr.to == from {
			p.peers.bind(from, pe, true)
		}
		p.sendUnsent(pe)
		return
	}
	p.counts.pongsStray.Add(1)
}

// discoRelay handles a disco packet that came by relay from a known peer.
func (p *Path) discoRelay(region int, from identity.NodePublic, packet []byte) {
	key, ok := disco.Sender(packet)
	if !ok {
		return
	}
	info, ok := p.cfg.Lookup(from)
	if !ok || info.Disco != key {
		// The netmap may not know of the peer's new key yet.
		p.counts.discoUnknown.Add(1)
		p.holdRelayed(region, from, packet)
		return
	}
	_, m, err := p.sealer.Open(packet)
	if err != nil {
		if !errors.Is(err, disco.ErrUnknownType) {
			p.counts.discoForged.Add(1)
		}
		return
	}
	switch m := m.(type) {
	case disco.Ping:
		pong := disco.Pong{TxID: m.TxID, Src: disco.RelayAddr(region)}
		p.sendRelay(region, from, p.sealer.Seal(nil, key, pong))
	case disco.Pong:
		// It proves no direct path, but measures the relay.
		if pe := p.peers.get(from); pe != nil {
			p.mu.Lock()
			now := p.now()
			if pr, ok := pe.ch.relayPong(m.TxID, now); ok && pr.asked {
				p.tellPingersLocked(pe, Pong{Region: region, Latency: now - pr.at})
			}
			p.mu.Unlock()
		}
	case disco.Size:
		p.sizeRelay(region, from, key, m)
	case disco.Meet:
		if pe := p.open(from); pe != nil && !p.cfg.RelayOnly {
			p.met(pe, m)
		}
	case disco.CallMeMaybe:
		if p.cfg.RelayOnly {
			return
		}
		pe := p.open(from)
		if pe == nil {
			return
		}
		var out todo
		now := p.now()
		p.mu.Lock()
		pe.ch.callMeMaybe(m.Endpoints, now, &p.budget, &out)
		p.settleLocked(pe, now)
		p.mu.Unlock()
		p.perform(pe, &out)
	}
}

// callMeMaybe asks a peer to ping us, once our endpoints are fresh.
func (p *Path) callMeMaybe(pe *peer) {
	now := p.now()
	p.mu.Lock()
	if pe.gone {
		p.mu.Unlock()
		return
	}
	if !p.ends.fresh(now) {
		p.calls[pe] = struct{}{}
		p.gatherLocked(now)
		p.mu.Unlock()
		p.poke()
		return
	}
	list, to := p.ends.list, pe.info.Disco
	p.mu.Unlock()
	region := p.relayFor(pe)
	if region == 0 || to.IsZero() {
		return
	}
	list = list[:min(len(list), disco.MaxEndpoints)]
	p.sendRelay(region, pe.key, p.sealer.Seal(nil, to, disco.CallMeMaybe{Endpoints: list}))
}

// flushCalls sends the CallMeMaybes that waited for fresh endpoints.
func (p *Path) flushCalls() {
	p.mu.Lock()
	waiting, meets := p.calls, p.meets
	if len(waiting) > 0 {
		p.calls = make(map[*peer]struct{})
	}
	if len(meets) > 0 {
		p.meets = make(map[*peer]lateMeet)
	}
	p.mu.Unlock()
	for pe, l := range meets {
		p.sendMeet(pe, l.msg, l.since)
	}
	for pe := range waiting {
		p.callMeMaybe(pe)
	}
}

// lateMeet is a Meet that waits for fresh endpoints.
type lateMeet struct {
	msg   disco.Meet
	since instant
}

// met takes a step of a meeting.
func (p *Path) met(pe *peer, m disco.Meet) {
	own, theirs := p.own.Load().public.Bytes(), pe.key.Bytes()
	if m.Phase == disco.MeetGuess {
		p.guess(pe, m.Endpoints)
		return
	}
	var out todo
	now := p.now()
	p.mu.Lock()
	if !pe.gone {
		pe.ch.met(m, bytes.Compare(own[:], theirs[:]) < 0, now, &p.budget, &out)
		p.settleLocked(pe, now)
	}
	p.mu.Unlock()
	p.perform(pe, &out)
}

// sendMeet sends a step of a meeting, once our endpoints are fresh if they are
// part of it. since is when it was to be sent.
func (p *Path) sendMeet(pe *peer, m disco.Meet, since instant) {
	now := p.now()
	p.mu.Lock()
	if pe.gone || pe.info.Disco.IsZero() {
		p.mu.Unlock()
		return
	}
	if m.Phase != disco.MeetStart {
		if !p.ends.fresh(now) {
			p.meets[pe] = lateMeet{m, since}
			p.gatherLocked(now)
			p.mu.Unlock()
			p.poke()
			return
		}
		m.Endpoints = p.ends.list
		if m.Phase == disco.MeetAnswer {
			m.Delay = now - since
		} else {
			pe.ch.askSent(m.ID, now)
			p.settleLocked(pe, now)
		}
	}
	to := pe.info.Disco
	p.mu.Unlock()
	if region := p.relayFor(pe); region != 0 {
		p.sendRelay(region, pe.key, p.sealer.Seal(nil, to, m))
	}
}
