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
// nobody and has no goroutine for that.
type mapper struct {
	cfg  Config
	path *path.Path

	mu     sync.Mutex // guards the fields below
	client *portmap.Client
	closed bool
	where  []netip.Addr // by which the network was known at the last report
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
	where, natted := network(r)
	m.mu.Lock()
	moved := !slices.Equal(where, m.where)
	m.where = where
	c := m.client
	if c == nil && natted && m.cfg.PortMapping && !m.closed {
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
		c.NetworkChanged()
	}
}

// network returns the addresses by which a node's network can be told from
// another, and whether it is behind a NAT for IPv4.
func network(r path.Report) (where []netip.Addr, natted bool) {
	var own []netip.Addr
	for i, a := range r.Endpoints {
		switch r.Types[i] {
		case wire.EndpointLocal:
			own = append(own, a.Addr())
			where = append(where, a.Addr())
		case wire.EndpointSTUN:
			where = append(where, a.Addr())
		}
	}
	for i, a := range r.Endpoints {
		if r.Types[i] == wire.EndpointSTUN && a.Addr().Is4() && !slices.Contains(own, a.Addr()) && !a.Addr().IsLoopback() {
			natted = true
		}
	}
	slices.SortFunc(where, netip.Addr.Compare)
	return slices.Compact(where), natted
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
