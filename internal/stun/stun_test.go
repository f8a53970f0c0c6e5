package stun

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testTx = TxID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}

// requestWith builds a request from attributes (header and padded value each)
// and, unless sum is nil, a fingerprint changed by sum.
func requestWith(attrs []byte, sum func(uint32) uint32) []byte {
	size := len(attrs)
	if sum != nil {
		size += fingerprintLen
	}
	b := appendHeader(nil, typeRequest, size, testTx)
	b = append(b, attrs...)
	if sum != nil {
		v := sum(fingerprint(b))
		b = append(b, 0x80, 0x28, 0, 4)
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func same(v uint32) uint32 { return v }

func attr(typ uint16, value string) []byte {
	b := binary.BigEndian.AppendUint16(nil, typ)
	b = binary.BigEndian.AppendUint16(b, uint16(len(value)))
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func TestRequestExactForm(t *testing.T) {
	got := AppendRequest(nil, testTx)
	// Header, SOFTWARE "tailnode", FINGERPRINT; the CRC was computed apart from this code.
	want, _ := hex.DecodeString("000100142112a4420102030405060708090a0b0c" +
		"80220008" + "7461696c6e6f6465" + "80280004")
	if len(got) != RequestLen || RequestLen != 40 || !bytes.Equal(got[:36], want) {
		t.Fatalf("request = %x, want %x and a CRC", got, want)
	}
	if crc := binary.BigEndian.Uint32(got[36:]); crc != bitwiseCRC(got[:32])^0x5354554E {
		t.Errorf("fingerprint = %#x", crc)
	}
	tx, err := ParseRequest(got)
	if err != nil || tx != testTx {
		t.Errorf("ParseRequest = %v, %v", tx, err)
	}
}

// bitwiseCRC is CRC-32 of the textbook, to check the polynomial and byte order.
func bitwiseCRC(b []byte) uint32 {
	crc := ^uint32(0)
	for _, c := range b {
		crc ^= uint32(c)
		for range 8 {
			crc = crc>>1 ^ 0xEDB88320&-(crc&1)
		}
	}
	return ^crc
}

func TestParseRequest(t *testing.T) {
	soft := attr(attrSoftware, marker)
	cut := func(b []byte, n int) []byte { return b[:n] }
	tests := []struct {
		name string
		in   []byte
		err  error
	}{
		{"ours", AppendRequest(nil, testTx), nil},
		{"with another attribute", requestWith(append(attr(0x0006, "abc"), soft...), same), nil},
		{"no software", requestWith(nil, same), ErrNotOurs},
		{"other software", requestWith(attr(attrSoftware, "tailnodf"), same), ErrNotOurs},
		{"longer software", requestWith(attr(attrSoftware, marker+"x"), same), ErrNotOurs},
		{"no fingerprint", requestWith(soft, nil), ErrNotOurs},
		{"wrong fingerprint", requestWith(soft, func(v uint32) uint32 { return v ^ 1 }), ErrNotOurs},
		{"fingerprint not last", requestWith(append(requestWith(soft, same)[headerLen:], attr(0x0006, "abcd")...), nil), ErrNotOurs},
		{"empty", nil, ErrMalformed},
		{"header cut", cut(AppendRequest(nil, testTx), 19), ErrMalformed},
		{"attribute cut", cut(AppendRequest(nil, testTx), 30), ErrMalformed},
		{"trailing byte", append(AppendRequest(nil, testTx), 0), ErrMalformed},
		{"response", AppendResponse(nil, testTx, netip.MustParseAddrPort("192.0.2.1:1")), ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tx, err := ParseRequest(tt.in)
			if !errors.Is(err, tt.err) || (err == nil && tx != testTx) {
				t.Errorf("ParseRequest = %v, %v; want error %v", tx, err, tt.err)
			}
		})
	}
	// Cut anywhere, or with any one bit flipped outside the id, it is not ours.
	good := AppendRequest(nil, testTx)
	for n := range good {
		if _, err := ParseRequest(good[:n]); err == nil {
			t.Errorf("%d bytes accepted", n)
		}
	}
	for bit := range len(good) * 8 {
		b := bytes.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		if _, err := ParseRequest(b); err == nil {
			t.Errorf("accepted with bit %d flipped", bit)
		}
	}
}

func TestResponseRoundTrip(t *testing.T) {
	tests := []struct {
		src, want string
		size      int
	}{
		{"192.0.2.7:41641", "192.0.2.7:41641", ResponseLen4},
		{"[::ffff:192.0.2.7]:41641", "192.0.2.7:41641", ResponseLen4},
		{"[2001:db8::1]:65535", "[2001:db8::1]:65535", ResponseLen6},
		{"[fe80::1%eth0]:5", "[fe80::1]:5", ResponseLen6},
	}
	for _, tt := range tests {
		b := AppendResponse(nil, testTx, netip.MustParseAddrPort(tt.src))
		if len(b) != tt.size {
			t.Errorf("%s: %d bytes, want %d", tt.src, len(b), tt.size)
		}
		tx, got, err := ParseResponse(b)
		if err != nil || tx != testTx || got.String() != tt.want {
			t.Errorf("%s: ParseResponse = %v, %v, %v", tt.src, tx, got, err)
		}
		for n := range b {
			if _, _, err := ParseResponse(b[:n]); err == nil {
				t.Errorf("%s: cut to %d bytes accepted", tt.src, n)
			}
		}
	}
	if ResponseLen4 != 32 || ResponseLen6 != 44 {
		t.Error("sizes changed")
	}
}

// The sample responses of RFC 5769, sections 2.2 and 2.3: made by others.
func TestParseResponseRFC5769(t *testing.T) {
	v4 := "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643" +
		"000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
	v6 := "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9" +
		"00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
	for sample, want := range map[string]string{v4: "192.0.2.1:32853", v6: "[2001:db8:1234:5678:11:2233:4455:6677]:32853"} {
		b, err := hex.DecodeString(sample)
		if err != nil {
			t.Fatal(err)
		}
		if _, got, err := ParseResponse(b); err != nil || got.String() != want {
			t.Errorf("ParseResponse = %v, %v, want %v", got, err, want)
		}
	}
}

func TestParseResponseAttributes(t *testing.T) {
	resp := func(attrs ...[]byte) []byte {
		body := bytes.Join(attrs, nil)
		return append(appendHeader(nil, typeSuccess, len(body), testTx), body...)
	}
	xor := AppendResponse(nil, testTx, netip.MustParseAddrPort("192.0.2.7:7"))[headerLen:]
	alt := bytes.Clone(xor)
	alt[0] = 0x80
	plain := attr(attrMapped, "\x00\x01\x00\x09\xc0\x00\x02\x09")
	tests := []struct {
		name, want string
		in         []byte
	}{
		{"alternative number", "192.0.2.7:7", resp(alt)},
		{"plain only", "192.0.2.9:9", resp(plain)},
		{"xor wins over plain", "192.0.2.7:7", resp(plain, xor)},
		{"after an unknown padded one", "192.0.2.7:7", resp(attr(0x8022, "abcde"), xor)},
		{"trailing bytes trimmed", "192.0.2.7:7", append(resp(xor), 1, 2, 3)},
		{"none", "", resp(attr(0x8022, "abcd"))},
		{"empty", "", resp()},
		{"bad family", "", resp(attr(attrXorMapped, "\x00\x03\x00\x09\xc0\x00\x02\x09"))},
		{"v6 with 4 bytes", "", resp(attr(attrXorMapped, "\x00\x02\x00\x09\xc0\x00\x02\x09"))},
		{"too short", "", resp(attr(attrXorMapped, "\x00\x01"))},
	}
	for _, tt := range tests {
		_, got, err := ParseResponse(tt.in)
		if tt.want == "" {
			if err == nil {
				t.Errorf("%s: accepted as %v", tt.name, got)
			}
		} else if err != nil || got.String() != tt.want {
			t.Errorf("%s: %v, %v, want %s", tt.name, got, err, tt.want)
		}
	}
}

func TestIsSTUN(t *testing.T) {
	req := AppendRequest(nil, testTx)
	resp := AppendResponse(nil, testTx, netip.MustParseAddrPort("192.0.2.7:7"))
	disco := append([]byte("TS💬"), make([]byte, 60)...)
	wireguard := append([]byte{1, 0, 0, 0}, req[4:]...)
	for name, tt := range map[string]struct {
		b    []byte
		want bool
	}{
		"request": {req, true}, "response": {resp, true}, "short": {req[:19], false},
		"disco": {disco, false}, "wireguard with our cookie": {wireguard, false}, "nothing": {nil, false},
	} {
		if got := IsSTUN(tt.b); got != tt.want {
			t.Errorf("%s: IsSTUN = %v", name, got)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	req := AppendRequest(nil, testTx)
	src := netip.MustParseAddrPort("192.0.2.7:7")
	resp := AppendResponse(nil, testTx, src)
	out := make([]byte, 0, ResponseLen6)
	var s Server
	lim := newLimiter(-1)
	now := time.Now()
	n := testing.AllocsPerRun(100, func() {
		if len(s.answer(lim, now, req, src, out)) == 0 {
			t.Error("no answer")
		}
		if _, _, err := ParseResponse(resp); err != nil {
			t.Error(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestLimiter(t *testing.T) {
	lim := newLimiter(10)
	now := time.Unix(1000, 0)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for lim.bucketOf(a) == lim.bucketOf(b) {
		lim = newLimiter(10) // other seed
	}
	count := func(ip netip.Addr) (n int) {
		for range 100 {
			if lim.allow(ip, now) {
				n++
			}
		}
		return n
	}
	if got := count(a); got != 20 {
		t.Errorf("burst = %d, want 20", got)
	}
	if got := count(netip.MustParseAddr("::ffff:192.0.2.1")); got != 0 {
		t.Errorf("mapped form of the same source got %d", got)
	}
	if got := count(b); got != 20 {
		t.Errorf("other source got %d, want 20", got)
	}
	now = now.Add(time.Second)
	if got := count(a); got != 10 {
		t.Errorf("after a second %d, want 10", got)
	}
	now = now.Add(-time.Hour) // a clock set back neither panics nor refills
	if got := count(a); got != 0 {
		t.Errorf("clock set back gave %d", got)
	}
}

func (l *limiter) bucketOf(ip netip.Addr) int {
	before := make([]bucket, len(l.table))
	copy(before, l.table)
	defer copy(l.table, before)
	l.allow(ip, time.Unix(1, 0))
	for i := range l.table {
		if l.table[i] != before[i] {
			return i
		}
	}
	return -1
}

func TestServe(t *testing.T) {
	for _, network := range []string{"udp4", "udp"} {
		t.Run(network, func(t *testing.T) {
			pc, err := net.ListenPacket(network, "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer pc.Close()
			ctx, cancel := context.WithCancel(t.Context())
			srv := &Server{}
			done := make(chan error, 1)
			go func() { done <- srv.Serve(ctx, pc) }()

			c, err := net.Dial("udp4", pc.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			// What must stay unanswered goes first: the first answer then belongs to the good one.
			c.Write(requestWith(nil, same))
			c.Write([]byte("hello"))
			c.Write(AppendRequest(nil, testTx))
			buf := make([]byte, 100)
			n, err := c.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			tx, ap, err := ParseResponse(buf[:n])
			if err != nil || tx != testTx || ap.String() != c.LocalAddr().String() {
				t.Errorf("answer %v %v %v, want from %v", tx, ap, err, c.LocalAddr())
			}
			if n > RequestLen {
				t.Errorf("answer of %d bytes is longer than the request", n)
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve = %v after cancel", err)
			}
			if st := srv.Stats(); st != (Stats{Answered: 1, Ignored: 2}) {
				t.Errorf("stats = %+v", st)
			}
		})
	}
}

func TestServeClosedSocket(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc.Close()
	var s Server
	if err := s.Serve(t.Context(), pc); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve = %v", err)
	}
}

// errorConn is a socket on which others cause errors.
type errorConn struct {
	net.PacketConn
	errs int // still to come
	sent chan []byte
}

func (c *errorConn) ReadFrom(b []byte) (int, net.Addr, error) {
	if c.errs--; c.errs >= 0 {
		return 0, nil, errors.New("connection reset")
	}
	if c.errs == -1 {
		return copy(b, AppendRequest(nil, testTx)), net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.7:7")), nil
	}
	return 0, nil, net.ErrClosed
}

func (c *errorConn) WriteTo(b []byte, _ net.Addr) (int, error) {
	c.sent <- bytes.Clone(b)
	return len(b), nil
}

func (c *errorConn) SetReadDeadline(time.Time) error { return nil }

func TestServeSurvivesErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pc := &errorConn{errs: 3 * manyErrors, sent: make(chan []byte, 1)}
		var s Server
		if err := s.Serve(t.Context(), pc); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve = %v", err)
		}
		if _, ap, err := ParseResponse(<-pc.sent); err != nil || ap.String() != "192.0.2.7:7" {
			t.Errorf("%v %v", ap, err)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add(AppendRequest(nil, testTx))
	f.Add(requestWith(attr(attrSoftware, "x"), same))
	f.Fuzz(func(t *testing.T, b []byte) {
		tx, err := ParseRequest(b)
		if err != nil {
			return
		}
		if len(b) < RequestLen {
			t.Errorf("accepted a request of %d bytes: shorter than ours", len(b))
		}
		if !IsSTUN(b) || !bytes.Equal(tx[:], b[8:20]) {
			t.Error("accepted what is not STUN")
		}
	})
}

func FuzzParseResponse(f *testing.F) {
	f.Add(AppendResponse(nil, testTx, netip.MustParseAddrPort("192.0.2.7:7")))
	f.Add(AppendResponse(nil, testTx, netip.MustParseAddrPort("[2001:db8::1]:7")))
	f.Fuzz(func(t *testing.T, b []byte) {
		tx, ap, err := ParseResponse(b)
		if err != nil {
			return
		}
		tx2, ap2, err := ParseResponse(AppendResponse(nil, tx, ap))
		if err != nil || tx2 != tx || ap2 != ap {
			t.Errorf("%v %v came back as %v %v %v", tx, ap, tx2, ap2, err)
		}
	})
}
