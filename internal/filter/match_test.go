package filter

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"mesh/control/wire"
	"mesh/identity"
)

var (
	alice = identity.NodePublicFrom([32]byte{1})
	bob   = identity.NodePublicFrom([32]byte{2})

	localAddrs = prefixes("100.64.0.1/32", "fd7a::1/128")
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// allow builds a rule: sources and destinations separated by spaces.
func allow(src, dst string, first, last uint16, protos ...int) wire.FilterRule {
	r := wire.FilterRule{SrcIPs: strings.Fields(src), IPProto: protos}
	for _, d := range strings.Fields(dst) {
		r.DstPorts = append(r.DstPorts, wire.NetPortRange{IP: d, Ports: wire.PortRange{First: first, Last: last}})
	}
	return r
}

func compile(t testing.TB, rules ...wire.FilterRule) *Rules {
	t.Helper()
	r, err := Compile(rules, 7, localAddrs)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newFilter(t testing.TB, rules ...wire.FilterRule) *Filter {
	f := New(Config{})
	f.Swap(compile(t, rules...))
	return f
}

// verdict asks a fresh filter, so that no flow is known.
func verdict(t testing.TB, m mk, rules ...wire.FilterRule) Verdict {
	t.Helper()
	return newFilter(t, rules...).In(m.packet(t), alice)
}

func TestCompileRefusesObsolete(t *testing.T) {
	for _, text := range []string{
		`[{"SrcIPs":["*"],"DstPorts":[{"IP":"*","Ports":{"First":0,"Last":1}}]},{"SrcIPs":["*"],"SrcBits":[8]}]`,
		`[{"SrcIPs":["*"],"DstPorts":[{"IP":"*","Bits":0,"Ports":{"First":0,"Last":1}}]}]`,
	} {
		var rules []wire.FilterRule
		if err := json.Unmarshal([]byte(text), &rules); err != nil {
			t.Fatal(err)
		}
		if r, err := Compile(rules, 1, localAddrs); !errors.Is(err, ErrObsolete) || r != nil {
			t.Errorf("%s: got %v, %v", text, r, err)
		}
	}
}

func TestCompileSkips(t *testing.T) {
	in := []wire.FilterRule{
		allow("100.64.9.1/24 100.64.0.9-100.64.0.5 100.64.0.1-fd7a::1 1-2-3 fe80::1%eth0 ::ffff:100.64.0.2 ::ffff:100.64.0.0/120 nonsense cap: 100.64.0.2", "* cap:x 100.64.0.1/8", 22, 22),
		allow("100.64.0.3", "*", 9, 8),
		allow("100.64.0.4", "*", 22, 22, -1, 256, 1<<20),
	}
	r := compile(t, in...)
	want := []string{
		`rule 0, destination 1: "cap:x" is not an address`,
		`rule 0, destination 2: "100.64.0.1/8" has bits set behind its prefix`,
		`rule 0, source 0: "100.64.9.1/24" has bits set behind its prefix`,
		`rule 0, source 1: "100.64.0.9-100.64.0.5" is not a range`,
		`rule 0, source 2: "100.64.0.1-fd7a::1" is not a range`,
		`rule 0, source 3: "1" is not an address`,
		`rule 0, source 4: "fe80::1%eth0" has a zone`,
		`rule 0, source 5: "::ffff:100.64.0.2" is an IPv4-mapped address`,
		`rule 0, source 6: "::ffff:100.64.0.0/120" is an IPv4-mapped address`,
		`rule 0, source 7: "nonsense" is not an address`,
		`rule 0, source 8: no capability named`,
		`rule 1, destination 0: ports 9-8 are reversed`,
	}
	if got := strings.Join(r.Skipped(), "\n"); got != strings.Join(want, "\n") {
		t.Errorf("skipped:\n%s", got)
	}
	f := New(Config{})
	f.Swap(r)
	for src, want := range map[string]Action{"100.64.0.2:1": Accept, "100.64.0.3:1": Reject, "100.64.0.4:1": Reject, "100.64.9.1:1": Reject} {
		if v := f.In(mk{proto: ProtoTCP, src: src, dst: "100.64.0.1:22", flags: TCPSyn}.packet(t), alice); v.Action != want {
			t.Errorf("from %s: %v, want %v", src, v.Action, want)
		}
	}
	// Reserved protocol numbers match nothing at all, not even a ping.
	if v := verdict(t, mk{proto: ProtoICMP, src: "100.64.0.4", dst: "100.64.0.1", typ: 8}, in[2]); v.Action != Drop {
		t.Errorf("ping by a rule without protocols: %v", v.Action)
	}
	if n := len(mustCompileMany(t)); n != maxSkipped {
		t.Errorf("%d complaints listed", n)
	}
}

func mustCompileMany(t *testing.T) []string {
	var rules []wire.FilterRule
	for range 1000 {
		rules = append(rules, allow("bad", "*", 0, 1))
	}
	return compile(t, rules...).Skipped()
}

// Port ranges at their edges (negative test 48).
func TestPortEdges(t *testing.T) {
	for _, r := range [][2]uint16{{0, 0}, {1, 1}, {22, 22}, {22, 80}, {65534, 65534}, {65535, 65535}, {0, 65535}, {1, 65535}} {
		rules := []wire.FilterRule{allow("*", "100.64.0.1", r[0], r[1], ProtoTCP)}
		for _, port := range []int{0, 1, 2, 21, 22, 23, 79, 80, 81, 65533, 65534, 65535} {
			m := mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: fmt.Sprintf("100.64.0.1:%d", port), flags: TCPSyn}
			want := Reject
			if port >= int(r[0]) && port <= int(r[1]) {
				want = Accept
			}
			if got := verdict(t, m, rules...).Action; got != want {
				t.Errorf("ports %v, packet to %d: %v, want %v", r, port, got, want)
			}
		}
	}
}

// Protocols of rules (negative test 49).
func TestProtocols(t *testing.T) {
	to := func(proto uint8) mk {
		return mk{proto: proto, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn, body: make([]byte, 20)}
	}
	plain := func(proto uint8) mk {
		return mk{proto: proto, src: "100.64.0.2", dst: "100.64.0.1", body: make([]byte, 20)}
	}
	for _, tt := range []struct {
		name string
		rule wire.FilterRule
		m    mk
		want Action
	}{
		{"tcp rule, tcp", allow("*", "*", 0, 65535, 6), to(ProtoTCP), Accept},
		{"tcp rule, udp", allow("*", "*", 0, 65535, 6), to(ProtoUDP), Reject},
		{"tcp rule, sctp", allow("*", "*", 0, 65535, 6), to(ProtoSCTP), Drop},
		{"tcp rule, gre", allow("*", "*", 0, 65535, 6), plain(47), Drop},
		{"tcp rule, esp", allow("*", "*", 0, 65535, 6), plain(50), Drop},
		{"tcp rule, unknown", allow("*", "*", 0, 65535, 6), plain(254), Drop},
		{"tcp rule, router advertisement", allow("*", "*", 0, 65535, 6), mk{proto: ProtoICMPv6, src: "fd7a::2", dst: "fd7a::1", typ: 134}, Drop},
		{"any rule, redirect", allow("*", "*", 0, 65535), mk{proto: ProtoICMP, src: "100.64.0.2", dst: "100.64.0.1", typ: 5}, Drop},
		{"any rule, timestamp", allow("*", "*", 0, 65535), mk{proto: ProtoICMP, src: "100.64.0.2", dst: "100.64.0.1", typ: 13}, Drop},
		{"udp rule, udp", allow("*", "*", 22, 22, 17), to(ProtoUDP), Accept},
		{"udp rule, tcp", allow("*", "*", 22, 22, 17), to(ProtoTCP), Reject},
		{"default, tcp", allow("*", "*", 22, 22), to(ProtoTCP), Accept},
		{"default, udp", allow("*", "*", 22, 22), to(ProtoUDP), Accept},
		{"default, sctp", allow("*", "*", 0, 65535), to(ProtoSCTP), Drop},
		{"default, gre", allow("*", "*", 0, 65535), plain(47), Drop},
		{"gre named, all ports", allow("*", "*", 0, 65535, 47), plain(47), Accept},
		{"gre named, one port", allow("*", "*", 0, 0, 47), plain(47), Drop},
		{"sctp named", allow("*", "*", 22, 22, 132), to(ProtoSCTP), Accept},
		{"icmp named, tcp", allow("*", "*", 0, 65535, 1), to(ProtoTCP), Reject},
		{"control message, no rule", wire.FilterRule{}, plain(ProtoTSMP), Control},
		{"control message for another", wire.FilterRule{}, mk{proto: ProtoTSMP, src: "100.64.0.2", dst: "100.64.0.9"}, Drop},
		{"IPv4 sources, IPv6 destination", allow("100.64.0.0/10", "fd7a::1", 0, 65535), mk{proto: ProtoTCP, src: "[fd7a::2]:1", dst: "[fd7a::1]:22", flags: TCPSyn}, Reject},
		{"unknown IPv6 next header", allow("*", "*", 0, 65535), mk{proto: 135, src: "fd7a::2", dst: "fd7a::1", body: make([]byte, 20)}, Drop},
	} {
		if got := verdict(t, tt.m, tt.rule).Action; got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestDestinations(t *testing.T) {
	all := allow("*", "*", 0, 65535, 6, 17, 1, 58)
	for _, tt := range []struct {
		dst    string
		action Action
		reason string
	}{
		{"100.64.0.1:80", Accept, ReasonRule},
		{"[fd7a::1]:80", Accept, ReasonRule},
		{"100.64.0.2:80", Drop, ReasonNotLocal},
		{"10.0.0.1:80", Drop, ReasonNotLocal},
		{"127.0.0.1:80", Drop, ReasonForbidden},
		{"[::1]:80", Drop, ReasonForbidden},
		{"0.0.0.0:80", Drop, ReasonForbidden},
		{"224.0.0.1:80", Drop, ReasonForbidden},
		{"[ff02::1]:80", Drop, ReasonForbidden},
		{"255.255.255.255:80", Drop, ReasonForbidden},
		{"169.254.1.1:80", Drop, ReasonForbidden},
		{"[fe80::1]:80", Drop, ReasonForbidden},
		{"169.254.169.254:80", Drop, ReasonNotLocal},
	} {
		src := "100.64.0.2:1"
		if strings.HasPrefix(tt.dst, "[") {
			src = "[fd7a::2]:1"
		}
		v := verdict(t, mk{proto: ProtoTCP, src: src, dst: tt.dst, flags: TCPSyn}, all)
		if v.Action != tt.action || v.Reason != tt.reason {
			t.Errorf("to %s: %v (%s), want %v (%s)", tt.dst, v.Action, v.Reason, tt.action, tt.reason)
		}
	}
}

// An advertised default route makes public addresses local, nothing else.
func TestDefaultRoute(t *testing.T) {
	r, err := Compile([]wire.FilterRule{allow("*", "*", 0, 65535)}, 1, prefixes("0.0.0.0/0", "::/0", "100.64.0.1/32", "10.1.0.0/16"))
	if err != nil {
		t.Fatal(err)
	}
	for a, want := range map[string]bool{
		"8.8.8.8": true, "100.64.0.1": true, "10.1.2.3": true, "2001:db8::1": true,
		"10.2.0.1": false, "192.168.1.1": false, "172.16.0.1": false, "100.64.0.2": false,
		"127.0.0.1": false, "169.254.169.254": false, "fd7a::1": false, "fe80::1": false, "::1": false, "224.0.0.1": false,
	} {
		if got := r.isLocal(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s is local: %v, want %v", a, got, want)
		}
	}
}

func TestOrigin(t *testing.T) {
	r := allow("*", "100.64.0.1 fd7a::1", 22, 22)
	r.MeshOrigins = [][]wire.RuleOrigin{{{Rule: "acls[3]", ID: "x3", Line: 14}, {Rule: "acls[4]"}}, {}}
	late := allow("100.64.0.2", "100.64.0.1", 0, 65535)
	late.MeshOrigins = [][]wire.RuleOrigin{{{Rule: "acls[9]"}}}
	f := newFilter(t, r, late)
	m := mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn}
	want := identity.Rule{Policy: 7, Name: "acls[3]", ID: "x3", Line: 14}
	if v := f.In(m.packet(t), alice); v.Rule() != want {
		t.Errorf("the first rule counts: got %v", v.Rule())
	}
	if v := f.In(m.packet(t), alice); len(v.Rules) != 2 || v.Rules[1].Name != "acls[4]" {
		t.Errorf("all rules of the entry count: %v", v.Rules)
	}
	peer, rule, ok := f.Origin(Flow{Proto: ProtoTCP, Local: ap("100.64.0.1:22"), Remote: ap("100.64.0.2:4000")})
	if peer != alice || rule != want || !ok {
		t.Errorf("origin: %v, %v, %v", peer.Short(), rule, ok)
	}
	m = mk{proto: ProtoTCP, src: "[fd7a::2]:4000", dst: "[fd7a::1]:22", flags: TCPSyn}
	if v := f.In(m.packet(t), alice); v.Action != Accept || v.Rule() != (identity.Rule{}) {
		t.Errorf("unnamed rule: %v", v)
	}
}

func TestPeers(t *testing.T) {
	base := compile(t, allow("cap:example.com/cap/x", "*", 22, 22), allow("100.64.0.3", "*", 23, 23))
	f := New(Config{})
	f.Swap(base)
	m := mk{proto: ProtoTCP, src: "100.64.0.2:4000", dst: "100.64.0.1:22", flags: TCPSyn}
	if v := f.In(m.packet(t), alice); v.Action != Reject {
		t.Errorf("capabilities unknown: %v", v.Action)
	}
	caps := map[string]map[identity.NodePublic]bool{"example.com/cap/x": {alice: true}}
	f.Swap(base.WithPeers(Peers{Caps: caps}))
	if v := f.In(m.packet(t), alice); v.Action != Accept {
		t.Errorf("alice has it: %v", v.Action)
	}
	if v := f.In(m.packet(t), bob); v.Action != Reject {
		t.Errorf("bob has it not: %v", v.Action)
	}
	f.Swap(base.WithPeers(Peers{Caps: caps, Jailed: map[identity.NodePublic]bool{alice: true}}))
	if v := f.In(m.packet(t), alice); v.Action != Reject {
		t.Errorf("alice is jailed: %v", v.Action)
	}
}

// naive is the meaning of rules without any index: the judge of the others. It
// returns the index of the first rule that matches, or -1.
func naive(rules []wire.FilterRule, q query) int {
	in := func(s string, a netip.Addr) bool {
		if s == "*" {
			return true
		}
		if p, err := netip.ParsePrefix(s); err == nil {
			return p.Contains(a)
		}
		if first, last, ok := strings.Cut(s, "-"); ok {
			f, l := netip.MustParseAddr(first), netip.MustParseAddr(last)
			return f.Is4() == a.Is4() && f.Compare(a) <= 0 && a.Compare(l) <= 0
		}
		return netip.MustParseAddr(s) == a
	}
	for i, r := range rules {
		protos := r.IPProto
		if len(protos) == 0 {
			protos = []int{6, 17, 1, 58}
		}
		for _, s := range r.SrcIPs {
			if !in(s, q.remote) {
				continue
			}
			for _, d := range r.DstPorts {
				if !in(d.IP, q.local) {
					continue
				}
				if q.proto == 1 || q.proto == 58 {
					return i
				}
				for _, n := range protos {
					ports := q.port >= d.Ports.First && q.port <= d.Ports.Last
					if q.proto != 6 && q.proto != 17 && q.proto != 132 {
						ports = d.Ports == wire.AllPorts
					}
					if n == int(q.proto) && ports {
						return i
					}
				}
			}
		}
	}
	return -1
}

// world makes random rules and queries from few addresses, so that they meet.
type world struct{ *rand.Rand }

func (w world) addr(six bool) netip.Addr {
	n := byte(w.IntN(24))
	if six {
		return netip.AddrFrom16([16]byte{0xfd, 0x7a, 14: byte(w.IntN(2)), 15: n})
	}
	return netip.AddrFrom4([4]byte{100, 64, byte(w.IntN(2)), n})
}

func (w world) set() string {
	six := w.IntN(2) == 0
	a := w.addr(six)
	switch w.IntN(6) {
	case 0:
		return "*"
	case 1:
		p, _ := a.Prefix(a.BitLen() - w.IntN(10))
		return p.String()
	case 2:
		p, _ := a.Prefix(w.IntN(a.BitLen() + 1))
		return p.String()
	case 3:
		b := w.addr(six)
		if b.Less(a) {
			a, b = b, a
		}
		return a.String() + "-" + b.String()
	}
	return a.String()
}

func (w world) ports() wire.PortRange {
	edges := []uint16{0, 1, 21, 22, 23, 80, 65534, 65535}
	a, b := edges[w.IntN(len(edges))], edges[w.IntN(len(edges))]
	switch {
	case w.IntN(4) == 0:
		return wire.AllPorts
	case w.IntN(2) == 0:
		b = a
	case a > b:
		a, b = b, a
	}
	return wire.PortRange{First: a, Last: b}
}

var someProtos = []int{6, 17, 132, 47, 1, 58, 99, 50, 254, 0, 255}

func (w world) rules() []wire.FilterRule {
	out := make([]wire.FilterRule, w.IntN(7))
	for i := range out {
		r := &out[i]
		for range w.IntN(5) {
			r.SrcIPs = append(r.SrcIPs, w.set())
		}
		for j := range w.IntN(4) {
			r.DstPorts = append(r.DstPorts, wire.NetPortRange{IP: w.set(), Ports: w.ports()})
			r.MeshOrigins = append(r.MeshOrigins, []wire.RuleOrigin{{Rule: fmt.Sprint(i), Line: j + 1}})
		}
		for w.IntN(2) == 0 {
			r.IPProto = append(r.IPProto, someProtos[w.IntN(len(someProtos))])
		}
	}
	return out
}

func (w world) query() query {
	six := w.IntN(2) == 0
	q := query{remote: w.addr(six), local: w.addr(six), proto: uint8(someProtos[w.IntN(len(someProtos))])}
	edges := []uint16{0, 1, 2, 20, 21, 22, 23, 24, 79, 80, 81, 65533, 65534, 65535}
	if q.proto == 6 || q.proto == 17 || q.proto == 132 {
		q.port = edges[w.IntN(len(edges))]
	}
	return q
}

// The compiled rules decide as the naive reading does, over a million random
// packets (negative test 48).
func TestRulesEqualNaive(t *testing.T) {
	total, accepted := 0, 0
	local := prefixes("100.64.0.0/23", "fd7a::/120", "fd7a::100/120")
	for seed := range uint64(2500) {
		w := world{rand.New(rand.NewPCG(seed, 1))}
		rules := w.rules()
		c, err := Compile(rules, 0, local)
		if err != nil || len(c.Skipped()) > 0 {
			t.Fatalf("seed %d: %v, %v", seed, err, c.Skipped())
		}
		for range 420 {
			q := w.query()
			want := naive(rules, q)
			got, ok := c.match(q)
			total++
			if ok != (want >= 0) || ok && got[0].Name != fmt.Sprint(want) {
				text, _ := json.Marshal(rules)
				t.Fatalf("seed %d: %+v: got %v %v, want rule %d of %s", seed, q, got, ok, want, text)
			}
			if ok {
				accepted++
			}
		}
	}
	if total < 1_000_000 || accepted < total/10 || accepted > total*9/10 {
		t.Errorf("%d packets, %d accepted: not a fair test", total, accepted)
	}
	t.Logf("%d packets, %d accepted", total, accepted)
}

func FuzzCompile(f *testing.F) {
	f.Add([]byte(`[{"SrcIPs":["*"],"DstPorts":[{"IP":"*","Ports":{"First":0,"Last":65535}}]}]`))
	f.Add([]byte(`[{"SrcIPs":["100.64.0.0/10","fd7a::1-fd7a::9","cap:x"],"DstPorts":[{"IP":"100.64.0.1","Ports":{"First":22,"Last":22}}],"IPProto":[6,300]}]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var rules []wire.FilterRule
		if json.Unmarshal(text, &rules) != nil {
			return
		}
		r, err := Compile(rules, 1, localAddrs)
		if err != nil {
			return
		}
		fl := New(Config{})
		fl.Swap(r)
		for _, b := range seeds() {
			var p Packet
			if p.Decode(b) == nil {
				fl.In(&p, alice)
			}
		}
	})
}
