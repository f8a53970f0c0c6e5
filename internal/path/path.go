// Package path finds and uses the best way to each peer: direct UDP where disco
// finds one that works, the peer's home relay otherwise, both while in doubt.
// It owns the node's UDP sockets, or shares them with other nodes of the process,
// and relay connections, and learns and reports the node's own endpoints and home
// relay.
//
// WireGuard datagrams go in and out; path neither reads nor authenticates them.
// What it knows of a peer it asks of the netmap through functions of Config.
// State exists only for peers with traffic and is dropped some minutes later.
package path

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/errand"
	"mesh/internal/hostaddr"
)

// Errors that callers branch on.
var (
	// ErrUnknownPeer reports a node key that is not in the netmap.
	ErrUnknownPeer = errors.New("peer is not in the netmap")
	// ErrNoPath reports that neither an address nor a relay of the peer is known.
	ErrNoPath = errors.New("no path to peer: it has no known address and no relay in common")
)

// Peer is what the netmap says about a peer.
type Peer struct {
	Key   identity.NodePublic
	Disco identity.DiscoPublic // zero: no direct paths
	// Endpoints are where control believes the peer to be. They are probed,
	// never trusted.
	Endpoints  []netip.AddrPort
	HomeRegion int // relay region, 0 = unknown
}

// Source says where datagrams came from.
type Source struct {
	// Peer is who sent them. By relay, the relay vouches for it. By UDP it is
	// who proved by disco or WireGuard to use Addr, zero if nobody did: only
	// WireGuard knows for sure.
	Peer   identity.NodePublic
	Addr   netip.AddrPort // zero by relay
	Region int            // of the relay, zero by UDP
}

// Report is what control has to know of this node's place in the network.
type Report struct {
	Endpoints []netip.AddrPort
	Types     []wire.EndpointType // parallel to Endpoints
	NetInfo   wire.NetInfo
}

// Config says who the node is and how it reaches the world. All functions may
// be called from any goroutine, with no lock held.
type Config struct {
	Key   identity.NodePrivate
	Disco identity.DiscoPrivate
	// Port is the UDP port, 0 = any.
	Port uint16
	// Lookup finds a peer of the current netmap by node key.
	Lookup func(identity.NodePublic) (Peer, bool)
	// LookupDisco finds the peers that use a disco key.
	LookupDisco func(identity.DiscoPublic) []Peer
	// Receive takes WireGuard datagrams, all of one source. The buffers are
	// lent during the call and may be changed. Calls come from several
	// goroutines at once, in order for each socket and relay.
	Receive func(src Source, datagrams [][]byte)
	// Report is called when endpoints, home relay or other parts of the
	// report changed, always with the latest state, from a goroutine of its
	// own for which Close waits. Optional.
	Report func(Report)
	// Changed is called when the host's network has changed, or this process or
	// the host slept, by the goroutine that noticed: it must be quick, and must
	// not call Close. Optional.
	Changed func()
	// ListenUDP opens a UDP socket; nil means net.ListenConfig. Sockets that
	// are *net.UDPConn are used with the fast means of the system.
	ListenUDP func(ctx context.Context, network, addr string) (net.PacketConn, error)
	// DialTCP connects to relays; nil means net.Dialer.
	DialTCP func(ctx context.Context, network, addr string) (net.Conn, error)
	// Proxy names the proxy by which to reach the relay at host:port, nil for
	// none. A nil function means what the environment says (HTTPS_PROXY,
	// ALL_PROXY, NO_PROXY), unless DialTCP is set: then no proxy.
	Proxy func(addr string) (*url.URL, error)
	// RootCAs verify the relays; nil means those of the system.
	RootCAs *x509.CertPool
	// Interfaces lists the addresses of the host's interfaces that are up,
	// with the loopback ones; nil asks the system. Where it is set, and where
	// the system does not tell of changes, it is asked every few seconds;
	// NetworkChanged is for who knows sooner. The same holds with ListenUDP.
	Interfaces func() ([]netip.Prefix, error)
	// GuessPorts allows to find a path through a NAT that maps by destination
	// by trying ports, see guess.go. Both sides must allow it.
	GuessPorts bool
	// Share allows to share UDP sockets with other nodes of the process, where
	// Port is 0 and there is no ListenUDP. It needs Owns, Whose, and handshakes
	// that use Path.Index.
	Share bool
	// Owns reports whether a WireGuard initiation was made for a key of this node.
	Owns func(initiation []byte) bool
	// Whose names the peer of the session that a WireGuard message is of, by the
	// index in it. It is asked where several peers use one address. Without it
	// they all count as the one that proved to use it last.
	Whose func(datagram []byte) (identity.NodePublic, bool)
	// RelayOnly opens no UDP socket: everything goes by relay.
	RelayOnly bool
	// DirectOnly connects to no relay.
	DirectOnly bool
	// LoopbackEndpoints advertises loopback addresses although there are
	// others; for when control itself is on this host.
	LoopbackEndpoints bool
	// Logger receives what went wrong; nil is silent.
	Logger *zap.Logger

	sharing *sharing // replaces host in tests
	// dialRelay replaces derp in tests.
	dialRelay func(ctx context.Context, def *wire.DERPRegion, key identity.NodePrivate) (relayConn, error)
}

