package session

import (
	"context"
	"errors"
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
// with a new node key, which mayRekey permits.
func (e *enrolment) register(ctx context.Context, mayRekey bool) error {
	useKey := e.cfg.AuthKey != "" && !e.state.Enrolled
	old := identity.NodePublic{}
	before := e.state
	for try := 0; ; try++ {
		req := wire.RegisterRequest{
			Version:    wire.CapabilityVersion,
			NodeKey:    e.state.Node.Public(),
			OldNodeKey: old,
			Hostinfo:   e.hostinfo(),
			Ephemeral:  e.cfg.Ephemeral,
		}
		if useKey {
			req.Auth = &wire.RegisterAuth{AuthKey: e.cfg.AuthKey}
		}
		_, err := e.server.Register(ctx, req)
		if err == nil {
			if !e.state.Enrolled {
				e.state.Enrolled = true
				return e.state.Save(e.store)
			}
			return nil
		}
		if e.state.Node != before.Node && !worthRetry(err) && ctx.Err() == nil {
			// Refused with the new key as well: keep the old one, which an
			// administrator may make good again.
			e.state = before
			return errors.Join(err, e.state.Save(e.store))
		}
		if try > 0 || e.cfg.AuthKey == "" {
			return err
		}
		var login *control.NeedsLoginError
		var refused *control.RefusedError
		foreign := errors.As(err, &refused) && refused.Code == ""
		switch {
		case errors.Is(err, wire.ErrNodeKeyExpired):
			// The same node with a new key.
			old = e.state.Node.Public()
		case errors.Is(err, wire.ErrNodeRevoked), errors.Is(err, wire.ErrMachineMismatch):
			// A new node: the old identity is of no more use.
		case !useKey && (errors.Is(err, wire.ErrNodeUnknown) || errors.Is(err, wire.ErrNeedsLogin) || errors.As(err, &login) || foreign):
			// Or a server that has no codes, and may want the key each time.
			useKey = true
			continue
		default:
			return err
		}
		if !mayRekey {
			return err
		}
		e.log.Info("saved identity is no longer good, enrolling anew with the auth key", zap.Error(err))
		e.state.Node, e.state.Enrolled = identity.NewNode(), false
		if err := e.state.Save(e.store); err != nil {
			return err
		}
		useKey = true
	}
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
