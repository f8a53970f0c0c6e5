// Package relay is the server of the DERP protocol: it passes encrypted
// packets between nodes that cannot reach each other directly.
//
// A relay is dumb and safe. It knows keys and ciphertext only; it admits whom
// Config.Admit admits and nobody else; every queue, table and wait is bounded;
// and when a receiver is slow it drops packets instead of holding up others.
// With the other relays of its region, which SetMesh names, it forwards: a
// client of one reaches the clients of all.
package relay

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/derp"
	"mesh/identity"
)

// ErrClosed is returned for connections that arrive after Close.
var ErrClosed = errors.New("relay is closed")

// errRevoked ends a connection whose key is no longer admitted.
var errRevoked = errors.New("key is no longer admitted")

// Config sets up a Server. Durations and numbers of 0 mean their defaults.
type Config struct {
	// Key is the relay's own identity. It must be set.
	Key identity.NodePrivate
	// Admit decides whether the owner of key, connecting from source, may use
	// the relay: nil admits. It is called after the key was proven, and again
	// by Recheck; it may be called concurrently. A nil Admit refuses everyone.
	Admit func(ctx context.Context, key identity.NodePublic, source netip.Addr) error
	// Logger receives violations of the protocol (at warn level, one line for
	// each connection) and, at debug level, connections; nil is silent.
	Logger *zap.Logger

	LoginTimeout time.Duration // from the upgrade to the admission; default 10 s
	AdmitTimeout time.Duration // of one call of Admit; default 5 s
	WriteTimeout time.Duration // of one write to a client; default 2 s
	KeepAlive    time.Duration // interval; up to a twelfth is added at random; default 60 s

	DataPackets  int // queued for one client, that are not path discovery; default 512
	DataBytes    int // and their bytes; default 512 KiB
	DiscoPackets int // queued path discovery messages for one client; default 32

	MaxPending          int // connections that have not logged in; default 4096
	MaxPendingPerSource int // and of one source address (IPv6: /64); default 512
	MaxClients          int // logged-in connections; default 65536
	MaxPerSource        int // and of one source address (IPv6: /64); default 8192
	MaxPerKey           int // connections of one key, the oldest leaves first; default 8

	// BytesPerSecond bounds what one client may send, in bytes of frames. It is
	// told the rate at login, and whoever does not keep to it is read no
	// faster. 0 means no limit.
	BytesPerSecond int
	// BytesBurst is how much may come at once after a pause; default
	// BytesPerSecond, and at least one largest frame.
	BytesBurst int
}

func (c Config) withDefaults() Config {
	dur := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	num := func(n *int, def int) {
		if *n <= 0 {
			*n = def
		}
	}
	dur(&c.LoginTimeout, 10*time.Second)
	dur(&c.AdmitTimeout, 5*time.Second)
	dur(&c.WriteTimeout, 2*time.Second)
	dur(&c.KeepAlive, 60*time.Second)
	num(&c.MaxPending, 4096)
	num(&c.MaxPendingPerSource, 512)
	num(&c.MaxClients, 65536)
	num(&c.MaxPerSource, 8192)
	num(&c.MaxPerKey, 8)
	num(&c.BytesBurst, c.BytesPerSecond)
	c.BytesBurst = max(c.BytesBurst, derp.FrameHeaderLen+derp.MaxFrame)
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	return c
}

// Server is a relay. Make it with New; serve it through Serve, Handler or
// Accept; end it with Close.
type Server struct {
	cfg  Config
	pub  identity.NodePublic
	gate *gate
	meta metaCert

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // connections and HTTP servers

	counters counters

	mu     sync.RWMutex // guards what follows
	closed bool
	// peers holds the keys with at least one logged-in connection.
	peers map[identity.NodePublic]*peer
	// joining holds connections whose key is known but not admitted yet, so
	// that a revocation in this moment is not missed.
	joining map[*session]struct{}
	clients int                // logged-in connections
	sources map[netip.Addr]int // these by where they come from
	notice  []byte             // what clients are told since Drain; nil before
	// policy counts calls of Recheck; an answer of Admit from before is stale.
	policy  uint64
	servers map[*http.Server]struct{}
	mesh    mesh
}

// New returns a relay. It panics when cfg.Key is zero.
func New(cfg Config) *Server {
	cfg = cfg.withDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		cfg:     cfg,
		pub:     cfg.Key.Public(),
		gate:    newGate(cfg.MaxPending, cfg.MaxPendingPerSource),
		ctx:     ctx,
		cancel:  cancel,
		peers:   make(map[identity.NodePublic]*peer),
		joining: make(map[*session]struct{}),
		sources: make(map[netip.Addr]int),
		servers: make(map[*http.Server]struct{}),
		mesh:    newMesh(),
	}
}

// Key returns the relay's public key.
func (s *Server) Key() identity.NodePublic { return s.pub }

