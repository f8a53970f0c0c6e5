package netcheck

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"mesh/control/wire"
)

const (
	maxRegions      = 64
	maxRegionID     = 65535
	nodesPerRegion  = 3
	defaultSTUNPort = 3478

	fullTries        = 3
	fullSpacing      = 100 * time.Millisecond
	incrementalFirst = 3 // regions, beside home
	unknownSpacing   = 200 * time.Millisecond

	homeMargin = 10 * time.Millisecond
)

// target is a region to be asked over one family.
type target struct {
	region int
	v6     bool
	nodes  []*wire.DERPNode // asked in turn
	after  []time.Duration  // when, from the start
}

// measured returns the regions that may be asked, in order.
func measured(m *wire.DERPMap) (list []*wire.DERPRegion) {
	if m == nil {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(m.Regions)) {
		if g := m.Regions[id]; g != nil && id > 0 && id <= maxRegionID && !g.NoMeasureNoHome && len(list) < maxRegions {
			if g.RegionID != id { // the map's key is what counts
				copied := *g
				copied.RegionID = id
				g = &copied
			}
			list = append(list, g)
		}
	}
	return list
}

// fullDue reports whether there was no full report lately.
func fullDue(previous []*Report, now time.Time) bool {
	return !slices.ContainsFunc(previous, func(r *Report) bool { return r != nil && r.Full && recent(r, now) })
}

func recent(r *Report, now time.Time) bool {
	age := now.Sub(r.Time)
	return age >= 0 && age < Memory
}

// bestOf returns each region's shortest latency of late.
func bestOf(reports []*Report, now time.Time) map[int]time.Duration {
	best := make(map[int]time.Duration)
	for _, r := range reports {
		if r == nil || !recent(r, now) {
			continue
		}
		for _, g := range r.Regions {
			if l := time.Duration(g.Best()); l > 0 && (best[g.ID] == 0 || l < best[g.ID]) {
				best[g.ID] = l
			}
		}
	}
	return best
}

// homeOf returns the region that the last report preferred.
func homeOf(previous []*Report) int {
	for _, r := range slices.Backward(previous) {
		if r != nil {
			return r.Preferred
		}
	}
	return 0
}

// plan says whom to ask when. latency is what is known of regions, home the
// home region; both are of use only for an incremental report.
func plan(regions []*wire.DERPRegion, full bool, latency map[int]time.Duration, home int) (targets []target) {
	tries := make(map[int]int)
	if full {
		for _, g := range regions {
			tries[g.RegionID] = fullTries
		}
	} else {
		near := slices.SortedFunc(maps.Keys(latency), func(a, b int) int {
			return cmp.Or(cmp.Compare(latency[a], latency[b]), cmp.Compare(a, b))
		})
		for i, id := range near[:min(len(near), incrementalFirst)] {
			tries[id] = 1
			if i < 2 {
				tries[id] = 2
			}
		}
		if home != 0 {
			tries[home] = 4
		}
	}
	for _, g := range regions {
		n := tries[g.RegionID]
		if n == 0 {
			continue
		}
		var after []time.Duration
		spacing, at := fullSpacing, time.Duration(0)
		if !full {
			if spacing = latency[g.RegionID] * 120 / 100; spacing == 0 {
				spacing = unknownSpacing
			}
		}
		for i := range n {
			after = append(after, at)
			at += spacing
			if !full && i >= 1 {
				at += 50 * time.Millisecond * time.Duration(i+1)
			}
		}
		for _, v6 := range []bool{false, true} {
			if nodes := stunNodes(g, v6); len(nodes) > 0 {
				targets = append(targets, target{g.RegionID, v6, nodes, after})
			}
		}
	}
	return targets
}

// stunNodes returns the nodes of a region that serve STUN over a family.
func stunNodes(g *wire.DERPRegion, v6 bool) (list []*wire.DERPNode) {
	for _, n := range g.Nodes {
		if n == nil || n.STUNPort < 0 || n.STUNPort > 65535 || len(list) == nodesPerRegion {
			continue
		}
		if _, name := stunHost(n, v6); name != "" {
			list = append(list, n)
		} else if a, _ := stunHost(n, v6); a.IsValid() {
			list = append(list, n)
		}
	}
	return list
}

// stunHost says how a node's STUN server is reached over a family: at an
// address, or at what its name resolves to, or not at all.
func stunHost(n *wire.DERPNode, v6 bool) (a netip.Addr, name string) {
	if n.STUNTestIP != "" {
		return literal(n.STUNTestIP, v6), ""
	}
	return nodeHost(n, v6)
}

// nodeHost is the same for the relay itself.
func nodeHost(n *wire.DERPNode, v6 bool) (a netip.Addr, name string) {
	text := n.IPv4
	if v6 {
		text = n.IPv6
	}
	if text != "" {
		return literal(text, v6), "" // by convention "none" where there is none
	}
	if _, err := netip.ParseAddr(n.HostName); err == nil {
		return literal(n.HostName, v6), ""
	}
	return netip.Addr{}, n.HostName
}

// literal returns an address if it is one of the family.
func literal(text string, v6 bool) netip.Addr {
	a, err := netip.ParseAddr(text)
	if a = a.Unmap(); err != nil || a.Is6() != v6 || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}
	}
	return a
}

// isTest reports whether a node is one of a test, which is asked even if the
// host has no address with which it could be reached.
func isTest(n *wire.DERPNode) bool {
	return n.STUNTestIP != "" || n.IPv4 == "127.0.0.1" || n.IPv6 == "::1" || n.HostName == "127.0.0.1" || n.HostName == "::1"
}

// choose returns the region that should be home: the nearest by the
// measurements of the last minutes, but the old one as long as that answers
// (or is alive all the same) and another is not clearly better.
func choose(m *wire.DERPMap, now *Report, previous []*Report, alive bool) int {
	var score map[int]float64
	if m.HomeParams != nil {
		score = m.HomeParams.RegionScore
	}
	best := bestOf(append(slices.Clone(previous), now), now.Time)
	latency := func(id int) time.Duration {
		d := best[id]
		if s := score[id]; s > 0 {
			d = time.Duration(float64(d) * s)
		}
		return d
	}
	home, nearest := homeOf(previous), 0
	for _, g := range now.Regions {
		if g.Best() == 0 {
			continue
		}
		alive = alive || g.ID == home
		if nearest == 0 || latency(g.ID) < latency(nearest) {
			nearest = g.ID
		}
	}
	inMap := slices.ContainsFunc(measured(m), func(g *wire.DERPRegion) bool { return g.RegionID == home })
	switch {
	case nearest == 0: // nobody answered, which says nothing against home
		if !inMap {
			return 0
		}
		return home
	case alive && inMap && (latency(home)-latency(nearest) < homeMargin || latency(nearest) > latency(home)*2/3):
		return home
	}
	return nearest
}
