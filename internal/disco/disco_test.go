package disco

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestPacketSizes(t *testing.T) {
	a, b := NewSealer(identity.NewDisco(), 4), NewSealer(identity.NewDisco(), 4)
	node := identity.NewNode().Public()
	for _, c := range []struct {
		m    Message
		size int
	}{
		{Ping{TxID: NewTxID(), Node: node}, 124},
		{Ping{TxID: NewTxID(), Node: node, Padding: 1156}, 1280},
		{Pong{TxID: NewTxID(), Src: addr("192.0.2.1:41641")}, 110},
		{Pong{TxID: NewTxID(), Src: addr("[2001:db8::1]:1")}, 110},
		{Pong{TxID: NewTxID(), Src: RelayAddr(900)}, 110},
		{CallMeMaybe{Endpoints: []netip.AddrPort{}}, 80},
		{Meet{Phase: MeetAsk, ID: NewTxID(), Endpoints: []netip.AddrPort{addr("192.0.2.1:7")}}, 80 + 17 + 18},
		{Meet{Phase: MeetAnswer, ID: NewTxID(), Delay: 1234 * time.Microsecond, Endpoints: []netip.AddrPort{}}, 80 + 17},
		{Size{TxID: NewTxID(), Bytes: SizeLen}, 95},
		{Size{TxID: NewTxID(), Bytes: 8952}, 8952},
		{Size{TxID: NewTxID(), Answer: true, Bytes: 61440}, 95},
		{CallMeMaybe{Endpoints: []netip.AddrPort{addr("127.0.0.1:7"), addr("[fe80::1]:9")}}, 80 + 36},
	} {
		p := a.Seal(nil, b.Public(), c.m)
		if len(p) != c.size || !Is(p) {
			t.Errorf("%T: %d bytes, Is %v; want %d", c.m, len(p), Is(p), c.size)
		}
		from, m, err := b.Open(p)
		if err != nil || from != a.Public() || !reflect.DeepEqual(m, c.m) {
			t.Errorf("%T: got %+v from %v, %v", c.m, m, from.Short(), err)
		}
	}
	if s := RelayAddr(900).String(); s != "127.3.3.40:900" {
		t.Error(s)
	}
}

// TestWire pins the layout to bytes written by hand.
func TestWire(t *testing.T) {
	tx := TxID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	for _, c := range []struct {
		m    Message
		want string
	}{
		{Pong{TxID: tx, Src: addr("192.0.2.7:258")},
			"\x02\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c" +
				"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x07\x01\x02"},
		{CallMeMaybe{Endpoints: []netip.AddrPort{addr("10.0.0.1:1")}},
			"\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x00\x00\x01\x00\x01"},
		{Ping{TxID: tx}, "\x01\x00" + string(tx[:]) + string(make([]byte, 32))},
	} {
		if got := Append(nil, c.m); string(got) != c.want {
			t.Errorf("%T: %x, want %x", c.m, got, c.want)
		}
	}
}

func TestParse(t *testing.T) {
	tx := string(make([]byte, 12))
	for _, c := range []struct {
		name string
		in   string
		want Message
		err  error
	}{
		{"empty", "", nil, ErrShort},
		{"type only", "\x01", nil, ErrShort},
		{"later version", "\x01\x01" + tx, nil, ErrUnknownType},
		{"type 0", "\x00\x00", nil, ErrUnknownType},
		{"relay bind", "\x04\x00", nil, ErrUnknownType},
		{"allocate", "\x09\x00", nil, ErrUnknownType},
		{"short ping", "\x01\x00" + tx[1:], nil, ErrShort},
		{"ancient ping without node key", "\x01\x00" + tx, Ping{}, nil},
		{"padding shorter than a key", "\x01\x00" + tx + "\x00\x00", Ping{Padding: 2}, nil},
		{"short meet", "\xe5\x00\x01" + tx + "\x00\x00\x00", nil, ErrShort},
		{"meet of no phase", "\xe5\x00\x00" + tx + "\x00\x00\x00\x00", nil, ErrUnknownType},
		{"meet of a later phase", "\xe5\x00\x05" + tx + "\x00\x00\x00\x00", nil, ErrUnknownType},
		{"meet with more behind", "\xe5\x00\x03" + tx + "\x00\x00\x00\x05xyz", Meet{Phase: MeetStart, Delay: 5 * time.Microsecond, Endpoints: []netip.AddrPort{}}, nil},
		{"short size", "\xe6\x00\x01" + tx + "\x00", nil, ErrShort},
		{"size that is no question", "\xe6\x00\x03" + tx + "\x00\x00", nil, ErrUnknownType},
		{"size that claims more than it has", "\xe6\x00\x01" + tx + "\xff\xffxyz", Size{Bytes: SizeLen + 3}, nil},
		{"short pong", "\x02\x00" + tx + string(make([]byte, 17)), nil, ErrShort},
		{"odd call", "\x03\x00" + string(make([]byte, 19)), CallMeMaybe{}, nil},
	} {
		m, err := Parse([]byte(c.in))
		if !errors.Is(err, c.err) || !reflect.DeepEqual(m, c.want) {
			t.Errorf("%s: %+v, %v", c.name, m, err)
		}
	}
	long := append([]byte{3, 0}, bytes.Repeat([]byte{1}, 18*1000)...)
	m, err := Parse(long)
	if err != nil || len(m.(CallMeMaybe).Endpoints) != MaxEndpoints {
		t.Errorf("1000 endpoints: %d, %v", len(m.(CallMeMaybe).Endpoints), err)
	}
}

