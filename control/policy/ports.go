package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// allPorts is what "*" means.
var allPorts = portRange{0, 65535}

// dests reads a destination of "acls", "selector:ports". It is several if the
// selector is an IP set, and none if something is wrong.
func (r *reader) dests(s string, at int) (out []dest) {
	name, list, ok := r.splitDest(s, at)
	if name == "" && !ok {
		return nil
	}
	sels, known := r.selectors(name, at, inDst)
	if !ok || !known {
		return nil
	}
	for _, sel := range sels {
		out = append(out, dest{sel, list})
	}
	return out
}

// splitDest takes "selector:ports" apart.
func (r *reader) splitDest(s string, at int) (name string, ports []portRange, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		r.fail(at, fmt.Sprintf("write %q for all of them", s+":*"), "dst %q has no ports", s)
		return "", nil, false
	}
	name, text := s[:i], s[i+1:]
	switch {
	case slices.Contains([]string{"tag", "group", "autogroup", "svc", "ipset", "user"}, name):
		r.fail(at, fmt.Sprintf("write %q for all of them", s+":*"), "dst %q has no ports", s)
		return "", nil, false
	case strings.HasPrefix(name, "[") && strings.HasSuffix(name, "]"):
		name = name[1 : len(name)-1]
	}
	ports, msg := parsePorts(text)
	if msg != "" {
		r.fail(at, "", "dst %q: %s", s, msg)
	}
	return name, ports, msg == ""
}

// parsePorts reads "*", "22", "80,443" or "8000-8999".
func parsePorts(s string) (list []portRange, msg string) {
	if s == "" {
		return nil, "no ports"
	}
	for item := range strings.SplitSeq(s, ",") {
		if item == "*" {
			list = append(list, allPorts)
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

// protocols by name.
var protocols = map[string][]int{
	"icmp": {1}, "igmp": {2}, "ipv4": {4}, "ip-in-ip": {4}, "tcp": {6}, "egp": {8}, "igp": {9}, "udp": {17},
	"gre": {47}, "esp": {50}, "ah": {51}, "ipv6-icmp": {58}, "sctp": {132}, "fc": {133},
}

// parseProto reads a protocol's name or number. Whether it has ports decides
// which destinations may go with it.
func parseProto(s string) (protos []int, ports, ok bool) {
	if p, known := protocols[strings.ToLower(s)]; known {
		return p, hasPorts(p[0]), true
	}
	if !isDigits(s) || s[0] == '0' {
		return nil, false, false
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil {
		return nil, false, false
	}
	return []int{int(n)}, hasPorts(int(n)), true
}

// hasPorts reports whether packets of the protocol have ports that rules see.
func hasPorts(proto int) bool { return proto == 6 || proto == 17 || proto == 132 }

func isDigits(s string) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != ""
}
