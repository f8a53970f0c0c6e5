package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
)

// defaultKeyLife is how long an auth key is good for if nobody says.
const defaultKeyLife = 90 * 24 * time.Hour

func (s *Server) adminKey(k store.Key) admin.Key {
	out := admin.Key{
		ID: k.ID, Kind: string(k.Kind), Tags: k.Tags, Reusable: k.Reusable, Ephemeral: k.Ephemeral,
		Created: k.Created, Expires: k.Expires, Revoked: k.Revoked, Used: k.Used, User: s.users[k.User].Name,
		NodeExpiry: k.NodeExpiry,
	}
	switch k.State(s.cfg.Now()) {
	case nil:
		out.State = "valid"
	case wire.ErrAuthKeyRevoked:
		out.State = "revoked"
	case wire.ErrAuthKeyExpired:
		out.State = "expired"
	case wire.ErrAuthKeyUsed:
		out.State = "used"
	}
	return out
}

func (s *Server) adminKeys(r *http.Request) (any, error) {
	keys, err := s.store.Keys(r.Context())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]admin.Key, 0, len(keys))
	for _, k := range keys {
		out = append(out, s.adminKey(k))
	}
	return out, nil
}

func (s *Server) adminCreateKey(r *http.Request) (any, error) {
	var in admin.KeyCreate
	if err := adminBody(r, &in); err != nil {
		return nil, err
	}
	// Held so that the user cannot go away in between.
	s.lockOps()
	defer s.opMu.Unlock()
	k, err := s.newKey(in)
	if err != nil {
		return nil, err
	}
	k, secret, err := s.store.CreateKey(r.Context(), actor(r), k)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return admin.NewKey{Key: s.adminKey(k), Secret: secret}, nil
}

// newKey checks the wish for a key.
func (s *Server) newKey(in admin.KeyCreate) (store.Key, error) {
	now := s.cfg.Now()
	k := store.Key{Kind: store.KeyNode, Reusable: in.Reusable, Ephemeral: in.Ephemeral, Created: now}
	invalid := func(format string, args ...any) (store.Key, error) {
		return store.Key{}, fmt.Errorf("%w: "+format, append([]any{errInvalid}, args...)...)
	}
	if in.Expires < 0 {
		return invalid("a key cannot expire in the past")
	}
	if in.NodeExpiry > maxExpiry {
		return invalid("node keys may live for 100 years at most")
	}
	if in.Relay {
		if in.User != "" || len(in.Tags) > 0 || in.Ephemeral || in.NodeExpiry != 0 {
			return invalid("a relay key has neither user nor tags, is not ephemeral and enrols no nodes")
		}
		k.Kind, k.Reusable = store.KeyRelay, true // a relay shows it at every start
		if in.Expires > 0 {
			k.Expires = now.Add(in.Expires)
		}
		return k, nil
	}
	if (in.User == "") == (len(in.Tags) == 0) {
		return invalid("a key belongs to a user (--user) or carries tags (--tag): give one of the two")
	}
	k.NodeExpiry = max(in.NodeExpiry, -1)
	k.Expires = now.Add(defaultKeyLife)
	if in.Expires > 0 {
		k.Expires = now.Add(in.Expires)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.User != "" {
		u, ok := s.userByName(in.User)
		if !ok {
			return store.Key{}, fmt.Errorf("user %q: %w: create it with `mesh user create`", in.User, store.ErrNotFound)
		}
		k.User = u.ID
	}
	if err := active(s.users[k.User]); err != nil {
		return store.Key{}, err
	}
	if err := s.knownTags(in.Tags); err != nil {
		return store.Key{}, err
	}
	k.Tags = in.Tags
	return k, nil
}

func (s *Server) adminRevokeKey(r *http.Request) (any, error) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: key %q: want its number", errInvalid, r.PathValue("id"))
	}
	wait, err := waitFor(r)
	if err != nil {
		return nil, err
	}
	k, removed, rec, err := s.revokeKey(context.WithoutCancel(r.Context()), actor(r), id, r.URL.Query().Get("nodes") != "", wait > 0)
	if err != nil {
		return nil, err
	}
	told := s.await(r.Context(), rec, wait)
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.adminKey(k)
	out.Removed, out.Applied = removed, told
	return out, nil
}

// revokeKey makes a key useless and cuts off the relays that use it; with nodes
// also all nodes that enrolled with it last, as RemoveNode does. It returns the
// names of these.
func (s *Server) revokeKey(ctx context.Context, by string, id int64, nodes, wait bool) (k store.Key, removed []string, rec *receipt, err error) {
	s.lockOps()
	defer s.opMu.Unlock()
	var ids []wire.NodeID
	s.mu.Lock()
	for _, n := range s.nodes.byID {
		if nodes && n.AuthKey == id {
			ids, removed = append(ids, n.ID), append(removed, n.Name)
		}
	}
	s.mu.Unlock()
	slices.Sort(removed)
	rec, err = s.withdraw(ids, wait, func() error {
		// The key first: nobody enrols with it while its nodes go.
		if k, err = s.store.RevokeKey(ctx, by, id, s.cfg.Now()); err != nil {
			return err
		}
		s.keyRevoked(k)
		for _, n := range ids {
			if err := s.remove(ctx, by, n, true); err != nil {
				return err
			}
		}
		return nil
	})
	return k, removed, rec, err
}

// keyRevoked brings in force what follows from the revocation of a key.
func (s *Server) keyRevoked(k store.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.Kind == store.KeyNode {
		for _, n := range s.nodes.byID {
			if n.AuthKey == k.ID && n.KeyLife != 0 {
				n.KeyLife = 0 // as the store has done
				s.changedSelf(n)
			}
		}
	}
	for _, relay := range s.relays.known {
		if relay.Key == k.ID {
			relay.end(wire.CodeRelayKeyUnknown)
		}
	}
}
