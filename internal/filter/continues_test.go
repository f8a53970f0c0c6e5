package filter

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// Only what need not be judged again continues another segment.
func TestContinues(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		src, dst := "100.64.0.1:1000", "100.64.0.2:80"
		l3 := 20
		if v6 {
			src, dst, l3 = "[fd7a:115c:a1e0::1]:1000", "[fd7a:115c:a1e0::2]:80", 40
		}
		first := mk{proto: ProtoTCP, src: src, dst: dst, flags: TCPAck, body: make([]byte, 100)}.build()
		for name, c := range map[string]struct {
			want   bool
			change func(a, b []byte) []byte
		}{
			"the next":             {true, func(a, b []byte) []byte { return b }},
			"PSH":                  {true, func(a, b []byte) []byte { b[l3+13] |= TCPPsh; return b }},
			"first has PSH":        {true, func(a, b []byte) []byte { a[l3+13] |= TCPPsh; return b }},
			"other sequence":       {true, func(a, b []byte) []byte { b[l3+7]++; return b }},
			"other source":         {false, func(a, b []byte) []byte { b[l3/2+3]++; return b }},
			"other destination":    {false, func(a, b []byte) []byte { b[l3-1]++; return b }},
			"other port":           {false, func(a, b []byte) []byte { b[l3]++; return b }},
			"other port there":     {false, func(a, b []byte) []byte { b[l3+3]++; return b }},
			"FIN":                  {false, func(a, b []byte) []byte { b[l3+13] |= TCPFin; return b }},
			"RST":                  {false, func(a, b []byte) []byte { b[l3+13] |= TCPRst; return b }},
			"SYN":                  {false, func(a, b []byte) []byte { b[l3+13] |= TCPSyn; return b }},
			"no ACK":               {false, func(a, b []byte) []byte { b[l3+13] = 0; return b }},
			"first is a SYN":       {false, func(a, b []byte) []byte { a[l3+13] = TCPSyn; return b }},
			"UDP":                  {false, func(a, b []byte) []byte { b[map[bool]int{false: 9, true: 6}[v6]] = ProtoUDP; return b }},
			"both UDP":             {false, func(a, b []byte) []byte { i := map[bool]int{false: 9, true: 6}[v6]; a[i], b[i] = 17, 17; return b }},
			"too long":             {false, func(a, b []byte) []byte { b[map[bool]int{false: 3, true: 5}[v6]]++; return b }},
			"cut off":              {false, func(a, b []byte) []byte { return b[:l3+19] }},
			"empty":                {false, func(a, b []byte) []byte { return nil }},
			"short header":         {false, func(a, b []byte) []byte { b[l3+12] = 4 << 4; return b }},
			"header beyond packet": {false, func(a, b []byte) []byte { b = b[:l3+40]; setLength(b); b[l3+12] = 0xf0; return b }},
			"other version":        {false, func(a, b []byte) []byte { b[0] ^= 0x20; return b }},
		} {
			a, b := bytes.Clone(first), bytes.Clone(first)
			if b = c.change(a, b); Continues(a, b) != c.want {
				t.Errorf("v6 %v: %s: %v", v6, name, !c.want)
			}
		}
	}
	whole := mk{proto: ProtoTCP, src: "100.64.0.1:1000", dst: "100.64.0.2:80", flags: TCPAck}.build()
	for name, bits := range map[string]uint16{"more fragments": 0x2000, "offset": 1, "reserved": 0x8000} {
		b := bytes.Clone(whole)
		binary.BigEndian.PutUint16(b[6:], bits)
		if Continues(whole, b) || Continues(b, whole) {
			t.Errorf("%s: it continues", name)
		}
	}
}

func setLength(b []byte) {
	if b[0]>>4 == 4 {
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
	}
}

// What continues a packet decodes as it does.
func FuzzContinues(f *testing.F) {
	all := append(seeds(), mk{proto: ProtoTCP, src: "100.64.0.1:1", dst: "100.64.0.2:80", flags: TCPAck, body: []byte("x")}.build())
	for _, b := range all {
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var p, q Packet
		if p.Decode(a) != nil || !Continues(a, b) {
			return
		}
		if err := q.Decode(b); err != nil || p.Proto != q.Proto || p.Src != q.Src || p.Dst != q.Dst || p.Fragment != Whole || q.Fragment != Whole ||
			p.Flags|TCPPsh != q.Flags|TCPPsh || p.Flags|TCPPsh != TCPAck|TCPPsh {
			t.Fatalf("%+v is continued by %+v, %v", p, q, err)
		}
	})
}
