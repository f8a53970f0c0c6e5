package tunnel

import (
	"sync/atomic"
	"time"

	"mesh/identity"
)

// Stats counts since the start of a Tunnel. Packets are IP packets, datagrams
// are ciphertext.
type Stats struct {
	PacketsOut   uint64 // packets that left as ciphertext
	PacketsIn    uint64 // packets delivered
	DatagramsOut uint64
	DatagramsIn  uint64 // those that passed the first checks
	SendErrors   uint64 // Config.Send returned an error
	Evicted      uint64 // peers removed because they were idle
	Greeted      uint64 // handshakes begun with peers that used a lost session
	CookiesOut   uint64 // sent to those who came in a flood
	CookiesIn    uint64 // taken from peers that are flooded

	// Outbound packets that were dropped. The first also counts initiations of
	// known peers that could not be created.
	DropNoPeer      uint64 // Lookup does not know the peer, or it could not be created
	DropDestination uint64 // destination is not the peer's, blocked, or no IP packet
	DropStalled     uint64 // they waited for a session, or would have

	// Inbound datagrams and packets that were dropped.
	DropMalformed  uint64 // not a WireGuard message
	DropSession    uint64 // addressed to no session of ours
	DropMismatch   uint64 // the relay names another sender than the cryptography
	DropBacklog    uint64 // handshake messages that arrived faster than they could be read
	DropSource     uint64 // sealed by a peer that does not own the source address
	DropMAC        uint64 // initiations without knowledge of our key
	DropRate       uint64 // initiations above the rate
	DropForged     uint64 // messages that do not open
	DropUnknownKey uint64 // initiations from keys that Lookup does not know
	DropReplay     uint64 // initiations not newer than the peer's last, and second copies of anything else
}

type counters struct {
	packetsOut, packetsIn, datagramsOut, datagramsIn, sendErrors, evicted, greeted atomic.Uint64
	cookiesOut, cookiesIn                                                          atomic.Uint64

	dropNoPeer, dropDestination, dropStalled                  atomic.Uint64
	dropMalformed, dropSession, dropMismatch, dropBacklog     atomic.Uint64
	dropSource, dropMAC, dropRate, dropForged, dropUnknownKey atomic.Uint64
	dropReplay                                                atomic.Uint64
}

// Stats returns the counters.
func (t *Tunnel) Stats() Stats {
	c := &t.stats
	return Stats{
		PacketsOut:      c.packetsOut.Load(),
		PacketsIn:       c.packetsIn.Load(),
		DatagramsOut:    c.datagramsOut.Load(),
		DatagramsIn:     c.datagramsIn.Load(),
		SendErrors:      c.sendErrors.Load(),
		Evicted:         c.evicted.Load(),
		Greeted:         c.greeted.Load(),
		CookiesOut:      c.cookiesOut.Load(),
		CookiesIn:       c.cookiesIn.Load(),
		DropNoPeer:      c.dropNoPeer.Load(),
		DropDestination: c.dropDestination.Load(),
		DropStalled:     c.dropStalled.Load(),
		DropMalformed:   c.dropMalformed.Load(),
		DropSession:     c.dropSession.Load(),
		DropMismatch:    c.dropMismatch.Load(),
		DropBacklog:     c.dropBacklog.Load(),
		DropSource:      c.dropSource.Load(),
		DropMAC:         c.dropMAC.Load(),
		DropRate:        c.dropRate.Load(),
		DropForged:      c.dropForged.Load(),
		DropUnknownKey:  c.dropUnknownKey.Load(),
		DropReplay:      c.dropReplay.Load(),
	}
}

// PeerStats is what a Tunnel knows of an active peer.
type PeerStats struct {
	LastHandshake time.Time // zero if none was completed
	LastTraffic   time.Time
	SentBytes     uint64 // of IP packets
	ReceivedBytes uint64 // of IP packets
}

// PeerStats returns the figures of a peer, and false if it is not active. They
// start at zero whenever the peer is created anew.
func (t *Tunnel) PeerStats(key identity.NodePublic) (PeerStats, bool) {
	t.mu.RLock()
	p := t.peers[key]
	t.mu.RUnlock()
	if p == nil {
		return PeerStats{}, false
	}
	s := PeerStats{
		LastTraffic:   time.Now().Add(time.Duration(p.active.Load() - t.instant())),
		SentBytes:     p.txBytes.Load(),
		ReceivedBytes: p.rxBytes.Load(),
	}
	if ns := p.handshake.Load(); ns != 0 {
		s.LastHandshake = time.Unix(0, ns)
	}
	return s, true
}

// LastHandshake returns when the last handshake with a peer was completed, and
// false if the peer is not active or has not completed any.
func (t *Tunnel) LastHandshake(key identity.NodePublic) (time.Time, bool) {
	s, ok := t.PeerStats(key)
	return s.LastHandshake, ok && !s.LastHandshake.IsZero()
}

// ActivePeers returns how many peers are configured at the moment.
func (t *Tunnel) ActivePeers() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.peers)
}
