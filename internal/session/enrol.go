package session

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
)

// Version names this library to the control server.
const Version = "mesh-0.1"

// enrolment is how a session gets and keeps its place: the node's keys and the
// control server that accepts them.
type enrolment struct {
	cfg    Config
	log    *zap.Logger
	store  identity.Store
	state  identity.State
	client *control.Client
	server registrar // client, but in tests

	asked   wire.RegisterRequest // last, by register
	before  identity.State       // when register began
	expired error                // by which register heard that the key has expired, nil if it has not

	savedAt time.Time // when the map was saved with which the node started; zero = none

	public atomic.Pointer[identity.NodePublic] // of state.Node, for who does not own state; see key
}

// key returns the node's public key. It may be called while another goroutine
// changes the state.
func (e *enrolment) key() identity.NodePublic {
	if k := e.public.Load(); k != nil {
		return *k
	}
	return e.state.Node.Public()
}

// save saves the state.
func (e *enrolment) save() error {
	k := e.state.Node.Public()
	e.public.Store(&k)
	return e.state.Save(e.store)
}

// cloned notes that another copy of the state is the newer one, if that is what
// err says: started again, this one does not take its place once more.
func (e *enrolment) cloned(err error) error {
	if !errors.Is(err, wire.ErrCloned) {
		return err
	}
	if !e.state.Cloned {
		e.state.Cloned = true
		if serr := e.save(); serr != nil {
			err = errors.Join(err, serr)
		}
	}
	return fmt.Errorf("%w; to go on with this one stop the other and start this again; "+
		"if there shall be both, give each a state directory of its own: delete the copied one, and its node enrols as another", err)
}

type registrar interface {
	Register(context.Context, wire.RegisterRequest) (*wire.RegisterResponse, error)
}

// hostinfo describes this installation, without its network.
func (e *enrolment) hostinfo() *wire.Hostinfo {
	yes := true
	return &wire.Hostinfo{
		IPNVersion:  Version,
		OS:          runtime.GOOS,
		GoArch:      runtime.GOARCH,
		GoVersion:   runtime.Version(),
		Hostname:    e.cfg.Hostname,
		Package:     "mesh",
		Userspace:   &yes,
		RequestTags: e.cfg.Tags,
	}
}

// register makes the control server accept the node's key. A saved identity
// goes first; the auth key is used where that is expired or unknown, if need be
// with a new node key, which mayRekey permits. Where a person has to log in the
// error is a *control.NeedsLoginError, and awaitLogin goes on from there.
//
// When the node's key has expired and is not renewed, the error says so too.
func (e *enrolment) register(ctx context.Context, mayRekey bool) error {
	hasKey := e.cfg.AuthKey != ""
	useKey := hasKey && !e.state.Enrolled
	e.before, e.expired = e.state, nil
	old := identity.NodePublic{}
	if !e.state.Next.IsZero() {
		// There was a crash while the key was replaced: the new one first.
		err := e.offerNext(ctx, false)
		if err == nil || worthRetry(err) || ctx.Err() != nil || errors.Is(err, wire.ErrCloned) {
			return err
		}
		e.log.Info("the node's next key was refused", zap.Error(err))
	}
	for try := 0; ; try++ {
		e.asked = wire.RegisterRequest{
			Version:    wire.CapabilityVersion,
			NodeKey:    e.state.Node.Public(),
			OldNodeKey: old,
			Hostinfo:   e.hostinfo(),
			Ephemeral:  e.cfg.Ephemeral,
			MeshYield:  e.state.Cloned,
		}
		if useKey {
			e.asked.Auth = &wire.RegisterAuth{AuthKey: e.cfg.AuthKey}
		}
		resp, err := e.server.Register(ctx, e.asked)
		if err == nil {
			return e.accepted(resp)
		}
		var login *control.NeedsLoginError
		needsLogin := errors.As(err, &login)
		if try > 0 {
			if needsLogin || worthRetry(err) || ctx.Err() != nil {
				return e.because(err)
			}
			return e.refused(err)
		}
		var refused *control.RefusedError
		foreign := errors.As(err, &refused) && refused.Code == ""
		switch {
		case errors.Is(err, wire.ErrNodeKeyExpired):
			// The same node with a new key.
			old, e.expired = e.state.Node.Public(), err
		case hasKey && (errors.Is(err, wire.ErrNodeRevoked) || errors.Is(err, wire.ErrMachineMismatch)):
			// A new node: the old identity is of no more use.
		case hasKey && !useKey && (errors.Is(err, wire.ErrNodeUnknown) || errors.Is(err, wire.ErrNeedsLogin) || needsLogin || foreign):
			// Or a server that has no codes, and may want the key each time.
			useKey = true
			continue
		default:
			return err
		}
		if !mayRekey {
			return err
		}
		e.log.Info("saved identity is no longer good, enrolling anew", zap.Error(err))
		e.state.Node, e.state.Enrolled = identity.NewNode(), false
		if err := e.save(); err != nil {
			return err
		}
		useKey = hasKey
	}
}

// accepted notes that the control server took the node.
func (e *enrolment) accepted(resp *wire.RegisterResponse) error {
	if resp != nil && resp.MeshReplaced {
		e.log.Warn("another process was this node until now and has been told to stop: if it was not this one before a restart, its state was copied")
	}
	k := e.state.Node.Public()
	if saved := e.state.Enrolled && !e.state.Cloned && e.public.Load() != nil && *e.public.Load() == k; saved {
		return nil
	}
	e.state.Enrolled, e.state.Cloned = true, false
	return e.save()
}

// refused notes that the control server does not take the node. If it has a new
// key, the old one comes back: an administrator may make that good again.
func (e *enrolment) refused(err error) error {
	err = e.because(err)
	if e.state.Node == e.before.Node {
		return err
	}
	e.state = e.before
	if serr := e.save(); serr != nil {
		return errors.Join(err, serr)
	}
	return err
}

// because adds to a failure that it was met with when the key had expired.
func (e *enrolment) because(err error) error {
	if e.expired == nil || errors.Is(err, wire.ErrNodeKeyExpired) {
		return err
	}
	return fmt.Errorf("%w; %w", wire.ErrNodeKeyExpired, err)
}

// logout tells the control server that an ephemeral node leaves.
func (e *enrolment) logout() {
	ctx, cancel := context.WithTimeout(context.Background(), logoutTimeout)
	defer cancel()
	if err := e.client.Logout(ctx, e.state.Node.Public()); err != nil {
		e.log.Info("the control server did not hear that this node leaves; it will find out", zap.Error(err))
	}
}

// patience is how long a node with a saved netmap waits for the control server
// before it comes up without.
const patience = 3 * time.Second
