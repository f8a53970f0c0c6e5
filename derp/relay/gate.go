package relay

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// gate bounds the connections that have not logged in yet, in all and for
// each source. When it is full, the oldest that has lingered for a while makes
// place for a new one, so that connections which are only held open do not
// keep others out; if none has, the new one is turned away, so that under an
// honest rush those in progress finish.
type gate struct {
	max, perSource int

	mu      sync.Mutex // guards what follows
	all     list.List  // of *ticket, oldest first
	sources map[netip.Addr]*list.List
	evicted uint64
}

// linger is the age from which a pending connection may be evicted. A login
// needs a few round trips.
const linger = 2 * time.Second

// ticket is the place of one pending connection in the gate.
type ticket struct {
	g      *gate
	source netip.Addr
	since  time.Time
	cut    func() // closes the connection
	// inAll and inSource are nil when the ticket has left; guarded by gate.mu.
	inAll, inSource *list.Element
}

var errGateFull = errors.New("too many connections wait for login")

func newGate(max, perSource int) *gate {
	return &gate{max: max, perSource: perSource, sources: make(map[netip.Addr]*list.List)}
}

// sourceGroup is what counts as one source: an IPv4 address, or the /64 that one
// IPv6 host usually has all of.
func sourceGroup(source netip.Addr) netip.Addr {
	if source.Is6() {
		p, _ := source.WithZone("").Prefix(64)
		source = p.Addr()
	}
	return source
}

// enter takes a place. cut is called, without locks, if the connection has to
// give it up.
func (g *gate) enter(source netip.Addr, cut func()) (*ticket, error) {
	source = sourceGroup(source)
	now := time.Now()
	g.mu.Lock()
	mine := g.sources[source]
	var victim *ticket
	switch {
	case mine != nil && mine.Len() >= g.perSource:
		victim = mine.Front().Value.(*ticket)
	case g.all.Len() >= g.max:
		victim = g.all.Front().Value.(*ticket)
	}
	if victim != nil {
		g.evicted++
		if now.Sub(victim.since) < linger {
			g.mu.Unlock()
			return nil, errGateFull
		}
		victim.leaveLocked()
		mine = g.sources[source]
	}
	if mine == nil {
		mine = list.New()
		g.sources[source] = mine
	}
	t := &ticket{g: g, source: source, since: now, cut: cut}
	t.inAll = g.all.PushBack(t)
	t.inSource = mine.PushBack(t)
	g.mu.Unlock()
	if victim != nil {
		victim.cut()
	}
	return t, nil
}

// leave frees the place; it may be called again.
func (t *ticket) leave() {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	t.leaveLocked()
}

func (t *ticket) leaveLocked() {
	if t.inAll == nil {
		return
	}
	t.g.all.Remove(t.inAll)
	mine := t.g.sources[t.source]
	mine.Remove(t.inSource)
	if mine.Len() == 0 {
		delete(t.g.sources, t.source)
	}
	t.inAll, t.inSource = nil, nil
}

func (g *gate) pending() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all.Len()
}

func (g *gate) evictions() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.evicted
}

// gatedListener takes a place in the gate for each connection from the moment
// it is accepted, so that the bound covers TLS handshakes and HTTP requests.
type gatedListener struct {
	net.Listener
	g *gate
}

func (l gatedListener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		t, err := l.g.enter(sourceOf(nc), func() { nc.Close() })
		if err != nil {
			nc.Close()
			continue
		}
		return &gatedConn{Conn: nc, ticket: t}, nil
	}
}

// gatedConn gives its place back when it is closed, or earlier by its session.
type gatedConn struct {
	net.Conn
	ticket *ticket
}

func (c *gatedConn) Close() error {
	c.ticket.leave()
	return c.Conn.Close()
}
