package filter

import (
	"fmt"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

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
		if f.Out(out(0).as(ProtoUDP).packet(t), alice) {
			t.Error("an answer leaves all the same")
		}
		// The peer that goes on did not hear of it and is told.
		if v := f.In(in(TCPAck).packet(t), alice); v.Action != Reject || !v.Withdrawn || v.Policy != 7 {
			t.Errorf("TCP goes on: %v", v)
		}
		if v := f.In(in(0).as(ProtoUDP).packet(t), alice); v.Action != Reject || !v.Withdrawn || v.Policy != 7 {
			t.Errorf("UDP goes on: %v", v)
		}
		if v := f.In(in(TCPSyn).packet(t), alice); v.Action != Reject || v.Withdrawn || v.Policy != 7 {
			t.Errorf("a new connection: %v", v)
		}
		k.advance(idleRefused - 1)
	}
	if _, _, ok := f.Origin(Flow{Proto: ProtoUDP, Local: ap(us), Remote: ap(them)}); ok {
		t.Error("a refused flow has an origin")
	}
	if refused := f.Swap(compile(t)); len(refused) != 0 {
		t.Errorf("refused twice: %v", refused)
	}
	if n := f.Stats().Held; n != 3 {
		t.Errorf("%d answers held back", n)
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
