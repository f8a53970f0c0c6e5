package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
)

// member is a member of an object.
type member struct {
	name   string
	nameAt int
	value  hujson.Value
}

// members returns the members of an object; a second one of the same name is
// an error, since readers of JSON disagree about which counts.
func (r *reader) members(v hujson.Value, what string) []member {
	obj, ok := v.Value.(*hujson.Object)
	if !ok {
		r.fail(v.StartOffset, "", "%s must be an object", what)
		return nil
	}
	// Rules are small and many, lists of names few and long.
	var seen map[string]bool
	if len(obj.Members) > 16 {
		seen = make(map[string]bool, len(obj.Members))
	}
	out := make([]member, 0, len(obj.Members))
	for _, m := range obj.Members {
		name := m.Name.Value.(hujson.Literal).String()
		if seen[name] || seen == nil && slices.ContainsFunc(out, func(m member) bool { return m.name == name }) {
			r.fail(m.Name.StartOffset, "", "duplicate member %q", name)
			continue
		}
		if seen != nil {
			seen[name] = true
		}
		out = append(out, member{name, m.Name.StartOffset, m.Value})
	}
	return out
}

func (r *reader) array(v hujson.Value, what string) []hujson.Value {
	a, ok := v.Value.(*hujson.Array)
	if !ok {
		r.fail(v.StartOffset, "", "%s must be an array", what)
		return nil
	}
	return a.Elements
}

func (r *reader) text(v hujson.Value, what string) (string, bool) {
	l, ok := v.Value.(hujson.Literal)
	if !ok || l.Kind() != '"' {
		r.fail(v.StartOffset, "", "%s must be a string", what)
		return "", false
	}
	return l.String(), true
}

// unknown complains about a member that is not in the language.
func (r *reader) unknown(m member, known []string) {
	r.fail(m.nameAt, r.nearest(m.name, known), "unknown member %q", m.name)
}

// names reads an object whose member names begin with prefix.
func (r *reader) names(top map[string]member, name, prefix string) []member {
	m, ok := top[name]
	if !ok {
		return nil
	}
	var out []member
	for _, m := range r.members(m.value, fmt.Sprintf("%q", name)) {
		rest, ok := strings.CutPrefix(m.name, prefix)
		switch {
		case !ok:
			hint := ""
			if isName(m.name) {
				hint = fmt.Sprintf("did you mean %q?", prefix+m.name)
			}
			r.fail(m.nameAt, hint, "name %q in %q does not begin with %q", m.name, name, prefix)
			continue
		case !isName(rest):
			r.fail(m.nameAt, "use letters, digits, '-', '_' and '.'", "malformed name %q", m.name)
			continue
		case prefix == "tag:" && !isLetter(rest[0]):
			r.fail(m.nameAt, "begin it with a letter", "malformed name %q", m.name)
			continue
		}
		out = append(out, m)
	}
	return out
}

func (r *reader) readHosts(top map[string]member) {
	r.hosts = make(map[string]netip.Prefix)
	m, ok := top["hosts"]
	if !ok {
		return
	}
	for _, m := range r.members(m.value, `"hosts"`) {
		s, ok := r.text(m.value, fmt.Sprintf("host %q", m.name))
		if !ok {
			continue
		}
		if !isName(m.name) {
			r.fail(m.nameAt, "use letters, digits, '-', '_' and '.'", "malformed name %q", m.name)
			continue
		}
		if _, err := parsePrefix(m.name); err == nil {
			r.fail(m.nameAt, "", "the name of host %q is an address", m.name)
			continue
		}
		p, err := parsePrefix(s)
		if err != nil {
			r.fail(m.value.StartOffset, "", "host %q: %v", m.name, err)
			continue
		}
		r.hosts[m.name] = p
		r.hostNames = append(r.hostNames, m.name)
	}
}

func (r *reader) readGroup(m member) {
	seen := make(map[userRef]bool)
	for _, v := range r.array(m.value, m.name) {
		s, ok := r.text(v, "member of a group")
		if !ok {
			continue
		}
		sel := r.selector(s, v.StartOffset, inGroup)
		if sel == nil || seen[userRef(sel.name)] {
			continue
		}
		seen[userRef(sel.name)] = true
		r.groups[m.name] = append(r.groups[m.name], userRef(sel.name))
	}
}

func isLetter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }
