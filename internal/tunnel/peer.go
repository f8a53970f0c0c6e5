package tunnel

import (
	"encoding/hex"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"mesh/identity"
)

const (
	// Packets of one peer inside the Device at a time. Each occupies 64 KB
	// there, so this is what bounds memory. A peer that does not answer gets
	// few; without a session they only wait.
	windowOpen    = 256
	windowStalled = 16
	// stallAfter is how long Send waits for a peer that takes nothing.
	stallAfter = 200 * time.Millisecond
	// forgetAfter is longer than the Device goes without a sign of life while
	// it still has packets: it repeats initiations every five seconds.
	forgetAfter = 15 * time.Second
	// windowIn bounds the datagrams waiting behind a slow Deliver.
	windowIn = 256

	// Sessions last three minutes, indexes live a little longer.
	sessionLife     = 4 * time.Minute
	sessionsPerPeer = 128
)

// peer is a configured peer.
type peer struct {
	key      identity.NodePublic
	home     *endpoint                // the pseudo endpoint: whatever path the bind side chooses
	alt      atomic.Pointer[endpoint] // the last unknown address it seemed to send from
	gone     chan struct{}            // closed when removed
	prefixes []netip.Prefix           // claims in the table; guarded by Tunnel.mu
	indexes  []indexed                // its entries in Tunnel.sessions, oldest first; guarded by Tunnel.mu

	dead      atomic.Bool
	active    atomic.Int64 // time of the last traffic, Unix nanoseconds
	handshake atomic.Int64 // time of the last handshake, Unix nanoseconds, 0 for never
	remote    atomic.Uint32
	txBytes   atomic.Uint64 // IP bytes handed to the Device
	rxBytes   atomic.Uint64 // IP bytes delivered

	window sync.Mutex // guards the next four
	inside int        // packets handed to the Device that have not left it
	// stalled: there is no session as far as we saw, or nothing has left for a
	// while; then Send drops at once instead of waiting.
	stalled  bool
	lastSent time.Time
	room     chan struct{} // capacity 1: something left

	delivery   sync.Mutex // held while packets are checked and delivered: a barrier, it guards nothing
	delivering atomic.Bool
	handed     uint64        // datagrams given to the Device; only its reader touches it
	opened     atomic.Uint64 // the number, in that order, of the last one that came out
}

type indexed struct {
	index uint32
	born  time.Time
}

// session is one of our indexes, by which a peer addresses us.
type session struct {
	peer *peer
	born time.Time

	answer atomic.Pointer[[answerSize]byte] // the last response that was passed on
}

// answerSize is the size of the part of a response that makes it that response
// and no other: its ephemeral key and the tag, without sender and MACs.
const answerSize = 48

// answered reports whether b is the response that was passed on last. Peers
// send theirs by every way, and the Device, which opens messages on several
// workers, may take two copies that arrive at the same moment for two answers:
// it then begins the same session twice, with the same keys and both times
// counting from zero.
func (s *session) answered(b []byte) bool {
	answer := [answerSize]byte(b[12:60])
	for {
		last := s.answer.Load()
		if last != nil && *last == answer {
			return true
		}
		if s.answer.CompareAndSwap(last, &answer) {
			return false
		}
	}
}

func newPeer(key identity.NodePublic, now time.Time) *peer {
	p := &peer{
		key:      key,
		gone:     make(chan struct{}),
		room:     make(chan struct{}, 1),
		stalled:  true,
		lastSent: now,
	}
	p.home = &endpoint{peer: p}
	p.active.Store(now.UnixNano())
	return p
}

