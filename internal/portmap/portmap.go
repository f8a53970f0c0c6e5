// Package portmap asks the gateway of the local network to forward a UDP port
// to this host, and keeps what it got: by PCP (RFC 6887), NAT-PMP (RFC 6886)
// or UPnP IGD, whichever the gateway speaks, in this order.
//
// Whoever sits on the local network can answer in the gateway's name, and the
// gateway itself may be hostile. So answers count only from the gateway's own
// address, to a socket whose port they have to guess, and what they say is
// bounded and checked; a UPnP gateway cannot send us to any other host. What
// is learned is an address at which peers may try to reach this host, which
// proves nothing until a peer does.
package portmap

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Protocol names a port-mapping protocol.
type Protocol string

// The protocols, in order of preference.
const (
	PCP  Protocol = "PCP"
	PMP  Protocol = "NAT-PMP"
	UPnP Protocol = "UPnP"
)

const (
	// wantLifetime is what is asked for: RFC 6886 recommends two hours.
	wantLifetime = 2 * time.Hour
	// maxLifetime is what is believed at most.
	maxLifetime = 24 * time.Hour
	// checkEvery bounds the time between two renewals: a renewal is also how a
	// rebooted gateway and a changed external address are noticed.
	checkEvery = 10 * time.Minute
	// minRenew keeps a gateway from making us ask all the time.
	minRenew = 15 * time.Second
	// A renewal without an answer is tried again after renewRetry, twice that
	// and so on; after maxRenewals failures other protocols are tried.
	renewRetry  = 15 * time.Second
	maxRenewals = 3
	// A search that finds nothing is repeated after searchMin, twice that and
	// so on up to searchMax.
	searchMin = time.Minute
	searchMax = time.Hour
	// releaseTime bounds the farewell to the gateway.
	releaseTime = 500 * time.Millisecond
	// attemptTime bounds one attempt to get a mapping by one protocol.
	attemptTime = 5 * time.Second
	// maxMemory is for how many networks the memory reaches back.
	maxMemory = 8
)

// Config says what to map and how to reach the gateway. All functions may be
// called from any goroutine, with no lock held.
type Config struct {
	// LocalPort returns the UDP port to map, 0 = none at present. nil means
	// that nothing is to be mapped: the Client is there for Probe.
	LocalPort func() uint16
	// Changed is called when what Mapping returns has changed, from the
	// Client's goroutine. It must not call Close. Optional.
	Changed func()
	// ListenUDP opens a UDP socket; nil means net.ListenConfig. Sources that
	// ReadFrom returns must be *net.UDPAddr.
	ListenUDP func(ctx context.Context, network, addr string) (net.PacketConn, error)
	// DialTCP connects to the gateway, for UPnP; nil means net.Dialer.
	DialTCP func(ctx context.Context, network, addr string) (net.Conn, error)
	// Gateway returns the default gateway and this host's address towards it;
	// nil means SystemGateway.
	Gateway func() (gw, self netip.Addr, ok bool)
	// Logger receives what happened, at debug level; nil is silent.
	Logger *zap.Logger
}

// Client finds and keeps a mapping. New makes one; all methods may be called
// from any goroutine at any time. Between renewals it costs one timer.
type Client struct {
	cfg Config
	log *zap.Logger

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // capacity 1; look again

	// Only the loop touches these.
	failures int           // renewals without success since the last
	pause    time.Duration // before the next search

	mu     sync.Mutex      // guards the fields below
	abort  func()          // ends what the loop is doing
	link   link            // of lease
	lease  *lease          // nil = none; replaced, never changed
	renew  time.Time       // when
	why    error           // there is no mapping
	memory map[link]memory // of networks
}

// link is a network: its gateway, and us there.
type link struct{ gw, self netip.Addr }

// memory is what is remembered of a network.
type memory struct {
	// nonce is our password for mappings of PCP: with another one nobody,
	// ourselves included, can renew or release them.
	nonce [12]byte
	// works is the protocol that gave the last mapping, "" if none did.
	works   Protocol
	service service // of UPnP
}

