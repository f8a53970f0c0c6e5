package server

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sort"

	"mesh/control/wire"
)

// meshIPv6 is the network of IPv6 mesh addresses. A node's IPv6 address is its
// IPv4 address in the last four bytes.
var meshIPv6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")

// reserved is never handed out: 100.100.100.100 is the built-in DNS service of
// stock clients, and 100.115.92.0/23 is used by ChromeOS.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("100.100.100.0/24"),
	netip.MustParsePrefix("100.115.92.0/23"),
}

// addressPool hands out IPv4 addresses. It goes round: an address that became
// free is not used again before all others were.
type addressPool struct {
	runs []addressRun
	size uint32
	next uint32 // index of the address to try first
	used map[netip.Addr]struct{}
}

// addressRun is a run of usable addresses: the count-th from index start of
// the pool are those from first.
type addressRun struct{ start, first, count uint32 }

func newAddressPool(p netip.Prefix) (*addressPool, error) {
	p = p.Masked()
	if !p.IsValid() || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 30 {
		return nil, fmt.Errorf("address range %v: want an IPv4 network between /8 and /30", p)
	}
	pool := &addressPool{used: make(map[netip.Addr]struct{})}
	from := toUint(p.Addr()) + 1                          // neither network
	last := toUint(p.Addr()) + (1<<(32-p.Bits()) - 1) - 1 // nor broadcast address
	add := func(first, last uint32) {
		if first <= last {
			pool.runs = append(pool.runs, addressRun{pool.size, first, last - first + 1})
			pool.size += last - first + 1
		}
	}
	for _, r := range reserved { // in ascending order
		first := toUint(r.Addr())
		end := first + 1<<(32-r.Bits()) - 1
		if end < from || first > last {
			continue
		}
		add(from, first-1)
		from = end + 1
	}
	add(from, last)
	if pool.size == 0 {
		return nil, fmt.Errorf("address range %v: nothing usable in it", p)
	}
	return pool, nil
}

func toUint(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func (p *addressPool) at(i uint32) netip.Addr {
	r := p.runs[sort.Search(len(p.runs), func(k int) bool { return p.runs[k].start > i })-1]
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], r.first+i-r.start)
	return netip.AddrFrom4(b)
}

// startAfter makes the pool go on where it was when the n-th node got its
// address.
func (p *addressPool) startAfter(n wire.NodeID) { p.next = uint32(uint64(n) % uint64(p.size)) }

// scatter makes the pool go on anywhere.
func (p *addressPool) scatter() { p.next = rand.Uint32N(p.size) }

// peek returns the next free addresses without taking them.
func (p *addressPool) peek() (v4, v6 netip.Addr, err error) {
	if uint32(len(p.used)) >= p.size {
		return v4, v6, wire.ErrAddressesUsedUp
	}
	for range p.size {
		v4 = p.at(p.next)
		if _, ok := p.used[v4]; !ok {
			return v4, toIPv6(v4), nil
		}
		p.next = (p.next + 1) % p.size
	}
	return netip.Addr{}, v6, wire.ErrAddressesUsedUp
}

// take marks an address as used. One from elsewhere, left by another
// configuration, is none of the pool's.
func (p *addressPool) take(v4 netip.Addr) {
	i, ok := p.index(v4)
	if !ok {
		return
	}
	p.used[v4] = struct{}{}
	if i == p.next {
		p.next = (p.next + 1) % p.size
	}
}

func (p *addressPool) free(v4 netip.Addr) { delete(p.used, v4) }

// index is the inverse of at.
func (p *addressPool) index(v4 netip.Addr) (uint32, bool) {
	if !v4.Is4() {
		return 0, false
	}
	u := toUint(v4)
	for _, r := range p.runs {
		if u >= r.first && u-r.first < r.count {
			return r.start + u - r.first, true
		}
	}
	return 0, false
}

func toIPv6(v4 netip.Addr) netip.Addr {
	b, last := meshIPv6.Addr().As16(), v4.As4()
	copy(b[12:], last[:])
	return netip.AddrFrom16(b)
}
