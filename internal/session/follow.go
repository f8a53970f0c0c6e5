package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
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

// follow enrols the node and runs its data plane, with another key after each
// that expires.
func (s *Session) follow(e *enrolment) (err error) {
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
	trouble = s.passLogin(e, trouble)
	if trouble != nil {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if saved == nil || !worthRetry(trouble) {
			return trouble
		}
		s.setTrouble(trouble)
	}

	if err := s.startStack(); err != nil {
		return err
	}
	defer s.stopDataPlane(e, &err)
	for {
		err := s.serve(e, saved, trouble)
		if s.ctx.Err() != nil || !s.WasUp() || !errors.Is(err, wire.ErrNodeKeyExpired) {
			return s.because(err)
		}
		if err := s.renew(e, err); err != nil {
			return s.because(err)
		}
		saved, trouble = nil, nil
	}
}

// serve runs a data plane with the node's present key and keeps it in step with
// the control server, until the session stops, the control server puts the node
// out or the key expires.
func (s *Session) serve(e *enrolment, saved *netmap.Map, trouble error) error {
	ctx, end := context.WithCancelCause(s.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end(nil)
	if err := s.startEngine(e); err != nil {
		return err
	}
	first := make(chan struct{})
	if saved != nil {
		// What was in force when the node last ran is in force again, until
		// the control server says otherwise.
		s.apply(saved, netmap.Rebase(nil, saved))
		close(first)
	}
	key := e.key()
	wg.Go(func() {
		if err := s.comeUp(ctx, e, first); err != nil {
			end(err)
		}
	})
	defer s.watchExpiry(ctx, e, end).close()
	if err := s.keepRegistering(ctx, e, trouble); err != nil {
		end(err)
		return context.Cause(ctx)
	}
	if e.key() != key {
		s.adoptKey(ctx, e) // the one that a crash had kept from use
	}
	var once sync.Once
	end(s.coordinate(ctx, e, saved, func() {
		once.Do(func() {
			if saved == nil {
				close(first)
			}
		})
	}))
	return context.Cause(ctx)
}

// comeUp waits until peers can reach the node, for which its first map has to
// be in force, and says so.
func (s *Session) comeUp(ctx context.Context, e *enrolment, first <-chan struct{}) error {
	late := time.NewTimer(mapTimeout)
	defer late.Stop()
wait:
	select {
	case <-first:
	case <-ctx.Done():
		return nil
	case <-late.C:
		if errors.Is(s.isBarred(), ErrNotApproved) {
			goto wait // it is there, and takes its time
		}
		return fmt.Errorf("control server %s accepted this node but sent no netmap within %v: %w",
			s.cfg.ControlURL, mapTimeout, cmp.Or(s.Trouble(), errNoAnswer))
	}
	s.settle(ctx, e)
	switch {
	case ctx.Err() != nil:
	case s.WasUp():
		s.bar(nil)
	default:
		close(s.up)
	}
	return nil
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
	case err == nil && !m.Self().MachineAuthorized:
		return nil, nil
	case err == nil:
		e.savedAt = at
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
func (s *Session) keepRegistering(ctx context.Context, e *enrolment, err error) error {
	wait := backoff.Backoff{Max: control.QuickRetry}
	for since := time.Now(); err != nil; {
		if ctx.Err() != nil || !worthRetry(err) {
			return err
		}
		s.setTrouble(err)
		if werr := wait.Wait(ctx, control.RetryAfter(err), nil, err); werr != nil {
			return werr
		}
		if time.Since(since) > control.ShortOutage {
			wait.Max = backoff.DefaultMax
		}
		err = e.register(ctx, false)
	}
	return nil
}

// startStack starts the network stack, which lives as long as the session. Its
// packets go to the engine of the moment.
func (s *Session) startStack() error {
	stack, err := netstack.New(netstack.Config{
		Limits: s.cfg.Limits,
		Out: func(packets [][]byte) {
			if eng := s.engine.Load(); eng != nil {
				eng.Out(packets)
			}
		},
		PacketSize: func(dst netip.Addr) int {
			if eng := s.engine.Load(); eng != nil {
				return eng.PacketSize(dst)
			}
			return 0
		},
	})
	if err != nil {
		return fmt.Errorf("start network stack: %w", err)
	}
	s.stack = stack
	return nil
}

// startEngine opens sockets and starts an engine with the node's present key.
func (s *Session) startEngine(e *enrolment) error {
	eng, err := engine.New(engine.Config{
		Key:               e.state.Node,
		Disco:             s.disco,
		Link:              link{s.stack},
		Port:              s.cfg.Port,
		RelayOnly:         s.cfg.RelayOnly,
		OwnSockets:        s.cfg.OwnSockets,
		PortMapping:       !s.cfg.NoMapping && !s.cfg.RelayOnly && s.cfg.ListenUDP == nil,
		Endpoints:         s.cfg.Endpoints,
		LoopbackEndpoints: e.client.Local(),
		ListenUDP:         s.cfg.ListenUDP,
		DialTCP:           s.cfg.DialTCP,
		Report:            s.report,
		Changed:           s.networkChanged,
		Logger:            s.log,
	})
	if err != nil {
		return err
	}
	s.engine.Store(eng)
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

// networkChanged lets the connection to control look whether it still lives, and
// not wait if it does not: there is reason to hope.
func (s *Session) networkChanged() {
	s.mu.Lock()
	retry := s.retry
	s.mu.Unlock()
	if retry != nil {
		retry()
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
		s.closeEngine()
	}
	if eng := s.engine.Load(); eng != nil {
		eng.CutAll(*why)
	}
	s.stack.Close()
	s.closeEngine()
}

func (s *Session) closeEngine() {
	eng := s.engine.Load()
	if eng == nil {
		return
	}
	if err := eng.Close(); err != nil {
		s.log.Debug("close data plane", zap.Error(err))
	}
}

// coordinate follows the map stream until the session stops or the control
// server puts the node out, with another key when that is due. onMap is called
// after each map is in force.
func (s *Session) coordinate(ctx context.Context, e *enrolment, inForce *netmap.Map, onMap func()) error {
	for {
		poll, endPoll := context.WithCancelCause(ctx)
		err := s.followMap(poll, e, inForce, onMap, endPoll)
		endPoll(nil)
		if ctx.Err() != nil || !errors.Is(err, errRenewKey) {
			return err
		}
		s.renewKey(ctx, e)
		s.applying.Lock()
		inForce = s.maps.told
		s.applying.Unlock()
	}
}

// followMap follows the map stream with the present key. endPoll, which ends it,
// is there for renewSoon while it runs.
func (s *Session) followMap(ctx context.Context, e *enrolment, inForce *netmap.Map, onMap func(), endPoll context.CancelCauseFunc) error {
	use := sync.OnceFunc(func() { s.useKey(e) })
	keep := e.store
	if s.cfg.ForgetMap {
		keep = nil
	}
	var cs *control.Session
	cs = e.client.NewSession(control.SessionConfig{
		NodeKey:   e.key(),
		InForce:   inForce,
		Ephemeral: s.cfg.Ephemeral,
		Store:     keep,
		OnMap: func(m *netmap.Map, d netmap.Delta) {
			use() // peers hear of it now
			applied := s.apply(m, d)
			if !s.admit(m) {
				return
			}
			if applied {
				cs.SetApplied(m.PolicyVersion(), m.Version())
			}
			onMap()
		},
		OnState: func(err error) {
			s.setTrouble(err)
			if errors.Is(err, wire.ErrUserSuspended) {
				s.shutOut()
			}
		},
		SaveEvery: func() time.Duration { return s.maxStale(s.engine.Load().Map()) / 4 },
		NoteFlows: func(on bool) { s.engine.Load().NoteFlows(on) },
		Flows:     func() []wire.Flow { return s.engine.Load().Flows() },
	})
	tell := func() { cs.SetHostState(s.hostState(e)) }
	s.mu.Lock()
	s.told, s.ask, s.retry, s.endPoll = tell, cs.Ask, cs.Retry, endPoll
	s.mu.Unlock()
	tell()
	err := cs.Run(ctx)
	s.mu.Lock()
	s.endPoll = nil
	s.mu.Unlock()
	return err
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
func (s *Session) settle(ctx context.Context, e *enrolment) {
	whole := ctx
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	err := s.engine.Load().Ready(ctx)
	if whole.Err() != nil {
		return // it will not be up
	}
	if err != nil {
		s.log.Warn("up without a relay and without known endpoints: peers may not reach this node yet", zap.Error(err))
	}
	if s.Trouble() != nil {
		return // control will hear when it is back
	}
	h := s.hostState(e)
	err = e.client.Update(ctx, wire.MapRequest{
		NodeKey: e.key(), DiscoKey: h.DiscoKey, Hostinfo: h.Hostinfo,
		Endpoints: h.Endpoints, EndpointTypes: h.EndpointTypes,
	})
	if err != nil {
		s.log.Info("control has not heard of this node's endpoints yet", zap.Error(err))
	}
}
