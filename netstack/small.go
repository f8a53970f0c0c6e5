package netstack

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// smallPacket is the size below which a packet that waits to be read takes
	// far more memory than what it says: receive buffers count the latter, of
	// which there is none in an empty datagram.
	smallPacket = 512
	// smallCost is what such a packet takes.
	smallCost = 1 << 10
	// trickle is how often one is let in when too many wait: it may be what a
	// stream waits for.
	trickle = 100 * time.Millisecond
)

// tally counts the small packets that came in for a connection or socket since
// its reader last left nothing to read, but for datagrams that it has read since.
type tally struct {
	ops     *tcpip.SocketOptions
	waiting atomic.Int64
	last    atomic.Int64 // when one was let in although too many wait; Unix nanoseconds
}

// full notes a small packet, and reports whether there is no room for it.
func (c *tally) full() bool {
	if c.waiting.Add(1) <= c.ops.GetReceiveBufferSize()/smallCost {
		return false
	}
	now, last := time.Now().UnixNano(), c.last.Load()
	return now-last < int64(trickle) || !c.last.CompareAndSwap(last, now)
}

// empty is called when the reader finds nothing, or has left nothing.
func (c *tally) empty() { c.waiting.Store(0) }

// taken is called when a datagram of a size was read.
func (c *tally) taken(size int) {
	if size+header.IPv6MinimumSize+header.UDPMinimumSize < smallPacket {
		c.waiting.Add(-1)
	}
}

// tallies finds the tally of a packet.
type tallies struct {
	mu sync.RWMutex // guards m
	m  map[Flow]*tally
}

// add makes the tally of a flow. That of a socket that is not connected has no
// remote address, and an unspecified local one if it is bound to any.
func (c *tallies) add(f Flow, ops *tcpip.SocketOptions) *tally {
	one := &tally{ops: ops}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = make(map[Flow]*tally)
	}
	c.m[f] = one
	return one
}

// remove forgets a flow, unless it is of another by now.
func (c *tallies) remove(f Flow, one *tally) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m[f] == one {
		delete(c.m, f)
	}
}

// drop reports whether a packet that has passed admit is one more small packet
// where too many wait already, or one that hides what it is for.
func (c *tallies) drop(p []byte) bool {
	f, l4, ok := addresses(p)
	if !ok {
		return p[0]>>4 == 6 && isOption(p[6])
	}
	if f.Proto == TCP && (len(l4) < header.TCPMinimumSize || len(l4) <= int(l4[header.TCPDataOffset]>>4)*4) {
		return false // no data
	}
	c.mu.RLock()
	one := c.find(f)
	c.mu.RUnlock()
	return one != nil && one.full()
}

// find is called with mu held.
func (c *tallies) find(f Flow) *tally {
	one := c.m[f]
	if one != nil || f.Proto == TCP {
		return one
	}
	f.Remote = netip.AddrPort{}
	if one = c.m[f]; one != nil {
		return one
	}
	if f.Local.Addr().Is4() {
		f.Local = netip.AddrPortFrom(netip.IPv4Unspecified(), f.Local.Port())
		if one = c.m[f]; one != nil {
			return one
		}
	}
	f.Local = netip.AddrPortFrom(netip.IPv6Unspecified(), f.Local.Port())
	return c.m[f]
}

// addresses reads the flow of a packet of TCP or UDP, or of the first fragment of
// one, and what follows the IP headers.
func addresses(p []byte) (f Flow, l4 []byte, ok bool) {
	var from, to netip.Addr
	if p[0]>>4 == 4 {
		const offset = 0x1fff
		hl := int(p[0]&15) * 4
		if hl < header.IPv4MinimumSize || len(p) < hl || binary.BigEndian.Uint16(p[6:])&offset != 0 {
			return f, nil, false
		}
		f.Proto, l4 = p[9], p[hl:]
		from, to = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	} else {
		const fragment, offset = 44, 0xfff8
		f.Proto, l4 = p[6], p[header.IPv6MinimumSize:]
		if f.Proto == fragment {
			if len(l4) < 8 || binary.BigEndian.Uint16(l4[2:])&offset != 0 {
				return f, nil, false
			}
			f.Proto, l4 = l4[0], l4[8:]
		}
		from, to = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	}
	if f.Proto != TCP && f.Proto != UDP || len(l4) < 4 {
		return f, nil, false
	}
	f.Remote = netip.AddrPortFrom(from, binary.BigEndian.Uint16(l4))
	f.Local = netip.AddrPortFrom(to, binary.BigEndian.Uint16(l4[2:]))
	return f, l4, true
}

// isOption reports whether the next header of IPv6 is one that nobody needs here:
// options for hops or for the destination, and routes.
func isOption(next byte) bool { return next == 0 || next == 43 || next == 60 }

// pieces notes how a program writes to a connection. gVisor keeps each piece
// apart until it is acknowledged, and the send buffer counts its bytes alone: a
// million single bytes fit into one that is meant for a megabyte. Whose pieces are
// small gets a smaller buffer.
type pieces struct {
	count, bytes int
	normal       int64 // the size of the buffer before it was made smaller; 0 = it is not
}

const (
	// fewPieces are written before their size is looked at.
	fewPieces = 1 << 10
	// pieceCost is the size of pieces that may fill the whole buffer. What they
	// take is more, but they are of our own program.
	pieceCost = 256
)

// add takes note of n bytes that were written. An attempt that found no room is no
// piece; nor may the buffer grow before its writer waits for room: gVisor wakes
// writers when half of the buffer gets free, and half of the larger one is.
func (p *pieces) add(ops *tcpip.SocketOptions, n int) {
	if n == 0 {
		return
	}
	p.count++
	p.bytes += n
	if p.count < fewPieces {
		return
	}
	size := int64(p.bytes / p.count)
	p.count, p.bytes = 0, 0
	switch now := ops.GetSendBufferSize(); {
	case size < pieceCost:
		p.normal = max(p.normal, now)
		ops.SetSendBufferSize(max(minBuffer, p.normal*size/pieceCost), false)
	case p.normal > 0:
		ops.SetSendBufferSize(max(p.normal, now), false)
		p.normal = 0
	}
}
