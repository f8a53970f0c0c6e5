package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"mesh/identity"
	"mesh/internal/netmap"
	"mesh/internal/session"
)

const (
	// dialTimeout bounds a Dial whose context has no deadline.
	dialTimeout = 10 * time.Second
	// offlineTimeout bounds a Dial to a peer that the control server believes
	// to be offline: long enough to find out that it is wrong.
	offlineTimeout = 3 * time.Second
	// awayTimeout is the same if its relay says so, too.
	awayTimeout = 700 * time.Millisecond
	// unknownTimeout is how long a Dial waits for the map of a name that is not
	// known, and a Ping for a way to its peer: of nodes that come up together each may be up before the other has
	// heard of it.
	unknownTimeout = 300 * time.Millisecond
)

// Dial connects to a peer. network is "tcp", "udp" or one of these with "4" or
// "6"; addr is "name:port" with a short name, a full name or a mesh address.
// It starts the node if need be. Without a deadline in ctx it takes 10 seconds
// at most.
//
// Only the mesh is ever dialled: a name or address that no visible peer has is
// ErrUnknownHost, after 300 ms in which the news of a peer that has just come up
// may arrive. A refusal by the peer's policy is ErrDenied; for "udp" it
// comes from a later Read or Write. A port that nobody listens on is
// syscall.ECONNREFUSED, a peer that is away ErrPeerOffline, one whose key has
// expired ErrRevoked. The connection is a *Conn; when the permission for it is
// withdrawn Read and Write fail with ErrRevoked, at both ends.
//
// A node that waits for a person to log in fails at once with ErrNeedsLogin.
func (n *Node) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := n.dial(ctx, network, addr)
	if err != nil {
		if _, ok := err.(interface{ Timeout() bool }); !ok && timedOut(err) {
			err = timeoutError{err}
		}
		return nil, &net.OpError{Op: "dial", Net: network, Addr: nameAddr{network, addr}, Err: err}
	}
	return c, nil
}

// nameAddr is an address as the caller wrote it.
type nameAddr struct{ network, addr string }

func (a nameAddr) Network() string { return a.network }
func (a nameAddr) String() string  { return a.addr }

func (n *Node) dial(ctx context.Context, network, addr string) (*Conn, error) {
	proto, family, err := splitNetwork(network)
	if err != nil {
		return nil, err
	}
	host, port, err := splitAddr(proto, addr)
	if err != nil {
		return nil, err
	}
	if host == "" || port == 0 {
		return nil, &net.AddrError{Err: "missing host or port, want \"name:port\"", Addr: addr}
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, dialTimeout)
		defer cancel()
	}
	s, err := n.running(ctx, (*session.Session).Wait)
	if err != nil {
		return nil, err
	}
	m, peer, addrs, err := lookUp(ctx, s, host, family)
	if err != nil {
		return nil, err
	}
	id := m.SelfIdentity()
	if peer != nil {
		id = m.Identity(peer)
		if peer.Expired {
			return nil, &RevokedError{Peer: id, Reason: "its key expired"}
		}
	}
	remote := netip.AddrPortFrom(addrs, port)
	if proto == "udp" {
		c, err := s.Stack().DialUDP(netip.Addr{}, remote)
		if err != nil {
			return nil, s.Refine(inner(err))
		}
		return dialled(s, c, id)
	}
	within, gaveUp := ctx, func() bool { return false }
	if peer != nil && peer.Online != nil && !*peer.Online {
		within, gaveUp = s.UnlessOffline(ctx, peer.ID, awayTimeout, offlineTimeout)
	}
	c, err := s.Stack().DialTCP(within, netip.Addr{}, remote)
	offline := gaveUp()
	if err == nil {
		return dialled(s, c, id)
	}
	err = s.Refine(inner(err))
	switch {
	case offline && (timedOut(err) || errors.Is(err, context.Canceled)):
		return nil, offlineError(id, peer)
	case timedOut(err) && peer != nil && ctx.Err() != context.Canceled:
		return nil, fmt.Errorf("no answer from %s, last tried %s: %w", id.Name, s.DescribePath(id.Key), err)
	}
	return nil, err
}

// Ping asks a peer, by its short name, full name or mesh address, for an answer by
// every way to it, and calls answer for each that comes: the fastest first, the
// way by the relay and each address at most once. It counts as traffic, so that a
// direct path is looked for: ping again to see it. It returns when all have
// answered, or a moment after the first answer; without one after five seconds,
// or when ctx ends. answer is called from this goroutine.
//
// It asks the nodes as such and no program on them, so no policy is in the way of
// an answer: who may see a peer may ping it. A name or address that no visible
// peer has is ErrUnknownHost, a peer that does not answer ErrPeerOffline if the
// control server says so, too, and else an error with a Timeout method.
func (n *Node) Ping(ctx context.Context, host string, answer func(Pong)) error {
	if err := n.ping(ctx, host, answer); err != nil {
		return fmt.Errorf("mesh: ping %s: %w", host, err)
	}
	return nil
}

