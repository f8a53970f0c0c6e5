package derp

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"mesh/identity"
)

// FrameType is the first byte of each frame.
type FrameType byte

// The frame types of the protocol, with direction and payload.
const (
	FrameServerKey     FrameType = 0x01 // relay to client: Magic, relay key
	FrameClientInfo    FrameType = 0x02 // client to relay: node key, box of JSON
	FrameServerInfo    FrameType = 0x03 // relay to client: box of JSON
	FrameSendPacket    FrameType = 0x04 // client to relay: destination key, packet
	FrameRecvPacket    FrameType = 0x05 // relay to client: source key, packet
	FrameKeepAlive     FrameType = 0x06 // relay to client: empty
	FrameNotePreferred FrameType = 0x07 // client to relay: 1 byte, 1 = home
	FramePeerGone      FrameType = 0x08 // relay to client: key, reason
	FramePeerPresent   FrameType = 0x09 // relay to mesh peer: key, address (16), port (2), flags (1)
	FrameForwardPacket FrameType = 0x0A // mesh peer to relay: source key, destination key, packet
	FrameWatchConns    FrameType = 0x10 // mesh peer to relay: empty
	FrameClosePeer     FrameType = 0x11 // mesh peer to relay: key
	FramePing          FrameType = 0x12 // both ways: 8 bytes
	FramePong          FrameType = 0x13 // both ways: the same 8 bytes
	FrameHealth        FrameType = 0x14 // relay to client: text, empty = healthy
	FrameRestarting    FrameType = 0x15 // relay to client: two uint32 of milliseconds
)

// Sizes in bytes.
const (
	// FrameHeaderLen is the type and the big-endian length of the payload.
	FrameHeaderLen = 5
	// MaxPacket is the longest packet that a relay passes on.
	MaxPacket = 65536
	// MaxFrame is the longest payload of a frame that a client sends or gets.
	MaxFrame = identity.KeyLen + MaxPacket
	// maxForward is that of a frame that relays send each other; it is also the
	// most that is ever buffered of one.
	maxForward = 2*identity.KeyLen + MaxPacket
	// MaxUnknownFrame is the longest payload of a frame of an unknown type
	// that is skipped; a longer one ends the connection.
	MaxUnknownFrame = 1 << 20
	// MaxPing is the longest payload of a ping; only the first PingLen bytes count.
	MaxPing = 1000
	// PingLen is the length of the payload of pings and pongs.
	PingLen = 8
)

// Version is the version of the protocol.
const Version = 2

// Magic starts the payload of FrameServerKey: "DERP" and a key symbol.
const Magic = "DERP\xF0\x9F\x94\x91"

// discoMagic starts each path discovery message; a shorter one cannot be whole.
const (
	discoMagic  = "TS\xF0\x9F\x92\xAC"
	discoMinLen = 62
)

// IsDisco reports whether a packet is a path discovery message, which relays
// and clients queue apart from the rest so that bulk traffic does not delay it.
func IsDisco(packet []byte) bool {
	return len(packet) >= discoMinLen && string(packet[:len(discoMagic)]) == discoMagic
}

// Frame is one frame as received.
type Frame struct {
	Type FrameType
	// Payload points into a buffer of the Conn, see Conn.ReadFrame.
	Payload []byte
}

// known reports whether t is a type of this version of the protocol.
func (t FrameType) known() bool {
	return t >= FrameServerKey && t <= FrameForwardPacket || t >= FrameWatchConns && t <= FrameRestarting
}

// maxLen returns the longest payload accepted for a frame of type t.
func (t FrameType) maxLen() int {
	switch {
	case t == FrameForwardPacket:
		return maxForward
	case t.known():
		return MaxFrame
	}
	return MaxUnknownFrame
}

// parseHeader reads the header at the start of b, which holds at least
// FrameHeaderLen bytes.
func parseHeader(b []byte) (t FrameType, n int, err error) {
	t = FrameType(b[0])
	size := binary.BigEndian.Uint32(b[1:])
	if size > uint32(t.maxLen()) {
		return 0, 0, fmt.Errorf("%w: type %#x with %d bytes", ErrFrameTooLarge, byte(t), size)
	}
	return t, int(size), nil
}

func appendHeader(b []byte, t FrameType, n int) []byte {
	b = append(b, byte(t))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// AppendFrame appends a whole frame to b. The caller keeps to the sizes of
// the protocol.
func AppendFrame(b []byte, t FrameType, payload ...[]byte) []byte {
	n := 0
	for _, p := range payload {
		n += len(p)
	}
	b = appendHeader(b, t, n)
	for _, p := range payload {
		b = append(b, p...)
	}
	return b
}

// SplitKey splits the key that SendPacket, RecvPacket and PeerGone start with
// off a payload.
func SplitKey(payload []byte) (key identity.NodePublic, rest []byte, ok bool) {
	if len(payload) < identity.KeyLen {
		return key, nil, false
	}
	return identity.NodePublicFrom([identity.KeyLen]byte(payload)), payload[identity.KeyLen:], true
}

// PresentFlags say what kind of connection a FramePeerPresent tells of.
type PresentFlags byte

// The flags on the wire.
const (
	PresentRegular PresentFlags = 1 << iota // of a node
	PresentMesh                             // of another relay of the region
	PresentProber                           // of something that measures
)

// PeerPresentPayload returns the payload of a FramePeerPresent for the client
// key, which is connected from source.
func PeerPresentPayload(key identity.NodePublic, source netip.Addr, flags PresentFlags) []byte {
	raw := key.Bytes()
	b := make([]byte, 0, identity.KeyLen+16+2+1)
	b = append(b, raw[:]...)
	var addr [16]byte
	if source.IsValid() {
		addr = source.As16()
	}
	b = append(b, addr[:]...)
	return append(b, 0, 0, byte(flags)) // port
}

// ParsePeerPresent reads the payload of a FramePeerPresent. Old relays send the
// key only, new ones more than is known here.
func ParsePeerPresent(payload []byte) (key identity.NodePublic, flags PresentFlags, ok bool) {
	key, rest, ok := SplitKey(payload)
	if !ok || key.IsZero() {
		return key, 0, false
	}
	if len(rest) < 16+2+1 {
		return key, PresentRegular, true
	}
	return key, PresentFlags(rest[18]), true
}
