package server

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// serveRegister is POST /machine/register.
func (s *Server) serveRegister(w http.ResponseWriter, r *http.Request, c *client) {
	if !s.limit.ok(c.source) {
		s.meters.denied(atRegister, nil, denyRate)
		tooMany(w, 5)
		return
	}
	var req wire.RegisterRequest
	if !readJSON(w, r, &req) {
		return
	}
	if req.Followup != "" && !s.tooOld(c, &req) && !s.isLogout(&req) {
		if s.awaitLogin(r.Context(), c, &req); r.Context().Err() != nil {
			return
		}
	}
	resp, err := s.register(r.Context(), c, &req)
	for try := 1; s.replica.store != nil && errors.Is(err, store.ErrConflict) && try < conflictTries; try++ {
		resp, err = s.register(r.Context(), c, &req)
	}
	switch {
	case errors.Is(err, errTooManyLogins):
		s.limit.failed(c.source)
		s.meters.denied(atRegister, nil, denyRate)
		tooMany(w, 60)
		return
	case err != nil:
		code := wire.CodeOf(err)
		if code == "" {
			s.meters.denied(atRegister, nil, denyFail)
			s.broken(w, "registration failed", err)
			return
		}
		s.limit.failed(c.source)
		text := code.Err().Error()
		if code == wire.CodeTagNotAllowed {
			text = err.Error() // names the tag that the caller named
		}
		resp = &wire.RegisterResponse{Error: text, MeshCode: code}
	case resp.MachineAuthorized:
		c.known()
		s.loggedIn(c)
	}
	if resp.MeshCode != "" {
		s.meters.denied(atRegister, resp.MeshCode.Err(), denyFail)
	}
	s.meters.registered(resp)
	writeJSON(w, http.StatusOK, resp)
}

func (s *Server) tooOld(c *client, req *wire.RegisterRequest) bool {
	return req.Version < wire.MinCapabilityVersion || c.version < wire.MinCapabilityVersion
}

func (s *Server) isLogout(req *wire.RegisterRequest) bool {
	return !req.Expiry.IsZero() && req.Expiry.Before(s.cfg.Now())
}

// loggedIn notes that a machine is in, by whatever way: it waits no longer.
func (s *Server) loggedIn(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.logins.byMachine[c.machine]; l != nil && l.state == loginPending {
		s.logins.drop(l)
	}
}

// newKeyPlease tells a client to make another node key and ask again.
func newKeyPlease(code wire.ErrorCode) *wire.RegisterResponse {
	return &wire.RegisterResponse{NodeKeyExpired: true, MeshCode: code}
}

