package server

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
)

// adminNodeOf describes a node. Server.mu is held.
func (s *Server) adminNodeOf(n *node) admin.Node {
	out := admin.Node{
		ID: n.ID, StableID: n.StableID, Name: n.Name, FullName: n.Name + "." + s.cfg.Domain,
		Addresses: []netip.Addr{n.IPv4, n.IPv6}, User: s.ownerName(&n.Node), Tags: n.Tags, NodeKey: n.Key,
		Online: n.online == presenceOnline, Ephemeral: n.Ephemeral, Created: n.Created,
		Named: n.Named, Expires: n.Expires, Expired: n.expired, Version: n.Cap, HomeRelay: n.HomeDERP, Endpoints: n.Endpoints,
	}
	if !out.Online {
		out.LastSeen = n.LastSeen
	}
	if n.Hostinfo != nil {
		out.OS, out.Hostname = n.Hostinfo.OS, n.Hostinfo.Hostname
	}
	return out
}

func (s *Server) adminNodes(*http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]admin.Node, 0, len(s.nodes.byID))
	for _, n := range s.nodes.byID {
		out = append(out, s.adminNodeOf(n))
	}
	slices.SortFunc(out, func(a, b admin.Node) int { return int(a.ID - b.ID) })
	return out, nil
}

// nodeByName finds a node by name, full name, stable ID or address. Server.mu
// is held.
func (s *Server) nodeByName(name string) (*node, error) {
	short := strings.TrimSuffix(strings.ToLower(strings.TrimSuffix(name, ".")), "."+s.cfg.Domain)
	if id, ok := s.nodes.names.id(short); ok && id != 0 {
		return s.nodes.byID[id], nil
	}
	addr, _ := netip.ParseAddr(name)
	for _, n := range s.nodes.byID {
		if string(n.StableID) == name || addr.IsValid() && (n.IPv4 == addr || n.IPv6 == addr) {
			return n, nil
		}
	}
	return nil, fmt.Errorf("node %q: %w", clip(name), store.ErrNotFound)
}

func (s *Server) adminNode(r *http.Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.nodeByName(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	out := s.adminNodeOf(n)
	out.Routes = s.adminRoutes(n)
	for _, id := range s.policy.compiled.Visible(n.ID) {
		if p := s.nodes.byID[id]; p != nil {
			out.Peers = append(out.Peers, p.Name)
		}
	}
	slices.Sort(out.Peers)
	return out, nil
}

func (s *Server) adminRemoveNode(r *http.Request) (any, error) {
	wait, err := waitFor(r)
	if err != nil {
		return nil, err
	}
	rec, err := s.revokeNode(r.Context(), actor(r), r.PathValue("name"), wait > 0)
	if err != nil {
		return nil, err
	}
	return admin.NodeRemoved{Applied: s.await(r.Context(), rec, wait)}, nil
}

// RemoveNode revokes the node with the given name, full name, stable ID or mesh
// address: its peers and the relays drop it at once, its stream ends with
// wire.CodeNodeRevoked, and its key is refused from now on. The error is
// store.ErrNotFound if there is no such node.
func (s *Server) RemoveNode(ctx context.Context, by, name string) error {
	_, err := s.revokeNode(ctx, by, name, false)
	return err
}

func (s *Server) revokeNode(ctx context.Context, by, name string, wait bool) (*receipt, error) {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	n, err := s.nodeByName(name)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	id := n.ID
	s.mu.Unlock()
	return s.withdraw([]wire.NodeID{id}, wait, func() error { return s.remove(ctx, by, id, true) })
}

func (s *Server) adminRenameNode(r *http.Request) (any, error) {
	var in admin.NodeRename
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	return s.changedNode(r.PathValue("name"), func(id string) error {
		return s.RenameNode(r.Context(), actor(r), id, in.Name)
	})
}

func (s *Server) adminOwnNode(r *http.Request) (any, error) {
	var in admin.NodeOwner
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	return s.changedNode(r.PathValue("name"), func(id string) error {
		return s.SetOwner(r.Context(), actor(r), id, in.User, in.Tags)
	})
}

func (s *Server) adminExpireNode(r *http.Request) (any, error) {
	var in admin.NodeExpire
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	at := s.cfg.Now()
	switch {
	case in.Never && (in.In != 0 || !in.At.IsZero()), in.In != 0 && !in.At.IsZero():
		return nil, fmt.Errorf("%w: give one time only", errInvalid)
	case in.In < 0 || in.In > maxExpiry:
		return nil, fmt.Errorf("%w: want a time between now and 100 years from now", errInvalid)
	case in.Never:
		at = time.Time{}
	case !in.At.IsZero():
		at = in.At
	default:
		at = at.Add(in.In)
	}
	wait, err := waitFor(r)
	if err != nil {
		return nil, err
	}
	var rec *receipt
	out, err := s.changedNode(r.PathValue("name"), func(id string) (err error) {
		rec, err = s.expireNode(r.Context(), actor(r), id, at, wait > 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	out.Applied = s.await(r.Context(), rec, wait)
	return out, nil
}

// changedNode does something to a node and returns what it is then.
func (s *Server) changedNode(name string, change func(stableID string) error) (admin.Node, error) {
	id, err := s.find(name)
	if err != nil {
		return admin.Node{}, err
	}
	s.mu.Lock()
	n := s.nodes.byID[id]
	s.mu.Unlock()
	if n == nil {
		return admin.Node{}, fmt.Errorf("node %q: %w", clip(name), store.ErrNotFound)
	}
	if err := change(string(n.StableID)); err != nil {
		return admin.Node{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.adminNodeOf(n), nil
}
