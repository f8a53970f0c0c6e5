package tunnel

import (
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

// The handshake of WireGuard, Noise_IKpsk2: sections 5.4.2 and 5.4.3 of its
// paper, whose names are used here.

// Message types and sizes of the WireGuard protocol.
const (
	typeInitiation = 1
	typeResponse   = 2
	typeCookie     = 3
	typeData       = 4

	initiationSize = 148
	responseSize   = 92
	cookieSize     = 64
	messageHeader  = 16 // of a transport message: type, receiver index, counter
	tagSize        = chacha20poly1305.Overhead
	keepaliveSize  = messageHeader + tagSize // a transport message without a packet
)

type (
	digest = [blake2s.Size]byte
	psk    = [32]byte
)

var (
	noiseName   = blake2s.Sum256([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	initialHash = sum(noiseName[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
)

// localKey is a private key of ours with what handshakes need of it.
type localKey struct {
	private *ecdh.PrivateKey
	public  identity.NodePublic
	hash    digest // of the handshake up to our public key, as responder
	door    door
}

func newLocalKey(k identity.NodePrivate) (*localKey, error) {
	raw := k.Bytes()
	private, err := ecdh.X25519().NewPrivateKey(raw[:])
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	l := &localKey{private: private, public: k.Public()}
	pub := l.public.Bytes()
	l.hash = sum(initialHash[:], pub[:])
	l.door.init(pub[:])
	return l, nil
}

// opened is an initiation of which only the claimed sender is known.
type opened struct {
	static    identity.NodePublic
	sender    uint32 // its index
	ephemeral *ecdh.PublicKey
	chain     digest
	hash      digest
	stamp     []byte // still sealed
}

// open finds out who an initiation claims to be from.
func (l *localKey) open(msg []byte) (o opened, ok bool) {
	if len(msg) != initiationSize {
		return o, false
	}
	ephemeral, static := msg[8:40], msg[40:88]
	o.ephemeral, ok = publicKey(ephemeral)
	if !ok {
		return o, false
	}
	shared, ok := dh(l.private, o.ephemeral)
	if !ok {
		return o, false
	}
	o.hash = sum(l.hash[:], ephemeral)
	o.chain = kdf1(noiseName, ephemeral)
	var key digest
	o.chain, key = kdf2(o.chain, shared)
	var raw [identity.KeyLen]byte
	if !unseal(raw[:0], key, static, o.hash) {
		return o, false
	}
	o.hash = sum(o.hash[:], static)
	o.static = identity.NodePublicFrom(raw)
	o.sender = binary.LittleEndian.Uint32(msg[4:])
	o.stamp = msg[88:116]
	return o, !o.static.IsZero()
}

// prove opens the timestamp, which only the holder of the static key (or of
// ours) can have sealed.
func (l *localKey) prove(o *opened) (ts timestamp, ok bool) {
	raw := o.static.Bytes()
	static, ok := publicKey(raw[:])
	if !ok {
		return ts, false
	}
	shared, ok := dh(l.private, static)
	if !ok {
		return ts, false
	}
	var key digest
	o.chain, key = kdf2(o.chain, shared)
	if !unseal(ts[:0], key, o.stamp, o.hash) {
		return ts, false
	}
	o.hash = sum(o.hash[:], o.stamp)
	return ts, true
}

// pending is a handshake that we began.
type pending struct {
	local     *localKey
	ephemeral *ecdh.PrivateKey
	index     uint32
	chain     digest
	hash      digest
	sent      time.Time
	forged    int // answers that did not open; guarded by the lock of the peer
}

var errWeakKey = errors.New("the peer's key is no proper one")

// initiate begins a handshake: msg becomes an initiation but for its MACs. ts
// has to be later than in all initiations to this peer before.
func (l *localKey) initiate(msg *[initiationSize]byte, peer identity.NodePublic, index uint32, ts timestamp) (*pending, error) {
	raw := peer.Bytes()
	static, ok := publicKey(raw[:])
	if !ok {
		return nil, errWeakKey
	}
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	h := &pending{local: l, ephemeral: ephemeral, index: index}
	*msg = [initiationSize]byte{typeInitiation}
	binary.LittleEndian.PutUint32(msg[4:], index)
	pub := ephemeral.PublicKey().Bytes()
	copy(msg[8:], pub)
	h.chain = kdf1(noiseName, pub)
	h.hash = sum(initialHash[:], raw[:])
	h.hash = sum(h.hash[:], pub)

	shared, ok := dh(ephemeral, static)
	if !ok {
		return nil, errWeakKey
	}
	var key digest
	h.chain, key = kdf2(h.chain, shared)
	own := l.public.Bytes()
	seal(msg[40:40], key, own[:], h.hash)
	h.hash = sum(h.hash[:], msg[40:88])

	if shared, ok = dh(l.private, static); !ok {
		return nil, errWeakKey
	}
	h.chain, key = kdf2(h.chain, shared)
	seal(msg[88:88], key, ts[:], h.hash)
	h.hash = sum(h.hash[:], msg[88:116])
	return h, nil
}

// finish reads the response to a handshake that we began and returns the keys
// of the session.
func (h *pending) finish(msg []byte, preshared psk) (send, receive digest, remote uint32, ok bool) {
	theirs, ok := publicKey(msg[12:44])
	if !ok {
		return send, receive, 0, false
	}
	hsh := sum(h.hash[:], msg[12:44])
	chain := kdf1(h.chain, msg[12:44])
	for _, private := range []*ecdh.PrivateKey{h.ephemeral, h.local.private} {
		shared, ok := dh(private, theirs)
		if !ok {
			return send, receive, 0, false
		}
		chain = kdf1(chain, shared)
	}
	chain, tau, key := kdf3(chain, preshared[:])
	hsh = sum(hsh[:], tau[:])
	if !unseal(nil, key, msg[44:60], hsh) {
		return send, receive, 0, false
	}
	send, receive = kdf2(chain, nil)
	return send, receive, binary.LittleEndian.Uint32(msg[4:]), true
}

// respond answers an initiation whose sender is proven: msg becomes a response
// but for its MACs.
func (o *opened) respond(msg *[responseSize]byte, index uint32, preshared psk) (send, receive digest, err error) {
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return send, receive, err
	}
	raw := o.static.Bytes()
	static, ok := publicKey(raw[:])
	if !ok {
		return send, receive, errWeakKey
	}
	*msg = [responseSize]byte{typeResponse}
	binary.LittleEndian.PutUint32(msg[4:], index)
	binary.LittleEndian.PutUint32(msg[8:], o.sender)
	pub := ephemeral.PublicKey().Bytes()
	copy(msg[12:], pub)
	hsh := sum(o.hash[:], pub)
	chain := kdf1(o.chain, pub)
	for _, public := range []*ecdh.PublicKey{o.ephemeral, static} {
		shared, ok := dh(ephemeral, public)
		if !ok {
			return send, receive, errWeakKey
		}
		chain = kdf1(chain, shared)
	}
	chain, tau, key := kdf3(chain, preshared[:])
	hsh = sum(hsh[:], tau[:])
	seal(msg[44:44], key, nil, hsh)
	receive, send = kdf2(chain, nil)
	return send, receive, nil
}

func publicKey(raw []byte) (*ecdh.PublicKey, bool) {
	p, err := ecdh.X25519().NewPublicKey(raw)
	return p, err == nil
}

// dh refuses points of low order.
func dh(private *ecdh.PrivateKey, public *ecdh.PublicKey) ([]byte, bool) {
	shared, err := private.ECDH(public)
	return shared, err == nil
}

var zeroNonce [chacha20poly1305.NonceSize]byte // each key of a handshake seals once

func seal(dst []byte, key digest, plain []byte, ad digest) {
	aead, err := chacha20poly1305.New(key[:])
	if err != nil {
		panic("tunnel: " + err.Error()) // only for keys of a wrong length
	}
	aead.Seal(dst, zeroNonce[:], plain, ad[:])
}

func unseal(dst []byte, key digest, sealed []byte, ad digest) bool {
	aead, err := chacha20poly1305.New(key[:])
	if err != nil {
		return false
	}
	_, err = aead.Open(dst, zeroNonce[:], sealed, ad[:])
	return err == nil
}

func sum(a, b []byte) (out digest) {
	h := newBlake()
	h.Write(a)
	h.Write(b)
	h.Sum(out[:0])
	return out
}

func newBlake() hash.Hash {
	h, err := blake2s.New256(nil)
	if err != nil {
		panic("tunnel: " + err.Error()) // only for keys that are too long
	}
	return h
}

func hmacSum(key []byte, parts ...[]byte) (out digest) {
	m := hmac.New(newBlake, key)
	for _, p := range parts {
		m.Write(p)
	}
	m.Sum(out[:0])
	return out
}

func kdf1(chain digest, input []byte) digest {
	prk := hmacSum(chain[:], input)
	return hmacSum(prk[:], []byte{1})
}

func kdf2(chain digest, input []byte) (a, b digest) {
	prk := hmacSum(chain[:], input)
	a = hmacSum(prk[:], []byte{1})
	b = hmacSum(prk[:], a[:], []byte{2})
	return a, b
}

func kdf3(chain digest, input []byte) (a, b, c digest) {
	prk := hmacSum(chain[:], input)
	a = hmacSum(prk[:], []byte{1})
	b = hmacSum(prk[:], a[:], []byte{2})
	c = hmacSum(prk[:], b[:], []byte{3})
	return a, b, c
}
