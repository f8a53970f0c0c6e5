package netstack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// burst makes count segments of one connection as a sender would cut them, the
// last of them short and with PSH.
func burst(v4 bool, count, size int, options []byte) (packets [][]byte, data []byte) {
	rng := rand.NewChaCha8([32]byte{7})
	seq := uint32(1<<32 - 3000) // wraps
	for i := range count {
		n, flags := size, byte(header.TCPFlagAck)
		if i == count-1 {
			n, flags = size/2, flags|byte(header.TCPFlagPsh)
		}
		l3 := 40
		if v4 {
			l3 = 20
		}
		p := make([]byte, l3+20+len(options)+n)
		tcp := p[l3:]
		if v4 {
			p[0], p[6], p[8], p[9] = 0x45, 0x40, 64, 6
			binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
			binary.BigEndian.PutUint16(p[4:], uint16(i))
			copy(p[12:], a4.AsSlice())
			copy(p[16:], b4.AsSlice())
			h := header.IPv4(p)
			h.SetChecksum(^h.CalculateChecksum())
		} else {
			p[0], p[6], p[7] = 0x60, 6, 64
			binary.BigEndian.PutUint16(p[4:], uint16(len(tcp)))
			copy(p[8:], a6.AsSlice())
			copy(p[24:], b6.AsSlice())
		}
		header.TCP(tcp).Encode(&header.TCPFields{
			SrcPort: 1000, DstPort: 2000, SeqNum: seq, AckNum: 77, DataOffset: uint8(20 + len(options)),
			Flags: header.TCPFlags(flags), WindowSize: 500,
		})
		copy(tcp[20:], options)
		rng.Read(tcp[20+len(options):])
		data = append(data, tcp[20+len(options):]...)
		seq += uint32(n)
		packets = append(packets, p)
	}
	return packets, data
}

func TestJoin(t *testing.T) {
	options := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	for _, v4 := range []bool{true, false} {
		packets, data := burst(v4, 40, 1200, options)
		r := join(packets)
		if r.count != len(packets) {
			t.Fatalf("v4 %v: %d of %d segments joined", v4, r.count, len(packets))
		}
		b := r.buffer(packets)
		got := b.Flatten()
		l3 := 40
		if v4 {
			l3 = 20
			if h := header.IPv4(got); int(h.TotalLength()) != len(got) || !h.IsChecksumValid() {
				t.Errorf("IPv4 header % x of %d bytes", got[:20], len(got))
			}
		} else if int(header.IPv6(got).PayloadLength()) != len(got)-40 {
			t.Errorf("IPv6 header % x of %d bytes", got[:40], len(got))
		}
		if !bytes.Equal(got[l3:l3+13], packets[0][l3:l3+13]) {
			t.Error("the TCP header is not that of the first segment")
		}
		if f := header.TCPFlags(got[l3+13]); f != header.TCPFlagAck|header.TCPFlagPsh {
			t.Errorf("flags %v", f)
		}
		if !bytes.Equal(got[l3+20+len(options):], data) {
			t.Error("the data is not that of the segments")
		}
		b.Release()
	}
}

