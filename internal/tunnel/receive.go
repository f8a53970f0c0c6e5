package tunnel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// classify returns a message's type and the index it is addressed to (0 for an
// initiation), or false when it is no WireGuard message.
func classify(b []byte) (kind byte, index uint32, ok bool) {
	if len(b) < keepaliveSize || b[1]|b[2]|b[3] != 0 {
		return 0, 0, false
	}
	switch b[0] {
	case typeInitiation:
		return b[0], 0, len(b) == initiationSize
	case typeResponse:
		return b[0], binary.LittleEndian.Uint32(b[8:]), len(b) == responseSize
	case typeCookie:
		return b[0], binary.LittleEndian.Uint32(b[4:]), len(b) == cookieSize
	case typeData:
		return b[0], binary.LittleEndian.Uint32(b[4:]), true
	}
	return 0, 0, false
}

// catch is what one call of Receive works with.
type catch struct {
	packets [][]byte
	nonce   [chacha20poly1305.NonceSize]byte
}

var catches = sync.Pool{New: func() any { return &catch{packets: make([][]byte, 0, trainPackets)} }}

// Receive takes ciphertext from the path, opens it in the buffers in which it
// came, and delivers what was in it before it returns. What is malformed,
// belongs to no session, or knocks too often is dropped and counted.
func (t *Tunnel) Receive(src Source, datagrams [][]byte) {
	if !t.calls.enter() {
		return
	}
	defer t.calls.leave()
	now := time.Now()
	c := catches.Get().(*catch)
	var (
		s    *session // of the packets in c
		ep   *endpoint
		good bool // the relay does not deny that its peer sent this
	)
	for _, b := range datagrams {
		kind, index, ok := classify(b)
		if !ok {
			t.stats.dropMalformed.Add(1)
			continue
		}
		if kind == typeInitiation {
			t.knock(&src, b, now)
			continue
		}
		if kind != typeData {
			if sl := t.slot(index); sl.peer == nil || sl.session != nil && kind == typeResponse {
				t.strayed(sl, kind)
			} else if _, ok := sl.peer.from(&src, now); !ok {
				t.stats.dropMismatch.Add(1)
			} else if kind == typeCookie {
				t.queue(&src, b) // it is cheap to read and has no MAC
			} else {
				t.knock(&src, b, now)
			}
			continue
		}
		if s == nil || s.index != index {
			t.deliver(c, s, now)
			sl := t.slot(index)
			if s = sl.session; s == nil {
				t.lostSession(&src, len(b))
				continue
			}
			ep, good = s.peer.from(&src, now)
		}
		if !good {
			t.stats.dropMismatch.Add(1)
			continue
		}
		if now.Sub(s.born) >= rejectAfter {
			t.stats.dropSession.Add(1)
			continue
		}
		counter := binary.LittleEndian.Uint64(b[8:])
		binary.LittleEndian.PutUint64(c.nonce[4:], counter)
		plain, err := s.opener.Open(b[messageHeader:messageHeader], c.nonce[:], b[messageHeader:], nil)
		if err != nil {
			t.stats.dropForged.Add(1)
			continue
		}
		if !s.fresh(counter) {
			t.stats.dropReplay.Add(1)
			continue
		}
		t.stats.datagramsIn.Add(1)
		if p := s.peer; p.here.Load() != ep {
			p.here.Store(ep)
		}
		if !s.heard.Load() {
			s.heard.Store(true)
		}
		t.heard(s.peer, s, now, len(plain) > 0)
		if len(plain) > 0 {
			c.packets = append(c.packets, plain)
		}
	}
	t.deliver(c, s, now)
	catches.Put(c)
}

// strayed counts a handshake message that nobody waits for.
func (t *Tunnel) strayed(sl slot, kind byte) {
	if sl.session != nil && kind == typeResponse {
		t.stats.dropReplay.Add(1) // another copy of the one that made the session
		return
	}
	t.stats.dropSession.Add(1)
}

