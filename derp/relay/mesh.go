package relay

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/derp"
	"mesh/identity"
	"mesh/internal/backoff"
)

// Mesh names the other relays of the region, with which a relay forwards.
type Mesh struct {
	// Keys are secrets that the relays of the region share, 64 hexadecimal
	// digits each. The first is shown to the others; any of them is accepted,
	// so that a new one can come into use at one relay after the other.
	Keys  []string
	Peers []MeshPeer // at most maxLinks are used
}

// MeshPeer is another relay of the region. It is known by its key: the secret
// alone opens nothing.
type MeshPeer struct {
	Key    identity.NodePublic
	Target derp.Target
}

const (
	maxLinks = 32 // relays of one region
	maxKeys  = 4  // accepted secrets
	// A relay that answers no ping for as long as this is gone, and its clients
	// with it.
	meshPing    = 3 * time.Second
	meshBackoff = 3 * time.Second // longest wait between attempts to connect
	// Queues between relays carry the traffic of many.
	meshPackets = 8192
	meshBytes   = 8 << 20
	meshDisco   = 1024
	// meshWrite is how long another relay may take to read.
	meshWrite = 10 * time.Second
	// sessionSilent is how long a connection may leave a ping unanswered when
	// its key is also connected elsewhere.
	sessionSilent = 5 * time.Second
)

var (
	errNoMesh = errors.New("not a relay of this region")
	errBehind = errors.New("relay does not take what it asked for")
	errSilent = errors.New("silent, while its key is connected elsewhere")
)

// meshLimits are those of a connection on which another relay hears of clients:
// the list of all of them must fit.
func meshLimits(keepAlive time.Duration) derp.ConnConfig {
	return derp.ConnConfig{
		WriteTimeout: meshWrite, KeepAlive: keepAlive,
		ControlFrames: 1 << 17, ControlBytes: 1 << 23,
	}
}

// mesh is what a relay knows of the others of its region; guarded by Server.mu.
type mesh struct {
	keys     []string
	links    map[identity.NodePublic]*link    // to the others
	sessions map[identity.NodePublic]*session // of the others to us
	watchers map[*session]struct{}            // those of them that want to hear of clients
}

func newMesh() mesh {
	return mesh{
		links:    make(map[identity.NodePublic]*link),
		sessions: make(map[identity.NodePublic]*session),
		watchers: make(map[*session]struct{}),
	}
}

// SetMesh replaces what the relay knows of the others of its region. Those that
// stay the same stay connected; the others are cut off at once.
func (s *Server) SetMesh(m Mesh) {
	var end []*session
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.mesh.keys = append([]string(nil), m.Keys[:min(len(m.Keys), maxKeys)]...)
	next := make(map[identity.NodePublic]MeshPeer)
	for _, p := range m.Peers {
		if p.Key != s.pub && !p.Key.IsZero() && len(m.Keys) > 0 && len(next) < maxLinks {
			next[p.Key] = p
		}
	}
	for key, l := range s.mesh.links {
		if p, ok := next[key]; !ok || p != l.peer {
			l.cancel()
			delete(s.mesh.links, key)
		}
	}
	for key, c := range s.mesh.sessions {
		if _, ok := next[key]; !ok {
			end = append(end, c)
		}
	}
	for c := range s.joining {
		if _, ok := next[c.key]; c.mesh && !ok {
			c.revoked = true
			end = append(end, c)
		}
	}
	for key, p := range next {
		if s.mesh.links[key] == nil {
			l := &link{srv: s, peer: p, keys: make(map[identity.NodePublic]struct{})}
			l.ctx, l.cancel = context.WithCancel(s.ctx)
			s.mesh.links[key] = l
			s.wg.Go(l.run)
		}
	}
	s.mu.Unlock()
	for _, c := range end {
		c.end(errNoMesh)
		s.unregister(c)
	}
}

// isMesh reports whether a client is another relay of the region: its key, which
// it has proven, is one of theirs, and it knows the secret.
func (s *Server) isMesh(key identity.NodePublic, secret string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ok := 0
	for _, k := range s.mesh.keys {
		ok |= subtle.ConstantTimeCompare([]byte(k), []byte(secret))
	}
	return ok == 1 && s.mesh.links[key] != nil
}

// mayMeshLocked is isMesh at the moment of registration.
func (s *Server) mayMeshLocked(c *session) error {
	if s.mesh.links[c.key] == nil {
		return errNoMesh
	}
	return nil
}