// Whatever makes a segment special keeps it apart.
func TestJoinApart(t *testing.T) {
	for _, v4 := range []bool{true, false} {
		l3 := 40
		if v4 {
			l3 = 20
		}
		for name, c := range map[string]struct {
			want   int // segments in the first run
			change func(p [][]byte) [][]byte
		}{
			"all":               {6, func(p [][]byte) [][]byte { return p }},
			"gap":               {2, func(p [][]byte) [][]byte { return slices.Delete(p, 2, 3) }},
			"twice":             {3, func(p [][]byte) [][]byte { return slices.Insert(p, 3, p[2]) }},
			"swapped":           {1, func(p [][]byte) [][]byte { p[1], p[2] = p[2], p[1]; return p }},
			"other port":        {2, func(p [][]byte) [][]byte { p[2][l3+1]++; return p }},
			"other address":     {2, func(p [][]byte) [][]byte { p[2][l3-1]++; return p }},
			"other sender":      {2, func(p [][]byte) [][]byte { p[2][l3/2+3]++; return p }},
			"other ack":         {2, func(p [][]byte) [][]byte { p[2][l3+11]++; return p }},
			"other window":      {2, func(p [][]byte) [][]byte { p[2][l3+15]++; return p }},
			"other timestamp":   {2, func(p [][]byte) [][]byte { p[2][l3+27]++; return p }},
			"other hop limit":   {2, func(p [][]byte) [][]byte { p[2][map[bool]int{true: 8, false: 7}[v4]]++; return p }},
			"congestion mark":   {2, func(p [][]byte) [][]byte { p[2][1] ^= 0x33; return p }},
			"PSH":               {3, func(p [][]byte) [][]byte { p[2][l3+13] |= 8; return p }},
			"FIN":               {2, func(p [][]byte) [][]byte { p[2][l3+13] |= 1; return p }},
			"RST":               {2, func(p [][]byte) [][]byte { p[2][l3+13] |= 4; return p }},
			"URG":               {2, func(p [][]byte) [][]byte { p[2][l3+13] |= 32; return p }},
			"ECE":               {2, func(p [][]byte) [][]byte { p[2][l3+13] |= 64; return p }},
			"no ACK":            {2, func(p [][]byte) [][]byte { p[2][l3+13] = 0; return p }},
			"first is a SYN":    {1, func(p [][]byte) [][]byte { p[0][l3+13] |= 2; return p }},
			"first is UDP":      {1, func(p [][]byte) [][]byte { p[0][map[bool]int{true: 9, false: 6}[v4]] = 17; return p }},
			"other protocol":    {2, func(p [][]byte) [][]byte { p[2][map[bool]int{true: 9, false: 6}[v4]] = 17; return p }},
			"short":             {3, func(p [][]byte) [][]byte { return shorten(p, 2, l3, v4) }},
			"longer than first": {1, func(p [][]byte) [][]byte { return shorten(p, 0, l3, v4) }},
			"wrong length":      {2, func(p [][]byte) [][]byte { p[2][map[bool]int{true: 3, false: 5}[v4]]--; return p }},
			"cut off":           {2, func(p [][]byte) [][]byte { p[2] = p[2][:l3+10]; return p }},
			"empty packet":      {2, func(p [][]byte) [][]byte { p[2] = nil; return p }},
		} {
			packets, _ := burst(v4, 6, 1200, []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8})
			if got := join(c.change(packets)).count; got != c.want {
				t.Errorf("v4 %v: %s: %d segments joined, want %d", v4, name, got, c.want)
			}
		}
	}
	fragment, _ := burst(true, 3, 1200, nil)
	for _, p := range fragment {
		p[6] |= 0x20
	}
	if got := join(fragment).count; got != 1 {
		t.Errorf("%d fragments joined", got)
	}
	many, _ := burst(true, 80, 1200, nil)
	if r := join(many); r.bytes > maxMTU || r.count != 54 {
		t.Errorf("%d segments with %d bytes joined", r.count, r.bytes)
	}
}

// shorten cuts segment i to half its data and moves what follows there.
func shorten(packets [][]byte, i, l3 int, v4 bool) [][]byte {
	cut := 600
	packets[i] = packets[i][:len(packets[i])-cut]
	if v4 {
		binary.BigEndian.PutUint16(packets[i][2:], uint16(len(packets[i])))
	} else {
		binary.BigEndian.PutUint16(packets[i][4:], uint16(len(packets[i])-40))
	}
	for _, p := range packets[i+1:] {
		seq := binary.BigEndian.Uint32(p[l3+4:])
		binary.BigEndian.PutUint32(p[l3+4:], seq-uint32(cut))
	}
	return packets
}

// Nothing from outside makes join read what is not there, or makes more or
// other data of what came.
func FuzzJoin(f *testing.F) {
	f.Add(true, uint16(0), byte(0), byte(1), uint16(0))
	f.Add(false, uint16(6), byte(17), byte(0), uint16(20))
	f.Fuzz(func(t *testing.T, v4 bool, at uint16, to, which byte, cut uint16) {
		packets, _ := burst(v4, 4, 300, []byte{1, 1, 1, 1})
		p := packets[int(which)%len(packets)]
		p[int(at)%len(p)] = to
		packets[int(which)%len(packets)] = p[:max(0, len(p)-int(cut))]
		if _, ok := admit(packets[0]); !ok {
			return
		}
		r := join(packets)
		if r.count < 1 || r.count > len(packets) {
			t.Fatalf("%d of %d packets joined", r.count, len(packets))
		}
		b := r.buffer(packets)
		defer b.Release()
		got := b.Flatten()
		if r.count == 1 {
			if !bytes.Equal(got, packets[0]) {
				t.Fatal("a single packet is not what came")
			}
			return
		}
		var want []byte
		for _, p := range packets[:r.count] {
			want = append(want, p[r.headers:]...)
		}
		if !bytes.Equal(got[r.headers:], want) {
			t.Fatal("the data is not what came")
		}
	})
}

// A stream does arrive in large segments. That it is what was sent, also with
// losses and out of order, is for TestTransferLossy.
func TestJoinStream(t *testing.T) {
	a, b, w := newPair(t, Config{})
	var joined atomic.Int64
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if n := int64(join(packets).count); toB && n > joined.Load() {
			joined.Store(n)
		}
		return packets
	})
	ca, cb := connect(t, a, b, b4)
	exchange(t, ca, cb, 1<<20, 9)
	if n := joined.Load(); n < 10 {
		t.Errorf("at most %d segments of a stream were joined", n)
	}
}
