package netstack

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// holdFor is how long an acknowledgement may wait for data that goes the
	// same way: as long as a busy server takes for a small answer. It is far
	// less than RFC 9293 section 3.8.6.3 allows, than systems commonly wait and
	// than anybody's retransmission timer.
	holdFor = 10 * time.Millisecond
	// holdSets and holdWays bound the connections whose acknowledgements may
	// wait; those for whom there is no room are served as if there were no
	// waiting.
	holdSets = 64
	holdWays = 4
)

// hold keeps acknowledgements back that would leave alone: where a call is
// answered at once they travel with the answer, which saves half of all packets.
//
// gVisor acknowledges every segment at once. Only what it says as news, with no
// other meaning, may wait: the first acknowledgement of less than two
// full segments since anything was sent, which says nothing of losses and
// opens no window; and the one that ends the handshake of a connection that we
// began, since most who dial have something to say: release sends it for those who
// would rather listen. A second one leaves at once, so that a sender is never kept
// waiting for more than every other segment; so do duplicates and those with SACK
// blocks. What waits is replaced by the next packet of its connection, which says
// as much, or leaves when its time is up.
type hold struct {
	send  func([][]byte)
	wait  time.Duration // how long
	seed  maphash.Seed
	most  uint32         // progress that does not wait, in bytes
	epoch time.Time      // where the clock of slots begins
	wg    sync.WaitGroup // the timer, while it is set or runs

	mu     sync.Mutex // guards the fields below; not held during send
	slots  *[holdSets][holdWays]holdSlot
	timer  *time.Timer // nil until something waited
	armed  bool        // the timer is set
	closed bool
}

// holdSlot is what is known of a connection.
type holdSlot struct {
	id      uint64 // of the connection; 0 = free
	ack     uint32 // last acknowledgement that left
	window  uint16 // that it announced
	opening bool   // we asked for the connection, and have acknowledged nothing yet
	waits   bool   // what is in held
	heldAck uint32
	until   time.Duration // when held has to leave, by the epoch
	held    []byte
}

func (h *hold) init(mtu int, send func([][]byte)) {
	h.send, h.wait, h.seed, h.epoch = send, holdFor, maphash.MakeSeed(), time.Now()
	h.most = 2 * uint32(mtu-80)
}

// keep takes note of a packet that is about to leave, and reports whether it
// waits instead. first, if there is one, has to leave before it.
func (h *hold) keep(p []byte) (waits bool, first []byte) {
	if len(p) == 0 {
		return false, nil
	}
	var l3 int
	var flow []byte // addresses and ports
	switch {
	case p[0] == 0x45 && len(p) >= 40 && p[9] == byte(header.TCPProtocolNumber):
		l3, flow = header.IPv4MinimumSize, p[12:24]
	case p[0]>>4 == 6 && len(p) >= 60 && p[6] == byte(header.TCPProtocolNumber):
		l3, flow = header.IPv6MinimumSize, p[8:44]
	default:
		return false, nil
	}
	id := max(1, maphash.Bytes(h.seed, flow))
	tcp := p[l3:]
	flags := header.TCPFlags(tcp[header.TCPFlagsOffset])
	ack := binary.BigEndian.Uint32(tcp[header.TCPAckNumOffset:])
	window := binary.BigEndian.Uint16(tcp[header.TCPWinSizeOffset:])

	h.mu.Lock()
	defer h.mu.Unlock()
	if h.slots == nil {
		h.slots = new([holdSets][holdWays]holdSlot)
	}
	s := h.slot(id)
	if s == nil {
		return false, nil
	}
	if s.id != id || flags&header.TCPFlagAck == 0 { // a new connection, or none any more
		*s = holdSlot{held: s.held[:0]}
		switch {
		case flags == header.TCPFlagSyn:
			s.id, s.opening = id, true
		case flags&header.TCPFlagAck != 0:
			s.id, s.ack, s.window = id, ack, window
		}
		return false, nil
	}
	before := *s
	s.ack, s.window, s.opening, s.waits = ack, window, false, false
	if flags != header.TCPFlagAck || len(p) > l3+int(tcp[header.TCPDataOffset]>>4)*4 {
		s.waits = before.waits && int32(ack-before.heldAck) < 0 // else it says what waited, and more
		return false, nil
	}
	if before.waits && ack == before.heldAck {
		// Both mean something.
		first = append([]byte(nil), before.held...)
		return false, first
	}
	if h.closed || saysMore(tcp) {
		return false, nil
	}
	if !before.opening {
		progress := ack - before.ack
		if before.waits || int32(progress) <= 0 || progress >= h.most ||
			before.window == 0 || int(window) > 2*int(before.window) {
			return false, nil
		}
		s.ack, s.window = before.ack, before.window
	}
	s.waits, s.heldAck = true, ack
	s.held = append(s.held[:0], p...)
	s.until = time.Since(h.epoch) + h.wait
	if !h.armed {
		h.arm(h.wait)
	}
	return true, nil
}