// register decides what a machine's wish to be a node leads to. Refusals are
// the errors of package wire.
func (s *Server) register(ctx context.Context, c *client, req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	if s.tooOld(c, req) {
		return nil, wire.ErrVersionTooOld
	}
	if req.NodeKey.IsZero() {
		return newKeyPlease(""), nil
	}
	// What follows changes store and memory alike: a client that hangs up must
	// not leave them different.
	ctx = context.WithoutCancel(ctx)
	now := s.cfg.Now()
	logout := s.isLogout(req)

	if resp, err := s.registerKnown(ctx, c, req, logout); resp != nil || err != nil {
		return resp, err
	}
	if logout {
		return newKeyPlease(""), nil // who is gone need not leave
	}

	// The key is looked at before the lock, so that those who only guess do
	// not hold up the others.
	var key store.Key
	var keyErr error = wire.ErrNeedsLogin
	text := ""
	if req.Auth != nil && req.Auth.AuthKey != "" {
		text = strings.TrimSpace(req.Auth.AuthKey)
		key, keyErr = s.store.VerifyKey(ctx, store.KeyNode, text, now)
		if keyErr != nil && wire.CodeOf(keyErr) == "" {
			return nil, keyErr
		}
	}

	if keyErr == nil && req.OldNodeKey.IsZero() {
		if resp, err := s.registerNew(ctx, c, req, key, text); !errors.Is(err, errAlone) {
			return resp, err
		}
	}

	s.lockOps()
	defer s.opMu.Unlock()
	// The same request may have been served meanwhile.
	if resp, err := s.knownNode(c, req); resp != nil || err != nil {
		return resp, err
	}
	if resp, err := s.registerDead(ctx, c, req.NodeKey, key, keyErr); resp != nil || err != nil {
		return resp, err
	}
	old, err := s.formerSelf(ctx, c, req.OldNodeKey)
	if err != nil {
		return nil, err
	}
	if old != nil {
		if old.Machine != c.machine {
			return nil, wire.ErrMachineMismatch
		}
		// A valid identity goes before an auth key: it stays, with a new key.
		if !expiredAt(old.Expires, now) {
			return s.rotate(ctx, c, old.ID, req)
		}
	}
	if errors.Is(keyErr, wire.ErrAuthKeyUsed) {
		// The answer to an earlier attempt may have been lost, and stock
		// clients try again with another node key.
		s.mu.Lock()
		n := s.nodes.byID[key.UsedBy]
		again := n != nil && n.Machine == c.machine && !n.Polled && !expiredAt(n.Expires, now)
		s.mu.Unlock()
		if again {
			return s.rotate(ctx, c, key.UsedBy, req)
		}
	}
	if keyErr != nil {
		mayAsk := s.cfg.BaseURL != "" && errors.Is(keyErr, wire.ErrNeedsLogin)
		if !req.OldNodeKey.IsZero() && old == nil && !mayAsk {
			if _, err := s.registerDead(ctx, c, req.OldNodeKey, key, keyErr); errors.Is(err, wire.ErrNodeRevoked) {
				return nil, err
			}
		}
		if !errors.Is(keyErr, wire.ErrNeedsLogin) {
			return nil, keyErr
		}
		s.mu.Lock()
		id, err := s.decided(c, req)
		s.mu.Unlock()
		switch {
		case err != nil:
			return nil, err
		case id != 0:
			return s.rotate(ctx, c, id, req)
		}
		return s.askLogin(ctx, c, req)
	}
	return s.enrolWith(ctx, c, req, key, text, old, false)
}

// errAlone says that a registration needs opMu for itself.
var errAlone = errors.New("nothing else may change meanwhile")

// registerNew is register for what is most likely a new node, of which many may
// come at a time.
func (s *Server) registerNew(ctx context.Context, c *client, req *wire.RegisterRequest, key store.Key, text string) (*wire.RegisterResponse, error) {
	s.catchUp()
	s.opMu.RLock()
	defer s.opMu.RUnlock()
	if resp, err := s.knownNode(c, req); resp != nil || err != nil {
		return resp, err
	}
	if resp, err := s.registerDead(ctx, c, req.NodeKey, key, nil); resp != nil || err != nil {
		return resp, err
	}
	return s.enrolWith(ctx, c, req, key, text, nil, true)
}

