// Package tunnel is the WireGuard side of a node: IP packets go in with the
// peer they are for and come out as ciphertext for that peer, ciphertext comes
// in with whatever is known of its origin and comes out as IP packets of the
// peer that sealed them.
//
// Peers are lazy. Only those with traffic in the last minutes exist; the rest
// are found through Config.Lookup when a packet for them, or a handshake
// initiation from them, turns up. Which of our addresses belongs to which peer
// is decided here too: a packet is only ever sealed for the peer whose
// AllowedIPs own its destination, and only delivered when its source belongs to
// the peer that sealed it. An address that two peers claim is nobody's until
// one of them lets go.
//
// It speaks the WireGuard protocol: handshake, cookies, sessions and timers are
// those of its paper. What is particular to this implementation: all work on a
// packet is done in the goroutine that brings it, sealing in Send and opening in
// Receive, so that no peer has goroutines, queues or buffers of its own. The
// state of a handshake that we began is apart from that of one that we answer,
// so that two nodes that begin at the same moment both succeed. Upstream's
// Device is the peer that judges all this in the tests.
package tunnel

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"mesh/identity"
	"mesh/internal/errand"
)

// MTU is the size in bytes of the largest IP packet that nodes send through a
// tunnel. Larger ones are carried all the same, up to what a datagram holds.
const MTU = 1280

// DefaultIdleAfter is how long a peer without traffic stays configured.
const DefaultIdleAfter = 5 * time.Minute

const (
	knockQueue = 128 // handshake messages waiting to be read
	maxPeers   = 1 << 16

	// Initiations whose sender nobody vouches for are opened at this rate at
	// most, so that a flood with random keys costs about 2 % of a core.
	initRate  = 200
	initBurst = 100
	// cookieRate is how many of those above it are answered with a cookie,
	// which costs little and is smaller than what asked for it.
	cookieRate = 5000
	// familiarRate is how many initiations from addresses that the path knows
	// are opened per second at most, which takes less than one core.
	familiarRate = 4000
	// initGap is the least distance of two initiations from a known source
	// that do not count against that rate.
	initGap = 20 * time.Millisecond
	// oldKeyFor is how long handshakes with the former key are answered.
	oldKeyFor = rejectAfter
)

var (
	// ErrUnknownPeer is what Send returns for a key that Lookup does not know.
	ErrUnknownPeer = errors.New("unknown peer")
	// ErrClosed is what a closed Tunnel returns. It matches net.ErrClosed.
	ErrClosed = fmt.Errorf("tunnel: %w", net.ErrClosed)

	errTooManyPeers = errors.New("too many active peers")
)

// Source says where ciphertext came from.
type Source struct {
	Peer   identity.NodePublic // sender as far as the path knows it, else zero
	Addr   netip.AddrPort      // UDP address, zero if it came by relay
	Region int                 // relay region, when by relay
}

// Peer is what the netmap says about a node as far as the tunnel cares.
type Peer struct {
	Key        identity.NodePublic
	AllowedIPs []netip.Prefix // inner addresses that are this peer's and nobody else's
}

