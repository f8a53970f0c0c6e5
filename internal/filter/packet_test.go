package filter

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"
)

// mk describes a packet to build for a test.
type mk struct {
	proto    uint8
	src, dst string // "addr:port" or "addr"
	flags    uint8
	typ      uint8  // ICMP
	id       uint16 // ICMP echo
	body     []byte // after the transport header; for unknown protocols the whole payload
	frag     int    // fragment offset in bytes
	more     bool
	fragID   uint16
	ext      []byte // IPv6: complete extension headers with next header numbers filled by build
	extFirst uint8  // IPv6: type of the first extension header
}

func ap(s string) netip.AddrPort {
	if a, err := netip.ParseAddrPort(s); err == nil {
		return a
	}
	return netip.AddrPortFrom(netip.MustParseAddr(s), 0)
}

func (m mk) transport() []byte {
	s, d := ap(m.src), ap(m.dst)
	var b []byte
	if m.frag > 0 {
		return m.body
	}
	switch m.proto {
	case ProtoTCP:
		b = make([]byte, 20)
		b[12], b[13] = 5<<4, m.flags
	case ProtoUDP:
		b = make([]byte, 8)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(m.body)))
	case ProtoSCTP:
		b = make([]byte, 12)
	case ProtoICMP, ProtoICMPv6:
		b = make([]byte, 8)
		b[0] = m.typ
		binary.BigEndian.PutUint16(b[4:], m.id)
		return append(b, m.body...)
	default:
		return m.body
	}
	binary.BigEndian.PutUint16(b, s.Port())
	binary.BigEndian.PutUint16(b[2:], d.Port())
	return append(b, m.body...)
}

func (m mk) build() []byte {
	s, d := ap(m.src), ap(m.dst)
	t := m.transport()
	if s.Addr().Is4() {
		b := make([]byte, 20)
		b[0], b[8], b[9] = 0x45, 64, m.proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(t)))
		binary.BigEndian.PutUint16(b[4:], m.fragID)
		frag := uint16(m.frag / 8)
		if m.more {
			frag |= 0x2000
		}
		binary.BigEndian.PutUint16(b[6:], frag)
		copy(b[12:], s.Addr().AsSlice())
		copy(b[16:], d.Addr().AsSlice())
		return append(b, t...)
	}
	next := m.proto
	if m.frag > 0 || m.more {
		h := make([]byte, 8)
		h[0] = m.proto
		word := uint16(m.frag)
		if m.more {
			word |= 1
		}
		binary.BigEndian.PutUint16(h[2:], word)
		binary.BigEndian.PutUint32(h[4:], uint32(m.fragID))
		t = append(h, t...)
		next = 44
	}
	if m.ext != nil {
		t = append(append([]byte{}, m.ext...), t...)
		next = m.extFirst
	}
	b := make([]byte, 40)
	b[0], b[6], b[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(t)))
	copy(b[8:], s.Addr().AsSlice())
	copy(b[24:], d.Addr().AsSlice())
	return append(b, t...)
}

func (m mk) packet(t testing.TB) *Packet {
	t.Helper()
	var p Packet
	if err := p.Decode(m.build()); err != nil {
		t.Fatalf("decode %+v: %v", m, err)
	}
	return &p
}

// ext6 builds a chain of IPv6 extension headers of the given types, 8 bytes
// each, followed by next.
func ext6(next uint8, types ...uint8) []byte {
	var b []byte
	for i := range types {
		h := make([]byte, 8)
		h[0] = next
		if i+1 < len(types) {
			h[0] = types[i+1]
		}
		b = append(b, h...)
	}
	return b
}

