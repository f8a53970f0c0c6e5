package netstack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// gVisor returns the stack below, which is built when it is needed first: it has
// goroutines and tables, and a process may hold hundreds of nodes that wait for
// calls. Listeners on any address do not need it before a packet comes in.
func (s *Stack) gVisor() (*stack.Stack, error) {
	if st := s.st.Load(); st != nil {
		return st, nil
	}
	s.buildMu.Lock()
	defer s.buildMu.Unlock()
	if st := s.st.Load(); st != nil {
		return st, nil
	}
	s.mu.Lock()
	closed, addrs := s.closed, s.addrs
	var listeners []*Listener
	for l := range s.listeners {
		listeners = append(listeners, l)
	}
	s.mu.Unlock()
	if closed {
		return nil, net.ErrClosed
	}
	st, err := s.build(addrs, listeners)
	if err != nil {
		return nil, err
	}
	s.st.Store(st)
	return st, nil
}

// build makes the stack below. The caller holds buildMu.
func (s *Stack) build(addrs []netip.Addr, listeners []*Listener) (st *stack.Stack, err error) {
	if st, err = newGVisor(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			st.Destroy()
		}
	}()
	if err := attach(st); err != nil {
		return nil, err
	}
	if err := st.CreateNIC(nicID, s.link); err != nil {
		return nil, fmt.Errorf("netstack: create interface: %v", err)
	}
	st.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	for _, a := range addrs {
		if err := addAddress(st, a); err != nil {
			return nil, err
		}
	}
	for _, l := range listeners {
		if err := l.open(st); err != nil {
			return nil, fmt.Errorf("netstack: listen on port %d: %w", l.addr.Port(), err)
		}
	}
	return st, nil
}

func addAddress(st *stack.Stack, a netip.Addr) error {
	p := tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: toAddress(a).WithPrefix()}
	if terr := st.AddProtocolAddress(nicID, p, stack.AddressProperties{}); terr != nil {
		return fmt.Errorf("netstack: add address %v: %w", a, toErrno(terr))
	}
	return nil
}

// registered returns the endpoints of the stack below that have an address.
func (s *Stack) registered() []stack.TransportEndpoint {
	if st := s.st.Load(); st != nil {
		return st.RegisteredEndpoints()
	}
	return nil
}

// listenLater takes note of a listener on any address, if there is no stack below
// yet, and gives it a port as that would. It reports whether that is so.
func (s *Stack) listenLater(l *Listener) (bool, error) {
	s.buildMu.Lock()
	defer s.buildMu.Unlock()
	if s.st.Load() != nil {
		return false, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, net.ErrClosed
	}
	port := l.bind.Port
	for tries := 0; port == 0; tries++ {
		if tries == 100 {
			return false, nil // let gVisor look for one
		}
		if p := uint16(firstPort + rand.N(1<<16-firstPort)); !s.takenLocked(p, l) {
			port = p
		}
	}
	if s.takenLocked(port, l) {
		return false, syscall.EADDRINUSE
	}
	l.bind.Port = port
	l.addr = netip.AddrPortFrom(anyAddr(l.bind.Addr, l.proto), port)
	s.listeners[l] = struct{}{}
	return true, nil
}

// firstPort is the first of the ports that are given to who asks for any; gVisor
// has the same.
const firstPort = 16000

// takenLocked reports whether one of the listeners without a stack below has a
// port that l wants. The caller holds mu.
func (s *Stack) takenLocked(port uint16, l *Listener) bool {
	for other := range s.listeners {
		if other.bind.Port == port && (other.network == "tcp" || l.network == "tcp" || other.network == l.network) {
			return true
		}
	}
	return false
}
