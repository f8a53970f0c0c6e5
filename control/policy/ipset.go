package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"mesh/internal/iprange"

	"github.com/tailscale/hujson"
)

// readIPSets reads "ipsets". Sets are made of networks, hosts and other sets,
// and are networks in the end.
func (r *reader) readIPSets(top map[string]member) {
	sets := r.names(top, "ipsets", "ipset:")
	r.ipsets = make(map[string][]netip.Prefix, len(sets))
	b := ipsetBuilder{r: r, defs: make(map[string]hujson.Value), state: make(map[string]int)}
	for _, m := range sets {
		b.defs[m.name] = m.value
		r.ipsetNames = append(r.ipsetNames, m.name)
	}
	for _, m := range sets {
		b.build(m.name, m.nameAt)
	}
}

// ipsetBuilder resolves sets that mention others.
type ipsetBuilder struct {
	r     *reader
	defs  map[string]hujson.Value
	state map[string]int // 1: being built, 2: done
	depth int
	work  int // ranges handled
}

// Limits on what sets of sets may grow to.
const (
	maxIPSetDepth    = 16
	maxIPSetPrefixes = 4096
	maxIPSetWork     = 5_000_000
)

func (b *ipsetBuilder) build(name string, at int) {
	switch {
	case b.state[name] == 2:
		return
	case b.state[name] == 1:
		b.r.fail(at, "", "IP set %q contains itself", name)
		return
	case b.depth == maxIPSetDepth:
		b.r.fail(at, "", "IP sets within IP sets more than %d deep", maxIPSetDepth)
		return
	}
	b.state[name] = 1
	b.depth++
	var set []iprange.Range
	for _, t := range b.r.texts(b.defs[name], name) {
		op, target, ok := strings.Cut(strings.TrimSpace(t.text), " ")
		if !ok {
			op, target = "add", t.text
		}
		list, ok := b.target(strings.TrimSpace(target), t.at)
		if b.work += len(set) + len(list); b.work > maxIPSetWork {
			b.r.fail(t.at, "", "IP sets are too large")
			break
		}
		switch {
		case !ok:
		case op == "add":
			set = merge(append(set, list...))
		case op == "remove":
			set = subtract(set, list)
		default:
			b.r.fail(t.at, `write "add …" or "remove …"`, "unknown operation %q", op)
		}
	}
	b.depth--
	b.state[name] = 2
	prefixes := []netip.Prefix{}
	for _, x := range set {
		prefixes = append(prefixes, x.Prefixes()...)
	}
	if len(prefixes) > maxIPSetPrefixes {
		b.r.fail(at, "", "IP set %q has more than %d networks", name, maxIPSetPrefixes)
		prefixes = nil
	}
	b.r.ipsets[name] = prefixes
}

func (b *ipsetBuilder) target(s string, at int) ([]iprange.Range, bool) {
	if strings.HasPrefix(s, "ipset:") {
		if _, ok := b.defs[s]; !ok {
			b.r.fail(at, b.r.nearest(s, b.r.ipsetNames), "undefined IP set %q", s)
			return nil, false
		}
		b.build(s, at)
		var out []iprange.Range
		for _, p := range b.r.ipsets[s] {
			out = append(out, iprange.Of(p))
		}
		return out, true
	}
	if h, ok := b.r.hosts[strings.TrimPrefix(s, "host:")]; ok {
		return []iprange.Range{iprange.Of(h)}, true
	}
	switch {
	case s == "autogroup:internet":
		b.r.unsupported(at, "%q in an IP set", s)
		return nil, false
	case s == "*" || strings.ContainsAny(s, "@") || strings.HasPrefix(s, "tag:") || strings.HasPrefix(s, "group:") || strings.HasPrefix(s, "autogroup:"):
		b.r.fail(at, "name addresses, networks, hosts or other IP sets", "%q is not allowed in an IP set", s)
		return nil, false
	}
	p, err := parsePrefix(s)
	if err != nil {
		b.r.fail(at, b.r.nearest(s, b.r.hostNames), "%v", err)
		return nil, false
	}
	return []iprange.Range{iprange.Of(p)}, true
}

// subtract takes ranges out of merged ones.
func subtract(from, what []iprange.Range) []iprange.Range {
	for _, w := range what {
		var left []iprange.Range
		for _, x := range from {
			if !x.Overlaps(w) {
				left = append(left, x)
				continue
			}
			if x.First.Less(w.First) {
				left = append(left, iprange.Range{First: x.First, Last: w.First.Prev()})
			}
			if w.Last.Less(x.Last) {
				left = append(left, iprange.Range{First: w.Last.Next(), Last: x.Last})
			}
		}
		from = left
	}
	return from
}

// readSettings reads members that hold one value, and refuses those that mean
// something which a mesh does not do.
func (r *reader) readSettings(top map[string]member) {
	if m, ok := top["randomizeClientPort"]; ok {
		switch l, _ := m.value.Value.(hujson.Literal); l.Kind() {
		case 't':
			r.randomPort = true
		case 'f':
		default:
			r.fail(m.value.StartOffset, "", "%q must be true or false", m.name)
		}
	}
	for _, s := range []struct{ name, why string }{
		{"disableIPv4", "every node has an address of both kinds"},
		{"OneCGNATRoute", "nodes of a mesh have no routing table"},
		{"derpMap", "relays are told to the server, with `mesh serve` or `mesh relay`"},
		{"postures", "a mesh does not know the state of devices"},
		{"defaultSrcPosture", "a mesh does not know the state of devices"},
		{"ssh", "a mesh has no SSH of its own: allow port 22 in \"acls\" or \"grants\""},
		{"sshTests", "a mesh has no SSH of its own: test port 22 in \"tests\""},
	} {
		if m, ok := top[s.name]; ok && !isEmpty(m.value) {
			r.unsupported(m.nameAt, "member %q", m.name).Hint = s.why
		}
	}
}

// isEmpty reports whether a value says nothing: false, null, "", [] or {}.
func isEmpty(v hujson.Value) bool {
	switch v := v.Value.(type) {
	case *hujson.Array:
		return len(v.Elements) == 0
	case *hujson.Object:
		return len(v.Members) == 0
	case hujson.Literal:
		return v.Kind() == 'f' || v.Kind() == 'n' || fmt.Sprint(v) == `""`
	}
	return false
}