// enrolWith enrols by an auth key; see enrol.
func (s *Server) enrolWith(ctx context.Context, c *client, req *wire.RegisterRequest, key store.Key, text string, old *store.Node, shared bool) (*wire.RegisterResponse, error) {
	if buried, err := s.store.Buried(ctx, c.machine, key.ID); err != nil {
		return nil, err
	} else if buried {
		return nil, fmt.Errorf("%w: this auth key brought the removed node in", wire.ErrNodeRevoked)
	}
	id, err := s.enrol(newEnrolment(c, req), c, key, old, shared, func(n store.Node) (store.Node, error) {
		return s.store.RegisterNode(ctx, text, n, s.cfg.Now())
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return nil, wire.ErrNodeUnknown
	}
	return s.welcome(&n.Node), nil
}

// registerKnown handles requests with the key of a live node: restart, logout,
// and the wish for an earlier expiry. Both results are nil for other keys.
func (s *Server) registerKnown(ctx context.Context, c *client, req *wire.RegisterRequest, logout bool) (*wire.RegisterResponse, error) {
	resp, err := s.knownNode(c, req)
	if resp == nil || err != nil || req.Expiry.IsZero() {
		return resp, err
	}
	if logout {
		s.mu.Lock()
		n := s.nodes.byKey[req.NodeKey]
		ephemeral := n != nil && n.Machine == c.machine && n.Ephemeral
		s.mu.Unlock()
		if ephemeral {
			return newKeyPlease(""), s.leave(ctx, "node", n.ID, func(n *node) bool { return n.Key == req.NodeKey })
		}
	}
	s.lockOps()
	defer s.opMu.Unlock()
	now := s.cfg.Now()
	s.mu.Lock()
	n := s.nodes.byKey[req.NodeKey]
	if n == nil || n.Machine != c.machine {
		s.mu.Unlock()
		return newKeyPlease(""), nil
	}
	id, expires := n.ID, n.Expires
	s.mu.Unlock()
	switch {
	case logout:
		if expiredAt(expires, now) {
			return newKeyPlease(""), nil
		}
		return newKeyPlease(""), s.setExpiry(ctx, "node", id, now)
	case expires.IsZero() || req.Expiry.Before(expires):
		return resp, s.setExpiry(ctx, "node", id, req.Expiry)
	}
	return resp, nil
}

// setExpiry changes when a node's key expires. opMu is held.
func (s *Server) setExpiry(ctx context.Context, by string, id wire.NodeID, at time.Time) error {
	now := s.cfg.Now()
	if err := s.store.ExpireNode(ctx, by, id, at, now); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byID[id]
	if n == nil {
		return nil
	}
	if n.Expires = at; !at.IsZero() {
		n.KeyLife = 0
	}
	s.reconsider(n, wire.CodeNodeKeyExpired)
	return nil
}

// knownNode answers for a node key that is registered. Both results are nil if
// it is not.
func (s *Server) knownNode(c *client, req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.byKey[req.NodeKey]
	switch {
	case n == nil:
		return nil, nil
	case n.Machine != c.machine:
		return nil, wire.ErrMachineMismatch
	case s.suspended(&n.Node):
		return nil, wire.ErrUserSuspended
	case expiredAt(n.Expires, s.cfg.Now()):
		return newKeyPlease(wire.CodeNodeKeyExpired), nil
	}
	return s.admitProcess(n, c, req)
}

// registerDead answers for a node key that is no longer accepted. Both results
// are nil for other keys.
func (s *Server) registerDead(ctx context.Context, c *client, nodeKey identity.NodePublic, key store.Key, keyErr error) (*wire.RegisterResponse, error) {
	dead, err := s.store.DeadKey(ctx, nodeKey)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case dead.Machine != c.machine:
		return nil, wire.ErrMachineMismatch
	case dead.Removed && (keyErr != nil || key.ID == dead.AuthKey):
		return nil, wire.ErrNodeRevoked
	}
	return newKeyPlease(""), nil
}

// formerSelf returns the node that a key belongs to, or, where the machine comes
// with an old state, has belonged to; nil if none.
func (s *Server) formerSelf(ctx context.Context, c *client, key identity.NodePublic) (*store.Node, error) {
	if key.IsZero() {
		return nil, nil
	}
	find := func(n func() *node) *store.Node {
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := n(); n != nil {
			sn := n.Node
			return &sn
		}
		return nil
	}
	if old := find(func() *node { return s.nodes.byKey[key] }); old != nil {
		return old, nil
	}
	dead, err := s.store.DeadKey(ctx, key)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case dead.Removed || dead.Machine != c.machine:
		return nil, nil
	}
	old := find(func() *node { return s.nodes.byID[dead.Node] })
	if old != nil && old.Machine != c.machine {
		return nil, nil
	}
	return old, nil
}

