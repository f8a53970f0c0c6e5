package server

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// Times of replicas.
const (
	followEvery = time.Second            // that the log is looked at without having been told to
	sharedFlush = 100 * time.Millisecond // Config.FlushInterval where others wait for it
	// conflictTries is how often a registration is tried again because another
	// replica took the same name or address at the same time.
	conflictTries = 8
)

// replica is what makes a server one of several over one database. All of them
// hold the whole working set in memory. What one decides goes to the database
// first, and from there to the memory of the others, by the log of changes.
// Whoever decides looks at the log before (lockOps); if two decide at the same
// time, the database's constraints let one of them through.
type replica struct {
	store store.Shared   // nil = the server has its store for itself
	after store.Position // how far the log was followed; guarded by Server.opMu
	wake  chan struct{}  // the log may have more; buffered

	// reports is held while reports are written, and while those of others are
	// read and applied, so that a claim is either in the rows that are read or
	// still in claims. Taken after opMu and before mu.
	reports sync.Mutex

	// Guarded by Server.mu.
	look   chan struct{}                // closed when the log was looked at once more
	others map[string]store.ReplicaInfo // that live
	claims map[wire.NodeID]bool         // nodes whose poll came here, not stored yet
}

func (r *replica) init(st store.Store) {
	r.wake = make(chan struct{}, 1)
	r.look = make(chan struct{})
	r.claims = make(map[wire.NodeID]bool)
	if shared, ok := st.(store.Shared); ok && shared.Replica() != "" {
		r.store = shared
	}
}

// name is this server's among the replicas.
func (r *replica) name() string { return r.store.Replica() }

// away reports whether the node has its poll at another replica that lives.
// Server.mu is held.
func (s *Server) away(n *node) bool {
	_, lives := s.replica.others[n.Replica]
	return lives && n.stream == nil
}

// lockOps takes opMu and brings the memory up to what other replicas did.
func (s *Server) lockOps() {
	s.opMu.Lock()
	if s.replica.store == nil {
		return
	}
	// If it cannot be read now, what is decided cannot be written either.
	if err := s.follow(s.ctx); err != nil && s.ctx.Err() == nil {
		s.log.Debug("changes of other replicas could not be read", zap.Error(err))
	}
}

// catchUp waits until what other replicas did before it was called is taken in: a
// node, a login or a key may have come by another a moment ago. All who call it
// at the same time share one look at the log.
func (s *Server) catchUp() {
	if s.replica.store == nil {
		return
	}
	s.mu.Lock()
	look := s.replica.look
	s.mu.Unlock()
	s.replica.poke()
	select {
	case <-look:
	case <-s.ctx.Done():
	}
}

// poke has the log looked at once more.
func (r *replica) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// startReplica starts what follows the other replicas.
func (s *Server) startReplica() {
	if s.replica.store == nil {
		return
	}
	s.wg.Go(s.followAll)
	s.wg.Go(s.listen)
	s.wg.Go(s.beat)
}

// pause waits, and reports whether the server goes on.
func (s *Server) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// followAll applies what other replicas do as soon as it is known, or somebody
// waits for it.
func (s *Server) followAll() {
	repair := time.NewTicker(followEvery)
	defer repair.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.replica.wake:
		case <-repair.C:
		}
		s.mu.Lock()
		look := s.replica.look
		s.replica.look = make(chan struct{})
		s.mu.Unlock()
		s.lockOps()
		s.opMu.Unlock()
		close(look)
	}
}

// listen waits for word of changes.
func (s *Server) listen() {
	for s.ctx.Err() == nil {
		err := s.replica.store.Listen(s.ctx, s.replica.poke)
		if s.ctx.Err() == nil {
			s.log.Warn("changes of other replicas are not announced, only looked for", zap.Error(err))
		}
		if !s.pause(time.Second + rand.N(time.Second)) {
			return
		}
	}
}

