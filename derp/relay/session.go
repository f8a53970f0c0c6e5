package relay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"mesh/derp"
	"mesh/identity"
)

// session is one connection of one client.
type session struct {
	srv    *Server
	conn   *derp.Conn
	source netip.Addr
	key    identity.NodePublic // set before anyone else sees the session
	logger *zap.Logger

	peer    *peer // set by Server.register; guarded by Server.mu until then
	revoked bool  // guarded by Server.mu
	probed  bool  // whether it is alive is being found out; guarded by Server.mu

	// mesh says that it is another relay, acksPings that it answers pings. Both
	// are set before anyone else sees the session.
	mesh, acksPings bool

	traffic traffic       // what it sent
	pongs   atomic.Uint64 // answers to our pings
	home    atomic.Bool   // the client calls this relay its home
	ended   atomic.Bool   // end was called: nothing is passed on any more
	endOnce sync.Once
	cause   error // why; set by endOnce

	// What follows belongs to the reading goroutine.
	limiter *rate.Limiter // of received bytes; nil = none
	unknown *rate.Limiter // of answers about unknown keys
	run     run
}

// run is a sequence of packets for one receiver, passed on under one lock.
type run struct {
	src      identity.NodePublic // of packets that another relay forwards
	dst      identity.NodePublic
	priority derp.Priority
	packets  [][]byte
	bytes    int
}

const (
	maxRun = 128 // packets in a run
	// Answers about unknown keys: at most one each second after a few.
	unknownRate  = 1
	unknownBurst = 3
)

// Accept serves one connection, on which the protocol is spoken from now on,
// until it ends, ctx ends, or the Server is closed; it then closes nc. rw, if
// not nil, may hold bytes that were already read. It returns why the
// connection ended; io.EOF when the client closed it.
func (s *Server) Accept(ctx context.Context, nc net.Conn, rw *bufio.ReadWriter) error {
	if !s.begin() {
		nc.Close()
		return ErrClosed
	}
	defer s.wg.Done()

	early, nc, pass, err := s.takeOver(nc, rw)
	if err != nil {
		nc.Close()
		return err
	}
	defer pass.leave()

	cfg := &s.cfg
	c := &session{
		srv:    s,
		source: sourceOf(nc),
		conn: derp.NewConn(nc, early, derp.ConnConfig{
			WriteTimeout: cfg.WriteTimeout,
			KeepAlive:    cfg.KeepAlive + rand.N(cfg.KeepAlive/12+1),
			DataPackets:  cfg.DataPackets,
			DataBytes:    cfg.DataBytes,
			DiscoPackets: cfg.DiscoPackets,
			Fair:         true,
		}),
		unknown: rate.NewLimiter(unknownRate, unknownBurst),
	}
	c.logger = cfg.Logger.With(zap.Stringer("source", c.source))
	if cfg.BytesPerSecond > 0 {
		c.limiter = rate.NewLimiter(rate.Limit(cfg.BytesPerSecond), cfg.BytesBurst)
	}
	defer context.AfterFunc(ctx, func() { c.end(ctx.Err()) })()
	defer context.AfterFunc(s.ctx, func() { c.end(ErrClosed) })()

	err = c.serve(nc, pass)
	c.end(err)
	if errors.Is(c.cause, derp.ErrProtocol) {
		s.counters.violations.Add(1)
		if c.peer != nil { // before the login anyone could fill the log
			c.logger.Warn("client broke the protocol", zap.Error(c.cause))
		}
	} else {
		c.logger.Debug("relay client left", zap.Error(c.cause))
	}
	return c.cause
}

// serve logs the client in and passes its packets on until something fails.
func (c *session) serve(nc net.Conn, pass *ticket) error {
	s := c.srv
	defer s.unregister(c)
	if err := c.login(nc); err != nil {
		return fmt.Errorf("login: %w", err)
	}
	pass.leave()
	s.counters.accepted.Add(1)

	var writer sync.WaitGroup
	writer.Go(func() {
		if err := c.conn.WriteLoop(); err != nil {
			c.end(err)
		}
	})
	err := c.read()
	c.end(err)
	s.unregister(c)
	writer.Wait()
	return err
}

