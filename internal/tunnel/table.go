package tunnel

import (
	"cmp"
	"net/netip"
	"slices"
)

// lpm finds the value of the longest prefix that holds an address. The zero
// value is empty. It is not safe for concurrent changes.
type lpm[T any] struct {
	hosts map[netip.Addr]T   // full-length prefixes, by far the most
	nets  map[netip.Prefix]T // all others, masked
	lens4 []int              // lengths in nets, longest first
	lens6 []int
	uses4 [33]int
	uses6 [129]int
	zero  T
}

func (l *lpm[T]) set(p netip.Prefix, v T) {
	if l.hosts == nil {
		l.hosts, l.nets = make(map[netip.Addr]T), make(map[netip.Prefix]T)
	}
	if p.IsSingleIP() {
		l.hosts[p.Addr()] = v
		return
	}
	if _, ok := l.nets[p]; !ok {
		l.count(p, 1)
	}
	l.nets[p] = v
}

func (l *lpm[T]) remove(p netip.Prefix) {
	if p.IsSingleIP() {
		delete(l.hosts, p.Addr())
	} else if _, ok := l.nets[p]; ok {
		delete(l.nets, p)
		l.count(p, -1)
	}
}

func (l *lpm[T]) count(p netip.Prefix, by int) {
	uses, lens := l.uses6[:], &l.lens6
	if p.Addr().Is4() {
		uses, lens = l.uses4[:], &l.lens4
	}
	before := uses[p.Bits()]
	uses[p.Bits()] += by
	switch {
	case before == 0:
		*lens = append(*lens, p.Bits())
		slices.SortFunc(*lens, func(a, b int) int { return cmp.Compare(b, a) })
	case before+by == 0:
		*lens = slices.DeleteFunc(*lens, func(n int) bool { return n == p.Bits() })
	}
}

func (l *lpm[T]) lookup(a netip.Addr) (T, bool) {
	if v, ok := l.hosts[a]; ok {
		return v, true
	}
	lens := l.lens6
	if a.Is4() {
		lens = l.lens4
	}
	for _, n := range lens {
		p, err := a.Prefix(n)
		if err != nil {
			break
		}
		if v, ok := l.nets[p]; ok {
			return v, true
		}
	}
	return l.zero, false
}

// usable returns p in the only form that the table knows: masked, and never an
// IPv4 prefix dressed up as IPv6, which would be a second name for the same.
func usable(p netip.Prefix) (netip.Prefix, bool) {
	if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
		return netip.Prefix{}, false
	}
	return p.Masked(), true
}

// table says which peer owns which addresses. A prefix claimed by two peers is
// owned by none, and hides the shorter prefixes around it.
type table struct {
	owners lpm[*peer] // nil value: contested
	claims map[netip.Prefix][]*peer
}

func (tb *table) owner(a netip.Addr) *peer {
	p, _ := tb.owners.lookup(a)
	return p
}

func (tb *table) claim(prefix netip.Prefix, p *peer) {
	tb.change(prefix, append(tb.claims[prefix], p))
}

func (tb *table) release(prefix netip.Prefix, p *peer) {
	tb.change(prefix, slices.DeleteFunc(tb.claims[prefix], func(q *peer) bool { return q == p }))
}

func (tb *table) change(prefix netip.Prefix, claims []*peer) {
	if tb.claims == nil {
		tb.claims = make(map[netip.Prefix][]*peer)
	}
	switch len(claims) {
	case 0:
		delete(tb.claims, prefix)
		tb.owners.remove(prefix)
		return
	case 1:
		tb.owners.set(prefix, claims[0])
	default:
		tb.owners.set(prefix, nil)
	}
	tb.claims[prefix] = claims
}
