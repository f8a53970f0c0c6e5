package filter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"mesh/control/wire"
	"mesh/identity"
)

// from names the rules of the policy behind every destination of r: "NAME/ID",
// separated by spaces.
func from(r wire.FilterRule, rules string) wire.FilterRule {
	var list []wire.RuleOrigin
	for _, f := range strings.Fields(rules) {
		name, id, _ := strings.Cut(f, "/")
		list = append(list, wire.RuleOrigin{Rule: name, ID: id})
	}
	r.MeshOrigins = nil
	for range r.DstPorts {
		r.MeshOrigins = append(r.MeshOrigins, list)
	}
	return r
}

// A flow belongs to the rules that admitted it, whatever else would let it in,
// and edits of others do not touch it.
func TestFlowBelongsToItsRule(t *testing.T) {
	ssh := allow("100.64.0.2", "100.64.0.1", 22, 22)
	wide := allow("*", "*", 0, 65535)
	other := allow("*", "*", 23, 23)
	none := wire.FilterRule{}
	for _, tt := range []struct {
		name     string
		old, new []wire.FilterRule
		want     string // what the flow belongs to after it, as "NAME/ID"; "cut"
	}{
		{"nothing changed", rules(from(ssh, "a/1")), rules(from(ssh, "a/1")), "a/1"},
		{"moved in the file", rules(from(ssh, "a/1")), rules(from(other, "a/2"), from(ssh, "b/1")), "b/1"},
		{"a wide rule before it", rules(from(ssh, "a/1")), rules(from(wide, "a/2"), from(ssh, "b/1")), "b/1"},
		{"gone", rules(from(ssh, "a/1")), rules(from(other, "b/2")), "cut"},
		{"gone, another matches", rules(from(ssh, "a/1"), from(wide, "b/2")), rules(from(wide, "a/2")), "cut"},
		{"gone, its place taken by one that was there", rules(from(ssh, "a/1"), from(wide, "b/2")), rules(from(wide, "b/2")), "cut"},
		{"edited in place, still matches", rules(from(ssh, "a/1")), rules(from(wide, "a/9")), "a/9"},
		{"edited in place, no longer matches", rules(from(ssh, "a/1")), rules(from(other, "a/9")), "cut"},
		{"a new rule elsewhere matches", rules(from(ssh, "a/1")), rules(from(wide, "b/9")), "cut"},
		{"a new rule in its place, it elsewhere and narrower", rules(from(ssh, "a/1")), rules(from(wide, "a/9"), from(other, "b/1")), "cut"},
		{"one of two gone", rules(from(ssh, "a/1 b/2")), rules(from(ssh, "b/2")), "b/2"},
		{"both there, apart", rules(from(ssh, "a/1 b/2")), rules(from(wide, "a/1"), from(ssh, "b/2")), "a/1 b/2"},
		{"a third joins", rules(from(ssh, "a/1 b/2")), rules(from(ssh, "a/1 b/2 c/3")), "a/1 b/2"},
		{"names unknown now", rules(from(ssh, "a/1")), rules(ssh), ""},
		{"names unknown before", rules(ssh), rules(from(wide, "a/1")), "a/1"},
		{"never known", rules(ssh), rules(wide), ""},
		{"never known, gone", rules(ssh), rules(other), "cut"},
		{"without IDs any rule will do", rules(from(ssh, "a")), rules(from(wide, "b")), "b"},
		{"one of the rules is unnamed", rules(from(ssh, "a/1")), rules(from(other, "x/7"), from(allow("*", "*", 22, 22), "y/8"), ssh), ""},
		{"no rules", rules(from(ssh, "a/1")), rules(none), "cut"},
	} {
		for _, m := range []mk{in(TCPSyn), in(0).as(ProtoUDP)} {
			f := newFilter(t, tt.old...)
			if v := f.In(m.packet(t), alice); v.Action != Accept {
				t.Fatalf("%s: %v", tt.name, v)
			}
			refused := f.Swap(compile(t, tt.new...))
			got := "cut"
			if e := f.flows.flows[keyOf(m.proto, ap(us), ap(them))]; e.state != stateRefused {
				var names []string
				for _, r := range e.rules {
					names = append(names, strings.TrimSuffix(r.Name+"/"+r.ID, "/"))
				}
				got = strings.Join(names, " ")
			}
			if got != tt.want || (len(refused) > 0) != (got == "cut") {
				t.Errorf("%s: %q, want %q; refused %v", tt.name, got, tt.want, refused)
			}
			if got != "cut" || m.proto != ProtoTCP {
				continue
			}
			// Nor does it come back by a rule that would let a new one in.
			if v := f.In(in(TCPAck).packet(t), alice); v.Action != Reject || !v.Withdrawn {
				t.Errorf("%s: goes on: %v", tt.name, v)
			}
			want := Reject
			if naive(tt.new, query{ProtoTCP, ap(them).Addr(), ap(us).Addr(), 22, alice}) >= 0 {
				want = Accept
			}
			if v := f.In(in(TCPSyn).packet(t), alice); v.Action != want {
				t.Errorf("%s: a new connection: %v, want %v", tt.name, v, want)
			}
		}
	}
}

func rules(r ...wire.FilterRule) []wire.FilterRule { return r }

// A flow that peers with a capability may begin ends with the capability.
func TestCapabilityLost(t *testing.T) {
	base := compile(t, from(allow("cap:x", "*", 22, 22), "a/1"), from(allow("cap:y", "*", 22, 22), "b/2"))
	peers := func(x, y bool) Peers {
		return Peers{Caps: map[string]map[identity.NodePublic]bool{"x": {alice: x}, "y": {alice: y}}}
	}
	f := New(Config{})
	f.Swap(base.WithPeers(peers(true, false)))
	f.In(in(TCPSyn).packet(t), alice)
	if refused := f.Swap(base.WithPeers(peers(true, true))); len(refused) != 0 {
		t.Errorf("refused %v", refused)
	}
	if refused := f.Swap(base.WithPeers(peers(false, true))); len(refused) != 1 {
		t.Errorf("refused %v", refused)
	}
}

// What one destination is said to come from is bounded.
func TestManyOrigins(t *testing.T) {
	var names []string
	for i := range 10 * maxOrigins {
		names = append(names, fmt.Sprintf("acls[%d]/%d", i, i))
	}
	slices.Reverse(names)
	r := from(allow("*", "*", 22, 22), strings.Join(names, " "))
	f := newFilter(t, r)
	if v := f.In(in(TCPSyn).packet(t), alice); len(v.Rules) != maxOrigins {
		t.Errorf("%d rules", len(v.Rules))
	}
}

// A thousand edits of other rules leave a flow alone and cost it no memory.
func TestOtherEdits(t *testing.T) {
	mine := from(allow("100.64.0.2", "100.64.0.1", 22, 22), "a/mine")
	f := newFilter(t, mine)
	f.In(in(TCPSyn).packet(t), alice)
	for i := range 1000 {
		other := from(allow(netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}).String(), "*", uint16(i), 65535), fmt.Sprintf("acls[%d]/%d", i%3, i))
		list := []wire.FilterRule{other, mine}
		if i%2 == 0 {
			slices.Reverse(list)
		}
		if refused := f.Swap(compile(t, list...)); len(refused) != 0 {
			t.Fatalf("edit %d cut %v", i, refused)
		}
		if v := f.In(in(TCPAck).packet(t), alice); v.Reason != ReasonFlow || v.Rule().ID != "mine" {
			t.Fatalf("edit %d: %v", i, v)
		}
	}
	checkTable(t, f)
}
