package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
)

// Messages between nodes inside the tunnel (TSMP) are IP packets of protocol
// 99. Their first payload byte is the type:
//
//	'!'  rejected: protocol, reason, source port, destination port, flags
//	'p'  ping: 8 bytes of data
//	'o'  pong: the same 8 bytes, port of the peer API
//
// Numbers are big endian. Longer messages of newer nodes are read as far as
// they are known. The flags of a rejection are optional; the lowest bit says
// that the sender only suspects that the connection cannot work.
//
// Nodes of ours say more behind the flags, where stock nodes do not look:
// "mesh", one byte of what happened (see Withdrawal), and the version of the
// policy in 8 bytes. Without a version and a withdrawal nothing is added, and a
// rejection is the stock one byte for byte.
const (
	tsmpRejected = '!'
	tsmpPing     = 'p'
	tsmpPong     = 'o'

	rejectedLen  = 7 // without flags
	maybeBroken  = 1 // flag
	extraMagic   = "mesh"
	extraAt      = rejectedLen + 1
	extraLen     = len(extraMagic) + 1 + 8
	rejectedFull = extraAt + extraLen
)

// Reasons of rejections.
const (
	RejectedPolicy   = 'A' // no rule allows it
	RejectedShields  = 'S' // the node lets nobody in
	RejectedRouting  = 'F' // the node carries no traffic for others at present
	RejectedFirewall = 'W' // the firewall of its host blocks it
)

// Withdrawal says why a flow that was allowed is no longer.
type Withdrawal uint8

// Withdrawals. The zero value is none: the packet was never allowed.
const (
	WithdrawnByPolicy   Withdrawal = 1 // the policy no longer allows it
	WithdrawnFromOwner  Withdrawal = 2 // the peer's owner or tags changed
	WithdrawnExpired    Withdrawal = 3 // the peer's key expired
	WithdrawnFromMember Withdrawal = 4 // the peer may not be reached any more
	WithdrawnOwnExpired Withdrawal = 5 // the sender's own key expired
)

// ErrTSMP reports a message between nodes that cannot be read.
var ErrTSMP = errors.New("malformed message between nodes")

// Rejected says that a node did not let a packet in.
type Rejected struct {
	Proto  uint8
	Reason byte
	// MaybeBroken is a warning: the connection may work all the same.
	MaybeBroken bool
	// Withdrawn is not zero if the packet is of a flow that was allowed until
	// now, which is over.
	Withdrawn Withdrawal
	// Policy is the version of the sender's policy, 0 = it does not say.
	Policy int64
	// Src and Dst are those of the packet that was not let in: Src is the
	// receiver of this message, Dst its sender.
	Src, Dst netip.AddrPort
}

// Message is a parsed message between nodes.
type Message struct {
	Rejected   Rejected // set if Proto is not 0
	Ping, Pong bool
	Data       [8]byte // of a ping or pong
	PeerAPI    uint16  // of a pong
}

// ParseTSMP reads a message between nodes from a packet that In called Control.
// That a rejection is about a connection of ours is for the caller to check.
func ParseTSMP(p *Packet) (Message, error) {
	var m Message
	b := p.Payload
	if p.Proto != ProtoTSMP || p.Fragment != Whole || len(b) == 0 {
		return m, ErrTSMP
	}
	switch b[0] {
	case tsmpRejected:
		if len(b) < rejectedLen || b[1] == 0 {
			return m, ErrTSMP
		}
		m.Rejected = Rejected{
			Proto:  b[1],
			Reason: b[2],
			Src:    netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[3:])),
			Dst:    netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b[5:])),
		}
		if len(b) > rejectedLen {
			m.Rejected.MaybeBroken = b[rejectedLen]&maybeBroken != 0
		}
		if len(b) >= rejectedFull && string(b[extraAt:extraAt+len(extraMagic)]) == extraMagic {
			extra := b[extraAt+len(extraMagic):]
			m.Rejected.Withdrawn = Withdrawal(extra[0])
			if v := binary.BigEndian.Uint64(extra[1:]); v <= math.MaxInt64 {
				m.Rejected.Policy = int64(v)
			}
		}
	case tsmpPing:
		if len(b) < 9 {
			return m, ErrTSMP
		}
		m.Ping = true
		copy(m.Data[:], b[1:])
	case tsmpPong:
		if len(b) < 9 {
			return m, ErrTSMP
		}
		m.Pong = true
		copy(m.Data[:], b[1:])
		if len(b) >= 11 {
			m.PeerAPI = binary.BigEndian.Uint16(b[9:])
		}
	default:
		return m, fmt.Errorf("%w: type %#02x", ErrTSMP, b[0])
	}
	return m, nil
}

// AppendRejected appends to b the IP packet that tells the sender of p that it
// was not let in. The reason is one of the Rejected constants, policy the
// version of the policy that decided, 0 if that is unknown.
func AppendRejected(b []byte, p *Packet, reason byte, policy int64) []byte {
	return appendRejected(b, p.Proto, p.Src, p.Dst, reason, 0, policy)
}

// AppendWithdrawn appends the IP packet that tells the peer of a flow that it
// is over, whichever side began it.
func AppendWithdrawn(b []byte, f Flow, why Withdrawal, policy int64) []byte {
	return appendRejected(b, f.Proto, f.Remote, f.Local, RejectedPolicy, why, policy)
}

func appendRejected(b []byte, proto uint8, src, dst netip.AddrPort, reason byte, why Withdrawal, policy int64) []byte {
	var body [rejectedFull]byte
	body[0], body[1], body[2] = tsmpRejected, proto, reason
	binary.BigEndian.PutUint16(body[3:], src.Port())
	binary.BigEndian.PutUint16(body[5:], dst.Port())
	n := rejectedLen
	if policy > 0 || why != 0 {
		copy(body[extraAt:], extraMagic)
		body[extraAt+len(extraMagic)] = byte(why)
		binary.BigEndian.PutUint64(body[extraAt+len(extraMagic)+1:], uint64(max(policy, 0)))
		n = rejectedFull
	}
	return append(appendIP(b, dst.Addr(), src.Addr(), n), body[:n]...)
}

// AppendPing appends the IP packet of a ping.
func AppendPing(b []byte, src, dst netip.Addr, data [8]byte) []byte {
	b = append(appendIP(b, src, dst, 9), tsmpPing)
	return append(b, data[:]...)
}

// AppendPong appends the IP packet that answers a ping with its data. Nodes
// without a peer API say port 0.
func AppendPong(b []byte, src, dst netip.Addr, data [8]byte, peerAPI uint16) []byte {
	b = append(appendIP(b, src, dst, 11), tsmpPong)
	b = append(b, data[:]...)
	return binary.BigEndian.AppendUint16(b, peerAPI)
}

// appendIP appends the header of a TSMP packet. Both addresses are of one
// family.
func appendIP(b []byte, src, dst netip.Addr, n int) []byte {
	const hopLimit = 64
	if src.Is6() {
		b = append(b, 0x60, 0, 0, 0, byte(n>>8), byte(n), ProtoTSMP, hopLimit)
		s, d := src.As16(), dst.As16()
		return append(append(b, s[:]...), d[:]...)
	}
	total := 20 + n
	at := len(b)
	b = append(b, 0x45, 0, byte(total>>8), byte(total), 0, 0, 0, 0, hopLimit, ProtoTSMP, 0, 0)
	s, d := src.As4(), dst.As4()
	b = append(append(b, s[:]...), d[:]...)
	sum := uint32(0)
	for i := at; i < at+20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[at+10:], ^uint16(sum))
	return b
}
