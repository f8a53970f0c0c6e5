package server

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"mesh/control/policy"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// node is a registered node. It is guarded by Server.mu.
type node struct {
	store.Node
	expired bool // no member: its key has, by the server's clock, or its user is suspended
	// former is the key before, which is a member until formerUntil; zero =
	// none. unshown: it is what peers know the node by.
	former      identity.NodePublic
	formerUntil time.Time
	unshown     bool

	online    presence
	stream    *stream   // open map poll, nil = none
	parked    *stream   // the last poll, if it can be resumed
	offlineAt time.Time // when to call it offline, while stream is nil; zero = it is
	idleSince time.Time // end of the last poll, or start of the server
	swaps     bucket    // limits how often another connection takes the poll over
	due       time.Time // when the janitor looks at it
	place     int       // in Server.deadline, from 1; 0 = not in it

	view *view // what peers see
	// routed are the approved routes that the policy knows of.
	routed   []netip.Prefix
	reported time.Time // when it last told of connection attempts
}

// presence is whether a node has a map poll.
type presence uint8

const (
	presenceUnknown presence = iota
	presenceOnline
	presenceOffline
)

func (p presence) wire() *bool {
	if p == presenceUnknown {
		return nil
	}
	b := p == presenceOnline
	return &b
}

// view is what peers see of a node: immutable, made anew at each change, and
// encoded at most once for all who get it.
type view struct {
	node wire.Node

	once sync.Once
	json []byte

	mu      sync.Mutex       // guards patches
	patches map[int64][]byte // from views by their serial, nil = there is none
	serial  int64            // no two views have the same
}

func (v *view) encoded() []byte {
	v.once.Do(func() { v.json, _ = json.Marshal(&v.node) })
	return v.json
}

// mostPatches bounds from how many older views patches are kept: readers are
// rarely more than some changes behind.
const mostPatches = 8

// patchFrom returns the patch that leads from had to v, or nil if only the whole
// node says it. It is made once for all who know the same.
func (v *view) patchFrom(had *view) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	if b, ok := v.patches[had.serial]; ok {
		return b
	}
	var b []byte
	if p := patch(&had.node, &v.node); p != nil {
		b, _ = json.Marshal(p)
	}
	if len(v.patches) < mostPatches {
		if v.patches == nil {
			v.patches = make(map[int64][]byte)
		}
		v.patches[had.serial] = b
	}
	return b
}

// registry holds the nodes by what they are looked up by. It is guarded by
// Server.mu.
type registry struct {
	byID  map[wire.NodeID]*node
	byKey map[identity.NodePublic]*node
	// formers has the nodes by node.former.
	formers map[identity.NodePublic]*node
	names   nameTable
	pool    *addressPool
	// enrolling has the machines whose node is on its way to the store.
	enrolling map[identity.MachinePublic]bool
	// byMachine has more than one node for a machine only if it enrolled anew
	// under another owner, or without a word of who it had been.
	byMachine map[identity.MachinePublic][]*node
	// homes are the home relays of machines whose node was removed, at most
	// maxHomes. See (*registry).lastHome.
	homes map[identity.MachinePublic]int
}

// maxHomes bounds how many removed machines' home relays are remembered.
const maxHomes = 4096

func (r *registry) init(pool *addressPool, last wire.NodeID) {
	r.byID = make(map[wire.NodeID]*node)
	r.byKey = make(map[identity.NodePublic]*node)
	r.formers = make(map[identity.NodePublic]*node)
	r.names.init()
	r.enrolling = make(map[identity.MachinePublic]bool)
	r.byMachine = make(map[identity.MachinePublic][]*node)
	r.homes = make(map[identity.MachinePublic]int)
	r.pool = pool
	pool.startAfter(last)
}

func (r *registry) add(sn store.Node) *node {
	n := &node{Node: sn}
	r.byID[n.ID], r.byKey[n.Key] = n, n
	r.names.put(n.Name, n.ID)
	r.byMachine[n.Machine] = append(r.byMachine[n.Machine], n)
	r.pool.take(n.IPv4)
	return n
}

// reserve keeps name and address of a node that is on its way to the store, and
// its machine, from all others.
func (r *registry) reserve(n *store.Node) {
	r.enrolling[n.Machine] = true
	r.names.put(n.Name, 0)
	r.pool.take(n.IPv4)
}

// release ends that, whether the node is there now or not.
func (r *registry) release(n *store.Node, stored bool) {
	delete(r.enrolling, n.Machine)
	if !stored {
		r.names.drop(n.Name, n.Hostname, 0)
		r.pool.free(n.IPv4)
	}
}

