package engine

import (
	"net/netip"
	"slices"
	"sync"

	"mesh/control/wire"
	"mesh/internal/path"
	"mesh/internal/portmap"
)

// mapper tells path the addresses of the node that path cannot find: those that
// the user knows, and the one that the gateway forwards. It asks the gateway from
// the moment on that a STUN server sees the node at an address that is none of
// its own: a node that is not behind a NAT, or has no network but loopback, asks
// nobody and has no goroutine for that. Of nodes that share a port one asks.
type mapper struct {
	cfg  Config
	path *path.Path

	mu     sync.Mutex // guards the fields below
	client *portmap.Client
	closed bool
	seen   []netip.Addr // at which STUN saw the node at the last report
}

func newMapper(c Config) *mapper { return &mapper{cfg: c} }

// begin is called once, before anything else.
func (m *mapper) begin(p *path.Path) {
	m.path = p
	if len(m.cfg.Endpoints) > 0 {
		m.tell()
	}
}

// report passes on what path found out, with what is known of port mapping.
func (m *mapper) report(r path.Report) {
	m.look(r)
	if m.cfg.Report == nil {
		return
	}
	if c := m.current(); c != nil {
		if st := c.Status(); st.Err == nil {
			yes := true
			r.NetInfo.HavePortMap = true
			switch st.Protocol {
			case portmap.PCP:
				r.NetInfo.PCP = &yes
			case portmap.PMP:
				r.NetInfo.PMP = &yes
			case portmap.UPnP:
				r.NetInfo.UPnP = &yes
			}
		}
	}
	m.cfg.Report(r)
}

func (m *mapper) current() *portmap.Client {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.client
}

// look begins to ask the gateway, or to ask it again, if the report gives reason
// to.
func (m *mapper) look(r path.Report) {
	seen, natted := outside(r)
	m.mu.Lock()
	moved := !slices.Equal(seen, m.seen)
	m.seen = seen
	c := m.client
	if c == nil && natted && m.cfg.PortMapping && !m.closed && m.path.ClaimPort() {
		m.client = portmap.New(portmap.Config{
			LocalPort: m.path.LocalPort,
			Changed:   m.tell,
			ListenUDP: m.cfg.ListenUDP,
			DialTCP:   m.cfg.DialTCP,
			Logger:    m.cfg.Logger,
		})
	}
	m.mu.Unlock()
	if c != nil && moved {
		c.NetworkChanged() // the gateway may have another address, and no mapping
	}
}

// changed notes that the host's network has changed.
func (m *mapper) changed() {
	if c := m.current(); c != nil {
		c.NetworkChanged()
	}
}

// outside returns the addresses at which STUN servers see the node, and whether
// there is a NAT for IPv4 in between.
func outside(r path.Report) (seen []netip.Addr, natted bool) {
	own := make(map[netip.Addr]bool)
	for i, a := range r.Endpoints {
		switch r.Types[i] {
		case wire.EndpointLocal:
			own[a.Addr()] = true
		case wire.EndpointSTUN:
			seen = append(seen, a.Addr())
		}
	}
	natted = slices.ContainsFunc(seen, func(a netip.Addr) bool { return a.Is4() && !own[a] && !a.IsLoopback() })
	slices.SortFunc(seen, netip.Addr.Compare)
	return slices.Compact(seen), natted
}

// tell gives path the present list. It is called by begin and by the client, from
// its goroutine.
func (m *mapper) tell() {
	var list []path.Endpoint
	if c := m.current(); c != nil {
		if a, ok := c.Mapping(); ok {
			list = append(list, path.Endpoint{Addr: a, Type: wire.EndpointPortMapped})
		}
	}
	for _, a := range m.cfg.Endpoints {
		list = append(list, path.Endpoint{Addr: a, Type: wire.EndpointExplicit})
	}
	m.path.SetEndpoints(list)
}

// close gives the mapping back. It takes half a second at most, where there is
// one.
func (m *mapper) close() {
	m.mu.Lock()
	m.closed = true
	c := m.client
	m.mu.Unlock()
	if c != nil {
		c.Close()
	}
}
