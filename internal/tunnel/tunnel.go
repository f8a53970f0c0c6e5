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
// Cryptography, timers and session state are those of wireguard-go's Device,
// which this package hides completely.
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
	"golang.zx2c4.com/wireguard/device"

	"mesh/identity"
)

// MTU is the size in bytes of the largest IP packet that nodes send through a
// tunnel. Larger ones are carried all the same, up to what a datagram holds.
const MTU = 1280

// DefaultIdleAfter is how long a peer without traffic stays configured.
const DefaultIdleAfter = 5 * time.Minute

const (
	outQueue  = 32  // trains of packets waiting to be routed
	inQueue   = 128 // trains of datagrams waiting to be opened
	initQueue = 128 // handshake initiations waiting for their check

	// Initiations whose sender nobody vouches for are opened at this rate at
	// most, so that a flood with random keys costs about 2 % of a core.
	initRate  = 200
	initBurst = 100
	// initGap is the least distance of two initiations from a known source
	// that do not count against that rate; Device has the same limit.
	initGap = 20 * time.Millisecond
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
// called after Close returned; they may be called from several goroutines.
type Config struct {
	// Key is the node's private key. Required.
	Key identity.NodePrivate
	// Lookup says whether a key is a peer in the current netmap, and how it
	// stands there. It has to be fast. Required.
	Lookup func(identity.NodePublic) (Peer, bool)
	// Send carries ciphertext to a peer. The address is a hint and normally
	// zero: the UDP address of an authenticated packet whose sender the path
	// did not know. The buffers are only lent during the call. Send may block
	// for back-pressure but must not call into the Tunnel. Required.
	Send func(peer identity.NodePublic, addr netip.AddrPort, datagrams [][]byte) error
	// Deliver takes IP packets that the peer sealed and whose source is the
	// peer's. The buffers are only lent during the call. It may call
	// Tunnel.Send, but neither Update, Block, SetKey nor Close. Required.
	Deliver func(peer identity.NodePublic, packets [][]byte)
	// Authenticated reports that a packet from a Source whose sender was
	// unknown (or wrongly known) to the path was sealed by peer. It is called
	// just before the next datagram leaves for this peer. It proves that the
	// peer made the packet, not that it lives at the address. Like Send it
	// must not call into the Tunnel. Optional.
	Authenticated func(peer identity.NodePublic, src Source)
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
	cfg Config
	log *zap.Logger

	key      atomic.Pointer[localKey]
	blocked  atomic.Pointer[lpm[struct{}]] // see Block; nil means none
	stats    counters
	history  history
	strange  *rate.Limiter // initiations from sources nobody vouches for
	revision atomic.Uint64 // counts Updates, so that older lookups are not applied; changed under route

	// route is held by whoever changes which peer owns an address, and by the
	// Device's reader from the moment packets are handed to it until it has
	// routed them. Taken before mu.
	route  sync.Mutex
	closed bool           // guarded by route
	dev    *device.Device // guarded by route; changes with the key

	keyChange sync.Mutex // held for the whole of a change of the key; taken first

	// mu guards the maps and the table below, and what peers say it guards.
	// Nothing is called and nothing waits while it is held.
	mu       sync.RWMutex
	peers    map[identity.NodePublic]*peer
	sessions map[uint32]*session // by the index that we chose
	table    table
	leaving  map[identity.NodePublic]chan struct{} // closed when the Device has let go of the peer
	held     map[identity.NodePublic]heldInitiation
	changing chan struct{} // closed when a change of the key is done; nil if there is none

	out     chan *train
	in      chan *train
	inits   chan initiation
	lost    chan identity.NodePublic // peers that use a session we do not have
	born    chan struct{}            // a peer was created: the idle timer has to run
	closing chan struct{}
	done    chan struct{}  // Close has finished
	wg      sync.WaitGroup // the worker and goroutines that dismiss peers
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
	key, err := newLocalKey(cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("tunnel: %w", err)
	}
	t := &Tunnel{
		cfg:      cfg,
		log:      cfg.Logger,
		strange:  rate.NewLimiter(initRate, initBurst),
		peers:    make(map[identity.NodePublic]*peer),
		sessions: make(map[uint32]*session),
		leaving:  make(map[identity.NodePublic]chan struct{}),
		held:     make(map[identity.NodePublic]heldInitiation),
		out:      make(chan *train, outQueue),
		in:       make(chan *train, inQueue),
		inits:    make(chan initiation, initQueue),
		lost:     make(chan identity.NodePublic, 16),
		born:     make(chan struct{}, 1),
		closing:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	t.key.Store(key)
	if t.dev, err = t.newDevice(cfg.Key); err != nil {
		return nil, err
	}
	t.wg.Go(t.work)
	return t, nil
}

func (t *Tunnel) newDevice(k identity.NodePrivate) (*device.Device, error) {
	dev := device.NewDevice(newFakeTUN(t), &fakeBind{t: t}, deviceLogger(t.log))
	err := dev.SetPrivateKey(k.Bytes())
	if err == nil {
		err = dev.Up()
	}
	if err != nil {
		dev.Close()
		return nil, fmt.Errorf("tunnel: start: %w", err)
	}
	return dev, nil
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
	t.keyChange.Lock()
	defer t.keyChange.Unlock()
	t.wg.Wait()
	t.route.Lock()
	dev := t.dev
	t.route.Unlock()
	closeDevice(dev, t.active())
	close(t.done)
	return nil
}

// closeDevice ends a Device that has at most the given peers.
func closeDevice(dev *device.Device, peers []*peer) {
	for _, p := range peers {
		dropFinalizers(dev.LookupPeer(p.key.Bytes()))
	}
	dev.Close()
}

// SetKey replaces the node's private key. All sessions end at once, since they
// belong to the old key; whatever is sent next starts a handshake with the new
// one, and initiations made for the old key are refused.
func (t *Tunnel) SetKey(k identity.NodePrivate) error {
	if k.IsZero() {
		return errors.New("tunnel: no private key")
	}
	key, err := newLocalKey(k)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	t.keyChange.Lock()
	defer t.keyChange.Unlock()
	if key.public == t.key.Load().public {
		return nil
	}

	// A new Device, because SetPrivateKey of one that is shaking hands can
	// deadlock: ConsumeMessageResponse takes the handshake's lock before that
	// of the identity, everybody else after it.
	t.route.Lock()
	if t.closed {
		t.route.Unlock()
		return ErrClosed
	}
	t.revision.Add(1)
	old, changed := t.dev, make(chan struct{})
	t.mu.Lock()
	t.changing = changed
	peers := slices.Collect(maps.Values(t.peers))
	for _, p := range peers {
		t.retire(p)
	}
	t.table.take()
	t.mu.Unlock()
	t.route.Unlock()

	closeDevice(old, peers)
	fresh, err := t.newDevice(k)

	t.route.Lock()
	defer t.route.Unlock()
	if err == nil {
		t.dev = fresh
		t.key.Store(key)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changing = nil
	close(changed)
	for _, p := range peers {
		close(t.leaving[p.key])
		delete(t.leaving, p.key)
	}
	return err
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

// active returns the configured peers.
func (t *Tunnel) active() []*peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Collect(maps.Values(t.peers))
}

// work opens initiations and removes idle peers, one after the other.
func (t *Tunnel) work() {
	idle := time.NewTimer(t.cfg.IdleAfter)
	defer idle.Stop()
	idle.Stop()
	armed := false
	greeted := make(map[identity.NodePublic]time.Time)
	for {
		select {
		case <-t.closing:
			return
		case in := <-t.inits:
			t.admit(in)
		case key := <-t.lost:
			t.greet(key, greeted)
		case <-t.born:
			if !armed {
				armed = true
				idle.Reset(t.cfg.IdleAfter)
			}
		case now := <-idle.C:
			next := t.evictIdle(now)
			if armed = next > 0; armed {
				idle.Reset(next)
			}
		}
	}
}