// release sends what waits of a connection.
func (h *hold) release(f Flow) {
	from, to := f.Local.Addr().AsSlice(), f.Remote.Addr().AsSlice()
	flow := append(append(make([]byte, 0, 36), from...), to...)
	flow = binary.BigEndian.AppendUint16(flow, f.Local.Port())
	flow = binary.BigEndian.AppendUint16(flow, f.Remote.Port())
	id := max(1, maphash.Bytes(h.seed, flow))
	h.mu.Lock()
	var p []byte
	if h.slots != nil {
		if s := h.slot(id); s != nil && s.id == id && s.waits {
			p = bytes.Clone(s.held)
			s.waits, s.ack = false, s.heldAck
		}
	}
	h.mu.Unlock()
	if p != nil {
		h.send([][]byte{p})
	}
}

// slot returns the slot of a connection, or one that it may take over; nil if
// there is none. The caller holds mu.
func (h *hold) slot(id uint64) (free *holdSlot) {
	set := &h.slots[id%holdSets]
	for i := range set {
		s := &set[(id/holdSets+uint64(i))%holdWays]
		switch {
		case s.id == id:
			return s
		case !s.waits && (free == nil || s.id == 0 && free.id != 0):
			free = s
		}
	}
	return free
}

// saysMore reports whether a pure acknowledgement has options other than a
// timestamp as it is always laid out.
func saysMore(tcp []byte) bool {
	switch tcp[header.TCPDataOffset] >> 4 {
	case 5:
		return false
	case 8:
		return len(tcp) < 32 || [4]byte(tcp[20:24]) != [4]byte{1, 1, 8, 10}
	}
	return true
}

// arm sets the timer. The caller holds mu.
func (h *hold) arm(d time.Duration) {
	h.armed = true
	h.wg.Add(1)
	if h.timer == nil {
		h.timer = time.AfterFunc(d, h.expire)
	} else {
		h.timer.Reset(d)
	}
}

// expire sends what has waited long enough.
func (h *hold) expire() {
	defer h.wg.Done()
	var due [][]byte
	h.mu.Lock()
	now := time.Since(h.epoch)
	next := time.Duration(-1)
	h.armed = false
	for i := range h.slots {
		for j := range h.slots[i] {
			s := &h.slots[i][j]
			switch {
			case !s.waits:
			case s.until <= now:
				due = append(due, append([]byte(nil), s.held...))
				s.waits, s.ack = false, s.heldAck
			case next < 0 || s.until-now < next:
				next = s.until - now
			}
		}
	}
	if next >= 0 && !h.closed {
		h.arm(next)
	}
	h.mu.Unlock()
	if len(due) > 0 {
		h.send(due)
	}
}

// close ends the waiting; what waits is lost. It returns when send is not called
// any more.
func (h *hold) close() {
	h.mu.Lock()
	h.closed = true
	if h.armed && h.timer.Stop() {
		h.armed = false
		h.wg.Done()
	}
	h.mu.Unlock()
	h.wg.Wait()
}
