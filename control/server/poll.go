package server

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
)

// Limits on how often another connection may take over a node's poll: clones
// of one identity would otherwise chase each other for ever.
const (
	swapBurst = 10
	swapEvery = 5 * time.Second
)

// serveMap is POST /machine/map.
func (s *Server) serveMap(w http.ResponseWriter, r *http.Request, c *client) {
	var req wire.MapRequest
	if !readJSON(w, r, &req) {
		return
	}
	if err := s.admitMap(r.Context(), c, &req); err != nil {
		s.meters.denied(atMap, err, denyFail)
		if wire.CodeOf(err) == "" {
			s.broken(w, "map request failed", err)
			return
		}
		refuse(w, err)
		return
	}
	c.known()
	switch {
	case req.Stream:
		s.poll(w, r, c, &req)
	case req.OmitPeers:
		if err := s.report(r.Context(), c, &req); err != nil {
			refuse(w, err)
			return
		}
		w.WriteHeader(http.StatusOK)
	default:
		s.fetch(w, c, &req)
	}
}

// admitMap checks that the machine owns the node key and the key is good.
func (s *Server) admitMap(ctx context.Context, c *client, req *wire.MapRequest) error {
	if req.Version < wire.MinCapabilityVersion || c.version < wire.MinCapabilityVersion {
		return wire.ErrVersionTooOld
	}
	own := func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, err := s.ownNode(c, req)
		return err
	}
	err := own()
	if errors.Is(err, wire.ErrNodeUnknown) && s.replica.store != nil && s.requests.take(c.source) {
		// It may have enrolled at another replica a moment ago. To look stops
		// others, so it is bounded also for those who have a node here.
		s.catchUp()
		err = own()
	}
	if errors.Is(err, wire.ErrNodeUnknown) {
		dead, derr := s.store.DeadKey(ctx, req.NodeKey)
		switch {
		case derr == nil && dead.Removed && dead.Machine == c.machine:
			return wire.ErrNodeRevoked
		case derr != nil && !errors.Is(derr, store.ErrNotFound):
			return derr
		}
	}
	return err
}

// ownNode returns the node of a request. Server.mu is held.
func (s *Server) ownNode(c *client, req *wire.MapRequest) (*node, error) {
	n := s.nodes.byKey[req.NodeKey]
	switch {
	case n == nil:
		return nil, wire.ErrNodeUnknown
	case n.Machine != c.machine:
		return nil, wire.ErrMachineMismatch
	case superseded(n, req.MeshInstance):
		return nil, wire.ErrCloned
	case s.suspended(&n.Node):
		return nil, wire.ErrUserSuspended
	case n.expired || expiredAt(n.Expires, s.cfg.Now()):
		return nil, wire.ErrNodeKeyExpired
	}
	return n, nil
}

// report stores what a lite update says.
func (s *Server) report(ctx context.Context, c *client, req *wire.MapRequest) error {
	if req.ReadOnly {
		return nil
	}
	info := cleanHostinfo(req.Hostinfo)
	endpoints := cleanEndpoints(req.Endpoints)
	s.mu.Lock()
	n, err := s.ownNode(c, req)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	if !req.DiscoKey.IsZero() {
		n.Disco = req.DiscoKey
	}
	n.Endpoints = endpoints
	n.Cap = req.Version
	rerouted := false
	if req.Hostinfo != nil {
		rerouted = n.Hostinfo == nil || !slices.Equal(n.Hostinfo.RoutableIPs, info.RoutableIPs)
		n.Hostinfo = info
		if ni := req.Hostinfo.NetInfo; ni != nil && ni.PreferredDERP > 0 && ni.PreferredDERP <= 65535 {
			n.HomeDERP = ni.PreferredDERP
		}
	}
	if n.HomeDERP == 0 {
		n.HomeDERP = s.nodes.lastHome(n.Machine)
	}
	s.unsaved[n.ID] = struct{}{}
	s.applied(n.ID, req.MeshMapVersion)
	s.judge(n, req.MeshFlows)
	ahead := req.MeshApplied > s.policy.Version
	s.changed(n)
	if rerouted {
		s.entitle(n)
	}
	id, rename := n.ID, !n.Named && info.Hostname != "" && label(info.Hostname) != n.Hostname
	s.mu.Unlock()
	if rename {
		s.rename(ctx, id, label(info.Hostname))
	}
	if ahead {
		s.noteAhead(ctx, id, req.MeshApplied)
	}
	return nil
}

