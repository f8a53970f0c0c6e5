// Package mesh gives a program its own place on a private, zero-trust network.
//
// A [Node] lives inside the process: no root, no TUN device, no open port, no
// sidecar. It enrols at a coordination server, gets mesh addresses and a name,
// and talks WireGuard to its peers, directly where a path exists and through a
// relay otherwise. [Node.Listen] and [Node.Dial] work like package net's; every
// connection carries the proven identity of the other end ([PeerOf]) and was
// checked against the policy of the coordination server. Nothing is reachable
// that the policy does not name, and nothing outside the mesh is ever dialled.
//
//	n := &mesh.Node{Hostname: "db", ControlURL: "https://mesh.example.com", AuthKey: key}
//	defer n.Close()
//	l, err := n.Listen("tcp", ":5432")
//
// The package-level [Listen] and [Dial] use a default node, configured by
// environment variables alone: MESH_CONTROL_URL, MESH_CONTROL_KEY, MESH_AUTHKEY,
// MESH_HOSTNAME, MESH_STATE_DIR, MESH_EPHEMERAL and MESH_TAGS. The same variables
// fill fields of a Node that are empty.
package mesh

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/engine"
	"mesh/internal/session"
	"mesh/netstack"
)

// Errors to branch on with errors.Is. Each comes wrapped in one that says more.
var (
	// ErrDenied: a peer's policy refused. errors.As with *DeniedError tells who,
	// and by which version of the policy.
	ErrDenied = engine.ErrDenied
	// ErrUnknownHost: no peer that this node may see has that name or address.
	ErrUnknownHost = errors.New("unknown host")
	// ErrPeerOffline: the peer does not answer; *PeerOfflineError tells since when.
	ErrPeerOffline = errors.New("peer is offline")
	// ErrNeedsLogin: a person must log in; *NeedsLoginError may have the URL.
	ErrNeedsLogin = wire.ErrNeedsLogin
	// ErrKeyExpired: the node's key has expired and no auth key renews it. If a
	// person can, the error is a *NeedsLoginError, too.
	ErrKeyExpired = wire.ErrNodeKeyExpired
	// ErrRevoked: access was withdrawn while it was in use, at either end; a
	// peer's key has expired; or this node was removed from the mesh.
	// errors.As with *RevokedError tells by which version of the policy.
	ErrRevoked = engine.ErrRevoked
	// ErrCloned: another copy of this node's identity runs; the newer one stays.
	// Started again, the older one asks to be let in only when the newer has gone.
	ErrCloned = wire.ErrCloned
	// ErrStale: the node did not hear of its control server for longer than
	// Node.MaxStale or the policy allow. It is over when the server is back.
	ErrStale = session.ErrStale
	// ErrNotApproved: an administrator of the control server has to approve the
	// node first. It waits for that.
	ErrNotApproved = session.ErrNotApproved
	// ErrTooManyConnections: a dial would exceed Node.Limits.
	ErrTooManyConnections = netstack.ErrTooManyConnections
	// The control server does not accept the auth key.
	ErrAuthKeyUnknown = wire.ErrAuthKeyUnknown
	ErrAuthKeyExpired = wire.ErrAuthKeyExpired
	ErrAuthKeyRevoked = wire.ErrAuthKeyRevoked
	ErrAuthKeyUsed    = wire.ErrAuthKeyUsed
)

// DeniedError is the refusal of a peer. It matches ErrDenied.
type DeniedError = engine.DeniedError

// RevokedError ends connections that are no longer allowed: TCP at both ends and
// connected UDP. It matches ErrRevoked.
type RevokedError = engine.RevokedError

// Limits bound what a node takes from its process: see Node.Limits.
type Limits = netstack.Limits

// NeedsLoginError says where a person must log in. It matches ErrNeedsLogin.
type NeedsLoginError = control.NeedsLoginError

