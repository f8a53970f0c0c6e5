package netstack

import (
	"errors"
	"fmt"
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
// zero value is the defaults, with which a node whose connections all are full in
// both directions stays below 100 MB: they suit a process of 128 MB.
type Limits struct {
	// ReceiveMemory bounds, in bytes, what has come in by TCP and nobody has
	// read, over all connections. Each is sure of 16 KiB and the rest goes to
	// those that ask first: the window of a connection is never opened for
	// more than there is room for, so its peer waits and nothing is lost.
	// As much again, shared out in the same way, bounds what was written and
	// the peers have not acknowledged: a Write beyond it waits. 0 means 32 MiB,
	// or 32 KiB for each of Connections if that is more.
	ReceiveMemory int64
	// Connections bounds the TCP connections that are open: accepted, waiting
	// to be, dialled or being dialled. Beyond it a dial fails with
	// ErrTooManyConnections, and who connects is reset. Of those that were
	// closed with data still to be sent as many again go on in the background;
	// beyond that, or when there is no memory for what they have to send, the
	// oldest is reset. 0 means 1,024, or as many as
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
	// It is also the least that a send buffer has.
	sureBuffer = 16 << 10
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
// may hold is reserved before its window, or its send buffer, is opened for it,
// and given back when the connection is closed, or when what it still had to send
// has left: the sums are never more than the limit, whatever peers do.
type budget struct {
	most   int   // connections
	memory int64 // for all together, in each direction

	mu        sync.Mutex // guards the fields below
	conns     int
	spare     int64 // what is not reserved to receive, beyond sureBuffer for each of most
	wider     int64 // what is left of spareWindow
	spareSend int64 // what is not reserved to send, beyond sureBuffer for each of most
	lingering []lingerer
	sweepAt   int // the length of lingering at which it is looked through
}

// lingerer is a connection that the application has closed and that may still
// have data to send.
type lingerer struct {
	ep   *tcp.Endpoint
	held int64 // how much of spareSend, 0 once it has sent all
}

func newBudget(l Limits) *budget {
	spare := l.ReceiveMemory - int64(l.Connections)*sureBuffer
	return &budget{
		most: l.Connections, memory: l.ReceiveMemory, spare: spare, spareSend: spare,
		wider: spareWindow, sweepAt: 64,
	}
}

// attach tells the stack what an endpoint begins with of which the budget does
// not know yet: one that a peer is just making.
func attach(st *stack.Stack) error {
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: sureBuffer, Max: maxBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: sureBuffer, Max: maxBuffer}
	for _, opt := range []tcpip.SettableTransportProtocolOption{&receive, &send} {
		if err := st.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("netstack: set TCP option %T: %v", opt, err)
		}
	}
	return nil
}

// open makes room for a connection, and returns what it reserved to receive and to
// send, sureBuffer at least; or ErrTooManyConnections. accepted says that the peer
// knows of the connection: what it sent at once may have filled the window that it
// began with, and it has to hear that there is more room now.
func (b *budget) open(ep *tcp.Endpoint, accepted bool) (receive, send int64, err error) {
	b.mu.Lock()
	if b.conns >= b.most {
		b.mu.Unlock()
		return 0, 0, ErrTooManyConnections
	}
	b.conns++
	receive = min(sureBuffer+b.spare/16, defaultBuffer)
	b.spare -= receive - sureBuffer
	b.lookForRoom()
	send = min(sureBuffer+max(0, b.spareSend)/16, defaultBuffer)
	b.spareSend -= send - sureBuffer
	b.mu.Unlock()
	ops := ep.SocketOptions()
	ops.SetReceiveBufferSize(receive, accepted)
	ops.SetSendBufferSize(send, true) // from now on gVisor does not size it
	return receive, send, nil
}

// close gives back what a connection had reserved, and by how much it was
// widened. Of what it may still have to send, linger takes a part again.
func (b *budget) close(receive, extra, send int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns--
	b.spare += receive - sureBuffer + extra
	b.wider += extra
	b.spareSend += send - sureBuffer
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

// widenSend takes n bytes, or what there is, by which a send buffer grows.
func (b *budget) widenSend(n int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lookForRoom()
	n = max(0, min(n, b.spareSend))
	b.spareSend -= n
	return n
}

// linger takes note of a connection that the application has closed and that may
// still have up to held bytes to send.
func (b *budget) linger(ep *tcp.Endpoint, held int64) {
	if !live(ep) {
		return
	}
	if !sending(ep) {
		held = 0
	}
	var oldest []lingerer
	b.mu.Lock()
	b.lingering = append(b.lingering, lingerer{ep, held})
	b.spareSend -= held
	if len(b.lingering) >= b.sweepAt || b.spareSend < 0 {
		b.sweep()
		n := max(0, len(b.lingering)-b.most)
		room := b.spareSend
		for i, l := range b.lingering {
			if i >= n && room >= 0 {
				break
			}
			room += l.held
			n = max(n, i+1)
		}
		oldest = slices.Clone(b.lingering[:n])
		b.lingering = slices.Delete(b.lingering, 0, n)
		b.spareSend = room
		b.sweepAt = 2*len(b.lingering) + 64
	}
	b.mu.Unlock()
	for _, l := range oldest {
		l.ep.Abort()
	}
}

// lookForRoom sweeps when there is little to give. The caller holds mu.
func (b *budget) lookForRoom() {
	if b.spareSend < b.memory/16 {
		b.sweep()
	}
}

// sweep forgets the lingering that have ended, and takes back what those hold that
// have sent all. The caller holds mu.
func (b *budget) sweep() {
	b.lingering = slices.DeleteFunc(b.lingering, func(l lingerer) bool {
		if live(l.ep) {
			return false
		}
		b.spareSend += l.held
		return true
	})
	for i := range b.lingering {
		if l := &b.lingering[i]; l.held > 0 && !sending(l.ep) {
			b.spareSend += l.held
			l.held = 0
		}
	}
}

// sending reports whether a closed connection may have data that is not
// acknowledged.
func sending(ep *tcp.Endpoint) bool { return tcp.EndpointState(ep.State()) != tcp.StateFinWait2 }
