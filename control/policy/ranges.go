package policy

import (
	"net/netip"
	"slices"
)

// addrRange is a set of neighbouring addresses of one family, both ends
// included.
type addrRange struct{ first, last netip.Addr }

func rangeOf(p netip.Prefix) addrRange {
	p = p.Masked()
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return addrRange{p.Addr(), last}
}

// merge sorts ranges and joins those that overlap or touch.
func merge(list []addrRange) []addrRange {
	slices.SortFunc(list, func(a, b addrRange) int { return a.first.Compare(b.first) })
	out := list[:0]
	for _, x := range list {
		if n := len(out); n > 0 && x.first.BitLen() == out[n-1].last.BitLen() {
			end := out[n-1].last
			if next := end.Next(); !end.Less(x.first) || next.IsValid() && next == x.first {
				if end.Less(x.last) {
					out[n-1].last = x.last
				}
				continue
			}
		}
		out = append(out, x)
	}
	return out
}

// String returns the form of filter rules: an address, a network or "a-b".
func (r addrRange) String() string {
	if r.first == r.last {
		return r.first.String()
	}
	// The range is a network if both ends share a prefix behind which one has
	// only zeros and the other only ones.
	a, b := r.first.AsSlice(), r.last.AsSlice()
	n := 0
	for n < len(a)*8 && bit(a, n) == bit(b, n) {
		n++
	}
	if p := netip.PrefixFrom(r.first, n); rangeOf(p) == r {
		return p.String()
	}
	return r.first.String() + "-" + r.last.String()
}

func bit(b []byte, i int) byte { return b[i/8] >> (7 - i%8) & 1 }

// meshRanges is what "*" means as a source, besides approved routes: all
// addresses that nodes of a mesh may have. 100.115.92.0/23 is left to virtual
// machines of ChromeOS.
var meshRanges = []addrRange{
	{netip.MustParseAddr("100.64.0.0"), netip.MustParseAddr("100.115.91.255")},
	{netip.MustParseAddr("100.115.94.0"), netip.MustParseAddr("100.127.255.255")},
	rangeOf(netip.MustParsePrefix("fd7a:115c:a1e0::/48")),
}

// everywhere is all addresses.
var everywhere = []addrRange{rangeOf(netip.MustParsePrefix("0.0.0.0/0")), rangeOf(netip.MustParsePrefix("::/0"))}

// at returns the place of the first range that ends at a or behind it.
func at(list []addrRange, a netip.Addr) int {
	i, _ := slices.BinarySearchFunc(list, a, func(r addrRange, a netip.Addr) int { return r.last.Compare(a) })
	return i
}

// insertAddr adds an address to merged ranges.
func insertAddr(list []addrRange, a netip.Addr) []addrRange {
	i := at(list, a)
	if i < len(list) && list[i].contains(a) {
		return list
	}
	joins := i > 0 && list[i-1].last.BitLen() == a.BitLen() && list[i-1].last.Next() == a
	precedes := i < len(list) && list[i].first.BitLen() == a.BitLen() && a.Next() == list[i].first
	switch {
	case joins && precedes:
		list[i-1].last = list[i].last
		return slices.Delete(list, i, i+1)
	case joins:
		list[i-1].last = a
	case precedes:
		list[i].first = a
	default:
		return slices.Insert(list, i, addrRange{a, a})
	}
	return list
}

// removeAddr takes an address out of merged ranges.
func removeAddr(list []addrRange, a netip.Addr) []addrRange {
	i := at(list, a)
	if i == len(list) || !list[i].contains(a) {
		return list
	}
	switch r := list[i]; {
	case r.first == r.last:
		return slices.Delete(list, i, i+1)
	case r.first == a:
		list[i].first = a.Next()
	case r.last == a:
		list[i].last = a.Prev()
	default:
		list[i].last = a.Prev()
		return slices.Insert(list, i+1, addrRange{a.Next(), r.last})
	}
	return list
}

// nodeSet is a sorted list of slots.
type nodeSet []int32

func (s *nodeSet) add(slot int) {
	x := int32(slot)
	if n := len(*s); n == 0 || (*s)[n-1] < x {
		*s = append(*s, x)
		return
	}
	if i, ok := slices.BinarySearch(*s, x); !ok {
		*s = slices.Insert(*s, i, x)
	}
}

func (s *nodeSet) remove(slot int) {
	if i, ok := slices.BinarySearch(*s, int32(slot)); ok {
		*s = slices.Delete(*s, i, i+1)
	}
}