// Node is a place on the mesh. The zero value, with MESH_* variables set, is
// usable. Set fields before the first call of a method and not after; a Node
// must not be copied. Close it to leave.
type Node struct {
	Hostname   string         // name on the mesh; "" is $MESH_HOSTNAME or the program's name
	ControlURL string         // coordination server, or with commas its replicas; "" is $MESH_CONTROL_URL. There is no default
	ControlKey string         // pin of the server's key, "mkey:…"; "" is $MESH_CONTROL_KEY or no pin
	AuthKey    string         // enrolment key; "" is $MESH_AUTHKEY. Ignored while the saved identity is valid
	Dir        string         // state directory; "" is $MESH_STATE_DIR or mesh/HOSTNAME in the user's config directory
	Store      identity.Store // keeps the state instead of Dir
	Ephemeral  bool           // forget me when I leave, keep state in memory; also $MESH_EPHEMERAL
	Tags       []string       // tags to ask for, "tag:…"; nil is $MESH_TAGS, separated by commas
	Port       uint16         // UDP port on the host, 0 is any
	Logger     *zap.Logger    // nil is silent

	// MaxStale is how long the node goes on with what it knows while it does not
	// hear of its control server; 0 = for ever. Then it refuses new connections,
	// its own and those of peers, with ErrStale, and after a quarter of the time
	// more its live ones end, too. A server that says nothing is asked after
	// half the time. It looks each eighth of the time, at least once a minute;
	// the age is counted on while the machine sleeps, and from when
	// the server was last heard before the map was saved if the node starts
	// without it. When the server is back so is the node. The policy can ask for
	// less: see its attribute max-stale.
	MaxStale time.Duration
	// RelayOnly keeps all traffic on relays: no UDP to peers.
	RelayOnly bool
	// OwnSockets gives the node UDP sockets of its own. Otherwise, once a process
	// has more nodes than cores, they share some: peers see several nodes at one
	// port, and tell them apart by their keys. Nodes with a Port or a ListenUDP
	// always have their own.
	OwnSockets bool
	// NoPortMapping keeps the node from asking the gateway of the local network
	// to forward its UDP port. It does so where it is behind a NAT, by PCP,
	// NAT-PMP or UPnP, so that peers find a direct path; what comes in by that
	// port is nothing but ciphertext of peers. Nothing is asked with RelayOnly or
	// with a ListenUDP.
	NoPortMapping bool
	// Endpoints are addresses at which the node's UDP port can be reached
	// besides those that it finds by itself, such as a forwarding set up by
	// hand. Set Port with them.
	Endpoints []netip.AddrPort
	// Limits bound the connections of the node and the memory that they take;
	// the zero value suits a process of 128 MB. At a limit what is open goes on
	// as before: windows close, new connections fail.
	Limits Limits
	// ListenUDP and DialTCP obtain the host's sockets, to mark or bind them;
	// nil is package net. They carry ciphertext, control traffic and questions
	// about the network (STUN, port mapping). Names of servers are looked up by
	// DialTCP, and those of relays for STUN by the host's resolver.
	ListenUDP func(ctx context.Context, network, addr string) (net.PacketConn, error)
	DialTCP   func(ctx context.Context, network, addr string) (net.Conn, error)

	mu        sync.Mutex // guards the fields below
	closed    bool
	current   *session.Session // nil before the first use and after a failed start
	transport *http.Transport
}