// end cuts the connection at once. The first cause stays.
func (c *session) end(cause error) {
	c.endOnce.Do(func() {
		c.cause = cause
		c.ended.Store(true)
		c.conn.Close()
	})
}

// login exchanges keys, asks for admission and registers the session.
func (c *session) login(nc net.Conn) error {
	s := c.srv
	nc.SetDeadline(time.Now().Add(s.cfg.LoginTimeout))
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.LoginTimeout)
	defer cancel()

	if err := c.conn.WriteFrame(derp.FrameServerKey, derp.ServerKeyPayload(s.pub)); err != nil {
		return err
	}
	f, err := c.conn.ReadFrame()
	if err != nil {
		return err
	}
	if f.Type != derp.FrameClientInfo {
		return fmt.Errorf("%w: frame type %#x before login", derp.ErrProtocol, byte(f.Type))
	}
	key, who, err := derp.OpenClientInfo(s.cfg.Key, f.Payload)
	if err != nil {
		return err
	}
	c.key = key
	c.logger = c.logger.With(zap.String("node", key.Short()))
	c.acksPings = who.CanAckPings
	if who.MeshKey != "" {
		if !s.isMesh(key, who.MeshKey) {
			s.counters.refused.Add(1)
			return errNoMesh
		}
		c.mesh, c.limiter, c.peer = true, nil, &peer{key: key}
		c.conn.SetLimits(meshLimits(s.cfg.KeepAlive))
	}

	if err := c.join(ctx); err != nil {
		return err
	}
	// The connection is known to others, but nothing is written before this:
	// WriteLoop does not run yet.
	info := derp.ServerInfo{Version: derp.Version}
	if c.limiter != nil {
		info.TokenBucketBytesPerSecond, info.TokenBucketBytesBurst = s.cfg.BytesPerSecond, s.cfg.BytesBurst
	}
	if err := c.conn.WriteFrame(derp.FrameServerInfo, derp.SealServerInfo(s.cfg.Key, key, info)); err != nil {
		return err
	}
	return nc.SetDeadline(time.Time{})
}

// join asks Admit and registers the session, again when the rules changed in
// between.
func (c *session) join(ctx context.Context) error {
	s := c.srv
	s.mu.Lock()
	s.joining[c] = struct{}{}
	policy := s.policy
	s.mu.Unlock()
	for {
		// A relay of the region has proven that it is one.
		if !c.mesh {
			if err := s.admit(ctx, c.key, c.source); err != nil {
				s.counters.refused.Add(1)
				return fmt.Errorf("not admitted: %w", err)
			}
		}
		err := s.register(c, policy)
		if !errors.Is(err, errStale) {
			return err
		}
		s.mu.RLock()
		policy = s.policy
		s.mu.RUnlock()
	}
}

// read handles frames until the connection ends.
func (c *session) read() error {
	for {
		f, err := c.conn.ReadFrame()
		if err != nil {
			return err
		}
		if c.peer.several.Load() {
			c.peer.active.Store(c) // the last one to send is the one in use
			if c.ended.Load() || !c.peer.several.Load() {
				c.srv.reroute(c.peer)
			}
		}
		total := 0
		for ok := true; ok; f, ok = c.conn.Buffered() {
			total += derp.FrameHeaderLen + len(f.Payload)
			if err := c.handle(f); err != nil {
				c.flush()
				return err
			}
			if c.ended.Load() {
				return c.cause
			}
			if c.limiter != nil && total >= derp.MaxFrame {
				break
			}
		}
		c.flush()
		if c.limiter != nil {
			if err := c.pause(total); err != nil {
				return err
			}
		}
	}
}

// reroute undoes an active.Store that came after a change of the peer.
func (s *Server) reroute(p *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.routeLocked()
}

// pause waits until the client may send on; TCP makes it wait as well.
func (c *session) pause(n int) error {
	r := c.limiter.ReserveN(time.Now(), min(n, c.limiter.Burst()))
	d := r.Delay()
	if d <= 0 {
		return nil
	}
	c.srv.counters.paused.Add(int64(d))
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-c.conn.Done():
		return c.cause
	}
}

