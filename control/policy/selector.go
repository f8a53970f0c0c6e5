package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Where a selector stands; it decides what is allowed there.
type place uint8

const (
	inSrc place = iota
	inDst
	inGroup
	inOwners
)

func (p place) String() string {
	return [...]string{"src", "dst", "group", "tagOwners"}[p]
}

// Autogroups of the language.
var (
	knownAutogroups       = []string{"autogroup:member", "autogroup:tagged", "autogroup:self", "autogroup:internet"}
	unsupportedAutogroups = []string{
		"autogroup:admin", "autogroup:owner", "autogroup:it-admin", "autogroup:network-admin", "autogroup:billing-admin",
		"autogroup:auditor", "autogroup:danger-all", "autogroup:shared", "autogroup:nonroot",
	}
)

// selector reads one selector. A nil result was reported.
func (r *reader) selector(s string, at int, where place) *selector {
	fail := func(hint, format string, args ...any) *selector {
		r.fail(at, hint, format, args...)
		return nil
	}
	switch {
	case s == "":
		return fail("", "empty %s", where)
	case s == "*":
		if where == inGroup || where == inOwners {
			return fail("", "%q is not allowed in %s", s, where)
		}
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
		if !r.tags[s] {
			return fail(r.nearest(s, r.tagNames), "undefined tag %q", s)
		}
		return &selector{kind: kindTag, name: s}
	case strings.HasPrefix(s, "autogroup:"):
		return r.autogroup(s, at, where)
	case strings.HasPrefix(s, "svc:"), strings.HasPrefix(s, "ipset:"):
		r.unsupported(at, "%q", s)
		return nil
	case strings.Contains(s, "@"):
		user, ok := parseUser(s)
		if !ok {
			return fail("", "malformed user %q", s)
		}
		line, column := r.position(at)
		r.users = append(r.users, namedUser{user, line, column})
		return &selector{kind: kindUser, name: string(user)}
	case where == inGroup || where == inOwners:
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

func (r *reader) autogroup(s string, at int, where place) *selector {
	var k kind
	switch s {
	case "autogroup:member":
		k = kindMember
	case "autogroup:tagged":
		k = kindTagged
	case "autogroup:self":
		k = kindSelf
	case "autogroup:internet":
		k = kindInternet
	default:
		if slices.Contains(unsupportedAutogroups, s) {
			r.unsupported(at, "%q", s)
		} else {
			r.fail(at, r.nearest(s, knownAutogroups), "unknown autogroup %q", s)
		}
		return nil
	}
	if where == inGroup || where == inOwners && k != kindMember || where == inSrc && (k == kindSelf || k == kindInternet) {
		r.fail(at, "", "%q is not allowed in %s", s, where)
		return nil
	}
	return &selector{kind: k}
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

// dest reads a destination, "selector:ports".
func (r *reader) dest(s string, at int) (dest, bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		r.fail(at, fmt.Sprintf("write %q for all of them", s+":*"), "dst %q has no ports", s)
		return dest{}, false
	}
	name, ports := s[:i], s[i+1:]
	switch {
	case name == "tag" || name == "group" || name == "autogroup" || name == "svc" || name == "ipset":
		r.fail(at, fmt.Sprintf("write %q for all of them", s+":*"), "dst %q has no ports", s)
		return dest{}, false
	case strings.HasPrefix(name, "[") && strings.HasSuffix(name, "]"):
		name = name[1 : len(name)-1]
	}
	list, msg := parsePorts(ports)
	if msg != "" {
		r.fail(at, "", "dst %q: %s", s, msg)
	}
	sel := r.selector(name, at, inDst)
	return dest{sel, list}, sel != nil && msg == ""
}

// parsePorts reads "*", "22", "80,443" or "8000-8999".
func parsePorts(s string) (list []portRange, msg string) {
	if s == "" {
		return nil, "no ports"
	}
	for item := range strings.SplitSeq(s, ",") {
		if item == "*" {
			list = append(list, portRange{0, 65535})
			continue
		}
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		a, okA := parsePort(first)
		b, okB := parsePort(last)
		switch {
		case !okA || !okB:
			return nil, fmt.Sprintf("bad port range %q", item)
		case a == 0:
			return nil, fmt.Sprintf("port range %q: the first port must be greater than 0; \"*\" means all", item)
		case a > b:
			return nil, fmt.Sprintf("port range %q is reversed", item)
		}
		list = append(list, portRange{a, b})
	}
	return list, ""
}

func parsePort(s string) (uint16, bool) {
	if s == "" || s[0] < '0' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

// protocols by name. "icmp" means that of both IP versions.
var protocols = map[string][]int{
	"icmp": {1, 58}, "igmp": {2}, "ipv4": {4}, "ip-in-ip": {4}, "tcp": {6}, "egp": {8}, "igp": {9}, "udp": {17},
	"gre": {47}, "esp": {50}, "ah": {51}, "ipv6-icmp": {58}, "sctp": {132},
}

// parseProto reads a protocol's name or number. Whether it has ports decides
// which destinations may go with it.
func parseProto(s string) (protos []int, ports, ok bool) {
	if p, known := protocols[strings.ToLower(s)]; known {
		return p, p[0] == 6 || p[0] == 17 || p[0] == 132, true
	}
	if s == "" || s[0] < '0' || s[0] > '9' {
		return nil, false, false
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n == 0 {
		return nil, false, false
	}
	return []int{int(n)}, n == 6 || n == 17 || n == 132, true
}

// nearest suggests the known word most like s. Of very long lists only the
// beginning is searched, and nothing is when the error will not be reported.
func (r *reader) nearest(s string, known []string) string {
	const longest, most = 64, 1000
	if len(s) > longest || len(r.errs) >= maxErrors {
		return ""
	}
	best, least := "", len(s)/3+1
	for _, k := range known[:min(len(known), most)] {
		if len(k) > longest {
			continue
		}
		if d := distance(strings.ToLower(s), strings.ToLower(k), least); d < least || d == least && best == "" {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", best)
}

// distance counts the single-byte edits between a and b; beyond most the exact
// count does not matter.
func distance(a, b string, most int) int {
	if len(a)-len(b) > most || len(b)-len(a) > most {
		return most + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