// peer is a key with its connections: those of this relay, and the other relays
// of the region that have some. What is not atomic is guarded by Server.mu.
type peer struct {
	key      identity.NodePublic
	sessions []*session // oldest first
	links    []*link    // to relays that have the key, the newest last
	// away says that the newest connection is at another relay: the packets go
	// there.
	away bool
	// active receives the packets for the key: the connection that sent last.
	active atomic.Pointer[session]
	// via is the way to the key when active is nil.
	via atomic.Pointer[link]
	// several says that there is more than one connection here, so that senders
	// keep active up to date.
	several atomic.Bool

	mu sync.Mutex // guards receivers
	// receivers are the keys that got a packet from this one and want to know
	// when it leaves.
	receivers map[identity.NodePublic]struct{}
}

// routeLocked brings active, via and several in line with sessions and links.
func (p *peer) routeLocked() {
	n, m := len(p.sessions), len(p.links)
	p.away = m > 0 && (p.away || n == 0)
	p.several.Store(n > 1 && !p.away)
	if p.away {
		p.via.Store(p.links[m-1])
		p.active.Store(nil)
		return
	}
	if a := p.active.Load(); n > 0 && (a == nil || !slices.Contains(p.sessions, a)) {
		p.active.Store(p.sessions[n-1])
	} else if n == 0 {
		p.active.Store(nil)
	}
	p.via.Store(nil)
}

// healthLocked tells the connections of the key here whether there are more.
func (p *peer) healthLocked() {
	var text []byte
	if len(p.sessions)+len(p.links) > 1 {
		text = []byte(healthDuplicate)
	}
	for _, c := range p.sessions {
		c.conn.EnqueueControl(derp.FrameHealth, text)
	}
}

// maxReceivers bounds peer.receivers. Beyond it those who still are connected
// are not told, and find out by themselves.
const maxReceivers = 1 << 14

func (p *peer) noteReceiver(key identity.NodePublic) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.receivers[key]; ok || len(p.receivers) >= maxReceivers {
		return
	}
	if p.receivers == nil {
		p.receivers = make(map[identity.NodePublic]struct{})
	}
	p.receivers[key] = struct{}{}
}

// lookup returns the connected peer with the key, or nil.
func (s *Server) lookup(key identity.NodePublic) *peer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.peers[key]
}

// healthDuplicate is what every connection of a key is told while there are several.
const healthDuplicate = "this node key is connected to the relay more than once"

// register makes an admitted session reachable. It returns errRevoked or
// ErrClosed, or errStale when Admit has to be asked again.
func (s *Server) register(c *session, policy uint64) error {
	s.mu.Lock()
	if err := s.mayJoinLocked(c, policy); err != nil {
		s.mu.Unlock()
		return err
	}
	delete(s.joining, c)
	if c.mesh {
		former := s.joinMeshLocked(c)
		s.mu.Unlock()
		if former != nil {
			former.end(errors.New("the relay connected again"))
		}
		return nil
	}
	p := s.peerLocked(c.key)
	p.sessions = append(p.sessions, c)
	p.away = false
	p.active.Store(c)
	p.routeLocked()
	c.peer = p
	s.clients++
	s.sources[sourceGroup(c.source)]++
	if s.notice != nil {
		c.conn.EnqueueControl(derp.FrameRestarting, s.notice)
	}
	var oldest *session
	if len(p.sessions) > s.cfg.MaxPerKey {
		oldest = p.sessions[0]
	}
	if len(p.sessions)+len(p.links) > 1 {
		p.healthLocked()
	}
	s.announceLocked(derp.FramePeerPresent, derp.PeerPresentPayload(c.key, c.source, derp.PresentRegular))
	s.mu.Unlock()
	if oldest != nil {
		oldest.end(errors.New("too many connections of one key"))
		s.unregister(oldest)
	}
	return nil
}

// peerLocked finds or makes the peer with a key.
func (s *Server) peerLocked(key identity.NodePublic) *peer {
	p := s.peers[key]
	if p == nil {
		p = &peer{key: key}
		s.peers[key] = p
	}
	return p
}

// errStale says that the answer of Admit was given before a Recheck.
var errStale = errors.New("admission is out of date")

func (s *Server) mayJoinLocked(c *session, policy uint64) error {
	switch {
	case s.closed:
		return ErrClosed
	case c.revoked:
		return errRevoked
	case s.policy != policy:
		return errStale
	case c.mesh:
		return s.mayMeshLocked(c)
	case s.clients >= s.cfg.MaxClients:
		return errors.New("too many clients")
	case s.sources[sourceGroup(c.source)] >= s.cfg.MaxPerSource:
		return errors.New("too many clients of this source")
	}
	return nil
}

// unregister makes a session unreachable and tells those who talked to its key
// when it was the last one. It may be called again.
func (s *Server) unregister(c *session) {
	s.mu.Lock()
	delete(s.joining, c)
	if c.mesh {
		s.leaveMeshLocked(c)
		s.mu.Unlock()
		return
	}
	p := c.peer
	if p == nil || !p.removeLocked(c) {
		s.mu.Unlock()
		return
	}
	s.clients--
	s.counters.dropped.Add(c.conn.Dropped()) // with Stats it is counted once at any moment
	s.counters.left.add(&c.traffic)
	if g := sourceGroup(c.source); s.sources[g] > 1 {
		s.sources[g]--
	} else {
		delete(s.sources, g)
	}
	if len(p.sessions) == 0 {
		raw := p.key.Bytes()
		s.announceLocked(derp.FramePeerGone, append(raw[:], byte(derp.PeerDisconnected)))
	}
	tell := s.shrunkLocked(p)
	s.mu.Unlock()
	tellGone(p.key, tell)
}

