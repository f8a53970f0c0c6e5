package path

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"mesh/identity"
)

// Send sends WireGuard datagrams to a peer of the netmap by the best known way:
// by UDP alone while a pong has confirmed it lately, else by UDP and by relay.
// hint is an address to use when no better one is known (zero = none), such as
// the one WireGuard last heard the peer from. The datagrams are not kept. Delivery
// is best effort; the errors are ErrUnknownPeer and ErrNoPath, or that of the
// system when UDP was the only way.
func (p *Path) Send(key identity.NodePublic, hint netip.AddrPort, datagrams [][]byte) error {
	pe := p.peers.get(key)
	if pe == nil {
		if pe = p.open(key); pe == nil {
			return fmt.Errorf("send to %s: %w", key.Short(), ErrUnknownPeer)
		}
	}
	now := p.now()
	pe.sent.Store(int64(now))
	direct := pe.direct.Load()
	if direct != nil && int64(now) <= pe.trusted.Load() && !isHandshake(datagrams) &&
		(int64(now) <= pe.full.Load() || !anyFull(datagrams)) {
		if !pe.awake.Load() {
			p.probe(pe, now)
		}
		err := p.writeUDP(*direct, datagrams)
		if err == nil || passing(err) {
			return nil
		}
		if errors.Is(err, syscall.EMSGSIZE) {
			p.tooLarge(pe, datagrams)
		} else {
			p.sendFailed(pe, *direct, err)
			direct = nil
		}
	}
	return p.sendBoth(pe, now, direct, hint, datagrams)
}

// maxReply is the most bytes that a stranger is sent.
const maxReply = 128

// Reply sends one small datagram to the address that a datagram of a stranger
// came from: WireGuard's cookie, for somebody who knows our key and may be a peer
// at an address that nobody has heard of. It leaves no trace of the address here.
// The caller bounds how often; what is larger than a handshake's messages, or
// for no address that could answer, is dropped.
func (p *Path) Reply(to netip.AddrPort, datagram []byte) {
	if to = unmap(to); !usable(to) || len(datagram) == 0 || len(datagram) > maxReply {
		return
	}
	_ = p.writeUDP(to, [][]byte{datagram}) // he will ask again
}

// isHandshake reports whether datagrams begin with a handshake message of
// WireGuard. Those go by every way even while one is trusted: a peer that was
// restarted elsewhere begins with a handshake, and an answer to where it was
// before is lost for the seconds that trust lasts.
func isHandshake(datagrams [][]byte) bool {
	if len(datagrams) == 0 || len(datagrams[0]) < 4 {
		return false
	}
	b := datagrams[0]
	return b[0] >= 1 && b[0] <= 3 && b[1]|b[2]|b[3] == 0
}

// anyFull reports whether a datagram is too large for links of the smallest MTU.
func anyFull(datagrams [][]byte) bool {
	for _, d := range datagrams {
		if len(d) > minDatagram {
			return true
		}
	}
	return false
}

// bySize parts datagrams at minDatagram.
func bySize(datagrams [][]byte) (small, full [][]byte) {
	n := 0
	for _, d := range datagrams {
		if len(d) > minDatagram {
			n++
		}
	}
	switch n {
	case 0:
		return datagrams, nil
	case len(datagrams):
		return nil, datagrams
	}
	small, full = make([][]byte, 0, len(datagrams)-n), make([][]byte, 0, n)
	for _, d := range datagrams {
		if len(d) > minDatagram {
			full = append(full, d)
		} else {
			small = append(small, d)
		}
	}
	return small, full
}