// take reserves room for n packets in the Device. When there is none it waits
// as long as packets leave; it reports false if they do not, or the peer or the
// tunnel is gone.
func (p *peer) take(n int, closing <-chan struct{}) bool {
	if p.tryTake(n) {
		return true
	}
	patience := time.NewTimer(stallAfter)
	defer patience.Stop()
	for {
		p.window.Lock()
		stalled := p.stalled
		p.window.Unlock()
		if stalled {
			return false
		}
		select {
		case <-p.room:
			if p.tryTake(n) {
				p.signal() // there may be room for another waiter
				return true
			}
			patience.Reset(stallAfter)
		case <-patience.C:
			p.window.Lock()
			if time.Since(p.lastSent) >= stallAfter {
				p.stalled = true
			}
			p.window.Unlock()
			patience.Reset(stallAfter)
		case <-p.gone:
			return false
		case <-closing:
			return false
		}
	}
}

func (p *peer) tryTake(n int) bool {
	p.window.Lock()
	defer p.window.Unlock()
	limit := windowOpen
	if p.stalled {
		limit = windowStalled
		if p.inside+n > limit && time.Since(p.lastSent) > forgetAfter {
			p.inside = 0 // the Device gave up on the handshake and threw them away
		}
	}
	if p.inside > 0 && p.inside+n > limit {
		return false
	}
	p.inside += n
	return true
}

// left notes that datagrams for the peer went out, data of them IP packets.
func (p *peer) left(data int, now time.Time) {
	p.window.Lock()
	p.lastSent = now
	if data > 0 {
		p.stalled = false
		p.inside = max(p.inside-data, 0)
	}
	p.window.Unlock()
	if data > 0 {
		p.signal()
	}
}

// giveBack returns room that was taken but not used.
func (p *peer) giveBack(n int) {
	if n == 0 {
		return
	}
	p.window.Lock()
	p.inside = max(p.inside-n, 0)
	p.window.Unlock()
	p.signal()
}

func (p *peer) signal() {
	select {
	case p.room <- struct{}{}:
	default:
	}
}

// awaitDelivery returns when a delivery that was going on has ended.
func (p *peer) awaitDelivery() {
	p.delivery.Lock()
	//lint:ignore SA2001 the empty section is the barrier
	p.delivery.Unlock()
}

// from returns the endpoint to hand the Device with a datagram from src that
// names one of p's sessions, and false if the relay says that somebody else
// sent it. An address that the path attributes to somebody else is only stale.
func (p *peer) from(src Source, now time.Time) (*endpoint, bool) {
	switch {
	case src.Peer == p.key:
		return p.home, true
	case !src.Addr.IsValid():
		return p.home, src.Peer.IsZero()
	}
	alt := p.alt.Load()
	if alt == nil || alt.src != src || alt.announced.Load() && now.Sub(alt.born) > time.Second {
		alt = &endpoint{peer: p, src: src, born: now}
		p.alt.Store(alt)
	}
	return alt, true
}

// endpoint is what the Device takes for an address: the peer itself, or the
// peer at an address that the path does not know to be the peer's.
type endpoint struct {
	peer      *peer
	src       Source // zero in a peer's home endpoint
	born      time.Time
	announced atomic.Bool
}

var _ conn.Endpoint = (*endpoint)(nil)

func (e *endpoint) ClearSrc()           {}
func (e *endpoint) SrcToString() string { return "" }
func (e *endpoint) SrcIP() netip.Addr   { return netip.Addr{} }

func (e *endpoint) DstToString() string {
	if e.src.Addr.IsValid() {
		return e.src.Addr.String()
	}
	return e.peer.hexKey()
}

// DstToBytes is what the Device's cookies are bound to.
func (e *endpoint) DstToBytes() []byte {
	if e.src.Addr.IsValid() {
		b, _ := e.src.Addr.MarshalBinary()
		return b
	}
	k := e.peer.key.Bytes()
	return k[:]
}

// DstIP is what the Device's rate limiter tells sources apart by.
func (e *endpoint) DstIP() netip.Addr {
	if e.src.Addr.IsValid() {
		return e.src.Addr.Addr()
	}
	k := e.peer.key.Bytes()
	return netip.AddrFrom16([16]byte(k[:16]))
}

func (p *peer) hexKey() string {
	k := p.key.Bytes()
	return hex.EncodeToString(k[:])
}
