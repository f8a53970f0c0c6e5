package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"mesh/identity"
	"mesh/internal/session"
	"mesh/netstack"
)

// stackConn is a connection of the network stack.
type stackConn interface {
	net.Conn
	Flow() netstack.Flow
}

// Conn is a connection between two nodes of the mesh, TCP or UDP. It behaves
// as package net's connections do and knows who the other end is.
type Conn struct {
	stackConn
	peer identity.Peer
	s    *session.Session
}

// Peer returns the proven identity of the other end, as it was when the
// connection was made. For an accepted connection it names the rule that
// admitted it; the connection ends with ErrRevoked when that rule goes or the
// peer is no longer who it was.
func (c *Conn) Peer() identity.Peer { return c.peer }

// Path tells how the connection's packets travel now: all connections between two
// nodes share the path, which may become a better one at any time. It is the zero
// Path for a connection of a node with itself.
func (c *Conn) Path() Path { return c.s.PathTo(c.peer.Key) }

// CloseWrite ends the outgoing half of a TCP connection; the peer reads EOF.
// It fails with errors.ErrUnsupported for UDP.
func (c *Conn) CloseWrite() error {
	if h, ok := c.stackConn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return fmt.Errorf("close write: %w", errors.ErrUnsupported)
}

// Addr is the address of a datagram's sender or receiver. Its Peer is zero
// where it is not known.
type Addr struct {
	netip.AddrPort
	Peer identity.Peer
}

// Network returns "udp".
func (a *Addr) Network() string { return "udp" }

// Listen announces on this node's mesh addresses. network is "tcp", "tcp4" or
// "tcp6"; addr is ":port", or an own mesh address and port; port 0 picks a free
// one. It starts the node if need be. Accepted connections are *Conn.
//
// Nothing is opened on the host: only peers that the policy lets in can connect.
func (n *Node) Listen(network, addr string) (net.Listener, error) {
	l, err := n.listen(network, addr)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: nameAddr{network, addr}, Err: err}
	}
	return l, nil
}

func (n *Node) listen(network, addr string) (net.Listener, error) {
	s, local, err := n.bind("tcp", network, addr)
	if err != nil {
		return nil, err
	}
	l, err := s.Stack().Listen(network, local)
	if err != nil {
		return nil, s.Refine(inner(err))
	}
	return &listener{Listener: l, s: s}, nil
}

// ListenPacket announces for datagrams on this node's mesh addresses. network
// is "udp", "udp4" or "udp6". The addresses that ReadFrom returns are *Addr
// with the sender's identity. Datagrams of senders whose permission was
// withdrawn are dropped, and so are answers to them; Status counts both.
func (n *Node) ListenPacket(network, addr string) (net.PacketConn, error) {
	s, local, err := n.bind("udp", network, addr)
	if err == nil {
		var c *netstack.PacketConn
		if c, err = s.Stack().ListenUDP(network, local); err == nil {
			return &packetConn{PacketConn: c, s: s}, nil
		}
		err = s.Refine(inner(err))
	}
	return nil, &net.OpError{Op: "listen", Net: network, Addr: nameAddr{network, addr}, Err: err}
}

// bind starts the node and reads an address to listen on.
func (n *Node) bind(want, network, addr string) (*session.Session, netip.AddrPort, error) {
	proto, family, err := splitNetwork(network)
	if err != nil || proto != want {
		return nil, netip.AddrPort{}, net.UnknownNetworkError(network)
	}
	host, port, err := splitAddr(proto, addr)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	// A node that comes up does so in bounded time, and says what keeps it.
	s, err := n.running(context.Background(), (*session.Session).WaitStack)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	if host == "" {
		return s, netip.AddrPortFrom(netip.Addr{}, port), nil
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		return s, netip.AddrPortFrom(ip, port), nil
	}
	peer, ip, err := resolve(s.Engine().Map(), host, family)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	if peer != nil {
		return nil, netip.AddrPort{}, &net.AddrError{Err: "not an address of this node", Addr: addr}
	}
	return s, netip.AddrPortFrom(ip, port), nil
}

type listener struct {
	*netstack.Listener
	s *session.Session
}

// Accept waits for the next connection that the policy admits.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.AcceptConn()
		if err != nil {
			var op *net.OpError
			if errors.As(err, &op) {
				op.Err = l.s.Refine(op.Err)
			}
			return nil, err
		}
		if peer, ok := l.s.Origin(c.Flow()); ok {
			return &Conn{stackConn: c, peer: peer, s: l.s}, nil
		}
		// The peer was removed between handshake and Accept.
		c.Close()
	}
}

type packetConn struct {
	*netstack.PacketConn
	s *session.Session

	mu   sync.Mutex                           // guards sent
	sent map[netip.AddrPort]identity.StableID // whom this socket wrote to, as it was then
}