// The path's epoch lies this far back, so that an instant of 0 is long ago.
const epochAge = 24 * time.Hour

// maxSecrets is how many shared disco secrets are remembered.
const maxSecrets = 4096

// Path is the network side of one node. All methods may be called from any
// goroutine at any time.
type Path struct {
	cfg    Config
	log    *zap.Logger
	own    atomic.Pointer[ownKey]
	sealer *disco.Sealer
	epoch  time.Time

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // all goroutines but those of relays and of port

	dial   func(context.Context, *wire.DERPRegion, identity.NodePrivate) (relayConn, error)
	peers  table
	relays relaySet
	port   *port                    // where sockets are; none with RelayOnly
	share  *share                   // the part in port; nil if it is the node's own
	socks  *atomic.Pointer[sockets] // those of port
	ways   atomic.Pointer[ways]     // nil = none; written under waysMu

	watch     watch
	unwatch   func() // nil = the system tells nothing
	reporting *errand.Errand
	reported  *Report // the last; nil = none

	counts counters

	homeNow atomic.Int32 // home.region, for those who hold no lock

	ready chan struct{} // closed when the node is reachable

	minding *errand.Errand // mind
	clock   clock          // of mind alone, as what follows
	lookAt  instant        // when it planned to look next; 0 = not known yet
	timer   *time.Timer    // asks for it then; nil before the first

	waysMu sync.Mutex // guards changes of ways, and closed; taken before mu
	closed bool

	mu        sync.Mutex // guards what follows, and peer.info, peer.ch and peer.at
	timers    timerHeap  // peers with something due
	budget    budget
	avoid     []netip.AddrPort
	guessing  bool // ports, for some peer
	held      []heldPacket
	late      []lateAnswer
	ends      endpoints
	lent      []Endpoint // mappings of a shared port that another node has
	home      home
	calls     map[*peer]struct{} // CallMeMaybes that wait for fresh endpoints
	meets     map[*peer]lateMeet // and Meets
	isReady   bool
	idleCheck instant // next look for idle relays, 0 = none needed
	watchAt   instant // next look for silent relays, 0 = none needed
}

