package server

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"mesh/control/wire"
)

// noteAhead puts on record that a node has a version of the policy in force that
// this server never made: its database is an older copy of itself, and has
// forgotten what was withdrawn since. Whoever is a member could make that up, so
// it is recorded once, with the node's name.
func (s *Server) noteAhead(ctx context.Context, id wire.NodeID, version int64) {
	s.catchUp() // it may be of another replica, a moment ago
	s.mu.Lock()
	n, newest := s.nodes.byID[id], s.policy.Version
	if n == nil || version <= newest || s.ahead {
		s.mu.Unlock()
		return
	}
	s.ahead = true
	name := n.Name
	s.mu.Unlock()
	s.log.Error("the database is an older copy of itself: remove and revoke again what a record of before the restore lists",
		zap.String("node", name), zap.Int64("has policy", version), zap.Int64("newest", newest))
	detail := fmt.Sprintf("node %s has version %d of the policy in force, and the newest is %d: what was removed, revoked or suspended in between is in force again", name, version, newest)
	if err := s.store.Note(context.WithoutCancel(ctx), "server", "store.restored", "database", detail, s.cfg.Now()); err != nil {
		s.log.Error("could not be recorded", zap.String("what", "store.restored"), zap.Error(err))
	}
}
