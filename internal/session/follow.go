package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
	"mesh/internal/engine"
	"mesh/internal/netmap"
	"mesh/internal/path"
	"mesh/netstack"
)

// readyTimeout bounds how long a node that has its map waits for a relay or for
// its own endpoints before it says that it is up all the same.
const readyTimeout = 10 * time.Second

// mapTimeout bounds how long a node that the control server accepted waits for
// its first map before the start fails.
const mapTimeout = 60 * time.Second

// drainTimeout bounds how long the resets of a node that leaves may take.
const drainTimeout = 200 * time.Millisecond

// follow runs the data plane and keeps it in step with the control server.
func (s *Session) follow(e *enrolment) (err error) {
	var wg sync.WaitGroup
	defer wg.Wait()

	saved, err := e.savedMap()
	if err != nil {
		return err
	}
	// A node that can come up without the control server does not wait for it
	// for long; for any other a failure to enrol is the caller's to hear.
	ctx, cancel := s.ctx, context.CancelFunc(func() {})
	if saved != nil {
		ctx, cancel = context.WithTimeoutCause(s.ctx, patience, errNoAnswer)
	}
	trouble := e.register(ctx, true)
	cancel()
	if trouble != nil {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if saved == nil || !worthRetry(trouble) {
			return trouble
		}
		s.setTrouble(trouble)
	}

	if err := s.startDataPlane(e); err != nil {
		return err
	}
	defer s.stopDataPlane(e, &err)

	fatal := make(chan error, 1)
	first := make(chan struct{})
	if saved != nil {
		// What was in force when the node last ran is in force again, until
		// the control server says otherwise.
		s.apply(saved, netmap.Rebase(nil, saved))
		close(first)
	}
	wg.Go(func() {
		if err := s.keepRegistering(e, trouble); err != nil {
			fatal <- err
			return
		}
		var once sync.Once
		fatal <- s.coordinate(e, saved, func() {
			once.Do(func() {
				if saved == nil {
					close(first)
				}
			})
		})
	})

	late := time.NewTimer(mapTimeout)
	defer late.Stop()
	select {
	case <-first:
	case err := <-fatal:
		return s.because(err)
	case <-late.C:
		return fmt.Errorf("control server %s accepted this node but sent no netmap within %v: %w",
			s.cfg.ControlURL, mapTimeout, cmp.Or(s.Trouble(), errNoAnswer))
	}
	s.settle(e)
	select {
	case err := <-fatal:
		return s.because(err)
	default:
	}
	close(s.up)
	return s.because(<-fatal)
}

var errNoAnswer = errors.New("control server does not answer")

// because prefers the reason for which the session was stopped.
func (s *Session) because(err error) error {
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	return err
}

// worthRetry reports whether a failure to register may pass by itself.
func worthRetry(err error) bool {
	return errors.Is(err, errNoAnswer) || control.IsTemporary(err)
}

// savedMap is the map with which an enrolled node can start by itself, nil if
// there is none.
func (e *enrolment) savedMap() (*netmap.Map, error) {
	if !e.state.Enrolled {
		return nil, nil
	}
	m, at, err := e.client.SavedMap(e.store, e.state.Node.Public())
	switch {
	case err == nil:
		e.log.Debug("saved netmap loaded", zap.Time("saved", at), zap.Int("peers", m.NumPeers()))
		return m, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, control.ErrBadCache):
		e.log.Warn("the saved netmap is not used", zap.Error(err))
		return nil, nil
	}
	return nil, err
}

// keepRegistering goes on after a failure until the control server has accepted
// the node, or refused it for good. The data plane runs, so the node key stays.
func (s *Session) keepRegistering(e *enrolment, err error) error {
	wait := backoff.Backoff{Max: control.QuickRetry}
	for since := time.Now(); err != nil; {
		if s.ctx.Err() != nil || !worthRetry(err) {
			return err
		}
		s.setTrouble(err)
		if werr := wait.Wait(s.ctx, control.RetryAfter(err), nil, err); werr != nil {
			return werr
		}
		if time.Since(since) > control.ShortOutage {
			wait.Max = backoff.DefaultMax
		}
		err = e.register(s.ctx, false)
	}
	return nil
}

