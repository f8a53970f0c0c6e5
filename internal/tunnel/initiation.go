package tunnel

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/subtle"
	"fmt"
	"hash"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

// localKey is our private key with what the check of initiations needs of it.
// See sections 5.4.1 to 5.4.4 of the WireGuard paper for all of this file.
type localKey struct {
	private *ecdh.PrivateKey
	public  identity.NodePublic
	macKey  [blake2s.Size]byte // of mac1
	hash    [blake2s.Size]byte // of the handshake up to our public key
}

var noiseName = blake2s.Sum256([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))

func newLocalKey(k identity.NodePrivate) (*localKey, error) {
	raw := k.Bytes()
	private, err := ecdh.X25519().NewPrivateKey(raw[:])
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	l := &localKey{private: private, public: k.Public()}
	pub := l.public.Bytes()
	l.macKey = sum([]byte("mac1----"), pub[:])
	l.hash = sum(noiseName[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	l.hash = sum(l.hash[:], pub[:])
	return l, nil
}

// macValid checks mac1: whoever made the message knows our public key.
func (l *localKey) macValid(msg []byte) bool {
	if len(msg) != initiationSize {
		return false
	}
	mac, err := blake2s.New128(l.macKey[:])
	if err != nil {
		return false
	}
	mac.Write(msg[:116])
	var want [blake2s.Size128]byte
	return subtle.ConstantTimeCompare(mac.Sum(want[:0]), msg[116:132]) == 1
}

// opened is an initiation of which only the claimed sender is known.
type opened struct {
	static identity.NodePublic
	chain  [blake2s.Size]byte
	hash   [blake2s.Size]byte
	stamp  []byte // still sealed
}

// open finds out who an initiation claims to be from.
func (l *localKey) open(msg []byte) (o opened, ok bool) {
	if len(msg) != initiationSize {
		return o, false
	}
	ephemeral, static := msg[8:40], msg[40:88]
	shared, ok := l.dh(ephemeral)
	if !ok {
		return o, false
	}
	h := sum(l.hash[:], ephemeral)
	chain := hmacSum(noiseName[:], ephemeral)
	chain = hmacSum(chain[:], []byte{1})
	chain, key := kdf2(chain, shared)
	var raw [identity.KeyLen]byte
	if !unseal(raw[:], key, static, h) {
		return o, false
	}
	o = opened{static: identity.NodePublicFrom(raw), chain: chain, hash: sum(h[:], static), stamp: msg[88:116]}
	return o, !o.static.IsZero()
}

// timestamp opens the timestamp, which only the holder of the static key (or of
// ours) can have sealed.
func (l *localKey) timestamp(o opened) (ts timestamp, ok bool) {
	static := o.static.Bytes()
	shared, ok := l.dh(static[:])
	if !ok {
		return ts, false
	}
	_, key := kdf2(o.chain, shared)
	return ts, unseal(ts[:], key, o.stamp, o.hash)
}

func (l *localKey) dh(public []byte) ([]byte, bool) {
	p, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, false
	}
	shared, err := l.private.ECDH(p) // refuses points of low order
	return shared, err == nil
}

func unseal(dst []byte, key [blake2s.Size]byte, sealed []byte, ad [blake2s.Size]byte) bool {
	aead, err := chacha20poly1305.New(key[:])
	if err != nil {
		return false
	}
	var nonce [chacha20poly1305.NonceSize]byte
	_, err = aead.Open(dst[:0], nonce[:], sealed, ad[:])
	return err == nil
}

func sum(a, b []byte) (out [blake2s.Size]byte) {
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

func hmacSum(key []byte, parts ...[]byte) (out [blake2s.Size]byte) {
	m := hmac.New(newBlake, key)
	for _, p := range parts {
		m.Write(p)
	}
	m.Sum(out[:0])
	return out
}

func kdf2(chain [blake2s.Size]byte, input []byte) (a, b [blake2s.Size]byte) {
	prk := hmacSum(chain[:], input)
	a = hmacSum(prk[:], []byte{1})
	b = hmacSum(prk[:], a[:], []byte{2})
	return a, b
}

// initiation is a handshake initiation on its way to the check.
type initiation struct {
	src Source
	msg [initiationSize]byte
}

// heldInitiation is a proper initiation from a key that the netmap does not
// know: the peer may have heard of us a moment before we hear of it.
type heldInitiation struct {
	initiation
	at time.Time
}

const (
	holdFor = 5 * time.Second // then the sender has tried again
	maxHeld = 64
)

// knock decides whether an initiation is worth the cost of opening it.
func (t *Tunnel) knock(src Source, msg []byte, now time.Time) {
	if !t.key.Load().macValid(msg) {
		t.stats.dropMAC.Add(1)
		return
	}
	// A source that the path knows has its own small budget, so that a flood
	// from elsewhere does not keep it out.
	vouched := false
	if !src.Peer.IsZero() {
		if _, known := t.cfg.Lookup(src.Peer); known {
			vouched = t.history.mayTry(src.Peer, now)
		}
	}
	if !vouched && !t.strange.AllowN(now, 1) {
		t.stats.dropRate.Add(1)
		return
	}
	in := initiation{src: src, msg: [initiationSize]byte(msg)}
	select {
	case t.inits <- in:
	default:
		t.stats.dropRate.Add(1)
	}
}

// admit opens an initiation, makes sure that its sender is a peer and that it
// is no replay, and hands it to the Device with the peer in place.
func (t *Tunnel) admit(in initiation) {
	key := t.key.Load()
	o, ok := key.open(in.msg[:])
	if !ok {
		t.stats.dropForged.Add(1)
		return
	}
	byRelay := !in.src.Addr.IsValid()
	if byRelay && !in.src.Peer.IsZero() && in.src.Peer != o.static {
		t.stats.dropMismatch.Add(1)
		return
	}
	_, known := t.cfg.Lookup(o.static)
	if known = known && o.static != key.public; !known {
		t.stats.dropUnknownKey.Add(1)
		if !byRelay || in.src.Peer != o.static || o.static == key.public {
			return
		}
	}
	ts, ok := key.timestamp(o)
	if !ok {
		t.stats.dropForged.Add(1)
		return
	}
	if !known {
		t.hold(o.static, in)
		return
	}
	if !t.history.accept(o.static, ts) {
		t.stats.dropReplay.Add(1)
		return
	}
	now := time.Now()
	p, err := t.obtain(o.static)
	if err != nil {
		t.stats.dropNoPeer.Add(1)
		return
	}
	ep, ok := p.from(in.src, now)
	if !ok {
		return
	}
	tr := newTrain()
	tr.add(in.msg[:])
	tr.eps[0] = ep
	select {
	case t.in <- tr:
		t.stats.datagramsIn.Add(1)
	case <-t.closing:
	}
}

func (t *Tunnel) hold(key identity.NodePublic, in initiation) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, h := range t.held {
		if now.Sub(h.at) > holdFor {
			delete(t.held, k)
		}
	}
	if _, again := t.held[key]; again || len(t.held) < maxHeld {
		t.held[key] = heldInitiation{in, now}
	}
}

// retryHeld gives initiations that came too early their second chance.
func (t *Tunnel) retryHeld(keys []identity.NodePublic) {
	now := time.Now()
	var again []initiation
	t.mu.Lock()
	if len(t.held) > 0 {
		for _, k := range keys {
			if h, ok := t.held[k]; ok {
				delete(t.held, k)
				if now.Sub(h.at) <= holdFor {
					again = append(again, h.initiation)
				}
			}
		}
	}
	t.mu.Unlock()
	for _, in := range again {
		select {
		case t.inits <- in:
		default:
			t.stats.dropRate.Add(1)
		}
	}
}

// timestamp is a TAI64N label; later ones compare greater.
type timestamp [12]byte

// maxHistory bounds how many peers' last timestamps are remembered.
const maxHistory = 1 << 16

// history remembers the last initiation of every peer, longer than the peers
// themselves live, so that an old one cannot be played back.
type history struct {
	mu    sync.Mutex // guards what follows
	peers map[identity.NodePublic]*past
	// floor is the newest timestamp that was ever forgotten: peers that are
	// not in the map may have used anything up to it.
	floor timestamp
	limit int // 0 means maxHistory
}

type past struct {
	last  timestamp
	tried time.Time
}

// mayTry reports whether this key, which the netmap knows, has not tried too
// recently.
func (h *history) mayTry(key identity.NodePublic, now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	if !p.tried.IsZero() && now.Sub(p.tried) < initGap {
		return false
	}
	p.tried = now
	return true
}

// accept notes the timestamp of a genuine initiation and reports whether it is
// newer than all before.
func (h *history) accept(key identity.NodePublic, ts timestamp) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	if bytes.Compare(ts[:], p.last[:]) <= 0 {
		return false
	}
	p.last = ts
	return true
}

func (h *history) get(key identity.NodePublic) *past {
	if p := h.peers[key]; p != nil {
		return p
	}
	if h.peers == nil {
		h.peers = make(map[identity.NodePublic]*past)
	}
	limit := h.limit
	if limit == 0 {
		limit = maxHistory
	}
	if len(h.peers) >= limit {
		h.forget(len(h.peers) - limit*7/8)
	}
	p := &past{last: h.floor}
	h.peers[key] = p
	return p
}

// forget drops the n oldest records and raises the floor accordingly.
func (h *history) forget(n int) {
	type record struct {
		key  identity.NodePublic
		last timestamp
	}
	all := make([]record, 0, len(h.peers))
	for k, p := range h.peers {
		all = append(all, record{k, p.last})
	}
	slices.SortFunc(all, func(a, b record) int { return bytes.Compare(a.last[:], b.last[:]) })
	for _, r := range all[:min(n, len(all))] {
		delete(h.peers, r.key)
		if bytes.Compare(r.last[:], h.floor[:]) > 0 {
			h.floor = r.last
		}
	}
}
