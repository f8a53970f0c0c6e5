package filter

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// IP protocol numbers that the filter knows by name.
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58
	ProtoTSMP   = 99 // messages between nodes, never for the network stack
	ProtoSCTP   = 132
)

// TCP flags as they stand in the header.
const (
	TCPFin = 1 << iota
	TCPSyn
	TCPRst
	TCPPsh
	TCPAck
)

// Errors of Decode. Every one means: drop the packet.
var (
	ErrTruncated = errors.New("packet shorter than its headers say")
	ErrHeader    = errors.New("malformed IP header")
	ErrAddress   = errors.New("address that no packet may carry")
	ErrExtension = errors.New("IPv6 extension headers that cannot be followed")
	ErrFragment  = errors.New("fragment that cannot be judged")
)

// maxExtensions bounds the IPv6 extension headers followed in one packet. Real
// packets have one or two.
const maxExtensions = 8

// Fragment says which part of a datagram a packet is.
type Fragment uint8

// Kinds of Fragment.
const (
	Whole         Fragment = iota // not a fragment
	FirstFragment                 // carries the transport header; more follow
	LaterFragment                 // carries no transport header
)

// Packet is what the filter needs to know of an IP packet. Decode fills it;
// a Packet may be used again and again.
type Packet struct {
	Proto uint8 // IP protocol of the payload
	Flags uint8 // TCP flags, 0 for other protocols

	// Src and Dst carry the ports of TCP, UDP and SCTP, and 0 for everything
	// else, a LaterFragment included.
	Src, Dst netip.AddrPort

	ICMPType, ICMPCode uint8
	ICMPID             uint16 // of echo requests and replies

	Fragment   Fragment
	FragmentID uint32
	fragOff    int // first byte of the datagram's payload that this packet holds
	fragEnd    int // and the one after the last

	// Payload starts at the transport header and ends where the IP header says.
	// It is part of the bytes given to Decode.
	Payload []byte
}

// Decode reads an IP packet. It follows IPv6 extension headers, checks every
// length and allocates nothing. After an error the Packet means nothing.
//
// Refused are, besides what is truncated or malformed: source routing (IPv4
// options and IPv6 routing headers), IPv4-mapped IPv6 addresses, which would
// slip past rules for the IPv4 form, ICMP outside its own IP version, fragments
// of TCP and TSMP, and first fragments without the whole transport header.
func (p *Packet) Decode(b []byte) error {
	*p = Packet{}
	if len(b) < 20 {
		return ErrTruncated
	}
	var err error
	switch b[0] >> 4 {
	case 4:
		err = p.ipv4(b)
	case 6:
		err = p.ipv6(b)
	default:
		return ErrHeader
	}
	if err != nil {
		return err
	}
	if p.Fragment == LaterFragment {
		return p.checkLater()
	}
	return p.transport(false)
}

func (p *Packet) ipv4(b []byte) error {
	head := int(b[0]&15) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if head < 20 || total < head {
		return ErrHeader
	}
	if total > len(b) {
		return ErrTruncated
	}
	if head > 20 {
		if err := checkOptions(b[20:head]); err != nil {
			return err
		}
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	p.Proto = b[9]
	p.Payload = b[head:total]
	if p.Proto == ProtoICMPv6 {
		return ErrHeader
	}
	frag := binary.BigEndian.Uint16(b[6:])
	if frag&0x8000 != 0 { // reserved bit
		return ErrHeader
	}
	p.FragmentID = uint32(binary.BigEndian.Uint16(b[4:]))
	return p.fragment(int(frag&0x1fff)*8, len(p.Payload), frag&0x2000 != 0)
}

// checkOptions refuses source routing and options whose lengths lie.
func checkOptions(o []byte) error {
	for len(o) > 0 {
		switch o[0] {
		case 0: // end of list
			return nil
		case 1: // no operation
			o = o[1:]
			continue
		case 131, 137: // loose and strict source routing
			return ErrHeader
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return ErrHeader
		}
		o = o[o[1]:]
	}
	return nil
}

func (p *Packet) ipv6(b []byte) error {
	if len(b) < 40 {
		return ErrTruncated
	}
	total := 40 + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return ErrTruncated
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	if src.Is4In6() || dst.Is4In6() {
		return ErrAddress
	}
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	next, rest := b[6], b[40:total]
	off, size, more, fragmented := 0, 0, false, false // of the fragment
	for n := 0; ; n++ {
		head := 8
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if next == 0 && n > 0 || n >= maxExtensions {
				return ErrExtension
			}
			if len(rest) < 8 {
				return ErrTruncated
			}
			if next == 43 && rest[3] != 0 { // segments left: source routing
				return ErrExtension
			}
			head = 8 * (int(rest[1]) + 1)
		case 44: // fragment
			if fragmented || n >= maxExtensions {
				return ErrExtension
			}
			if len(rest) < 8 {
				return ErrTruncated
			}
			word := binary.BigEndian.Uint16(rest[2:])
			off, more, fragmented = int(word&0xfff8), word&1 != 0, true
			p.FragmentID = binary.BigEndian.Uint32(rest[4:])
			size = len(rest) - 8
		case ProtoICMP:
			return ErrHeader
		default:
			p.Proto, p.Payload = next, rest
			return p.fragment(off, size, more)
		}
		if head > len(rest) {
			return ErrTruncated
		}
		next, rest = rest[0], rest[head:]
		if off > 0 {
			// What follows in a later fragment is data, whatever its first
			// bytes look like.
			p.Proto, p.Payload = next, rest
			return p.fragment(off, size, more)
		}
	}
}