// configure fills in the environment. It is the only reader of MESH_* variables
// and leaves n as it is.
func (n *Node) configure() (session.Config, error) {
	or := func(v, env string) string {
		if v == "" {
			v = os.Getenv(env)
		}
		return strings.TrimSpace(v)
	}
	c := session.Config{
		Hostname:   or(n.Hostname, "MESH_HOSTNAME"),
		ControlURL: or(n.ControlURL, "MESH_CONTROL_URL"),
		AuthKey:    or(n.AuthKey, "MESH_AUTHKEY"),
		Ephemeral:  n.Ephemeral,
		Tags:       n.Tags,
		Port:       n.Port,
		MaxStale:   n.MaxStale,
		RelayOnly:  n.RelayOnly,
		NoMapping:  n.NoPortMapping,
		OwnSockets: n.OwnSockets,
		Endpoints:  n.Endpoints,
		Limits:     n.Limits,
		ListenUDP:  n.ListenUDP,
		DialTCP:    n.DialTCP,
		Logger:     n.Logger,
	}
	if c.ControlURL == "" {
		return c, errors.New("no control server: set Node.ControlURL or MESH_CONTROL_URL to its URL, which `mesh serve` prints")
	}
	if pin := or(n.ControlKey, "MESH_CONTROL_KEY"); pin != "" {
		k, err := identity.ParseMachinePublic(pin)
		if err != nil {
			return c, fmt.Errorf("Node.ControlKey or MESH_CONTROL_KEY: %w", err)
		}
		c.ControlKey = k
	}
	if e := os.Getenv("MESH_EPHEMERAL"); e != "" && !c.Ephemeral {
		v, err := strconv.ParseBool(e)
		if err != nil {
			return c, fmt.Errorf("MESH_EPHEMERAL: want true or false, got %q", e)
		}
		c.Ephemeral = v
	}
	if c.Tags == nil {
		for _, t := range strings.Split(os.Getenv("MESH_TAGS"), ",") {
			if t = strings.TrimSpace(t); t != "" {
				c.Tags = append(c.Tags, t)
			}
		}
	}
	for _, t := range c.Tags {
		if !strings.HasPrefix(t, "tag:") || len(t) == len("tag:") {
			return c, fmt.Errorf("tag %q: want \"tag:NAME\"", t)
		}
	}
	if c.Hostname == "" && len(os.Args) > 0 { // a library in another language's program has none
		c.Hostname = strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe")
	}
	store, dir := n.Store, or(n.Dir, "MESH_STATE_DIR")
	c.ForgetMap = c.Ephemeral && store == nil
	c.OpenStore = func() (identity.Store, func() error, error) {
		none := func() error { return nil }
		switch {
		case store != nil:
			return store, none, nil
		case c.Ephemeral:
			return new(identity.MemoryStore), none, nil
		}
		return openDir(dir, c.Hostname)
	}
	return c, nil
}

func openDir(dir, hostname string) (identity.Store, func() error, error) {
	if dir == "" {
		base, err := os.UserConfigDir()
		if err != nil {
			return nil, nil, fmt.Errorf("no place for the node's state: %w; set Node.Dir or MESH_STATE_DIR", err)
		}
		dir = filepath.Join(base, "mesh", dirName(hostname))
	}
	f, err := identity.OpenFileStore(dir)
	if err != nil {
		return nil, nil, err
	}
	return f, f.Close, nil
}

// dirName makes a file name of a host name, whatever is in it. Two names share
// one only if they differ in nothing but case, as names on the mesh may not.
func dirName(hostname string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '-'
	}, hostname)
	lossy := name != strings.ToLower(hostname)
	if len(name) > 63 {
		name, lossy = name[:63], true
	}
	if name == "" {
		return "node"
	}
	if lossy {
		sum := sha256.Sum256([]byte(strings.ToLower(hostname)))
		name = fmt.Sprintf("%s-%x", name, sum[:4])
	}
	return name
}

// running returns the node's session, started and as far as wait, a Wait method
// of it, waits. ctx bounds only the wait.
func (n *Node) running(ctx context.Context, wait func(*session.Session, context.Context) error) (*session.Session, error) {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil, net.ErrClosed
	}
	s := n.current
	if s == nil {
		cfg, err := n.configure()
		if err != nil {
			n.mu.Unlock()
			return nil, err
		}
		s = session.Start(cfg)
		n.current = s
	}
	n.mu.Unlock()

	err := wait(s, ctx)
	if err == nil {
		return s, nil
	}
	// A start that failed may be tried again by the next call; a node that was
	// up and was put out stays out.
	failed := s.Err() != nil && !s.WasUp()
	if failed {
		<-s.Finished() // what is left of it takes moments
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, net.ErrClosed
	}
	if failed && n.current == s {
		n.current = nil
	}
	return nil, err
}

