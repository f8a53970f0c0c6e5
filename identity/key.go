package identity

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"golang.org/x/crypto/nacl/box"
)

// KeyLen is the length in bytes of every key of the mesh: all are X25519 keys.
const KeyLen = 32

// Text prefixes of the open protocols. A key's text form is its prefix
// followed by 64 lower-case hexadecimal digits.
const (
	prefixPrivate   = "privkey:"
	prefixMachine   = "mkey:"
	prefixNode      = "nodekey:"
	prefixDisco     = "discokey:"
	prefixChallenge = "chalpub:"
)

// ErrBadKey reports that a key's text form could not be read. The text itself
// is never part of the error, since it may be a secret.
var ErrBadKey = errors.New("malformed key")

type raw [KeyLen]byte

func newRaw() raw {
	var k raw
	if _, err := io.ReadFull(rand.Reader, k[:]); err != nil {
		panic("identity: no randomness: " + err.Error()) // crypto/rand never fails on supported systems
	}
	// Clamped at creation, as other implementations of these protocols do.
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k
}

func (k raw) public() raw {
	if k == (raw{}) {
		panic("identity: public key of a zero private key")
	}
	priv, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		panic("identity: " + err.Error()) // length is always right
	}
	return raw(priv.PublicKey().Bytes())
}

func (k raw) appendText(b []byte, prefix string) []byte {
	b = append(b, prefix...)
	return hex.AppendEncode(b, k[:])
}

func (k *raw) parse(text, prefix string) error {
	if len(text) != len(prefix)+2*KeyLen || text[:len(prefix)] != prefix {
		return fmt.Errorf("%w: want %q and 64 hexadecimal digits", ErrBadKey, prefix)
	}
	var n raw
	if _, err := hex.Decode(n[:], []byte(text[len(prefix):])); err != nil {
		return fmt.Errorf("%w: want %q and 64 hexadecimal digits", ErrBadKey, prefix)
	}
	*k = n
	return nil
}

func (k raw) short() string {
	return "[" + base64.StdEncoding.EncodeToString(k[:])[:5] + "]"
}

// redacted is what every private key prints as, whatever the format verb.
const redacted = "(private key)"

// MachinePrivate is the private key of an installation: its static key in the
// control channel. Control servers own one too. The zero value is no key.
type MachinePrivate struct{ k raw }

// MachinePublic is the public half of a MachinePrivate.
type MachinePublic struct{ k raw }

// NodePrivate is a node's WireGuard identity, also used to log in at relays.
// Relays own one too. The zero value is no key.
type NodePrivate struct{ k raw }

// NodePublic is the public half of a NodePrivate; it names a node to its peers.
type NodePublic struct{ k raw }

// DiscoPrivate seals path discovery messages. It is made anew at each start
// and never leaves memory, so it has no text form. The zero value is no key.
type DiscoPrivate struct{ k raw }

// DiscoPublic is the public half of a DiscoPrivate.
type DiscoPublic struct{ k raw }

// ChallengePublic is the key a control server offers at the start of a control
// connection, to which a node may prove that it holds its node key.
type ChallengePublic struct{ k raw }

// NewMachine returns a new random machine key.
func NewMachine() MachinePrivate { return MachinePrivate{newRaw()} }

// NewNode returns a new random node key.
func NewNode() NodePrivate { return NodePrivate{newRaw()} }

// NewDisco returns a new random disco key.
func NewDisco() DiscoPrivate { return DiscoPrivate{newRaw()} }

// Public returns the public half of k. It panics for the zero key.
func (k MachinePrivate) Public() MachinePublic { return MachinePublic{k.k.public()} }

// Public returns the public half of k. It panics for the zero key.
func (k NodePrivate) Public() NodePublic { return NodePublic{k.k.public()} }

// Public returns the public half of k. It panics for the zero key.
func (k DiscoPrivate) Public() DiscoPublic { return DiscoPublic{k.k.public()} }

// IsZero reports whether k is no key.
func (k MachinePrivate) IsZero() bool { return k.Equal(MachinePrivate{}) }

// IsZero reports whether k is no key.
func (k NodePrivate) IsZero() bool { return k.Equal(NodePrivate{}) }

// IsZero reports whether k is no key.
func (k DiscoPrivate) IsZero() bool { return k.k == raw{} }

