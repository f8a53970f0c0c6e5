package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mesh/control/admin"
	"mesh/control/wire"
)

// vectorCase is a case of the shared policy vectors, which live outside of the
// repository.
type vectorCase struct {
	ID       string
	Policy   json.RawMessage
	Rejected bool
	Users    json.RawMessage
	Nodes    map[string]admin.TopologyNode
	Want     map[string]compiledNode
}

// TestVectorsByCommand tries the shared vectors with `mesh policy compile` and
// prints for each category how many match.
func TestVectorsByCommand(t *testing.T) {
	dir := filepath.Join("..", "..", "..", "shared", "policy-vectors")
	if _, err := os.Stat(dir); err != nil {
		t.Skip("the shared policy vectors are not here: ", err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			matched, all := 0, decode[[]vectorCase](t, string(data))
			s := newShell(t)
			for i := range all {
				if msg := all[i].try(t, s); msg != "" {
					t.Errorf("%s: %s", all[i].ID, msg)
				} else {
					matched++
				}
			}
			t.Logf("%d of %d", matched, len(all))
		})
	}
}

// try compiles one policy and returns what is wrong with the result.
func (v *vectorCase) try(t *testing.T, s *shell) string {
	text := []byte(v.Policy)
	if quoted := ""; json.Unmarshal(v.Policy, &quoted) == nil {
		text = []byte(quoted)
	}
	topology, err := json.Marshal(map[string]any{"users": v.Users, "nodes": v.Nodes})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "topology.json")
	if err := os.WriteFile(file, topology, 0o600); err != nil {
		t.Fatal(err)
	}
	r := s.pipe(string(text), "policy", "compile", "--topology", file, "-")
	if v.Rejected {
		if r.code != exitFail || r.stdout != "" || r.stderr == "" {
			return fmt.Sprintf("status %d, stderr %q, want a refusal", r.code, r.stderr)
		}
		return ""
	}
	if r.code != exitDone || r.stderr != "" {
		return fmt.Sprintf("status %d, stderr %q", r.code, r.stderr)
	}
	got := decode[map[string]compiledNode](t, r.stdout)
	if len(got) != len(v.Nodes) {
		return fmt.Sprintf("%d nodes, want %d", len(got), len(v.Nodes))
	}
	for name, want := range v.Want {
		g := got[name]
		if a, b := opened(g.Filter), opened(want.Filter); !slices.Equal(a, b) {
			return fmt.Sprintf("filter of %s: %d cells, want %d; first difference %s", name, len(a), len(b), firstDifference(a, b))
		}
		if a, b := granted(g.Filter), granted(want.Filter); !slices.Equal(a, b) {
			return fmt.Sprintf("capabilities at %s: %q, want %q", name, a, b)
		}
		if msg := v.peers(name, g.Peers, want.Peers, got); msg != "" {
			return msg
		}
		if want.SelfCapMap == nil {
			continue
		}
		for attr := range g.SelfCapMap {
			if _, ok := want.SelfCapMap[attr]; !ok {
				return fmt.Sprintf("%s has the attribute %q too much", name, attr)
			}
		}
		for attr := range want.SelfCapMap {
			// Others are the service's own, whatever the policy says.
			if _, ok := g.SelfCapMap[attr]; !ok && strings.Contains(string(text), `"`+attr+`"`) {
				return fmt.Sprintf("%s lacks the attribute %q", name, attr)
			}
		}
	}
	return ""
}

// peers compares what a node is told of others. Which of several routers of a
// network is in charge is free, but it is one.
func (v *vectorCase) peers(name string, got, want map[string]compiledPeer, all map[string]compiledNode) string {
	if len(got) != len(want) {
		return fmt.Sprintf("%s has %d peers, want %d", name, len(got), len(want))
	}
	routers := func(p netip.Prefix) (n int) {
		for _, o := range v.Nodes {
			if slices.Contains(o.ApprovedRoutes, p) {
				n++
			}
		}
		return n
	}
	// count lists what is told, with shared networks under no node's name.
	count := func(peers map[string]compiledPeer) (out []string) {
		for peer, p := range peers {
			list := func(kind string, prefixes []netip.Prefix) {
				for _, r := range prefixes {
					switch own := v.Nodes[peer]; {
					case r.IsSingleIP() && (r.Addr() == own.IPv4 || r.Addr() == own.IPv6):
						out = append(out, fmt.Sprint(kind, peer, r))
					case !slices.Contains(own.ApprovedRoutes, r):
						// Recorded while it was being approved: not the compiler's.
					case slices.Contains(v.Nodes[name].ApprovedRoutes, r):
						// The node may be in charge itself.
					case r.Bits() > 0 && routers(r) > 1:
						out = append(out, fmt.Sprint(kind, r))
					default:
						out = append(out, fmt.Sprint(kind, peer, r))
					}
				}
			}
			list("allowed ", p.AllowedIPs)
			list("primary ", p.PrimaryRoutes)
		}
		slices.Sort(out)
		return out
	}
	if a, b := count(got), count(want); !slices.Equal(a, b) {
		return fmt.Sprintf("peers of %s: %v, want %v", name, a, b)
	}
	return ""
}