// maxSent bounds packetConn.sent. Answers of whom it forgot are dropped.
const maxSent = 16384

// ReadFrom returns the next datagram of a peer, with its identity.
func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := c.PacketConn.ReadFromUDPAddrPort(b)
		if err != nil {
			return n, nil, c.refine(err)
		}
		if peer, ok := c.sender(from); ok {
			return n, &Addr{AddrPort: from, Peer: peer}, nil
		}
		c.s.CountLate()
	}
}

// ReadFromUDPAddrPort is ReadFrom without the identity: of a peer that is
// still allowed to send all the same.
func (c *packetConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	for {
		n, from, err := c.PacketConn.ReadFromUDPAddrPort(b)
		if err != nil {
			return n, from, c.refine(err)
		}
		if _, ok := c.sender(from); ok {
			return n, from, nil
		}
		c.s.CountLate()
	}
}

// sender tells who sent a datagram. The datagram has waited, and what was true
// when it came may no longer be: it must be of a flow that a rule admits now, or
// answer the very node that this socket wrote to.
func (c *packetConn) sender(remote netip.AddrPort) (identity.Peer, bool) {
	local := c.PacketConn.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, own := range c.s.Engine().Map().Self().Addresses {
		at := own.Addr()
		if at.Is4() != remote.Addr().Is4() || !local.Addr().IsUnspecified() && local.Addr().Unmap() != at {
			continue
		}
		f := netstack.Flow{Proto: netstack.UDP, Local: netip.AddrPortFrom(at, local.Port()), Remote: remote}
		if peer, ok := c.s.Origin(f); ok {
			return peer, true
		}
	}
	c.mu.Lock()
	to, wrote := c.sent[remote]
	c.mu.Unlock()
	if !wrote {
		return identity.Peer{}, false
	}
	peer, ok := c.s.WhoIs(remote.Addr())
	return peer, ok && peer.ID == to && to != ""
}

// WriteTo sends a datagram to an address of a peer: an *Addr or *net.UDPAddr.
// An address outside the mesh is ErrUnknownHost.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	remote, ok := addrPortOf(to)
	if !ok {
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: to, Err: &net.AddrError{Err: "not a mesh address"}}
	}
	return c.WriteToUDPAddrPort(b, remote)
}

// WriteToUDPAddrPort is WriteTo with another form of address.
func (c *packetConn) WriteToUDPAddrPort(b []byte, remote netip.AddrPort) (int, error) {
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	m := c.s.Engine().Map()
	var id identity.StableID
	if p, ok := m.PeerByAddr(remote.Addr()); ok {
		id = identity.StableID(p.StableID)
	} else if session.IsSelf(m, remote.Addr()) {
		id = identity.StableID(m.Self().StableID)
	} else {
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: net.UDPAddrFromAddrPort(remote), Err: unknownHost(remote.Addr().String())}
	}
	c.mu.Lock()
	if have, ok := c.sent[remote]; !ok || have != id {
		if !ok && len(c.sent) >= maxSent {
			for other := range c.sent {
				delete(c.sent, other)
				break
			}
		}
		if c.sent == nil {
			c.sent = map[netip.AddrPort]identity.StableID{}
		}
		c.sent[remote] = id
	}
	c.mu.Unlock()
	n, err := c.PacketConn.WriteToUDPAddrPort(b, remote)
	return n, c.refine(err)
}

// refine says why the stack is gone, if it is.
func (c *packetConn) refine(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		op.Err = c.s.Refine(op.Err)
	}
	return err
}

func addrPortOf(a net.Addr) (netip.AddrPort, bool) {
	switch a := a.(type) {
	case *Addr:
		if a != nil {
			return a.AddrPort, true
		}
	case *net.UDPAddr:
		if a != nil {
			return a.AddrPort(), true
		}
	}
	return netip.AddrPort{}, false
}

// PeerOf returns the identity of the other end of c. It sees through wrappers
// with a NetConn method, such as *tls.Conn. It reports false for a connection
// that is not of the mesh.
func PeerOf(c net.Conn) (identity.Peer, bool) {
	for range 16 { // a wrapper that wraps itself must not hang us
		switch w := c.(type) {
		case *Conn:
			return w.peer, true
		case interface{ NetConn() net.Conn }:
			c = w.NetConn()
		default:
			return identity.Peer{}, false
		}
	}
	return identity.Peer{}, false
}

type peerKey struct{}

// ConnContext is for http.Server.ConnContext: it puts the peer's identity into
// the context of each request, for PeerFromContext.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if p, ok := PeerOf(c); ok {
		return context.WithValue(ctx, peerKey{}, p)
	}
	return ctx
}

// PeerFromContext returns the identity that ConnContext put into ctx.
func PeerFromContext(ctx context.Context) (identity.Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(identity.Peer)
	return p, ok
}