// beat tells the other replicas that this one lives, and learns which of them do.
func (s *Server) beat() {
	failing := false
	for s.pause(store.BeatEvery) {
		switch err := s.beatOnce(s.ctx); {
		case errors.Is(err, store.ErrLocked):
			s.log.Error("this server is no replica any more", zap.Error(err))
			if s.cfg.OnReplaced != nil {
				s.cfg.OnReplaced(err)
			}
			return
		case err != nil && s.ctx.Err() == nil && !failing:
			failing = true
			s.log.Error("the database does not answer: nodes keep what they have, and nothing can be changed", zap.Error(err))
		case err == nil && failing:
			failing = false
			s.log.Warn("the database answers again")
		}
	}
}

func (s *Server) beatOnce(ctx context.Context) error {
	s.mu.Lock()
	about := store.ReplicaInfo{}
	for _, region := range s.relays.fixed.Regions {
		about.Regions = append(about.Regions, region)
	}
	for key, k := range s.relays.known {
		if k.stream != nil && !k.left {
			about.Relays = append(about.Relays, key)
		}
	}
	s.mu.Unlock()
	others, err := s.replica.store.Beat(ctx, about)
	if err != nil {
		return err
	}
	s.opMu.Lock()
	defer s.opMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.meet(others)
	return nil
}

// meet takes in which other replicas live. opMu and Server.mu are held.
func (s *Server) meet(others map[string]store.ReplicaInfo) {
	before := s.replica.others
	s.replica.others = others
	now := s.cfg.Now()
	regions := make(map[int]*wire.DERPRegion)
	relays := false
	for _, o := range others {
		for _, region := range o.Regions {
			if region != nil {
				regions[region.RegionID] = region
			}
		}
		for _, key := range o.Relays {
			if k := s.relays.known[key]; k != nil && k.stream == nil {
				if k.gone {
					relays = true
					defer s.relays.remesh(k.Region.RegionID) // with it again
				}
				k.gone, k.until = false, now.Add(s.cfg.RelayLease)
			}
		}
	}
	if s.relays.elsewhere(regions) || relays {
		s.derpChanged()
	}
	same := len(before) == len(others)
	for name := range others {
		if _, ok := before[name]; !ok {
			same = false
		}
	}
	if same {
		return
	}
	for _, n := range s.nodes.byID {
		_, was := before[n.Replica]
		if _, is := others[n.Replica]; was != is {
			s.update(n, func() { s.locate(n) })
		}
	}
}

// locate says of a node that has no poll here whether it is online. Server.mu is
// held.
func (s *Server) locate(n *node) {
	switch {
	case n.stream != nil:
	case s.away(n):
		n.online, n.offlineAt = presenceOnline, time.Time{}
	case n.online == presenceOnline && n.offlineAt.IsZero():
		now := s.cfg.Now()
		n.offlineAt, n.idleSince = now.Add(s.cfg.OfflineGrace), now
	}
}

// update changes a node and lets peers and policy follow. opMu and Server.mu are
// held.
func (s *Server) update(n *node, change func()) {
	before := s.policyNode(n, s.policy.base)
	change()
	s.changed(n)
	if !samePolicyNode(before, s.policyNode(n, s.policy.base)) {
		s.entitle(n)
	}
	s.scheduleNode(n)
}

// follow applies what other replicas did since the last time. opMu is held.
func (s *Server) follow(ctx context.Context) error {
	r := &s.replica
	c, err := r.store.Changes(ctx, r.after)
	if err != nil {
		return err
	}
	if c.Lost {
		c.What = map[string]bool{"users": true, "policies": true, "grants": true, "shadow": true, "relays": true, "keys": true, "logins": true}
		if err := s.allNodes(ctx, &c); err != nil {
			return err
		}
	}
	if len(c.Nodes)+len(c.What) > 0 {
		if err := s.applyChanges(ctx, c); err != nil {
			return err
		}
	}
	r.after = c.Next
	return nil
}

