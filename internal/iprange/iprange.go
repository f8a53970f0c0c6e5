// Package iprange reads the address forms of packet filters, the same ones
// everywhere: "*", an address, a network or a range "first-last".
package iprange

import (
	"fmt"
	"net/netip"
	"strings"
)

// Range is a set of neighbouring addresses of one family, both ends included.
// The zero value holds nothing.
type Range struct{ First, Last netip.Addr }

// Parse reads one of the forms; "*" is every address of both families. Strict
// as filters must be: a network with bits set behind its prefix, a zone, an
// IPv4-mapped address, a reversed range or one across families is an error.
func Parse(s string) ([]Range, error) {
	if s == "*" {
		return []Range{
			Of(netip.PrefixFrom(netip.IPv4Unspecified(), 0)),
			Of(netip.PrefixFrom(netip.IPv6Unspecified(), 0)),
		}, nil
	}
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%q is not a network", clip(s))
		}
		if p.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is an IPv4-mapped address", clip(s))
		}
		if p.Masked() != p {
			return nil, fmt.Errorf("%q has bits set behind its prefix", clip(s))
		}
		return []Range{Of(p)}, nil
	}
	if a, b, ok := strings.Cut(s, "-"); ok {
		first, err := parseAddr(a)
		if err != nil {
			return nil, err
		}
		last, err := parseAddr(b)
		if err != nil {
			return nil, err
		}
		if first.BitLen() != last.BitLen() || last.Less(first) {
			return nil, fmt.Errorf("%q is not a range", clip(s))
		}
		return []Range{{first, last}}, nil
	}
	a, err := parseAddr(s)
	if err != nil {
		return nil, err
	}
	return []Range{{a, a}}, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return a, fmt.Errorf("%q is not an address", clip(s))
	case a.Zone() != "":
		return a, fmt.Errorf("%q has a zone", clip(s))
	case a.Is4In6():
		return a, fmt.Errorf("%q is an IPv4-mapped address", clip(s))
	}
	return a, nil
}

func clip(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// Of returns the addresses of a network, which must be valid.
func Of(p netip.Prefix) Range {
	p = p.Masked()
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return Range{p.Addr(), last}
}

// Contains reports whether a is in r.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && !a.Less(r.First) && !r.Last.Less(a)
}

// Overlaps reports whether r and o have an address in common.
func (r Range) Overlaps(o Range) bool {
	return r.First.BitLen() == o.First.BitLen() && !r.Last.Less(o.First) && !o.Last.Less(r.First)
}

// String returns the form of filter rules, which Parse reads: an address, a
// network or "first-last".
func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	// The range is a network if both ends share a prefix behind which one has
	// only zeros and the other only ones.
	a, b := r.First.AsSlice(), r.Last.AsSlice()
	n := 0
	for n < len(a)*8 && bit(a, n) == bit(b, n) {
		n++
	}
	if p := netip.PrefixFrom(r.First, n); Of(p) == r {
		return p.String()
	}
	return r.First.String() + "-" + r.Last.String()
}

func bit(b []byte, i int) byte { return b[i/8] >> (7 - i%8) & 1 }

// Prefixes returns the fewest prefixes that cover r exactly: at most 62 for
// IPv4 and 254 for IPv6.
func (r Range) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for a := r.First; ; {
		// The widest prefix that starts at a and ends within r.
		bits := a.BitLen()
		end := a
		for bits > 0 {
			p, _ := a.Prefix(bits - 1)
			wider := Of(p)
			if p.Addr() != a || r.Last.Less(wider.Last) {
				break
			}
			bits--
			end = wider.Last
		}
		out = append(out, netip.PrefixFrom(a, bits))
		if end == r.Last {
			return out
		}
		a = end.Next()
	}
}
