package policy

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tailscale/hujson"
)

// Limits on policy files. The parser recurses and builds a tree, so depth and
// number of values are checked before it starts.
const (
	MaxSize   = 4 << 20 // bytes
	maxDepth  = 64
	maxValues = 400_000
	maxErrors = 50
)

// Members of the language.
var (
	knownMembers       = []string{"acls", "groups", "tagOwners", "hosts"}
	unsupportedMembers = []string{
		"grants", "autoApprovers", "nodeAttrs", "tests", "sshTests", "ssh", "postures", "defaultSrcPosture", "ipsets",
		"derpMap", "disableIPv4", "OneCGNATRoute", "randomizeClientPort",
	}
	aclMembers            = []string{"action", "src", "dst", "proto"}
	unsupportedACLMembers = []string{"srcPosture"}
)

// Parse reads and checks a policy file. The error joins one *Error for each
// thing wrong, in the order of the file; errors.Is(err, ErrUnsupported) tells
// that parts of the language are used which this version does not know.
func Parse(src []byte) (*Policy, error) {
	r := &reader{src: src}
	if root, ok := r.load(); ok {
		r.read(root)
	}
	if len(r.errs) > 0 {
		slices.SortStableFunc(r.errs, func(a, b *Error) int {
			if a.Line != b.Line {
				return a.Line - b.Line
			}
			return a.Column - b.Column
		})
		var errs []error
		for _, e := range r.errs {
			errs = append(errs, e)
		}
		if r.more {
			errs = append(errs, fmt.Errorf("and more than %d errors in all", maxErrors))
		}
		return nil, errors.Join(errs...)
	}
	return &r.Policy, nil
}

// reader turns the syntax tree into a Policy.
type reader struct {
	Policy
	src  []byte
	errs []*Error
	more bool // errors beyond maxErrors were left out

	lineStarts []int
	runesAt    []int // characters before each block of runeBlock bytes

	hosts                           map[string]netip.Prefix
	tags                            map[string]bool
	groupNames, tagNames, hostNames []string
}

// position takes about the same time wherever at is, even in one long line.
func (r *reader) position(at int) (line, column int) {
	if r.lineStarts == nil {
		r.lineStarts = []int{0}
		for i, c := range r.src {
			if c == '\n' {
				r.lineStarts = append(r.lineStarts, i+1)
			}
		}
		n := 0
		for i, c := range r.src {
			if i%runeBlock == 0 {
				r.runesAt = append(r.runesAt, n)
			}
			if utf8.RuneStart(c) {
				n++
			}
		}
		r.runesAt = append(r.runesAt, n)
	}
	i, found := slices.BinarySearch(r.lineStarts, at)
	if !found {
		i--
	}
	return i + 1, r.runesBefore(at) - r.runesBefore(r.lineStarts[i]) + 1
}

const runeBlock = 512

// runesBefore counts the characters before a byte of the file.
func (r *reader) runesBefore(at int) int {
	n := r.runesAt[min(at/runeBlock, len(r.runesAt)-1)]
	for _, c := range r.src[min(at/runeBlock*runeBlock, len(r.src)):min(at, len(r.src))] {
		if utf8.RuneStart(c) {
			n++
		}
	}
	return n
}

func (r *reader) fail(at int, hint, format string, args ...any) *Error {
	e := &Error{Msg: fmt.Sprintf(format, args...), Hint: hint}
	if len(r.errs) == maxErrors {
		r.more = true
		return e
	}
	e.Line, e.Column = r.position(at)
	r.errs = append(r.errs, e)
	return e
}

func (r *reader) unsupported(at int, format string, args ...any) {
	r.fail(at, "", "%s is not supported yet", fmt.Sprintf(format, args...)).unsupported = true
}

