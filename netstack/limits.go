package netstack

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// ErrTooManyConnections reports that a Stack has as many connections open as its
// Limits allow.
var ErrTooManyConnections = errors.New("too many connections are open")

// Limits bound what the connections of a Stack may take from the process. The
// zero value is the defaults, which suit a process of 128 MB.
type Limits struct {
	// ReceiveMemory bounds, in bytes, what has come in by TCP and nobody has
	// read, over all connections. Each is sure of 16 KiB and the rest goes to
	// those that ask first: the window of a connection is never opened for
	// more than there is room for, so its peer waits and nothing is lost.
	// What is to be sent may take about as much. 0 means 32 MiB, or 32 KiB for
	// each of Connections if that is more.
	ReceiveMemory int64
	// Connections bounds the TCP connections that are open: accepted, waiting
	// to be, dialled or being dialled. Beyond it a dial fails with
	// ErrTooManyConnections, and who connects is reset. Of those that were
	// closed with data still to be sent as many again go on in the background;
	// beyond that the oldest is reset. 0 means 1,024, or as many as
	// ReceiveMemory has room for if that is less.
	Connections int
	// AcceptBacklog bounds the connections that wait for Accept, by listener;
	// more are reset. 0 means 128.
	AcceptBacklog int
}

const (
	defaultReceiveMemory = 32 << 20
	defaultConnections   = 1024
	defaultBacklog       = 128

	// sureBuffer is the receive buffer of a connection when there is no memory
	// for more. TCP announces half of it, and keeps the rest for what its
	// bookkeeping takes.
	sureBuffer = 16 << 10
	// sureSend is the same of send buffers.
	sureSend = 32 << 10
)

// fill returns l with the defaults.
func (l Limits) fill() (Limits, error) {
	if l.ReceiveMemory < 0 || l.Connections < 0 || l.AcceptBacklog < 0 {
		return l, fmt.Errorf("netstack: limits %+v: none may be negative", l)
	}
	const each = 2 * sureBuffer
	switch {
	case l.ReceiveMemory == 0 && l.Connections == 0:
		l.ReceiveMemory, l.Connections = defaultReceiveMemory, defaultConnections
	case l.ReceiveMemory == 0:
		l.ReceiveMemory = max(defaultReceiveMemory, int64(l.Connections)*each)
	case l.Connections == 0:
		l.Connections = int(min(defaultConnections, l.ReceiveMemory/each))
	}
	if l.Connections == 0 || l.ReceiveMemory < int64(l.Connections)*each {
		return l, fmt.Errorf("netstack: %d bytes of receive memory are too few for %d connections, each needs %d",
			l.ReceiveMemory, max(1, l.Connections), each)
	}
	if l.AcceptBacklog == 0 {
		l.AcceptBacklog = defaultBacklog
	}
	return l, nil
}

// budget keeps the connections of a stack within its limits. What a connection
// may hold is reserved before its window is opened for it, and given back when
// the connection is closed: the sum is never more than the limit, whatever peers
// send.
type budget struct {
	most   int   // connections
	memory int64 // for all together

	mu        sync.Mutex   // guards the fields below; setSend calls gVisor with it held
	st        *stack.Stack // nil before attach
	conns     int
	spare     int64 // what is not reserved, beyond sureBuffer for each of most
	wider     int64 // what is left of spareWindow
	sendFor   int   // the number of connections that send buffers are bounded for
	lingering []*tcp.Endpoint
	sweepAt   int // the length of lingering at which it is looked through
}

func newBudget(l Limits) *budget {
	return &budget{
		most: l.Connections, memory: l.ReceiveMemory, spare: l.ReceiveMemory - int64(l.Connections)*sureBuffer,
		wider: spareWindow, sweepAt: 64,
	}
}

// attach tells the stack what connections begin with. It comes before the first.
func (b *budget) attach(st *stack.Stack) error {
	// The default is what an endpoint begins with of which the budget does not
	// know yet: one that a peer is just making.
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: sureBuffer, Max: maxBuffer}
	if err := st.SetTransportProtocolOption(tcp.ProtocolNumber, &receive); err != nil {
		return fmt.Errorf("netstack: set TCP option %T: %v", receive, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.st = st
	b.setSend(1)
	return nil
}

// setSend sets what send buffers begin with from now on: with more connections
// each has less. The caller holds mu.
func (b *budget) setSend(conns int) {
	b.sendFor = conns
	share := b.memory / int64(4*conns)
	// The most stays as it is: gVisor would cap the buffers that there are by a
	// smaller one, and then never wakes a writer who waits for room in his.
	option := tcpip.TCPSendBufferSizeRangeOption{
		Min: minBuffer, Default: int(min(defaultBuffer, max(sureSend, share))), Max: maxBuffer,
	}
	b.st.SetTransportProtocolOption(tcp.ProtocolNumber, &option) // fails only if these are not in order
}

// count changes the number of connections. The caller holds mu.
func (b *budget) count(by int) {
	b.conns += by
	if n := 1 << bits.Len(uint(max(0, b.conns-1))); n > b.sendFor || 4*n <= b.sendFor {
		b.setSend(n)
	}
}

// open makes room for a connection, and returns what it reserved, sureBuffer at
// least; or ErrTooManyConnections.
func (b *budget) open(ep *tcp.Endpoint) (reserved int64, err error) {
	b.mu.Lock()
	if b.conns >= b.most {
		b.mu.Unlock()
		return 0, ErrTooManyConnections
	}
	b.count(1)
	reserved = min(sureBuffer+b.spare/16, defaultBuffer)
	b.spare -= reserved - sureBuffer
	b.mu.Unlock()
	ep.SocketOptions().SetReceiveBufferSize(reserved, false)
	return reserved, nil
}

// close gives back what a connection had reserved, and by how much it was
// widened.
func (b *budget) close(reserved, extra int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count(-1)
	b.spare += reserved - sureBuffer + extra
	b.wider += extra
}

// widen takes n bytes, or what there is, by which a receive buffer grows.
func (b *budget) widen(n int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n = max(0, min(n, b.wider, b.spare))
	b.wider -= n
	b.spare -= n
	return n
}

// linger takes note of a connection that the application has closed and that may
// still have data to send.
func (b *budget) linger(ep *tcp.Endpoint) {
	if !live(ep) {
		return
	}
	var oldest []*tcp.Endpoint
	b.mu.Lock()
	b.lingering = append(b.lingering, ep)
	if len(b.lingering) >= b.sweepAt {
		b.lingering = slices.DeleteFunc(b.lingering, func(ep *tcp.Endpoint) bool { return !live(ep) })
		if over := len(b.lingering) - b.most; over > 0 {
			oldest = slices.Clone(b.lingering[:over])
			b.lingering = slices.Delete(b.lingering, 0, over)
		}
		b.sweepAt = 2*len(b.lingering) + 64
	}
	b.mu.Unlock()
	for _, ep := range oldest {
		ep.Abort()
	}
}