// allNodes notes all nodes that are or were as changed.
func (s *Server) allNodes(ctx context.Context, c *store.Changes) error {
	all, err := s.store.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range all {
		c.Nodes[n.ID] = false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.nodes.byID {
		c.Nodes[id] = false
	}
	return nil
}

// applyChanges reads what changed and takes it in: users before the nodes that
// belong to them, and logins last, since who waits for one looks for its node.
func (s *Server) applyChanges(ctx context.Context, c store.Changes) error {
	for _, step := range []struct {
		what  string
		apply func(context.Context) error
	}{
		{"users", s.followUsers}, {"policies", s.followPolicy},
		{"", func(ctx context.Context) error { return s.followNodes(ctx, c.Nodes) }},
		{"grants", s.followGrants}, {"shadow", s.followShadow}, {"relays", s.followRelays}, {"keys", s.followKeys}, {"logins", s.followLogins},
	} {
		if step.what == "" || c.What[step.what] {
			if err := step.apply(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// followNodes takes in nodes that changed; of those with true, also what they
// report did.
func (s *Server) followNodes(ctx context.Context, changed map[wire.NodeID]bool) error {
	if len(changed) == 0 {
		return nil
	}
	s.replica.reports.Lock()
	defer s.replica.reports.Unlock()
	ids := make([]wire.NodeID, 0, len(changed))
	for id := range changed {
		ids = append(ids, id)
	}
	rows, err := s.replica.store.NodesByID(ctx, ids)
	if err != nil {
		return err
	}
	gone := make(map[wire.NodeID]bool, len(ids))
	for _, id := range ids {
		gone[id] = true
	}
	for _, row := range rows {
		delete(gone, row.ID)
	}
	if err := s.followRemoved(ctx, gone); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, row := range rows {
		s.applyNode(row, changed[row.ID])
	}
	return nil
}

// followRemoved forgets nodes that others removed.
func (s *Server) followRemoved(ctx context.Context, gone map[wire.NodeID]bool) error {
	for id := range gone {
		var key identity.NodePublic
		s.mu.Lock()
		n := s.nodes.byID[id]
		if n != nil {
			key = n.Key
		}
		s.mu.Unlock()
		if n == nil {
			continue
		}
		dead, err := s.store.DeadKey(ctx, key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		s.forget(id, err == nil && dead.Removed)
	}
	return nil
}

// applyNode takes in one node as it is stored. What it reports is taken too,
// unless it does so here. opMu, reports and Server.mu are held.
func (s *Server) applyNode(row store.Node, reported bool) {
	now := s.cfg.Now()
	n := s.nodes.byID[row.ID]
	if n == nil {
		n = s.nodes.add(row)
		n.expired = s.outAt(&n.Node, now)
		n.idleSince, n.online = now, presenceOffline
		s.locate(n)
		s.refresh(n)
		s.entitle(n)
		if !n.expired {
			s.member(n.Key, true)
		}
		s.scheduleNode(n)
		return
	}
	if n.Key != row.Key {
		// Nodes that name their process keep their former key for a while.
		s.rekey(n, row.Key, nil, row.Instance != "" && !n.expired)
	}
	if reported {
		n.unshown = false // it polled with it, elsewhere
	}
	if n.Name != row.Name || n.Hostname != row.Hostname {
		s.nodes.rename(n, row.Hostname, row.Name)
	}
	life, expires := n.KeyLife, n.Expires
	s.update(n, func() {
		state := n.NodeState
		n.Node = row
		if s.reportsHere(n, row) {
			n.NodeState = state
		} else {
			delete(s.unsaved, n.ID)
		}
		s.locate(n)
	})
	s.reconsider(n, s.outCode(n))
	if n.KeyLife != life || !n.Expires.Equal(expires) {
		s.changedSelf(n) // when it should renew its key
	}
}

// outCode is why a node is no member. Server.mu is held.
func (s *Server) outCode(n *node) wire.ErrorCode {
	if s.suspended(&n.Node) {
		return wire.CodeUserSuspended
	}
	return wire.CodeNodeKeyExpired
}

// reportsHere reports whether this replica knows better than the row what the
// node reports. If the node's poll has come to another one since it came here,
// the one here ends. reports and Server.mu are held.
func (s *Server) reportsHere(n *node, row store.Node) bool {
	elsewhere := row.Replica != "" && row.Replica != s.replica.name()
	switch {
	case s.replica.claims[n.ID]:
		return true // came here later
	case n.stream == nil:
		_, unsaved := s.unsaved[n.ID]
		return unsaved && !elsewhere
	case !elsewhere:
		return true
	}
	code := wire.CodeCloned
	if now := instances(&node{Node: row}); len(now) > 0 && now[0] == n.stream.instance {
		code = "" // the same process, at another replica
	}
	n.stream.end(code)
	n.stream = nil
	return false
}
