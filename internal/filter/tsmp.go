package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Messages between nodes inside the tunnel (TSMP) are IP packets of protocol
// 99. Their first payload byte is the type:
//
//	'!'  rejected: protocol, reason, source port, destination port
//	'p'  ping: 8 bytes of data
//	'o'  pong: the same 8 bytes, port of the peer API
//
// Numbers are big endian. Longer messages of newer nodes are read as far as
// they are known.
const (
	tsmpRejected = '!'
	tsmpPing     = 'p'
	tsmpPong     = 'o'
)

// Reasons of rejections.
const (
	RejectedPolicy  = 'A' // no rule allows it
	RejectedShields = 'S' // the node lets nobody in
)

// ErrTSMP reports a message between nodes that cannot be read.
var ErrTSMP = errors.New("malformed message between nodes")

// Rejected says that a node did not let a packet in.
type Rejected struct {
	Proto  uint8
	Reason byte
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
		if len(b) < 7 || b[1] == 0 {
			return m, ErrTSMP
		}
		m.Rejected = Rejected{
			Proto:  b[1],
			Reason: b[2],
			Src:    netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[3:])),
			Dst:    netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b[5:])),
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
// was not let in. The reason is one of the Rejected constants.
func AppendRejected(b []byte, p *Packet, reason byte) []byte {
	var body [7]byte
	body[0], body[1], body[2] = tsmpRejected, p.Proto, reason
	binary.BigEndian.PutUint16(body[3:], p.Src.Port())
	binary.BigEndian.PutUint16(body[5:], p.Dst.Port())
	return append(appendIP(b, p.Dst.Addr(), p.Src.Addr(), len(body)), body[:]...)
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
