package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// kind is the kind of a selector.
type kind uint8

const (
	kindAll      kind = iota // "*"
	kindUser                 // name: the user
	kindGroup                // name: "group:…"
	kindTag                  // name: "tag:…"
	kindMember               // autogroup:member
	kindTagged               // autogroup:tagged
	kindSelf                 // autogroup:self, destinations only
	kindInternet             // autogroup:internet, destinations only
	kindPrefix               // prefix: an address, network, or host of "hosts"
	kindAnywhere             // autogroup:danger-all, sources only
	kindRole                 // name: the role that the owner has
	kindDomain               // name: the domain of the owner's address
	kindVia                  // prefix, behind routers with the tag name
	kindViaNet               // the internet, behind exit nodes with the tag name
)

// selector is a parsed source or destination.
type selector struct {
	kind   kind
	name   string
	prefix netip.Prefix
}

// String returns the selector in the normal form of its kind. Two selectors are
// equal if their strings are.
func (s selector) String() string {
	switch s.kind {
	case kindAll:
		return "*"
	case kindUser:
		if !strings.Contains(s.name, "@") {
			return s.name + "@"
		}
	case kindMember:
		return "autogroup:member"
	case kindTagged:
		return "autogroup:tagged"
	case kindSelf:
		return "autogroup:self"
	case kindInternet:
		return "autogroup:internet"
	case kindAnywhere:
		return "autogroup:danger-all"
	case kindRole:
		return "autogroup:" + s.name
	case kindDomain:
		return "user:*@" + s.name
	case kindPrefix:
		return prefixText(s.prefix)
	case kindVia:
		return prefixText(s.prefix) + " via " + s.name
	case kindViaNet:
		return "autogroup:internet via " + s.name
	}
	return s.name
}

// prefixText leaves out the length of what is one address.
func prefixText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// Where a selector stands; it decides what is allowed there.
type place uint8

const (
	inSrc place = iota
	inDst
	inGroup
	inOwners
	inApprovers
	inTarget // of nodeAttrs
)

func (p place) String() string {
	return [...]string{"src", "dst", "group", "tagOwners", "autoApprovers", "target"}[p]
}

// autogroups of the language. Those of the last lines name roles of users.
var autogroups = map[string]selector{
	"autogroup:member":        {kind: kindMember},
	"autogroup:tagged":        {kind: kindTagged},
	"autogroup:self":          {kind: kindSelf},
	"autogroup:internet":      {kind: kindInternet},
	"autogroup:danger-all":    {kind: kindAnywhere},
	"autogroup:admin":         {kind: kindRole, name: "admin"},
	"autogroup:owner":         {kind: kindRole, name: "owner"},
	"autogroup:it-admin":      {kind: kindRole, name: "it-admin"},
	"autogroup:network-admin": {kind: kindRole, name: "network-admin"},
	"autogroup:billing-admin": {kind: kindRole, name: "billing-admin"},
	"autogroup:auditor":       {kind: kindRole, name: "auditor"},
}

// unsupportedAutogroups have no meaning in a mesh: nothing is shared between
// two, and users of a node's operating system are not known.
var unsupportedAutogroups = []string{"autogroup:shared", "autogroup:nonroot"}

