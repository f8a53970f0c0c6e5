package filter

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/wire"
	"mesh/identity"
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

func TestTCPLife(t *testing.T) {
	f, k := clocked(t, Config{}, allow("*", "*", 22, 22))
	question := Flow{Proto: ProtoTCP, Local: ap(us), Remote: ap(them)}
	known := func() bool { _, _, ok := f.Origin(question); return ok }
	step := func(d time.Duration, m mk, inbound bool) {
		t.Helper()
		k.advance(d)
		if inbound {
			if v := f.In(m.packet(t), alice); v.Action != Accept {
				t.Fatalf("%+v: %v", m, v)
			}
		} else {
			f.Out(m.packet(t), alice)
		}
	}
	gone := func(after time.Duration) bool {
		k.advance(after)
		f.Swap(f.rules) // sweeps
		return !known()
	}
	step(0, in(TCPSyn), true)
	if gone(idleTCPHalf) || !gone(1) {
		t.Error("an unanswered attempt")
	}
	step(0, in(TCPSyn), true)
	step(1, out(TCPSyn|TCPAck), false)
	step(1, in(TCPAck), true)
	if gone(idleTCP) {
		t.Error("an idle connection ended early")
	}
	step(0, in(TCPAck|TCPFin), true)
	if gone(idleTCP) {
		t.Error("a half-closed connection ended early")
	}
	step(0, out(TCPAck|TCPFin), false)
	step(0, in(TCPAck), true)
	if gone(idleTCPWait) || !gone(1) {
		t.Error("a closed connection")
	}
	// A reset ends it soon, unless our own data shows that it was ignored.
	step(0, in(TCPSyn), true)
	step(1, out(TCPSyn|TCPAck), false)
	step(1, in(TCPRst), true)
	step(1, in(TCPAck), true)
	step(1, out(TCPAck), false)
	if gone(idleTCPClosed + 1) {
		t.Error("a forged reset ended it")
	}
	step(0, out(TCPRst), false)
	step(0, in(TCPAck), true)
	if !gone(idleTCPClosed + 1) {
		t.Error("our reset did not end it")
	}
	// Ports used anew.
	step(0, in(TCPSyn), true)
	step(0, out(TCPRst), false)
	step(0, in(TCPSyn), true)
	step(0, out(TCPSyn|TCPAck), false)
	if gone(time.Hour) {
		t.Error("the second connection counts as closed")
	}
	f.Close(question)
	if known() || f.Stats().Flows != 0 {
		t.Error("known after Close")
	}
}

// What the new rules refuse is cut and stays cut, whatever both ends still send
// (negative test 59).
func TestSwapCuts(t *testing.T) {
	f, k := clocked(t, Config{}, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(t), alice)
	f.Out(out(TCPSyn|TCPAck).packet(t), alice)
	f.In(in(0).as(ProtoUDP).packet(t), alice)
	f.Out(out(0).as(ProtoUDP).packet(t), alice)
	f.Out(mk{proto: ProtoUDP, src: "100.64.0.1:900", dst: "100.64.0.2:53"}.packet(t), alice)
	if refused := f.Swap(compile(t, allow("100.64.0.0/24", "100.64.0.1", 20, 30))); len(refused) != 0 {
		t.Errorf("still allowed by another rule, but refused: %v", refused)
	}
	refused := f.Swap(compile(t, allow("*", "*", 23, 23)))
	if len(refused) != 2 {
		t.Fatalf("refused %v", refused)
	}
	for _, fl := range refused {
		if fl.Local != ap(us) || fl.Remote != ap(them) || fl.Peer != alice || !fl.Inbound {
			t.Errorf("refused %+v", fl)
		}
	}
	for range 3 {
		// The local program does not know yet and goes on answering.
		f.Out(out(TCPAck).packet(t), alice)
		f.Out(out(TCPRst).packet(t), alice)
		f.Out(out(0).as(ProtoUDP).packet(t), alice)
		if v := f.In(in(TCPAck).packet(t), alice); v.Action != Drop {
			t.Errorf("TCP goes on: %v", v)
		}
		if v := f.In(in(0).as(ProtoUDP).packet(t), alice); v.Action != Reject {
			t.Errorf("UDP goes on: %v", v)
		}
		k.advance(idleRefused - 1)
	}
	if _, _, ok := f.Origin(Flow{Proto: ProtoUDP, Local: ap(us), Remote: ap(them)}); ok {
		t.Error("a refused flow has an origin")
	}
	if refused := f.Swap(compile(t)); len(refused) != 0 {
		t.Errorf("refused twice: %v", refused)
	}
	// Once it has been quiet, our side may begin; and a rule lets them begin.
	k.advance(idleRefused + 1)
	f.Out(out(0).as(ProtoUDP).packet(t), alice)
	if v := f.In(in(0).as(ProtoUDP).packet(t), alice); v.Action != Accept {
		t.Errorf("our own flow: %v", v)
	}
	f.Swap(compile(t, allow("*", "*", 22, 22)))
	if v := f.In(in(TCPSyn).packet(t), alice); v.Action != Accept {
		t.Errorf("allowed again: %v", v)
	}
}

