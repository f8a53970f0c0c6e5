package path

import (
	"context"
	"net"
	"net/netip"
	"slices"
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
	backoffSoon    = 700 * time.Millisecond // at most, in the first time: relays restart
	backoffSoonFor = 30 * time.Second
	backoffMax     = 5 * time.Second
	// A relay to which packets go while nothing comes is asked whether it is
	// there, and left when it does not say so in time.
	relaySilent = time.Second
	relayAnswer = time.Second
	// What is sent while a connection is being made waits for it, within
	// these bounds: the first handshake must not be lost to the dial.
	maxWaiting     = 64
	maxWaitingPeer = 16 // of them for one peer
	maxWaitingSize = 128 << 10
	maxWait        = 3 * time.Second
	// A relay of a region whose connection failed comes after the others of it
	// for a while. One that was left for another serves on until it goes, or
	// for so long: peers may not know yet.
	avoidFor  = 60 * time.Second
	lingerFor = 10 * time.Second
	// lastWords bounds how long Close waits for relays to take what was sent: the
	// resets of a node that leaves.
	lastWords = 200 * time.Millisecond
)

// relayConn is a connection to a relay; *derp.Client in production.
type relayConn interface {
	// Send queues copies of packets; it does not block.
	Send(dst identity.NodePublic, packets ...[]byte) error
	NotePreferred(home bool)
	// Ping waits for an answer of the relay, for which Recv must run.
	Ping(ctx context.Context) (time.Duration, error)
	LocalAddr() net.Addr
	Recv() (derp.Message, error)
	// Flush waits until what Send took has left.
	Flush(ctx context.Context)
	Close() error
}

// relayEvents is what a set of relays tells its owner. Calls come from the
// goroutine of the connection, with no lock held.
type relayEvents interface {
	relayUp(region int)
	relayDown(region int, err error)
	// relayMoved says that another relay of the region is connected now.
	relayMoved(region int)
	relayPackets(region int, src identity.NodePublic, datagrams [][]byte)
	relayPeerGone(region int, peer identity.NodePublic)
	relayRestarting(region int, in time.Duration)
	// relayWatch asks for a call of watch at an instant.
	relayWatch(at instant)
}

// relaySet holds the connections to relays, one a region. Those in use or kept
// are reconnected until they are neither.
type relaySet struct {
	ctx    context.Context
	dial   func(ctx context.Context, def *wire.DERPRegion) (relayConn, error)
	events relayEvents
	now    func() instant
	wg     sync.WaitGroup
	home   atomic.Int32 // region by which peers reach us, 0 = none
	keys   atomic.Int32 // how many times the node's key was replaced

	mu      sync.RWMutex // guards what follows; taken before relay.mu
	regions map[int]*relay
	closed  bool
}

// relay is the connection to one region.
type relay struct {
	set *relaySet
	id  int

	ctx    context.Context
	cancel context.CancelFunc
	kick   chan struct{} // capacity 1; ends a wait between attempts
	live   atomic.Pointer[liveRelay]
	next   atomic.Pointer[liveRelay] // with the node's next key; see prepare
	used   atomic.Int64              // instant of the last write that it should answer
	heard  atomic.Int64              // instant of the last message

	failing atomic.Bool // not connected, and the last attempt failed
	watched atomic.Bool // packets out are watched
	asking  atomic.Bool // a ping is under way
	moving  atomic.Bool // to another relay of the region

	mu      sync.Mutex         // guards what follows
	def     *wire.DERPRegion   // its content is not changed
	avoid   map[string]instant // until then, by the name of a relay; nil if there is one only
	running bool               // its goroutine
	keep    bool               // connected even when not used
	home    bool
	waiting []waitingPacket
	size    int
}

// liveRelay is a connection to a relay.
type liveRelay struct {
	conn   relayConn
	node   *wire.DERPNode // nil in a region without any
	linger *time.Timer    // closes it after it was left for another; set before that, under relay.mu
	keys   int32          // relaySet.keys when it was dialled
	ended  atomic.Bool    // nobody reads it any more
}

type waitingPacket struct {
	dst  identity.NodePublic
	data []byte
	at   instant
}

