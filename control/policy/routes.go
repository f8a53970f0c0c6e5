package policy

import (
	"net/netip"
	"slices"

	"mesh/control/wire"
)

// Routes returns the routes that lead the viewer to a peer: default routes of an
// exit node that it may use, and the networks behind the peer for which the peer
// is in charge. A network is shown to who may talk to something in it and to
// whom it may talk, and to the other routers of that network.
func (c *Compiled) Routes(viewer, peer wire.NodeID) []netip.Prefix {
	v, p := c.nodes[viewer], c.nodes[peer]
	if v == nil || p == nil || v == p {
		return nil
	}
	var out []netip.Prefix
	for _, r := range p.Routes {
		if c.leads(v, p, r) {
			out = append(out, r)
		}
	}
	return out
}

// leads reports whether r leads the viewer to peer, which has that route.
func (c *Compiled) leads(v, peer *node, r netip.Prefix) bool {
	// What another grant opens without a word about the way is open by any.
	if via, some := c.viaTags(v, r); some && !c.routeOpen(v, r) {
		if isDefault(r) {
			return hasAny(peer, via)
		}
		// Who is told which way to go is told one router of these.
		if first := c.first(r, via); first != nil {
			return first == peer
		}
	}
	if isDefault(r) {
		return c.routeVisible(v, r)
	}
	return c.first(r, nil) == peer && (c.routeVisible(v, r) || slices.Contains(v.Routes, r))
}

// Primary returns who is in charge of a network where no grant says which way to
// go: of its routers the one with the least ID, before those that are offline.
func (c *Compiled) Primary(r netip.Prefix) (wire.NodeID, bool) {
	n := c.first(r, nil)
	if n == nil {
		return 0, false
	}
	return n.ID, true
}

// first returns the router in charge of r, of those with one of the tags if
// there are some.
func (c *Compiled) first(r netip.Prefix, tags []string) *node {
	routers := c.routers[r]
	if routers == nil {
		return nil
	}
	var best *node
	for _, slot := range *routers {
		n := c.slots[slot]
		if len(tags) > 0 && !hasAny(n, tags) {
			continue
		}
		if best == nil || best.Offline && !n.Offline || best.Offline == n.Offline && n.ID < best.ID {
			best = n
		}
	}
	return best
}

func hasAny(n *node, tags []string) bool {
	return slices.ContainsFunc(n.Tags, func(t string) bool { return slices.Contains(tags, t) })
}

// viaTags returns the tags of the routers by which grants tell the viewer to go
// to r, if there are such grants.
func (c *Compiled) viaTags(v *node, r netip.Prefix) (tags []string, some bool) {
	if c.noVia {
		return nil, false
	}
	for _, s := range v.sels {
		for _, l := range s.inSrc {
			for _, d := range l.dsts {
				if d.kind == kindVia && !isDefault(r) && d.prefix.Overlaps(r) || d.kind == kindViaNet && isDefault(r) {
					tags = append(tags, d.name)
				}
			}
		}
	}
	return tags, len(tags) > 0
}

// routeVisible reports whether a rule lets the viewer talk to something behind
// the route, or that to the viewer.
func (c *Compiled) routeVisible(v *node, r netip.Prefix) bool {
	if c.routeOpen(v, r) {
		return true
	}
	if isDefault(r) {
		return false
	}
	covers := func(s *selSet) bool { return s.coversRoute(r) }
	for _, s := range v.sels {
		if s.kind == kindSelf {
			continue
		}
		for _, l := range s.dstOf {
			if slices.ContainsFunc(l.sels, covers) {
				return true
			}
		}
	}
	return false
}

// routeOpen reports whether a rule lets the viewer talk to something behind the
// route, by whatever router.
func (c *Compiled) routeOpen(v *node, r netip.Prefix) bool {
	covers := func(s *selSet) bool { return s.coversRoute(r) }
	for _, s := range v.sels {
		for _, l := range s.inSrc {
			if slices.ContainsFunc(l.dsts, covers) {
				return true
			}
		}
	}
	return false
}

// coversRoute reports whether the selector means something behind the route.
func (s *selSet) coversRoute(r netip.Prefix) bool {
	switch s.kind {
	case kindAll, kindAnywhere:
		return true
	case kindInternet:
		return isDefault(r)
	case kindPrefix:
		return !isDefault(r) && s.prefix.Overlaps(r)
	}
	return false
}