// lease is a mapping that a gateway gave us.
type lease struct {
	protocol Protocol
	internal uint16
	external netip.AddrPort
	lifetime time.Duration // 0 = until released
	got      time.Time
	epoch    uint32 // seconds since the gateway's memory begins; not with UPnP
	service  service
}

// expires returns when the lease ends, the zero time for never.
func (l *lease) expires() time.Time {
	if l.lifetime == 0 {
		return time.Time{}
	}
	return l.got.Add(l.lifetime)
}

func (l *lease) expired(now time.Time) bool {
	return l.lifetime != 0 && !now.Before(l.expires())
}

// Why there is no mapping.
var (
	errLooking   = errors.New("a mapping is being looked for")
	errNoGateway = errors.New("no gateway is known")
	errNoPort    = errors.New("there is no port to map")
	errPublic    = errors.New("this host has a public address: there is nothing to map")
	errSilent    = errors.New("the gateway does not answer")
	errNothing   = errors.New("the gateway speaks no port-mapping protocol")
)

// refusal is a gateway's answer that is a no.
type refusal struct {
	protocol Protocol
	code     int
	text     string
}

func (r *refusal) Error() string {
	return fmt.Sprintf("%s: refused with code %d, %s", r.protocol, r.code, r.text)
}

// New starts looking for a mapping, if there is anything to map.
func New(cfg Config) *Client {
	if cfg.ListenUDP == nil {
		cfg.ListenUDP = new(net.ListenConfig).ListenPacket
	}
	if cfg.DialTCP == nil {
		cfg.DialTCP = new(net.Dialer).DialContext
	}
	if cfg.Gateway == nil {
		cfg.Gateway = SystemGateway
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	c := &Client{
		cfg:    cfg,
		log:    cfg.Logger,
		wake:   make(chan struct{}, 1),
		memory: make(map[link]memory),
		why:    errNoPort,
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if cfg.LocalPort != nil {
		c.why = errLooking
		c.wg.Go(c.loop)
	}
	return c
}

// Mapping returns the address at which the internet reaches the local port; ok
// is false while there is none. An address behind yet another NAT is none: see
// Status.
func (c *Client) Mapping() (external netip.AddrPort, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mappingLocked()
}

func (c *Client) mappingLocked() (netip.AddrPort, bool) {
	if c.lease == nil || !isPublic(c.lease.external.Addr()) {
		return netip.AddrPort{}, false
	}
	return c.lease.external, true
}

// Status describes a Client at one moment.
type Status struct {
	// Gateway is the gateway that gave the mapping, zero without one.
	Gateway netip.Addr
	// Protocol is how, "" without a mapping.
	Protocol Protocol
	// External is what it gave, zero without a mapping.
	External netip.AddrPort
	// DoubleNAT says that External is not public: the gateway is itself behind
	// a NAT, and the mapping is of use only to hosts between the two.
	DoubleNAT bool
	// Expires is when the mapping ends unless it is renewed, zero for never.
	Expires time.Time
	// Err says why there is no mapping, nil with one.
	Err error
}

// Status returns what there is and, if nothing, why.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lease == nil {
		return Status{Err: c.why}
	}
	_, public := c.mappingLocked()
	return Status{
		Gateway:   c.link.gw,
		Protocol:  c.lease.protocol,
		External:  c.lease.external,
		DoubleNAT: !public,
		Expires:   c.lease.expires(),
	}
}

// NetworkChanged tells that addresses, routes or the local port changed, or
// that others see this host at a new address: the mapping is checked at once,
// or one is looked for.
func (c *Client) NetworkChanged() {
	c.mu.Lock()
	c.renew = time.Time{}
	abort := c.abort
	c.mu.Unlock()
	if abort != nil {
		abort()
	}
	c.poke()
}