func TestDecode(t *testing.T) {
	p := mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn, body: []byte("xy")}.packet(t)
	if p.Src != ap("100.64.0.2:4000") || p.Dst != ap("100.64.0.1:22") || p.Flags != TCPSyn || !p.isSYN() || len(p.Payload) != 22 {
		t.Errorf("TCP over IPv4: %+v", p)
	}
	p = mk{proto: ProtoUDP, src: "[fd7a::2]:53", dst: "[fd7a::1]:99", ext: ext6(ProtoUDP, 0, 60, 43), extFirst: 0}.packet(t)
	if p.Src != ap("[fd7a::2]:53") || p.Dst != ap("[fd7a::1]:99") || p.Proto != ProtoUDP {
		t.Errorf("UDP behind extension headers: %+v", p)
	}
	p = mk{proto: ProtoICMPv6, src: "fd7a::2", dst: "fd7a::1", typ: 128, id: 7}.packet(t)
	if !p.isEchoRequest() || p.ICMPID != 7 || p.Dst.Port() != 0 {
		t.Errorf("echo: %+v", p)
	}
	// Padding after the packet is not part of it.
	b := mk{proto: ProtoUDP, src: "100.64.0.2:1", dst: "100.64.0.1:2", body: []byte("abc")}.build()
	if err := p.Decode(append(b, 0, 0, 0, 0)); err != nil || len(p.Payload) != 11 {
		t.Errorf("padded: %v, payload %d", err, len(p.Payload))
	}
	// Nothing of the former packet stays.
	if err := p.Decode(mk{proto: 47, src: "100.64.0.2", dst: "100.64.0.1"}.build()); err != nil ||
		p.Proto != 47 || p.Src.Port() != 0 || p.ICMPID != 0 || p.Flags != 0 || len(p.Payload) != 0 {
		t.Errorf("reused: %v %+v", err, p)
	}
}

