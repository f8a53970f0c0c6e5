package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"slices"
	"strings"

	"mesh/control/wire"
)

// ruleOrigin is what the wire says about where a rule comes from.
type ruleOrigin = wire.RuleOrigin

// origin is where an entry of the file stands.
type origin struct {
	name string // "acls[2]"
	line int
}

func (r *reader) origin(name string, at int) origin {
	line, _ := r.position(at)
	return origin{name, line}
}

// idBytes is how much of the hash of a rule is its ID: enough that two rules of
// a policy differ.
const idBytes = 6

// identify gives an entry an ID made of what it says. Order, repetition, comments
// and other entries do not count; what groups, tags and users are, neither.
func (r *reader) identify(o origin, srcs []*selector, dsts []dest, protos []int, g *grant, via []string) ruleOrigin {
	h := sha256.New()
	var list []string
	for _, s := range srcs {
		list = append(list, s.String())
	}
	writeSet(h, "src", list)
	list = nil
	for _, d := range dsts {
		list = append(list, d.sel.String()+" "+portsText(d.ports))
	}
	writeSet(h, "dst", list)
	if g == nil {
		writeSet(h, "ip", []string{protosText(protos)})
	} else {
		list = nil
		for _, s := range g.ip {
			list = append(list, protosText(s.protos)+" "+portsText(s.ports))
		}
		writeSet(h, "grant", list)
		writeSet(h, "via", via)
		if len(g.app) > 0 {
			app, err := json.Marshal(g.app) // keys are sorted
			if err != nil {
				app = fmt.Append(nil, g.app)
			}
			writeSet(h, "app", []string{string(app)})
		}
	}
	return ruleOrigin{Rule: o.name, Line: o.line, ID: hex.EncodeToString(h.Sum(nil)[:idBytes])}
}

// writeSet writes words in an order of their own. Lengths keep apart what would
// read the same.
func writeSet(h hash.Hash, name string, words []string) {
	words = slices.Clone(words)
	slices.Sort(words)
	words = slices.Compact(words)
	fmt.Fprintf(h, "%s %d\n", name, len(words))
	for _, w := range words {
		fmt.Fprintf(h, "%d %s\n", len(w), w)
	}
}

// portsText is the normal form of a list of ports.
func portsText(list []portRange) string {
	list = mergePorts(slices.Clone(list))
	if len(list) == 1 && list[0] == allPorts {
		return "*"
	}
	var out []string
	for _, p := range list {
		if p.first == p.last {
			out = append(out, fmt.Sprint(p.first))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", p.first, p.last))
		}
	}
	return strings.Join(out, ",")
}

// mergePorts sorts ranges and joins those that overlap or touch.
func mergePorts(list []portRange) []portRange {
	slices.SortFunc(list, func(a, b portRange) int { return int(a.first) - int(b.first) })
	out := list[:0]
	for _, p := range list {
		if n := len(out); n > 0 && int(p.first) <= int(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, p.last)
			continue
		}
		out = append(out, p)
	}
	return out
}

// protosText names protocols; none is the default.
func protosText(protos []int) string {
	if protos == nil {
		return "*"
	}
	var out []string
	for _, p := range protos {
		name := fmt.Sprint(p)
		for n, list := range protocols {
			if len(list) == 1 && list[0] == p && n != "ip-in-ip" {
				name = n
			}
		}
		out = append(out, name)
	}
	return strings.Join(out, ",")
}