// startDataPlane opens sockets and starts stack and engine.
func (s *Session) startDataPlane(e *enrolment) error {
	// The stack hands its packets to the engine, which is made with the
	// stack's other side: nothing leaves before there are addresses.
	var eng *engine.Engine
	started := make(chan struct{})
	stack, err := netstack.New(netstack.Config{Out: func(packets [][]byte) {
		<-started
		if eng != nil {
			eng.Out(packets)
		}
	}})
	if err != nil {
		return fmt.Errorf("start network stack: %w", err)
	}
	s.disco = identity.NewDisco()
	eng, err = engine.New(engine.Config{
		Key:               e.state.Node,
		Disco:             s.disco,
		Link:              link{stack},
		Port:              s.cfg.Port,
		RelayOnly:         s.cfg.RelayOnly,
		LoopbackEndpoints: e.client.Local(),
		ListenUDP:         s.cfg.ListenUDP,
		DialTCP:           s.cfg.DialTCP,
		Report:            s.report,
		Logger:            s.log,
	})
	close(started)
	if err != nil {
		stack.Close()
		return err
	}
	s.stack, s.engine = stack, eng
	return nil
}

// report keeps the latest report of path for coordinate.
func (s *Session) report(r path.Report) {
	s.mu.Lock()
	s.latest = &r
	told := s.told
	s.mu.Unlock()
	if told != nil {
		told()
	}
}

// stopDataPlane ends all connections with the reason for the end, says goodbye
// and frees everything.
func (s *Session) stopDataPlane(e *enrolment, why *error) {
	s.cancel(*why)
	*why = revoked(*why)
	s.mu.Lock()
	s.end = *why // so that what fails from now on says so
	s.mu.Unlock()
	if s.cfg.Ephemeral && errors.Is(*why, net.ErrClosed) {
		e.logout()
	}
	if errors.Is(*why, engine.ErrRevoked) {
		// Peers hear from control that this node is gone, and why. A reset
		// from here would only come before that and say less.
		s.engine.Close()
	}
	s.engine.CutAll(*why)
	s.stack.Close()
	s.engine.Drain(drainTimeout)
	if err := s.engine.Close(); err != nil {
		s.log.Debug("close data plane", zap.Error(err))
	}
}

// apply puts a map in force and reports whether all of it is. It is called by
// one goroutine at a time.
func (s *Session) apply(m *netmap.Map, d netmap.Delta) bool {
	err := s.engine.Apply(m, d)
	if err != nil {
		s.log.Warn("netmap applied in part", zap.Error(err))
	}
	return err == nil
}

// coordinate follows the map stream until the session stops or the control
// server puts the node out. onMap is called after each map is in force.
func (s *Session) coordinate(e *enrolment, inForce *netmap.Map, onMap func()) error {
	var cs *control.Session
	cs = e.client.NewSession(control.SessionConfig{
		NodeKey: e.state.Node.Public(),
		InForce: inForce,
		Store:   e.store,
		OnMap: func(m *netmap.Map, d netmap.Delta) {
			if s.apply(m, d) {
				cs.SetApplied(m.PolicyVersion())
			}
			onMap()
		},
		OnState: func(err error) { s.setTrouble(err) },
	})
	tell := func() { cs.SetHostState(s.hostState(e)) }
	s.mu.Lock()
	s.told = tell
	s.mu.Unlock()
	tell()
	return cs.Run(s.ctx)
}

// hostState is what control should know of this node now.
func (s *Session) hostState(e *enrolment) control.HostState {
	h := control.HostState{DiscoKey: s.disco.Public(), Hostinfo: e.hostinfo()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.latest; r != nil {
		info := r.NetInfo
		h.Hostinfo.NetInfo = &info
		h.Endpoints, h.EndpointTypes = r.Endpoints, r.Types
	}
	return h
}

// settle waits until peers can reach the node: it has a home relay or
// endpoints, and control knows them.
func (s *Session) settle(e *enrolment) {
	ctx, cancel := context.WithTimeout(s.ctx, readyTimeout)
	defer cancel()
	if err := s.engine.Ready(ctx); err != nil {
		s.log.Warn("up without a relay and without known endpoints: peers may not reach this node yet", zap.Error(err))
	}
	if s.Trouble() != nil {
		return // control will hear when it is back
	}
	h := s.hostState(e)
	err := e.client.Update(ctx, wire.MapRequest{
		NodeKey: e.state.Node.Public(), DiscoKey: h.DiscoKey, Hostinfo: h.Hostinfo,
		Endpoints: h.Endpoints, EndpointTypes: h.EndpointTypes,
	})
	if err != nil {
		s.log.Info("control has not heard of this node's endpoints yet", zap.Error(err))
	}
}

// peerPath tells how packets to a peer travel.
func (s *Session) peerPath(key identity.NodePublic) PeerStatus {
	st := s.engine.PathTo(key)
	var p PeerStatus
	switch {
	case st.Direct.IsValid():
		p.Path, p.Endpoint, p.Latency = "direct", st.Direct, st.Latency
	case st.Region != 0:
		p.Path, p.Relay = "relay", st.Region
	}
	return p
}
