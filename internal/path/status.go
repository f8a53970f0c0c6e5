package path

import (
	"net/netip"
	"time"

	"mesh/identity"
)

// PeerStatus tells how a peer is reached.
type PeerStatus struct {
	// Direct is the best UDP address; zero while only the relay is used. While
	// it is not Trusted packets go by relay too, and the path may be dead.
	Direct netip.AddrPort
	// Trusted says that Direct is the way: it answered lately and did not miss
	// several pings since. After each that it missed packets go by relay as
	// well until the next is answered.
	Trusted bool
	// TrustedUntil is when Trusted ends unless Direct answers again, zero when
	// not Trusted.
	TrustedUntil time.Time
	// Region is the relay region used beside or instead of Direct, 0 = none.
	Region  int
	Latency time.Duration // round trip to Direct, 0 = unknown
	// RelayLatency is the round trip by relay as last measured while there was
	// no trusted direct path, 0 = unknown.
	RelayLatency time.Duration
	// Away says that the relay of the peer's home region told that the peer is not
	// connected to it.
	Away bool
	// Size is the largest datagram that goes by Direct, larger ones go by
	// relay; 0 without Direct.
	Size int
	// Since is when Direct became what it is, and Why the reason: "first
	// pong", "better latency than …", "path silent", "network changed", what
	// the system said, or "no answer yet".
	Since        time.Time
	Why          string
	Active       bool      // traffic went out lately: paths are kept alive
	LastReceived time.Time // zero = nothing yet
	LastSent     time.Time
	Candidates   int // addresses at which the peer may be
}

// Status tells how a peer is reached. The zero PeerStatus means that there was
// no traffic lately.
func (p *Path) Status(key identity.NodePublic) PeerStatus {
	pe := p.peers.get(key)
	if pe == nil {
		return PeerStatus{}
	}
	region := p.relayOf(pe)
	now := p.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &pe.ch
	st := PeerStatus{
		Direct:       c.best,
		Trusted:      c.works(now, instant(pe.heardUDP.Load())),
		Region:       region,
		Latency:      c.latency,
		RelayLatency: c.relayed,
		Away:         pe.home.Load() != 0 && pe.away.Load() == pe.home.Load(),
		Size:         c.usableSize(),
		Since:        p.time(c.since),
		Why:          c.why,
		Active:       c.active,
		LastReceived: p.time(instant(pe.received.Load())),
		LastSent:     p.time(instant(pe.sent.Load())),
		Candidates:   len(c.candidates),
	}
	if st.Trusted {
		st.Region = 0
		st.TrustedUntil = p.time(c.trusted)
	}
	return st
}

// MTU returns the largest datagram that goes to a peer by its direct path, in
// bytes, 0 while there is none or the peer has no state. Larger ones go by
// relay, which takes any.
func (p *Path) MTU(key identity.NodePublic) int {
	if pe := p.peers.get(key); pe != nil && pe.direct.Load() != nil {
		if pe.proven.Load() {
			return fullDatagram
		}
		return minDatagram
	}
	return 0
}
