package server

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"mesh/control/wire"
)

// stream is an open map poll. What its node still has to learn is in pending,
// what it knows in the members that only the poll's own goroutine touches.
type stream struct {
	id     wire.NodeID
	client *client
	// instance is the process that polls, "" = unknown.
	instance string
	wake     chan struct{} // buffered: pending is not empty
	urgent   chan struct{} // buffered: something must not be held back
	// reports is whether the node answers MeshMapVersion.
	reports bool

	pending pending // guarded by Server.mu

	session // for the node to resume

	// sent, routes, profiles and caps are written with Server.mu held; the rest
	// belongs to the goroutine of the poll.
	sent     told                           // peers as the node knows them
	routes   map[wire.NodeID][]netip.Prefix // behind them, as the node knows
	profiles map[wire.UserID]*wire.UserProfile
	caps     map[string][]json.RawMessage // of the node itself
	filter   [sha256.Size]byte            // of the rules as encoded
	policy   int64
	spoke    time.Time // when the last message left
	credit   bucket    // of messages that need not be held back
}

// pending is what changed for a stream since it last looked. Its size is
// bounded by the number of nodes.
type pending struct {
	peers  changes
	all    bool // any peer may have come, gone or changed
	self   bool
	filter bool
	derp   bool
	flows  bool // whether to report flows
	// version is what the node is to report when all this is in force; 0 =
	// nobody asks.
	version int64
	ended   bool
	// spread: with ended, how long all nodes may take to come back; 0 = as they
	// please.
	spread time.Duration
	code   wire.ErrorCode // why it ended, "" = replaced
	last   *wire.Node     // with code: what the node is to think of itself, nil = as before
}

// takenIn is when a stock client has surely taken a new peer in. Some versions lose
// patches that come before: they would not know the endpoints of a node that
// joined a moment ago, and reach it by relay until it sends something itself.
// Ours, which name their process, do not.
const takenIn = 10 * time.Second

func newStream(id wire.NodeID, c *client) *stream {
	return &stream{
		id: id, client: c, wake: make(chan struct{}, 1), urgent: make(chan struct{}, 1),
	}
}

// The methods below need Server.mu.

func (st *stream) poke() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// hurry is poke for what must not wait.
func (st *stream) hurry() {
	select {
	case st.urgent <- struct{}{}:
	default:
	}
	st.poke()
}

// peer has the stream look at a peer. One that it must not see any more cannot
// wait.
func (st *stream) peer(id wire.NodeID, visible bool) {
	st.pending.peers.add(id, visible)
	if visible {
		st.poke()
	} else {
		st.hurry()
	}
}

// left is peer for one that went of its own accord, which is no reason to hurry.
func (st *stream) left(id wire.NodeID) {
	st.pending.peers.add(id, false)
	st.poke()
}

// setRoutes notes which routes behind a peer the node knows. Few peers have any.
func (st *stream) setRoutes(id wire.NodeID, routes []netip.Prefix) {
	switch {
	case len(routes) == 0:
		delete(st.routes, id)
	case st.routes == nil:
		st.routes = make(map[wire.NodeID][]netip.Prefix)
		fallthrough
	default:
		st.routes[id] = routes
	}
}

func (st *stream) end(code wire.ErrorCode) {
	if !st.pending.ended {
		st.pending.ended, st.pending.code = true, code
	}
	st.hurry()
}

// changed makes everybody who can see n look at it again, if there is
// something new to see. Server.mu is held.
func (s *Server) changed(n *node) {
	if !s.refresh(n) {
		return
	}
	s.changedSelf(n)
	for _, id := range s.policy.compiled.Visible(n.ID) {
		if v := s.nodes.byID[id]; v != nil && v.stream != nil {
			v.stream.peer(n.ID, true)
		}
	}
}

// changedSelf makes n look at itself again. Server.mu is held.
func (s *Server) changedSelf(n *node) {
	if n.stream != nil {
		n.stream.pending.self = true
		n.stream.poke()
	}
}

// affected tells the nodes whose filter or peers a change of subject touched:
// ids, in order. Server.mu is held.
func (s *Server) affected(subject wire.NodeID, ids []wire.NodeID) {
	var visible []wire.NodeID
	if s.nodes.byID[subject] != nil {
		visible = s.policy.compiled.Visible(subject)
	}
	for _, id := range ids {
		v := s.nodes.byID[id]
		if v == nil || v.stream == nil {
			continue
		}
		v.stream.pending.filter = true
		if id == subject {
			v.stream.pending.all = true
			v.stream.poke()
			continue
		}
		_, ok := slices.BinarySearch(visible, id)
		v.stream.peer(subject, ok)
	}
	for _, id := range visible {
		if _, told := slices.BinarySearch(ids, id); told {
			continue
		}
		if v := s.nodes.byID[id]; v != nil && v.stream != nil {
			v.stream.peer(subject, true)
		}
	}
}

