package server

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
)

// maxExpiry bounds how far ahead a node key may expire.
const maxExpiry = 100 * 365 * 24 * time.Hour

// nodeName is what administrators may call nodes: a DNS label.
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// find returns the number of the node with the given name, full name, stable
// ID or mesh address.
func (s *Server) find(name string) (wire.NodeID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.nodeByName(name)
	if err != nil {
		return 0, err
	}
	return n.ID, nil
}

// RenameNode gives the node with the given name, full name, stable ID or mesh
// address another name, which it keeps whatever its host is called; or, if to
// is "", the name that its host asks for. The node and its peers hear of it at
// once. Errors: store.ErrNotFound, store.ErrConflict if another node has the
// name, admin.ErrInvalid.
func (s *Server) RenameNode(ctx context.Context, by, name, to string) error {
	s.lockOps()
	defer s.opMu.Unlock()
	id, err := s.find(name)
	if err != nil {
		return err
	}
	to = strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(to), "."), "."+s.cfg.Domain)
	if to != "" && !nodeName.MatchString(to) {
		return fmt.Errorf("%w: name %q: want letters, digits and dashes, 63 at most", errInvalid, clip(to))
	}
	s.mu.Lock()
	n := s.nodes.byID[id]
	hostname, named := n.Hostname, to != ""
	if !named {
		if n.Hostinfo != nil && n.Hostinfo.Hostname != "" {
			hostname = label(n.Hostinfo.Hostname)
		}
		to = s.nodes.names.free(hostname, id)
	}
	have, taken := s.nodes.names.id(to)
	s.mu.Unlock()
	if taken && have != id {
		return fmt.Errorf("%w: there is a node %q already", store.ErrConflict, to)
	}
	if err := s.store.RenameNode(context.WithoutCancel(ctx), by, id, hostname, to, named, s.cfg.Now()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes.rename(n, hostname, to)
	n.Named = named
	s.changed(n)
	return nil
}

// ownerOf checks who a node shall belong to: a user, or tags of the policy.
// Server.mu is held.
func (s *Server) ownerOf(user string, tags []string) (wire.UserID, []string, error) {
	if (user == "") == (len(tags) == 0) {
		return 0, nil, fmt.Errorf("%w: a node belongs to a user or to tags: give one of the two", errInvalid)
	}
	if user != "" {
		u, ok := s.userByName(user)
		if !ok {
			return 0, nil, fmt.Errorf("user %q: %w: create it with `mesh user create`", clip(user), store.ErrNotFound)
		}
		return u.ID, nil, active(u)
	}
	tags = slices.Clone(tags)
	slices.Sort(tags)
	tags = slices.Compact(tags)
	return 0, tags, s.knownTags(tags)
}

// knownTags reports a tag that the policy does not have. Server.mu is held.
func (s *Server) knownTags(tags []string) error {
	for _, t := range tags {
		if s.policy.parsed == nil || !s.policy.parsed.HasTag(t) {
			return fmt.Errorf("%w: tag %q is not in the policy's tagOwners; set a policy that has it first", errInvalid, clip(t))
		}
	}
	return nil
}

// SetOwner gives a node (named as for RenameNode) to a user, or to exactly
// these tags: give one of the two. Peers and filters follow at once. The key of
// a node with tags does not expire, one of a user's does, as if it had enrolled
// now; a key that has expired already stays so. Errors: store.ErrNotFound for
// node and user, admin.ErrInvalid for a tag that the policy does not have.
func (s *Server) SetOwner(ctx context.Context, by, name, user string, tags []string) error {
	s.lockOps()
	defer s.opMu.Unlock()
	id, err := s.find(name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	uid, tags, err := s.ownerOf(user, tags)
	if err != nil {
		s.mu.Unlock()
		return err
	}
	now := s.cfg.Now()
	n := s.nodes.byID[id]
	expires, tagged := n.Expires, len(n.Tags) > 0
	switch {
	case expiredAt(expires, now):
	case len(tags) > 0 && !tagged:
		expires = time.Time{}
	case len(tags) == 0 && expires.IsZero():
		owner := s.users[uid]
		expires = expiry(s.nodeKeyLife(0, policy.Node{User: owner.Name, Role: policyRole(owner.Role)}), now)
	}
	s.mu.Unlock()
	if err := s.store.SetOwner(context.WithoutCancel(ctx), by, id, uid, tags, expires, now); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n.User, n.Tags, n.Expires = uid, tags, expires
	s.reconsider(n, wire.CodeNodeKeyExpired) // its former user may be suspended
	s.entitle(n)
	return nil
}

// ExpireNode sets when the key of a node (named as for RenameNode) expires: in
// the past or now cuts the node off until it logs in again, zero is never. A
// node whose key had expired comes back with it if the new time is to come.
func (s *Server) ExpireNode(ctx context.Context, by, name string, at time.Time) error {
	_, err := s.expireNode(ctx, by, name, at, false)
	return err
}

func (s *Server) expireNode(ctx context.Context, by, name string, at time.Time, wait bool) (*receipt, error) {
	now := s.cfg.Now()
	if at.Sub(now) > maxExpiry {
		return nil, fmt.Errorf("%w: that is more than 100 years from now", errInvalid)
	}
	if !at.IsZero() && at.Before(now) {
		at = now // it was good until now
	}
	s.lockOps()
	defer s.opMu.Unlock()
	id, err := s.find(name)
	if err != nil {
		return nil, err
	}
	return s.withdraw([]wire.NodeID{id}, wait, func() error { return s.setExpiry(context.WithoutCancel(ctx), by, id, at) })
}
