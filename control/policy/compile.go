package policy

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// Node is what a policy may ask about a node.
type Node struct {
	ID wire.NodeID
	// User is the owner's login name. A node with tags has no owner: User does
	// not count then.
	User string
	// Email is the owner's e-mail address where the login name is another.
	Email string
	// Role is the owner's role, as autogroups name it: "admin", "owner",
	// "network-admin"… Empty means none of these.
	Role  string
	Tags  []string
	Addrs []netip.Addr
	// Routes are the approved routes that the node advertises. Default routes
	// are special: no address is a source or destination because it lies behind
	// one, and only "*" and "autogroup:internet" as destinations show them.
	Routes []netip.Prefix
	// Offline says that the node cannot route now: another router of the same
	// network is preferred.
	Offline bool
}

func (n *Node) equal(o *Node) bool {
	return n.User == o.User && n.Email == o.Email && n.Role == o.Role && n.Offline == o.Offline && slices.Equal(n.Tags, o.Tags) &&
		slices.Equal(n.Addrs, o.Addrs) && slices.Equal(n.Routes, o.Routes)
}

// Compiled is a policy applied to the nodes of a mesh. It follows changes of
// nodes at a cost that depends on who can talk to them, not on the size of the
// mesh. It is not safe for concurrent use, not even for reading; only Allows,
// CanReach and Explain leave it as it is, so that they may run beside each other.
//
// Node sets are lists of slots, one slot for each node. Each selector knows the
// nodes that it matches, whether by name, by address or by a route.
type Compiled struct {
	policy  *Policy // nil: nothing is allowed
	bySel   map[selector]*selSet
	users   map[userRef][]*selSet // those that match the user: its own, and groups
	nets    []*selSet             // of networks
	netBits map[int]int           // how many there are of each length
	vias    []*selSet             // of networks behind routers with a tag
	noVia   bool                  // no grant says which way to go
	rules   []rule
	lists   map[string]*srcList
	fresh   []*selSet // made by the last build
	nextID  int       // of selSets and srcLists: none is given twice

	nodes   map[wire.NodeID]*node
	slots   []*node // nil where free
	free    []int
	byUser  map[userRef]*nodeSet // untagged nodes
	byEmail map[userRef]*nodeSet // of those with an address beside the name
	byTag   map[string]*nodeSet
	byAddr  map[netip.Addr]*node
	twice   map[netip.Addr]bool       // addresses that several nodes have, for a moment
	routers map[netip.Prefix]*nodeSet // of each approved route

	collection
}

// selSet is a selector with the nodes that it matches.
type selSet struct {
	selector
	id    int
	nodes nodeSet
	inSrc []*srcList // source lists that it is part of
	dstOf []*srcList // source lists with a rule that has it as destination
	dsts  []dstRef
	attrs []int // entries of "nodeAttrs" that have it as target
	stamp int   // of a collection that has seen it
	used  bool  // by the policy

	// addrs are the addresses of the nodes where the selector names nodes. They
	// follow changes once they were asked for, until stale.
	addrs []iprange.Range
	stale bool
}

// dstRef names a destination of a rule.
type dstRef struct{ rule, dst int }

// srcList is a list of sources; rules with equal lists share it.
type srcList struct {
	id    int
	sels  []*selSet
	dsts  []*selSet // of all its rules
	stamp int       // of a collection that has seen it

	// What follows is a cache, void when a node of one of the selectors changed.
	valid  bool
	ranges []iprange.Range
	text   []string
}

type rule struct {
	*access
	src  *srcList
	dsts []*selSet
}

type node struct {
	Node
	slot int
	user userRef // "" for tagged nodes
	sels []*selSet
}

// Compile applies a policy to nodes. A nil policy allows nothing.
func Compile(p *Policy, nodes []Node) *Compiled {
	c := &Compiled{
		noVia: true, netBits: make(map[int]int),
		bySel: make(map[selector]*selSet), users: make(map[userRef][]*selSet),
		nodes: make(map[wire.NodeID]*node), byUser: make(map[userRef]*nodeSet),
		routers: make(map[netip.Prefix]*nodeSet), byAddr: make(map[netip.Addr]*node),
		twice: make(map[netip.Addr]bool), byTag: make(map[string]*nodeSet), byEmail: make(map[userRef]*nodeSet),
	}
	if p != nil {
		c.build(p)
	}
	for _, n := range nodes {
		if old := c.nodes[n.ID]; old != nil {
			c.unlink(old)
			c.release(old)
		}
		c.link(c.newNode(n))
	}
	return c
}

