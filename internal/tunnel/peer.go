package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"mesh/identity"
)

const (
	// stagedPackets and stagedBytes bound what waits for a handshake, per peer.
	stagedPackets = 32
	stagedBytes   = 64 << 10
	// oldSessions is how many sessions are kept besides the one in use: what
	// was sealed with them may still be on its way.
	oldSessions = 3
)

// peer is a peer with traffic in the last minutes.
type peer struct {
	key      identity.NodePublic
	home     *endpoint                // wherever the path believes it to be
	here     atomic.Pointer[endpoint] // where it was last heard
	alt      atomic.Pointer[endpoint] // the last unknown address it seemed to send from
	gone     chan struct{}            // closed when removed
	prefixes []netip.Prefix           // claims in the table; guarded by Tunnel.mu
	indexes  []uint32                 // its entries in Tunnel.indexes; guarded by Tunnel.mu

	dead      atomic.Bool
	active    atomic.Int64 // the last traffic, nanoseconds since Tunnel.epoch: no clock that is put forward ends it
	handshake atomic.Int64 // time of the last handshake, Unix nanoseconds, 0 for never
	txBytes   atomic.Uint64
	rxBytes   atomic.Uint64

	// Timers, as nanoseconds since Tunnel.epoch; 0 is none. They are looked at
	// when the alarm rings, which is never later than the first of them.
	unanswered atomic.Int64 // since when data was sent and nothing heard
	owed       atomic.Int64 // since when data was heard and nothing sent
	alarm      atomic.Int64 // changed under alarms.mu

	current atomic.Pointer[session] // what is sent is sealed with it; changed under mu

	mu       sync.Mutex // guards what follows; taken after route and before Tunnel.mu
	next     *session   // a responder's session that the peer has not used yet
	old      []*session // newest first
	begun    *pending   // the handshake that we began, nil if there is none
	attempts int        // of it, one after the other
	since    time.Time  // the first of them
	retry    time.Time  // when the next is due
	// hasty says that the peer drops our session when it hears of our new key,
	// and may not have heard of that when we begin another.
	hasty     bool
	guest     guest
	preshared psk
	staged    [][]byte // packets that wait for a session
	stagedLen int      // bytes of them
	leaving   int      // packets that have waited and are being sent

	// delivery has capacity 1 and is full while packets are checked and
	// delivered: a barrier. A mutex would do but for virtual time.
	delivery chan struct{}
}

func newPeer(key identity.NodePublic, preshared psk, now int64) *peer {
	raw := key.Bytes()
	p := &peer{key: key, gone: make(chan struct{}), guest: newGuest(raw[:]), preshared: preshared, delivery: make(chan struct{}, 1)}
	p.home = &endpoint{}
	p.here.Store(p.home)
	p.active.Store(now)
	return p
}

// awaitDelivery returns when a delivery that was going on has ended.
func (p *peer) awaitDelivery() {
	p.delivery <- struct{}{}
	<-p.delivery
}

// stage keeps a copy of packets until there is a session, and returns how many
// found no room. The caller holds mu.
func (p *peer) stage(packets [][]byte) (dropped int) {
	for _, b := range packets {
		if len(p.staged) >= stagedPackets || p.stagedLen+len(b) > stagedBytes {
			dropped++
			continue
		}
		p.staged = append(p.staged, append([]byte(nil), b...))
		p.stagedLen += len(b)
	}
	return dropped
}

// unstage takes out what waited, for sendStaged. The caller holds mu.
func (p *peer) unstage() [][]byte {
	staged := p.staged
	p.leaving += len(staged)
	p.staged, p.stagedLen = nil, 0
	return staged
}

// waiting returns how many packets wait for a session or to be sent after.
func (p *peer) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.staged) + p.leaving
}

// endpoint is a place from which a peer was heard.
type endpoint struct {
	src       Source // zero in a peer's home endpoint
	born      time.Time
	announced atomic.Bool
}

// from returns the endpoint of a datagram from src that names one of p's
// sessions, and false if the relay says that somebody else sent it. An address
// that the path attributes to somebody else is only stale.
func (p *peer) from(src *Source, now time.Time) (*endpoint, bool) {
	switch {
	case src.Peer == p.key:
		return p.home, true
	case !src.Addr.IsValid():
		return p.home, src.Peer.IsZero()
	}
	alt := p.alt.Load()
	if alt == nil || alt.src != *src || alt.announced.Load() && now.Sub(alt.born) > time.Second {
		alt = &endpoint{src: *src, born: now}
		p.alt.Store(alt)
	}
	return alt, true
}
