package session

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
)

// A node makes itself another key while the one that it has is good, when the
// control server says that it is time. The new key is saved beside the old one
// before anybody hears of it, and takes its place when the control server has
// accepted it: after a crash at any moment one of the two is good. The data
// plane answers to both before peers are told, and for three minutes after, so
// that connections notice nothing.

// errRenewKey ends a map stream so that the node can come back with another key.
var errRenewKey = errors.New("the node's key is to be replaced")

// relayPatience bounds how long the change of keys waits for a relay to admit
// the new one.
const relayPatience = 5 * time.Second

// renewPause is how long a node whose new key was refused waits before it tries
// again.
const renewPause = time.Hour

// nextKey registers the key that is to replace the node's: one that was saved
// before a crash, or a new one. It goes on until the control server has answered;
// the error is the refusal.
func (e *enrolment) nextKey(ctx context.Context, keep bool) error {
	if e.state.Next.IsZero() {
		e.state.Next = identity.NewNode()
		if err := e.save(); err != nil {
			e.state.Next = identity.NodePrivate{}
			return err
		}
	}
	var wait backoff.Backoff
	for {
		err := e.offerNext(ctx, keep)
		if !worthRetry(err) {
			return err
		}
		e.log.Debug("the node's next key is not accepted yet", zap.Error(err))
		if werr := wait.Wait(ctx, control.RetryAfter(err), nil, err); werr != nil {
			return werr
		}
	}
}

// offerNext is one attempt of nextKey. A refusal takes the key back.
func (e *enrolment) offerNext(ctx context.Context, keep bool) error {
	resp, err := e.server.Register(ctx, wire.RegisterRequest{
		Version: wire.CapabilityVersion, NodeKey: e.state.Next.Public(), OldNodeKey: e.state.Node.Public(),
		Hostinfo: e.hostinfo(), Ephemeral: e.cfg.Ephemeral, MeshKeeps: keep, MeshYield: e.state.Cloned,
	})
	switch {
	case err == nil:
		e.state.Node = e.state.Next
		e.state.Next = identity.NodePrivate{}
		if err := e.accepted(resp); err != nil {
			// What is saved has both keys, and the new one is tried first.
			e.log.Warn("the node's new key is in use, but could not be saved as such", zap.Error(err))
		}
		return nil
	case ctx.Err() != nil, worthRetry(err):
		return err // it may have been accepted all the same
	}
	e.state.Next = identity.NodePrivate{}
	if serr := e.save(); serr != nil {
		return errors.Join(err, serr)
	}
	return err
}

// renewKey replaces the key of a node that is up. Whatever comes of it, the node
// goes on, with the key that the control server knows.
func (s *Session) renewKey(ctx context.Context, e *enrolment) {
	err := e.nextKey(ctx, true)
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("the node's key could not be replaced, it stays in use", zap.Error(err))
			s.mu.Lock()
			s.noRenewal = time.Now().Add(renewPause)
			s.mu.Unlock()
		}
		return
	}
	s.log.Info("the node has another key", zap.Stringer("key", shortKey(e.key())))
	s.adoptKey(ctx, e)
}

// shortKey shows a key by its short form in logs.
type shortKey identity.NodePublic

// String returns the short form.
func (k shortKey) String() string { return identity.NodePublic(k).Short() }

// adoptKey lets the data plane answer to the node's key besides the one that it
// has: it uses it once the control server has sent a map for it.
func (s *Session) adoptKey(ctx context.Context, e *enrolment) {
	ctx, cancel := context.WithTimeout(ctx, relayPatience)
	defer cancel()
	if err := s.engine.Load().AddKey(ctx, e.state.Node); err != nil {
		s.log.Debug("data plane takes no other key", zap.Error(err))
	}
}

// useKey puts the node's key in use in the data plane, if another one is.
func (s *Session) useKey(e *enrolment) {
	if err := s.engine.Load().UseKey(e.state.Node); err != nil {
		s.log.Debug("data plane takes no other key", zap.Error(err))
	}
}

// renewSoon ends the map stream if it is time for another key and the control
// server is there to hear of it; coordinate does the rest. It returns when to ask
// again, zero for not before there is another map.
func (s *Session) renewSoon(now, renewal time.Time) time.Time {
	if renewal.IsZero() {
		return time.Time{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if renewal.Before(s.noRenewal) {
		renewal = s.noRenewal
	}
	if now.Before(renewal) {
		return renewal
	}
	if s.endPoll == nil || s.trouble != nil {
		return now.Add(renewCheck)
	}
	s.endPoll(errRenewKey)
	s.endPoll = nil
	return now.Add(renewCheck)
}

// renewCheck is how often a node whose key is to be replaced looks whether the
// control server is there.
const renewCheck = 10 * time.Second
