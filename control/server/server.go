// Package server is the coordination server of a mesh: an http.Handler that
// speaks the ts2021 protocol to nodes and relays, and another for
// administrators, over a store.
//
// The server answers from memory and writes through to the store. A change
// costs work in proportion to the nodes that can see it. What each open map
// stream still has to learn is a set, not a queue: a slow reader never misses
// the newest state and never makes the server buffer more than one.
package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// Config is what New needs. Zero means the default, and for durations a
// negative value means none.
type Config struct {
	Store store.Store // required; stays open when the server closes

	Domain  string // DNS suffix of the mesh; default "mesh.internal"
	BaseURL string // public URL, where users see who asks to log in; "" = auth keys only

	// DERPMap lists relays known from the start, such as the one in the same
	// process. Relays that announce themselves are added to it. Regions of
	// DERPMap cannot be taken over.
	DERPMap *wire.DERPMap

	IPv4 netip.Prefix // where mesh addresses come from; default 100.64.0.0/10

	KeyExpiry        time.Duration // of the node keys of users' nodes; default 90 days
	OfflineGrace     time.Duration // silence after which a node counts as offline; default 10 s
	EphemeralTimeout time.Duration // silence after which an ephemeral node is removed; default 120 s
	RelayLease       time.Duration // silence after which a relay leaves the relay map; default 60 s
	FlushInterval    time.Duration // how often what nodes report is stored; default 1 s, with other replicas 100 ms
	Gather           time.Duration // least time between two messages of a stream, to join what happens at once, and more while many streams speak often; default 20 ms
	WriteTimeout     time.Duration // how long a reader may block a stream; default 30 s

	MaxHandshakes int // Noise handshakes at one time, others wait up to 5 s for their turn; default 256
	MaxUnknown    int // connections of machines without a node, half of them of one source; default 2048

	// FailureRate is how many refused registrations a second one source
	// address may cause, and FailureBurst how many at once, before it hears
	// 429. Defaults 20 and 200.
	FailureRate  float64
	FailureBurst int

	// RequestRate is how many requests a second, and RequestBurst how many at
	// once, strangers at one source address may send before they hear 429: all
	// requests outside the Noise channel, and inside it those of machines
	// without a node. Defaults 500 and 5000.
	RequestRate  float64
	RequestBurst int

	// OnReplaced is called, at most once and on a goroutine of the server, when
	// another process has become this replica: it was cloned with what it keeps,
	// or stood still for a while. The server misses changes from then on and
	// has to end. nil = nobody is told.
	OnReplaced func(error)

	Logger *zap.Logger      // nil = silent
	Now    func() time.Time // default time.Now
}

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
		*d = max(*d, 0)
	}
	def(&c.KeyExpiry, 90*24*time.Hour)
	def(&c.OfflineGrace, 10*time.Second)
	def(&c.EphemeralTimeout, 120*time.Second)
	def(&c.RelayLease, 60*time.Second)
	if shared, ok := c.Store.(store.Shared); ok && shared.Replica() != "" {
		def(&c.FlushInterval, sharedFlush)
	}
	def(&c.FlushInterval, time.Second)
	def(&c.Gather, 20*time.Millisecond)
	def(&c.WriteTimeout, 30*time.Second)
	if c.Domain == "" {
		c.Domain = "mesh.internal"
	}
	if !c.IPv4.IsValid() {
		c.IPv4 = netip.MustParsePrefix("100.64.0.0/10")
	}
	if c.MaxHandshakes == 0 {
		c.MaxHandshakes = 256
	}
	if c.MaxUnknown == 0 {
		c.MaxUnknown = 2048
	}
	if c.FailureRate == 0 {
		c.FailureRate = 20
	}
	if c.FailureBurst == 0 {
		c.FailureBurst = 200
	}
	if c.RequestRate == 0 {
		c.RequestRate = 500
	}
	if c.RequestBurst == 0 {
		c.RequestBurst = 5000
	}
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

// Server is a coordination server. Its methods may be called concurrently.
type Server struct {
	cfg   Config
	log   *zap.Logger
	store store.Store
	key   identity.MachinePrivate

	// opMu makes changes of users, nodes, relays and policy one at a time:
	// decide, write to the store, apply to memory. Taken before mu.
	// New nodes and those that leave need no more than a share of it: what such
	// a change decides on is reserved in memory, and the store commits many at a
	// time.
	opMu sync.RWMutex

	// mu guards the working set below. Nothing that blocks, no callback and no
	// encoding happens while it is held.
	mu       sync.Mutex
	nodes    registry
	users    map[wire.UserID]store.User
	profiles map[wire.UserID]*wire.UserProfile // of users, made when first asked for
	policy   policyState
	grants   map[int64]*grant // in force, by ID
	shadow   shadowState
	relays   relaySet
	members  map[*subscriber]struct{}
	unsaved  map[wire.NodeID]struct{} // nodes whose reported state is not stored yet
	deadline deadlines
	views    int64 // how many were made
	ahead    bool  // a node was found to know a newer policy
	shared   memo  // has its own lock
	logins   logins
	receipts receipts

	replica replica

	transport transport
	limit     limiter // refused registrations
	requests  limiter // of strangers
	pace      pace
	meters    *meters
	readiness readiness

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // janitor and subscribers
	closed sync.Once

	began   time.Time // by the real clock
	left    sync.Once
	leaving chan struct{} // closed when Shutdown is called
	kick    chan struct{} // tells the janitor that a deadline was added; buffered
}