// Equal compares in constant time.
func (k MachinePrivate) Equal(o MachinePrivate) bool {
	return subtle.ConstantTimeCompare(k.k[:], o.k[:]) == 1
}

// Equal compares in constant time.
func (k NodePrivate) Equal(o NodePrivate) bool {
	return subtle.ConstantTimeCompare(k.k[:], o.k[:]) == 1
}

// Bytes returns the raw private key: a secret, keep it out of logs.
func (k MachinePrivate) Bytes() [KeyLen]byte { return k.k }

// Bytes returns the raw private key: a secret, keep it out of logs.
func (k NodePrivate) Bytes() [KeyLen]byte { return k.k }

// Secret returns the text form for a state file ("privkey:…"). Private keys
// have no MarshalText on purpose: no encoder or logger writes one by accident.
func (k MachinePrivate) Secret() string { return string(k.k.appendText(nil, prefixPrivate)) }

// Secret returns the text form for a state file ("privkey:…"). Private keys
// have no MarshalText on purpose: no encoder or logger writes one by accident.
func (k NodePrivate) Secret() string { return string(k.k.appendText(nil, prefixPrivate)) }

// ParseMachinePrivate reads the form that Secret wrote.
func ParseMachinePrivate(text string) (MachinePrivate, error) {
	var k MachinePrivate
	err := k.k.parse(text, prefixPrivate)
	return k, err
}

// ParseNodePrivate reads the form that Secret wrote.
func ParseNodePrivate(text string) (NodePrivate, error) {
	var k NodePrivate
	err := k.k.parse(text, prefixPrivate)
	return k, err
}

// Format prints a placeholder, never the key.
func (k MachinePrivate) Format(s fmt.State, _ rune) { io.WriteString(s, redacted) }

// Format prints a placeholder, never the key.
func (k NodePrivate) Format(s fmt.State, _ rune) { io.WriteString(s, redacted) }

// Format prints a placeholder, never the key.
func (k DiscoPrivate) Format(s fmt.State, _ rune) { io.WriteString(s, redacted) }

// Public keys. NewXFromRaw copies 32 raw bytes as they stand on the wire.

// MachinePublicFrom returns the key with the given raw bytes.
func MachinePublicFrom(b [KeyLen]byte) MachinePublic { return MachinePublic{b} }

// NodePublicFrom returns the key with the given raw bytes.
func NodePublicFrom(b [KeyLen]byte) NodePublic { return NodePublic{b} }

// DiscoPublicFrom returns the key with the given raw bytes.
func DiscoPublicFrom(b [KeyLen]byte) DiscoPublic { return DiscoPublic{b} }

// Bytes returns the raw key.
func (k MachinePublic) Bytes() [KeyLen]byte { return k.k }

// Bytes returns the raw key.
func (k NodePublic) Bytes() [KeyLen]byte { return k.k }

// Bytes returns the raw key.
func (k DiscoPublic) Bytes() [KeyLen]byte { return k.k }

// IsZero reports whether k is no key.
func (k MachinePublic) IsZero() bool { return k == MachinePublic{} }

// IsZero reports whether k is no key.
func (k NodePublic) IsZero() bool { return k == NodePublic{} }

// IsZero reports whether k is no key.
func (k DiscoPublic) IsZero() bool { return k == DiscoPublic{} }

// IsZero reports whether k is no key.
func (k ChallengePublic) IsZero() bool { return k == ChallengePublic{} }

// String returns the text form, "mkey:…".
func (k MachinePublic) String() string { return string(k.k.appendText(nil, prefixMachine)) }

// String returns the text form, "nodekey:…".
func (k NodePublic) String() string { return string(k.k.appendText(nil, prefixNode)) }

// String returns the text form, "discokey:…".
func (k DiscoPublic) String() string { return string(k.k.appendText(nil, prefixDisco)) }

// String returns the text form, "chalpub:…".
func (k ChallengePublic) String() string { return string(k.k.appendText(nil, prefixChallenge)) }

// Short returns a form for logs, like "[M0aFZ]".
func (k MachinePublic) Short() string { return k.k.short() }

// Short returns a form for logs, like "[M0aFZ]".
func (k NodePublic) Short() string { return k.k.short() }

// Short returns a form for logs, like "d:0123456789abcdef".
func (k DiscoPublic) Short() string { return "d:" + hex.EncodeToString(k.k[:8]) }

