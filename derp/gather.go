package derp

import (
	"crypto/tls"
	"net"
	"sync"
)

// Gather is a connection to be put under TLS. It lets a Conn collect the
// records of a batch and send them with one system call: TLS by itself makes
// one for each 16 KiB. Apart from that it is the connection it wraps.
type Gather struct {
	net.Conn

	mu   sync.Mutex   // guards what follows
	held *gatherSpace // nil = everything is sent at once
}

// gatherSpace holds the records of one batch of WriteLoop, nearly always.
type gatherSpace struct {
	n int
	b [maxBatch + chunkLen + 1<<10]byte
}

var gatherSpaces = sync.Pool{New: func() any { return new(gatherSpace) }}

// NewGather wraps nc.
func NewGather(nc net.Conn) *Gather { return &Gather{Conn: nc} }

// NetConn returns the connection that is wrapped.
func (g *Gather) NetConn() net.Conn { return g.Conn }

// Write sends b, or keeps it until the batch is complete.
func (g *Gather) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h := g.held
	if h == nil {
		return g.Conn.Write(b)
	}
	if len(b) > len(h.b)-h.n {
		if err := g.sendLocked(); err != nil {
			return 0, err
		}
		if len(b) > len(h.b) {
			return g.Conn.Write(b)
		}
	}
	h.n += copy(h.b[h.n:], b)
	return len(b), nil
}

func (g *Gather) sendLocked() error {
	h := g.held
	if h.n == 0 {
		return nil
	}
	b := h.b[:h.n]
	h.n = 0
	_, err := g.Conn.Write(b)
	return err
}

// hold keeps what is written from now on.
func (g *Gather) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held == nil {
		g.held = gatherSpaces.Get().(*gatherSpace)
	}
}

// release sends what was kept, and everything at once from now on.
func (g *Gather) release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held == nil {
		return nil
	}
	err := g.sendLocked()
	gatherSpaces.Put(g.held)
	g.held = nil
	return err
}

// gatherUnder returns the Gather under the TLS of nc, nil if there is none.
func gatherUnder(nc net.Conn) *Gather {
	t, ok := nc.(*tls.Conn)
	if !ok {
		return nil
	}
	g, _ := t.NetConn().(*Gather)
	return g
}