// sendBoth sends by every way that may work, and looks for a better one. What
// is small goes by UDP also while in doubt, what is full only where a datagram of
// that size arrived, or where there is no other way.
func (p *Path) sendBoth(pe *peer, now instant, direct *netip.AddrPort, hint netip.AddrPort, datagrams [][]byte) error {
	region := p.relayFor(pe)
	handshake := isHandshake(datagrams)
	var err error = ErrNoPath
	if isAnswer(datagrams) && p.sendAnswer(pe, now, direct, hint, region, datagrams) {
		if !pe.awake.Load() || int64(now) >= pe.discover.Load() {
			p.probe(pe, now)
		}
		return nil
	}
	udp := func(to netip.AddrPort, list [][]byte) {
		if len(list) == 0 {
			return
		}
		switch e := p.writeUDP(to, list); {
		case e == nil || passing(e):
			err = nil
		case errors.Is(e, syscall.EMSGSIZE):
			p.tooLarge(pe, list)
		default:
			if err != nil {
				err = e
			}
			p.sendFailed(pe, to, e)
		}
	}
	byRelay := datagrams
	if direct != nil {
		small, full := bySize(datagrams)
		udp(*direct, small)
		if pe.proven.Load() || !p.relays.connected(region) {
			udp(*direct, full)
		}
		if int64(now) <= pe.trusted.Load() && !handshake {
			byRelay = full
		}
	}
	// Where WireGuard last heard the peer is no proof that it is there: anybody
	// can have sent its datagram on. A handshake is answered there as well.
	if hint.IsValid() && (direct == nil || hint != *direct) && (handshake || direct == nil && region == 0) {
		udp(hint, datagrams)
	}
	if region != 0 && len(byRelay) > 0 && p.sendRelay(region, pe.key, byRelay...) {
		err = nil
	}
	if !pe.awake.Load() || int64(now) >= pe.discover.Load() {
		p.probe(pe, now)
	}
	if err != nil {
		if err == ErrNoPath {
			p.mu.Lock()
			if !pe.gone {
				pe.unsent.keep(datagrams, now)
			}
			p.mu.Unlock()
		}
		return fmt.Errorf("send to %s: %w", pe.key.Short(), err)
	}
	return nil
}

// tooLarge notes that the system cannot send datagrams of such a size to the
// best path.
func (p *Path) tooLarge(pe *peer, datagrams [][]byte) {
	if slices.ContainsFunc(datagrams, func(d []byte) bool { return len(d) > fullDatagram }) {
		p.refused(pe, 1)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	pe.ch.tooLarge(now)
	p.settleLocked(pe, now)
}

// relayOf returns the region by which to reach a peer, 0 = none. While the
// connection to the peer's home is being made, the one by which it was heard
// serves. While that home cannot be reached, or the peer is not there, it may
// have gone where this node went: to its own home.
func (p *Path) relayOf(pe *peer) int {
	home, heard := int(pe.home.Load()), int(pe.heard.Load())
	away := home != 0 && int(pe.away.Load()) == home
	switch {
	case !away && p.relays.connected(home):
		return home
	case p.relays.connected(heard):
		return heard
	}
	if away || p.relays.isFailing(home) {
		if own := int(p.homeNow.Load()); own != home && p.relays.connected(own) {
			return own
		}
	}
	switch {
	case p.relays.has(home):
		return home
	case p.relays.has(heard):
		return heard
	}
	return 0
}

// relayFor returns the region by which to send to a peer now, 0 = none, and
// begins to connect to its home if that is another.
func (p *Path) relayFor(pe *peer) int {
	region := p.relayOf(pe)
	if home := int(pe.home.Load()); home != 0 && region != home {
		if r := p.relays.get(home); r != nil {
			r.used.Store(int64(p.now()))
			r.start()
			p.checkIdle()
		}
	}
	return region
}

// sendRelay sends by a relay, which is connected if need be.
func (p *Path) sendRelay(region int, dst identity.NodePublic, datagrams ...[]byte) bool {
	if p.cfg.DirectOnly {
		return false
	}
	if !p.relays.connected(region) {
		p.checkIdle()
	}
	return p.relays.send(region, dst, datagrams...)
}

// checkIdle makes mind look for idle relays from now on.
func (p *Path) checkIdle() {
	p.mu.Lock()
	if p.idleCheck == 0 {
		p.idleCheck = p.now() + relayIdleCheck
		p.poke()
	}
	p.mu.Unlock()
}
