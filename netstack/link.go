package netstack

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is the network card of the stack: gVisor writes packets to it, they
// leave through out; deliver brings packets in.
type link struct {
	mtu     int
	gsoMax  uint32
	out     func([][]byte)
	size    func(netip.Addr) int // of packets; nil = mtu
	trains  sync.Pool            // of *train
	hold    hold
	crowd   crowd
	sending gate // calls of out
	taking  gate // calls of deliver
	tallies tallies

	dispatcher atomic.Pointer[stack.NetworkDispatcher] // nil before Attach and after the NIC is gone
}

var _ stack.LinkEndpoint = (*link)(nil)
var _ stack.GSOEndpoint = (*link)(nil)

func newLink(mtu int, out func([][]byte), size func(netip.Addr) int) *link {
	l := &link{mtu: mtu, gsoMax: gsoSize(mtu), out: out, size: size}
	l.trains.New = func() any { return new(train) }
	l.sending.init()
	l.taking.init()
	l.hold.init(mtu, l.sendLate)
	l.crowd.out = out
	return l
}

// WritePackets sends packets out in one batch. It never fails: a packet that
// cannot leave is lost, as on any network.
func (l *link) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	pkts := list.AsSlice()
	if !l.sending.enter() {
		return len(pkts), nil
	}
	defer l.sending.leave()
	t := l.trains.Get().(*train)
	t.fill(pkts, l.size)
	packets := t.packets
	if len(pkts) > 1 {
		packets = slices.DeleteFunc(packets, l.waits)
	} else if n := len(packets); n > 0 && l.waits(packets[n-1]) {
		packets = nil // a packet that was cut speaks as its last part does: it never waits
	}
	joined, start := false, false
	if len(packets) == 1 {
		joined, start = l.crowd.join(packets[0])
	}
	switch {
	case start && l.sending.enter():
		go func() {
			defer l.sending.leave()
			l.crowd.leave()
		}()
	case start: // closing
		l.crowd.leave()
	case len(packets) > 0 && !joined:
		l.crowd.send(packets)
	}
	t.reset()
	l.trains.Put(t)
	return len(pkts), nil
}

// waits reports whether a packet stays behind for now.
func (l *link) waits(p []byte) bool {
	waits, first := l.hold.keep(p)
	if first != nil {
		l.out([][]byte{first})
	}
	return waits
}

// sendLate sends packets that waited.
func (l *link) sendLate(packets [][]byte) {
	if !l.sending.enter() {
		return
	}
	defer l.sending.leave()
	l.out(packets)
}

// close returns when out is not called any more.
func (l *link) close() {
	l.hold.close()
	l.sending.close()
}

// deliver hands copies of packets to the stack, segments of a stream that follow
// one another as one.
func (l *link) deliver(packets [][]byte) {
	if !l.taking.enter() {
		return
	}
	defer l.taking.leave()
	dispatcher := l.dispatcher.Load()
	if dispatcher == nil {
		return
	}
	for len(packets) > 0 {
		proto, ok := admit(packets[0])
		if !ok {
			packets = packets[1:]
			continue
		}
		run := join(packets)
		if run.bytes < smallPacket && l.tallies.drop(packets[0]) {
			packets = packets[run.count:]
			continue
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: run.buffer(packets)})
		(*dispatcher).DeliverNetworkPacket(proto, pkt)
		pkt.DecRef()
		packets = packets[run.count:]
	}
}

// admit tells the IP version of a packet and drops what no member of the
// mesh may send: loopback and multicast addresses, neighbour and router
// discovery, multicast listener messages, redirects, and "packet too big" (the
// MTU of the mesh is a constant; believing a lie would let anyone who
// guesses the ports of a connection shrink its segments to a byte).
func admit(p []byte) (tcpip.NetworkProtocolNumber, bool) {
	if len(p) == 0 || len(p) > maxMTU {
		return 0, false
	}
	switch p[0] >> 4 {
	case 4:
		if len(p) < header.IPv4MinimumSize || p[12] == 127 || p[16] == 127 || p[16] >= 224 {
			return 0, false
		}
		if hl := int(p[0]&15) * 4; p[9] == 1 && len(p) > hl+1 {
			if typ, code := p[hl], p[hl+1]; typ == 5 || typ == 3 && code == 4 {
				return 0, false
			}
		}
		return header.IPv4ProtocolNumber, true
	case 6:
		if len(p) < header.IPv6MinimumSize || p[24] == 0xff || isLoopback6(p[8:24]) || isLoopback6(p[24:40]) {
			return 0, false
		}
		if p[6] == 58 && len(p) > 40 {
			if typ := p[40]; typ == 2 || typ >= 130 && typ <= 137 || typ == 143 {
				return 0, false
			}
		}
		return header.IPv6ProtocolNumber, true
	}
	return 0, false
}

func isLoopback6(a []byte) bool { return [16]byte(a) == [16]byte{15: 1} }

// Capabilities say that checksums of TCP, UDP and IPv4 need no look on the way in:
// each packet came whole from the peer that sealed it, by a proof that is
// stronger than they are. What a peer sums up wrongly it could as well send
// wrongly.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

func (l *link) IsAttached() bool                        { return l.dispatcher.Load() != nil }
func (l *link) MTU() uint32                             { return uint32(l.mtu) }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Wait()                                   {}
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) GSOMaxSize() uint32                      { return l.gsoMax }
func (l *link) SupportedGSO() stack.SupportedGSO        { return stack.HostGSOSupported }
