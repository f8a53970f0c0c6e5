package server

import (
	"time"

	"mesh/control/policy"
	"mesh/control/store"
)

// nodeKeyLife is how long a key that node n enrols with by auth key k, or makes
// itself later, is good for; 0 = for ever. What an auth key says (0 = nothing,
// negative = never) goes before the policy, and that before the defaults.
// Server.mu is held.
func (s *Server) nodeKeyLife(said time.Duration, n policy.Node) time.Duration {
	if said != 0 {
		return max(said, 0)
	}
	if s.policy.base != nil {
		if life, ok := s.policy.base.KeyLife(n); ok {
			return life
		}
	}
	if len(n.Tags) > 0 {
		return 0
	}
	return s.cfg.KeyExpiry
}

// ownKeyLife is nodeKeyLife for a key that a node makes itself in place of one
// that is good; ok says whether it is good for longer than that. Server.mu is
// held.
func (s *Server) ownKeyLife(n *node) (life time.Duration, ok bool) {
	if n.KeyLife == 0 {
		return 0, false
	}
	return s.nodeKeyLife(max(n.KeyLife, 0), s.policyNode(n, s.policy.base)), true
}

// expiry is when a key that is made now expires.
func expiry(life time.Duration, now time.Time) time.Time {
	if life == 0 {
		return time.Time{}
	}
	return now.Add(life)
}

// renewAt is when a node should make itself another key: after about two thirds
// of its life, so that there is a third left in which the control server may be
// away, and not all nodes of one day on one day. It is zero for keys that do not
// expire, or whose expiry the node cannot put off. Server.mu is held.
func (s *Server) renewAt(n *node) time.Time {
	life, ok := s.ownKeyLife(n)
	if !ok || n.Expires.IsZero() || n.expired {
		return time.Time{}
	}
	if life == 0 {
		return s.cfg.Now() // the next one does not expire
	}
	const steps = 64
	early := life / 12 / steps * time.Duration(uint64(n.ID)*0x9e3779b97f4a7c15>>58)
	return n.Expires.Add(-life/3 - early)
}

// ownLife is what Node.KeyLife becomes of an auth key: nobody but who has one
// may put off when its key expires.
func ownLife(k store.Key) time.Duration {
	switch {
	case k.ID == 0, k.NodeExpiry < 0: // the latter has nothing to put off
		return 0
	case k.NodeExpiry > 0:
		return k.NodeExpiry
	}
	return -1
}