func (r *registry) remove(n *node) {
	delete(r.byID, n.ID)
	delete(r.byKey, n.Key)
	delete(r.formers, n.former)
	r.names.drop(n.Name, n.Hostname, n.ID)
	if rest := slices.DeleteFunc(r.byMachine[n.Machine], func(o *node) bool { return o == n }); len(rest) > 0 {
		r.byMachine[n.Machine] = rest
	} else {
		delete(r.byMachine, n.Machine)
	}
	if n.HomeDERP != 0 {
		for m := range r.homes {
			if len(r.homes) < maxHomes {
				break
			}
			delete(r.homes, m) // any
		}
		r.homes[n.Machine] = n.HomeDERP
	}
	r.pool.free(n.IPv4)
}

// lastHome returns the home relay that a machine had before its node was
// removed; 0 = unknown. A stock client that is removed and logs in again may
// never repeat where it is at home, since nothing changed on its side.
func (r *registry) lastHome(m identity.MachinePublic) int { return r.homes[m] }

// expiredLike returns the newest node of n's machine that has n's owner and
// whose key is no longer good, or nil: who logs in again after a logout is the
// node that it was, also if it does not name its former key.
func (r *registry) expiredLike(n *store.Node, now time.Time) *store.Node {
	for _, o := range slices.Backward(r.byMachine[n.Machine]) {
		if sameOwner(&o.Node, n) && (o.expired || expiredAt(o.Expires, now)) {
			sn := o.Node
			return &sn
		}
	}
	return nil
}

func (r *registry) rekey(n *node, key identity.NodePublic) {
	delete(r.byKey, n.Key)
	n.Key = key
	r.byKey[key] = n
}

func (r *registry) rename(n *node, hostname, name string) {
	r.names.drop(n.Name, n.Hostname, n.ID)
	n.Hostname, n.Name = hostname, name
	r.names.put(name, n.ID)
}

// ownerName is the login name the policy knows a node's owner by.
func (s *Server) ownerName(n *store.Node) string { return s.users[n.User].Name }

// policyNode describes a node, with the routes that a policy approves.
// Server.mu is held. One whose key expired has no address in it, so that no
// filter lets it in.
func (s *Server) policyNode(n *node, base *policy.Policy) policy.Node {
	owner := s.users[n.User]
	p := policy.Node{ID: n.ID, User: owner.Name, Role: policyRole(owner.Role), Tags: n.Tags}
	if !n.expired {
		p.Addrs = []netip.Addr{n.IPv4, n.IPv6}
		p.Offline = n.online == presenceOffline
		p.Routes = s.approved(n, p, base)
	}
	return p
}

// policyRole is a user's role as policies name it.
func policyRole(role string) string {
	if role == store.RoleOwner {
		return "owner"
	}
	return ""
}

// policyUsers describes all users to the policy. Server.mu is held.
func (s *Server) policyUsers() []policy.User {
	users := make([]policy.User, 0, len(s.users))
	for _, u := range s.users {
		users = append(users, policy.User{Name: u.Name, Role: policyRole(u.Role)})
	}
	return users
}

func wireUser(n *store.Node) wire.UserID {
	if len(n.Tags) > 0 || n.User == 0 {
		return wire.TaggedUser
	}
	return n.User
}

// peerNode returns what peers see of n. Server.mu is held.
func (s *Server) peerNode(n *node) wire.Node {
	addrs := []netip.Prefix{netip.PrefixFrom(n.IPv4, 32), netip.PrefixFrom(n.IPv6, 128)}
	w := wire.Node{
		ID:         n.ID,
		StableID:   string(n.StableID),
		Name:       n.Name + "." + s.cfg.Domain + ".",
		User:       wireUser(&n.Node),
		Key:        n.Key,
		KeyExpiry:  n.Expires,
		DiscoKey:   n.Disco,
		Addresses:  addrs,
		AllowedIPs: addrs,
		Endpoints:  n.Endpoints,
		HomeDERP:   n.HomeDERP,
		Hostinfo:   peerHostinfo(n.Hostinfo),
		Created:    n.Created,
		Cap:        n.Cap,
		Tags:       n.Tags,
		Online:     n.online.wire(),
		Expired:    n.expired,

		MachineAuthorized: true,
	}
	if n.unshown {
		w.Key = n.former
	}
	if n.online == presenceOffline && !n.LastSeen.IsZero() {
		seen := n.LastSeen
		w.LastSeen = &seen
	}
	return w
}

