package netstack

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// crowdWithin is how close the small packets of different connections have
	// to follow one another to count as a crowd, crowdFrom how many of them.
	crowdWithin = time.Millisecond
	crowdFrom   = 8
	crowdMost   = 48       // packets that wait at most,
	crowdBytes  = 32 << 10 // and their bytes

	// crowdFollow is how many bytes may wait with those that follow them.
	crowdFollow = 2 << 20
)

// crowd lets the small packets of many busy connections leave together: what
// each costs on its way out and in, most of all in system calls, is then shared.
// They wait for no time, only for other goroutines that are ready to run, which
// often have packets too: on an idle machine for nobody. A connection that is
// alone never waits.
type crowd struct {
	out     func([][]byte)
	pending atomic.Bool // something waits, or is being sent after it did

	mu    sync.Mutex // guards the fields below; not held during out
	last  uint32     // ports of the last small packet
	at    time.Time  // when it came
	score int        // how many before it were of other connections
	wait  *train     // what waits; nil at first
	away  *train     // what is being sent; nil = nothing
	spare *train     // the one that was sent before
	going bool       // a goroutine is about to send it

	leaving sync.Mutex // held while what waited is sent, so that it stays in order; taken before mu
}

// smallData tells the ports of a packet that is data of a TCP connection and
// nothing else.
func smallData(p []byte) (ports uint32, ok bool) {
	tcp := segmentOf(p)
	if tcp == nil {
		return 0, false
	}
	flags := header.TCPFlags(tcp[header.TCPFlagsOffset])
	return binary.BigEndian.Uint32(tcp), flags&^header.TCPFlagPsh == header.TCPFlagAck && len(tcp) > int(tcp[header.TCPDataOffset]>>4)*4
}

// segmentOf is what follows the IP header in a packet of TCP, at least a header;
// nil for others.
func segmentOf(p []byte) []byte {
	switch {
	case len(p) >= header.IPv4MinimumSize+header.TCPMinimumSize && p[0] == 0x45 && p[9] == byte(header.TCPProtocolNumber):
		return p[header.IPv4MinimumSize:]
	case len(p) >= header.IPv6MinimumSize+header.TCPMinimumSize && p[0]>>4 == 6 && p[6] == byte(header.TCPProtocolNumber):
		return p[header.IPv6MinimumSize:]
	}
	return nil
}

// has reports whether a packet of a connection with such ports is in the train,
// which may be nil.
func (t *train) has(ports uint32) bool {
	return t != nil && slices.ContainsFunc(t.packets, func(p []byte) bool {
		tcp := segmentOf(p)
		return tcp != nil && binary.BigEndian.Uint32(tcp) == ports
	})
}

// bytes is the length of all packets in the train.
func (t *train) bytes() (n int) {
	for _, p := range t.packets {
		n += len(p)
	}
	return n
}

// join takes a copy of a packet if it is one of a crowd, to be sent soon; start
// says that the caller has to see to that, by a goroutine that calls leave.
func (c *crowd) join(p []byte) (joined, start bool) {
	ports, ok := smallData(p)
	if !ok {
		return false, false
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case now.Sub(c.at) > crowdWithin:
		c.score = 0
	case ports != c.last:
		c.score = min(c.score+1, 2*crowdFrom)
	default:
		c.score = max(c.score-2, 0)
	}
	c.last, c.at = ports, now
	if c.score < crowdFrom {
		return false, false
	}
	if c.wait == nil {
		c.wait = &train{buf: make([]byte, 0, crowdBytes)}
	}
	if w := c.wait; len(w.packets) >= crowdMost || len(w.buf)+len(p) > cap(w.buf) {
		return false, false
	}
	b := c.wait.take(len(p))
	copy(b, p)
	c.wait.packets = append(c.wait.packets, b)
	c.pending.Store(true)
	start = !c.going
	c.going = true
	return true, start
}

// send sends packets now, after those that wait; but it does not wait for who is
// sending those: two stacks that hand packets to each other would, for ever.
// What overtakes packets of its own connection then would look like a loss: it
// waits with them.
func (c *crowd) send(packets [][]byte) {
	if c.pending.Load() {
		if c.leaving.TryLock() {
			defer c.leaving.Unlock()
			c.flush(false)
		} else if c.follow(packets) {
			return
		}
	}
	c.out(packets)
}

// follow takes copies of packets of one connection if others of it wait or are
// being sent: whoever sends those looks again for what waits. Beyond crowdFollow
// TCP has to put them in order.
func (c *crowd) follow(packets [][]byte) bool {
	tcp := segmentOf(packets[0])
	if tcp == nil {
		return false
	}
	ports := binary.BigEndian.Uint32(tcp)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.wait.has(ports) && !c.away.has(ports) {
		return false
	}
	if c.wait == nil {
		c.wait = &train{buf: make([]byte, 0, crowdBytes)}
	}
	if c.wait.bytes()+(&train{packets: packets}).bytes() > crowdFollow {
		return false
	}
	for _, p := range packets {
		c.wait.packets = append(c.wait.packets, bytes.Clone(p))
	}
	return true
}

// leave sends what waits once others had their turn.
func (c *crowd) leave() {
	runtime.Gosched()
	c.leaving.Lock()
	defer c.leaving.Unlock()
	c.flush(true)
}

// flush sends what waits. The caller holds leaving; last says that no goroutine
// is about to do the same any more.
func (c *crowd) flush(last bool) {
	for {
		c.mu.Lock()
		t := c.wait
		if t == nil || len(t.packets) == 0 {
			c.pending.Store(false)
			if last {
				c.going = false
			}
			c.mu.Unlock()
			return
		}
		c.wait, c.spare, c.away = c.spare, nil, t
		c.mu.Unlock()
		c.out(t.packets)
		c.mu.Lock()
		t.reset()
		c.spare, c.away = t, nil
		c.mu.Unlock()
	}
}