func TestSwapAllowsRefusedAgain(t *testing.T) {
	f := newFilter(t, allow("*", "*", 22, 22))
	m := in(0).as(ProtoUDP).packet(t)
	f.In(m, alice)
	f.Swap(compile(t))
	f.Swap(compile(t, allow("*", "*", 22, 22)))
	if v := f.In(m, alice); v.Action != Accept || v.Reason != ReasonRule {
		t.Errorf("%v", v)
	}
	if refused := f.Swap(compile(t)); len(refused) != 1 {
		t.Errorf("refused %v", refused)
	}
}

func TestSwapWithoutAddress(t *testing.T) {
	f := newFilter(t, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(t), alice)
	f.Out(mk{proto: ProtoTCP, src: "100.64.0.1:900", dst: "100.64.0.2:80", flags: TCPSyn}.packet(t), alice)
	r, err := Compile([]wire.FilterRule{allow("*", "*", 22, 22)}, 8, prefixes("100.64.0.77/32"))
	if err != nil {
		t.Fatal(err)
	}
	if refused := f.Swap(r); len(refused) != 2 || f.Stats().Flows != 0 {
		t.Errorf("refused %v of an address that is gone", refused)
	}
	f.Out(out(TCPSyn).packet(t), alice) // nothing opens for it either
	if n := f.Stats().Flows; n != 0 {
		t.Errorf("%d flows", n)
	}
	f.In(mk{proto: ProtoTCP, src: them, dst: "100.64.0.77:22", flags: TCPSyn}.packet(t), alice)
	if refused := f.Swap(nil); len(refused) != 1 {
		t.Errorf("nil rules: refused %v", refused)
	}
	if v := f.In(in(TCPSyn).packet(t), alice); v.Action != Drop {
		t.Errorf("nil rules: %v", v)
	}
}

