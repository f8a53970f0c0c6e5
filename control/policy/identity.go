package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
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
	b, words := r.idText[:0], r.idWords[:0]
	for _, s := range srcs {
		words = append(words, s.String())
	}
	b = appendSet(b, "src", words)
	words = words[:0]
	for _, d := range dsts {
		words = append(words, d.sel.String()+" "+portsText(d.ports))
	}
	b = appendSet(b, "dst", words)
	words = words[:0]
	if g == nil {
		b = appendSet(b, "ip", append(words, protosText(protos)))
	} else {
		for _, s := range g.ip {
			words = append(words, protosText(s.protos)+" "+portsText(s.ports))
		}
		b = appendSet(b, "grant", words)
		b = appendSet(b, "via", append(words[:0], via...))
		if len(g.app) > 0 {
			app, err := json.Marshal(g.app) // keys are sorted
			if err != nil {
				app = fmt.Append(nil, g.app)
			}
			b = appendSet(b, "app", append(words[:0], string(app)))
		}
	}
	r.idText, r.idWords = b, words[:0]
	sum := sha256.Sum256(b)
	return ruleOrigin{Rule: o.name, Line: o.line, ID: hex.EncodeToString(sum[:idBytes])}
}

// appendSet appends words in an order of their own. Lengths keep apart what
// would read the same.
func appendSet(b []byte, name string, words []string) []byte {
	slices.Sort(words)
	words = slices.Compact(words)
	b = strconv.AppendInt(append(append(b, name...), ' '), int64(len(words)), 10)
	for _, w := range words {
		b = strconv.AppendInt(append(b, '\n'), int64(len(w)), 10)
		b = append(append(b, ' '), w...)
	}
	return append(b, '\n')
}

// portsText is the normal form of a list of ports.
func portsText(list []portRange) string {
	if len(list) == 1 && list[0] == allPorts {
		return "*"
	}
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