// load checks what the parser would choke on, and parses.
func (r *reader) load() (hujson.Value, bool) {
	var none hujson.Value
	switch {
	case len(r.src) > MaxSize:
		r.src = r.src[:0]
		r.fail(0, "", "policy is longer than %d bytes", MaxSize)
		return none, false
	case bytes.HasPrefix(r.src, []byte("\ufeff")):
		r.fail(0, "save the file without it", "policy starts with a byte order mark")
		return none, false
	}
	if at := invalidUTF8(r.src); at >= 0 {
		r.fail(at, "", "invalid UTF-8")
		return none, false
	}
	if at, msg := r.scan(); msg != "" {
		r.fail(at, "", "%s", msg)
		return none, false
	}
	// The parser does not see the end of a comment on a last line that has no
	// end itself.
	src := r.src
	if bytes.Contains(src[bytes.LastIndexByte(src, '\n')+1:], []byte("//")) {
		src = append(src[:len(src):len(src)], '\n')
	}
	root, err := hujson.Parse(src)
	if err != nil {
		line, column := 1, 1
		msg := err.Error()
		// The parser tells the position in its message only.
		if n, _ := fmt.Sscanf(msg, "hujson: line %d, column %d:", &line, &column); n == 2 {
			_, msg, _ = strings.Cut(msg, ", column ")
			_, msg, _ = strings.Cut(msg, ": ")
		}
		r.errs = append(r.errs, &Error{Line: line, Column: column, Msg: msg})
		return none, false
	}
	return root, true
}

func invalidUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		c, n := utf8.DecodeRune(b[i:])
		if c == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// scan bounds nesting and the number of values without recursion. It skips