// shrunkLocked is called when one of a peer's connections or links was removed. It
// returns those who have to be told that the peer is gone, if it is.
func (s *Server) shrunkLocked(p *peer) (tell []*session) {
	p.routeLocked()
	if n := len(p.sessions) + len(p.links); n > 0 {
		if n == 1 {
			p.healthLocked()
		}
		return nil
	}
	delete(s.peers, p.key)
	p.mu.Lock()
	receivers := p.receivers
	p.receivers = nil
	p.mu.Unlock()
	for key := range receivers {
		if r := s.peers[key]; r != nil {
			tell = append(tell, r.sessions...)
		}
	}
	return tell
}

// tellGone tells clients that a peer is gone.
func tellGone(key identity.NodePublic, tell []*session) {
	for _, r := range tell {
		r.peerGone(key, derp.PeerDisconnected)
	}
}

// removeLocked takes c out of p.sessions and reports whether it was there.
func (p *peer) removeLocked(c *session) bool {
	for i, o := range p.sessions {
		if o == c {
			p.sessions = append(p.sessions[:i], p.sessions[i+1:]...)
			return true
		}
	}
	return false
}

// Revoke cuts every connection of the keys, including those about to log in,
// before it returns. It does not keep them from coming back: Admit has to
// refuse them from before the call on.
func (s *Server) Revoke(keys ...identity.NodePublic) {
	var cut []*session
	s.mu.Lock()
	for _, key := range keys {
		if p := s.peers[key]; p != nil {
			cut = append(cut, p.sessions...)
		}
	}
	if len(s.joining) > 0 {
		gone := make(map[identity.NodePublic]bool, len(keys))
		for _, key := range keys {
			gone[key] = true
		}
		for c := range s.joining {
			if gone[c.key] {
				c.revoked = true
				cut = append(cut, c)
			}
		}
	}
	s.mu.Unlock()
	for _, c := range cut {
		c.end(errRevoked)
	}
	for _, c := range cut {
		s.unregister(c)
	}
}

// recheckWorkers is how many calls of Admit Recheck makes at once.
const recheckWorkers = 8

// Recheck asks Admit about every connected key and source again, and cuts
// those it now refuses; it returns how many connections these were. A call of
// Admit that fails or exceeds its timeout counts as a refusal. When ctx ends
// early, those not asked yet stay connected.
func (s *Server) Recheck(ctx context.Context) int {
	s.mu.Lock()
	s.policy++
	var all []*session
	for _, p := range s.peers {
		all = append(all, p.sessions...)
	}
	s.mu.Unlock()

	work := make(chan *session)
	var cut atomic.Int64
	var wg sync.WaitGroup
	for range min(recheckWorkers, len(all)) {
		wg.Go(func() {
			for c := range work {
				if err := s.admit(ctx, c.key, c.source); err != nil && ctx.Err() == nil {
					c.end(errRevoked)
					s.unregister(c)
					cut.Add(1)
				}
			}
		})
	}
	for _, c := range all {
		if ctx.Err() != nil {
			break
		}
		work <- c
	}
	close(work)
	wg.Wait()
	return int(cut.Load())
}

// admit asks the configured judge.
func (s *Server) admit(ctx context.Context, key identity.NodePublic, source netip.Addr) error {
	if s.cfg.Admit == nil {
		return errors.New("this relay admits nobody")
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.AdmitTimeout)
	defer cancel()
	if err := s.cfg.Admit(ctx, key, source); err != nil {
		return err
	}
	return ctx.Err() // an answer after the time-out does not count
}

// Connected returns the keys that are logged in here, in no order.
func (s *Server) Connected() []identity.NodePublic {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := make([]identity.NodePublic, 0, len(s.peers))
	for key, p := range s.peers {
		if len(p.sessions) > 0 {
			keys = append(keys, key)
		}
	}
	return keys
}

// begin counts a goroutine that Close waits for; false means closed.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Add(1)
	return true
}

// Close cuts all connections and waits until all of them, and the calls of
// Serve, have ended. It may be called repeatedly and concurrently.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	servers := make([]*http.Server, 0, len(s.servers))
	for h := range s.servers {
		servers = append(servers, h)
	}
	s.mu.Unlock()
	s.cancel()
	for _, h := range servers {
		h.Close()
	}
	s.wg.Wait()
	return nil
}

// sourceOf returns the address of the other end, invalid when it has none.
func sourceOf(nc net.Conn) netip.Addr {
	if nc.RemoteAddr() == nil {
		return netip.Addr{}
	}
	ap, err := netip.ParseAddrPort(nc.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}