// rotate gives a node another key. opMu is held.
func (s *Server) rotate(ctx context.Context, c *client, id wire.NodeID, req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	now := s.cfg.Now()
	s.mu.Lock()
	n := s.nodes.byID[id]
	switch {
	case n == nil:
		s.mu.Unlock()
		return nil, wire.ErrNodeUnknown
	case s.suspended(&n.Node):
		s.mu.Unlock()
		return nil, wire.ErrUserSuspended
	}
	// Before anything changes: a copy that is no longer the node must not
	// take its key away.
	replaced, err := s.claim(n, req.MeshInstance, req.MeshYield)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	expires := n.Expires
	if life, ok := s.ownKeyLife(n); ok && !expiredAt(expires, now) {
		expires = expiry(life, now)
	}
	var kept time.Time
	if req.MeshKeeps && !n.expired {
		kept = now.Add(wire.KeptKeyFor)
	}
	s.mu.Unlock()
	if err := s.store.RotateNodeKey(ctx, id, req.NodeKey, expires, kept, now); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n.Expires = expires
	s.rekey(n, req.NodeKey, c, !kept.IsZero() && !n.expired)
	return s.welcomeProcess(n, c, replaced), nil
}

// rekey replaces a node's key in memory. A former key that is kept stays a
// member for a while, and the one that peers are told until the node polls with
// the new one: it has to be found by that first. Server.mu is held.
func (s *Server) rekey(n *node, key identity.NodePublic, c *client, keep bool) {
	s.dropFormer(n)
	if old := n.Key; keep {
		n.former, n.formerUntil, n.unshown = old, s.cfg.Now().Add(wire.KeptKeyFor), true
		s.nodes.rekey(n, key)
		s.nodes.formers[old] = n
	} else {
		s.member(old, false)
		s.nodes.rekey(n, key)
	}
	if !n.expired {
		s.member(key, true)
	}
	if n.stream != nil && n.stream.client != c {
		// Opened with the key that has just died. No reason is given: it is
		// the node's own doing, and it polls again with the other key.
		n.stream.end("")
	}
	s.changed(n)
	s.scheduleNode(n)
}