func (c *Client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Close releases the mapping, if the gateway is quick about it, and waits for
// all goroutines: at most about half a second.
func (c *Client) Close() error {
	c.cancel()
	c.wg.Wait()
	return nil
}

// loop is the Client's goroutine.
func (c *Client) loop() {
	defer c.quit()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-c.wake:
			c.pause, c.failures = 0, 0
		case <-c.ctx.Done():
			return
		}
		ctx, cancel := context.WithCancel(c.ctx)
		c.mu.Lock()
		c.abort = cancel
		c.mu.Unlock()
		next := c.step(ctx)
		cancel()
		timer.Reset(next)
	}
}

// quit gives the mapping back.
func (c *Client) quit() {
	c.mu.Lock()
	l, last := c.link, c.lease
	c.lease, c.why = nil, net.ErrClosed
	c.mu.Unlock()
	c.release(l, last)
}

// step does what is due and returns how long nothing will be.
func (c *Client) step(ctx context.Context) time.Duration {
	l, port, err := c.target()
	c.mu.Lock()
	at, cur := c.link, c.lease
	renew := time.Until(c.renew)
	c.mu.Unlock()

	if cur != nil && (err != nil || at != l || cur.internal != port) {
		c.set(at, nil, err)
		if at == l { // the gateway is still there
			c.release(at, cur)
		}
		cur = nil
	}
	switch {
	case err != nil:
		c.set(l, nil, err)
		return c.later()
	case cur != nil && renew > 0:
		return renew
	case cur != nil:
		if next, ok := c.renewal(ctx, l, cur); ok {
			return next
		}
	}
	found, err := c.search(ctx, l, port, cur)
	if ctx.Err() != nil && err != nil {
		// Told to look again, or closed: that is not the gateway's fault.
		return c.later()
	}
	if err != nil {
		c.log.Debug("no port mapping", zap.Stringer("gateway", l.gw), zap.Error(err))
	}
	c.set(l, found, err)
	if found == nil {
		return c.later()
	}
	return c.schedule(found)
}

// target says where to map what.
func (c *Client) target() (l link, port uint16, err error) {
	l, err = c.network()
	if port = c.cfg.LocalPort(); port == 0 && err == nil {
		err = errNoPort
	}
	return l, port, err
}

// network returns the network as the system knows it, if it may have mappings.
func (c *Client) network() (link, error) {
	gw, self, ok := c.cfg.Gateway()
	l := link{gw.Unmap(), self.Unmap()}
	switch {
	case !ok || !plausible(l):
		return link{}, errNoGateway
	case l.self.Is4() && isPublic(l.self):
		return link{}, errPublic
	}
	return l, nil
}

// later returns the pause before the next search, a longer one each time.
func (c *Client) later() time.Duration {
	c.pause = min(max(2*c.pause, searchMin), searchMax)
	return c.pause
}

// schedule notes when a new lease is renewed.
func (c *Client) schedule(le *lease) time.Duration {
	c.failures, c.pause = 0, 0
	next := checkEvery
	if le.lifetime > 0 {
		next = min(next, max(le.lifetime/2, minRenew))
	}
	c.mu.Lock()
	c.renew = time.Now().Add(next)
	c.mu.Unlock()
	return next
}

// renewal renews; ok is false when it is time to look for something else.
func (c *Client) renewal(ctx context.Context, l link, cur *lease) (next time.Duration, ok bool) {
	le, err := c.attempt(ctx, l, cur.protocol, cur.internal, cur)
	if err == nil {
		if cur.protocol != UPnP && restarted(cur.epoch, cur.got, le.epoch, le.got) {
			c.log.Debug("the gateway lost its mappings and made this one anew", zap.Stringer("gateway", l.gw))
		}
		c.set(l, le, nil)
		return c.schedule(le), true
	}
	if ctx.Err() != nil {
		return renewRetry, true // a reason to look again is on its way
	}
	c.log.Debug("port mapping not renewed", zap.Stringer("gateway", l.gw), zap.Error(err))
	c.failures++
	var no *refusal
	now := time.Now()
	if errors.As(err, &no) || c.failures >= maxRenewals || cur.expired(now) {
		return 0, false
	}
	next = renewRetry << (c.failures - 1)
	if cur.lifetime > 0 {
		next = min(next, max(cur.expires().Sub(now), time.Second))
	}
	return next, true
}