// autogroupNames lists the autogroups, to suggest one.
func autogroupNames() []string {
	var names []string
	for name := range autogroups {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// may reports whether a selector makes sense where it stands.
func (p place) may(k kind) bool {
	switch p {
	case inGroup:
		return k == kindUser
	case inOwners:
		return k == kindUser || k == kindGroup || k == kindTag || k == kindMember || k == kindRole || k == kindDomain
	case inApprovers:
		return k == kindUser || k == kindGroup || k == kindTag || k == kindMember || k == kindTagged || k == kindRole || k == kindDomain
	case inTarget:
		return k != kindSelf && k != kindInternet && k != kindAnywhere
	case inSrc:
		return k != kindSelf && k != kindInternet
	default:
		return k != kindAnywhere
	}
}

// selectors reads one word, which may stand for several selectors: an IP set has
// several networks. What is wrong was reported if ok is false.
func (r *reader) selectors(s string, at int, where place) (list []*selector, ok bool) {
	if !strings.HasPrefix(s, "ipset:") {
		sel := r.selector(s, at, where)
		return []*selector{sel}, sel != nil
	}
	if !where.may(kindPrefix) {
		r.fail(at, "", "%q is not allowed in %s", s, where)
		return nil, false
	}
	set, known := r.ipsets[s]
	if !known {
		r.fail(at, r.nearest(s, r.ipsetNames), "undefined IP set %q", s)
		return nil, false
	}
	for _, p := range set {
		list = append(list, &selector{kind: kindPrefix, prefix: p})
	}
	return list, true
}

// selector reads one selector. A nil result was reported.
func (r *reader) selector(s string, at int, where place) *selector {
	sel := r.anySelector(s, at, where)
	if sel != nil && !where.may(sel.kind) {
		hint := ""
		switch {
		case sel.kind == kindInternet:
			hint = "it is a destination"
		case sel.kind == kindSelf:
			hint = "it is a destination: the nodes of the source's user"
		case sel.kind == kindAnywhere && where == inDst:
			hint = `to mean all addresses write "*" or "autogroup:internet"`
		}
		r.fail(at, hint, "%q is not allowed in %s", s, where)
		return nil
	}
	return sel
}

// anySelector reads a selector, wherever it stands.
func (r *reader) anySelector(s string, at int, where place) *selector {
	fail := func(hint, format string, args ...any) *selector {
		r.fail(at, hint, format, args...)
		return nil
	}
	switch {
	case s == "":
		return fail("", "empty %s", where)
	case s == "*":
		return &selector{kind: kindAll}
	case strings.HasPrefix(s, "group:"):
		if where == inGroup {
			return fail("list its members", "group %q within a group", s)
		}
		if _, ok := r.groups[s]; !ok {
			return fail(r.nearest(s, r.groupNames), "undefined group %q", s)
		}
		return &selector{kind: kindGroup, name: s}
	case strings.HasPrefix(s, "tag:"):
		if where == inGroup {
			return fail("groups have users as members", "tag %q within a group", s)
		}
		if !r.HasTag(s) {
			return fail(r.nearest(s, r.tagNames), "undefined tag %q", s)
		}
		return &selector{kind: kindTag, name: s}
	case strings.HasPrefix(s, "autogroup:"):
		if sel, ok := autogroups[s]; ok {
			return &sel
		}
		if slices.Contains(unsupportedAutogroups, s) {
			r.unsupported(at, "%q", s)
			return nil
		}
		return fail(r.nearest(s, autogroupNames()), "unknown autogroup %q", s)
	case strings.HasPrefix(s, "svc:"):
		r.unsupported(at, "%q", s)
		return nil
	case strings.HasPrefix(s, "user:"):
		return r.domain(s, at)
	case strings.Contains(s, "@"):
		user, ok := parseUser(s)
		if !ok {
			return fail("", "malformed user %q", s)
		}
		line, column := r.position(at)
		r.users = append(r.users, namedUser{user, line, column})
		return &selector{kind: kindUser, name: string(user)}
	case !where.may(kindPrefix):
		hint := ""
		if isName(s) {
			hint = fmt.Sprintf("a user is written %q", s+"@")
		}
		return fail(hint, "%q is not allowed in %s", s, where)
	}
	if h, ok := r.hosts[s]; ok {
		return r.prefixSelector(h, s, at, where)
	}
	p, err := parsePrefix(s)
	if err == nil {
		return r.prefixSelector(p, s, at, where)
	}
	if isName(s) {
		hint := r.nearest(s, r.hostNames)
		if hint == "" {
			hint = fmt.Sprintf("a user is written %q", s+"@")
		}
		return fail(hint, "undefined host %q", s)
	}
	return fail("", "%v", err)
}

// domain reads "user:*@example.com": everybody with an address there.
func (r *reader) domain(s string, at int) *selector {
	d, ok := strings.CutPrefix(s, "user:*@")
	d = strings.TrimSuffix(d, ".")
	if !ok || !isName(d) || strings.HasPrefix(d, ".") || strings.Contains(d, "..") {
		r.fail(at, `all users of a domain are written "user:*@example.com", one user "alice@example.com"`, "malformed selector %q", s)
		return nil
	}
	return &selector{kind: kindDomain, name: string(canonicalUser(d))}
}

func (r *reader) prefixSelector(p netip.Prefix, s string, at int, where place) *selector {
	if p.Bits() == 0 {
		hint := `to mean all addresses write "*"`
		if where == inDst {
			hint += ` or "autogroup:internet"`
		}
		r.fail(at, hint, "%s %q", where, s)
		return nil
	}
	return &selector{kind: kindPrefix, prefix: p}
}

// parseUser reads "alice@example.com" or "bob@".
func parseUser(s string) (userRef, bool) {
	name, domain, _ := strings.Cut(s, "@")
	if name == "" || strings.ContainsAny(s, " \t\r\n,:\"\\/<>()[]") || strings.Contains(domain, "@") {
		return "", false
	}
	if domain == "" {
		return canonicalUser(name), true
	}
	domain = strings.TrimSuffix(domain, ".")
	if domain == "" || strings.HasPrefix(domain, ".") || strings.Contains(domain, "..") {
		return "", false
	}
	return canonicalUser(name + "@" + domain), true
}

// parsePrefix reads an address or a network. Bits behind the prefix do not
// count, and IPv4-mapped addresses mean the IPv4 ones.
func parsePrefix(s string) (netip.Prefix, error) {
	bad := fmt.Errorf("%q is neither an address nor a network", s)
	var p netip.Prefix
	if strings.Contains(s, "/") {
		var err error
		if p, err = netip.ParsePrefix(s); err != nil {
			return p, bad
		}
	} else {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return p, bad
		}
		if a.Zone() != "" {
			return p, fmt.Errorf("%q has a zone", s)
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return p, bad
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// isName reports whether s could be the name of a host.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for _, c := range s {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}
