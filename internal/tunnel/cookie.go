package tunnel

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

// MACs and cookies keep a node that is flooded with handshakes from computing
// for everybody: sections 5.3, 5.4.4 and 5.4.7 of the WireGuard paper.

const (
	macSize    = blake2s.Size128
	cookieLife = 120 * time.Second
)

type mac = [macSize]byte

// labelled hashes a label and a public key to a key for MACs or cookies.
func labelled(label string, public []byte) digest { return sum([]byte(label), public) }

// macOf is the keyed hash of parts.
func macOf(key []byte, parts ...[]byte) (out mac) {
	m, err := blake2s.New128(key)
	if err != nil {
		panic("tunnel: " + err.Error()) // only for keys that are too long
	}
	for _, p := range parts {
		m.Write(p)
	}
	m.Sum(out[:0])
	return out
}

// door is the receiving side: it tells who knows our public key, and who can
// receive at the address it writes from.
type door struct {
	macKey    digest
	cookieKey digest

	mu     sync.Mutex // guards what follows
	secret [32]byte   // of the cookies
	since  time.Time  // age of secret
}

func (d *door) init(public []byte) {
	d.macKey = labelled("mac1----", public)
	d.cookieKey = labelled("cookie--", public)
}

// knows checks mac1: whoever made the message knows our public key.
func (d *door) knows(msg []byte) bool {
	if len(msg) < 2*macSize {
		return false
	}
	at := len(msg) - 2*macSize
	want := macOf(d.macKey[:], msg[:at])
	return subtle.ConstantTimeCompare(want[:], msg[at:at+macSize]) == 1
}

// cookie is the one for messages from a source; fresh says that a new secret
// may be made for it.
func (d *door) cookie(source []byte, fresh bool, now time.Time) (c mac, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.since.IsZero() || now.Sub(d.since) > cookieLife {
		if !fresh {
			return c, false
		}
		rand.Read(d.secret[:])
		d.since = now
	}
	return macOf(d.secret[:], source), true
}

// lives checks mac2: whoever made the message has our cookie for that source.
func (d *door) lives(msg, source []byte, now time.Time) bool {
	c, ok := d.cookie(source, false, now)
	if !ok {
		return false
	}
	at := len(msg) - macSize
	want := macOf(c[:], msg[:at])
	return subtle.ConstantTimeCompare(want[:], msg[at:]) == 1
}

// reply makes the message that sends its cookie to the source of msg.
func (d *door) reply(msg, source []byte, now time.Time) (out [cookieSize]byte) {
	c, _ := d.cookie(source, true, now)
	out[0] = typeCookie
	copy(out[4:8], msg[4:8]) // the index of the sender
	nonce := out[8:32]
	rand.Read(nonce)
	aead, err := chacha20poly1305.NewX(d.cookieKey[:])
	if err != nil {
		panic("tunnel: " + err.Error()) // only for keys of a wrong length
	}
	at := len(msg) - 2*macSize
	aead.Seal(out[32:32], nonce, c[:], msg[at:at+macSize])
	return out
}

// guest is the sending side: what the door of a peer asks for. It is guarded by
// the lock of its peer.
type guest struct {
	macKey    digest
	cookieKey digest
	last      mac // mac1 of the last message, zero before the first
	cookie    mac
	got       time.Time // the cookie, zero if there is none
}

func newGuest(public []byte) guest {
	return guest{macKey: labelled("mac1----", public), cookieKey: labelled("cookie--", public)}
}

// sign adds the MACs to a handshake message.
func (g *guest) sign(msg []byte, now time.Time) {
	at := len(msg) - 2*macSize
	g.last = macOf(g.macKey[:], msg[:at])
	copy(msg[at:], g.last[:])
	if !g.got.IsZero() && now.Sub(g.got) < cookieLife {
		m := macOf(g.cookie[:], msg[:at+macSize])
		copy(msg[at+macSize:], m[:])
	}
}

// take reads a cookie that answers our last message.
func (g *guest) take(msg []byte, now time.Time) bool {
	if g.last == (mac{}) {
		return false
	}
	aead, err := chacha20poly1305.NewX(g.cookieKey[:])
	if err != nil {
		return false
	}
	var c mac
	if _, err := aead.Open(c[:0], msg[8:32], msg[32:], g.last[:]); err != nil {
		return false
	}
	g.cookie, g.got = c, now
	return true
}

// indexOf returns the sender's index in a handshake message.
func indexOf(msg []byte) uint32 { return binary.LittleEndian.Uint32(msg[4:]) }
