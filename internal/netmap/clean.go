package netmap

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"mesh/control/wire"
)

// maxPrefixes bounds what one node may claim.
const maxPrefixes = 4096

// clean returns a copy of a node as it was sent, without what makes no sense,
// which it reports. It fails for a node that cannot be one at all.
func clean(in *wire.Node, report func(string, ...any)) (*wire.Node, error) {
	switch {
	case in == nil:
		return nil, fmt.Errorf("null node")
	case in.ID <= 0:
		return nil, fmt.Errorf("node with number %d", in.ID)
	case in.Key.IsZero():
		return nil, fmt.Errorf("node %d has no key", in.ID)
	}
	n := *in
	if n.Name != "" && !validName(normalName(n.Name)) {
		report("node %d: name %q makes no sense", n.ID, n.Name)
		n.Name = ""
	}
	if n.HomeDERP == 0 {
		n.HomeDERP = legacyDERP(n.LegacyDERP)
	}
	if n.HomeDERP < 0 || n.HomeDERP > 65535 {
		report("node %d: relay region %d makes no sense", n.ID, n.HomeDERP)
		n.HomeDERP = 0
	}
	n.LegacyDERP = ""
	if n.UnsignedPeerAPIOnly {
		n.IsJailed = true // it may reach the peer API alone, and we have none
	}
	if n.Hostinfo == nil {
		n.Hostinfo = noHostinfo
	}
	same := n.AllowedIPs == nil || slices.Equal(n.AllowedIPs, n.Addresses)
	n.Addresses = exact(cleanPrefixes(n.ID, n.Addresses, validAddress, report))
	if same {
		n.AllowedIPs = n.Addresses
	} else {
		n.AllowedIPs = exact(cleanPrefixes(n.ID, n.AllowedIPs, validRoute, report))
	}
	n.Endpoints = exact(n.Endpoints)
	return &n, nil
}

// noHostinfo is what nodes have that tell nothing; they share it.
var noHostinfo = &wire.Hostinfo{}

// exact returns list in no more memory than it needs: a decoder leaves room for
// more, and a map is kept for long.
func exact[T any](list []T) []T {
	if cap(list)-len(list) < 2 {
		return list
	}
	return append(make([]T, 0, len(list)), list...)
}

func legacyDERP(s string) int {
	rest, ok := strings.CutPrefix(s, "127.3.3.40:")
	if !ok {
		return 0
	}
	region, err := strconv.ParseUint(rest, 10, 16)
	if err != nil {
		return 0
	}
	return int(region)
}

// cleanPrefixes returns the valid ones of list, each once, never nil. It copies
// only if it has to.
func cleanPrefixes(id NodeID, list []netip.Prefix, valid func(netip.Prefix) bool, report func(string, ...any)) []netip.Prefix {
	if len(list) > maxPrefixes {
		report("node %d: %d prefixes are too many, the first %d count", id, len(list), maxPrefixes)
		list = list[:maxPrefixes:maxPrefixes]
	}
	if list != nil && !slices.ContainsFunc(list, func(p netip.Prefix) bool { return !valid(p) }) && allDiffer(list) {
		return list
	}
	seen := make(map[netip.Prefix]bool, len(list))
	out := make([]netip.Prefix, 0, len(list))
	for _, p := range list {
		switch {
		case !valid(p):
			report("node %d: prefix %v makes no sense", id, p)
		case !seen[p]:
			seen[p] = true
			out = append(out, p)
		}
	}
	return out
}

// allDiffer reports that a short list holds nothing twice; of a long one it says
// nothing.
func allDiffer(list []netip.Prefix) bool {
	if len(list) > 8 {
		return false
	}
	for i, p := range list {
		if slices.Contains(list[:i], p) {
			return false
		}
	}
	return true
}

// validAddress is for the own addresses of nodes.
func validAddress(p netip.Prefix) bool {
	a := p.Addr()
	return p.IsSingleIP() && !a.Is4In6() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}

// validRoute is for what nodes carry traffic to.
func validRoute(p netip.Prefix) bool {
	return p.IsValid() && !p.Addr().Is4In6() && p == p.Masked() && !p.Addr().IsMulticast() && !p.Addr().IsLoopback()
}

// validName is for normal names; strict enough to be printed and resolved.
func validName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		if strings.ContainsFunc(label, func(c rune) bool {
			return c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z')
		}) {
			return false
		}
	}
	return true
}

// isExit reports whether p is an offer to carry traffic to everywhere.
func isExit(p netip.Prefix) bool { return p.Bits() == 0 }

// claimed returns the prefixes that a clean node claims beside self: its own
// addresses and its routes.
func claimed(n, self *wire.Node) (own, routes []netip.Prefix) {
	if n == nil {
		return nil, nil
	}
	for _, p := range n.Addresses {
		if !slices.Contains(self.Addresses, p) {
			own = append(own, p)
		}
	}
	for _, p := range n.AllowedIPs {
		if !isExit(p) && !slices.Contains(n.Addresses, p) && !slices.Contains(self.Addresses, p) {
			routes = append(routes, p)
		}
	}
	return own, routes
}
