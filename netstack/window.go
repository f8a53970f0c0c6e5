package netstack

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// spareWindow is by how many bytes the receive buffers of all connections of a
// stack together may exceed what each begins with. Half of a buffer is window:
// what the peers may have under way goes through one UDP socket, and when many
// windows are larger than its buffer, trains are lost.
const spareWindow = 8 << 20

// window sizes the receive buffer of one connection. gVisor would do it too, but
// for it a packet that waits in a queue is one that is still on its way: it would
// give every fast connection the largest window there is, only to have more
// wait, until the socket in front of the stack overflows.
type window struct {
	read  int       // bytes read since
	since time.Time // when the last window was full; zero at first
	extra int64     // by how much it was widened
}

// widen takes note of n bytes that were read. A connection that reads a whole
// window within little more than a round trip waits for its window, and gets
// one twice as large. The round trip is that of the handshake, or what answers to
// our own data tell. The caller holds readMu.
func (c *Conn) widen(n int) {
	w := &c.window
	w.read += n
	size := c.ep.SocketOptions().GetReceiveBufferSize()
	if int64(w.read) < size/2 {
		return
	}
	now := time.Now()
	took := now.Sub(w.since)
	first := w.since.IsZero()
	w.read, w.since = 0, now
	if first || size >= maxBuffer {
		return
	}
	var info tcpip.TCPInfoOption
	if c.ep.GetSockOpt(&info) != nil || took > info.RTT*3/2 {
		return
	}
	c.mu.Lock()
	more := int64(0)
	if c.reserved > 0 {
		more = c.s.budget.widen(min(size, maxBuffer-size))
		w.extra += more
	}
	c.mu.Unlock()
	if more > 0 {
		c.ep.SocketOptions().SetReceiveBufferSize(size+more, true)
	}
}

// grow makes the send buffer larger when it is full and the path would take more
// than half of it at a time, and reports whether it did. gVisor does the same for
// each connection up to maxBuffer, and all together are then bounded by nothing.
// The most that gVisor allows, or the size of a buffer, must not be changed
// behind a writer who waits: it wakes him when what is queued falls below half
// of the size. So only the writer himself does it. The caller holds writeMu.
func (c *Conn) grow() bool {
	ops := c.ep.SocketOptions()
	size := ops.GetSendBufferSize()
	var info tcpip.TCPInfoOption
	if size >= maxBuffer || c.out.normal > 0 || c.ep.GetSockOpt(&info) != nil ||
		size >= 2*int64(info.SndCwnd)*int64(c.s.link.mtu) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reserved == 0 {
		return false
	}
	// gVisor may have set the size anew that it had read before it last changed.
	if c.room <= size {
		c.room += c.s.budget.widenSend(min(size, maxBuffer-size))
	}
	if c.room <= size {
		return false
	}
	ops.SetSendBufferSize(c.room, false)
	return true
}