// search looks for a mapping: first by what worked here before.
func (c *Client) search(ctx context.Context, l link, port uint16, old *lease) (*lease, error) {
	m := c.recall(l)
	if m.works != "" && (old == nil || old.protocol != m.works) {
		if le, err := c.attempt(ctx, l, m.works, port, old); err == nil {
			return le, nil
		}
	}
	tried := make(map[Protocol]bool)
	var failed error
	// Most gateways give a mapping by the first protocol that they answer.
	// Where one does not, all others are looked for.
	for _, quick := range []bool{true, false} {
		f, err := c.discover(ctx, l, quick)
		if err != nil {
			return nil, cmp.Or(failed, err)
		}
		for _, p := range f.protocols() {
			if tried[p] {
				continue
			}
			tried[p] = true
			if p == UPnP {
				c.remember(l, func(m *memory) { m.service = f.services[0] })
			}
			le, err := c.attempt(ctx, l, p, port, old)
			if err == nil {
				c.remember(l, func(m *memory) { m.works = p })
				return le, nil
			}
			failed = err
		}
	}
	c.remember(l, func(m *memory) { m.works = "" })
	return nil, failed
}

// attempt asks for a mapping by one protocol; old is what there was, or nil.
func (c *Client) attempt(ctx context.Context, l link, p Protocol, port uint16, old *lease) (le *lease, err error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	suggest := netip.AddrPortFrom(netip.Addr{}, port)
	if old != nil {
		suggest = old.external
	}
	switch p {
	case PCP:
		le, err = c.mapPCP(ctx, l, port, suggest)
	case PMP:
		le, err = c.mapPMP(ctx, l, port, suggest.Port())
	default:
		le, err = c.mapUPnP(ctx, l, port, suggest.Port())
	}
	if err != nil {
		return nil, fmt.Errorf("map port %d by %s at %s: %w", port, p, l.gw, err)
	}
	le.protocol, le.internal, le.got = p, port, time.Now()
	le.lifetime = min(le.lifetime, maxLifetime)
	return le, nil
}

// release gives a mapping back, in a bounded time and without hearing whether
// that worked: it would expire anyway.
func (c *Client) release(l link, le *lease) {
	if le == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), releaseTime)
	defer cancel()
	var err error
	switch le.protocol {
	case PCP:
		err = c.releasePCP(ctx, l, le)
	case PMP:
		err = c.releasePMP(ctx, l, le)
	default:
		err = c.releaseUPnP(ctx, le)
	}
	if err != nil {
		c.log.Debug("port mapping not released; it will expire", zap.Stringer("gateway", l.gw), zap.Error(err))
	}
}

// set publishes what there is now.
func (c *Client) set(l link, le *lease, why error) {
	c.mu.Lock()
	before, had := c.mappingLocked()
	if le == nil && why == nil {
		why = errLooking
	}
	c.link, c.lease, c.why = l, le, why
	after, has := c.mappingLocked()
	c.mu.Unlock()
	if before == after && had == has {
		return
	}
	c.log.Debug("port mapping", zap.Stringer("external", after), zap.Stringer("was", before))
	if c.cfg.Changed != nil {
		c.cfg.Changed()
	}
}

// recall returns what is remembered of a network.
func (c *Client) recall(l link) memory {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recallLocked(l)
}

func (c *Client) recallLocked(l link) memory {
	m, ok := c.memory[l]
	if !ok {
		rand.Read(m.nonce[:]) // never fails, see crypto/rand
		if len(c.memory) >= maxMemory {
			clear(c.memory)
		}
		c.memory[l] = m
	}
	return m
}

func (c *Client) remember(l link, change func(*memory)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.recallLocked(l)
	change(&m)
	c.memory[l] = m
}
