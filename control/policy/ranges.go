package policy

import (
	"math/bits"
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

// bitset is a set of small numbers.
type bitset []uint64

func (b *bitset) add(i int) {
	for len(*b) <= i>>6 {
		*b = append(*b, 0)
	}
	(*b)[i>>6] |= 1 << (i & 63)
}

func (b bitset) remove(i int) {
	if i>>6 < len(b) {
		b[i>>6] &^= 1 << (i & 63)
	}
}

func (b bitset) has(i int) bool { return i>>6 < len(b) && b[i>>6]>>(i&63)&1 != 0 }

func (b bitset) empty() bool {
	for _, w := range b {
		if w != 0 {
			return false
		}
	}
	return true
}

// or adds all of o.
func (b *bitset) or(o bitset) {
	for len(*b) < len(o) {
		*b = append(*b, 0)
	}
	for i, w := range o {
		(*b)[i] |= w
	}
}

// orAnd adds what is in both x and y.
func (b *bitset) orAnd(x, y bitset) {
	n := min(len(x), len(y))
	for len(*b) < n {
		*b = append(*b, 0)
	}
	for i := range n {
		(*b)[i] |= x[i] & y[i]
	}
}

// each calls f for every member in ascending order.
func (b bitset) each(f func(i int)) {
	for i, w := range b {
		for ; w != 0; w &= w - 1 {
			f(i<<6 + bits.TrailingZeros64(w))
		}
	}
}