// MarshalText implements encoding.TextMarshaler.
func (k MachinePublic) MarshalText() ([]byte, error) { return k.k.appendText(nil, prefixMachine), nil }

// MarshalText implements encoding.TextMarshaler.
func (k NodePublic) MarshalText() ([]byte, error) { return k.k.appendText(nil, prefixNode), nil }

// MarshalText implements encoding.TextMarshaler.
func (k DiscoPublic) MarshalText() ([]byte, error) { return k.k.appendText(nil, prefixDisco), nil }

// MarshalText implements encoding.TextMarshaler.
func (k ChallengePublic) MarshalText() ([]byte, error) {
	return k.k.appendText(nil, prefixChallenge), nil
}

// UnmarshalText implements encoding.TextUnmarshaler; the error is ErrBadKey.
func (k *MachinePublic) UnmarshalText(b []byte) error { return k.k.parse(string(b), prefixMachine) }

// UnmarshalText implements encoding.TextUnmarshaler; the error is ErrBadKey.
func (k *NodePublic) UnmarshalText(b []byte) error { return k.k.parse(string(b), prefixNode) }

// UnmarshalText implements encoding.TextUnmarshaler; the error is ErrBadKey.
func (k *DiscoPublic) UnmarshalText(b []byte) error { return k.k.parse(string(b), prefixDisco) }

// UnmarshalText implements encoding.TextUnmarshaler; the error is ErrBadKey.
func (k *ChallengePublic) UnmarshalText(b []byte) error {
	return k.k.parse(string(b), prefixChallenge)
}

// ParseMachinePublic reads "mkey:…".
func ParseMachinePublic(text string) (MachinePublic, error) {
	var k MachinePublic
	err := k.k.parse(text, prefixMachine)
	return k, err
}

// ParseNodePublic reads "nodekey:…".
func ParseNodePublic(text string) (NodePublic, error) {
	var k NodePublic
	err := k.k.parse(text, prefixNode)
	return k, err
}

// ParseDiscoPublic reads "discokey:…".
func ParseDiscoPublic(text string) (DiscoPublic, error) {
	var k DiscoPublic
	err := k.k.parse(text, prefixDisco)
	return k, err
}

// BoxOverhead is how much longer a sealed message is than its plain text:
// a 24-byte nonce and a 16-byte tag.
const BoxOverhead = 24 + box.Overhead

// Shared is the precomputed secret of a key pair and a peer's public key; it
// seals and opens NaCl boxes (Curve25519, XSalsa20-Poly1305) laid out as
// nonce followed by ciphertext.
type Shared struct{ k raw }

// Format prints a placeholder, never the key.
func (s Shared) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// Seal appends nonce and box of msg to dst.
func (s *Shared) Seal(dst, msg []byte) []byte {
	var nonce [24]byte
	if _, err := io.ReadFull(rand.Reader, nonce[:]); err != nil {
		panic("identity: no randomness: " + err.Error())
	}
	dst = append(dst, nonce[:]...)
	return box.SealAfterPrecomputation(dst, msg, &nonce, (*[KeyLen]byte)(&s.k))
}

// Open returns the plain text of what Seal made, appended to dst; ok is false
// when sealed is not an intact box of this pair of keys.
func (s *Shared) Open(dst, sealed []byte) (msg []byte, ok bool) {
	if len(sealed) < BoxOverhead {
		return nil, false
	}
	nonce := [24]byte(sealed[:24])
	return box.OpenAfterPrecomputation(dst, sealed[24:], &nonce, (*[KeyLen]byte)(&s.k))
}

func precompute(priv, pub raw) *Shared {
	if priv == (raw{}) || pub == (raw{}) {
		panic("identity: box with a zero key")
	}
	var s Shared
	box.Precompute((*[KeyLen]byte)(&s.k), (*[KeyLen]byte)(&pub), (*[KeyLen]byte)(&priv))
	return &s
}

// Shared returns the box secret between k and a peer's key. It panics if either
// is zero: check keys that came from outside first.
func (k DiscoPrivate) Shared(peer DiscoPublic) *Shared { return precompute(k.k, peer.k) }

// Shared returns the box secret between k and a peer's key. It panics if either
// is zero: check keys that came from outside first.
func (k NodePrivate) Shared(peer NodePublic) *Shared { return precompute(k.k, peer.k) }
