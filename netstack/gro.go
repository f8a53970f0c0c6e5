package netstack

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// run is a number of packets at the beginning of a batch that are delivered as
// one: consecutive segments of a TCP connection whose headers say the same, or a
// single packet. It costs the stack as much to handle a large segment as a small
// one, and their data in one piece of memory is cheaper to read than in many.
type run struct {
	count   int
	headers int // length of IP and TCP header, 0 if the first cannot be joined with others
	bytes   int // length of the packet that they make
	flags   byte
}

const (
	tcpJoins   = byte(header.TCPFlagAck) // flags of segments that can be joined;
	tcpEndsRun = byte(header.TCPFlagPsh) // this one may be set in the last
)

// join finds the run that packets begin with. The first has passed admit.
func join(packets [][]byte) run {
	first := packets[0]
	r := run{count: 1, bytes: len(first)}
	l3, hdr := segment(first)
	if hdr == 0 {
		return r
	}
	r.headers, r.flags = hdr, first[l3+header.TCPFlagsOffset]
	size := len(first) - hdr
	next := binary.BigEndian.Uint32(first[l3+header.TCPSeqNumOffset:]) + uint32(size)
	for _, p := range packets[1:] {
		n := len(p) - hdr
		if r.flags&tcpEndsRun != 0 || n <= 0 || n > size || r.bytes+n > maxMTU || !continues(first, p, l3, hdr, next) {
			break
		}
		r.flags = p[l3+header.TCPFlagsOffset]
		next += uint32(n)
		r.count++
		r.bytes += n
		if n < size {
			break // what follows a short segment begins something new
		}
	}
	return r
}

// segment tells where the TCP header and the data of a packet begin. hdr is 0 if
// it is not a segment that may be joined with others: TCP with data, complete,
// without IP options and fragments and with no flag that means more than that.
func segment(p []byte) (l3, hdr int) {
	switch p[0] >> 4 {
	case 4:
		const moreOrLater = 0x3fff // more fragments, or an offset
		if p[0] != 0x45 || p[9] != byte(header.TCPProtocolNumber) || binary.BigEndian.Uint16(p[6:])&moreOrLater != 0 ||
			int(binary.BigEndian.Uint16(p[2:])) != len(p) {
			return 0, 0
		}
		l3 = header.IPv4MinimumSize
	case 6:
		if p[6] != byte(header.TCPProtocolNumber) || int(binary.BigEndian.Uint16(p[4:]))+header.IPv6MinimumSize != len(p) {
			return 0, 0
		}
		l3 = header.IPv6MinimumSize
	default:
		return 0, 0
	}
	if len(p) < l3+header.TCPMinimumSize {
		return 0, 0
	}
	hdr = l3 + int(p[l3+header.TCPDataOffset]>>4)*4
	if hdr < l3+header.TCPMinimumSize || hdr >= len(p) || p[l3+header.TCPFlagsOffset]&^tcpEndsRun != tcpJoins {
		return 0, 0
	}
	return l3, hdr
}

// continues reports whether p is the segment after those that first began, and
// says the same but for what differs between segments of one burst: lengths,
// identification and checksums, and the flag that ends it.
func continues(first, p []byte, l3, hdr int, next uint32) bool {
	if len(p) <= hdr || p[0] != first[0] {
		return false
	}
	// segment looked at first alone: length, protocol, fragments and flags of p
	// are still to be seen. All but the length are the same as in first.
	if l3 == header.IPv4MinimumSize {
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || p[1] != first[1] || !bytes.Equal(p[6:10], first[6:10]) ||
			!bytes.Equal(p[12:20], first[12:20]) {
			return false
		}
	} else if int(binary.BigEndian.Uint16(p[4:]))+header.IPv6MinimumSize != len(p) ||
		!bytes.Equal(p[:4], first[:4]) || !bytes.Equal(p[6:40], first[6:40]) {
		return false
	}
	a, b := first[l3:hdr], p[l3:hdr]
	return bytes.Equal(a[:4], b[:4]) && // ports
		binary.BigEndian.Uint32(b[header.TCPSeqNumOffset:]) == next &&
		bytes.Equal(a[header.TCPAckNumOffset:header.TCPFlagsOffset], b[header.TCPAckNumOffset:header.TCPFlagsOffset]) &&
		b[header.TCPFlagsOffset]&^tcpEndsRun == tcpJoins &&
		bytes.Equal(a[header.TCPWinSizeOffset:header.TCPChecksumOffset], b[header.TCPWinSizeOffset:header.TCPChecksumOffset]) &&
		bytes.Equal(a[header.TCPMinimumSize:], b[header.TCPMinimumSize:]) // options
}

// apart is the size from which the headers of a run get memory of their own:
// gVisor copies all of a piece, to read the header in it, while it holds on to the
// piece elsewhere, as it does for each packet of IPv4.
const apart = 4 << 10

// buffer copies the run to memory of gVisor, as one packet. Its TCP checksum is
// that of the first, which nobody looks at: see link.Capabilities.
func (r run) buffer(packets [][]byte) buffer.Buffer {
	if r.bytes < apart || r.headers == 0 {
		v := buffer.NewView(r.bytes)
		v.Write(packets[0])
		for _, p := range packets[1:r.count] {
			v.Write(p[r.headers:])
		}
		r.mend(v.AsSlice())
		return buffer.MakeWithView(v)
	}
	head := buffer.NewViewWithData(packets[0][:r.headers])
	r.mend(head.AsSlice())
	b := buffer.MakeWithView(head)
	data := buffer.NewView(r.bytes - r.headers)
	for _, p := range packets[:r.count] {
		data.Write(p[r.headers:])
	}
	b.Append(data)
	return b
}

// mend makes the headers of the first packet those of the whole run.
func (r run) mend(b []byte) {
	if r.count == 1 {
		return
	}
	l3 := header.IPv6MinimumSize
	if b[0]>>4 == 4 {
		l3 = header.IPv4MinimumSize
		h := header.IPv4(b)
		h.SetTotalLength(uint16(r.bytes))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		header.IPv6(b).SetPayloadLength(uint16(r.bytes - l3))
	}
	b[l3+header.TCPFlagsOffset] = r.flags
}
