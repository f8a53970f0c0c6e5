package tunnel

import (
	"encoding/binary"
	"sync"
	"time"
)

// Message types and sizes of the WireGuard protocol.
const (
	typeInitiation = 1
	typeResponse   = 2
	typeCookie     = 3
	typeData       = 4

	initiationSize = 148
	responseSize   = 92
	cookieSize     = 64
)

// orderAt is where in the Device's buffer the number of a datagram is kept, out
// of reach of all but giant ones. The Device leaves what is behind a message
// alone and hands the same buffer to deliver.
const orderAt = 1984

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

// Receive takes ciphertext from the path. The datagrams are copied. What is
// malformed, belongs to no session, or comes faster than it can be opened is
// dropped and counted.
func (t *Tunnel) Receive(src Source, datagrams [][]byte) {
	if t.isClosing() {
		return
	}
	now := time.Now()
	var malformed, unknown, mismatch, again uint64
	for len(datagrams) > 0 {
		tr := newTrain()
		t.mu.RLock()
		for len(datagrams) > 0 {
			b := datagrams[0]
			kind, index, ok := classify(b)
			switch {
			case !ok:
				malformed++
			case kind == typeInitiation:
				t.mu.RUnlock()
				t.knock(src, b, now)
				t.mu.RLock()
			default:
				s := t.sessions[index]
				if s == nil {
					unknown++
					// A keepalive carries nothing that could be lost: no
					// reason to wake an idle pair.
					if kind == typeData && len(b) > keepaliveSize && !src.Peer.IsZero() {
						select {
						case t.lost <- src.Peer:
						default:
						}
					}
					break
				}
				ep, ok := s.peer.from(src, now)
				if !ok {
					mismatch++
					break
				}
				if !tr.add(b) {
					goto full
				}
				if kind == typeResponse && s.answered(b) {
					tr.drop()
					again++
					break
				}
				tr.eps[tr.n-1] = ep
			}
			datagrams = datagrams[1:]
		}
	full:
		t.mu.RUnlock()
		t.enqueue(tr)
	}
	t.stats.dropMalformed.Add(malformed)
	t.stats.dropSession.Add(unknown)
	t.stats.dropMismatch.Add(mismatch)
	t.stats.dropReplay.Add(again)
}

// enqueue hands a train to the Device's reader, or drops it if that is behind.
func (t *Tunnel) enqueue(tr *train) {
	n := uint64(tr.n)
	if n == 0 {
		tr.free()
		return
	}
	select {
	case t.in <- tr:
		t.stats.datagramsIn.Add(n)
	default:
		tr.free()
		t.stats.dropBacklog.Add(n)
	}
}

// unload copies datagrams into the Device's buffers, with the endpoint of each.
// Only the Device's reader calls it.
func (t *Tunnel) unload(tr *train, bufs [][]byte, sizes []int, set func(int, *endpoint), n int) int {
	for tr.next < tr.n && n < len(bufs) {
		b, ep := tr.packet(tr.next), tr.eps[tr.next]
		tr.next++
		p := ep.peer
		if p.dead.Load() || len(b) > len(bufs[n]) {
			continue
		}
		if b[0] == typeData {
			// Without this the Device would collect up to a thousand batches
			// behind a Deliver that does not keep up.
			if p.delivering.Load() && p.handed-p.opened.Load() >= windowIn {
				t.stats.dropBacklog.Add(1)
				continue
			}
			p.handed++
			if len(b) <= orderAt && len(bufs[n]) >= orderAt+8 {
				binary.LittleEndian.PutUint64(bufs[n][orderAt:], p.handed)
			}
		}
		sizes[n] = copy(bufs[n], b)
		set(n, ep)
		n++
	}
	return n
}

var lists = sync.Pool{New: func() any { l := make([][]byte, 0, batchSize); return &l }}

// deliver is the Device's way in: packets of one peer, in the buffers in which
// they arrived. The Device does not say whose they are, but in front of each
// the header of the message still stands, with the index of the session that
// it was opened with.
func (t *Tunnel) deliver(bufs [][]byte, offset int) {
	if len(bufs) == 0 || offset < messageHeader || len(bufs[0]) < offset {
		return
	}
	index := binary.LittleEndian.Uint32(bufs[0][offset-messageHeader+4:])
	t.mu.RLock()
	s := t.sessions[index]
	t.mu.RUnlock()
	if s == nil {
		t.stats.dropSession.Add(uint64(len(bufs)))
		return
	}
	p := s.peer
	// From the check to the end of Deliver, so that awaitDelivery can tell
	// when nothing that was allowed before is on its way any more.
	p.delivery.Lock()
	defer p.delivery.Unlock()

	list := lists.Get().(*[][]byte)
	packets := (*list)[:0]
	var refused, bytes uint64
	blocked := t.blocked.Load()
	t.mu.RLock()
	for _, b := range bufs {
		packet := b[offset:]
		src, dst, ok := addresses(packet)
		if !ok || p.dead.Load() || t.table.owner(src) != p || isBlocked(blocked, src) || isBlocked(blocked, dst) {
			refused++
			continue
		}
		packets = append(packets, packet)
		bytes += uint64(len(packet))
	}
	t.mu.RUnlock()

	now := time.Now()
	if p.handshake.Load() < s.born.UnixNano() {
		p.handshake.Store(now.UnixNano())
	}
	last := bufs[len(bufs)-1]
	if cap(last) >= orderAt+8 {
		order := binary.LittleEndian.Uint64(last[:cap(last)][orderAt:])
		// Nonsense after a giant datagram, which at worst its sender feels.
		if order > p.opened.Load() {
			p.opened.Store(order)
		}
	}
	if len(packets) > 0 && !t.isClosing() {
		p.active.Store(now.UnixNano())
		p.rxBytes.Add(bytes)
		t.stats.packetsIn.Add(uint64(len(packets)))
		p.delivering.Store(true)
		t.cfg.Deliver(p.key, packets)
		p.delivering.Store(false)
	}
	t.stats.dropSource.Add(refused)
	clear(packets)
	*list = packets[:0]
	lists.Put(list)
}
