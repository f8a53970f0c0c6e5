package server

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/store"
)

// meshNetworks are where the addresses of nodes are: no route leads there.
var meshNetworks = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

// advertises reports whether the node offers or was given routes. Server.mu is
// held.
func (n *node) advertises() bool {
	return len(n.routed) > 0 || n.Hostinfo != nil && len(n.Hostinfo.RoutableIPs) > 0
}

// advertised returns the routes that a node offers. Those to addresses of the
// mesh do not count: whoever could draw its peers' traffic to itself would not
// need to ask. Server.mu is held.
func (s *Server) advertised(n *node) (out []netip.Prefix) {
	if n.Hostinfo == nil {
		return nil
	}
	for _, text := range n.Hostinfo.RoutableIPs {
		if p, err := netip.ParsePrefix(text); err == nil && s.routable(p) && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// routable reports whether a node may be a router to p at all.
func (s *Server) routable(p netip.Prefix) bool {
	return p.Bits() == 0 || !p.Overlaps(s.cfg.IPv4.Masked()) && !slices.ContainsFunc(meshNetworks, p.Overlaps)
}

// approved returns the routes that a node offers and that an administrator, by
// exactly this prefix, or a policy approves. Server.mu is held.
func (s *Server) approved(n *node, p policy.Node, base *policy.Policy) (out []netip.Prefix) {
	for _, r := range s.advertised(n) {
		if approvedBy(n, p, base, r) != "" {
			out = append(out, r)
		}
	}
	return out
}

func approvedBy(n *node, p policy.Node, base *policy.Policy, r netip.Prefix) string {
	switch {
	case slices.Contains(n.Routes, r):
		return "administrator"
	case base != nil && base.AutoApproves(p, r):
		return "policy"
	}
	return ""
}

// ApproveRoutes sets which routes of a node (named as for RenameNode) are
// approved beyond those that the policy approves. They need not be advertised
// yet. Errors: store.ErrNotFound, admin.ErrInvalid.
func (s *Server) ApproveRoutes(ctx context.Context, by, name string, routes []netip.Prefix) error {
	if len(routes) > maxRoutes {
		return fmt.Errorf("%w: a node has at most %d routes", errInvalid, maxRoutes)
	}
	for _, r := range routes {
		if !r.IsValid() || r != r.Masked() {
			return fmt.Errorf("%w: route %v: want a network such as 10.0.0.0/8", errInvalid, r)
		}
		if !s.routable(r) {
			return fmt.Errorf("%w: route %v: it overlaps the addresses of the mesh", errInvalid, r)
		}
	}
	s.lockOps()
	defer s.opMu.Unlock()
	id, err := s.find(name)
	if err != nil {
		return err
	}
	routes = slices.Clone(routes)
	if err := s.store.ApproveRoutes(context.WithoutCancel(ctx), by, id, routes, s.cfg.Now()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return fmt.Errorf("node %q: %w", clip(name), store.ErrNotFound)
	}
	n.Routes = routes
	s.entitle(n)
	return nil
}

func (s *Server) adminApproveRoutes(r *http.Request) (any, error) {
	var in admin.NodeRoutes
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	return s.changedNode(r.PathValue("name"), func(id string) error {
		return s.ApproveRoutes(r.Context(), actor(r), id, in.Approved)
	})
}

// adminRoutes lists the routes of a node, offered or approved. Server.mu is
// held.
func (s *Server) adminRoutes(n *node) (out []admin.NodeRoute) {
	p := s.policyNode(n, s.policy.base)
	offered := s.advertised(n)
	for _, r := range offered {
		primary, ok := s.policy.compiled.Primary(r)
		out = append(out, admin.NodeRoute{
			Prefix: r, Advertised: true, Approved: approvedBy(n, p, s.policy.base, r),
			Primary: ok && primary == n.ID && slices.Contains(n.routed, r) && r.Bits() > 0,
		})
	}
	for _, r := range n.Routes {
		if !slices.Contains(offered, r) {
			out = append(out, admin.NodeRoute{Prefix: r, Approved: "administrator"})
		}
	}
	return out
}

// with returns a view for somebody to whom routes lead by the node.
func (v *view) with(routes []netip.Prefix) *view {
	if len(routes) == 0 {
		return v
	}
	w := &view{node: v.node}
	w.node.AllowedIPs = slices.Concat(v.node.Addresses, routes)
	for _, r := range routes {
		// Of several exit nodes the user chooses one: none is primary.
		if r.Bits() > 0 {
			w.node.PrimaryRoutes = append(w.node.PrimaryRoutes, r)
		}
	}
	return w
}
