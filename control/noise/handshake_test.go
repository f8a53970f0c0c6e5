package noise

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash"
	"strings"
	"testing"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/curve25519"

	"mesh/identity"
)

// The reference below is a second implementation, written from the tables of
// the Noise specification alone and sharing nothing with the first: HMAC by
// hand, curve25519 instead of crypto/ecdh, state in plain variables.

func refHMAC(key []byte, parts ...[]byte) []byte {
	m := hmac.New(func() hash.Hash { h, _ := blake2s.New256(nil); return h }, key)
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}

func refHKDF(ck, in []byte) (a, b []byte) {
	temp := refHMAC(ck, in)
	a = refHMAC(temp, []byte{1})
	b = refHMAC(temp, a, []byte{2})
	return a, b
}

func refHash(parts ...[]byte) []byte {
	h := blake2s.Sum256(bytes.Join(parts, nil))
	return h[:]
}

func refDH(t *testing.T, priv, pub []byte) []byte {
	t.Helper()
	s, err := curve25519.X25519(priv, pub)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func refSeal(key, ad, plain []byte) []byte {
	a, _ := chacha20poly1305.New(key)
	return a.Seal(nil, make([]byte, 12), plain, ad)
}

// refHandshake returns both messages and both record keys.
func refHandshake(t *testing.T, version string, cs, ce, ss, se []byte) (init, resp, up, down []byte) {
	pub := func(p []byte) []byte { return refDH(t, p, curve25519.Basepoint) }
	h := refHash([]byte("Noise_IK_25519_ChaChaPoly_BLAKE2s"))
	ck := h
	h = refHash(h, []byte("Tailscale Control Protocol v"+version))
	h = refHash(h, pub(ss))

	h = refHash(h, pub(ce))
	ck, k := refHKDF(ck, refDH(t, ce, pub(ss)))
	sealedStatic := refSeal(k, h, pub(cs))
	h = refHash(h, sealedStatic)
	ck, k = refHKDF(ck, refDH(t, cs, pub(ss)))
	sealedEmpty := refSeal(k, h, nil)
	h = refHash(h, sealedEmpty)
	init = bytes.Join([][]byte{{0, 131, 1, 0, 96}, pub(ce), sealedStatic, sealedEmpty}, nil)

	h = refHash(h, pub(se))
	ck, _ = refHKDF(ck, refDH(t, se, pub(ce)))
	ck, k = refHKDF(ck, refDH(t, se, pub(cs)))
	resp = bytes.Join([][]byte{{2, 0, 48}, pub(se), refSeal(k, h, nil)}, nil)
	up, down = refHKDF(ck, nil)
	return init, resp, up, down
}

func fixedKey(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func machineKey(t testing.TB, raw []byte) identity.MachinePrivate {
	k, err := identity.ParseMachinePrivate("privkey:" + hex.EncodeToString(raw))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ecdhKey(t testing.TB, raw []byte) *ecdh.PrivateKey {
	k, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestHandshakeMatchesReference(t *testing.T) {
	cs, ce, ss, se := fixedKey(0x11), fixedKey(0x22), fixedKey(0x33), fixedKey(0x44)
	wantInit, wantResp, wantUp, wantDown := refHandshake(t, "131", cs, ce, ss, se)

	client, server := machineKey(t, cs), machineKey(t, ss)
	hs, init, err := initiateWith(ecdhKey(t, ce), client, server.Public(), 131)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(init, wantInit) {
		t.Fatalf("initiation\n got %x\nwant %x", init, wantInit)
	}
	a, err := respondWith(ecdhKey(t, se), server, init)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.response, wantResp) {
		t.Fatalf("response\n got %x\nwant %x", a.response, wantResp)
	}
	if a.version != 131 || a.peer != client.Public() {
		t.Fatalf("server learned version %d, key %v", a.version, a.peer)
	}
	up, down, err := hs.finish(a.response)
	if err != nil {
		t.Fatal(err)
	}

	// Records: the counter stands in big endian in the last eight bytes.
	nonce := make([]byte, 12)
	for _, n := range []uint64{0, 1, 255, 256, 1 << 40} {
		binary.BigEndian.PutUint64(nonce[4:], n)
		refUp, _ := chacha20poly1305.New(wantUp)
		refDown, _ := chacha20poly1305.New(wantDown)
		for _, pair := range []struct{ got, want []byte }{
			{up.Seal(nil, nonce, []byte("x"), nil), refUp.Seal(nil, nonce, []byte("x"), nil)},
			{a.up.Seal(nil, nonce, []byte("x"), nil), refUp.Seal(nil, nonce, []byte("x"), nil)},
			{down.Seal(nil, nonce, []byte("x"), nil), refDown.Seal(nil, nonce, []byte("x"), nil)},
			{a.down.Seal(nil, nonce, []byte("x"), nil), refDown.Seal(nil, nonce, []byte("x"), nil)},
		} {
			if !bytes.Equal(pair.got, pair.want) {
				t.Errorf("record %d: got %x, want %x", n, pair.got, pair.want)
			}
		}
	}
}

// TestHandshakeVector holds the outcome for fixed keys, so that a change of
// both implementations at once does not go unseen.
func TestHandshakeVector(t *testing.T) {
	_, resp, up, down := refHandshake(t, "131", fixedKey(0x11), fixedKey(0x22), fixedKey(0x33), fixedKey(0x44))
	for name, v := range map[string][2]string{
		"response": {hex.EncodeToString(resp), vectorResponse},
		"up":       {hex.EncodeToString(up), vectorUp},
		"down":     {hex.EncodeToString(down), vectorDown},
	} {
		if v[0] != v[1] {
			t.Errorf("%s: got %s, want %s", name, v[0], v[1])
		}
	}
}

const (
	vectorResponse = "020030ff2ee45601ec1b67310c7790404585ae697331eee1c1f8cf2419731c1fff3e6b6d0dea813ed35e51c463a44eecb1deca"
	vectorUp       = "d9811dd6a320dc8484bb37ea989640c99f99a8582f50b829e347bd75da510717"
	vectorDown     = "8561e3fd4551ed82ee22220925e41e923d64b1c04b856f8ec1eaa544a511a427"
)

func TestTamperedInitiation(t *testing.T) {
	server := identity.NewMachine()
	_, init, err := initiate(identity.NewMachine(), server.Public(), 131)
	if err != nil {
		t.Fatal(err)
	}
	for i := range init {
		bad := bytes.Clone(init)
		bad[i] ^= 0x40
		if _, err := respond(server, bad); !errors.Is(err, ErrHandshake) {
			t.Errorf("byte %d changed: got %v, want ErrHandshake", i, err)
		}
	}
	for n := range init {
		if _, err := respond(server, init[:n]); !errors.Is(err, ErrHandshake) {
			t.Errorf("cut to %d bytes: got %v, want ErrHandshake", n, err)
		}
	}
	if _, err := respond(server, append(init, 0)); !errors.Is(err, ErrHandshake) {
		t.Errorf("one byte too many: got %v, want ErrHandshake", err)
	}
	if _, err := respond(identity.NewMachine(), init); !errors.Is(err, ErrServerKey) {
		t.Errorf("another server: got %v, want ErrServerKey", err)
	}
}

func TestTamperedResponse(t *testing.T) {
	server := identity.NewMachine()
	client := identity.NewMachine()
	hs, init, err := initiate(client, server.Public(), 131)
	if err != nil {
		t.Fatal(err)
	}
	a, err := respond(server, init)
	if err != nil {
		t.Fatal(err)
	}
	fresh := func() *initiator {
		sym := *hs.sym
		return &initiator{sym: &sym, static: hs.static, ephemeral: hs.ephemeral}
	}
	for i := range a.response {
		if i == frameHeader+keyLen-1 {
			continue // its top bit is no part of the key; tested with another bit below
		}
		bad := bytes.Clone(a.response)
		bad[i] ^= 0x40
		if _, _, err := fresh().finish(bad); !errors.Is(err, ErrHandshake) {
			t.Errorf("byte %d changed: got %v, want ErrHandshake", i, err)
		}
	}
	for n := range a.response {
		if _, _, err := fresh().finish(a.response[:n]); !errors.Is(err, ErrHandshake) {
			t.Errorf("cut to %d bytes: got %v, want ErrHandshake", n, err)
		}
	}
	if _, _, err := fresh().finish(a.response); err != nil {
		t.Errorf("the intact response: %v", err)
	}
}

// Points of low order as keys make secrets that anybody can compute.
func TestLowOrderKeys(t *testing.T) {
	server := identity.NewMachine()
	for _, text := range []string{strings.Repeat("00", 32), "01" + strings.Repeat("00", 31), "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"} {
		point, _ := hex.DecodeString(text)
		_, init, err := initiate(identity.NewMachine(), server.Public(), 131)
		if err != nil {
			t.Fatal(err)
		}
		copy(init[initiationHeader:], point)
		if _, err := respond(server, init); !errors.Is(err, ErrHandshake) {
			t.Errorf("initiation with ephemeral %s: %v", text, err)
		}
		if _, _, err := initiate(identity.NewMachine(), identity.MachinePublicFrom([32]byte(point)), 131); err == nil {
			t.Errorf("initiation to static %s succeeded", text)
		}
		hs, _, err := initiate(identity.NewMachine(), server.Public(), 131)
		if err != nil {
			t.Fatal(err)
		}
		resp := append([]byte{typeResponse, 0, 48}, point...)
		if _, _, err := hs.finish(append(resp, make([]byte, tagLen)...)); !errors.Is(err, ErrHandshake) {
			t.Errorf("response with ephemeral %s: %v", text, err)
		}
	}
	if _, _, err := initiate(identity.MachinePrivate{}, server.Public(), 131); err == nil {
		t.Error("initiation with a zero machine key succeeded")
	}
}

func FuzzInitiation(f *testing.F) {
	server := machineKey(f, fixedKey(0x33))
	_, init, err := initiateWith(ecdhKey(f, fixedKey(0x22)), machineKey(f, fixedKey(0x11)), server.Public(), 131)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(init)
	f.Add([]byte{})
	f.Add(init[:50])
	f.Fuzz(func(t *testing.T, msg []byte) {
		a, err := respond(server, msg)
		if err == nil && !bytes.Equal(msg[5:], init[5:]) && a.peer.IsZero() {
			t.Errorf("accepted a zero peer")
		}
		if err != nil && !errors.Is(err, ErrHandshake) {
			t.Errorf("error of another kind: %v", err)
		}
	})
}

func FuzzResponse(f *testing.F) {
	client, server := machineKey(f, fixedKey(0x11)), machineKey(f, fixedKey(0x33))
	_, init, err := initiateWith(ecdhKey(f, fixedKey(0x22)), client, server.Public(), 131)
	if err != nil {
		f.Fatal(err)
	}
	a, err := respondWith(ecdhKey(f, fixedKey(0x44)), server, init)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(a.response)
	f.Add([]byte{typeError, 0, 3, 'b', 'a', 'd'})
	f.Fuzz(func(t *testing.T, msg []byte) {
		hs, _, err := initiateWith(ecdhKey(t, fixedKey(0x22)), client, server.Public(), 131)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readResponse(bytes.NewReader(msg))
		if err == nil {
			_, _, err = hs.finish(got)
		}
		if err == nil && !bytes.Equal(got[frameHeader+keyLen:], a.response[frameHeader+keyLen:]) {
			t.Errorf("accepted a forged response %x", got)
		}
	})
}
