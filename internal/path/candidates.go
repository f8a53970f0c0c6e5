package path

import (
	"net/netip"

	"mesh/internal/disco"
)

// setEndpoints takes the list of endpoints that control gives. It reports
// whether one of them is new.
func (c *chooser) setEndpoints(list []netip.AddrPort, now instant) (added bool) {
	for _, k := range c.candidates {
		k.control = false
	}
	for _, a := range bounded(list) {
		k, isNew := c.candidate(a, now)
		if k != nil {
			k.control = true
			added = added || isNew
		}
	}
	c.prune(now)
	return added
}

// bounded drops the addresses of a list that cannot be a peer's and the excess
// of those that share one IP address.
func bounded(list []netip.AddrPort) []netip.AddrPort {
	out := make([]netip.AddrPort, 0, min(len(list), disco.MaxEndpoints))
	perIP := make(map[netip.Addr]int)
	for _, a := range list {
		a = unmap(a)
		if len(out) == disco.MaxEndpoints {
			break
		}
		if usable(a) && perIP[a.Addr()] < maxSameIP {
			perIP[a.Addr()]++
			out = append(out, a)
		}
	}
	return out
}

// candidate returns the entry of an address, making one if there is room; nil
// if there is none.
func (c *chooser) candidate(a netip.AddrPort, now instant) (k *candidate, added bool) {
	if k := c.candidates[a]; k != nil {
		return k, !k.listed(now) && a != c.best
	}
	if len(c.candidates) >= maxCandidates {
		// Only what pings told may give way: lists are bounded themselves.
		var oldest netip.AddrPort
		for b, k := range c.candidates {
			if k.control || k.called || b == c.best {
				continue
			}
			if !oldest.IsValid() || k.learned < c.candidates[oldest].learned {
				oldest = b
			}
		}
		if !oldest.IsValid() {
			return nil, false
		}
		delete(c.candidates, oldest)
	}
	k = &candidate{}
	c.candidates[a] = k
	return k, true
}

// prune forgets candidates that nothing speaks for any more.
func (c *chooser) prune(now instant) {
	for a, k := range c.candidates {
		if k.learned <= now {
			k.learned = 0
		}
		if a != c.best && !k.listed(now) {
			delete(c.candidates, a)
		}
	}
}
