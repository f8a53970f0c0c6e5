// Package engine is the data plane of one node: it wires path (ciphertext to
// and from peers), tunnel (WireGuard) and filter (policy) around the packet
// side of a network stack, and applies netmap snapshots to all of them.
//
// Out: stack → Engine.Out (which peer? note the flow) → tunnel → path.
// In: path → tunnel → Engine.deliver (whose address? allowed?) → stack.
package engine

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"mesh/identity"
	"mesh/internal/filter"
	"mesh/internal/netmap"
	"mesh/internal/path"
	"mesh/internal/tunnel"
)

// Link is the packet side of a network stack. Its methods may be called from
// many goroutines at once.
type Link interface {
	// In takes packets for the stack; the slices are lent for the call.
	In(packets [][]byte)
	// SetAddrs replaces the stack's own addresses.
	SetAddrs(addrs []netip.Addr) error
	// Reject makes a pending dial or a connected UDP socket on that 5-tuple
	// fail with err, and reports whether there was one.
	Reject(proto uint8, local, remote netip.AddrPort, err error) bool
	// Abort resets the connections that match, which then fail with err.
	Abort(match func(proto uint8, local, remote netip.AddrPort) bool, err error) int
	// AbortFlow is Abort for one flow; it reports whether there was one.
	AbortFlow(proto uint8, local, remote netip.AddrPort, err error) bool
}

// Config is what an Engine is made from.
type Config struct {
	Key   identity.NodePrivate
	Disco identity.DiscoPrivate
	Link  Link

	// Port is the UDP port, 0 for any.
	Port uint16
	// RelayOnly keeps all traffic on relays.
	RelayOnly bool
	// PortMapping asks the gateway of the local network for a port mapping once
	// it turns out that the node is behind a NAT.
	PortMapping bool
	// Endpoints are addresses of this node that the user knows of.
	Endpoints []netip.AddrPort
	// LoopbackEndpoints also advertises loopback addresses to peers.
	LoopbackEndpoints bool
	// OwnSockets keeps the node from sharing UDP sockets with others of the
	// process.
	OwnSockets bool
	// ListenUDP and DialTCP obtain sockets; nil is the host's network.
	ListenUDP func(ctx context.Context, network, addr string) (net.PacketConn, error)
	DialTCP   func(ctx context.Context, network, addr string) (net.Conn, error)
	// Report is told when what control should know of this node's network
	// changes.
	Report func(path.Report)
	// Changed is called when the host's network has changed, or when it slept; it
	// must be quick and not call the Engine. Optional.
	Changed func()
	// Logger nil is silent.
	Logger *zap.Logger
}

// Engine is the running data plane. Close it to free its sockets and
// goroutines.
type Engine struct {
	link   Link
	log    *zap.Logger
	path   *path.Path
	mapper *mapper
	tunnel *tunnel.Tunnel
	filter *filter.Filter

	current atomic.Pointer[netmap.Map]

	// judging is held for reading while packets are judged, in or out, so that
	// all of it goes by one state of filter and map, and for writing for a
	// moment by Apply. It is never held across a call to stack or tunnel.
	judging    sync.RWMutex
	restricted atomic.Pointer[restriction] // never nil; see Restrict
	// blocked holds addresses that are changing hands while Apply runs.
	blocked atomic.Pointer[[]netip.Prefix]

	applying sync.Mutex    // serialises Apply; guards the next two
	rules    *filter.Rules // as compiled last, nil if none are in force
	evicted  uint64        // flows that the filter had to forget, at the last Apply

	// rejections bound the rejections sent to peers, nil = none yet; see mayTell.
	rejections [64]atomic.Pointer[rate.Limiter]
	seed       maphash.Seed // which limit a peer has
	scratch    sync.Pool    // *[][]byte for batches
	counts     counters
	closing    sync.Once
	closeErr   error // of the one Close; read after closing
}

