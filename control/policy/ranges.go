package policy

import (
	"net/netip"
	"slices"

	"mesh/internal/iprange"
)

// merge sorts ranges and joins those that overlap or touch.
func merge(list []iprange.Range) []iprange.Range {
	slices.SortFunc(list, func(a, b iprange.Range) int { return a.First.Compare(b.First) })
	out := list[:0]
	for _, x := range list {
		if n := len(out); n > 0 && x.First.BitLen() == out[n-1].Last.BitLen() {
			end := out[n-1].Last
			if next := end.Next(); !end.Less(x.First) || next.IsValid() && next == x.First {
				if end.Less(x.Last) {
					out[n-1].Last = x.Last
				}
				continue
			}
		}
		out = append(out, x)
	}
	return out
}

// meshRanges is what "*" means as a source, besides approved routes: all
// addresses that nodes of a mesh may have. 100.115.92.0/23 is left to virtual
// machines of ChromeOS.
var meshRanges = []iprange.Range{
	{First: netip.MustParseAddr("100.64.0.0"), Last: netip.MustParseAddr("100.115.91.255")},
	{First: netip.MustParseAddr("100.115.94.0"), Last: netip.MustParseAddr("100.127.255.255")},
	iprange.Of(netip.MustParsePrefix("fd7a:115c:a1e0::/48")),
}

// everywhere is all addresses.
var everywhere = []iprange.Range{iprange.Of(netip.MustParsePrefix("0.0.0.0/0")), iprange.Of(netip.MustParsePrefix("::/0"))}

// at returns the place of the first range that ends at a or behind it.
func at(list []iprange.Range, a netip.Addr) int {
	i, _ := slices.BinarySearchFunc(list, a, func(r iprange.Range, a netip.Addr) int { return r.Last.Compare(a) })
	return i
}

// insertAddr adds an address to merged ranges.
func insertAddr(list []iprange.Range, a netip.Addr) []iprange.Range {
	i := at(list, a)
	if i < len(list) && list[i].Contains(a) {
		return list
	}
	joins := i > 0 && list[i-1].Last.BitLen() == a.BitLen() && list[i-1].Last.Next() == a
	precedes := i < len(list) && list[i].First.BitLen() == a.BitLen() && a.Next() == list[i].First
	switch {
	case joins && precedes:
		list[i-1].Last = list[i].Last
		return slices.Delete(list, i, i+1)
	case joins:
		list[i-1].Last = a
	case precedes:
		list[i].First = a
	default:
		return slices.Insert(list, i, iprange.Range{First: a, Last: a})
	}
	return list
}

// removeAddr takes an address out of merged ranges.
func removeAddr(list []iprange.Range, a netip.Addr) []iprange.Range {
	i := at(list, a)
	if i == len(list) || !list[i].Contains(a) {
		return list
	}
	switch r := list[i]; {
	case r.First == r.Last:
		return slices.Delete(list, i, i+1)
	case r.First == a:
		list[i].First = a.Next()
	case r.Last == a:
		list[i].Last = a.Prev()
	default:
		list[i].Last = a.Prev()
		return slices.Insert(list, i+1, iprange.Range{First: a.Next(), Last: r.Last})
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