// joinMeshLocked notes the connection of another relay, and returns the one
// that it replaces.
func (s *Server) joinMeshLocked(c *session) (former *session) {
	if former = s.mesh.sessions[c.key]; former != nil {
		s.leaveMeshLocked(former)
	}
	s.mesh.sessions[c.key] = c
	return former
}

func (s *Server) leaveMeshLocked(c *session) {
	delete(s.mesh.watchers, c)
	if s.mesh.sessions[c.key] == c {
		s.counters.left.add(&c.traffic)
		delete(s.mesh.sessions, c.key)
	}
}

// announceLocked tells the other relays about a client.
func (s *Server) announceLocked(t derp.FrameType, payload []byte) {
	for w := range s.mesh.watchers {
		if w.conn.EnqueueControl(t, payload) {
			// It missed something: it has to begin anew.
			s.counters.meshFull.Add(1)
			delete(s.mesh.watchers, w)
			w.end(errBehind)
		}
	}
}

// watch tells another relay of all clients, and from then on of those that come
// and go.
func (s *Server) watch(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, again := s.mesh.watchers[c]; again || s.mesh.sessions[c.key] != c {
		return
	}
	s.mesh.watchers[c] = struct{}{}
	for key, p := range s.peers {
		if n := len(p.sessions); n > 0 {
			c.conn.EnqueueControl(derp.FramePeerPresent, derp.PeerPresentPayload(key, p.sessions[n-1].source, derp.PresentRegular))
		}
	}
}

// handleMesh processes a frame that only another relay may send; false means
// that it is too short.
func (c *session) handleMesh(f derp.Frame) bool {
	if f.Type == derp.FrameWatchConns {
		c.srv.watch(c)
		return true
	}
	key, rest, ok := derp.SplitKey(f.Payload)
	if !ok {
		return false
	}
	if f.Type == derp.FrameClosePeer {
		c.srv.Revoke(key)
		return true
	}
	dst, packet, ok := derp.SplitKey(rest)
	if !ok {
		return false
	}
	if c.run.src != key {
		c.flush()
		c.run.src = key
	}
	c.collect(dst, packet)
	return true
}

// lastSession returns a connection of the peer at this relay, nil if it has none.
func (s *Server) lastSession(p *peer) *session {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := len(p.sessions); n > 0 {
		return p.sessions[n-1]
	}
	return nil
}

// link is the connection to another relay of the region: by it we hear of its
// clients, and forward to them.
type link struct {
	srv    *Server
	peer   MeshPeer
	ctx    context.Context
	cancel context.CancelFunc
	client atomic.Pointer[derp.Client] // nil while it is not connected

	keys map[identity.NodePublic]struct{} // its clients; guarded by Server.mu
	// listed says that what it tells of happens now. Of run's goroutine.
	listed bool
}

// forward sends the packets of a run; false means that there is no connection.
func (l *link) forward(src identity.NodePublic, r *run) bool {
	c := l.client.Load()
	if c == nil {
		return false
	}
	c.Forward(r.priority, src, r.dst, r.packets...)
	l.srv.counters.forwardedOut.Add(uint64(len(r.packets)))
	return true
}

// run connects, listens and connects again, until the link is not needed any more.
func (l *link) run() {
	s := l.srv
	log := s.cfg.Logger.With(zap.String("relay", l.peer.Target.Name))
	b := backoff.Backoff{Min: 100 * time.Millisecond, Max: meshBackoff}
	for l.ctx.Err() == nil {
		c, err := derp.Dial(l.ctx, derp.ClientConfig{
			Key: s.cfg.Key, Target: l.peer.Target, RelayKey: l.peer.Key, MeshKey: s.meshKey(), Logger: s.cfg.Logger,
			DialTimeout: meshWrite, WriteTimeout: meshWrite,
			QueuePackets: meshPackets, QueueBytes: meshBytes, QueueDisco: meshDisco,
		})
		if err == nil {
			b.Reset()
			log.Debug("forwarding to another relay of the region")
			err = l.serve(c)
		}
		if l.ctx.Err() == nil {
			log.Info("no connection to another relay of the region", zap.Error(err))
			b.Wait(l.ctx, 0, nil, nil)
		}
	}
}

func (s *Server) meshKey() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.mesh.keys) == 0 {
		return ""
	}
	return s.mesh.keys[0]
}