// strings and comments; other mistakes are the parser's to find.
func (r *reader) scan() (at int, msg string) {
	depth, values := 0, 0
	for i := 0; i < len(r.src); i++ {
		switch c := r.src[i]; c {
		case '"':
			for i++; i < len(r.src) && r.src[i] != '"'; i++ {
				if r.src[i] == '\\' {
					i++
				}
			}
		case '/':
			rest := r.src[i:]
			end := -1
			switch {
			case bytes.HasPrefix(rest, []byte("//")):
				end = bytes.IndexByte(rest, '\n')
			case bytes.HasPrefix(rest, []byte("/*")):
				if end = bytes.Index(rest[2:], []byte("*/")); end >= 0 {
					end += 3
				}
			default:
				continue
			}
			if end < 0 {
				return 0, ""
			}
			i += end
		case '{', '[':
			if depth++; depth > maxDepth {
				return i, fmt.Sprintf("more than %d levels of nesting", maxDepth)
			}
			values++
		case '}', ']':
			depth--
		case ',', ':':
			values++
		}
		if values > maxValues {
			return i, fmt.Sprintf("more than %d values", maxValues)
		}
	}
	return 0, ""
}

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
	seen := make(map[string]bool, len(obj.Members))
	var out []member
	for _, m := range obj.Members {
		name := m.Name.Value.(hujson.Literal).String()
		if seen[name] {
			r.fail(m.Name.StartOffset, "", "duplicate member %q", name)
			continue
		}
		seen[name] = true
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

// unknown complains about a member that is not handled.
func (r *reader) unknown(m member, known, unsupported []string) {
	if slices.Contains(unsupported, m.name) {
		r.unsupported(m.nameAt, "member %q", m.name)
		return
	}
	r.fail(m.nameAt, r.nearest(m.name, append(slices.Clone(known), unsupported...)), "unknown member %q", m.name)
}

func (r *reader) read(root hujson.Value) {
	top := make(map[string]member)
	for _, m := range r.members(root, "policy") {
		if !slices.Contains(knownMembers, m.name) {
			r.unknown(m, knownMembers, unsupportedMembers)
			continue
		}
		top[m.name] = m
	}
	// Names first: they are used before they are defined.
	groups := r.names(top, "groups", "group:")
	owners := r.names(top, "tagOwners", "tag:")
	r.groups = make(map[string][]userRef, len(groups))
	for _, m := range groups {
		r.groups[m.name] = nil
		r.groupNames = append(r.groupNames, m.name)
	}
	r.tags = make(map[string]bool, len(owners))
	for _, m := range owners {
		r.tags[m.name] = true
		r.tagNames = append(r.tagNames, m.name)
	}
	r.readHosts(top)
	for _, m := range groups {
		r.readGroup(m)
	}
	r.tagOwners = make(map[string][]*selector, len(owners))
	for _, m := range owners {
		list := []*selector{}
		for _, v := range r.array(m.value, m.name) {
			if s, ok := r.text(v, "owner of a tag"); ok {
				if sel := r.selector(s, v.StartOffset, inOwners); sel != nil {
					list = append(list, sel)
				}
			}
		}
		r.tagOwners[m.name] = list
	}
	if m, ok := top["acls"]; ok {
		for i, v := range r.array(m.value, `"acls"`) {
			r.readACL(i, v)
		}
		return
	}
	// A policy that does not speak of access leaves it open, as everywhere where
	// this language is used. One that says "acls": [] denies everything.
	all := &selector{kind: kindAll}
	r.acls = []acl{{name: "default", srcs: []*selector{all}, dsts: []dest{{all, []portRange{{0, 65535}}}}}}
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

func (r *reader) readACL(i int, v hujson.Value) {
	a := acl{name: fmt.Sprintf("acls[%d]", i)}
	a.line, _ = r.position(v.StartOffset)
	got := make(map[string]member)
	before := len(r.errs)
	for _, m := range r.members(v, a.name) {
		if !slices.Contains(aclMembers, m.name) {
			r.unknown(m, aclMembers, unsupportedACLMembers)
			continue
		}
		got[m.name] = m
	}
	if _, ok := v.Value.(*hujson.Object); !ok {
		return
	}
	for _, name := range []string{"action", "src", "dst"} {
		if _, ok := got[name]; !ok && len(r.errs) == before {
			r.fail(v.StartOffset, "", "%s has no %q", a.name, name)
		}
	}
	if m, ok := got["action"]; ok {
		if s, ok := r.text(m.value, "action"); ok && s != "accept" {
			r.fail(m.value.StartOffset, `everything is denied but what is accepted, so the only action is "accept"`, "action %q", s)
		}
	}
	hasPorts := true
	if m, ok := got["proto"]; ok {
		if s, ok := r.text(m.value, "proto"); ok {
			if a.protos, hasPorts, ok = parseProto(s); !ok {
				r.fail(m.value.StartOffset, "", "unknown protocol %q", s)
				hasPorts = true
			}
		}
	}
	if m, ok := got["src"]; ok {
		for _, v := range r.array(m.value, "src") {
			if s, ok := r.text(v, "src"); ok {
				if sel := r.selector(s, v.StartOffset, inSrc); sel != nil {
					a.srcs = append(a.srcs, sel)
				}
			}
		}
	}
	if m, ok := got["dst"]; ok {
		for _, v := range r.array(m.value, "dst") {
			s, ok := r.text(v, "dst")
			if !ok {
				continue
			}
			d, ok := r.dest(s, v.StartOffset)
			if !ok {
				continue
			}
			if d.sel.kind == kindSelf && !selfSources(a.srcs) {
				r.fail(v.StartOffset, "", "autogroup:self can only be used with users, groups, or supported autogroups")
			}
			if !hasPorts && slices.ContainsFunc(d.ports, func(p portRange) bool { return p != portRange{0, 65535} }) {
				r.fail(v.StartOffset, `write "*"`, "dst %q: the protocol has no ports", s)
			}
			a.dsts = append(a.dsts, d)
		}
	}
	r.acls = append(r.acls, a)
}

// selfSources reports whether every source is made of users, without whom there
// is no self.
func selfSources(srcs []*selector) bool {
	for _, s := range srcs {
		switch s.kind {
		case kindTag, kindTagged, kindPrefix:
			return false
		}
	}
	return true
}