func TestDecodeRefuses(t *testing.T) {
	tcp4 := func(edit func(b []byte) []byte) []byte {
		return edit(mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn}.build())
	}
	udp6 := func(ext []byte, first uint8, edit func(b []byte)) []byte {
		b := mk{proto: ProtoUDP, src: "[fd7a::2]:53", dst: "[fd7a::1]:99", ext: ext, extFirst: first}.build()
		if edit != nil {
			edit(b)
		}
		return b
	}
	set := func(at int, v ...byte) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[at:], v); return b }
	}
	long := func(n int) []uint8 {
		var out []uint8
		for range n {
			out = append(out, 60)
		}
		return out
	}
	lying := ext6(ProtoUDP, 60)
	lying[1] = 255 // 2,048 bytes
	options := func(o ...byte) []byte {
		b := mk{proto: ProtoUDP, src: "100.64.0.2:1", dst: "100.64.0.1:2"}.build()
		for len(o)%4 != 0 {
			o = append(o, 0)
		}
		b = append(append(append([]byte{}, b[:20]...), o...), b[20:]...)
		b[0] = 0x40 | byte(5+len(o)/4)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		return b
	}
	mapped := func(at int) func([]byte) {
		return func(b []byte) { copy(b[at:], netip.MustParseAddr("::ffff:100.64.0.1").AsSlice()) }
	}
	for _, tt := range []struct {
		name string
		b    []byte
		want error
	}{
		{"empty", nil, ErrTruncated},
		{"version 0", make([]byte, 40), ErrHeader},
		{"version 5", tcp4(set(0, 0x55)), ErrHeader},
		{"header length 4", tcp4(set(0, 0x44)), ErrHeader},
		{"header longer than total", tcp4(set(0, 0x4f)), ErrHeader},
		{"total length 0", tcp4(set(2, 0, 0)), ErrHeader},
		{"total length 19", tcp4(set(2, 0, 19)), ErrHeader},
		{"total length 65535", tcp4(set(2, 255, 255)), ErrTruncated},
		{"total one too long", tcp4(set(2, 0, 41)), ErrTruncated},
		{"reserved flag", tcp4(set(6, 0x80)), ErrHeader},
		{"TCP data offset 4", tcp4(set(32, 4<<4)), ErrHeader},
		{"TCP data offset beyond the end", tcp4(set(32, 6<<4)), ErrTruncated},
		{"TCP fragment", tcp4(set(6, 0x20)), ErrFragment},
		{"later TCP fragment", tcp4(set(7, 1)), ErrFragment},
		{"UDP length 7", udp6(nil, 0, func(b []byte) { b[45] = 7 }), ErrTruncated},
		{"UDP length beyond the end", udp6(nil, 0, func(b []byte) { b[45] = 9 }), ErrTruncated},
		{"ICMPv6 in IPv4", mk{proto: ProtoICMPv6, src: "100.64.0.2", dst: "100.64.0.1"}.build(), ErrHeader},
		{"ICMP in IPv6", mk{proto: ProtoICMP, src: "fd7a::2", dst: "fd7a::1"}.build(), ErrHeader},
		{"loose source route", options(131, 7, 4, 1, 2, 3, 4), ErrHeader},
		{"strict source route behind padding", options(1, 1, 137, 7, 4, 1, 2, 3, 4), ErrHeader},
		{"option of length 0", options(7, 0), ErrHeader},
		{"option beyond the header", options(7, 9), ErrHeader},
		{"IPv6 payload too long", udp6(nil, 0, func(b []byte) { b[5]++ }), ErrTruncated},
		{"IPv6 payload 0", udp6(nil, 0, func(b []byte) { b[5] = 0 }), ErrTruncated},
		{"mapped source", udp6(nil, 0, mapped(8)), ErrAddress},
		{"mapped destination", udp6(nil, 0, mapped(24)), ErrAddress},
		{"8 extension headers and one more", udp6(ext6(ProtoUDP, long(9)...), 60, nil), ErrExtension},
		{"hop-by-hop not first", udp6(ext6(ProtoUDP, 60, 0), 60, nil), ErrExtension},
		{"extension header length lies", udp6(lying, 60, nil), ErrTruncated},
		{"source routing", udp6(ext6(ProtoUDP, 43), 43, func(b []byte) { b[43] = 1 }), ErrExtension},
		{"two fragment headers", udp6(ext6(ProtoUDP, 44, 44), 44, nil), ErrExtension},
		{"first fragment too short", mk{proto: ProtoICMPv6, src: "fd7a::2", dst: "fd7a::1", more: true}.build()[:48], ErrTruncated},
		{"fragment not of 8 bytes", mk{proto: ProtoUDP, src: "100.64.0.2:1", dst: "100.64.0.1:2", more: true, body: make([]byte, 9)}.build(), ErrFragment},
		{"fragment beyond 65535", mk{proto: ProtoUDP, src: "100.64.0.2:1", dst: "100.64.0.1:2", frag: 65528, body: make([]byte, 8)}.build(), ErrFragment},
		{"empty later fragment", mk{proto: ProtoUDP, src: "100.64.0.2:1", dst: "100.64.0.1:2", frag: 8}.build(), ErrFragment},
	} {
		var p Packet
		if err := p.Decode(tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	// The first fragment must hold the whole header, even if it looks complete.
	b := make([]byte, 8)
	first := mk{proto: ProtoSCTP, src: "100.64.0.2:1", dst: "100.64.0.1:2", more: true}.build()
	first = append(first[:20], b...)
	binary.BigEndian.PutUint16(first[2:], 28)
	var p Packet
	if err := p.Decode(first); !errors.Is(err, ErrFragment) {
		t.Errorf("short first fragment: %v", err)
	}
	// Exactly 8 extension headers are fine.
	if err := p.Decode(udp6(ext6(ProtoUDP, long(8)...), 60, nil)); err != nil || p.Dst.Port() != 99 {
		t.Errorf("8 extension headers: %v", err)
	}
}

// seeds are valid packets of every kind.
func seeds() [][]byte {
	inner := mk{proto: ProtoUDP, src: "100.64.0.1:53", dst: "100.64.0.2:4000"}.build()
	inner6 := mk{proto: ProtoTCP, src: "[fd7a::1]:80", dst: "[fd7a::2]:4000"}.build()
	return [][]byte{
		mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn}.build(),
		mk{proto: ProtoTCP, src: "[fd7a::2]:4000", dst: "[fd7a::1]:22", flags: TCPAck, body: []byte("hello")}.build(),
		mk{proto: ProtoUDP, src: "100.64.0.2:4000", dst: "100.64.0.1:53", body: make([]byte, 40)}.build(),
		mk{proto: ProtoUDP, src: "[fd7a::2]:4000", dst: "[fd7a::1]:53", ext: ext6(ProtoUDP, 0, 43, 60), extFirst: 0}.build(),
		mk{proto: ProtoUDP, src: "100.64.0.2:4000", dst: "100.64.0.1:53", more: true, fragID: 9, body: make([]byte, 16)}.build(),
		mk{proto: ProtoUDP, src: "[fd7a::2]:4000", dst: "[fd7a::1]:53", frag: 24, fragID: 9, body: make([]byte, 16)}.build(),
		mk{proto: ProtoICMP, src: "100.64.0.2", dst: "100.64.0.1", typ: 8, id: 3}.build(),
		mk{proto: ProtoICMP, src: "100.64.0.2", dst: "100.64.0.1", typ: 3, body: inner}.build(),
		mk{proto: ProtoICMPv6, src: "fd7a::2", dst: "fd7a::1", typ: 1, body: inner6}.build(),
		mk{proto: ProtoSCTP, src: "100.64.0.2:1", dst: "100.64.0.1:2"}.build(),
		mk{proto: 47, src: "100.64.0.2", dst: "100.64.0.1", body: make([]byte, 8)}.build(),
		AppendPing(nil, netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("100.64.0.1"), [8]byte{1}),
		AppendPong(nil, netip.MustParseAddr("fd7a::2"), netip.MustParseAddr("fd7a::1"), [8]byte{1}, 7),
	}
}

func TestDecodeTruncatedEverywhere(t *testing.T) {
	for i, b := range seeds() {
		var p Packet
		if err := p.Decode(b); err != nil {
			t.Fatalf("seed %d: %v", i, err)
		}
		for n := range b {
			if err := p.Decode(b[:n]); err == nil {
				t.Errorf("seed %d cut to %d of %d bytes: no error", i, n, len(b))
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Packet
		if p.Decode(b) != nil {
			return
		}
		if p.Src.Addr().Is4() != p.Dst.Addr().Is4() || p.Src.Addr().Is4In6() || len(p.Payload) > len(b) {
			t.Fatalf("%+v", p)
		}
		if p.Fragment == LaterFragment && (p.Src.Port() != 0 || p.Flags != 0) {
			t.Fatalf("ports of a later fragment: %+v", p)
		}
		var q Packet
		p.inner(&q)
		ParseTSMP(&p)
	})
}

func FuzzParseTSMP(f *testing.F) {
	p := mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22"}
	var q Packet
	q.Decode(p.build())
	f.Add(AppendRejected(nil, &q, RejectedPolicy, 0)[20:])
	f.Add(AppendRejected(nil, &q, RejectedPolicy, 7)[20:])
	f.Add(AppendWithdrawn(nil, Flow{Proto: ProtoUDP, Local: q.Dst, Remote: q.Src}, WithdrawnExpired, 1<<40)[20:])
	f.Add([]byte("p12345678"))
	f.Add([]byte("o12345678\x00\x01"))
	f.Fuzz(func(t *testing.T, body []byte) {
		p := Packet{Proto: ProtoTSMP, Src: ap("100.64.0.2"), Dst: ap("100.64.0.1"), Payload: body}
		if m, err := ParseTSMP(&p); err == nil && m.Rejected.Proto == 0 && !m.Ping && !m.Pong {
			t.Fatalf("%q: nothing read", body)
		}
	})
}

func TestTSMP(t *testing.T) {
	for _, m := range []mk{
		{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn},
		{proto: ProtoUDP, src: "[fd7a::2]:4000", dst: "[fd7a::1]:22"},
	} {
		denied := m.packet(t)
		wire := AppendRejected(nil, denied, RejectedPolicy, 0)
		var p Packet
		if err := p.Decode(wire); err != nil {
			t.Fatal(err)
		}
		if p.Src.Addr() != denied.Dst.Addr() || p.Dst.Addr() != denied.Src.Addr() || p.Proto != ProtoTSMP {
			t.Errorf("travels from %v to %v", p.Src, p.Dst)
		}
		got, err := ParseTSMP(&p)
		want := Rejected{Proto: m.proto, Reason: 'A', Src: denied.Src, Dst: denied.Dst}
		if err != nil || got.Rejected != want {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
		head := 20
		if p.Src.Addr().Is6() {
			head = 40
		} else if s := sum16(wire[:20]); s != 0xffff {
			t.Errorf("header checksum: %#x", s)
		}
		for n := head; n < len(wire); n++ {
			p.Payload = wire[head:n]
			if _, err := ParseTSMP(&p); !errors.Is(err, ErrTSMP) {
				t.Errorf("cut to %d bytes: %v", n-head, err)
			}
		}
		p.Payload = append(wire[head:], 1, 2) // flags, and what a newer node adds
		want.MaybeBroken = true
		if got, err := ParseTSMP(&p); err != nil || got.Rejected != want {
			t.Errorf("longer than known: %+v, %v", got, err)
		}
		want.MaybeBroken = false

		// What nodes of ours add: a stock node reads the first 8 bytes alone,
		// and finds what it would have said itself.
		long := AppendRejected(nil, denied, RejectedPolicy, 1<<40+7)
		if string(long[head:head+7]) != string(wire[head:]) || long[head+7] != 0 {
			t.Errorf("a stock node would read %x", long[head:])
		}
		want.Policy = 1<<40 + 7
		p.Payload = long[head:]
		if got, err := ParseTSMP(&p); err != nil || got.Rejected != want {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
		for n := 7; n < len(long)-head; n++ {
			p.Payload = long[head : head+n]
			if got, err := ParseTSMP(&p); err != nil || got.Rejected.Policy != 0 || got.Rejected.Withdrawn != 0 {
				t.Errorf("cut to %d bytes: %+v, %v", n, got, err)
			}
		}
		p.Payload = append([]byte(nil), long[head:]...)
		copy(p.Payload[8:], "hsem") // another's addition
		if got, _ := ParseTSMP(&p); got.Rejected.Policy != 0 {
			t.Errorf("read what is not ours: %+v", got)
		}
		over := AppendWithdrawn(nil, Flow{Proto: m.proto, Local: denied.Dst, Remote: denied.Src}, WithdrawnFromOwner, 0)
		p.Payload = over[head:]
		want.Policy, want.Withdrawn = 0, WithdrawnFromOwner
		if got, err := ParseTSMP(&p); err != nil || got.Rejected != want {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
	}
	if got := string(AppendRejected(nil, mk{proto: ProtoTCP, src: "100.64.0.2:258", dst: "100.64.0.1:772"}.packet(t), 'S', 0)[20:]); got != "!\x06S\x01\x02\x03\x04" {
		t.Errorf("wire form %q", got)
	}
	var p Packet
	a, b := netip.MustParseAddr("fd7a::2"), netip.MustParseAddr("fd7a::1")
	p.Decode(AppendPing(nil, a, b, [8]byte{1, 2}))
	if m, err := ParseTSMP(&p); err != nil || !m.Ping || m.Data != [8]byte{1, 2} {
		t.Errorf("ping: %+v, %v", m, err)
	}
	p.Decode(AppendPong(nil, a, b, [8]byte{1, 2}, 80))
	if m, err := ParseTSMP(&p); err != nil || !m.Pong || m.Data != [8]byte{1, 2} || m.PeerAPI != 80 {
		t.Errorf("pong: %+v, %v", m, err)
	}
	p.Payload = []byte("?")
	if _, err := ParseTSMP(&p); err == nil {
		t.Error("unknown type: no error")
	}
}

func sum16(b []byte) uint16 {
	s := uint32(0)
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