// addrSpan are addresses from first to last.
type addrSpan struct{ first, last netip.Addr }

func spans(s string) []addrSpan {
	if s == "*" {
		return append(spans("0.0.0.0/0"), spans("::/0")...)
	}
	if a, b, ok := strings.Cut(s, "-"); ok {
		return []addrSpan{{netip.MustParseAddr(a), netip.MustParseAddr(b)}}
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		last := p.Masked().Addr().AsSlice()
		for i := p.Bits(); i < len(last)*8; i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		end, _ := netip.AddrFromSlice(last)
		return []addrSpan{{p.Masked().Addr(), end}}
	}
	a := netip.MustParseAddr(s)
	return []addrSpan{{a, a}}
}

// opened writes a filter in a normal form: for each protocol and destination
// the ports, and for these all sources, each merged and sorted. Two filters with
// the same form let the same packets in.
func opened(rules []wire.FilterRule) []string {
	type cell struct {
		proto     int
		dst       addrSpan
		port, end int
	}
	cells := make(map[cell][]addrSpan)
	for _, r := range rules {
		protos := r.IPProto
		if len(protos) == 0 {
			protos = []int{1, 6, 17, 58}
		}
		var srcs []addrSpan
		for _, s := range r.SrcIPs {
			srcs = append(srcs, spans(s)...)
		}
		for _, d := range r.DstPorts {
			for _, dst := range spans(d.IP) {
				for _, proto := range protos {
					k := cell{proto, dst, int(d.Ports.First), int(d.Ports.Last)}
					if proto != 6 && proto != 17 && proto != 132 {
						k.port, k.end = 0, 65535 // as they are judged
					}
					for _, s := range srcs {
						if s.first.BitLen() == dst.first.BitLen() {
							cells[k] = append(cells[k], s)
						}
					}
				}
			}
		}
	}
	var out []string
	for k, srcs := range cells {
		if merged := merge(srcs); len(merged) > 0 {
			out = append(out, fmt.Sprint(k, merged))
		}
	}
	slices.Sort(out)
	return out
}

func merge(s []addrSpan) (out []addrSpan) {
	slices.SortFunc(s, func(a, b addrSpan) int { return a.first.Compare(b.first) })
	for _, x := range s {
		if n := len(out); n > 0 && (x.first.Compare(out[n-1].last) <= 0 || out[n-1].last.Next() == x.first) {
			if out[n-1].last.Less(x.last) {
				out[n-1].last = x.last
			}
			continue
		}
		out = append(out, x)
	}
	return out
}

// granted lists who is given which capability where.
func granted(rules []wire.FilterRule) (out []string) {
	for _, r := range rules {
		var srcs []addrSpan
		for _, s := range r.SrcIPs {
			srcs = append(srcs, spans(s)...)
		}
		for _, g := range r.CapGrant {
			for _, d := range g.Dsts {
				for name, values := range g.CapMap {
					for _, v := range values {
						var any any
						if err := json.Unmarshal(v, &any); err != nil {
							return []string{err.Error()}
						}
						normal, _ := json.Marshal(any)
						out = append(out, fmt.Sprintf("%v %s %s %s", merge(slices.Clone(srcs)), d, name, normal))
					}
					if len(values) == 0 {
						out = append(out, fmt.Sprintf("%v %s %s", merge(slices.Clone(srcs)), d, name))
					}
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

func firstDifference(a, b []string) string {
	for _, s := range a {
		if !slices.Contains(b, s) {
			return "too much: " + s
		}
	}
	for _, s := range b {
		if !slices.Contains(a, s) {
			return "missing: " + s
		}
	}
	return "none"
}
