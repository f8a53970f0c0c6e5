package filter

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a time that tests move.
type clock struct{ t time.Time }

func (c *clock) now() time.Time          { return c.t }
func (c *clock) advance(d time.Duration) { c.t = c.t.Add(d) }

func clocked(t testing.TB, c Config, rules ...wire.FilterRule) (*Filter, *clock) {
	k := &clock{time.Unix(1_700_000_000, 0)}
	c.Now = k.now
	f := New(c)
	f.Swap(compile(t, rules...))
	return f, k
}

const (
	us   = "100.64.0.1:22"
	them = "100.64.0.2:4000"
)

func in(flags uint8) mk  { return mk{proto: ProtoTCP, src: them, dst: us, flags: flags} }
func out(flags uint8) mk { return mk{proto: ProtoTCP, src: us, dst: them, flags: flags} }
func (m mk) as(proto uint8) mk {
	m.proto = proto
	return m
}

func TestNothingBeforeTheFirstRules(t *testing.T) {
	f := New(Config{})
	f.Out(out(TCPSyn).packet(t), alice)
	if v := f.In(in(TCPSyn|TCPAck).packet(t), alice); v.Action != Drop || v.Reason != ReasonNoRules {
		t.Errorf("%+v", v)
	}
}

// A segment of no known flow is judged like a connection attempt (negative
// test 52).
func TestStrayTCP(t *testing.T) {
	f := newFilter(t)
	for _, flags := range []uint8{TCPAck, TCPSyn | TCPAck, TCPFin | TCPAck, TCPRst, TCPRst | TCPAck, TCPPsh | TCPAck, 0} {
		if v := f.In(in(flags).packet(t), alice); v.Action != Drop || v.Reason != ReasonNoRule {
			t.Errorf("flags %#x without a rule: %v", flags, v)
		}
	}
	for _, flags := range []uint8{TCPSyn, TCPSyn | TCPFin, TCPSyn | TCPRst, TCPSyn | TCPPsh} {
		if v := f.In(in(flags).packet(t), alice); v.Action != Reject {
			t.Errorf("flags %#x without a rule: %v", flags, v)
		}
	}
	f = newFilter(t, allow("*", "*", 22, 22))
	if v := f.In(in(TCPAck).packet(t), alice); v.Action != Accept || v.Reason != ReasonRule {
		t.Errorf("with a rule the stack answers: %v", v)
	}
}

func TestRepliesToOurConnections(t *testing.T) {
	f := newFilter(t) // no rule
	f.Out(out(TCPSyn).packet(t), alice)
	if v := f.In(in(TCPSyn|TCPAck).packet(t), bob); v.Action != Drop {
		t.Errorf("answer from another peer: %v", v)
	}
	f.Out(out(TCPSyn).packet(t), alice)
	if v := f.In(in(TCPSyn|TCPAck).packet(t), alice); v.Action != Accept || v.Reason != ReasonFlow {
		t.Errorf("answer: %v", v)
	}
	if v := f.In(in(TCPSyn).packet(t), alice); v.Action != Reject {
		t.Errorf("a SYN within our connection: %v", v)
	}
	if v := f.In(in(TCPAck).packet(t), alice); v.Action != Accept {
		t.Errorf("and it goes on: %v", v)
	}
	if refused := f.Swap(compile(t)); len(refused) > 0 {
		t.Errorf("rules do not concern what we began: %v", refused)
	}
	if _, _, ok := f.Origin(Flow{Proto: ProtoTCP, Local: ap(us), Remote: ap(them)}); ok {
		t.Error("our own connection has no origin")
	}
	// The same ports for another destination or protocol are another flow.
	for _, m := range []mk{
		{proto: ProtoTCP, src: "100.64.0.2:4001", dst: us, flags: TCPAck},
		{proto: ProtoTCP, src: "100.64.0.3:4000", dst: us, flags: TCPAck},
		{proto: ProtoTCP, src: them, dst: "100.64.0.1:23", flags: TCPAck},
		in(0).as(ProtoUDP), in(0).as(ProtoSCTP),
	} {
		if v := f.In(m.packet(t), alice); v.Action == Accept {
			t.Errorf("%+v: %v", m, v)
		}
	}
}