// Config holds what a Tunnel needs from its surroundings. Callbacks are never
// called after Close returned; they may be called from several goroutines, and
// from within Send and Receive.
type Config struct {
	// Key is the node's private key. Required.
	Key identity.NodePrivate
	// Lookup says whether a key is a peer in the current netmap, and how it
	// stands there. It has to be fast. Required.
	Lookup func(identity.NodePublic) (Peer, bool)
	// Send carries ciphertext to a peer. The address is a hint and normally
	// zero: the UDP address of an authenticated packet whose sender the path
	// did not know. The buffers are only lent during the call; those of one
	// call often lie end to end in memory. Send may block for back-pressure
	// but must not call into the Tunnel. Required.
	Send func(peer identity.NodePublic, addr netip.AddrPort, datagrams [][]byte) error
	// Deliver takes IP packets that the peer sealed and whose source is the
	// peer's. The buffers are only lent during the call. It may call
	// Tunnel.Send, but neither Update, Block, SetKey nor Close. Calls for one
	// peer do not overlap. Required.
	Deliver func(peer identity.NodePublic, packets [][]byte)
	// Authenticated reports that a packet from a Source whose sender was
	// unknown (or wrongly known) to the path was sealed by peer. It is called
	// just before the next datagram leaves for this peer. It proves that the
	// peer made the packet, not that it lives at the address. Like Send it
	// must not call into the Tunnel. Optional.
	Authenticated func(peer identity.NodePublic, src Source)
	// Reply sends a cookie to a UDP address from which an initiation came that
	// there is no time to open. Optional: without it such are only dropped.
	Reply func(addr netip.AddrPort, datagram []byte)
	// Index proposes a receiver index for a handshake, another each time. Optional,
	// nil means any.
	Index func() uint32
	// PSK returns the pre-shared key of a peer when it is created. Optional,
	// nil means all zero.
	PSK func(identity.NodePublic) [32]byte
	// IdleAfter is how long a peer without traffic is kept; 0 means
	// DefaultIdleAfter.
	IdleAfter time.Duration
	// Logger receives debug messages; nil means none.
	Logger *zap.Logger
}

// Tunnel is the encrypting half of a node. All methods may be called
// concurrently.
type Tunnel struct {
	cfg   Config
	log   *zap.Logger
	epoch time.Time
	calls gate

	keys     atomic.Pointer[keyring]       // changed under route
	blocked  atomic.Pointer[lpm[struct{}]] // see Block; nil means none
	stats    counters
	history  history
	strange  *rate.Limiter // initiations from sources nobody vouches for
	cookies  *rate.Limiter // cookies for those above that
	seated   *rate.Limiter // initiations of those who have one
	familiar *rate.Limiter // initiations from sources that the path knows
	quota    quota         // of sessions
	revision atomic.Uint64 // counts Updates, so that older lookups are not applied; changed under route
	alarms   alarms

	// route is held by whoever changes which peer owns an address, or which
	// peers there are. Taken before the lock of a peer and before mu.
	route  sync.Mutex
	closed bool // guarded by route

	// mu guards the maps and the table below, and what peers say it guards.
	// Nothing is called and nothing waits while it is held.
	mu      sync.RWMutex
	peers   map[identity.NodePublic]*peer
	indexes map[uint32]slot // what the indexes that we chose stand for
	table   table
	held    map[identity.NodePublic]heldInitiation

	knocks  chan *knocking
	greeted map[identity.NodePublic]time.Time // when a peer was greeted last; of the worker alone
	lost    chan identity.NodePublic          // peers that use a session we do not have
	born    chan struct{}                     // a peer was created: the idle timer has to run
	settled chan struct{}                     // capacity 1: the idle timer is over
	working *errand.Errand                    // work; asked for by who sends on one of the channels above
	timers  timers                            // of the worker alone
	closing chan struct{}
	done    chan struct{} // Close has finished
}

// timers ask for the worker. Both are nil until they are needed first.
type timers struct {
	alarm, idle *time.Timer
	idles       bool // idle runs
}