// selfNode is what n sees of itself. Server.mu is held.
func (s *Server) selfNode(n *node) *wire.Node {
	w := s.peerNode(n)
	w.Key, w.Machine = n.Key, n.Machine
	on := true
	w.Online, w.LastSeen = &on, nil
	if len(n.routed) > 0 {
		w.AllowedIPs = slices.Concat(w.Addresses, n.routed)
		for _, r := range n.routed {
			if id, ok := s.policy.compiled.Primary(r); ok && id == n.ID && r.Bits() > 0 {
				w.PrimaryRoutes = append(w.PrimaryRoutes, r)
			}
		}
	}
	w.CapMap = s.attributes(n.ID)
	if at := s.renewAt(n); !at.IsZero() {
		w.MeshRenew = &at
	}
	return &w
}

// attributes returns the node attributes that the policy gives a node; nil =
// none. Server.mu is held.
func (s *Server) attributes(id wire.NodeID) map[string][]json.RawMessage {
	if attrs := s.policy.compiled.Attributes(id); len(attrs) > 0 {
		return attrs
	}
	return nil
}

// refresh gives n a new view if what peers see of it has changed, and reports
// whether it has. Server.mu is held.
func (s *Server) refresh(n *node) bool {
	w := s.peerNode(n)
	if n.view != nil && reflect.DeepEqual(n.view.node, w) {
		return false
	}
	s.views++
	n.view = &view{node: w, serial: s.views}
	return true
}

// patch returns the PeerChange that turns a into b, or nil if there is none.
func patch(a, b *wire.Node) *wire.PeerChange {
	p := &wire.PeerChange{NodeID: b.ID}
	c := *a
	if a.HomeDERP != b.HomeDERP && b.HomeDERP != 0 {
		p.DERPRegion, c.HomeDERP = b.HomeDERP, b.HomeDERP
	}
	if a.Cap != b.Cap && b.Cap != 0 {
		p.Cap, c.Cap = b.Cap, b.Cap
	}
	if !slices.Equal(a.Endpoints, b.Endpoints) && len(b.Endpoints) > 0 {
		p.Endpoints, c.Endpoints = b.Endpoints, b.Endpoints
	}
	// Stock clients doubt a disco key that arrives with an offline mark: they
	// get the whole node.
	offline := b.Online != nil && !*b.Online
	if a.DiscoKey != b.DiscoKey && !b.DiscoKey.IsZero() && !offline {
		p.DiscoKey, c.DiscoKey = &b.DiscoKey, b.DiscoKey
	}
	if b.Online != nil && (a.Online == nil || *a.Online != *b.Online) {
		p.Online, c.Online = b.Online, b.Online
	}
	if b.LastSeen != nil {
		p.LastSeen, c.LastSeen = b.LastSeen, b.LastSeen
	} else if p.Online != nil && *p.Online {
		c.LastSeen = nil // online peers have none, whatever was said before
	}
	if !a.KeyExpiry.Equal(b.KeyExpiry) && !b.KeyExpiry.IsZero() {
		p.KeyExpiry, c.KeyExpiry = &b.KeyExpiry, b.KeyExpiry
	}
	if !reflect.DeepEqual(c, *b) {
		return nil
	}
	return p
}

// profile is how nodes learn the name behind a UserID, and the user's groups.
// Equal profiles are the same one: streams compare pointers. nil = no such
// user. Server.mu is held.
func (s *Server) profile(id wire.UserID) *wire.UserProfile {
	if p := s.profiles[id]; p != nil {
		return p
	}
	p := s.newProfile(id)
	if p != nil {
		s.profiles[id] = p
	}
	return p
}

func (s *Server) newProfile(id wire.UserID) *wire.UserProfile {
	if id == wire.TaggedUser {
		return &wire.UserProfile{ID: id, LoginName: "tagged-devices", DisplayName: "Tagged Devices"}
	}
	u, ok := s.users[id]
	if !ok {
		return nil
	}
	p := &wire.UserProfile{ID: id, LoginName: u.Name, DisplayName: u.Name}
	if s.policy.parsed != nil {
		p.Groups = s.policy.parsed.GroupsOf(u.Name)
	}
	return p
}

// renewProfiles takes out what a new policy made untrue, and returns whose
// profiles these were. Server.mu is held.
func (s *Server) renewProfiles() map[wire.UserID]bool {
	changed := make(map[wire.UserID]bool)
	for id, p := range s.profiles {
		if !reflect.DeepEqual(s.newProfile(id), p) {
			delete(s.profiles, id)
			changed[id] = true
		}
	}
	return changed
}

// expiredAt reports whether a key that expires at t (zero = never) has.
func expiredAt(t, now time.Time) bool { return !t.IsZero() && !now.Before(t) }
