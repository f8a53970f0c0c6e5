package session

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
	"mesh/internal/errand"
	"mesh/internal/netmap"
)

// appliedMaps are the map as control tells it and as it is in force: in the
// latter the peers whose keys have expired since are marked. Both are nil before
// the first.
type appliedMaps struct{ told, inForce *netmap.Map }

// apply puts a map of control in force, d being what differs from the last one,
// and reports whether all of it is.
func (s *Session) apply(told *netmap.Map, d netmap.Delta) bool {
	s.applying.Lock()
	defer s.applying.Unlock()
	m := told.Expire(time.Now())
	if m != told || s.maps.told != s.maps.inForce {
		d = netmap.Rebase(s.maps.inForce, m)
	}
	err := s.engine.Load().Apply(m, d)
	if err != nil {
		s.log.Warn("netmap applied in part", zap.Error(err))
	}
	s.maps = appliedMaps{told, m}
	s.tellMap()
	if s.expiry != nil {
		s.expiry.looking.Ask()
	}
	return err == nil
}

// applyExpiry puts out of use the peers whose keys have expired since the last
// map came.
func (s *Session) applyExpiry(now time.Time) {
	s.applying.Lock()
	defer s.applying.Unlock()
	m := s.maps.inForce.Expire(now)
	if m == s.maps.inForce {
		return
	}
	if err := s.engine.Load().Apply(m, netmap.Rebase(s.maps.inForce, m)); err != nil {
		s.log.Warn("netmap applied in part", zap.Error(err))
	}
	s.maps.inForce = m
}

// shutOut puts all peers out of use while the control server refuses this node
// for a time, as they do: what is said to them now gets no answer any more. The
// next map lets them in again.
func (s *Session) shutOut() {
	s.applying.Lock()
	defer s.applying.Unlock()
	m := s.maps.inForce
	if m == nil || m.NumPeers() == 0 {
		return
	}
	r := m.Response()
	r.Peers, r.PacketFilters = nil, map[string][]wire.FilterRule{"base": {}}
	alone, _, err := netmap.Apply(nil, r)
	if err == nil {
		err = s.engine.Load().Apply(alone, netmap.Rebase(m, alone))
	}
	if err != nil {
		s.log.Warn("peers are put out of use in part", zap.Error(err))
	}
	if alone != nil {
		s.maps.inForce = alone
	}
}

// clockCheck is how often clocks are looked at while some key is to expire: they
// may be set, and timers stand still while a machine sleeps.
const clockCheck = time.Minute

// expiryWatch puts keys out of use when they expire, whether or not the control
// server is there to say so, and ends what it watches with wire.ErrNodeKeyExpired
// when the node's own key has. It also sees to it that the node's key is replaced
// long before.
type expiryWatch struct {
	s       *Session
	ctx     context.Context
	e       *enrolment
	end     context.CancelCauseFunc
	looking *errand.Errand // look

	// Of look alone.
	good  time.Time   // an expiry of our own that the control server does not insist on
	timer *time.Timer // asks for it; nil before the first
}

// watchExpiry begins, until ctx ends. The caller closes what it returns.
func (s *Session) watchExpiry(ctx context.Context, e *enrolment, end context.CancelCauseFunc) *expiryWatch {
	w := &expiryWatch{s: s, ctx: ctx, e: e, end: end}
	w.looking = errand.New(w.look)
	s.applying.Lock()
	s.expiry = w
	s.applying.Unlock()
	w.looking.Ask()
	return w
}

// close returns when look does not run any more; ctx has ended.
func (w *expiryWatch) close() {
	w.looking.Close()
	if w.timer != nil {
		w.timer.Stop()
	}
}

// look does what is due.
func (w *expiryWatch) look() {
	s := w.s
	s.applying.Lock()
	m := s.maps.told
	s.applying.Unlock()
	if m == nil || w.ctx.Err() != nil {
		return
	}
	now := time.Now()
	if self := m.Self(); m.Expired(self, now) && self.Key == w.e.key() && (w.good.IsZero() || !w.good.Equal(self.KeyExpiry)) {
		if !s.stillGood(w.ctx, w.e, self.Key) {
			w.end(wire.ErrNodeKeyExpired)
			return
		}
		w.good = self.KeyExpiry
	}
	s.applyExpiry(now)
	next := s.renewSoon(now, m.Renewal(now))
	for _, at := range []time.Time{m.NextExpiry(now), s.checkStale(w.e, m, now)} {
		if next.IsZero() || !at.IsZero() && at.Before(next) {
			next = at
		}
	}
	if w.timer != nil {
		w.timer.Stop()
	}
	if next.IsZero() {
		return
	}
	wait := max(0, min(next.Sub(now), clockCheck))
	if w.timer == nil {
		w.timer = time.AfterFunc(wait, w.looking.Ask)
	} else {
		w.timer.Reset(wait)
	}
}

// stillGood asks the control server whether it accepts a key that has expired
// by its own word and our clock. If it does not answer the key counts as expired:
// peers will find the same.
func (s *Session) stillGood(ctx context.Context, e *enrolment, key identity.NodePublic) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := e.server.Register(ctx, wire.RegisterRequest{
		Version: wire.CapabilityVersion, NodeKey: key, Hostinfo: e.hostinfo(), Ephemeral: e.cfg.Ephemeral,
	})
	return err == nil
}

// renew gets a node whose key has expired a new one: by the auth key, or by a
// person who logs in. Connections end with the reason; listeners, the name and
// the addresses stay, if the control server gives them again. It returns nil when
// the control server has accepted the node.
func (s *Session) renew(e *enrolment, why error) error {
	s.bar(why)
	s.engine.Load().CutAll(why)
	s.closeEngine()
	s.applying.Lock()
	s.maps = appliedMaps{}
	s.applying.Unlock()
	s.mu.Lock()
	s.latest, s.told, s.ask, s.retry = nil, nil, nil, nil
	s.mu.Unlock()
	var wait backoff.Backoff
	for {
		err := s.passLogin(e, e.register(s.ctx, true))
		if err == nil || s.ctx.Err() != nil {
			return err
		}
		if !worthRetry(err) {
			if e.expired == nil {
				err = fmt.Errorf("%w; %w", why, err)
			}
			return err
		}
		s.setTrouble(err)
		if err := wait.Wait(s.ctx, control.RetryAfter(err), nil, err); err != nil {
			return err
		}
	}
}