func TestSealedForOneReceiver(t *testing.T) {
	a, b, c := NewSealer(identity.NewDisco(), 4), NewSealer(identity.NewDisco(), 4), NewSealer(identity.NewDisco(), 4)
	p := a.Seal(nil, b.Public(), Ping{TxID: NewTxID()})
	if _, _, err := c.Open(p); !errors.Is(err, ErrNotForUs) {
		t.Errorf("third party: %v", err)
	}
	for i := range p { // every byte counts, in the clear part too
		bad := bytes.Clone(p)
		bad[i] ^= 1
		// The top bit of a Curve25519 key has no meaning, and only bit 0 is flipped here.
		if _, _, err := b.Open(bad); err == nil {
			t.Errorf("byte %d flipped: accepted", i)
		}
	}
	for n := range p {
		if _, _, err := b.Open(p[:n]); err == nil {
			t.Errorf("cut to %d bytes: accepted", n)
		}
	}
	zero := append([]byte(Magic), make([]byte, 100)...)
	if _, ok := Sender(zero); ok {
		t.Error("zero sender accepted")
	}
	if _, _, err := b.Open(zero); !errors.Is(err, ErrNotForUs) {
		t.Errorf("zero sender: %v", err)
	}
}

func TestSealerIsBounded(t *testing.T) {
	s := NewSealer(identity.NewDisco(), 2)
	keys := []identity.DiscoPublic{identity.NewDisco().Public(), identity.NewDisco().Public(), identity.NewDisco().Public()}
	s.shared(keys[0])
	s.shared(keys[1])
	first := s.shared(keys[0])
	s.shared(keys[2]) // evicts keys[1], the one used longest ago
	if len(s.byKey) != 2 || s.order.Len() != 2 || s.byKey[keys[1]] != nil {
		t.Errorf("%d secrets kept", len(s.byKey))
	}
	if s.shared(keys[0]) != first {
		t.Error("secret computed again")
	}
	s.Forget(keys[0])
	s.Forget(keys[1])
	if len(s.byKey) != 1 || s.order.Len() != 1 {
		t.Errorf("%d secrets after Forget", len(s.byKey))
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Append(nil, Size{Bytes: 200}))
	f.Add(Append(nil, Meet{Phase: MeetAsk, Delay: time.Second, Endpoints: []netip.AddrPort{addr("1.2.3.4:5")}}))
	for _, m := range []Message{Size{Bytes: SizeLen}, Ping{TxID: NewTxID(), Padding: 3}, Pong{Src: addr("[::1]:4")}, CallMeMaybe{Endpoints: []netip.AddrPort{addr("1.2.3.4:5")}}} {
		f.Add(Append(nil, m))
	}
	f.Add([]byte{3, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(Append(nil, m))
		if err != nil {
			t.Fatalf("%+v does not survive: %v", m, err)
		}
		// A CallMeMaybe without endpoints has nil or empty ones.
		if c, ok := m.(CallMeMaybe); ok && len(c.Endpoints) == 0 {
			return
		}
		if !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v became %+v", m, again)
		}
	})
}

func FuzzOpen(f *testing.F) {
	a, b := NewSealer(identity.NewDisco(), 64), NewSealer(identity.NewDisco(), 64)
	f.Add(a.Seal(nil, b.Public(), Ping{}))
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, m, err := b.Open(p); err == nil && m == nil {
			t.Fatal("no message and no error")
		}
		Sender(p)
	})
}

func BenchmarkSealOpen(b *testing.B) {
	x, y := NewSealer(identity.NewDisco(), 4), NewSealer(identity.NewDisco(), 4)
	buf := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		buf = x.Seal(buf[:0], y.Public(), Ping{})
		y.Open(buf)
	}
}