// Up starts the node, waits until it can be reached, and returns its Status.
// Nodes that are up already hear of it within moments: until then a dial of
// theirs is ErrUnknownHost.
// It fails at once if the node cannot enrol: the error says why and what to do.
//
// A node without a valid identity and without an auth key needs a person: Up
// then returns a *NeedsLoginError with the URL to visit, at once, and the node
// goes on waiting in the background. Call Up again to wait for that:
//
//	st, err := n.Up(ctx)
//	var login *mesh.NeedsLoginError
//	for errors.As(err, &login) && ctx.Err() == nil {
//		fmt.Println("to let this node in visit", login.URL)
//		st, err = n.Up(ctx)
//	}
//
// Status has the URL meanwhile. The same happens when the key of a node expires
// that is up, unless an auth key renews it: its connections end, its listeners,
// name and addresses stay.
func (n *Node) Up(ctx context.Context) (*Status, error) {
	if _, err := n.running(ctx, (*session.Session).WaitLogin); err != nil {
		return nil, fmt.Errorf("mesh: %w", err)
	}
	return n.Status(), nil
}

// Close leaves the mesh: connections and listeners end, and an ephemeral node
// is forgotten by the control server. It returns when nothing of the node is
// left running. It may be called at any time, also twice and while the node
// starts; after it every method fails with net.ErrClosed.
func (n *Node) Close() error {
	n.mu.Lock()
	n.closed = true
	s, t := n.current, n.transport
	n.mu.Unlock()
	if s == nil {
		return nil
	}
	s.Stop(net.ErrClosed)
	<-s.Finished()
	if t != nil {
		t.CloseIdleConnections()
	}
	// A Node that its owner keeps should not keep stack and netmap alive.
	n.mu.Lock()
	n.current = nil
	n.mu.Unlock()
	return nil
}

// WhoIs tells which node has a mesh address; the port does not matter. It asks
// the netmap in memory, no server.
func (n *Node) WhoIs(addr netip.AddrPort) (identity.Peer, bool) {
	s := n.upNow()
	if s == nil {
		return identity.Peer{}, false
	}
	return s.WhoIs(addr.Addr())
}

// upNow returns the session if the node is up, else nil.
func (n *Node) upNow() *session.Session {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.current == nil || !n.current.WasUp() {
		return nil
	}
	return n.current
}

// Status describes a node at one moment. It holds no secret.
type Status = session.Status

// PeerStatus describes a peer that this node may see.
type PeerStatus = session.PeerStatus

// Path tells how packets to a peer travel at one moment: directly, by a relay, or
// not at all since there was no traffic lately.
type Path = session.Path

// Pong is a peer's answer to Ping by one path.
type Pong = session.Pong

// Status returns what the node knows now. It starts nothing.
func (n *Node) Status() *Status {
	n.mu.Lock()
	s, closed := n.current, n.closed
	n.mu.Unlock()
	switch {
	case s != nil && s.WasUp():
		return s.Status()
	case closed:
		return &Status{Control: net.ErrClosed.Error()}
	case s != nil:
		return s.Starting()
	}
	return &Status{Control: "not started"}
}

// defaultNode serves the package-level functions.
var defaultNode Node

// Listen listens on the default node, which MESH_* variables configure. See
// Node.Listen.
func Listen(network, addr string) (net.Listener, error) { return defaultNode.Listen(network, addr) }

// Dial dials from the default node, which MESH_* variables configure. See
// Node.Dial.
func Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return defaultNode.Dial(ctx, network, addr)
}