// setRegions takes a new map. Connections to relays that it still names as they
// were are kept.
func (s *relaySet) setRegions(regions map[int]*wire.DERPRegion) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for id, r := range s.regions {
		if def := regions[id]; def == nil {
			r.cancel()
			delete(s.regions, id)
		} else {
			r.redefineLocked(def)
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

// flush waits until what was sent has left, but not for long.
func (s *relaySet) flush() {
	ctx, cancel := context.WithTimeout(s.ctx, lastWords)
	defer cancel()
	s.mu.RLock()
	var live []*liveRelay
	for _, r := range s.regions {
		if l := r.live.Load(); l != nil {
			live = append(live, l)
		}
	}
	s.mu.RUnlock()
	for _, l := range live {
		l.conn.Flush(ctx)
	}
}

// has reports whether the map knows the region.
func (s *relaySet) has(region int) bool { return region != 0 && s.get(region) != nil }

func (s *relaySet) connected(region int) bool {
	r := s.get(region)
	return r != nil && r.live.Load() != nil
}

// isFailing reports whether the last attempt to connect to a region failed.
func (s *relaySet) isFailing(region int) bool {
	r := s.get(region)
	return r != nil && r.failing.Load()
}

// send sends by a region, connecting to it if need be; false means that the map
// does not know it.
func (s *relaySet) send(region int, dst identity.NodePublic, datagrams ...[]byte) bool {
	r := s.get(region)
	if r == nil {
		return false
	}
	now := s.now()
	r.used.Store(int64(now))
	if home := int(s.home.Load()); home != region && home != 0 {
		// The answer comes by our home relay. Nothing that we send there would
		// show that the connection is dead, as after a NAT got another address.
		if h := s.get(home); h != nil && h.live.Load() != nil {
			h.used.Store(int64(now))
			h.watch(now)
		}
	}
	if l := r.live.Load(); l != nil && l.conn.Send(dst, datagrams...) == nil {
		r.watch(now)
		return true
	}
	r.wait(dst, datagrams)
	return true
}

// watch has somebody look whether the relay still answers.
func (r *relay) watch(now instant) {
	if !r.watched.Load() && !r.watched.Swap(true) {
		r.set.events.relayWatch(now + relaySilent)
	}
}

// wait keeps datagrams until there is a connection.
func (r *relay) wait(dst identity.NodePublic, datagrams [][]byte) {
	now := r.set.now()
	r.mu.Lock()
	for _, b := range datagrams {
		if len(b) > maxWaitingSize {
			continue
		}
		r.makeRoom(dst)
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

// makeRoom drops the oldest packet for a peer that has its share waiting, so
// that one peer does not take the place of others.
func (r *relay) makeRoom(dst identity.NodePublic) {
	oldest, n := -1, 0
	for i := range r.waiting {
		if r.waiting[i].dst == dst {
			if n++; oldest < 0 {
				oldest = i
			}
		}
	}
	if n >= maxWaitingPeer {
		r.size -= len(r.waiting[oldest].data)
		r.waiting = slices.Delete(r.waiting, oldest, oldest+1)
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
	s.wg.Go(func() { r.run(nil) })
}

// setKeep says which regions stay connected and which of them is home.
func (s *relaySet) setKeep(keep map[int]bool, home int) {
	s.home.Store(int32(home))
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

// watch looks whether relays to which packets went still answer, and says when
// to look again, 0 = not needed.
func (s *relaySet) watch(now instant) (next instant) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, r := range s.regions {
		l := r.live.Load()
		if !r.watched.Load() {
			continue
		}
		used, heard := instant(r.used.Load()), instant(r.heard.Load())
		switch {
		case l == nil || now-used > 2*relaySilent:
			r.watched.Store(false)
			continue
		case used > heard && now-heard >= relaySilent:
			s.askLocked(r, l)
		}
		look := now + relaySilent
		if d := heard + relaySilent; used > heard && d > now+lookLeast {
			look = d
		}
		if next == 0 || look < next {
			next = look
		}
	}
	return next
}

// askLocked makes sure that a relay is there, or ends its connection.
func (s *relaySet) askLocked(r *relay, l *liveRelay) {
	if s.closed || r.asking.Swap(true) {
		return
	}
	s.wg.Go(func() {
		defer r.asking.Store(false)
		ctx, cancel := context.WithTimeout(r.ctx, relayAnswer)
		defer cancel()
		if _, err := l.conn.Ping(ctx); err != nil {
			if r.live.Load() == l {
				r.failing.Store(true) // do not wait for a dial to find out
			}
			l.conn.Close()
			return
		}
		r.heard.Store(int64(s.now()))
	})
}

// recheck is for when the network changed: connections from addresses that are
// gone are replaced at once, the others when the relay does not answer. Relays
// that could not be reached are tried again now.
func (s *relaySet) recheck(here func(netip.Addr) bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return
	}
	for _, r := range s.regions {
		if l := r.live.Load(); l != nil {
			if a, ok := l.conn.LocalAddr().(*net.TCPAddr); ok && !here(a.AddrPort().Addr().Unmap()) {
				s.wg.Go(func() { l.conn.Close() })
			} else {
				s.askLocked(r, l)
			}
		}
		select {
		case r.kick <- struct{}{}:
		default:
		}
	}
}

// run connects, reads and connects again, while the region is kept or used. It
// begins with l, if that is not nil.
func (r *relay) run(l *liveRelay) {
	s := r.set
	pause := backoff.Backoff{Min: backoffMin, Max: backoffSoon}
	var failedFrom instant // 0 = the last attempt succeeded
	for {
		began := s.now()
		var err error
		if l == nil {
			select {
			case <-r.kick: // this very attempt is what it asks for
			default:
			}
			if l, err = r.connect(nil); err == nil {
				r.up(l)
			}
		}
		if err == nil {
			var left bool
			if left, err = r.serve(l); left {
				return // another goroutine goes on
			}
			failedFrom = 0
			if s.now()-began > backoffSoon {
				pause = backoff.Backoff{Min: backoffMin, Max: backoffSoon}
			}
		} else {
			r.failing.Store(true)
			if failedFrom == 0 {
				failedFrom = began
			} else if s.now()-failedFrom > backoffSoonFor {
				pause.Max = backoffMax
			}
		}
		l = nil
		if r.ctx.Err() == nil {
			s.events.relayDown(r.id, err)
		}
		r.mu.Lock()
		if r.ctx.Err() != nil || !r.keep && s.now()-instant(r.used.Load()) > relayIdle {
			r.running = false
			r.waiting, r.size = nil, 0
			r.failing.Store(false)
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		select {
		case <-r.kick:
			pause = backoff.Backoff{Min: backoffMin, Max: backoffSoon}
		default:
			pause.Wait(r.ctx, 0, r.kick, err)
		}
	}
}

// up makes a first connection the one that is used.
func (r *relay) up(l *liveRelay) {
	r.failing.Store(false)
	r.heard.Store(int64(r.set.now()))
	r.watched.Store(false)
	r.mu.Lock()
	home := r.home
	r.live.Store(l)
	r.mu.Unlock()
	if home {
		l.conn.NotePreferred(true)
	}
	r.flush(l.conn)
	r.leaveIfOld(l)
	r.set.events.relayUp(r.id)
	r.leaveUnnamed(l)
}

// serve reads from a connection until it ends; left says that it had been left
// for another before.
func (r *relay) serve(l *liveRelay) (left bool, err error) {
	stop := context.AfterFunc(r.ctx, func() { l.conn.Close() })
	defer l.conn.Close()
	defer stop()
	for {
		m, err := l.conn.Recv()
		if err != nil {
			l.ended.Store(true)
			if !r.live.CompareAndSwap(l, nil) {
				l.linger.Stop()
				return true, err
			}
			r.shun(l.node)
			return false, err
		}
		if r.live.Load() == l {
			r.heard.Store(int64(r.set.now()))
		}
		switch m.Kind {
		case derp.KindPackets:
			r.set.events.relayPackets(r.id, m.Peer, m.Packets)
		case derp.KindPeerGone:
			r.set.events.relayPeerGone(r.id, m.Peer)
		case derp.KindRestarting:
			r.restarting(l, m.ReconnectIn)
		}
	}
}