func (n *Node) ping(ctx context.Context, host string, answer func(Pong)) error {
	s, err := n.running(ctx, (*session.Session).Wait)
	if err != nil {
		return err
	}
	m, peer, _, err := lookUp(ctx, s, host, "")
	switch {
	case err != nil:
		return err
	case peer == nil:
		return errors.New("that is this node itself")
	}
	id := m.Identity(peer)
	if peer.Expired {
		return &RevokedError{Peer: id, Reason: "its key expired"}
	}
	err = s.Ping(ctx, id, unknownTimeout, answer)
	switch {
	case err == nil:
		return nil
	case s.Err() != nil:
		return s.Err()
	case !timedOut(err):
		return err
	case ctx.Err() == nil && peer.Online != nil && !*peer.Online:
		return offlineError(id, peer)
	}
	return timeoutError{err}
}

// dialled makes a Conn of c, which was dialled as the address of want. The
// address may have gone to another node meanwhile: from here on a change ends
// the connection, before here it is found out.
func dialled(s *session.Session, c stackConn, want identity.Peer) (*Conn, error) {
	now, ok := s.WhoIs(c.Flow().Remote.Addr())
	if !ok || now.ID != want.ID || now.ID == "" && now.Key != want.Key {
		c.Close()
		return nil, &RevokedError{Peer: want, Reason: "it left the mesh or changed its address during the dial"}
	}
	return &Conn{stackConn: c, peer: now, s: s}, nil
}

func timedOut(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.ETIMEDOUT)
}

// timeoutError is an error that says more than that time ran out, for callers
// who ask for Timeout as they do with package net.
type timeoutError struct{ error }

func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }
func (e timeoutError) Unwrap() error { return e.error }

// inner takes the error out of the stack's *net.OpError, since ours goes
// around it.
func inner(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// lookUp is resolve in the map in force, waiting a moment for the next one if that
// may be the first to know of host.
func lookUp(ctx context.Context, s *session.Session, host, family string) (m *netmap.Map, peer *netmap.Peer, a netip.Addr, err error) {
	m = s.AwaitMap(ctx, unknownTimeout, func(m *netmap.Map) bool {
		peer, a, err = resolve(m, host, family)
		return !errors.Is(err, ErrUnknownHost)
	})
	return m, peer, a, err
}

// resolve finds the peer that host means and its address of the family ("4",
// "6" or "" for any). A nil peer with a nil error is this node itself.
func resolve(m *netmap.Map, host, family string) (*netmap.Peer, netip.Addr, error) {
	var peer *netmap.Peer
	var addrs []netip.Addr
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap()
		p, ok := m.PeerByAddr(ip)
		if !ok && !session.IsSelf(m, ip) {
			return nil, netip.Addr{}, unknownHost(host)
		}
		peer, addrs = p, []netip.Addr{ip}
	} else if p, ok := m.PeerByName(host); ok {
		peer, addrs = p, m.Identity(p).Addresses
	} else if session.IsSelfName(m, host) {
		addrs = m.SelfIdentity().Addresses
	} else {
		return nil, netip.Addr{}, unknownHost(host)
	}
	for _, a := range addrs {
		if family == "" || (family == "4") == a.Is4() {
			return peer, a, nil
		}
	}
	return nil, netip.Addr{}, &net.AddrError{Err: "no IPv" + family + " address on the mesh", Addr: host}
}

func unknownHost(host string) error {
	return fmt.Errorf("%w: %q is no peer that this node may see", ErrUnknownHost, host)
}

func splitNetwork(network string) (proto, family string, err error) {
	switch network {
	case "tcp", "udp":
		return network, "", nil
	case "tcp4", "tcp6", "udp4", "udp6":
		return network[:3], network[3:], nil
	}
	return "", "", net.UnknownNetworkError(network)
}

func splitAddr(proto, addr string) (host string, port uint16, err error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	if service == "" {
		return host, 0, nil
	}
	p, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		// A service name, from the table that package net knows without
		// asking the network.
		n, lerr := net.LookupPort(proto, service)
		if lerr != nil {
			return "", 0, &net.AddrError{Err: "invalid port", Addr: addr}
		}
		p = uint64(n)
	}
	return host, uint16(p), nil
}

// HTTPClient returns a client whose requests go to peers only: it dials with
// Dial and uses no proxy. All clients of a node share their connections.
func (n *Node) HTTPClient() *http.Client {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.transport == nil {
		n.transport = &http.Transport{
			DialContext:           n.Dial,
			MaxIdleConnsPerHost:   16,
			IdleConnTimeout:       90 * time.Second,
			TLSHandshakeTimeout:   10 * time.Second,
			ExpectContinueTimeout: time.Second,
		}
	}
	return &http.Client{Transport: n.transport}
}

// PeerOfflineError reports that a peer did not answer and that the control
// server has not seen it for a while.
type PeerOfflineError struct {
	Peer     identity.Peer
	LastSeen time.Time // zero if unknown
}

func (e *PeerOfflineError) Error() string {
	if e.LastSeen.IsZero() {
		return e.Peer.Name + " is offline"
	}
	return fmt.Sprintf("%s is offline, last seen %s", e.Peer.Name, e.LastSeen.UTC().Format(time.RFC3339))
}

func offlineError(id identity.Peer, p *netmap.Peer) error {
	e := &PeerOfflineError{Peer: id}
	if p.LastSeen != nil {
		e.LastSeen = *p.LastSeen
	}
	return e
}

// Is makes errors.Is(err, ErrPeerOffline) true.
func (e *PeerOfflineError) Is(target error) bool { return target == ErrPeerOffline }

// Timeout reports true, as for any peer that does not answer.
func (e *PeerOfflineError) Timeout() bool { return true }
