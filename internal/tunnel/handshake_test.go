package tunnel

import (
	"crypto/ecdh"
	"encoding/binary"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

// forge makes a correct initiation by hand.
func forge(tb testing.TB, to identity.NodePublic, from identity.NodePrivate, at time.Time) []byte {
	tb.Helper()
	dh := func(private, public [32]byte) []byte {
		k, err := ecdh.X25519().NewPrivateKey(private[:])
		if err != nil {
			tb.Fatal(err)
		}
		p, err := ecdh.X25519().NewPublicKey(public[:])
		if err != nil {
			tb.Fatal(err)
		}
		s, err := k.ECDH(p)
		if err != nil {
			tb.Fatal(err)
		}
		return s
	}
	seal := func(key [32]byte, plain []byte, ad [32]byte) []byte {
		aead, err := chacha20poly1305.New(key[:])
		if err != nil {
			tb.Fatal(err)
		}
		return aead.Seal(nil, make([]byte, 12), plain, ad[:])
	}
	receiver, sender := to.Bytes(), from.Public().Bytes()
	ephemeral := identity.NewNode()
	e := ephemeral.Public().Bytes()
	msg := make([]byte, initiationSize)
	msg[0] = typeInitiation
	binary.LittleEndian.PutUint32(msg[4:], uint32(e[0])<<16|uint32(e[1])|1<<30)
	copy(msg[8:], e[:])
	h := sum(noiseName[:], []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"))
	h = sum(h[:], receiver[:])
	h = sum(h[:], e[:])
	c := hmacSum(noiseName[:], e[:])
	c = hmacSum(c[:], []byte{1})
	c, k := kdf2(c, dh(ephemeral.Bytes(), receiver))
	copy(msg[40:], seal(k, sender[:], h))
	h = sum(h[:], msg[40:88])
	_, k = kdf2(c, dh(from.Bytes(), receiver))
	ts := labelOf(at)
	copy(msg[88:], seal(k, ts[:], h))
	sign(msg, to)
	return msg
}

func labelOf(at time.Time) (ts timestamp) {
	binary.BigEndian.PutUint64(ts[:], 0x400000000000000a+uint64(at.Unix()))
	binary.BigEndian.PutUint32(ts[8:], uint32(at.Nanosecond()))
	return ts
}

// sign makes mac1 right.
func sign(msg []byte, to identity.NodePublic) {
	receiver := to.Bytes()
	macKey := sum([]byte("mac1----"), receiver[:])
	mac, err := blake2s.New128(macKey[:])
	if err != nil {
		panic(err)
	}
	mac.Write(msg[:116])
	copy(msg[116:132], mac.Sum(nil))
}

// What is made by hand passes our check; with any byte of the sealed part changed
// it does not.
func TestInitiationCheck(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		a.t.Close()
		key, err := newLocalKey(b.private)
		if err != nil {
			t.Fatal(err)
		}
		msg := forge(t, b.key, a.private, time.Now())
		o, ok := key.open(msg)
		if !ok || o.static != a.key {
			t.Fatalf("opened %v %v", o.static, ok)
		}
		if ts, ok := key.prove(&o); !ok || ts != labelOf(time.Now()) {
			t.Fatalf("timestamp %x %v", ts, ok)
		}
		for i := range initiationSize {
			bad := slices.Clone(msg)
			bad[i] ^= 0x40
			if key.door.knows(bad) == (i < 132) {
				t.Errorf("mac1 with byte %d changed: %v", i, i < 132)
			}
			sign(bad, b.key)
			o, ok := key.open(bad)
			if ok {
				_, ok = key.prove(&o)
			}
			if ok == (i >= 8 && i < 116) {
				t.Errorf("byte %d changed: opens %v", i, ok)
			}
		}
		for n := range initiationSize {
			if _, ok := key.open(msg[:n]); ok || key.door.knows(msg[:n]) {
				t.Errorf("%d bytes accepted", n)
			}
		}
		// A low-order ephemeral key gives no secret at all.
		zero := slices.Clone(msg)
		clear(zero[8:40])
		if _, ok := key.open(zero); ok {
			t.Error("low-order point accepted")
		}
		// Knowing both public keys is not enough: the timestamp does not open.
		other := forge(t, b.key, identity.NewNode(), time.Now())
		sign(other, b.key)
		b.t.Receive(Source{Peer: a.key}, [][]byte{other})
		b.t.Receive(Source{Peer: a.key}, [][]byte{msg})
		synctest.Wait()
		s := b.t.Stats()
		if s.DropMismatch+s.DropUnknownKey == 0 || b.t.ActivePeers() != 1 || s.DatagramsOut != 1 {
			t.Errorf("handshake by hand: %+v, %d active", s, b.t.ActivePeers())
		}
	})
}

// An impostor can name any static key, but not seal its timestamp: no peer is
// created and the victim's history is untouched.
func TestImpostor(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		a, b := pair(t, nw)
		msg := forge(t, b.key, a.private, time.Now().Add(time.Hour))
		msg[100] ^= 1
		sign(msg, b.key)
		b.t.Receive(Source{Peer: a.key}, [][]byte{msg})
		synctest.Wait()
		if s := b.t.Stats(); s.DropForged != 1 || b.t.ActivePeers() != 0 {
			t.Fatalf("impostor: %+v", s)
		}
		time.Sleep(time.Second)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
	})
}

func TestHistory(t *testing.T) {
	at := func(s int) timestamp { return labelOf(time.Unix(int64(s), 0)) }
	keys := make([]identity.NodePublic, 20)
	for i := range keys {
		keys[i] = identity.NewNode().Public()
	}
	h := history{limit: 8}
	now := time.Now()
	if !h.mayTry(keys[0], now) || h.mayTry(keys[0], now.Add(initGap/2)) || !h.mayTry(keys[0], now.Add(initGap)) {
		t.Error("wrong spacing of tries")
	}
	accept := func(k identity.NodePublic, ts timestamp) bool { ok, _ := h.accept(k, ts, now); return ok }
	if !accept(keys[0], at(5)) || accept(keys[0], at(5)) || accept(keys[0], at(4)) || !accept(keys[0], at(6)) {
		t.Error("wrong order of timestamps")
	}
	for i, k := range keys[1:] {
		accept(k, at(100+i))
		if len(h.peers) > h.limit {
			t.Fatalf("%d records", len(h.peers))
		}
	}
	// Forgotten peers cannot be played back, remembered ones neither.
	for i, k := range keys[1:] {
		if accept(k, at(100+i)) {
			t.Errorf("replay of peer %d accepted", i)
		}
	}
	if accept(keys[0], at(6)) {
		t.Error("replay of a forgotten peer accepted")
	}
	if !accept(keys[0], at(200)) {
		t.Error("a newer one is refused")
	}
}

func FuzzInitiation(f *testing.F) {
	private := identity.NewNode()
	key, err := newLocalKey(private)
	if err != nil {
		f.Fatal(err)
	}
	good := forge(f, private.Public(), identity.NewNode(), time.Unix(1e9, 0))
	f.Add(good)
	f.Add(good[:100])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, msg []byte) {
		if len(msg) >= initiationSize {
			msg = msg[:initiationSize]
			sign(msg, private.Public())
			if !key.door.knows(msg) {
				t.Fatal("a proper mac1 is refused")
			}
		} else if key.door.knows(msg) {
			t.Fatal("too short")
		}
		if o, ok := key.open(msg); ok {
			key.prove(&o)
		}
	})
}
