package filter

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"

	"mesh/control/wire"
	"mesh/identity"
)

// oracle says what packet filter rules mean, one rule after the other and
// without any index. It shares nothing with the filter but the numbers of
// protocols.
type oracle struct {
	local []netip.Prefix
	rules []oracleRule
	caps  map[string]map[identity.NodePublic]bool
}

type oracleRule struct {
	srcs   []oracleSet
	dsts   []oracleDst
	protos []int
}

type oracleDst struct {
	oracleSet
	first, last uint16
}

// oracleSet is one text of the wire: everything, a network, a range or a
// capability.
type oracleSet struct {
	all         bool
	net         netip.Prefix
	first, last netip.Addr
	cap         string
}

func newOracleSet(s string) oracleSet {
	if s == "*" {
		return oracleSet{all: true}
	}
	if name, ok := strings.CutPrefix(s, "cap:"); ok {
		return oracleSet{cap: name}
	}
	if a, b, ok := strings.Cut(s, "-"); ok {
		return oracleSet{first: netip.MustParseAddr(a), last: netip.MustParseAddr(b)}
	}
	if strings.Contains(s, "/") {
		return oracleSet{net: netip.MustParsePrefix(s)}
	}
	a := netip.MustParseAddr(s)
	return oracleSet{first: a, last: a}
}

func (o *oracle) has(s oracleSet, a netip.Addr, peer identity.NodePublic) bool {
	switch {
	case s.all:
		return true
	case s.cap != "":
		return o.caps[s.cap][peer]
	case s.net.IsValid():
		return s.net.Contains(a)
	}
	return a.Is4() == s.first.Is4() && s.first.Compare(a) <= 0 && a.Compare(s.last) <= 0
}

func newOracle(rules []wire.FilterRule, local []netip.Prefix, caps map[string]map[identity.NodePublic]bool) *oracle {
	o := &oracle{local: local, caps: caps}
	for _, r := range rules {
		var c oracleRule
		for _, s := range r.SrcIPs {
			c.srcs = append(c.srcs, newOracleSet(s))
		}
		for _, d := range r.DstPorts {
			c.dsts = append(c.dsts, oracleDst{newOracleSet(d.IP), d.Ports.First, d.Ports.Last})
		}
		if c.protos = r.IPProto; len(c.protos) == 0 {
			c.protos = []int{6, 17, 1, 58}
		}
		o.rules = append(o.rules, c)
	}
	return o
}

// judge says what becomes of a packet of no known flow.
func (o *oracle) judge(m mk, peer identity.NodePublic) Action {
	src, dst := ap(m.src), ap(m.dst)
	local := false
	for _, p := range o.local {
		local = local || p.Contains(dst.Addr())
	}
	icmp := m.proto == 1 || m.proto == 58
	switch {
	case !local:
		return Drop
	case m.proto == 99:
		return Control
	case m.proto == 1 && (dst.Addr().Is6() || m.typ != 8), m.proto == 58 && (dst.Addr().Is4() || m.typ != 128):
		return Drop // ICMP of the other family, and all but a ping
	}
	for _, r := range o.rules {
		from := false
		for _, s := range r.srcs {
			from = from || o.has(s, src.Addr(), peer)
		}
		listed := icmp
		for _, n := range r.protos {
			listed = listed || n == int(m.proto)
		}
		if !from || !listed {
			continue
		}
		for _, d := range r.dsts {
			ports := d.first <= dst.Port() && dst.Port() <= d.last
			if m.proto != 6 && m.proto != 17 && m.proto != 132 {
				ports = icmp || d.first == 0 && d.last == 65535
			}
			if ports && o.has(d.oracleSet, dst.Addr(), peer) {
				return Accept
			}
		}
	}
	if m.proto == 6 && m.flags&(TCPSyn|TCPAck) == TCPSyn || m.proto == 17 {
		return Reject
	}
	return Drop
}

// policy makes rules of every form, cap: sources among them.
func (w world) policy() []wire.FilterRule {
	rules := w.rules()
	for i := range rules {
		if w.IntN(3) == 0 {
			rules[i].SrcIPs = append(rules[i].SrcIPs, []string{"cap:x", "cap:y", "cap:z"}[w.IntN(3)])
		}
		for j, n := range rules[i].IPProto {
			if n == 0 { // hop-by-hop options are no protocol of a packet
				rules[i].IPProto[j] = 41
			}
		}
	}
	return rules
}

func (w world) packet() mk {
	six := w.IntN(2) == 0
	q := w.query()
	m := mk{proto: []uint8{6, 6, 6, 17, 17, 132, 1, 58, 47, 99, 254}[w.IntN(11)], body: make([]byte, 8)}
	src, dst := w.addr(six), w.addr(six)
	switch m.proto {
	case 6, 17, 132:
		if q.port == 0 {
			q.port = uint16(w.IntN(100))
		}
		m.src, m.dst = netip.AddrPortFrom(src, uint16(1+w.IntN(4))).String(), netip.AddrPortFrom(dst, q.port).String()
		m.flags = []uint8{TCPSyn, TCPSyn, TCPAck, TCPSyn | TCPAck, TCPFin | TCPAck, TCPRst}[w.IntN(6)]
	default:
		m.src, m.dst = src.String(), dst.String()
		m.typ = []uint8{8, 128, 0, 129, 3, 5, 134}[w.IntN(7)]
	}
	return m
}

// The filter decides about packets as the oracle does. The long form judges
// ten million packets by a thousand policies.
func TestFilterEqualsOracle(t *testing.T) {
	policies, packets := 200, 250
	if os.Getenv("MESH_FULL") != "" {
		policies, packets = 1000, 10000
	}
	// Half of the addresses that packets go to are local.
	local := prefixes("100.64.0.0/28", "100.64.1.8/29", "fd7a::/124", "fd7a::100/123")
	peers := []identity.NodePublic{alice, bob}
	caps := map[string]map[identity.NodePublic]bool{"x": {alice: true}, "y": {alice: true, bob: true}}
	var p Packet
	total, counts := 0, map[Action]int{}
	for seed := range uint64(policies) {
		w := world{rand.New(rand.NewPCG(seed, 7))}
		rules := w.policy()
		c, err := Compile(rules, 1, local)
		if err != nil || len(c.Skipped()) > 0 {
			t.Fatalf("seed %d: %v, %v", seed, err, c.Skipped())
		}
		f := New(Config{})
		f.Swap(c.WithPeers(Peers{Caps: caps}))
		o := newOracle(rules, local, caps)
		for range packets {
			m := w.packet()
			// An address is one peer's, or a flow would change hands.
			peer := peers[ap(m.src).Addr().As16()[15]%2]
			want := o.judge(m, peer)
			var v Verdict // of what is no packet
			if p.Decode(m.build()) == nil {
				v = f.In(&p, peer)
			}
			total++
			counts[v.Action]++
			if v.Action != want {
				text, _ := json.Marshal(rules)
				t.Fatalf("seed %d: %+v: %+v, want %v by %s", seed, m, v, want, text)
			}
		}
	}
	t.Logf("%d packets by %d policies: %v", total, policies, counts)
	for _, a := range []Action{Accept, Drop, Reject, Control} {
		if counts[a] < total/100 {
			t.Errorf("%d of %d: %v is hardly tested", counts[a], total, a)
		}
	}
}