// rename follows a node's change of host name.
func (s *Server) rename(ctx context.Context, id wire.NodeID, hostname string) {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	n := s.nodes.byID[id]
	if n == nil || n.Named || n.Hostname == hostname {
		s.mu.Unlock()
		return
	}
	name := s.nodes.names.free(hostname, id)
	s.mu.Unlock()
	if err := s.store.RenameNode(context.WithoutCancel(ctx), "node", id, hostname, name, false, s.cfg.Now()); err != nil {
		s.log.Error("rename failed", zap.Int64("node", int64(id)), zap.Error(err))
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes.rename(n, hostname, name)
	s.changed(n)
}

// fetch answers with one complete message.
func (s *Server) fetch(w http.ResponseWriter, c *client, req *wire.MapRequest) {
	s.mu.Lock()
	n, err := s.ownNode(c, req)
	if err != nil {
		s.mu.Unlock()
		refuse(w, err)
		return
	}
	st := newStream(n.ID, c)
	fresh := s.first(st)
	s.mu.Unlock()
	m, err := s.firstMessages(st, fresh, false)
	if err == nil {
		f := s.newFramer(w, req.Compress, c)
		defer f.close()
		err = f.sendMap(m[0])
	}
	if err != nil {
		s.log.Debug("map answer was not delivered", zap.Error(err))
	}
}

// poll serves a map stream until it ends.
func (s *Server) poll(w http.ResponseWriter, r *http.Request, c *client, req *wire.MapRequest) {
	if s.pace.begin.take(r.Context()) != nil {
		return
	}
	st, fresh, resumed, err := s.attach(c, req)
	s.pace.begin.done()
	if err != nil {
		if errors.Is(err, errSwaps) {
			s.meters.denied(atMap, nil, denyRate)
			tooMany(w, int(swapEvery/time.Second))
			return
		}
		refuse(w, err)
		return
	}
	s.pace.open.Add(1)
	defer s.pace.open.Add(-1)
	defer s.detach(st)
	f := s.newFramer(w, req.Compress, c)
	defer f.close()
	first, err := s.firstMessages(st, fresh, resumed)
	for i := 0; err == nil && i < len(first); i++ {
		err = f.sendMap(first[i])
	}
	first, fresh = nil, news{}
	if err == nil {
		err = s.feed(r.Context(), st, f)
	}
	if !errors.Is(err, errStreamOver) {
		s.log.Debug("map stream ended", zap.Int64("node", int64(st.id)), zap.Error(err))
	}
}

var (
	errStreamOver = errors.New("stream is over")
	errSwaps      = errors.New("the poll changes hands too often")
)

// silence returns how long a stream may say nothing, beginning now. Nodes give a
// stream up after wire.Watchdog. The jitter keeps many streams from waking the
// server at once, and the grid makes it wake once for some of them.
func (s *Server) silence() time.Duration {
	d := wire.KeepAliveInterval + rand.N(9*time.Second)
	return d - (time.Since(s.began)+d)%keepAliveGrid
}

const keepAliveGrid = 500 * time.Millisecond

// feed sends what is new, until the stream is over.
func (s *Server) feed(ctx context.Context, st *stream, f *framer) error {
	quiet, last := s.silence(), time.Now()
	idle := time.NewTimer(quiet)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-idle.C:
			// What woke the stream and was no news to it does not put off the
			// keep-alive.
			if st.spoke.After(last) {
				last = st.spoke
			}
			if rest := quiet - time.Since(last); rest > 0 {
				idle.Reset(rest)
				continue
			}
			if err := f.send(&wire.MapResponse{KeepAlive: true}); err != nil {
				return err
			}
			quiet, last = s.silence(), time.Now()
			idle.Reset(quiet)
		case <-st.wake:
			if err := s.tell(ctx, st, f); err != nil {
				return err
			}
		}
	}
}