// The address of a peer that moved brings nothing along.
func TestForgetAndRekey(t *testing.T) {
	f := newFilter(t, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(t), alice)
	f.Out(mk{proto: ProtoUDP, src: "100.64.0.1:900", dst: "100.64.0.2:53"}.packet(t), alice)
	q := Flow{Proto: ProtoTCP, Local: ap(us), Remote: ap(them)}
	f.Rekey(alice, bob)
	if peer, _, ok := f.Origin(q); !ok || peer != bob {
		t.Errorf("after the change of keys: %v %v", peer.Short(), ok)
	}
	if v := f.In(in(TCPAck).packet(t), bob); v.Reason != ReasonFlow {
		t.Errorf("after the change of keys: %v", v)
	}
	f.In(mk{proto: ProtoTCP, src: "100.64.0.2:4001", dst: us, flags: TCPSyn}.packet(t), alice)
	f.Rekey(alice, bob) // into a peer that has flows
	if gone := f.Forget(alice); len(gone) != 0 {
		t.Errorf("the old key has %v", gone)
	}
	gone := f.Forget(bob)
	if len(gone) != 3 || f.Stats().Flows != 0 || len(f.flows.peers) != 0 {
		t.Errorf("gone: %v", gone)
	}
	if v := f.In(mk{proto: ProtoUDP, src: "100.64.0.2:53", dst: "100.64.0.1:900"}.packet(t), bob); v.Action != Reject {
		t.Errorf("reply after Forget: %v", v)
	}
	if f.Forget(bob) != nil {
		t.Error("forgot twice")
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

func TestBounds(t *testing.T) {
	f, _ := clocked(t, Config{MaxFlows: 100, MaxFlowsPerPeer: 20}, allow("*", "*", 22, 22))
	open := func(peer byte, port int) {
		f.In(mk{proto: ProtoTCP, src: fmt.Sprintf("100.64.0.%d:%d", peer, port), dst: us, flags: TCPSyn}.packet(t),
			identity.NodePublicFrom([32]byte{peer}))
	}
	count := func(peer byte) int {
		if p := f.flows.peers[identity.NodePublicFrom([32]byte{peer})]; p != nil {
			return p.in.n
		}
		return 0
	}
	f.Out(mk{proto: ProtoTCP, src: "100.64.0.1:900", dst: "100.64.0.2:80", flags: TCPSyn}.packet(t), identity.NodePublicFrom([32]byte{2}))
	open(3, 1) // a quiet peer
	for port := range 1000 {
		open(2, 1+port)
	}
	if count(2) != 20 || count(3) != 1 {
		t.Errorf("one peer floods: it has %d, the quiet one %d", count(2), count(3))
	}
	for peer := byte(4); peer < 60; peer++ {
		for port := range 40 {
			open(peer, 1+port)
		}
	}
	if s := f.Stats(); s.Flows > 100 || s.Evicted == 0 {
		t.Errorf("%d flows, %d evicted", s.Flows, s.Evicted)
	}
	if count(3) != 1 {
		t.Error("many peers flood: the quiet one lost its flow")
	}
	if v := f.In(mk{proto: ProtoTCP, src: "100.64.0.2:80", dst: "100.64.0.1:900", flags: TCPSyn | TCPAck}.packet(t), identity.NodePublicFrom([32]byte{2})); v.Reason != ReasonFlow {
		t.Errorf("our own flow lost: %v", v)
	}
	checkTable(t, f)
	// The least recently used goes first.
	f, _ = clocked(t, Config{MaxFlowsPerPeer: 2}, allow("*", "*", 22, 22))
	open(2, 1)
	open(2, 2)
	open(2, 1)
	open(2, 3)
	for port, want := range map[int]bool{1: true, 2: false, 3: true} {
		_, _, ok := f.Origin(Flow{Proto: ProtoTCP, Local: ap(us), Remote: ap(fmt.Sprintf("100.64.0.2:%d", port))})
		if ok != want {
			t.Errorf("port %d known: %v, want %v", port, ok, want)
		}
	}
	// A table of one flow.
	f, _ = clocked(t, Config{MaxFlows: 1, MaxFlowsPerPeer: 1}, allow("*", "*", 22, 22))
	for i := range byte(10) {
		open(2+i, 1)
		f.Out(mk{proto: ProtoUDP, src: "100.64.0.1:900", dst: fmt.Sprintf("100.64.0.%d:53", 2+i)}.packet(t), alice)
	}
	if n := f.Stats().Flows; n != 1 {
		t.Errorf("%d flows", n)
	}
	checkTable(t, f)
}

// Expired flows of peers that fell silent do not stay for ever.
func TestSweep(t *testing.T) {
	f, k := clocked(t, Config{}, allow("*", "*", 22, 22))
	for i := range 2000 {
		f.In(mk{proto: ProtoUDP, src: fmt.Sprintf("100.64.0.2:%d", i), dst: us}.packet(t), alice)
		k.advance(time.Second)
	}
	if n := f.Stats().Flows; n > 3*int(idleUDP/time.Second) {
		t.Errorf("%d flows", n)
	}
	checkTable(t, f)
}

// checkTable looks whether lists, maps and counts agree.
func checkTable(t *testing.T, f *Filter) {
	t.Helper()
	n := 0
	for peer, o := range f.flows.peers {
		if o.peer != peer || o.in.n+o.out.n == 0 {
			t.Errorf("peer %s: %+v", peer.Short(), o)
		}
		for _, inbound := range []bool{true, false} {
			l, c := o.list(inbound), 0
			var last *flow
			for e := l.head; e != nil; e = e.next {
				if f.flows.flows[e.key] != e || e.owner != o || e.inbound != inbound || e.prev != last {
					t.Errorf("flow %+v is out of place", e.public())
				}
				last = e
				c++
			}
			if c != l.n || l.tail != last {
				t.Errorf("list of %d says %d", c, l.n)
			}
			n += c
		}
	}
	if n != len(f.flows.flows) {
		t.Errorf("%d flows in lists, %d in the map", n, len(f.flows.flows))
	}
}

// Random packets, swaps and moves: nothing gets in that neither a rule nor a
// flow of ours allows, and the table stays sound.
func TestRandomLife(t *testing.T) {
	for seed := range uint64(60) {
		w := world{rand.New(rand.NewPCG(seed, 2))}
		f, k := clocked(t, Config{MaxFlows: 40, MaxFlowsPerPeer: 10})
		peers := []identity.NodePublic{alice, bob, identity.NodePublicFrom([32]byte{3})}
		var rules []wire.FilterRule
		type pair struct {
			proto         uint8
			local, remote netip.AddrPort
			peer          identity.NodePublic
		}
		begun := make(map[pair]bool) // flows that we ever began
		for range 1500 {
			k.advance(time.Duration(w.IntN(int(20 * time.Second))))
			switch w.IntN(40) {
			case 0:
				rules = w.rules()
				f.Swap(compile(t, rules...))
				for _, e := range f.flows.flows {
					local, remote := e.key.addrs()
					if e.inbound && e.state != stateRefused &&
						naive(rules, query{e.key.proto, remote.Addr(), local.Addr(), local.Port(), e.owner.peer}) < 0 {
						t.Fatalf("seed %d: %+v survived the swap", seed, e.public())
					}
				}
				continue
			case 1:
				f.Forget(peers[w.IntN(3)])
				continue
			case 2:
				if seed%2 == 0 {
					f.Rekey(peers[w.IntN(3)], peers[w.IntN(3)])
					begun = nil // flows changed hands: the rest checks the table only
				}
				continue
			}
			peer := peers[w.IntN(3)]
			proto := []uint8{ProtoTCP, ProtoUDP}[w.IntN(2)]
			us := netip.AddrPortFrom(netip.MustParseAddr("100.64.0.1"), []uint16{22, 80}[w.IntN(2)])
			them := netip.AddrPortFrom(w.addr(false), uint16(1+w.IntN(3)))
			flags := []uint8{TCPSyn, TCPSyn | TCPAck, TCPAck, TCPAck | TCPFin, TCPRst}[w.IntN(5)]
			if w.IntN(3) == 0 {
				f.Out(mk{proto: proto, src: us.String(), dst: them.String(), flags: flags}.packet(t), peer)
				if begun != nil && (proto == ProtoUDP || flags == TCPSyn) {
					begun[pair{proto, us, them, peer}] = true
				}
				continue
			}
			v := f.In(mk{proto: proto, src: them.String(), dst: us.String(), flags: flags}.packet(t), peer)
			allowed := naive(rules, query{proto, them.Addr(), us.Addr(), us.Port(), peer}) >= 0
			if allowed && v.Action != Accept {
				t.Fatalf("seed %d: allowed, but %v", seed, v)
			}
			if v.Action == Accept && !allowed && begun != nil && !begun[pair{proto, us, them, peer}] {
				t.Fatalf("seed %d: %v lets in what nothing allows", seed, v)
			}
		}
		checkTable(t, f)
	}
}

// Widened and narrowed again a thousand times while packets arrive: nothing
// survives the last state (negative test 60).
func TestSwapRace(t *testing.T) {
	f := newFilter(t)
	wide, narrow := compile(t, allow("*", "*", 22, 22)), compile(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			for port := 1; ; port = port%5000 + 1 {
				select {
				case <-stop:
					return
				default:
				}
				src := fmt.Sprintf("100.64.0.%d:%d", 2+i, port)
				f.In(mk{proto: ProtoUDP, src: src, dst: us}.packet(t), alice)
				f.Out(mk{proto: ProtoTCP, src: us, dst: src, flags: TCPAck}.packet(t), alice)
			}
		})
	}
	for range 1000 {
		f.Swap(wide)
		f.Swap(narrow)
		f.mu.Lock()
		for _, e := range f.flows.flows {
			if e.state != stateRefused {
				t.Errorf("%+v survived", e.public())
			}
		}
		f.mu.Unlock()
	}
	close(stop)
	wg.Wait()
	checkTable(t, f)
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

func benchRules(b *testing.B, rules, sources int) *Rules {
	w := rand.New(rand.NewPCG(1, 3))
	var in []wire.FilterRule
	for i := range rules {
		r := allow("", "100.64.0.1", uint16(i+1), uint16(i+1), 6)
		for range sources / 10 {
			n := w.IntN(sources)
			r.SrcIPs = append(r.SrcIPs, netip.AddrFrom4([4]byte{100, 65, byte(n >> 8), byte(n)}).String())
		}
		in = append(in, r)
	}
	return compile(b, in...)
}

func BenchmarkEstablished(b *testing.B) {
	f := newFilter(b, allow("*", "*", 22, 22))
	f.In(in(TCPSyn).packet(b), alice)
	f.Out(out(TCPSyn|TCPAck).packet(b), alice)
	data := in(TCPAck)
	data.body = make([]byte, 1200)
	bytes := data.build()
	var p Packet
	b.ReportAllocs()
	for b.Loop() {
		p.Decode(bytes)
		if f.In(&p, alice).Action != Accept {
			b.Fatal("dropped")
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	data := in(TCPAck)
	data.body = make([]byte, 1200)
	bytes := data.build()
	var p Packet
	b.ReportAllocs()
	for b.Loop() {
		p.Decode(bytes)
	}
}

// A SYN that 500 rules with 1,000 sources each deny, and one that they allow.
func BenchmarkMatch(b *testing.B) {
	r := benchRules(b, 500, 10000)
	for _, bench := range []struct {
		name string
		port uint16
	}{{"denied", 9999}, {"allowed", 250}} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				r.match(query{proto: ProtoTCP, remote: netip.AddrFrom4([4]byte{100, 65, byte(i >> 8 % 39), byte(i)}), local: netip.MustParseAddr("100.64.0.1"), port: bench.port})
			}
		})
	}
}

func BenchmarkCompile(b *testing.B) {
	for b.Loop() {
		benchRules(b, 500, 1000)
	}
}

func BenchmarkNewFlow(b *testing.B) {
	f := newFilter(b, allow("*", "*", 22, 22))
	bytes := in(TCPSyn).build()
	var p Packet
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		binary.BigEndian.PutUint16(bytes[20:], uint16(i))
		bytes[15] = byte(i >> 16)
		p.Decode(bytes)
		f.In(&p, alice)
	}
}
