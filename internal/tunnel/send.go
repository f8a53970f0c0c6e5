package tunnel

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

const (
	// trainBytes is how much ciphertext is handed to the path at a time: what
	// fits one train of datagrams in the kernel.
	trainBytes   = 65400
	trainPackets = 64
	maxPacket    = trainBytes - messageHeader - padding - tagSize // so that a datagram can hold it
)

// PacketSize returns the size of the largest packet that fits a datagram once
// sealed; 0 if none does.
func PacketSize(datagram int) int {
	return max(0, min(datagram-messageHeader-tagSize, maxPacket)) &^ (padding - 1)
}

// train is ciphertext for one peer, laid end to end.
type train struct {
	buf       []byte // capacity trainBytes
	datagrams [][]byte
	chosen    [trainPackets]bool
	nonce     [chacha20poly1305.NonceSize]byte
}

var trains = sync.Pool{New: func() any {
	return &train{buf: make([]byte, 0, trainBytes), datagrams: make([][]byte, 0, trainPackets)}
}}

// Send seals IP packets for a peer and hands them to the path before it
// returns, in the caller's goroutine. The peer is created if need be; the error
// is then ErrUnknownPeer if Lookup does not know it. Without a session a copy
// of some packets waits for the handshake. Packets are dropped, and counted,
// when their destination is not the peer's or when they would wait in vain.
func (t *Tunnel) Send(to identity.NodePublic, packets [][]byte) error {
	if len(packets) == 0 {
		return nil
	}
	if !t.calls.enter() {
		return fmt.Errorf("tunnel: send: %w", ErrClosed)
	}
	defer t.calls.leave()
	now := time.Now()
	p, err := t.obtain(to, now)
	if err != nil {
		t.stats.dropNoPeer.Add(uint64(len(packets)))
		return fmt.Errorf("tunnel: send: %w", err)
	}
	for len(packets) > 0 {
		s := p.current.Load()
		if s == nil || !s.usable(now) {
			if s = t.stage(p, packets, now); s == nil {
				return nil
			}
		}
		packets = packets[len(packets)-t.seal(p, s, packets, now):]
	}
	return nil
}

// stage keeps packets until there is a session, and begins a handshake if none
// is under way. It returns the session instead if there is one by now.
func (t *Tunnel) stage(p *peer, packets [][]byte, now time.Time) *session {
	p.mu.Lock()
	if s := p.current.Load(); s != nil && s.usable(now) {
		p.mu.Unlock()
		return s
	}
	chosen := packets[:0:0]
	refused := 0
	blocked := t.blocked.Load()
	t.mu.RLock()
	for _, b := range packets {
		if t.mayCarry(p, b, blocked) {
			chosen = append(chosen, b)
		} else {
			refused++
		}
	}
	t.mu.RUnlock()
	dropped := p.stage(chosen)
	idle := p.begun == nil
	if p.next != nil && idle && now.Sub(p.next.born) < firstRetries[0] {
		// The peer has begun one a moment ago, and will use it at once.
		idle = false
		t.wake(p, p.next.born.Add(firstRetries[0]))
	}
	p.mu.Unlock()
	t.stats.dropDestination.Add(uint64(refused))
	t.stats.dropStalled.Add(uint64(dropped))
	if idle && len(chosen) > 0 {
		t.begin(p, false)
	}
	return nil
}

// mayCarry reports whether a packet's destination is p's. The caller holds mu.
func (t *Tunnel) mayCarry(p *peer, b []byte, blocked *lpm[struct{}]) bool {
	_, dst, ok := addresses(b)
	return ok && len(b) <= maxPacket && t.table.owner(dst) == p && !isBlocked(blocked, dst)
}

// seal seals packets that are for p and sends them. It returns how many were
// left when the session could not go on.
func (t *Tunnel) seal(p *peer, s *session, packets [][]byte, now time.Time) (left int) {
	tr := trains.Get().(*train)
	defer trains.Put(tr)
	blocked := t.blocked.Load()
	for len(packets) > 0 {
		batch := packets[:min(len(packets), trainPackets)]
		packets = packets[len(batch):]
		refused := 0
		var last netip.Addr
		owned := false
		t.mu.RLock()
		for i, b := range batch {
			_, dst, ok := addresses(b)
			if ok && dst != last {
				last, owned = dst, t.table.owner(dst) == p && !isBlocked(blocked, dst)
			}
			tr.chosen[i] = ok && owned && len(b) <= maxPacket
			if !tr.chosen[i] {
				refused++
			}
		}
		t.mu.RUnlock()
		if refused > 0 {
			t.stats.dropDestination.Add(uint64(refused))
		}
		var bytes uint64
		buf := tr.buf[:0]
		for i, b := range batch {
			if !tr.chosen[i] {
				continue
			}
			if len(buf)+sealedSize(len(b)) > trainBytes && len(buf) > 0 {
				t.flush(p, tr, bytes)
				buf, bytes = tr.buf[:0], 0
			}
			at := len(buf)
			var ok bool
			if buf, ok = s.sealTo(buf, b, &tr.nonce); !ok {
				t.flush(p, tr, bytes)
				return len(batch) - i + len(packets)
			}
			tr.datagrams = append(tr.datagrams, buf[at:])
			bytes += uint64(len(b))
		}
		t.flush(p, tr, bytes)
	}
	if s.old(now) && p.current.Load() == s && !s.renewed.Swap(true) {
		t.begin(p, false)
	}
	return 0
}

// flush sends what is in the train.
func (t *Tunnel) flush(p *peer, tr *train, bytes uint64) {
	n := len(tr.datagrams)
	if n == 0 {
		return
	}
	p.txBytes.Add(bytes)
	t.stats.packetsOut.Add(uint64(n))
	t.transmit(p, tr.datagrams, true)
	clear(tr.datagrams)
	tr.datagrams = tr.datagrams[:0]
}

// keepalive sends a message without a packet.
func (t *Tunnel) keepalive(p *peer, s *session) {
	tr := trains.Get().(*train)
	defer trains.Put(tr)
	if b, ok := s.sealTo(tr.buf[:0], nil, &tr.nonce); ok {
		t.transmit(p, [][]byte{b}, false)
	}
}

// transmit hands datagrams to the path, with the address that the peer was last
// heard from if the path does not know it. data says that there
// are packets in them, which the peer will answer.
func (t *Tunnel) transmit(p *peer, datagrams [][]byte, data bool) {
	if p.dead.Load() || t.isClosing() {
		return
	}
	e := p.here.Load()
	if e.src.Addr.IsValid() && !e.announced.Swap(true) && t.cfg.Authenticated != nil {
		t.cfg.Authenticated(p.key, e.src)
	}
	if p.owed.Load() != 0 && datagrams[0][0] == typeData {
		p.owed.Store(0)
	}
	if data && p.unanswered.Load() == 0 {
		now := t.instant()
		p.unanswered.Store(now)
		t.ring(p, now+int64(silenceAfter))
	}
	err := t.cfg.Send(p.key, e.src.Addr, datagrams)
	t.stats.datagramsOut.Add(uint64(len(datagrams)))
	if err != nil {
		t.stats.sendErrors.Add(1)
	}
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
