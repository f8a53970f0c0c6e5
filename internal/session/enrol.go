package session

import (
	"context"
	"errors"
	"fmt"
	"runtime"
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
	for try := 0; ; try++ {
		e.asked = wire.RegisterRequest{
			Version:    wire.CapabilityVersion,
			NodeKey:    e.state.Node.Public(),
			OldNodeKey: old,
			Hostinfo:   e.hostinfo(),
			Ephemeral:  e.cfg.Ephemeral,
		}
		if useKey {
			e.asked.Auth = &wire.RegisterAuth{AuthKey: e.cfg.AuthKey}
		}
		_, err := e.server.Register(ctx, e.asked)
		if err == nil {
			return e.accepted()
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
		if err := e.state.Save(e.store); err != nil {
			return err
		}
		useKey = hasKey
	}
}

// accepted notes that the control server took the node.
func (e *enrolment) accepted() error {
	if e.state.Enrolled {
		return nil
	}
	e.state.Enrolled = true
	return e.state.Save(e.store)
}

// refused notes that the control server does not take the node. If it has a new
// key, the old one comes back: an administrator may make that good again.
func (e *enrolment) refused(err error) error {
	err = e.because(err)
	if e.state.Node == e.before.Node {
		return err
	}
	e.state = e.before
	if serr := e.state.Save(e.store); serr != nil {
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
