package policy

import (
	"net/netip"
	"slices"

	"mesh/internal/iprange"
)

// changed voids what was computed from the selector's nodes.
func (s *selSet) changed() {
	for _, l := range s.inSrc {
		l.valid = false
	}
}

func (s *selSet) addAddrs(addrs []netip.Addr) {
	for _, a := range addrs {
		if !s.stale {
			s.addrs = insertAddr(s.addrs, a)
		}
	}
}

func (s *selSet) removeAddrs(addrs []netip.Addr) {
	for _, a := range addrs {
		if !s.stale {
			s.addrs = removeAddr(s.addrs, a)
		}
	}
}

// ranges returns the merged addresses of the nodes.
func (s *selSet) ranges(c *Compiled) []iprange.Range {
	if s.stale {
		s.stale = false
		s.addrs = s.addrs[:0]
		for _, slot := range s.nodes {
			for _, a := range c.slots[slot].Addrs {
				s.addrs = append(s.addrs, iprange.Range{First: a, Last: a})
			}
		}
		s.addrs = merge(s.addrs)
	}
	return s.addrs
}

// fill brings the cache of a source list up to date.
func (l *srcList) fill(c *Compiled) {
	if l.valid {
		return
	}
	l.valid = true
	l.ranges, l.text = nil, nil
	anywhere := false
	for _, s := range l.sels {
		switch s.kind {
		case kindPrefix:
			l.ranges = append(l.ranges, iprange.Of(s.prefix))
		case kindAll:
			l.ranges = append(l.ranges, meshRanges...)
			for r := range c.routers {
				l.ranges = append(l.ranges, iprange.Of(r))
			}
		case kindAnywhere:
			anywhere = true
			l.ranges = append(l.ranges, everywhere...)
		default:
			l.ranges = append(l.ranges, s.ranges(c)...)
		}
	}
	l.ranges = merge(l.ranges)
	if l.text = texts(l.ranges); anywhere {
		l.text = []string{"*"}
	}
}

func texts(list []iprange.Range) []string {
	out := make([]string, len(list))
	for i, r := range list {
		out[i] = r.String()
	}
	return out
}

// self returns the addresses of the nodes of n's owner that are among the
// sources.
func (l *srcList) self(c *Compiled, n *node) []iprange.Range {
	var own []iprange.Range
	l.eachOwn(c, n, func(o *node) {
		for _, a := range o.Addrs {
			own = append(own, iprange.Range{First: a, Last: a})
		}
	})
	return merge(own)
}

// eachOwn calls f for the nodes of n's owner that are among the sources.
func (l *srcList) eachOwn(c *Compiled, n *node, f func(o *node)) {
	user := c.byUser[n.user]
	if n.user == "" || user == nil {
		return
	}
	for _, slot := range *user {
		o := c.slots[slot]
		if slices.ContainsFunc(l.sels, o.in) {
			f(o)
		}
	}
}

// in reports whether a selector matches the node.
func (n *node) in(s *selSet) bool {
	_, ok := slices.BinarySearchFunc(n.sels, s, func(x, y *selSet) int { return x.id - y.id })
	return ok
}

// sources returns the sources of a rule at n, as filters have them.
func (c *Compiled) sources(l *srcList, n *node, self bool) []string {
	if self {
		return texts(l.self(c, n))
	}
	l.fill(c)
	return l.text
}
