package tunnel

import (
	"crypto/cipher"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.zx2c4.com/wireguard/replay"
)

// Limits of a session: section 6.1 of the WireGuard paper.
const (
	rekeyAfter          = 120 * time.Second
	rejectAfter         = 180 * time.Second
	rekeyAfterMessages  = 1 << 60
	rejectAfterMessages = 1<<64 - 1<<13 - 1
	// rekeyLate is when an initiator that only receives renews the session,
	// early enough for the handshake and its retry.
	rekeyLate = rejectAfter - keepaliveAfter - rekeyTimeout
)

// quota is how many messages a session may seal. It is the protocol's but in
// tests, which cannot wait for it.
type quota struct{ rekey, reject uint64 }

// session is a pair of keys that a handshake agreed on.
type session struct {
	peer      *peer
	index     uint32 // ours, by which the peer addresses us
	remote    uint32 // theirs
	sealer    cipher.AEAD
	opener    cipher.AEAD
	born      time.Time
	trip      time.Duration // of the handshake there and back, if we began it
	quota     quota
	initiator bool

	sent atomic.Uint64 // the next counter
	// confirmed: the peer has used it. An initiator is answered, which is as
	// good; a responder sends nothing before.
	confirmed atomic.Bool
	renewed   atomic.Bool // a handshake for its successor was begun
	heard     atomic.Bool // something came by it

	mu   sync.Mutex // guards seen
	seen replay.Filter
}

func (t *Tunnel) newSession(p *peer, index, remote uint32, send, receive digest, initiator bool, now time.Time) *session {
	s := &session{peer: p, index: index, remote: remote, born: now, quota: t.quota, initiator: initiator}
	var err error
	if s.sealer, err = chacha20poly1305.New(send[:]); err == nil {
		s.opener, err = chacha20poly1305.New(receive[:])
	}
	if err != nil {
		panic("tunnel: " + err.Error()) // only for keys of a wrong length
	}
	s.confirmed.Store(initiator)
	return s
}

// usable reports whether the session may still seal.
func (s *session) usable(now time.Time) bool {
	return now.Sub(s.born) < rejectAfter && s.sent.Load() < s.quota.reject
}

// old reports whether whoever sends should renew the session.
func (s *session) old(now time.Time) bool {
	return s.initiator && now.Sub(s.born) >= rekeyAfter || s.sent.Load() >= s.quota.rekey
}

// fresh reports whether a counter was not seen before.
func (s *session) fresh(counter uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.ValidateCounter(counter, s.quota.reject)
}

// sealTo appends the transport message of a packet, padded, to b. The packet
// must not lie in b. nonce is scratch.
func (s *session) sealTo(b []byte, packet []byte, nonce *[chacha20poly1305.NonceSize]byte) (_ []byte, ok bool) {
	counter := s.sent.Add(1) - 1
	if counter >= s.quota.reject {
		return b, false
	}
	at := len(b)
	b = append(b, typeData, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, s.remote)
	b = binary.LittleEndian.AppendUint64(b, counter)
	binary.LittleEndian.PutUint64(nonce[4:], counter)
	if n := padded(len(packet)); n != len(packet) {
		body := len(b)
		b = append(b, packet...)
		b = append(b, zeros[:n-len(packet)]...)
		packet = b[body:]
		b = b[:body]
	}
	sealed := s.sealer.Seal(b, nonce[:], packet, nil)
	return sealed, len(sealed) > at
}

var zeros [padding]byte

// padding is what lengths of packets are hidden to multiples of.
const padding = 16

func padded(n int) int { return (n + padding - 1) &^ (padding - 1) }

// sealedSize is how long the transport message of a packet becomes.
func sealedSize(n int) int { return messageHeader + padded(n) + tagSize }
