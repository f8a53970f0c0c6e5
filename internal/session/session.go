// Package session is the life of one running node: it enrols at the control
// server, follows the map stream, applies each snapshot to the engine and ends
// when it is told to or when the control server puts the node out.
package session

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/engine"
	"mesh/internal/path"
	"mesh/netstack"
)

// Config is what a Session is made from.
type Config struct {
	Hostname   string
	ControlURL string
	ControlKey identity.MachinePublic // zero = no pin
	AuthKey    string
	// OpenStore opens where the state is kept; Session closes it by the func
	// that comes with it.
	OpenStore  func() (identity.Store, func() error, error)
	Ephemeral  bool
	ForgetMap  bool // nobody will ever start from what OpenStore opens
	Tags       []string
	Port       uint16
	RelayOnly  bool
	MaxStale   time.Duration    // see checkStale; 0 = for ever, unless the policy says otherwise
	NoMapping  bool             // ask no gateway for a port mapping
	OwnSockets bool             // share UDP sockets with no other node
	Endpoints  []netip.AddrPort // that the user knows of
	Limits     netstack.Limits
	ListenUDP  func(ctx context.Context, network, addr string) (net.PacketConn, error)
	DialTCP    func(ctx context.Context, network, addr string) (net.Conn, error)
	Logger     *zap.Logger
}

// logoutTimeout bounds how long an ephemeral node takes to say goodbye.
const logoutTimeout = 2 * time.Second

// Session is a running node. Start makes one.
type Session struct {
	cfg Config
	log *zap.Logger

	ctx    context.Context // ends when Stop is called or the node is put out
	cancel context.CancelCauseFunc

	up       chan struct{} // closed when peers can reach the node
	ended    chan struct{} // closed when it is of no more use; end says why
	finished chan struct{} // closed when nothing is left running

	// Set by run before up is closed, and by nobody after.
	stack *netstack.Stack
	disco identity.DiscoPrivate

	// engine is another one when the node's key was renewed. Not nil once up is
	// closed.
	engine atomic.Pointer[engine.Engine]

	applying sync.Mutex   // serialises apply; guards what follows
	maps     appliedMaps  // of the present engine
	expiry   *expiryWatch // told when there is another map; nil before there is one

	late atomic.Uint64 // see Dropped.Late

	mu        sync.Mutex              // guards the fields below
	end       error                   // why the session ended
	trouble   error                   // the last failure of what is tried again, nil when all is well
	latest    *path.Report            // of this node's network, nil before the first
	retry     func()                  // makes the connection to control look for itself; nil like told
	ask       func()                  // asks control whether it is there; nil like told
	told      func()                  // makes control hear of latest; nil before there is somebody to tell
	login     error                   // a person has to log in; nil if not
	loginTold error                   // the last login that WaitLogin returned
	barred    error                   // why a node that was up may not be used for now; nil if it may
	stale     error                   // the node is cut off; nil if it is not
	turned    chan struct{}           // closed and replaced when login, barred or stale change
	another   chan struct{}           // closed and replaced when another map is in force
	endPoll   context.CancelCauseFunc // of the connection to control; nil while there is none
	noRenewal time.Time               // before it the node's key is not replaced
}

// Start begins a session. It never fails: Ended and Err tell how it went.
func Start(cfg Config) *Session {
	s := &Session{
		cfg:      cfg,
		log:      cfg.Logger,
		up:       make(chan struct{}),
		ended:    make(chan struct{}),
		finished: make(chan struct{}),
		turned:   make(chan struct{}),
		another:  make(chan struct{}),
		disco:    identity.NewDisco(),
	}
	if s.log == nil {
		s.log = zap.NewNop()
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	go s.run()
	return s
}

// Up is closed when peers can reach the node.
func (s *Session) Up() <-chan struct{} { return s.up }

// Ended is closed when the session is of no more use; Err tells why.
func (s *Session) Ended() <-chan struct{} { return s.ended }

// Finished is closed when nothing of the session is left running.
func (s *Session) Finished() <-chan struct{} { return s.finished }

// WasUp reports whether the session ever came up.
func (s *Session) WasUp() bool {
	select {
	case <-s.up:
		return true
	default:
		return false
	}
}

// Err returns why the session ended, nil while it has not.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end
}

// Trouble returns what keeps the session from the control server at present,
// nil when nothing does.
func (s *Session) Trouble() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

func (s *Session) setTrouble(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trouble = err
}

// Stack returns the network stack of a session that is up.
func (s *Session) Stack() *netstack.Stack { return s.stack }

// Engine returns the present data plane of a session that is up. It is another
// one after the node's key was renewed.
func (s *Session) Engine() *engine.Engine { return s.engine.Load() }

// Stop ends the session with the error that later calls will give. It does not
// wait: Finished does.
func (s *Session) Stop(err error) { s.cancel(err) }

func (s *Session) run() {
	defer close(s.finished)
	err := s.live()
	if cause := context.Cause(s.ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	err = revoked(err)
	s.mu.Lock()
	s.end = err
	s.mu.Unlock()
	s.cancel(err)
	close(s.ended)
}

// revoked makes of the control server's word that this node was removed the
// error that connections end with, too.
func revoked(err error) error {
	if errors.Is(err, wire.ErrNodeRevoked) {
		return &engine.RevokedError{Reason: "this " + wire.ErrNodeRevoked.Error()}
	}
	return err
}

// live runs the session from its keys to its end.
func (s *Session) live() (err error) {
	store, closeStore, err := s.cfg.OpenStore()
	if err != nil {
		return err
	}
	defer closeStore()
	state, err := identity.LoadState(store)
	if err != nil {
		return err
	}
	client, err := control.New(control.Config{
		URL:       s.cfg.ControlURL,
		ServerKey: s.cfg.ControlKey,
		Machine:   state.Machine,
		Instance:  rand.Text(),
		Dial:      s.cfg.DialTCP,
		Logger:    s.log,
	})
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.Proven(); err != nil {
		return fmt.Errorf("%w with Node.ControlKey or MESH_CONTROL_KEY", err)
	}
	e := &enrolment{cfg: s.cfg, log: s.log, store: store, state: state, client: client, server: client}
	own := state.Node.Public()
	e.public.Store(&own)
	return e.cloned(s.follow(e))
}

// link is the packet side of the stack, as the engine wants it.
type link struct{ *netstack.Stack }

func (l link) Reject(proto uint8, local, remote netip.AddrPort, err error) bool {
	return l.Stack.Reject(netstack.Flow{Proto: proto, Local: local, Remote: remote}, err)
}

func (l link) Abort(match func(proto uint8, local, remote netip.AddrPort) bool, err error) int {
	return l.Stack.Abort(func(f netstack.Flow) bool { return match(f.Proto, f.Local, f.Remote) }, err)
}

func (l link) AbortFlow(proto uint8, local, remote netip.AddrPort, err error) bool {
	return l.Stack.AbortFlow(netstack.Flow{Proto: proto, Local: local, Remote: remote}, err)
}
