package server

import (
	"context"
	"errors"
	"reflect"

	"go.uber.org/zap"

	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// The functions below read what other replicas changed and take it in. opMu is
// held. Each may be called at any time: where nothing changed, nothing happens.

// samePolicyNode reports whether a policy says the same of both. Whether a node
// is there matters for those with routes only.
func samePolicyNode(a, b policy.Node) bool {
	if len(a.Routes)+len(b.Routes) == 0 {
		a.Offline = b.Offline
	}
	return reflect.DeepEqual(a, b)
}

func (s *Server) followUsers(ctx context.Context) error {
	users, err := s.store.Users(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := make(map[wire.UserID]bool)
	gone := make(map[wire.UserID]bool, len(s.users))
	for id := range s.users {
		gone[id] = true
	}
	for _, u := range users {
		delete(gone, u.ID)
		if old, ok := s.users[u.ID]; !ok || !reflect.DeepEqual(old, u) {
			s.users[u.ID] = u
			delete(s.profiles, u.ID)
			changed[u.ID] = ok
		}
	}
	for id := range gone {
		delete(s.users, id)
		delete(s.profiles, id)
	}
	for _, n := range s.nodes.byID {
		if changed[n.User] {
			s.reconsider(n, s.outCode(n))
			s.entitle(n)
		}
	}
	return nil
}

func (s *Server) followPolicy(ctx context.Context) error {
	p, err := s.store.Policy(ctx)
	if errors.Is(err, store.ErrNotFound) || err == nil && p.Version == s.PolicyState().Version {
		return nil
	}
	if err != nil {
		return err
	}
	parsed, err := policy.Parse([]byte(p.Text))
	if err != nil {
		// Of a newer program, perhaps.
		s.log.Error("the policy that another replica set is not understood: the former stays in force here", zap.Int64("version", p.Version), zap.Error(err))
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy.Policy, s.policy.base = p, parsed
	s.regrant()
	return nil
}

func (s *Server) followGrants(ctx context.Context) error {
	list, err := s.store.Grants(ctx, false, 0)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.grants
	s.grants = make(map[int64]*grant, len(list))
	for _, g := range list {
		if s.grants[g.ID] = before[g.ID]; s.grants[g.ID] == nil {
			s.grants[g.ID] = &grant{Grant: g}
		}
	}
	s.regrant()
	s.wakeJanitor()
	return nil
}

func (s *Server) followShadow(ctx context.Context) error {
	p, err := s.store.Shadow(ctx)
	var parsed *policy.Policy
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	default:
		if parsed, err = policy.Parse([]byte(p.Text)); err != nil {
			s.log.Warn("the shadow policy of another replica is not evaluated", zap.Error(err))
			p = store.Policy{}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p != s.shadow.Policy {
		s.startShadow(p, parsed)
	}
	return nil
}

// followRelays takes in which relays there are. Whether they are connected is
// told by beats.
func (s *Server) followRelays(ctx context.Context) error {
	list, err := s.store.Relays(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := make(map[identity.NodePublic]bool, len(s.relays.known))
	for key := range s.relays.known {
		gone[key] = true
	}
	regions := make(map[int]bool)
	for _, relay := range list {
		delete(gone, relay.NodeKey)
		k := s.relays.known[relay.NodeKey]
		switch {
		case k == nil:
			s.relays.known[relay.NodeKey] = &knownRelay{Relay: relay, until: s.cfg.Now().Add(s.cfg.RelayLease)}
		case reflect.DeepEqual(k.Relay, relay):
			continue
		default:
			regions[k.Region.RegionID] = true
			k.end("") // it is at another replica by now
			k.Relay, k.left, k.gone, k.until = relay, false, false, s.cfg.Now().Add(s.cfg.RelayLease)
		}
		regions[relay.Region.RegionID] = true
	}
	for key := range gone {
		k := s.relays.known[key]
		delete(s.relays.known, key)
		k.end(wire.CodeRelayKeyUnknown)
		regions[k.Region.RegionID] = true
	}
	for region := range regions {
		s.relays.remesh(region)
	}
	if len(regions) > 0 {
		s.derpChanged()
		s.wakeJanitor()
	}
	return nil
}

// followKeys ends the streams of relays whose key was revoked. What it means for
// nodes is in their rows.
func (s *Server) followKeys(ctx context.Context) error {
	keys, err := s.store.Keys(ctx)
	if err != nil {
		return err
	}
	good := make(map[int64]bool, len(keys))
	for _, k := range keys {
		good[k.ID] = k.Revoked.IsZero()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.relays.known {
		if !good[k.Key] {
			k.end(wire.CodeRelayKeyUnknown)
		}
	}
	return nil
}
