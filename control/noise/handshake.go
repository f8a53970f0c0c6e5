package noise

import (
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"strconv"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

const (
	protocolName   = "Noise_IK_25519_ChaChaPoly_BLAKE2s"
	prologuePrefix = "Tailscale Control Protocol v"

	keyLen = identity.KeyLen
	tagLen = chacha20poly1305.Overhead

	initiationHeader = 5 // version, type, length
	initiationLen    = initiationHeader + keyLen + keyLen + tagLen + tagLen
	frameHeader      = 3 // type, length
	responseLen      = frameHeader + keyLen + tagLen
)

// Types of messages.
const (
	typeInitiation = 1
	typeResponse   = 2
	typeError      = 3
	typeRecord     = 4
)

// ErrHandshake reports a handshake message that is malformed, or was not made
// for this pair of keys.
var ErrHandshake = errors.New("bad noise handshake")

// ErrServerKey reports that the server does not hold the key that the client
// expected: it was replaced, or another server answers.
var ErrServerKey = errors.New("the server does not hold the expected key")

// symmetric is the state that both sides of a handshake compute alike.
type symmetric struct {
	h, ck, k [blake2s.Size]byte
}

func newBlake2s() hash.Hash {
	h, err := blake2s.New256(nil)
	if err != nil {
		panic("noise: " + err.Error()) // fails for keys that are too long only
	}
	return h
}

func newSymmetric(version uint16, server [keyLen]byte) *symmetric {
	s := &symmetric{h: blake2s.Sum256([]byte(protocolName))}
	s.ck = s.h
	s.mixHash(strconv.AppendUint([]byte(prologuePrefix), uint64(version), 10))
	s.mixHash(server[:])
	return s
}

func (s *symmetric) mixHash(b []byte) {
	d := newBlake2s()
	d.Write(s.h[:])
	d.Write(b)
	d.Sum(s.h[:0])
}

// mixDH folds the shared secret of a key pair into the chain and makes the
// next key. It fails for public keys of low order, whose secret anybody knows.
func (s *symmetric) mixDH(priv *ecdh.PrivateKey, pub [keyLen]byte) error {
	p, err := ecdh.X25519().NewPublicKey(pub[:])
	if err != nil {
		return err
	}
	secret, err := priv.ECDH(p)
	if err != nil {
		return err
	}
	s.ck, s.k = derive(secret, s.ck)
	return nil
}

func derive(secret []byte, ck [blake2s.Size]byte) (a, b [blake2s.Size]byte) {
	out, err := hkdf.Key(newBlake2s, secret, ck[:], "", 2*blake2s.Size)
	if err != nil {
		panic("noise: " + err.Error()) // length is always right
	}
	return [blake2s.Size]byte(out[:blake2s.Size]), [blake2s.Size]byte(out[blake2s.Size:])
}

// zeroNonce serves every handshake key, each of which seals one message.
var zeroNonce [chacha20poly1305.NonceSize]byte

func (s *symmetric) seal(dst, plain []byte) []byte {
	at := len(dst)
	dst = newAEAD(s.k).Seal(dst, zeroNonce[:], plain, s.h[:])
	s.mixHash(dst[at:])
	return dst
}

func (s *symmetric) open(sealed []byte) ([]byte, error) {
	plain, err := newAEAD(s.k).Open(nil, zeroNonce[:], sealed, s.h[:])
	if err != nil {
		return nil, err
	}
	s.mixHash(sealed)
	return plain, nil
}

// split returns the keys of the records: from client to server, and back.
func (s *symmetric) split() (up, down cipher.AEAD) {
	k1, k2 := derive(nil, s.ck)
	return newAEAD(k1), newAEAD(k2)
}

func newAEAD(k [keyLen]byte) cipher.AEAD {
	a, err := chacha20poly1305.New(k[:])
	if err != nil {
		panic("noise: " + err.Error()) // length is always right
	}
	return a
}

func staticKey(k identity.MachinePrivate) (*ecdh.PrivateKey, error) {
	if k.IsZero() {
		return nil, errors.New("noise: zero private key")
	}
	b := k.Bytes()
	return ecdh.X25519().NewPrivateKey(b[:])
}

// initiator is the client's half of a handshake between its two messages.
type initiator struct {
	sym       *symmetric
	static    *ecdh.PrivateKey
	ephemeral *ecdh.PrivateKey
}

// initiate makes the client's message.
func initiate(machine identity.MachinePrivate, server identity.MachinePublic, version uint16) (*initiator, []byte, error) {
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	return initiateWith(ephemeral, machine, server, version)
}

func initiateWith(ephemeral *ecdh.PrivateKey, machine identity.MachinePrivate, server identity.MachinePublic, version uint16) (*initiator, []byte, error) {
	static, err := staticKey(machine)
	if err != nil {
		return nil, nil, err
	}
	if server.IsZero() {
		return nil, nil, errors.New("noise: zero server key")
	}
	s := newSymmetric(version, server.Bytes())
	msg := make([]byte, 0, initiationLen)
	msg = binary.BigEndian.AppendUint16(msg, version)
	msg = append(msg, typeInitiation)
	msg = binary.BigEndian.AppendUint16(msg, initiationLen-initiationHeader)
	msg = append(msg, ephemeral.PublicKey().Bytes()...)
	s.mixHash(ephemeral.PublicKey().Bytes())
	if err := s.mixDH(ephemeral, server.Bytes()); err != nil {
		return nil, nil, fmt.Errorf("noise: server key %s: %w", server.Short(), err)
	}
	msg = s.seal(msg, static.PublicKey().Bytes())
	if err := s.mixDH(static, server.Bytes()); err != nil {
		return nil, nil, fmt.Errorf("noise: server key %s: %w", server.Short(), err)
	}
	msg = s.seal(msg, nil)
	return &initiator{sym: s, static: static, ephemeral: ephemeral}, msg, nil
}

// finish reads the server's message. It serves once.
func (i *initiator) finish(msg []byte) (up, down cipher.AEAD, err error) {
	if len(msg) != responseLen || msg[0] != typeResponse || binary.BigEndian.Uint16(msg[1:]) != responseLen-frameHeader {
		return nil, nil, fmt.Errorf("%w: malformed response", ErrHandshake)
	}
	e := [keyLen]byte(msg[frameHeader:])
	i.sym.mixHash(e[:])
	if err := i.sym.mixDH(i.ephemeral, e); err != nil {
		return nil, nil, fmt.Errorf("%w: ephemeral key of the response: %w", ErrHandshake, err)
	}
	if err := i.sym.mixDH(i.static, e); err != nil {
		return nil, nil, fmt.Errorf("%w: ephemeral key of the response: %w", ErrHandshake, err)
	}
	if _, err := i.sym.open(msg[frameHeader+keyLen:]); err != nil {
		return nil, nil, fmt.Errorf("%w: the response is not authentic: %w", ErrHandshake, ErrServerKey)
	}
	up, down = i.sym.split()
	return up, down, nil
}

// accepted is what a server knows after a client's message.
type accepted struct {
	response []byte
	peer     identity.MachinePublic
	version  uint16
	up, down cipher.AEAD
}

// respond reads the client's message and makes the server's.
func respond(server identity.MachinePrivate, msg []byte) (*accepted, error) {
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return respondWith(ephemeral, server, msg)
}

func respondWith(ephemeral *ecdh.PrivateKey, server identity.MachinePrivate, msg []byte) (*accepted, error) {
	static, err := staticKey(server)
	if err != nil {
		return nil, err
	}
	if err := checkInitiation(msg); err != nil {
		return nil, err
	}
	version := binary.BigEndian.Uint16(msg)
	msg = msg[initiationHeader:]
	ce := [keyLen]byte(msg)
	sealedStatic, sealedEmpty := msg[keyLen:keyLen+keyLen+tagLen], msg[keyLen+keyLen+tagLen:]

	s := newSymmetric(version, [keyLen]byte(static.PublicKey().Bytes()))
	s.mixHash(ce[:])
	if err := s.mixDH(static, ce); err != nil {
		return nil, fmt.Errorf("%w: ephemeral key: %w", ErrHandshake, err)
	}
	cs, err := s.open(sealedStatic)
	if err != nil {
		return nil, fmt.Errorf("%w: not meant for this server's key: %w", ErrHandshake, ErrServerKey)
	}
	peer := [keyLen]byte(cs)
	if err := s.mixDH(static, peer); err != nil {
		return nil, fmt.Errorf("%w: machine key: %w", ErrHandshake, err)
	}
	if _, err := s.open(sealedEmpty); err != nil {
		return nil, fmt.Errorf("%w: the client does not hold its machine key", ErrHandshake)
	}

	e := ephemeral.PublicKey().Bytes()
	out := make([]byte, 0, responseLen)
	out = append(out, typeResponse)
	out = binary.BigEndian.AppendUint16(out, responseLen-frameHeader)
	out = append(out, e...)
	s.mixHash(e)
	if err := s.mixDH(ephemeral, ce); err != nil {
		return nil, fmt.Errorf("%w: ephemeral key: %w", ErrHandshake, err)
	}
	if err := s.mixDH(ephemeral, peer); err != nil {
		return nil, fmt.Errorf("%w: machine key: %w", ErrHandshake, err)
	}
	a := &accepted{response: s.seal(out, nil), peer: identity.MachinePublicFrom(peer), version: version}
	a.up, a.down = s.split()
	return a, nil
}

// checkInitiation checks the part of the client's message that is in clear.
func checkInitiation(msg []byte) error {
	if len(msg) != initiationLen || msg[2] != typeInitiation || binary.BigEndian.Uint16(msg[3:]) != initiationLen-initiationHeader {
		return fmt.Errorf("%w: malformed initiation", ErrHandshake)
	}
	return nil
}