// serve listens to another relay until the connection ends.
func (l *link) serve(c *derp.Client) error {
	s := l.srv
	defer context.AfterFunc(l.ctx, func() { c.Close() })()
	pinged := make(chan struct{})
	ctx, cancel := context.WithCancel(l.ctx)
	l.listed = false
	listed := make(chan struct{})
	go func() {
		defer close(pinged)
		l.ping(ctx, c, listed)
	}()
	defer func() {
		cancel()
		c.Close()
		<-pinged
		l.client.Store(nil)
		s.counters.forwardedDropped.Add(c.Dropped())
		s.forgetLink(l)
	}()
	c.Watch()
	l.client.Store(c)
	for {
		m, err := c.Recv()
		if err != nil {
			return err
		}
		if !l.listed {
			select {
			case <-listed:
				l.listed = true
			default:
			}
		}
		switch m.Kind {
		case derp.KindPeerPresent:
			if m.Flags&derp.PresentMesh == 0 {
				s.linkHas(l, m.Peer)
			}
		case derp.KindPeerGone:
			s.linkLost(l, m.Peer)
		}
	}
}

// ping ends the connection when the other relay does not answer. The answer to
// the first ping comes behind the list of its clients: it closes listed.
func (l *link) ping(ctx context.Context, c *derp.Client, listed chan struct{}) {
	t := time.NewTicker(meshPing)
	defer t.Stop()
	for {
		pctx, cancel := context.WithTimeout(ctx, meshPing)
		_, err := c.Ping(pctx)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				c.Close()
			}
			return
		}
		if listed != nil {
			close(listed)
			listed = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// linkHas notes that a client is connected to another relay. Its newest
// connection is there, unless the relay only lists what it has.
func (s *Server) linkHas(l *link, key identity.NodePublic) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, had := l.keys[key]
	switch {
	case key == s.pub || s.mesh.links[key] != nil:
		return // a relay is not reached by others
	case !had && len(l.keys) >= s.cfg.MaxClients:
		s.counters.meshFull.Add(1)
		return
	}
	p := s.peerLocked(key)
	if had {
		p.dropLinkLocked(l)
	}
	l.keys[key] = struct{}{}
	if l.listed {
		p.links = append(p.links, l)
		p.away = true
	} else {
		// Who told of it as it happened knows better.
		p.links = append([]*link{l}, p.links...)
		for _, c := range p.sessions {
			s.probeLocked(c)
		}
	}
	p.routeLocked()
	if len(p.sessions) > 0 {
		p.healthLocked()
	}
}

// linkLost notes that a client left another relay.
func (s *Server) linkLost(l *link, key identity.NodePublic) {
	s.mu.Lock()
	if _, had := l.keys[key]; !had {
		s.mu.Unlock()
		return
	}
	delete(l.keys, key)
	p := s.peers[key]
	p.dropLinkLocked(l)
	tell := s.shrunkLocked(p)
	s.mu.Unlock()
	tellGone(key, tell)
}

// forgetLink notes that all clients of another relay are gone.
func (s *Server) forgetLink(l *link) {
	gone := make(map[identity.NodePublic][]*session)
	s.mu.Lock()
	for key := range l.keys {
		p := s.peers[key]
		p.dropLinkLocked(l)
		gone[key] = s.shrunkLocked(p)
	}
	clear(l.keys)
	s.mu.Unlock()
	for key, tell := range gone {
		tellGone(key, tell)
	}
}

func (p *peer) dropLinkLocked(l *link) {
	for i, o := range p.links {
		if o == l {
			p.links = append(p.links[:i:i], p.links[i+1:]...)
			return
		}
	}
}

// probeLocked makes sure that a connection whose key is connected elsewhere too
// is alive: a node that moved may have left it without a word.
func (s *Server) probeLocked(c *session) {
	if s.closed || !c.acksPings || c.probed {
		return
	}
	c.probed = true
	before := c.pongs.Load()
	c.conn.EnqueueControl(derp.FramePing, make([]byte, derp.PingLen))
	s.wg.Go(func() {
		t := time.NewTimer(sessionSilent)
		defer t.Stop()
		select {
		case <-c.conn.Done():
			return
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		if c.pongs.Load() == before {
			c.end(fmt.Errorf("%w for %v", errSilent, sessionSilent))
			s.unregister(c)
			return
		}
		s.mu.Lock()
		c.probed = false
		s.mu.Unlock()
	})
}