func TestUDPReplies(t *testing.T) {
	f, k := clocked(t, Config{})
	q, a := out(0).as(ProtoUDP), in(0).as(ProtoUDP)
	if v := f.In(a.packet(t), alice); v.Action != Reject {
		t.Errorf("unasked: %v", v)
	}
	f.Out(q.packet(t), alice)
	k.advance(idleUDP)
	if v := f.In(a.packet(t), alice); v.Action != Accept {
		t.Errorf("just in time: %v", v)
	}
	k.advance(idleUDP + 1)
	if v := f.In(a.packet(t), alice); v.Action != Reject {
		t.Errorf("too late: %v", v)
	}
	s := mk{proto: ProtoSCTP, src: us, dst: them}
	f.Out(s.packet(t), alice)
	if v := f.In(in(0).as(ProtoSCTP).packet(t), alice); v.Action != Accept {
		t.Errorf("SCTP: %v", v)
	}
}

func TestEcho(t *testing.T) {
	for _, six := range []bool{false, true} {
		us, them, proto, request, reply := "100.64.0.1", "100.64.0.2", uint8(ProtoICMP), uint8(8), uint8(0)
		if six {
			us, them, proto, request, reply = "fd7a::1", "fd7a::2", ProtoICMPv6, 128, 129
		}
		f, k := clocked(t, Config{})
		answer := mk{proto: proto, src: them, dst: us, typ: reply, id: 7}
		if v := f.In(answer.packet(t), alice); v.Action != Drop || v.Reason != ReasonICMP {
			t.Errorf("unasked reply: %v", v)
		}
		f.Out(mk{proto: proto, src: us, dst: them, typ: request, id: 7}.packet(t), alice)
		if v := f.In(answer.packet(t), alice); v.Action != Accept {
			t.Errorf("reply: %v", v)
		}
		answer.id = 8
		if v := f.In(answer.packet(t), alice); v.Action != Drop {
			t.Errorf("reply with another identifier: %v", v)
		}
		answer.id = 7
		k.advance(idleEcho + 1)
		if v := f.In(answer.packet(t), alice); v.Action != Drop {
			t.Errorf("late reply: %v", v)
		}
		ask := mk{proto: proto, src: them, dst: us, typ: request, id: 9}
		if v := f.In(ask.packet(t), alice); v.Action != Drop {
			t.Errorf("request without a rule: %v", v)
		}
		f.Swap(compile(t, allow(them, us, 5, 5, 6)))
		if v := f.In(ask.packet(t), alice); v.Action != Accept {
			t.Errorf("request where any rule matches: %v", v)
		}
	}
}