// tell sends what is pending, if it is news to the node.
func (s *Server) tell(ctx context.Context, st *stream, f *framer) error {
	woke := time.Now()
	// What is rare goes out at once; what comes in bursts goes out together.
	wait := max(s.cfg.Gather-woke.Sub(st.spoke), s.pace.hold(&st.credit, woke), 0)
	if wait > 0 {
		gather := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			gather.Stop()
			return ctx.Err()
		case <-gather.C:
		case <-st.urgent:
			gather.Stop()
		}
	}
	if err := s.pace.speak.take(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	n := s.collect(st)
	s.mu.Unlock()
	msgs, err := st.messages(n)
	s.pace.speak.done()
	if err != nil {
		return err
	}
	for _, m := range msgs {
		if err := f.sendMap(m); err != nil {
			return err
		}
		st.spoke = time.Now()
	}
	if len(msgs) > 0 {
		s.pace.late(st.spoke.Sub(woke) - wait)
	}
	if n.ended {
		return errStreamOver
	}
	if len(msgs) > 0 {
		s.meters.mapSeconds.Observe(st.spoke.Sub(woke).Seconds())
	}
	return nil
}

// attach makes a new stream the node's poll, in place of a former one, which it
// may resume.
func (s *Server) attach(c *client, req *wire.MapRequest) (st *stream, fresh news, resumed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.ownNode(c, req)
	if err != nil {
		return nil, news{}, false, err
	}
	now := s.cfg.Now()
	replaced, err := s.claim(n, req.MeshInstance, false)
	if err != nil {
		return nil, news{}, false, err
	}
	if replaced {
		s.noteCopy(n, c.source)
	}
	instance := cleanInstance(req.MeshInstance)
	if old := n.stream; old != nil {
		code := wire.ErrorCode("")
		if old.client != c && (instance == "" || old.instance != instance) {
			if !replaced && !n.swap(now) {
				return nil, news{}, false, errSwaps
			}
			// Either the old connection is dead, and nobody hears this, or
			// somebody runs a copy of the node's state.
			code = wire.CodeCloned
		}
		old.end(code)
	}
	st = newStream(n.ID, c)
	st.instance = instance
	if former := n.stream; former != nil {
		resumed = st.resume(former, false, req.MapSessionHandle, req.MapSessionSeq)
	} else if n.parkedUntil().After(now) {
		resumed = st.resume(n.parked, true, req.MapSessionHandle, req.MapSessionSeq)
	}
	if n.parked = nil; !resumed {
		st.begin()
	}
	st.reports = req.MeshReports
	if st.reports {
		st.pending.version = s.owed(n.ID)
	}
	n.stream = st
	if s.replica.store != nil {
		n.Replica, s.replica.claims[n.ID] = s.replica.name(), true
	}
	n.unshown = false // it is there: peers may know
	n.online, n.offlineAt = presenceOnline, time.Time{}
	n.Polled = true
	// A poll does not change what the node reports, as lite updates do; but
	// without a disco key nobody could reach it until the first of these.
	if n.Disco.IsZero() {
		n.Disco = req.DiscoKey
	}
	if n.Cap == 0 {
		n.Cap = req.Version
	}
	s.unsaved[n.ID] = struct{}{}
	s.changed(n)
	if n.advertises() {
		s.entitle(n) // it routes again
	}
	return st, s.first(st), resumed, nil
}

// swap takes a token for a change of connection.
func (n *node) swap(now time.Time) bool {
	if n.swaps.at.IsZero() {
		n.swaps = bucket{swapBurst, now}
	}
	if d := now.Sub(n.swaps.at); d > 0 {
		n.swaps.tokens = min(swapBurst, n.swaps.tokens+float64(d)/float64(swapEvery))
		n.swaps.at = now
	}
	if n.swaps.tokens < 1 {
		return false
	}
	n.swaps.tokens--
	return true
}

// detach notes that a stream is over. One that was replaced changes nothing.
func (s *Server) detach(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[st.id]
	if n == nil || n.stream != st {
		return
	}
	now := s.cfg.Now()
	n.stream, n.Replica = nil, ""
	if st.handle != "" {
		n.parked = st
	}
	n.LastSeen, n.idleSince = now, now
	n.offlineAt = now.Add(s.cfg.OfflineGrace)
	s.unsaved[n.ID] = struct{}{}
	s.scheduleNode(n)
}
