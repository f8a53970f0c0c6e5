package filter

import "net/netip"

// prefixTable finds everything stored for the prefixes that contain an address.
// A lookup probes one hash table once for each prefix length in use, so it does
// not depend on how many prefixes there are, and memory is linear in them even
// when they overlap in every way. The zero value is empty.
type prefixTable struct {
	m     map[netip.Prefix][]int32 // values ascending, since they are added so
	lens4 []int                    // prefix lengths in use
	lens6 []int
}

func (t *prefixTable) add(p netip.Prefix, v int32) {
	if t.m == nil {
		t.m = make(map[netip.Prefix][]int32)
	}
	list, known := t.m[p]
	if n := len(list); n > 0 && list[n-1] == v {
		return
	}
	t.m[p] = append(list, v)
	if known {
		return
	}
	lens := &t.lens4
	if p.Addr().Is6() {
		lens = &t.lens6
	}
	for _, n := range *lens {
		if n == p.Bits() {
			return
		}
	}
	*lens = append(*lens, p.Bits())
}

// lens returns the prefix lengths to probe for a.
func (t *prefixTable) lens(a netip.Addr) []int {
	if a.Is4() {
		return t.lens4
	}
	return t.lens6
}

// at returns the values of the prefix of that length around a.
func (t *prefixTable) at(a netip.Addr, bits int) []int32 {
	p, err := a.Prefix(bits)
	if err != nil {
		return nil
	}
	return t.m[p]
}

func (t *prefixTable) contains(a netip.Addr) bool {
	for _, n := range t.lens(a) {
		if len(t.at(a, n)) > 0 {
			return true
		}
	}
	return false
}