// build turns selectors into sets, of which each distinct one exists once. Sets
// and lists of sources that exist already stay, with what they know.
func (c *Compiled) build(p *Policy) {
	c.policy, c.rules, c.fresh = p, nil, nil
	lists := make(map[string]*srcList)
	type pair struct{ src, dst int }
	seen := make(map[pair]bool)
	for i := range p.access {
		a := &p.access[i]
		r := rule{access: a, src: c.srcList(p, a.srcs, lists)}
		for j, d := range a.dsts {
			s := c.selSet(p, *d.sel)
			r.dsts = append(r.dsts, s)
			s.dsts = append(s.dsts, dstRef{i, j})
			if k := (pair{r.src.id, s.id}); !seen[k] {
				seen[k] = true
				r.src.dsts = append(r.src.dsts, s)
				s.dstOf = append(s.dstOf, r.src)
			}
		}
		c.rules = append(c.rules, r)
	}
	c.lists = lists
	for i := range p.attrs {
		for _, t := range p.attrs[i].targets {
			s := c.selSet(p, *t)
			s.attrs = append(s.attrs, i)
		}
	}
	c.noVia = true
	for _, s := range c.bySel {
		if s.used && (s.kind == kindVia || s.kind == kindViaNet) {
			c.noVia = false
		}
	}
}

func (c *Compiled) selSet(p *Policy, sel selector) *selSet {
	if s := c.bySel[sel]; s != nil {
		s.used = true
		return s
	}
	s := &selSet{selector: sel, id: c.nextID, stale: true, used: true}
	c.nextID++
	c.fresh = append(c.fresh, s)
	c.bySel[sel] = s
	switch sel.kind {
	case kindUser:
		c.users[userRef(sel.name)] = append(c.users[userRef(sel.name)], s)
	case kindGroup:
		for _, u := range p.groups[sel.name] {
			c.users[u] = append(c.users[u], s)
		}
	case kindPrefix:
		c.nets = append(c.nets, s)
		c.netBits[sel.prefix.Bits()]++
	case kindVia:
		c.vias = append(c.vias, s)
	}
	return s
}

func (c *Compiled) srcList(p *Policy, srcs []*selector, lists map[string]*srcList) *srcList {
	var sels []*selSet
	for _, s := range srcs {
		sels = append(sels, c.selSet(p, *s))
	}
	sels = distinct(sels)
	var key strings.Builder
	for _, s := range sels {
		key.WriteString(strconv.Itoa(s.id))
		key.WriteByte(' ')
	}
	l := lists[key.String()]
	if l == nil {
		if l = c.lists[key.String()]; l == nil {
			l = &srcList{id: c.nextID, sels: sels}
			c.nextID++
		}
		l.dsts = nil
		lists[key.String()] = l
		for _, s := range sels {
			s.inSrc = append(s.inSrc, l)
		}
	}
	return l
}

func distinct(sels []*selSet) []*selSet {
	slices.SortFunc(sels, func(a, b *selSet) int { return a.id - b.id })
	return slices.Compact(sels)
}

// newNode gives n a slot and finds the selectors that match it.
func (c *Compiled) newNode(n Node) *node {
	r := &node{Node: n}
	if i := len(c.free); i > 0 {
		r.slot, c.free = c.free[i-1], c.free[:i-1]
	} else {
		r.slot = len(c.slots)
		c.slots = append(c.slots, nil)
	}
	c.match(r)
	return r
}

// match finds the selectors that match a node, and its owner.
func (c *Compiled) match(n *node) {
	n.sels, n.user = nil, ""
	add := func(s selector) {
		if set := c.bySel[s]; set != nil {
			n.sels = append(n.sels, set)
		}
	}
	add(selector{kind: kindAll})
	add(selector{kind: kindAnywhere})
	switch {
	case len(n.Tags) > 0:
		add(selector{kind: kindTagged})
		for _, t := range n.Tags {
			add(selector{kind: kindTag, name: t})
		}
	case n.User != "":
		n.user = canonicalUser(n.User)
		add(selector{kind: kindMember})
		add(selector{kind: kindSelf})
		if n.Role != "" {
			add(selector{kind: kindRole, name: n.Role})
		}
		n.sels = append(n.sels, c.users[n.user]...)
		if email := canonicalUser(n.Email); email != "" && email != n.user {
			n.sels = append(n.sels, c.users[email]...)
		}
		add(selector{kind: kindDomain, name: n.domain()})
	}
	if slices.ContainsFunc(n.Routes, isDefault) {
		add(selector{kind: kindInternet})
		for _, t := range n.Tags {
			add(selector{kind: kindViaNet, name: t})
		}
	}
	for _, a := range n.Addrs {
		for bits := range c.netBits {
			if p, err := a.Prefix(bits); err == nil {
				add(selector{kind: kindPrefix, prefix: p})
			}
		}
	}
	if slices.ContainsFunc(n.Routes, func(r netip.Prefix) bool { return !isDefault(r) }) {
		for _, s := range c.nets {
			if n.routes(s.prefix) {
				n.sels = append(n.sels, s)
			}
		}
	}
	for _, s := range c.vias {
		if slices.Contains(n.Tags, s.name) && n.routes(s.prefix) {
			n.sels = append(n.sels, s)
		}
	}
	n.sels = distinct(n.sels)
}

