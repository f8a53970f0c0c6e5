package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// train is a batch of complete packets laid one after another in a buffer.
type train struct {
	buf     []byte
	packets [][]byte // slices of buf
}

func (t *train) reset() {
	t.buf = t.buf[:0]
	clear(t.packets)
	t.packets = t.packets[:0]
}

// fill lays the packets of gVisor into the train, cut to their MSS or to what
// size says.
func (t *train) fill(pkts []*stack.PacketBuffer, size func(netip.Addr) int) {
	need := 0
	for _, p := range pkts {
		n := segments(p)
		need += p.Size() + (n-1)*headers(p)
	}
	if cap(t.buf) < need {
		t.buf = make([]byte, 0, need)
	}
	for _, p := range pkts {
		if segments(p) > 1 {
			t.split(p, size)
		} else {
			t.copy(p)
		}
	}
}

// headers is the length of the IP and TCP headers in front of the data.
func headers(p *stack.PacketBuffer) int { return p.Size() - p.Data().Size() }

// segments is the number of packets p has to be cut into.
func segments(p *stack.PacketBuffer) int {
	mss := int(p.GSOOptions.MSS)
	if p.GSOOptions.Type == stack.GSONone || mss == 0 {
		return 1
	}
	return max(1, (p.Data().Size()+mss-1)/mss)
}

// take extends the train by n bytes and returns them.
func (t *train) take(n int) []byte {
	at := len(t.buf)
	t.buf = t.buf[:at+n]
	return t.buf[at : at+n : at+n]
}

// copy adds a packet that needs no cutting.
func (t *train) copy(p *stack.PacketBuffer) {
	b := t.take(p.Size())
	r := newReader(p)
	r.read(b)
	if p.GSOOptions.Type != stack.GSONone && p.GSOOptions.NeedsCsum {
		// The field holds the sum of the pseudo header; sum the rest over it.
		tcp := b[p.GSOOptions.L3HdrLen:]
		binary.BigEndian.PutUint16(tcp[header.TCPChecksumOffset:], ^checksum.Checksum(tcp, 0))
	}
	t.packets = append(t.packets, b)
}

// split cuts a large TCP segment into packets of its MSS, or larger ones where
// size allows: whoever takes them does not mind what the MSS was. Sequence numbers,
// lengths and checksums are made for each; PSH and FIN stay on the last only
// and the IPv4 identification counts up when fragments are allowed (a packet
// that must not be fragmented carries none, RFC 6864 section 4.1).
func (t *train) split(p *stack.PacketBuffer, size func(netip.Addr) int) {
	const lastOnly = uint8(header.TCPFlagFin | header.TCPFlagPsh)
	var (
		hdrLen  = headers(p)
		l3      = int(p.GSOOptions.L3HdrLen)
		mss     = int(p.GSOOptions.MSS)
		left    = p.Data().Size()
		r       = newReader(p)
		hdr     [header.IPv6MinimumSize + header.TCPHeaderMaximumSize]byte
		isV4    = p.GSOOptions.Type == stack.GSOTCPv4
		ip, tcp = hdr[:l3], hdr[l3:hdrLen]
	)
	r.read(hdr[:hdrLen])
	seq := binary.BigEndian.Uint32(tcp[header.TCPSeqNumOffset:])
	flags := tcp[header.TCPFlagsOffset]
	tcp[header.TCPFlagsOffset] = flags &^ lastOnly
	var addrs []byte
	var id uint16
	var count bool
	if isV4 {
		addrs = ip[12:20]
		h := header.IPv4(ip)
		id, count = h.ID(), h.Flags()&header.IPv4FlagDontFragment == 0
	} else {
		addrs = ip[8:40]
	}
	if size != nil {
		dst, _ := netip.AddrFromSlice(addrs[len(addrs)/2:])
		mss = max(mss, min(size(dst), maxTrain)-hdrLen)
	}
	pseudo := checksum.Combine(checksum.Checksum(addrs, 0), uint16(header.TCPProtocolNumber))

	for left > 0 {
		n := min(mss, left)
		left -= n
		if left == 0 {
			tcp[header.TCPFlagsOffset] = flags
		}
		binary.BigEndian.PutUint32(tcp[header.TCPSeqNumOffset:], seq)
		binary.BigEndian.PutUint16(tcp[header.TCPChecksumOffset:], 0)
		seq += uint32(n)
		if isV4 {
			h := header.IPv4(ip)
			h.SetTotalLength(uint16(hdrLen + n))
			h.SetID(id)
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
			if count {
				id++
			}
		} else {
			header.IPv6(ip).SetPayloadLength(uint16(hdrLen - l3 + n))
		}
		b := t.take(hdrLen + n)
		copy(b, hdr[:hdrLen])
		r.read(b[hdrLen:])
		sum := checksum.Combine(pseudo, uint16(len(b)-l3))
		binary.BigEndian.PutUint16(b[l3+header.TCPChecksumOffset:], ^checksum.Checksum(b[l3:], sum))
		t.packets = append(t.packets, b)
	}
}

// reader reads a packet of gVisor, which lies in a list of chunks.
type reader struct {
	next *buffer.View
	rest []byte
}

func newReader(p *stack.PacketBuffer) reader {
	views, offset := p.AsViewList()
	v := views.Front()
	for v != nil && offset > v.Size() {
		offset -= v.Size()
		v = v.Next()
	}
	if v == nil {
		return reader{}
	}
	return reader{next: v.Next(), rest: v.AsSlice()[offset:]}
}

func (r *reader) read(b []byte) {
	for len(b) > 0 {
		n := copy(b, r.rest)
		b, r.rest = b[n:], r.rest[n:]
		if len(r.rest) == 0 {
			if r.next == nil {
				return
			}
			r.rest, r.next = r.next.AsSlice(), r.next.Next()
		}
	}
}