// New starts a Tunnel. It holds no peer until there is traffic.
func New(cfg Config) (*Tunnel, error) {
	switch {
	case cfg.Key.IsZero():
		return nil, errors.New("tunnel: no private key")
	case cfg.Lookup == nil || cfg.Send == nil || cfg.Deliver == nil:
		return nil, errors.New("tunnel: Lookup, Send and Deliver are required")
	}
	if cfg.IdleAfter <= 0 {
		cfg.IdleAfter = DefaultIdleAfter
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Index == nil {
		cfg.Index = randomIndex
	}
	key, err := newLocalKey(cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	t := &Tunnel{
		cfg:      cfg,
		log:      cfg.Logger,
		epoch:    time.Now(),
		calls:    gate{empty: make(chan struct{}, 1)},
		strange:  rate.NewLimiter(initRate, initBurst),
		cookies:  rate.NewLimiter(cookieRate, cookieRate),
		seated:   rate.NewLimiter(initRate, initBurst),
		familiar: rate.NewLimiter(familiarRate, familiarRate),
		quota:    quota{rekeyAfterMessages, rejectAfterMessages},
		alarms:   alarms{poke: make(chan struct{}, 1)},
		peers:    make(map[identity.NodePublic]*peer),
		indexes:  make(map[uint32]slot),
		held:     make(map[identity.NodePublic]heldInitiation),
		knocks:   make(chan *knocking, knockQueue),
		greeted:  make(map[identity.NodePublic]time.Time),
		lost:     make(chan identity.NodePublic, 16),
		born:     make(chan struct{}, 1),
		settled:  make(chan struct{}, 1),
		closing:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	t.keys.Store(&keyring{current: key})
	t.working = errand.New(t.work)
	return t, nil
}

// Close ends all sessions and returns when no callback runs any more and none
// will. It may be called several times and at any time, but not from a
// callback.
func (t *Tunnel) Close() error {
	t.route.Lock()
	first := !t.closed
	t.closed = true
	t.route.Unlock()
	if !first {
		<-t.done
		return nil
	}
	close(t.closing)
	t.calls.close()
	t.working.Close()
	t.timers.stop()
	t.route.Lock()
	t.mu.Lock()
	for _, p := range t.peers {
		t.retire(p)
	}
	t.mu.Unlock()
	t.route.Unlock()
	close(t.done)
	return nil
}

// gate lets calls in until it is closed, and then waits for those inside.
type gate struct {
	state atomic.Int64  // calls inside; negative by a lot once closed
	empty chan struct{} // capacity 1: the last call has left a closed gate
}

const gateClosed = -1 << 40

func (g *gate) enter() bool {
	if g.state.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.state.Add(-1) == gateClosed {
		select {
		case g.empty <- struct{}{}:
		default:
		}
	}
}

func (g *gate) close() {
	for n := g.state.Add(gateClosed); n != gateClosed; n = g.state.Load() {
		<-g.empty
	}
}

// keyring are the node's keys: the one in use, and for a while the one before
// or the one to come.
type keyring struct {
	current *localKey
	former  *localKey // or the next; nil if there is none
	until   time.Time // when the former one is over; zero for the next
}

// knownTo returns the key of ours that the sender of a handshake message knows.
func (r *keyring) knownTo(msg []byte, now time.Time) *localKey {
	switch {
	case r.current.door.knows(msg):
		return r.current
	case r.former != nil && (r.until.IsZero() || now.Before(r.until)) && r.former.door.knows(msg):
		return r.former
	}
	return nil
}

// owns reports whether a public key is ours.
func (r *keyring) owns(key identity.NodePublic) bool {
	return key == r.current.public || r.former != nil && key == r.former.public
}

// AddKey makes the Tunnel answer to a second private key, which SetKey will make
// the node's: so peers may hear of it first. The one that SetKey replaced last is
// not answered to any more.
func (t *Tunnel) AddKey(k identity.NodePrivate) error {
	key, err := t.localKey(k)
	if err != nil {
		return err
	}
	t.route.Lock()
	defer t.route.Unlock()
	if t.closed {
		return ErrClosed
	}
	current := t.keys.Load().current
	if key.public == current.public {
		return nil
	}
	t.revision.Add(1)
	t.keys.Store(&keyring{current: current, former: key})
	return nil
}

func (t *Tunnel) localKey(k identity.NodePrivate) (*localKey, error) {
	if k.IsZero() {
		return nil, errors.New("tunnel: no private key")
	}
	key, err := newLocalKey(k)
	if err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	return key, nil
}

// SetKey replaces the node's private key. Sessions live on until they are
// renewed, which is begun at once: a peer that has heard of the new key answers
// now, one that has not when it does. Initiations made for the former key are
// answered for three minutes more.
func (t *Tunnel) SetKey(k identity.NodePrivate) error {
	key, err := t.localKey(k)
	if err != nil {
		return err
	}
	t.route.Lock()
	if t.closed {
		t.route.Unlock()
		return ErrClosed
	}
	former := t.keys.Load().current
	if key.public == former.public {
		t.route.Unlock()
		return nil
	}
	t.revision.Add(1)
	t.keys.Store(&keyring{current: key, former: former, until: time.Now().Add(oldKeyFor)})
	t.route.Unlock()
	for _, p := range t.active() {
		p.mu.Lock()
		renew := p.current.Load() != nil || p.begun != nil
		if p.begun != nil { // under the former key
			t.dropIndex(p.begun.index)
			p.begun = nil
		}
		p.since, p.hasty = time.Time{}, true
		p.mu.Unlock()
		if renew && t.calls.enter() {
			t.begin(p, false)
			t.calls.leave()
		}
	}
	return nil
}

// Block refuses packets from and to the given inner addresses, whoever sends
// them, until the next call. It replaces the previous set; nil lifts it.
func (t *Tunnel) Block(prefixes []netip.Prefix) {
	if len(prefixes) == 0 {
		t.blocked.Store(nil)
		return
	}
	set := new(lpm[struct{}])
	for _, p := range prefixes {
		if p, ok := usable(p); ok {
			set.set(p, struct{}{})
		}
	}
	t.blocked.Store(set)
	for _, p := range t.active() {
		p.awaitDelivery()
	}
}

// Drain waits until the packets that were sent to peers have left, but not
// longer than atMost. It is for last words, such as the resets of connections,
// before Update to the peers that go. Only what waits for a handshake has not
// left when Send returns.
func (t *Tunnel) Drain(atMost time.Duration, keys ...identity.NodePublic) {
	deadline := time.NewTimer(atMost)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, p := range t.active() {
		for slices.Contains(keys, p.key) && p.waiting() > 0 && !p.dead.Load() {
			select {
			case <-tick.C:
			case <-p.gone:
			case <-deadline.C:
				return
			}
		}
	}
}

// active returns the configured peers.
func (t *Tunnel) active() []*peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Collect(maps.Values(t.peers))
}

func (t *Tunnel) isClosing() bool {
	select {
	case <-t.closing:
		return true
	default:
		return false
	}
}

// work reads handshake messages, minds the timers and removes idle peers, one
// after the other, until there is nothing of that to do.
func (t *Tunnel) work() {
	for {
		select {
		case <-t.closing:
			return
		case k := <-t.knocks:
			t.answer(k)
		case key := <-t.lost:
			t.greet(key)
		case <-t.alarms.poke:
			t.tendDue()
		case <-t.born:
			if !t.timers.idles {
				t.evictAfter(t.cfg.IdleAfter)
			}
		case <-t.settled:
			t.evictAfter(t.evictIdle())
		default:
			return
		}
	}
}

// tendDue does what is due and sets the timer for what is next.
func (t *Tunnel) tendDue() {
	for {
		peers, next := t.alarms.due(t.instant())
		for _, p := range peers {
			t.tend(p)
		}
		if len(peers) > 0 {
			continue // tending set new alarms
		}
		t.summonAfter(&t.timers.alarm, next, t.alarms.poke)
		return
	}
}

// evictAfter has idle peers be looked for after d, 0 = not again.
func (t *Tunnel) evictAfter(d time.Duration) {
	t.timers.idles = d > 0
	t.summonAfter(&t.timers.idle, d, t.settled)
}

// summonAfter sets a timer to ask for the worker, 0 = never.
func (t *Tunnel) summonAfter(timer **time.Timer, d time.Duration, why chan<- struct{}) {
	switch {
	case *timer != nil && d > 0:
		(*timer).Reset(d)
	case *timer != nil:
		(*timer).Stop()
	case d > 0:
		*timer = time.AfterFunc(d, func() { t.summon(why) })
	}
}

// summon has the worker look at a channel of capacity 1.
func (t *Tunnel) summon(why chan<- struct{}) {
	select {
	case why <- struct{}{}:
	default:
	}
	t.working.Ask()
}

func (t *timers) stop() {
	for _, timer := range []*time.Timer{t.alarm, t.idle} {
		if timer != nil {
			timer.Stop()
		}
	}
}