// domain returns the domain of the owner's e-mail address.
func (n *Node) domain() string {
	email := n.Email
	if email == "" {
		email = n.User
	}
	return string(canonicalUser(email[strings.LastIndexByte(email, '@')+1:]))
}

// isDefault reports whether a route is that of an exit node.
func isDefault(r netip.Prefix) bool { return r.Bits() == 0 }

// routes reports whether something of p lies behind the node.
func (n *Node) routes(p netip.Prefix) bool {
	return slices.ContainsFunc(n.Routes, func(r netip.Prefix) bool { return !isDefault(r) && p.Overlaps(r) })
}

// touches reports whether the node has an address or a route within p.
func (n *Node) touches(p netip.Prefix) bool {
	return slices.ContainsFunc(n.Addrs, p.Contains) || n.routes(p)
}

// link puts a node into the sets that it belongs to.
func (c *Compiled) link(n *node) {
	c.nodes[n.ID] = n
	c.slots[n.slot] = n
	for _, s := range n.sels {
		s.nodes.add(n.slot)
		s.addAddrs(n.Addrs)
		s.changed()
	}
	for _, t := range n.Tags {
		index(c.byTag, t, n.slot)
	}
	if n.user != "" {
		index(c.byUser, n.user, n.slot)
		index(c.byEmail, canonicalUser(n.Email), n.slot)
	}
	for _, a := range n.Addrs {
		if o := c.byAddr[a]; o != nil && o != n {
			c.twice[a] = true
		}
		c.byAddr[a] = n
	}
	for _, r := range n.Routes {
		if !isDefault(r) {
			index(c.routers, r, n.slot)
		}
	}
}

// unlink takes a node out of its sets; it keeps its slot.
func (c *Compiled) unlink(n *node) {
	for _, s := range n.sels {
		s.nodes.remove(n.slot)
		s.removeAddrs(n.Addrs)
		s.changed()
	}
	for _, t := range n.Tags {
		unindex(c.byTag, t, n.slot)
	}
	if n.user != "" {
		unindex(c.byUser, n.user, n.slot)
		unindex(c.byEmail, canonicalUser(n.Email), n.slot)
	}
	for _, a := range n.Addrs {
		if c.twice[a] {
			c.shared(n, a)
		} else {
			delete(c.byAddr, a)
		}
	}
	for _, r := range n.Routes {
		unindex(c.routers, r, n.slot)
	}
	delete(c.nodes, n.ID)
}

// index adds a slot to the set of a key.
func index[K comparable](m map[K]*nodeSet, k K, slot int) {
	if m[k] == nil {
		m[k] = new(nodeSet)
	}
	m[k].add(slot)
}

func unindex[K comparable](m map[K]*nodeSet, k K, slot int) {
	if s := m[k]; s != nil {
		if s.remove(slot); len(*s) == 0 {
			delete(m, k)
		}
	}
}

// shared takes from a node an address that others have, too: that happens while
// an address moves, and is slow.
func (c *Compiled) shared(n *node, a netip.Addr) {
	delete(c.byAddr, a)
	holders := 0
	for _, o := range c.nodes {
		if o != n && slices.Contains(o.Addrs, a) {
			if x := c.byAddr[a]; x == nil || o.ID < x.ID {
				c.byAddr[a] = o
			}
			holders++
		}
	}
	if holders < 2 {
		delete(c.twice, a)
	}
	for _, s := range n.sels {
		s.stale = true
	}
}

func (c *Compiled) release(n *node) {
	c.slots[n.slot] = nil
	c.free = append(c.free, n.slot)
}

// Upsert adds a node, or changes the one with that ID. It returns, sorted, the
// nodes whose filter, peers or routes may differ from before, the node itself
// included; none if nothing that policies ask about has changed.
func (c *Compiled) Upsert(n Node) (affected []wire.NodeID) {
	c.begin()
	r := c.nodes[n.ID]
	if r == nil {
		r = c.newNode(n)
	} else {
		if r.Node.equal(&n) {
			return nil
		}
		c.audience(r)
		c.unlink(r)
		r.Node = n
		c.match(r)
	}
	c.link(r)
	c.again()
	c.audience(r)
	c.collect(r.slot)
	return c.ids(-1)
}

// Remove forgets a node and returns, sorted, the others that could talk to it.
func (c *Compiled) Remove(id wire.NodeID) (affected []wire.NodeID) {
	r := c.nodes[id]
	if r == nil {
		return nil
	}
	c.begin()
	c.audience(r)
	affected = c.ids(r.slot)
	c.unlink(r)
	c.release(r)
	return affected
}
