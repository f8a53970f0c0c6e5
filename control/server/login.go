package server

import (
	"container/list"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// Bounds on what machines without an auth key can make the server hold.
const (
	loginLife         = time.Hour
	maxLogins         = 1024
	maxLoginsBySource = 64
	// Those who wait hold a connection, of which Config.MaxUnknown are there
	// for all newcomers.
	maxWaiting         = 512
	maxWaitingBySource = 64
	maxAskedTags       = 32
)

// enrolment is a machine's wish to be a node.
type enrolment struct {
	machine   identity.MachinePublic
	key       identity.NodePublic
	old       identity.NodePublic // that key replaces, zero = none
	info      *wire.Hostinfo      // clean
	tags      []string            // asked for, sorted
	ephemeral bool
	expiry    time.Time // an earlier expiry that the node wishes for
	version   int
	instance  string // the process that asks, as it calls itself
}

func newEnrolment(c *client, req *wire.RegisterRequest) enrolment {
	e := enrolment{
		machine: c.machine, key: req.NodeKey, old: req.OldNodeKey, info: cleanHostinfo(req.Hostinfo),
		ephemeral: req.Ephemeral, expiry: req.Expiry, version: req.Version, instance: req.MeshInstance,
	}
	if req.Hostinfo != nil {
		e.tags = slices.Clone(req.Hostinfo.RequestTags)
		slices.Sort(e.tags)
		e.tags = slices.Compact(e.tags)
	}
	return e
}

// looksLike reports whether an administrator would see the same of both.
func (e *enrolment) looksLike(o *enrolment) bool {
	return e.info.Hostname == o.info.Hostname && e.info.OS == o.info.OS && slices.Equal(e.tags, o.tags) && e.ephemeral == o.ephemeral
}

// loginState is what became of a login.
type loginState uint8

const (
	loginPending loginState = iota
	loginApproved
	loginRejected
)

// login is a machine without an auth key that asks to be let in. It is guarded
// by Server.mu.
type login struct {
	enrolment
	code    string
	source  netip.Prefix
	asked   time.Time
	expires time.Time
	state   loginState
	node    wire.NodeID   // once approved
	done    chan struct{} // closed when the state is no longer loginPending, or the login is dropped
	waiter  chan struct{} // of the request that waits; closed when another takes its place
	place   *list.Element
	told    *store.Login // what is stored of it, nil = nothing
}

// logins are those that are open, and for as long as they would be, those that
// were decided. It is guarded by Server.mu.
type logins struct {
	byCode    map[[sha256.Size]byte]*login // by hash: a look-up's time says nothing about codes
	byMachine map[identity.MachinePublic]*login
	bySource  map[netip.Prefix]int
	order     list.List // of *login, oldest first; all live equally long
	waiting   int       // requests
	waitingBy map[netip.Prefix]int
	over      []string // codes of those that are still stored
}

func (g *logins) init() {
	g.byCode = make(map[[sha256.Size]byte]*login)
	g.byMachine = make(map[identity.MachinePublic]*login)
	g.bySource = make(map[netip.Prefix]int)
	g.waitingBy = make(map[netip.Prefix]int)
}

// count adds d to the count of k, and keeps no zeros.
func count[K comparable](m map[K]int, k K, d int) {
	if m[k] += d; m[k] == 0 {
		delete(m, k)
	}
}

// codeLen is the length of a login's code: 16 random bytes in base 32.
const codeLen = 26

// loginCode finds the code in what a node or an administrator gives: the code
// itself or the URL that ends with it.
func loginCode(text string) (string, bool) {
	code := text[strings.LastIndexByte(text, '/')+1:]
	if len(code) != codeLen {
		return "", false
	}
	for _, r := range code {
		if !strings.ContainsRune(stableAlphabet, r) {
			return "", false
		}
	}
	return code, true
}

// prune forgets what is over.
func (g *logins) prune(now time.Time) {
	for e := g.order.Front(); e != nil; e = g.order.Front() {
		l := e.Value.(*login)
		if now.Before(l.expires) {
			return
		}
		g.drop(l)
	}
}

// drop forgets a login; who waits for it is sent away to ask again.
func (g *logins) drop(l *login) {
	if l.place == nil {
		return
	}
	g.order.Remove(l.place)
	l.place = nil
	delete(g.byCode, sha256.Sum256([]byte(l.code)))
	if g.byMachine[l.machine] == l {
		delete(g.byMachine, l.machine)
	}
	count(g.bySource, l.source, -1)
	if l.told != nil {
		g.over = append(g.over, l.code)
	}
	if l.state == loginPending {
		close(l.done)
	}
}

// decide ends the waiting for a login.
func (l *login) decide(state loginState, node wire.NodeID) {
	if l.state == loginPending && l.place != nil {
		close(l.done)
	}
	l.state, l.node = state, node
}

// find returns the login with a code, or nil.
func (g *logins) find(text string, now time.Time) *login {
	g.prune(now)
	code, ok := loginCode(text)
	if !ok {
		return nil
	}
	return g.byCode[sha256.Sum256([]byte(code))]
}

var errTooManyLogins = errors.New("too many machines wait to be let in")

// ask returns the login for e: the one that is open for its machine, or a new
// one. What an administrator saw of a login never changes: a machine that
// describes itself in another way gets another. Who follows one up does not
// describe itself, so that two copies of a machine do not supersede each other
// for ever.
func (g *logins) ask(e enrolment, source netip.Prefix, followup bool, now time.Time) (*login, error) {
	g.prune(now)
	if l := g.byMachine[e.machine]; l != nil {
		if l.state == loginPending && (followup || l.looksLike(&e)) {
			l.key, l.old, l.expiry, l.version = e.key, e.old, e.expiry, e.version
			return l, nil
		}
		g.drop(l)
	}
	if g.bySource[source] >= maxLoginsBySource {
		return nil, errTooManyLogins
	}
	if len(g.byCode) >= maxLogins && !g.evict() {
		return nil, errTooManyLogins
	}
	var b [16]byte
	rand.Read(b[:])
	l := &login{
		enrolment: e, code: stableIDs.EncodeToString(b[:]), source: source,
		asked: now, expires: now.Add(loginLife), done: make(chan struct{}),
	}
	g.add(l)
	return l, nil
}

// add takes a login in.
func (g *logins) add(l *login) {
	l.place = g.order.PushBack(l)
	g.byCode[sha256.Sum256([]byte(l.code))] = l
	g.byMachine[l.machine] = l
	count(g.bySource, l.source, 1)
}

// evict drops the oldest login that nobody waits for.
func (g *logins) evict() bool {
	for e := g.order.Front(); e != nil; e = e.Next() {
		if l := e.Value.(*login); l.waiter == nil {
			g.drop(l)
			return true
		}
	}
	return false
}

// askLogin answers a machine that has neither a valid identity nor a key.
func (s *Server) askLogin(ctx context.Context, c *client, req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	if s.cfg.BaseURL == "" {
		return nil, wire.ErrNeedsLogin // nowhere to send anybody
	}
	e := newEnrolment(c, req)
	if len(e.tags) > maxAskedTags {
		return nil, fmt.Errorf("%w: more than %d", wire.ErrTagNotAllowed, maxAskedTags)
	}
	for _, t := range e.tags {
		if !strings.HasPrefix(t, "tag:") || plain(t) != t {
			return nil, fmt.Errorf("%w: %q", wire.ErrTagNotAllowed, clip(t))
		}
	}
	s.mu.Lock()
	l, err := s.logins.ask(e, source(c.source), req.Followup != "", s.cfg.Now())
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := s.storeLogin(ctx, l); err != nil {
		return nil, err
	}
	return &wire.RegisterResponse{AuthURL: s.loginURL(l.code)}, nil
}

func (s *Server) loginURL(code string) string {
	return strings.TrimRight(s.cfg.BaseURL, "/") + "/login/" + code
}

// awaitLogin holds a request back until the login that it follows up is
// decided or over. What becomes of the request then is register's business.
func (s *Server) awaitLogin(ctx context.Context, c *client, req *wire.RegisterRequest) {
	now := s.cfg.Now()
	g := &s.logins
	from := source(c.source)
	s.mu.Lock()
	l := g.find(req.Followup, now)
	if l == nil && s.replica.store != nil {
		// It may have asked another replica a moment ago.
		s.mu.Unlock()
		s.catchUp()
		s.mu.Lock()
		l = g.find(req.Followup, now)
	}
	switch {
	case l == nil, l.machine != c.machine, l.state != loginPending,
		l.waiter == nil && (g.waiting >= maxWaiting || g.waitingBy[from] >= maxWaitingBySource):
		s.mu.Unlock()
		return
	}
	l.key, l.old, l.expiry, l.version = req.NodeKey, req.OldNodeKey, req.Expiry, req.Version
	if l.waiter != nil {
		close(l.waiter)
	}
	replaced := make(chan struct{})
	l.waiter = replaced
	g.waiting++
	count(g.waitingBy, from, 1)
	s.mu.Unlock()
	if err := s.storeLogin(ctx, l); err != nil {
		s.log.Debug("a login's new key could not be stored", zap.Error(err))
	}

	over := time.NewTimer(l.expires.Sub(now))
	defer over.Stop()
	select {
	case <-ctx.Done():
	case <-l.done:
	case <-replaced:
	case <-over.C:
	case <-s.leaving:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g.waiting--
	count(g.waitingBy, from, -1)
	if l.waiter == replaced {
		l.waiter = nil
	}
}

// decided answers for a machine whose login was approved or rejected. Both
// results are zero for others. Server.mu is held.
func (s *Server) decided(c *client, req *wire.RegisterRequest) (wire.NodeID, error) {
	now := s.cfg.Now()
	if l := s.logins.find(req.Followup, now); l != nil && l.machine == c.machine && l.state == loginRejected {
		return 0, wire.ErrLoginRejected
	}
	l := s.logins.byMachine[c.machine]
	if l == nil || l.state != loginApproved {
		return 0, nil
	}
	// Approved for the key that the machine had last shown. It may have made
	// another meanwhile; once it has polled, it knows the answer.
	n := s.nodes.byID[l.node]
	if n == nil || n.Machine != c.machine || n.Polled || expiredAt(n.Expires, now) {
		s.logins.drop(l)
		return 0, nil
	}
	return n.ID, nil
}

// ApproveLogin lets the machine in that asks with the given code (or URL), as
// the node of a user or, with tags, as a node of these tags: give one of the
// two. Errors: store.ErrNotFound for code and user, store.ErrConflict if it was
// decided already, admin.ErrInvalid.
func (s *Server) ApproveLogin(ctx context.Context, by, code, user string, tags []string) (wire.NodeID, error) {
	ctx = context.WithoutCancel(ctx)
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	l, err := s.openLogin(code)
	var key store.Key
	if err == nil {
		key.User, key.Tags, err = s.ownerOf(user, tags)
	}
	if err != nil {
		s.mu.Unlock()
		return 0, err
	}
	e := l.enrolment
	var old *store.Node
	if n := s.nodes.byKey[e.old]; n != nil && n.Machine == e.machine {
		sn := n.Node
		old = &sn
	}
	s.mu.Unlock()
	id, err := s.enrol(e, nil, key, old, false, func(n store.Node) (store.Node, error) {
		return s.store.AdmitNode(ctx, by, n, s.cfg.Now())
	})
	switch {
	case errors.Is(err, wire.ErrTagNotAllowed):
		who := "user " + user
		if len(tags) > 0 {
			who = "--tag"
		}
		return 0, fmt.Errorf("%w: the machine asks for %s, which %s may not give it: approve it with --tag %s, or reject it",
			errInvalid, strings.Join(e.tags, " "), who, strings.Join(e.tags, ","))
	case err != nil:
		return 0, err
	}
	s.decideLogin(ctx, l, loginApproved, id)
	return id, nil
}

// RejectLogin turns away the machine that asks with the given code (or URL).
// Errors are ApproveLogin's.
func (s *Server) RejectLogin(ctx context.Context, by, code string) error {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	l, err := s.openLogin(code)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.store.Note(context.WithoutCancel(ctx), by, "node.reject", label(l.info.Hostname), keyStart(l.machine), s.cfg.Now()); err != nil {
		return err
	}
	s.decideLogin(ctx, l, loginRejected, 0)
	return nil
}

// decideLogin ends the waiting for a login, here and at other replicas. If these
// cannot be told, the machine asks once more there.
func (s *Server) decideLogin(ctx context.Context, l *login, state loginState, node wire.NodeID) {
	s.mu.Lock()
	l.decide(state, node)
	s.mu.Unlock()
	if err := s.storeLogin(context.WithoutCancel(ctx), l); err != nil {
		s.log.Warn("what became of a login could not be stored", zap.Error(err))
	}
}

// openLogin returns a login that is not decided yet. Server.mu is held.
func (s *Server) openLogin(code string) (*login, error) {
	l := s.logins.find(strings.ToLower(code), s.cfg.Now())
	switch {
	case l == nil:
		return nil, fmt.Errorf("login %q: %w: it may be over by now; `mesh node pending` lists those that wait", clip(code), store.ErrNotFound)
	case l.state == loginApproved:
		return nil, fmt.Errorf("%w: this login was approved already", store.ErrConflict)
	case l.state == loginRejected:
		return nil, fmt.Errorf("%w: this login was rejected already", store.ErrConflict)
	}
	return l, nil
}