// New opens the sockets and starts the data plane, with no peers. Until the
// first Apply nothing gets in or out.
func New(c Config) (*Engine, error) {
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	e := &Engine{
		link:   c.Link,
		log:    c.Logger,
		filter: filter.New(filter.Config{}),
		seed:   maphash.MakeSeed(),
	}
	e.scratch.New = func() any { s := make([][]byte, 0, 64); return &s }
	e.current.Store(new(netmap.Map))
	e.restricted.Store(new(restriction))

	e.mapper = newMapper(c)
	started := make(chan struct{})
	defer close(started)
	var err error
	e.tunnel, err = tunnel.New(tunnel.Config{
		Key:    c.Key,
		Lookup: e.lookupTunnel,
		Send: func(peer identity.NodePublic, hint netip.AddrPort, datagrams [][]byte) error {
			return e.path.Send(peer, hint, datagrams)
		},
		Deliver: e.deliver,
		Authenticated: func(peer identity.NodePublic, src tunnel.Source) {
			e.path.Authenticated(peer, path.Source(src))
		},
		Index:  func() uint32 { return e.path.Index() },
		Reply:  func(to netip.AddrPort, datagram []byte) { e.path.Reply(to, datagram) },
		Logger: c.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("start tunnel: %w", err)
	}
	e.path, err = path.New(path.Config{
		Key:         c.Key,
		Disco:       c.Disco,
		Port:        c.Port,
		Lookup:      e.lookupPath,
		LookupDisco: e.lookupDisco,
		Receive: func(src path.Source, datagrams [][]byte) {
			<-started // so that whatever answers finds e.path
			e.tunnel.Receive(tunnel.Source(src), datagrams)
		},
		Report: func(r path.Report) {
			<-started
			e.mapper.report(r)
		},
		Changed: func() {
			<-started
			e.mapper.changed()
			if c.Changed != nil {
				c.Changed()
			}
		},
		Share:             !c.OwnSockets,
		Owns:              e.tunnel.Owns,
		Whose:             e.tunnel.Whose,
		ListenUDP:         c.ListenUDP,
		DialTCP:           c.DialTCP,
		RelayOnly:         c.RelayOnly,
		LoopbackEndpoints: c.LoopbackEndpoints,
		Logger:            c.Logger,
	})
	if err != nil {
		e.tunnel.Close()
		return nil, fmt.Errorf("open sockets: %w", err)
	}
	e.mapper.begin(e.path)
	return e, nil
}

// AddKey prepares the node for another key of its own: the data plane answers to
// both from now on, at relays too as far as they admit it. It waits until the
// home relay does, but not longer than ctx. Then peers may be told.
func (e *Engine) AddKey(ctx context.Context, k identity.NodePrivate) error {
	if err := e.tunnel.AddKey(k); err != nil {
		return err
	}
	e.path.AddKey(ctx, k)
	return nil
}

// UseKey makes a key, of AddKey, the node's. The one before is answered to for
// three minutes more; sessions with peers are renewed.
func (e *Engine) UseKey(k identity.NodePrivate) error {
	e.path.UseKey(k)
	return e.tunnel.SetKey(k)
}

// Close stops everything. It returns when all goroutines have ended, further
// calls too.
func (e *Engine) Close() error {
	e.closing.Do(func() {
		err := e.tunnel.Close()
		e.mapper.close() // releases the port while its socket is still ours
		e.closeErr = errors.Join(err, e.path.Close())
	})
	return e.closeErr
}

// Map returns the snapshot in force. It is never nil and never changes.
func (e *Engine) Map() *netmap.Map { return e.current.Load() }

// Ready waits until peers could reach this node: its home relay is connected
// or its UDP endpoints are known.
func (e *Engine) Ready(ctx context.Context) error { return e.path.Ready(ctx) }

// HomeRegion is the relay region at which peers find this node, 0 for none.
func (e *Engine) HomeRegion() int { return e.path.HomeRegion() }

// PathTo tells how packets to a peer travel at present.
func (e *Engine) PathTo(peer identity.NodePublic) path.PeerStatus { return e.path.Status(peer) }

// Ping asks a peer by relay and at every address it may have, and hands each
// answer to the function: see path.Ping.
func (e *Engine) Ping(ctx context.Context, peer identity.NodePublic, answer func(path.Pong)) error {
	return e.path.Ping(ctx, peer, answer)
}

// Admitted tells which peer began an inbound flow and the rule that let it in,
// with the snapshot that both are of. It reports false when there is no such
// flow, or when its address is no longer of the peer that began it.
func (e *Engine) Admitted(proto uint8, local, remote netip.AddrPort) (*netmap.Map, *netmap.Peer, identity.Rule, bool) {
	e.judging.RLock()
	m := e.Map()
	key, rule, ok := e.filter.Origin(filter.Flow{Proto: proto, Local: local, Remote: remote})
	e.judging.RUnlock()
	p, known := m.PeerByAddr(remote.Addr())
	if !ok || !known || p.Key != key || p.Expired {
		return m, nil, identity.Rule{}, false
	}
	return m, p, rule, true
}

func (e *Engine) lookupTunnel(k identity.NodePublic) (tunnel.Peer, bool) {
	p, ok := e.Map().Peer(k)
	if !ok || p.Expired {
		return tunnel.Peer{}, false
	}
	return tunnel.Peer{Key: k, AllowedIPs: p.AllowedIPs}, true
}

func (e *Engine) lookupPath(k identity.NodePublic) (path.Peer, bool) {
	p, ok := e.Map().Peer(k)
	if !ok || p.Expired {
		return path.Peer{}, false
	}
	return pathPeer(p), true
}

func (e *Engine) lookupDisco(d identity.DiscoPublic) []path.Peer {
	var out []path.Peer
	for _, p := range e.Map().PeersByDisco(d) {
		if !p.Expired {
			out = append(out, pathPeer(p))
		}
	}
	return out
}

func pathPeer(p *netmap.Peer) path.Peer {
	return path.Peer{Key: p.Key, Disco: p.DiscoKey, Endpoints: p.Endpoints, HomeRegion: p.HomeDERP}
}
