// Package disco holds the messages by which nodes find direct paths to each
// other: their layout, their classification on a shared socket and their
// sealing. It does no I/O; package path sends and judges them.
//
// A packet is a six-byte magic, the sender's disco public key in the clear and
// a NaCl box (nonce, tag, message) from the sender's to the receiver's disco
// key. The box carries one byte of type, one of version and a payload. There is
// no handshake and no counter: freshness comes from the random transaction ids
// that a Pong repeats.
package disco

import (
	"crypto/rand"
	"errors"
	"net/netip"

	"mesh/identity"
)

// Magic starts every disco packet. No WireGuard or STUN packet starts with it.
const Magic = "TS\xf0\x9f\x92\xac"

const (
	clearLen = len(Magic) + identity.KeyLen // magic and sender key
	headLen  = 2                            // type and version, inside the box

	// Overhead is how much longer a packet is than its message payload.
	Overhead = clearLen + identity.BoxOverhead + headLen
)

// Sizes of whole packets without padding, in bytes.
const (
	PingLen        = Overhead + txLen + identity.KeyLen
	PongLen        = Overhead + txLen + addrLen
	CallMeMaybeLen = Overhead // and addrLen for each endpoint
)

// MaxEndpoints bounds the endpoints read from one CallMeMaybe; the rest is
// ignored.
const MaxEndpoints = 64

// Type says which message a packet carries.
type Type byte

// The message types of the protocol. Those from TypeRelayBind on belong to
// forwarding between peers, which this package names but does not speak.
const (
	TypePing               Type = 1
	TypePong               Type = 2
	TypeCallMeMaybe        Type = 3
	TypeRelayBind          Type = 4
	TypeRelayBindChallenge Type = 5
	TypeRelayBindAnswer    Type = 6
	TypeCallMeMaybeVia     Type = 7
	TypeRelayAllocRequest  Type = 8
	TypeRelayAllocResponse Type = 9
	version0                    = 0
	txLen                       = 12
	addrLen                     = 18 // IPv6 or mapped IPv4 address and port
)

// Errors of Open and Parse. All mean: ignore the packet.
var (
	// ErrNotForUs reports a packet that is no disco packet or whose box does
	// not open: another receiver, an old key, or a forgery.
	ErrNotForUs = errors.New("disco: box does not open")
	// ErrShort reports a message shorter than its type demands.
	ErrShort = errors.New("disco: message too short")
	// ErrUnknownType reports a message of a type or version not spoken here.
	ErrUnknownType = errors.New("disco: unknown message type")
)

// TxID ties a Pong to its Ping.
type TxID [txLen]byte

// NewTxID returns a random transaction id.
func NewTxID() TxID {
	var id TxID
	rand.Read(id[:]) // never fails: the runtime ends the process instead
	return id
}

// Message is a Ping, Pong, CallMeMaybe, Meet or Size.
type Message interface {
	// Type names the message.
	Type() Type
	// appendPayload appends what follows type and version.
	appendPayload(b []byte) []byte
}

// Is reports whether a datagram is a disco packet, as far as its clear part
// tells. Shorter ones that start with the magic are nothing at all.
func Is(packet []byte) bool {
	return len(packet) >= clearLen && string(packet[:len(Magic)]) == Magic
}

// Sender returns the sender's key that the clear part of a packet claims; ok is
// false when the packet is not disco or the key is zero.
func Sender(packet []byte) (key identity.DiscoPublic, ok bool) {
	if !Is(packet) {
		return key, false
	}
	key = identity.DiscoPublicFrom([identity.KeyLen]byte(packet[len(Magic):clearLen]))
	return key, !key.IsZero()
}

// appendAddr writes an endpoint in the 18-byte form of the protocol.
func appendAddr(b []byte, a netip.AddrPort) []byte {
	ip := a.Addr().As16()
	b = append(b, ip[:]...)
	return append(b, byte(a.Port()>>8), byte(a.Port()))
}

// readAddr reads the form that appendAddr wrote; b has at least 18 bytes.
func readAddr(b []byte) netip.AddrPort {
	ip := netip.AddrFrom16([16]byte(b[:16])).Unmap()
	return netip.AddrPortFrom(ip, uint16(b[16])<<8|uint16(b[17]))
}