// New loads the working set from the store and starts the server's own
// goroutines.
func New(cfg Config) (*Server, error) {
	if cfg.Store == nil {
		return nil, errors.New("control server: no store")
	}
	cfg.setDefaults()
	s := &Server{
		cfg:      cfg,
		log:      cfg.Logger,
		store:    cfg.Store,
		users:    make(map[wire.UserID]store.User),
		profiles: make(map[wire.UserID]*wire.UserProfile),
		grants:   make(map[int64]*grant),
		members:  make(map[*subscriber]struct{}),
		unsaved:  make(map[wire.NodeID]struct{}),
		kick:     make(chan struct{}, 1),
		leaving:  make(chan struct{}),
		began:    time.Now(),
		meters:   newMeters(),
	}
	s.store.Observe(s.meters.stored)
	s.logins.init()
	s.pace.init(cfg.Gather)
	s.receipts.open = make(map[*receipt]struct{})
	s.replica.init(cfg.Store)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.limit.init(cfg.FailureRate, cfg.FailureBurst, cfg.Now)
	s.requests.init(cfg.RequestRate, cfg.RequestBurst, cfg.Now)
	err := s.load(s.ctx)
	if err == nil {
		err = s.join(s.ctx)
	}
	if err != nil {
		s.cancel()
		return nil, fmt.Errorf("control server: %w", err)
	}
	s.transport.start(s)
	s.wg.Go(s.janitor)
	s.startReplica()
	return s, nil
}

func (s *Server) load(ctx context.Context) error {
	var err error
	if s.key, err = s.store.ServerKey(ctx); err != nil {
		return err
	}
	if s.replica.store != nil {
		// Before anything is read: what comes later is in the log.
		if s.replica.after, err = s.replica.store.Position(ctx); err != nil {
			return err
		}
	}
	pool, err := newAddressPool(s.cfg.IPv4)
	if err != nil {
		return err
	}
	last, err := s.store.LastNodeID(ctx)
	if err != nil {
		return err
	}
	s.nodes.init(pool, last)
	if s.replica.store != nil {
		pool.scatter() // others hand addresses out at the same time
	}
	grants, err := s.store.Grants(ctx, false, 0)
	if err != nil {
		return err
	}
	for _, g := range grants {
		s.grants[g.ID] = &grant{Grant: g}
	}
	users, err := s.store.Users(ctx)
	if err != nil {
		return err
	}
	for _, u := range users {
		s.users[u.ID] = u
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return err
	}
	now := s.cfg.Now()
	kept, err := s.store.KeptKeys(ctx, now)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range nodes {
		s.nodes.add(nodes[i])
	}
	for _, k := range kept {
		// Who made it another key goes on answering to it, and peers may know
		// no other.
		if n := s.nodes.byID[k.Node]; n != nil && !s.outAt(&n.Node, now) {
			n.former, n.formerUntil = k.Key, k.Until
			s.nodes.formers[k.Key] = n
		}
	}
	for _, n := range s.nodes.byID {
		n.expired = s.outAt(&n.Node, now)
		// Whoever was online gets time to come back before peers hear that
		// it is not.
		n.offlineAt = now.Add(max(s.cfg.OfflineGrace, 30*time.Second))
		n.idleSince = now
		s.scheduleNode(n)
		s.refresh(n)
	}
	if err := s.relays.load(ctx, s.store, s.cfg.DERPMap, now.Add(s.cfg.RelayLease)); err != nil {
		return err
	}
	if err := s.loadPolicy(ctx); err != nil {
		return err
	}
	s.loadGrants()
	return s.loadShadow(ctx)
}

// join takes in who asks to be let in, and makes a loaded server one of the
// replicas, if it is to be one. Nobody else has the server yet.
func (s *Server) join(ctx context.Context) error {
	s.opMu.Lock()
	err := s.followLogins(ctx)
	s.opMu.Unlock()
	if err != nil || s.replica.store == nil {
		return err
	}
	return s.beatOnce(ctx)
}

// Key returns the public key that nodes may pin.
func (s *Server) Key() identity.MachinePublic { return s.key.Public() }

// Close ends all connections and streams and waits for everything the server
// started. It may be called more than once.
func (s *Server) Close() error {
	var err error
	s.closed.Do(func() {
		s.cancel()
		s.transport.close()
		s.wg.Wait()
		err = s.flush(context.Background())
		if s.replica.store != nil {
			// If that fails, its lease ends by itself.
			if err := s.replica.store.Leave(context.Background()); err != nil {
				s.log.Debug("other replicas could not be told", zap.Error(err))
			}
		}
	})
	return err
}

// HTTPServer returns an http.Server for h with the limits that a listener open
// to the world needs, such as 2048 connections of one source address. Upgraded connections are the Server's: its Close ends
// them. HTTP/2 stays off, since an upgrade needs the connection for itself.
func HTTPServer(h http.Handler) *http.Server {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	srv := &http.Server{
		Handler:           h,
		Protocols:         p,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
	}
	boundConns(srv, NewPlaces(maxPlainConns, maxPlainConnsSource))
	return srv
}