// Errors pass only about packets of ours, and change no flow (negative test 53).
func TestICMPErrors(t *testing.T) {
	errorAbout := func(src, dst string, typ uint8, inner mk) mk {
		b := inner.build()
		if len(b) > 28 && inner.frag == 0 && !netip.MustParseAddr(src).Is6() {
			b = b[:28]
		}
		proto := uint8(ProtoICMP)
		if netip.MustParseAddr(src).Is6() {
			proto = ProtoICMPv6
		}
		return mk{proto: proto, src: src, dst: dst, typ: typ, body: b}
	}
	udp := mk{proto: ProtoUDP, src: us, dst: them}
	udp6 := mk{proto: ProtoUDP, src: "[fd7a::1]:22", dst: "[fd7a::2]:4000"}
	ping := mk{proto: ProtoICMP, src: "100.64.0.1", dst: "100.64.0.2", typ: 8, id: 5}
	for _, tt := range []struct {
		name string
		m    mk
		want Action
	}{
		{"port unreachable", errorAbout("100.64.0.2", "100.64.0.1", 3, udp), Accept},
		{"time exceeded", errorAbout("100.64.0.2", "100.64.0.1", 11, udp), Accept},
		{"bad parameter", errorAbout("100.64.0.2", "100.64.0.1", 12, udp), Accept},
		{"from a host behind the peer", errorAbout("10.0.0.9", "100.64.0.1", 3, udp), Accept},
		{"about our ping", errorAbout("100.64.0.2", "100.64.0.1", 3, ping), Accept},
		{"too big, IPv6", errorAbout("fd7a::2", "fd7a::1", 2, udp6), Accept},
		{"about our TCP", errorAbout("100.64.0.2", "100.64.0.1", 3, out(TCPSyn)), Accept},
		{"redirect", errorAbout("100.64.0.2", "100.64.0.1", 5, udp), Drop},
		{"source quench", errorAbout("100.64.0.2", "100.64.0.1", 4, udp), Drop},
		{"other port", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoUDP, src: us, dst: "100.64.0.2:4001"}), Drop},
		{"other host", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoUDP, src: us, dst: "100.64.0.3:4000"}), Drop},
		{"other protocol", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoSCTP, src: us, dst: them}), Drop},
		{"wrong direction", errorAbout("100.64.0.2", "100.64.0.1", 3, in(0).as(ProtoUDP)), Drop},
		{"inner source is not the receiver", errorAbout("fd7a::2", "fd7a::9", 1, udp6), Drop},
		{"inner of the other family", errorAbout("fd7a::2", "fd7a::1", 1, udp), Drop},
		{"about a ping reply", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoICMP, src: "100.64.0.1", dst: "100.64.0.2", typ: 0, id: 5}), Drop},
		{"about an error", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoICMP, src: "100.64.0.1", dst: "100.64.0.2", typ: 3, id: 5}), Drop},
		{"about a later fragment", errorAbout("100.64.0.2", "100.64.0.1", 3, mk{proto: ProtoUDP, src: us, dst: them, frag: 8, body: make([]byte, 8)}), Drop},
		{"nothing quoted", mk{proto: ProtoICMP, src: "100.64.0.2", dst: "100.64.0.1", typ: 3}, Drop},
	} {
		f, k := clocked(t, Config{})
		for _, m := range []mk{udp, udp6, ping, out(TCPSyn)} {
			f.Out(m.packet(t), alice)
		}
		before := f.Stats().Flows
		if v := f.In(tt.m.packet(t), alice); v.Action != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, v, tt.want)
		}
		if v := f.In(tt.m.packet(t), bob); v.Action != Drop {
			t.Errorf("%s, from another peer: %v", tt.name, v)
		}
		if n := f.Stats().Flows; n != before {
			t.Errorf("%s: %d flows became %d", tt.name, before, n)
		}
		// Nor does it keep one alive.
		f.Out(udp.packet(t), alice)
		k.advance(idleUDP)
		f.In(tt.m.packet(t), alice)
		k.advance(1)
		if v := f.In(in(0).as(ProtoUDP).packet(t), alice); v.Action != Reject {
			t.Errorf("%s: kept a flow alive", tt.name)
		}
	}
	// A truncated quotation at every length.
	f := newFilter(t)
	f.Out(udp.packet(t), alice)
	whole := errorAbout("100.64.0.2", "100.64.0.1", 3, udp)
	for n := range whole.body {
		m := whole
		m.body = whole.body[:n]
		if v := f.In(m.packet(t), alice); v.Action != Drop {
			t.Errorf("%d bytes quoted: %v", n, v)
		}
	}
}