// handle processes one frame. Packets are collected in c.run.
func (c *session) handle(f derp.Frame) error {
	bad := func(what string) error {
		return fmt.Errorf("%w: %s: frame type %#x of %d bytes", derp.ErrProtocol, what, byte(f.Type), len(f.Payload))
	}
	switch f.Type {
	case derp.FrameSendPacket:
		dst, packet, ok := derp.SplitKey(f.Payload)
		if !ok {
			return bad("too short")
		}
		c.collect(dst, packet)
	case derp.FrameNotePreferred:
		if len(f.Payload) != 1 {
			return bad("wrong length")
		}
		c.home.Store(f.Payload[0] != 0)
	case derp.FramePing:
		if len(f.Payload) < derp.PingLen || len(f.Payload) > derp.MaxPing {
			return bad("wrong length")
		}
		c.conn.EnqueuePong([derp.PingLen]byte(f.Payload))
	case derp.FramePong:
		c.pongs.Add(1)
	case derp.FrameForwardPacket, derp.FrameWatchConns, derp.FrameClosePeer:
		if !c.mesh {
			return bad("client is no mesh peer")
		}
		if !c.handleMesh(f) {
			return bad("too short")
		}
	case derp.FrameServerKey, derp.FrameServerInfo, derp.FrameRecvPacket, derp.FramePeerGone,
		derp.FramePeerPresent, derp.FrameHealth, derp.FrameRestarting:
		return bad("only relays send this")
	case derp.FrameClientInfo:
		return bad("second login")
	}
	// Keep-alives and frames of a later version mean nothing here.
	return nil
}

// collect adds a packet to the run, after passing on one that does not fit.
func (c *session) collect(dst identity.NodePublic, packet []byte) {
	p := derp.PacketPriority(packet)
	r := &c.run
	if len(r.packets) > 0 && (r.dst != dst || r.priority != p || len(r.packets) >= maxRun) {
		c.flush()
	}
	r.dst, r.priority = dst, p
	r.packets = append(r.packets, packet)
	r.bytes += len(packet)
}

// flush passes the run on.
func (c *session) flush() {
	r := &c.run
	n := len(r.packets)
	if n == 0 {
		return
	}
	k := &c.srv.counters
	defer func() { r.packets, r.bytes = r.packets[:0], 0 }()
	if c.mesh {
		k.forwardedIn.Add(uint64(n))
	} else {
		c.traffic.packetsIn.Add(uint64(n))
		c.traffic.bytesIn.Add(uint64(r.bytes))
	}
	if c.ended.Load() {
		return // revoked while its packets were in our hands
	}
	var dst *session
	p := c.srv.lookup(r.dst)
	if p != nil {
		dst = p.active.Load()
	}
	switch {
	case dst != nil:
	case p == nil:
	case c.mesh:
		// Its newest connection is elsewhere, and whoever sent this will know
		// soon. What was forwarded once is not forwarded again.
		dst = c.srv.lastSession(p)
	default:
		if l := p.via.Load(); l != nil && l.forward(c.key, r) {
			return
		}
	}
	if dst == nil {
		k.unknown.Add(uint64(n))
		if r.priority == derp.Disco && !c.mesh && c.unknown.Allow() {
			c.peerGone(r.dst, derp.PeerNotHere)
		}
		return
	}
	// Before the packets, so that a receiver never misses the end of a sender
	// it has heard from.
	src := c.key
	if !c.mesh {
		c.peer.noteReceiver(r.dst)
	} else {
		src = r.src
		if from := c.srv.lookup(src); from != nil {
			from.noteReceiver(r.dst)
		}
	}
	if dst.conn.EnqueuePackets(r.priority, derp.FrameRecvPacket, src, r.packets...) {
		// We are faster than the writer: let it run before we drop more.
		runtime.Gosched()
	}
	c.traffic.packetsOut.Add(uint64(n))
	c.traffic.bytesOut.Add(uint64(r.bytes))
}

// peerGone tells the client that the relay does not reach key.
func (c *session) peerGone(key identity.NodePublic, why derp.PeerGoneReason) {
	raw := key.Bytes()
	c.conn.EnqueueControl(derp.FramePeerGone, append(raw[:], byte(why)))
}
