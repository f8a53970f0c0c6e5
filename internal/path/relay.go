package path

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/identity"
	"mesh/internal/backoff"
)

const (
	relayIdle      = 60 * time.Second // a connection other than home closes after this long without a write
	relayIdleCheck = 15 * time.Second
	backoffMin     = 100 * time.Millisecond
	backoffMax     = 5 * time.Second
	// What is sent while a connection is being made waits for it, within
	// these bounds: the first handshake must not be lost to the dial.
	maxWaiting     = 64
	maxWaitingSize = 128 << 10
	maxWait        = 3 * time.Second
)

// relayConn is a connection to a relay; *derp.Client in production.
type relayConn interface {
	// Send queues copies of packets; it does not block.
	Send(dst identity.NodePublic, packets ...[]byte) error
	NotePreferred(home bool)
	Recv() (derp.Message, error)
	Close() error
}

// relayEvents is what a set of relays tells its owner. Calls come from the
// goroutine of the connection, with no lock held.
type relayEvents interface {
	relayUp(region int)
	relayDown(region int, err error)
	relayPackets(region int, src identity.NodePublic, datagrams [][]byte)
	relayPeerGone(region int, peer identity.NodePublic)
}

// relaySet holds the connections to relays, one a region. Those in use or kept
// are reconnected until they are neither.
type relaySet struct {
	ctx    context.Context
	dial   func(ctx context.Context, def *wire.DERPRegion) (relayConn, error)
	events relayEvents
	now    func() instant
	wg     sync.WaitGroup

	mu      sync.RWMutex // guards what follows; taken before relay.mu
	regions map[int]*relay
	closed  bool
}

// relay is the connection to one region.
type relay struct {
	set *relaySet
	id  int
	def *wire.DERPRegion // not changed

	ctx    context.Context
	cancel context.CancelFunc
	kick   chan struct{} // capacity 1; ends a wait between attempts
	live   atomic.Pointer[liveRelay]
	used   atomic.Int64 // instant of the last write

	mu      sync.Mutex // guards what follows
	running bool       // its goroutine
	keep    bool       // connected even when not used
	home    bool
	waiting []waitingPacket
	size    int
}

type liveRelay struct{ conn relayConn }

type waitingPacket struct {
	dst  identity.NodePublic
	data []byte
	at   instant
}

// setRegions takes a new map. Regions whose definition is the same keep their
// connections.
func (s *relaySet) setRegions(regions map[int]*wire.DERPRegion) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for id, r := range s.regions {
		if def := regions[id]; def == nil || !reflect.DeepEqual(def, r.def) {
			r.cancel()
			delete(s.regions, id)
		}
	}
	for id, def := range regions {
		if s.regions[id] == nil {
			r := &relay{set: s, id: id, def: def, kick: make(chan struct{}, 1)}
			r.ctx, r.cancel = context.WithCancel(s.ctx)
			s.regions[id] = r
		}
	}
}

func (s *relaySet) get(region int) *relay {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.regions[region]
}

// close ends everything and waits.
func (s *relaySet) close() {
	s.mu.Lock()
	s.closed = true
	for _, r := range s.regions {
		r.cancel()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// has reports whether the map knows the region.
func (s *relaySet) has(region int) bool { return region != 0 && s.get(region) != nil }

func (s *relaySet) connected(region int) bool {
	r := s.get(region)
	return r != nil && r.live.Load() != nil
}

// send sends by a region, connecting to it if need be; false means that the map
// does not know it.
func (s *relaySet) send(region int, dst identity.NodePublic, datagrams ...[]byte) bool {
	r := s.get(region)
	if r == nil {
		return false
	}
	r.used.Store(int64(s.now()))
	if l := r.live.Load(); l != nil && l.conn.Send(dst, datagrams...) == nil {
		return true
	}
	r.wait(dst, datagrams)
	return true
}

// wait keeps datagrams until there is a connection.
func (r *relay) wait(dst identity.NodePublic, datagrams [][]byte) {
	now := r.set.now()
	r.mu.Lock()
	for _, b := range datagrams {
		if len(b) > maxWaitingSize {
			continue
		}
		for len(r.waiting) >= maxWaiting || r.size+len(b) > maxWaitingSize {
			r.size -= len(r.waiting[0].data)
			r.waiting = r.waiting[1:]
		}
		r.waiting = append(r.waiting, waitingPacket{dst, append([]byte(nil), b...), now})
		r.size += len(b)
	}
	r.mu.Unlock()
	r.start()
	// The connection may have come up between the caller's look and ours.
	if l := r.live.Load(); l != nil {
		r.flush(l.conn)
	}
}

// flush sends what waited. Order among goroutines that send at the same moment
// is not kept, as on any network.
func (r *relay) flush(conn relayConn) {
	now := r.set.now()
	r.mu.Lock()
	waiting := r.waiting
	r.waiting, r.size = nil, 0
	r.mu.Unlock()
	for _, w := range waiting {
		if now-w.at <= maxWait {
			conn.Send(w.dst, w.data)
		}
	}
}

// start makes sure that the goroutine runs.
func (r *relay) start() {
	s := r.set
	s.mu.RLock() // so that close does not begin to wait before Add
	defer s.mu.RUnlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running || s.closed || r.ctx.Err() != nil {
		return
	}
	r.running = true
	s.wg.Go(r.run)
}

// setKeep says which regions stay connected and which of them is home.
func (s *relaySet) setKeep(keep map[int]bool, home int) {
	s.mu.RLock()
	all := make([]*relay, 0, len(s.regions))
	for _, r := range s.regions {
		all = append(all, r)
	}
	s.mu.RUnlock()
	for _, r := range all {
		r.mu.Lock()
		wasHome := r.home
		if r.keep && !keep[r.id] {
			r.used.Store(int64(s.now())) // the time to close it starts now
		}
		r.keep, r.home = keep[r.id], r.id == home
		isHome := r.home
		r.mu.Unlock()
		if l := r.live.Load(); l != nil && wasHome != isHome {
			l.conn.NotePreferred(isHome)
		}
		if keep[r.id] {
			r.start()
		}
	}
}

// expire closes what was not used for long; more says whether to look again.
func (s *relaySet) expire(now instant) (more bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return false
	}
	for _, r := range s.regions {
		l := r.live.Load()
		if l == nil || !r.unused(now) {
			r.mu.Lock()
			more = more || r.running && !r.keep
			r.mu.Unlock()
			continue
		}
		// Close waits for the writer, which is bounded but not instant.
		s.wg.Go(func() { l.conn.Close() })
	}
	return more
}

func (r *relay) unused(now instant) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.keep && now-instant(r.used.Load()) > relayIdle
}