// step leads from what a node knows of a peer to what it should know; whole says
// all of that.
type step struct{ from, to, whole *view }

func sortViews(list []*view) {
	slices.SortFunc(list, func(a, b *view) int { return cmp.Compare(a.node.ID, b.node.ID) })
}

// news is what a stream found under the lock and encodes after it.
type news struct {
	self     *wire.Node
	derp     *wire.DERPMap
	whole    []*view // to send as nodes
	patched  []step  // to send as patches, where that can be
	removed  []wire.NodeID
	profiles []wire.UserProfile
	rules    []wire.FilterRule // nil = not looked at
	policy   int64
	flows    *int
	version  int64
	spread   time.Duration
	seq      int64 // of the last message of these news; 0 = the node does not resume
	ended    bool
	code     wire.ErrorCode
}

// collect takes what is pending for st. Server.mu is held.
func (s *Server) collect(st *stream) (n news) {
	p := st.pending
	st.pending = pending{}
	me := s.nodes.byID[st.id]
	if p.ended || me == nil {
		n.ended, n.code, n.self, n.spread = true, p.code, p.last, p.spread
		if p.code != wire.CodeNodeKeyExpired || me == nil {
			return n
		}
		// The node should hear of its expiry in the terms of the protocol too.
		p = pending{self: true}
	}
	n.policy, n.version = s.policy.Version, p.version
	var back undo
	defer func() {
		back.filter, back.profiles = p.filter, len(n.profiles) > 0
		n.seq = st.tell(back)
	}()
	before := func(id wire.NodeID) {
		if st.seq > 0 { // nobody takes the first message back
			back.peers = append(back.peers, undoPeer{id, st.sent.get(id), st.routes[id]})
		}
	}
	user := func(id wire.UserID) {
		if p := s.profile(id); p != nil && st.profiles[id] != p {
			n.profiles = append(n.profiles, *p)
			if st.profiles == nil {
				st.profiles = make(map[wire.UserID]*wire.UserProfile)
			}
			st.profiles[id] = p
		}
	}
	if p.self || p.all && !reflect.DeepEqual(st.caps, s.attributes(st.id)) {
		n.self = s.selfNode(me)
		st.caps = n.self.CapMap
		user(n.self.User)
	}
	if p.flows {
		n.flows = s.shadow.interval()
	}
	if p.derp {
		n.derp = s.relays.derpMap()
	}
	if p.filter {
		if n.rules = s.policy.compiled.Filter(st.id); n.rules == nil {
			n.rules = []wire.FilterRule{}
		}
	}
	look := func(id wire.NodeID) {
		other := s.nodes.byID[id]
		if other == nil || id == st.id {
			return
		}
		had, v := st.sent.get(id), other.view
		var routes []netip.Prefix
		if len(other.routed) > 0 {
			routes = s.policy.compiled.Routes(st.id, id)
		}
		same := slices.Equal(routes, st.routes[id])
		if had == v && same {
			return
		}
		before(id)
		if had != nil && same && (st.instance != "" || s.cfg.Now().Sub(other.Created) > takenIn) {
			n.patched = append(n.patched, step{had, v, v.with(routes)})
		} else {
			n.whole = append(n.whole, v.with(routes))
		}
		st.sent.put(v)
		st.setRoutes(id, routes)
		user(v.node.User)
	}
	gone := func(id wire.NodeID) {
		if st.sent.get(id) != nil {
			before(id)
			st.sent.drop(id)
			st.setRoutes(id, nil)
			n.removed = append(n.removed, id)
		}
	}
	if p.all {
		visible := s.policy.compiled.Visible(st.id)
		for _, v := range slices.Clone(st.sent) {
			if _, ok := slices.BinarySearch(visible, v.node.ID); !ok || s.nodes.byID[v.node.ID] == nil {
				gone(v.node.ID)
			}
		}
		st.sent = slices.Grow(st.sent, max(len(visible)-len(st.sent), 0))
		// A policy also says which groups users are in.
		user(wireUser(&me.Node))
		for _, id := range visible {
			look(id)
			if other := s.nodes.byID[id]; other != nil {
				user(wireUser(&other.Node))
			}
		}
	} else {
		for _, c := range p.peers.latest() {
			if c.visible && s.nodes.byID[c.id] != nil {
				look(c.id)
			} else {
				gone(c.id)
			}
		}
	}
	slices.Sort(n.removed)
	if len(n.profiles) > 0 && n.self == nil {
		// Stock clients take profiles into their status only when they rebuild
		// their view, and the self node makes them do so.
		n.self = s.selfNode(me)
	}
	return n
}