// lostSession wakes the one who greets, if a peer uses a session that we do not
// have. A keepalive carries nothing that could be lost: no reason to wake an
// idle pair.
func (t *Tunnel) lostSession(src *Source, length int) {
	t.stats.dropSession.Add(1)
	if length > keepaliveSize && !src.Peer.IsZero() {
		select {
		case t.lost <- src.Peer:
			t.working.Ask()
		default:
		}
	}
}

// heard notes that a message of a session was authentic.
func (t *Tunnel) heard(p *peer, s *session, now time.Time, data bool) {
	if p.unanswered.Load() != 0 {
		p.unanswered.Store(0)
	}
	if data && p.owed.Load() == 0 {
		at := t.since(now)
		p.owed.Store(at)
		t.ring(p, at+int64(keepaliveAfter))
	}
	if !s.confirmed.Load() && !s.confirmed.Swap(true) {
		t.confirm(p, s, now)
	}
	current := p.current.Load()
	if s.initiator && now.Sub(s.born) >= rekeyLate && (current == s || current == nil) && !s.renewed.Swap(true) {
		t.begin(p, false)
	}
	if current != nil && current != s && t.parted(p, current, now) && !current.renewed.Swap(true) {
		t.begin(p, false)
	}
}

// partedAfter is how long a peer may take to use the session that we use, besides
// two round trips.
const partedAfter = 2 * time.Second

// parted reports whether the peer goes on with another session than the one that
// we began and use: handshakes crossed and each holds the other's for the
// older, or it has lost ours. Upstream's Device can mix up two that arrive at
// the very same moment, and would not hear us until the next. Of two nodes that
// both see it one waits longer, or they would cross again.
func (t *Tunnel) parted(p *peer, s *session, now time.Time) bool {
	if !s.initiator || s.heard.Load() {
		return false
	}
	after := partedAfter
	own, theirs := t.keys.Load().current.public.Bytes(), p.key.Bytes()
	if bytes.Compare(own[:], theirs[:]) < 0 {
		after += after / 2
	}
	return now.Sub(s.born) >= after+2*s.trip
}

// deliver hands over the packets of one session, those of them that are the
// peer's to send.
func (t *Tunnel) deliver(c *catch, s *session, now time.Time) {
	if len(c.packets) == 0 {
		return
	}
	p := s.peer
	// From the check to the end of Deliver, so that awaitDelivery can tell
	// when nothing that was allowed before is on its way any more.
	p.delivery <- struct{}{}
	defer func() { <-p.delivery }()

	packets := c.packets[:0]
	var refused, bytes uint64
	blocked := t.blocked.Load()
	var src, dst netip.Addr // of the packet before
	owned := false
	t.mu.RLock()
	for _, b := range c.packets {
		packet, ok := unpad(b)
		if ok {
			if s, d, _ := addresses(packet); s != src || d != dst {
				src, dst = s, d
				owned = t.table.owner(src) == p && !isBlocked(blocked, src) && !isBlocked(blocked, dst)
			}
		}
		if !ok || !owned || p.dead.Load() {
			refused++
			continue
		}
		packets = append(packets, packet)
		bytes += uint64(len(packet))
	}
	t.mu.RUnlock()
	if len(packets) > 0 && !t.isClosing() {
		p.active.Store(t.since(now))
		p.rxBytes.Add(bytes)
		t.stats.packetsIn.Add(uint64(len(packets)))
		t.cfg.Deliver(p.key, packets)
	}
	if refused > 0 {
		t.stats.dropSource.Add(refused)
	}
	clear(c.packets)
	c.packets = c.packets[:0]
}

// unpad cuts an IP packet to the length that its header states, and returns
// false for what is no IP packet.
func unpad(b []byte) ([]byte, bool) {
	n := 0
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		if n = int(binary.BigEndian.Uint16(b[2:])); n < 20 {
			return nil, false
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		n = int(binary.BigEndian.Uint16(b[4:])) + 40
	default:
		return nil, false
	}
	if n > len(b) {
		return nil, false
	}
	return b[:n], true
}