// New opens the sockets and starts. It fails only when no UDP socket can be
// opened on the port.
func New(cfg Config) (*Path, error) {
	if cfg.Key.IsZero() || cfg.Disco.IsZero() {
		return nil, errors.New("path: no node key or no disco key")
	}
	// Whoever brings sockets of his own may be in another network than the host.
	watches := cfg.Interfaces == nil && cfg.ListenUDP == nil
	listen, shares := openSockets, false
	if cfg.ListenUDP == nil {
		shares = cfg.Share && cfg.Port == 0 && !cfg.RelayOnly
		cfg.ListenUDP = new(net.ListenConfig).ListenPacket
		listen = openHost
	}
	if cfg.DialTCP == nil {
		cfg.DialTCP = new(net.Dialer).DialContext
		if cfg.Proxy == nil {
			cfg.Proxy = derp.ProxyFromEnvironment
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Interfaces == nil {
		cfg.Interfaces = hostaddr.Recent
	}
	if cfg.sharing == nil {
		cfg.sharing = &host
	}
	p := &Path{
		cfg:    cfg,
		log:    cfg.Logger,
		sealer: disco.NewSealer(cfg.Disco, maxSecrets),
		epoch:  time.Now().Add(-epochAge),
		ready:  make(chan struct{}),
		calls:  make(map[*peer]struct{}),
		meets:  make(map[*peer]lateMeet),
	}
	p.own.Store(newOwnKey(cfg.Key))
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.reporting = errand.New(p.tellReport)
	p.minding = errand.New(p.mind)
	p.peers.init()
	p.home.init()
	p.ends.init()
	p.relays = relaySet{
		ctx: p.ctx,
		dial: func(ctx context.Context, def *wire.DERPRegion) (relayConn, error) {
			return p.dial(ctx, def, p.own.Load().private)
		},
		events:  p,
		now:     p.now,
		regions: make(map[int]*relay),
	}
	p.dial = p.dialRegion
	if cfg.dialRelay != nil {
		p.dial = cfg.dialRelay
	}
	if err := p.choosePort(listen, shares); err != nil {
		p.cancel()
		return nil, err
	}
	p.watch.pollAt = p.now() + pollIdle
	if watches {
		var err error
		if p.unwatch, err = hostaddr.Watch(p.noteChange); err != nil {
			p.log.Debug("no events of network changes", zap.Error(err))
		}
		p.watch.told = err == nil
	}
	if err := p.openPort(); err != nil {
		p.cancel()
		p.stopMinding()
		if p.unwatch != nil {
			p.unwatch()
		}
		return nil, err
	}
	p.poke()
	return p, nil
}

// choosePort gives the node a port of its own, not open yet, or a part in one that
// nodes share.
func (p *Path) choosePort(listen func(context.Context, listenFunc, uint16) (*sockets, error), shares bool) error {
	if shares {
		sh, err := p.cfg.sharing.join(p)
		if err != nil {
			return err
		}
		p.share, p.port = sh, &sh.port.port
	} else {
		p.port = &port{fixed: p.cfg.Port}
		p.port.init(func(ctx context.Context, number uint16) (*sockets, error) {
			return listen(ctx, p.cfg.ListenUDP, number)
		}, p.fromUDP, p.log)
	}
	p.socks = &p.port.socks
	return nil
}

// openPort has datagrams handed to the node from now on.
func (p *Path) openPort() error {
	if p.share != nil {
		p.share.seat.Begin(member{p})
		return nil
	}
	if p.cfg.RelayOnly {
		return nil
	}
	err := p.port.open()
	if err != nil {
		p.port.shut()
	}
	return err
}

// closePort has no more datagrams handed to the node; leavePort waits until none
// is. What a datagram sets off may still be sent.
func (p *Path) closePort() {
	if p.share != nil {
		p.share.stop.Do(p.share.seat.Stop)
	} else {
		p.port.shut()
	}
}

func (p *Path) leavePort() {
	if p.share != nil {
		p.share.left.Do(func() { p.share.leave(p) })
	} else {
		p.port.readers.Wait()
	}
}

// LocalPort returns the UDP port, that of IPv4 if they differ; 0 with RelayOnly.
func (p *Path) LocalPort() uint16 { return p.port.number() }

// Rebind replaces the UDP sockets, on the same port if it is still free, and
// does what NetworkChanged does. Packets in flight may be lost; sessions are
// not. The error says that there is no socket now; Rebind may be tried again.
func (p *Path) Rebind() error {
	if !p.cfg.RelayOnly {
		if err := p.port.rebind(p.socks.Load()); err != nil {
			return fmt.Errorf("rebind: %w", err)
		}
	}
	p.NetworkChanged()
	return nil
}

// NetworkChanged tells that the host's addresses or routes changed: direct
// paths are found anew, relays are connected again and endpoints gathered.
func (p *Path) NetworkChanged() {
	local, err := p.cfg.Interfaces()
	p.closeWays(netip.AddrPort{}) // their NAT may be another
	p.relays.recheck(func(a netip.Addr) bool {
		return err != nil || hasAddr(local, a)
	})
	p.mu.Lock()
	now := p.now()
	if err == nil {
		p.ends.local = local
		p.forbidLocked()
	}
	p.ends.forget()
	tasks := p.startAnewLocked(now)
	p.gatherLocked(now)
	p.mu.Unlock()
	p.poke()
	for _, t := range tasks {
		p.perform(t.pe, &t.out)
	}
	p.changed()
}

// changed tells who wants to know that the network changed. No lock is held.
func (p *Path) changed() {
	if p.cfg.Changed != nil {
		p.cfg.Changed()
	}
}

// task is what a chooser asked to do for a peer.
type task struct {
	pe  *peer
	out todo
}

// startAnewLocked doubts all direct paths and tries them anew.
func (p *Path) startAnewLocked(now instant) []task {
	var tasks []task
	for _, pe := range p.peers.all() {
		t := task{pe: pe}
		pe.ch.networkChanged(now, p.stillHereLocked, &p.budget, &t.out)
		p.settleLocked(pe, now)
		if !p.cfg.RelayOnly && !pe.info.Disco.IsZero() {
			tasks = append(tasks, t)
		}
	}
	return tasks
}

// stillHereLocked reports whether an address can be the same host's as before
// the network changed: one of a private network is only as long as the host has
// an address in that network.
func (p *Path) stillHereLocked(a netip.AddrPort) bool {
	ip := a.Addr()
	if !ip.IsPrivate() && !ip.IsLinkLocalUnicast() {
		return true
	}
	return slices.ContainsFunc(p.ends.local, func(n netip.Prefix) bool { return n.Contains(ip) })
}

// Ready waits until the node can be reached: its endpoints are known and it is
// connected to its home relay, or no relay can be had but UDP works. When ctx
// ends first the error says what was missing.
func (p *Path) Ready(ctx context.Context) error {
	select {
	case <-p.ready:
		return nil
	default:
	}
	select {
	case <-p.ready:
		return nil
	case <-p.ctx.Done():
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for the network: %s: %w", p.missing(), ctx.Err())
	}
}

// Close ends everything and waits for all goroutines, calls of Receive and
// Report included: it must not be called from them. What was sent still leaves.
func (p *Path) Close() error {
	p.relays.flush()
	p.waysMu.Lock()
	p.closed = true
	p.cancel()
	p.closePort()
	p.closeWays(netip.AddrPort{})
	p.waysMu.Unlock()
	p.relays.close()
	p.leavePort()
	p.stopMinding()
	p.wg.Wait()
	p.reporting.Close()
	if p.unwatch != nil {
		p.unwatch()
	}
	return nil
}

func (p *Path) now() instant { return time.Since(p.epoch) }

// time turns an instant into a time for users, zero for 0.
func (p *Path) time(t instant) time.Time {
	if t == 0 {
		return time.Time{}
	}
	return p.epoch.Add(t)
}

// poke has deadlines be looked at again.
func (p *Path) poke() { p.minding.Ask() }

// mind does what is due, and looks again when more is.
func (p *Path) mind() {
	if p.ctx.Err() != nil {
		return
	}
	if p.clock.slept(p.now(), p.lookAt, time.Now()) {
		p.log.Debug("the host or this process slept")
		p.NetworkChanged()
	}
	p.lookAt = p.dueWatch()
	if at, ok := p.due(p.now()); ok {
		p.lookAt = min(p.lookAt, at)
	}
	wait := max(p.lookAt-p.now(), 0)
	if p.timer == nil {
		p.timer = time.AfterFunc(wait, p.poke)
	} else {
		p.timer.Reset(wait)
	}
}

// stopMinding returns when mind does not run any more.
func (p *Path) stopMinding() {
	p.minding.Close()
	if p.timer != nil {
		p.timer.Stop()
	}
}

// due does everything that is due and returns when the next is.
func (p *Path) due(now instant) (next instant, ok bool) {
	soon := func(t instant) {
		if t != 0 && (!ok || t < next) {
			next, ok = t, true
		}
	}
	p.dueHeld(now)
	p.dueLate(now)
	for p.duePeer(now) {
	}
	p.dueEndpoints(now)
	p.dueHome(now)

	p.mu.Lock()
	check, watch := p.idleCheck, p.watchAt
	p.mu.Unlock()
	if watch != 0 && now >= watch {
		p.mu.Lock()
		p.watchAt = 0
		p.mu.Unlock()
		if at := p.relays.watch(now); at != 0 {
			p.relayWatch(at)
		}
	}
	if check != 0 && now >= check {
		more := p.relays.expire(now)
		p.mu.Lock()
		p.idleCheck = 0
		if more {
			p.idleCheck = now + relayIdleCheck
		}
		p.mu.Unlock()
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	soon(p.idleCheck)
	soon(p.watchAt)
	if len(p.timers) > 0 {
		soon(p.timers[0].at)
	}
	if len(p.held) > 0 {
		soon(p.held[0].at + holdFor)
	}
	if len(p.late) > 0 {
		soon(p.late[0].at)
	}
	soon(p.ends.next)
	soon(p.home.next)
	return next, ok
}