// enrol makes a node out of a wish and what entitles to it: a new one, or with
// a new key the one that it was before, if that has the same owner. put stores
// it. c is the connection of the node itself, or nil. opMu is held; or, with shared, a
// share of it: then errAlone may be the answer.
func (s *Server) enrol(e enrolment, c *client, key store.Key, old *store.Node, shared bool, put func(store.Node) (store.Node, error)) (wire.NodeID, error) {
	now := s.cfg.Now()
	s.mu.Lock()
	tags, err := s.grantTags(e.tags, key)
	if !s.users[key.User].Suspended.IsZero() {
		err = wire.ErrUserSuspended
	}
	if err != nil {
		s.mu.Unlock()
		return 0, err
	}
	n := store.Node{
		Machine: e.machine, Key: e.key, Tags: tags, Created: now,
		Ephemeral: key.Ephemeral || e.ephemeral,
		NodeState: store.NodeState{Hostinfo: e.info, Cap: e.version, Instance: cleanInstance(e.instance)},
	}
	if len(tags) == 0 {
		n.User = key.User
	}
	owner := s.users[n.User]
	life := s.nodeKeyLife(key.NodeExpiry, policy.Node{User: owner.Name, Role: policyRole(owner.Role), Tags: tags})
	n.Expires, n.KeyLife = expiry(life, now), ownLife(key)
	if e.expiry.After(now) && (n.Expires.IsZero() || e.expiry.Before(n.Expires)) {
		n.Expires, n.KeyLife = e.expiry, 0
	}
	if old == nil || !sameOwner(old, &n) {
		old = s.nodes.expiredLike(&n, now)
	}
	renew := old != nil
	if shared && (renew || s.nodes.enrolling[n.Machine]) {
		s.mu.Unlock()
		return 0, errAlone
	}
	if renew {
		if m := s.nodes.byID[old.ID]; m == nil || superseded(m, e.instance) {
			s.mu.Unlock()
			return 0, wire.ErrCloned
		}
		n.ID, n.StableID, n.Created = old.ID, old.StableID, old.Created
		n.Hostname, n.Name, n.Named, n.IPv4, n.IPv6 = old.Hostname, old.Name, old.Named, old.IPv4, old.IPv6
		n.NodeState = old.NodeState
		n.Polled = false // with this key
	} else {
		n.StableID = newStableID()
		n.Hostname = label(e.info.Hostname)
		n.Name = s.nodes.names.free(n.Hostname, 0)
		n.IPv4, n.IPv6, err = s.nodes.pool.peek()
		if err == nil {
			s.nodes.reserve(&n)
		}
	}
	s.mu.Unlock()
	if err != nil {
		return 0, err
	}
	reserved := n
	n, err = put(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !renew {
		s.nodes.release(&reserved, err == nil)
	}
	switch {
	case shared && errors.Is(err, store.ErrConflict):
		return 0, errAlone // another has the node key by now
	case err != nil:
		return 0, err
	}
	if renew {
		m := s.nodes.byID[n.ID]
		m.Expires, m.Ephemeral, m.AuthKey, m.Polled, m.idleSince = n.Expires, n.Ephemeral, n.AuthKey, false, now
		m.KeyLife = n.KeyLife
		m.expired = false
		if _, err := s.claim(m, e.instance, false); err != nil {
			return 0, err
		}
		s.rekey(m, n.Key, c, false)
		s.entitle(m)
		return n.ID, nil
	}
	m := s.nodes.add(n)
	m.idleSince = now
	if c != nil {
		s.noteReuse(m, c.source)
	}
	// Until its first poll nobody can reach it.
	m.online = presenceOffline
	s.refresh(m)
	s.entitle(m)
	s.member(n.Key, true)
	s.scheduleNode(m)
	return n.ID, nil
}

func sameOwner(a, b *store.Node) bool { return a.User == b.User && slices.Equal(a.Tags, b.Tags) }

// grantTags decides on a new node's tags: those of the key and no others; or,
// with a user's key, those it asks for and the user may give. Server.mu is
// held.
func (s *Server) grantTags(asked []string, key store.Key) ([]string, error) {
	if len(key.Tags) > 0 {
		for _, t := range asked {
			if !slices.Contains(key.Tags, t) {
				return nil, fmt.Errorf("%w: %q", wire.ErrTagNotAllowed, clip(t))
			}
		}
		return key.Tags, nil
	}
	for _, t := range asked {
		if !s.policy.tagOwner(s.users[key.User], t) {
			return nil, fmt.Errorf("%w: %q", wire.ErrTagNotAllowed, clip(t))
		}
	}
	return asked, nil
}

// welcome is the answer to a node that is in. Server.mu is held.
func (s *Server) welcome(n *store.Node) *wire.RegisterResponse {
	p := s.profile(wireUser(n))
	if p == nil {
		p = &wire.UserProfile{ID: wireUser(n)}
	}
	return &wire.RegisterResponse{
		User:              wire.User{ID: p.ID, DisplayName: p.DisplayName, Created: s.users[n.User].Created},
		Login:             wire.Login{ID: int64(p.ID), LoginName: p.LoginName, DisplayName: p.DisplayName},
		MachineAuthorized: true,
	}
}

const stableAlphabet = "abcdefghijkmnpqrstuvwxyz23456789"

var stableIDs = base32.NewEncoding(stableAlphabet).WithPadding(base32.NoPadding)

func newStableID() identity.StableID {
	var b [10]byte
	rand.Read(b[:])
	return identity.StableID("n" + stableIDs.EncodeToString(b[:]))
}