func TestFragments(t *testing.T) {
	for _, six := range []bool{false, true} {
		us, them := "100.64.0.1:53", "100.64.0.2:4000"
		if six {
			us, them = "[fd7a::1]:53", "[fd7a::2]:4000"
		}
		first := mk{proto: ProtoUDP, src: them, dst: us, more: true, fragID: 9, body: make([]byte, 24)} // 32 bytes with its header
		later := func(off int, id uint16) *Packet {
			return mk{proto: ProtoUDP, src: them, dst: us, frag: off, fragID: id, body: make([]byte, 16)}.packet(t)
		}
		f, k := clocked(t, Config{}, allow("*", "*", 53, 53))
		if v := f.In(later(32, 9), alice); v.Action != Drop || v.Reason != ReasonFragment {
			t.Errorf("before the first: %v", v)
		}
		if v := f.In(first.packet(t), alice); v.Action != Accept {
			t.Errorf("first: %v", v)
		}
		for off, want := range map[int]Action{8: Drop, 24: Drop, 32: Accept, 48: Accept} {
			if v := f.In(later(off, 9), alice); v.Action != want {
				t.Errorf("later at %d: %v, want %v", off, v.Action, want)
			}
		}
		if v := f.In(later(32, 10), alice); v.Action != Drop {
			t.Errorf("of another datagram: %v", v)
		}
		k.advance(idleFragment + 1)
		if v := f.In(later(32, 9), alice); v.Action != Drop {
			t.Errorf("too late: %v", v)
		}
		denied := first
		denied.dst = us[:len(us)-2] + "54"
		denied.fragID = 11
		if v := f.In(denied.packet(t), alice); v.Action != Reject {
			t.Errorf("denied first: %v", v)
		}
		if v := f.In(later(32, 11), alice); v.Action != Drop {
			t.Errorf("after a denied first: %v", v)
		}
		f.In(first.packet(t), alice)
		f.Swap(compile(t))
		if v := f.In(later(32, 9), alice); v.Action != Drop {
			t.Errorf("after a change of rules: %v", v)
		}
		if !f.Out(mk{proto: ProtoUDP, src: us, dst: them, frag: 32, fragID: 1, body: make([]byte, 8)}.packet(t), alice) {
			t.Error("our own later fragment held back")
		}
	}
	// Extension headers behind the fragment header count as the judged part.
	chain := ext6(ProtoUDP, 44, 60, 60)
	binary.BigEndian.PutUint16(chain[2:], 1) // more fragments
	binary.BigEndian.PutUint32(chain[4:], 5)
	p := mk{proto: ProtoUDP, src: "[fd7a::2]:1", dst: "[fd7a::1]:53", ext: chain, extFirst: 44, body: make([]byte, 8)}.packet(t)
	if p.Fragment != FirstFragment || p.fragEnd != 32 {
		t.Errorf("kind %d, ends at %d", p.Fragment, p.fragEnd)
	}
}

func TestOutHoldsBack(t *testing.T) {
	f := newFilter(t)
	for _, m := range []mk{
		{proto: ProtoUDP, src: us, dst: "224.0.0.251:5353"},
		{proto: ProtoUDP, src: "[fd7a::1]:1", dst: "[ff02::fb]:5353"},
		{proto: ProtoUDP, src: us, dst: "255.255.255.255:68"},
		{proto: ProtoUDP, src: us, dst: "169.254.7.7:1"},
		{proto: ProtoTCP, src: us, dst: "127.0.0.1:1"},
		{proto: ProtoTSMP, src: "100.64.0.1", dst: "100.64.0.2", body: []byte("!\x06A....")},
	} {
		if f.Out(m.packet(t), alice) {
			t.Errorf("%+v left", m)
		}
	}
	for _, m := range []mk{
		out(TCPSyn), out(0).as(ProtoUDP), {proto: 47, src: "100.64.0.1", dst: "100.64.0.2"},
		{proto: ProtoICMP, src: "100.64.0.1", dst: "100.64.0.2", typ: 0},
	} {
		if !f.Out(m.packet(t), alice) {
			t.Errorf("%+v held back", m)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	f := newFilter(t, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(t), alice)
	f.Out(out(TCPSyn|TCPAck).packet(t), alice)
	a, b := in(TCPAck).build(), out(TCPAck).build()
	six := mk{proto: ProtoUDP, src: "[fd7a::2]:1", dst: "[fd7a::1]:22"}.build()
	denied := in(TCPSyn)
	denied.dst = "100.64.0.1:23"
	d := denied.build()
	var p Packet
	if n := testing.AllocsPerRun(1000, func() {
		for _, b := range [][]byte{a, six, d} {
			if p.Decode(b) != nil {
				t.Fatal("decode")
			}
			f.In(&p, alice)
		}
		p.Decode(b)
		f.Out(&p, alice)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzIn(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	rules := compile(f, allow("100.64.0.0/10", "100.64.0.1", 22, 80))
	f.Fuzz(func(t *testing.T, b []byte) {
		fl := New(Config{})
		fl.Swap(rules)
		var p Packet
		if p.Decode(b) != nil {
			return
		}
		v := fl.In(&p, alice)
		if v.Action == Accept && (p.Dst.Addr() != netip.MustParseAddr("100.64.0.1") ||
			!netip.MustParsePrefix("100.64.0.0/10").Contains(p.Src.Addr())) {
			t.Fatalf("%+v: %v", p, v)
		}
		if v.Action == Accept && p.Fragment == LaterFragment {
			t.Fatalf("%+v: %v", p, v)
		}
		fl.Out(&p, alice)
	})
}
