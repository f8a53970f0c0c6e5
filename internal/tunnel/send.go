package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"mesh/identity"
)

// batchSize is how many packets go through the Device at a time. Each of its
// two readers keeps that many 64 KB buffers.
const batchSize = 16

const (
	trainBytes    = batchSize * (MTU + 64)
	messageHeader = 16 // of a transport message: type, receiver index, counter
	keepaliveSize = 32 // a transport message without a packet
)

// A train is a few packets of one direction, copied out of the caller's
// buffers, back to back.
type train struct {
	peer *peer                // outbound: the one it is for
	eps  [batchSize]*endpoint // inbound: from where each came
	ends [batchSize]int
	n    int
	next int // first one not consumed yet
	buf  []byte
}

var trains = sync.Pool{New: func() any { return &train{buf: make([]byte, 0, trainBytes)} }}

func newTrain() *train { return trains.Get().(*train) }

func (tr *train) free() {
	if cap(tr.buf) > trainBytes {
		return // made for a giant: leave it to the garbage collector
	}
	clear(tr.eps[:tr.n])
	tr.peer, tr.n, tr.next, tr.buf = nil, 0, 0, tr.buf[:0]
	trains.Put(tr)
}

// add copies b and reports whether there was room. An empty train takes any.
func (tr *train) add(b []byte) bool {
	if tr.n == batchSize || tr.n > 0 && len(tr.buf)+len(b) > cap(tr.buf) {
		return false
	}
	tr.buf = append(tr.buf, b...)
	tr.ends[tr.n] = len(tr.buf)
	tr.n++
	return true
}

// drop takes out what was added last.
func (tr *train) drop() {
	tr.n--
	tr.buf = tr.buf[:len(tr.buf)-len(tr.packet(tr.n))]
}

func (tr *train) packet(i int) []byte {
	start := 0
	if i > 0 {
		start = tr.ends[i-1]
	}
	return tr.buf[start:tr.ends[i]]
}

// Send queues IP packets for a peer, which is created if need be; the error is
// then ErrUnknownPeer if Lookup does not know it. The packets are copied. Send
// waits while the peer's queue is full and moving. Packets are dropped, and
// counted, when their destination is not the peer's or when nothing can leave
// for the peer.
func (t *Tunnel) Send(peer identity.NodePublic, packets [][]byte) error {
	if len(packets) == 0 {
		return nil
	}
	p, err := t.obtain(peer)
	if err != nil {
		t.stats.dropNoPeer.Add(uint64(len(packets)))
		return fmt.Errorf("tunnel: send: %w", err)
	}
	blocked := t.blocked.Load()
	for len(packets) > 0 {
		tr := newTrain()
		tr.peer = p
		var refused uint64
		t.mu.RLock()
		for len(packets) > 0 {
			_, dst, ok := addresses(packets[0])
			if !ok || t.table.owner(dst) != p || isBlocked(blocked, dst) {
				refused++
			} else if !tr.add(packets[0]) {
				break
			}
			packets = packets[1:]
		}
		t.mu.RUnlock()
		t.stats.dropDestination.Add(refused)
		if tr.n == 0 {
			tr.free()
			continue
		}
		n := tr.n
		if !p.take(n, t.closing) {
			tr.free()
			t.stats.dropStalled.Add(uint64(n))
			if t.isClosing() {
				return fmt.Errorf("tunnel: send: %w", ErrClosed)
			}
			// Removed meanwhile: for good, or because it seemed idle.
			if p.dead.Load() {
				if p, err = t.obtain(peer); err != nil {
					return fmt.Errorf("tunnel: send: %w", err)
				}
			}
			continue
		}
		select {
		case t.out <- tr:
		case <-t.closing:
			return fmt.Errorf("tunnel: send: %w", ErrClosed)
		}
	}
	return nil
}

// addresses returns source and destination of an IP packet whose header is
// complete.
func addresses(b []byte) (src, dst netip.Addr, ok bool) {
	if len(b) == 0 {
		return src, dst, false
	}
	switch {
	case b[0]>>4 == 4 && len(b) >= 20:
		return netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), true
	case b[0]>>4 == 6 && len(b) >= 40:
		return netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), true
	}
	return src, dst, false
}

func isBlocked(set *lpm[struct{}], a netip.Addr) bool {
	if set == nil {
		return false
	}
	_, ok := set.lookup(a)
	return ok
}

// fill moves packets of tr into the Device's buffers while they are still
// their peer's, and returns how many buffers are full then. The caller holds
// route.
func (t *Tunnel) fill(tr *train, bufs [][]byte, sizes []int, offset, n int) int {
	p := tr.peer
	blocked := t.blocked.Load()
	var refused int
	var bytes uint64
	t.mu.RLock()
	for tr.next < tr.n && n < len(bufs) {
		b := tr.packet(tr.next)
		tr.next++
		_, dst, _ := addresses(b)
		// The Device adds up to 16 bytes of padding and a tag of 16.
		if t.table.owner(dst) != p || isBlocked(blocked, dst) || len(b) > len(bufs[n])-offset-32 {
			refused++
			continue
		}
		sizes[n] = copy(bufs[n][offset:], b)
		bytes += uint64(len(b))
		n++
	}
	t.mu.RUnlock()
	p.txBytes.Add(bytes)
	t.stats.dropDestination.Add(uint64(refused))
	p.giveBack(refused)
	return n
}

// transmit is the Device's way out: ciphertext, with the endpoint that it last
// authenticated a packet from.
func (t *Tunnel) transmit(bufs [][]byte, ep conn.Endpoint) error {
	e, ok := ep.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	p, now := e.peer, time.Now()
	data, proven := 0, true
	for _, b := range bufs {
		if len(b) < keepaliveSize {
			continue
		}
		switch b[0] {
		case typeInitiation, typeResponse:
			t.register(binary.LittleEndian.Uint32(b[4:]), p, now)
		case typeCookie:
			proven = false // answers an initiation that nobody checked
		case typeData:
			if len(b) > keepaliveSize {
				data++
			}
			// The first message under a new key: the handshake is complete.
			if remote := binary.LittleEndian.Uint32(b[4:]); p.remote.Swap(remote) != remote {
				p.handshake.Store(now.UnixNano())
			}
		}
	}
	var err error
	if !p.dead.Load() && !t.isClosing() {
		if proven && e.src.Addr.IsValid() && !e.announced.Swap(true) && t.cfg.Authenticated != nil {
			t.cfg.Authenticated(p.key, e.src)
		}
		err = t.cfg.Send(p.key, e.src.Addr, bufs)
		t.stats.datagramsOut.Add(uint64(len(bufs)))
		t.stats.packetsOut.Add(uint64(data))
		if err != nil {
			t.stats.sendErrors.Add(1)
		}
	}
	p.left(data, now)
	return err
}