// reconnect replaces all connections, as after a change of the network.
func (s *relaySet) reconnect() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return
	}
	for _, r := range s.regions {
		if l := r.live.Load(); l != nil {
			s.wg.Go(func() { l.conn.Close() })
		}
		select {
		case r.kick <- struct{}{}:
		default:
		}
	}
}

// run connects, reads and connects again, while the region is kept or used.
func (r *relay) run() {
	s := r.set
	pause := backoff.Backoff{Min: backoffMin, Max: backoffMax}
	for {
		began := s.now()
		conn, err := s.dial(r.ctx, r.def)
		if err == nil {
			err = r.serve(conn)
			if s.now()-began > backoffMax {
				pause.Reset()
			}
		}
		if r.ctx.Err() == nil {
			s.events.relayDown(r.id, err)
		}
		r.mu.Lock()
		if r.ctx.Err() != nil || !r.keep && s.now()-instant(r.used.Load()) > relayIdle {
			r.running = false
			r.waiting, r.size = nil, 0
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		select {
		case <-r.kick:
			pause.Reset()
		default:
			pause.Wait(r.ctx, 0, r.kick, err)
		}
	}
}

// serve runs one connection until it ends.
func (r *relay) serve(conn relayConn) error {
	stop := context.AfterFunc(r.ctx, func() { conn.Close() })
	defer conn.Close()
	defer stop()
	l := &liveRelay{conn}
	r.mu.Lock()
	home := r.home
	r.live.Store(l)
	r.mu.Unlock()
	defer r.live.CompareAndSwap(l, nil)
	if home {
		conn.NotePreferred(true)
	}
	r.flush(conn)
	r.set.events.relayUp(r.id)
	for {
		m, err := conn.Recv()
		if err != nil {
			r.live.CompareAndSwap(l, nil)
			return err
		}
		switch m.Kind {
		case derp.KindPackets:
			r.set.events.relayPackets(r.id, m.Peer, m.Packets)
		case derp.KindPeerGone:
			r.set.events.relayPeerGone(r.id, m.Peer)
		}
	}
}

// errNoRelayNode reports a region of the map without a relay.
var errNoRelayNode = errors.New("no node of the region relays")

// dialRegion connects to the first node of a region that answers.
func (p *Path) dialRegion(ctx context.Context, def *wire.DERPRegion) (relayConn, error) {
	var errs []error
	for _, n := range def.Nodes {
		if n == nil || n.STUNOnly {
			continue
		}
		for _, host := range relayHosts(n) {
			port := n.DERPPort
			if port == 0 {
				port = 443
			}
			c, err := derp.Dial(ctx, derp.ClientConfig{
				Key:     p.cfg.Key,
				Dial:    p.cfg.DialTCP,
				RootCAs: p.cfg.RootCAs,
				Logger:  p.log,
				Target: derp.Target{
					Region: def.RegionID, Name: n.Name, HostName: n.HostName, CertName: n.CertName,
					Addr: joinHostPort(host, port), InsecureForTests: n.InsecureForTests,
				},
			})
			if err == nil {
				return c, nil
			}
			errs = append(errs, err)
			if ctx.Err() != nil {
				return nil, err
			}
		}
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("relay %d: %w", def.RegionID, errNoRelayNode)
	}
	return nil, errors.Join(errs...)
}

// relayHosts returns what to dial for a node: its addresses, or its name when
// it lists none.
func relayHosts(n *wire.DERPNode) []string {
	var hosts []string
	for _, text := range []string{n.IPv4, n.IPv6} {
		if _, err := netip.ParseAddr(text); err == nil {
			hosts = append(hosts, text)
		}
	}
	if len(hosts) == 0 && n.HostName != "" {
		hosts = []string{n.HostName}
	}
	return hosts
}