// messages encodes news for a stream. What makes stock clients rebuild their
// whole view travels apart from the rest, unless there are profiles: those
// belong to the rebuilding. It runs without the lock.
func (st *stream) messages(n news) (out []*response, err error) {
	m := new(response)
	m.Node, m.DERPMap = n.self, n.derp
	if (n.self != nil || n.derp != nil) && len(n.profiles) == 0 {
		out = append(out, m)
		m = new(response)
	}
	// In one order for all, so that equal news are equal messages.
	slices.SortFunc(n.patched, func(a, b step) int { return cmp.Compare(a.to.node.ID, b.to.node.ID) })
	for _, p := range n.patched {
		if b := p.to.patchFrom(p.from); b != nil {
			m.patches = append(m.patches, b)
		} else {
			n.whole = append(n.whole, p.whole)
		}
	}
	sortViews(n.whole)
	m.whole = n.whole
	m.PeersRemoved = n.removed
	if m.filter, err = st.newFilter(n.rules); err != nil {
		return nil, err
	}
	m.UserProfiles = n.profiles
	if m.filter != nil || len(n.whole)+len(n.patched)+len(n.removed)+len(n.profiles) > 0 {
		if st.policy != n.policy {
			st.policy, m.MeshPolicy = n.policy, n.policy
		}
		out = append(out, m)
	}
	if n.flows != nil {
		if len(out) == 0 {
			out = append(out, new(response))
		}
		out[len(out)-1].MeshReportFlows = n.flows
	}
	if n.version != 0 {
		if len(out) == 0 {
			out = append(out, new(response))
		}
		out[len(out)-1].MeshMapVersion = n.version
	}
	if n.ended && n.code == "" && n.spread > 0 {
		end := new(response)
		end.MeshRetryWithin = int(n.spread / time.Millisecond)
		out = append(out, end)
	}
	if n.ended && n.code != "" {
		end := new(response)
		if n.code == wire.CodeNodeRevoked && len(out) > 0 {
			end = out[0] // which our nodes take for what the code says
			out = nil
		}
		end.MeshCode = n.code
		out = append(out, end)
	}
	if len(out) > 0 {
		out[len(out)-1].Seq = n.seq
	}
	return out, nil
}

// newFilter returns the rules as they are sent, nil if the node has them
// already.
func (st *stream) newFilter(rules []wire.FilterRule) ([]byte, error) {
	if rules == nil {
		return nil, nil
	}
	b, err := json.Marshal(rules)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	if bytes.Equal(sum[:], st.filter[:]) {
		return nil, nil
	}
	st.filter = sum
	return b, nil
}

// first returns the complete message that starts a stream. Server.mu is held;
// finish encodes the rest without it.
func (s *Server) first(st *stream) news {
	st.pending.self, st.pending.derp, st.pending.filter, st.pending.all = true, true, true, true
	st.pending.flows = s.shadow.compiled != nil
	return s.collect(st)
}

// firstMessages encodes the news of first: one message with all, or, of a stream
// that was resumed, what is new to the node.
func (s *Server) firstMessages(st *stream, n news, resumed bool) ([]*response, error) {
	now := s.cfg.Now().UTC()
	if resumed {
		out, err := st.messages(n)
		if err == nil && len(out) == 0 {
			err = errStreamOver // never: the node itself is always in it
		}
		if err == nil {
			out[0].MapSessionHandle, out[0].ControlTime = st.handle, &now
		}
		return out, err
	}
	m := &response{full: true, whole: n.whole}
	sortViews(m.whole)
	var err error
	if m.filter, err = st.newFilter(n.rules); err != nil {
		return nil, err
	}
	st.policy = n.policy
	m.Node, m.DERPMap = n.self, n.derp
	m.UserProfiles = n.profiles
	m.Domain = s.cfg.Domain
	m.DNSConfig = &wire.DNSConfig{Proxied: true, Domains: []string{s.cfg.Domain}}
	m.ControlTime = &now
	no := false
	m.CollectServices = &no
	m.Debug = &wire.Debug{DisableLogTail: true}
	m.MeshPolicy = n.policy
	m.MeshReportFlows = n.flows
	m.MeshMapVersion = n.version
	m.MapSessionHandle, m.Seq = st.handle, n.seq
	return []*response{m}, nil
}