// fragment notes which part of a datagram the packet is: size bytes from off
// on, which in IPv6 include extension headers after the fragment header.
func (p *Packet) fragment(off, size int, more bool) error {
	p.fragOff, p.fragEnd = off, off+size
	switch {
	case off == 0 && !more:
		return nil
	case p.Proto == ProtoTCP || p.Proto == ProtoTSMP:
		return ErrFragment
	case size == 0, more && size%8 != 0, p.fragEnd > 65535:
		return ErrFragment
	case off == 0:
		p.Fragment = FirstFragment
	default:
		p.Fragment = LaterFragment
	}
	return nil
}

func (p *Packet) checkLater() error {
	if p.Proto == ProtoICMP && p.Dst.Addr().Is6() {
		return ErrHeader
	}
	return nil
}

// transport reads the header after IP. Within an ICMP error only its first
// 8 bytes are certain to be there.
func (p *Packet) transport(inError bool) error {
	b := p.Payload
	least := 0
	switch p.Proto {
	case ProtoTCP:
		least = 20
	case ProtoSCTP:
		least = 12
	case ProtoUDP, ProtoICMP, ProtoICMPv6:
		least = 8
	default:
		return nil
	}
	if inError {
		least = 8
	}
	if len(b) < least {
		if p.Fragment == FirstFragment {
			return ErrFragment
		}
		return ErrTruncated
	}
	if p.Proto == ProtoICMP || p.Proto == ProtoICMPv6 {
		p.ICMPType, p.ICMPCode = b[0], b[1]
		if p.isEcho() {
			p.ICMPID = binary.BigEndian.Uint16(b[4:])
		}
		return nil
	}
	p.Src = netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(b))
	p.Dst = netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(b[2:]))
	if inError {
		return nil
	}
	switch p.Proto {
	case ProtoTCP:
		head := int(b[12]>>4) * 4
		if head < 20 {
			return ErrHeader
		}
		if head > len(b) {
			return ErrTruncated
		}
		p.Flags = b[13] & (TCPFin | TCPSyn | TCPRst | TCPPsh | TCPAck)
	case ProtoUDP:
		n := int(binary.BigEndian.Uint16(b[4:]))
		if n < 8 || p.Fragment == Whole && n > len(b) {
			return ErrTruncated
		}
	}
	return nil
}

// inner reads the start of the packet that an ICMP error quotes. Its lengths
// may exceed what is quoted, so they are not checked. ok is false for what
// cannot be told: no transport ports, a later fragment, another ICMP error.
func (p *Packet) inner(q *Packet) (ok bool) {
	*q = Packet{}
	if len(p.Payload) < 8+20 {
		return false
	}
	b := p.Payload[8:]
	switch {
	case b[0]>>4 == 4 && p.Proto == ProtoICMP:
		head := int(b[0]&15) * 4
		if head < 20 || head > len(b) || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return false
		}
		q.Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), 0)
		q.Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), 0)
		q.Proto, q.Payload = b[9], b[head:]
	case b[0]>>4 == 6 && p.Proto == ProtoICMPv6:
		// Our stack sends no extension headers but the fragment header, and
		// the first fragment's header tells enough.
		if len(b) < 40 {
			return false
		}
		q.Src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), 0)
		q.Dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[24:40])), 0)
		q.Proto, q.Payload = b[6], b[40:]
		if q.Proto == 44 {
			if len(b) < 48 || binary.BigEndian.Uint16(b[42:])&0xfff8 != 0 {
				return false
			}
			q.Proto, q.Payload = b[40], b[48:]
		}
	default:
		return false
	}
	switch q.Proto {
	case ProtoTCP, ProtoUDP, ProtoSCTP:
	case p.Proto: // ICMP within ICMP: only our own echo requests
	default:
		return false
	}
	if q.transport(true) != nil {
		return false
	}
	return q.Proto != p.Proto || q.isEchoRequest()
}

func (p *Packet) isEchoRequest() bool {
	return p.ICMPCode == 0 && (p.Proto == ProtoICMP && p.ICMPType == 8 || p.Proto == ProtoICMPv6 && p.ICMPType == 128)
}

func (p *Packet) isEchoReply() bool {
	return p.ICMPCode == 0 && (p.Proto == ProtoICMP && p.ICMPType == 0 || p.Proto == ProtoICMPv6 && p.ICMPType == 129)
}

func (p *Packet) isEcho() bool { return p.isEchoRequest() || p.isEchoReply() }

// isError reports whether p is an ICMP message about another packet:
// unreachable, too big, time exceeded or bad parameter.
func (p *Packet) isError() bool {
	switch p.Proto {
	case ProtoICMP:
		return p.ICMPType == 3 || p.ICMPType == 11 || p.ICMPType == 12
	case ProtoICMPv6:
		return p.ICMPType >= 1 && p.ICMPType <= 4
	}
	return false
}

// isSYN reports whether p asks for a new TCP connection.
func (p *Packet) isSYN() bool {
	return p.Proto == ProtoTCP && p.Flags&(TCPSyn|TCPAck) == TCPSyn
}

// forbidden reports whether no packet may go to a, in either direction.
func forbidden(a netip.Addr) bool {
	return a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() ||
		a.IsLinkLocalUnicast() && a != metadataAddr || a == broadcast4
}

var (
	broadcast4   = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	metadataAddr = netip.AddrFrom4([4]byte{169, 254, 169, 254}) // cloud metadata, may be a routed destination
)
