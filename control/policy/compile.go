package policy

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"mesh/control/wire"
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
// mesh. It is not safe for concurrent use, not even for reading.
//
// Node sets are bit sets over slots, one slot for each node. Each selector knows
// the nodes that it matches, whether by name, by address or by a route.
type Compiled struct {
	policy *Policy // nil: nothing is allowed
	sels   []*selSet
	bySel  map[selector]*selSet
	users  map[userRef][]*selSet // those that match the user: its own, and groups
	nets   []*selSet             // of networks
	vias   []*selSet             // of networks behind routers with a tag
	noVia  bool                  // no grant says which way to go
	rules  []rule

	nodes   map[wire.NodeID]*node
	slots   []*node // nil where free
	free    []int
	byUser  map[userRef]*bitset // untagged nodes
	byAddr  map[netip.Addr]*node
	routers map[netip.Prefix]*bitset // of each approved route
}

// selSet is a selector with the nodes that it matches.
type selSet struct {
	selector
	id    int
	nodes bitset
	inSrc []*srcList // source lists that it is part of
	dstOf []*srcList // source lists with a rule that has it as destination
	dsts  []dstRef
	attrs []int // entries of "nodeAttrs" that have it as target
}

// dstRef names a destination of a rule.
type dstRef struct{ rule, dst int }

// srcList is a list of sources; rules with equal lists share it.
type srcList struct {
	id   int
	sels []*selSet
	dsts []*selSet // of all its rules

	// What follows is a cache, void when a node of one of the selectors changed.
	valid  bool
	nodes  bitset
	ranges []addrRange
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
		noVia: true,
		bySel: make(map[selector]*selSet), users: make(map[userRef][]*selSet),
		nodes: make(map[wire.NodeID]*node), byUser: make(map[userRef]*bitset),
		routers: make(map[netip.Prefix]*bitset), byAddr: make(map[netip.Addr]*node),
	}
	if p != nil {
		c.policy = p
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

// build turns selectors into sets, of which each distinct one exists once.
func (c *Compiled) build(p *Policy) {
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
	for i := range p.attrs {
		for _, t := range p.attrs[i].targets {
			s := c.selSet(p, *t)
			s.attrs = append(s.attrs, i)
		}
	}
}

func (c *Compiled) selSet(p *Policy, sel selector) *selSet {
	if s := c.bySel[sel]; s != nil {
		return s
	}
	s := &selSet{selector: sel, id: len(c.sels)}
	c.sels = append(c.sels, s)
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
	case kindVia:
		c.vias = append(c.vias, s)
		c.noVia = false
	case kindViaNet:
		c.noVia = false
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
		l = &srcList{id: len(lists), sels: sels}
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
	for _, s := range c.nets {
		if n.touches(s.prefix) {
			n.sels = append(n.sels, s)
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
		s.changed()
	}
	if n.user != "" {
		if c.byUser[n.user] == nil {
			c.byUser[n.user] = new(bitset)
		}
		c.byUser[n.user].add(n.slot)
	}
	for _, a := range n.Addrs {
		c.byAddr[a] = n
	}
	for _, r := range n.Routes {
		if !isDefault(r) {
			if c.routers[r] == nil {
				c.routers[r] = new(bitset)
			}
			c.routers[r].add(n.slot)
		}
	}
}

// unlink takes a node out of its sets; it keeps its slot.
func (c *Compiled) unlink(n *node) {
	for _, s := range n.sels {
		s.nodes.remove(n.slot)
		s.changed()
	}
	if n.user != "" {
		c.byUser[n.user].remove(n.slot)
	}
	for _, a := range n.Addrs {
		if c.byAddr[a] == n {
			delete(c.byAddr, a)
		}
	}
	for _, r := range n.Routes {
		if routers := c.routers[r]; routers != nil {
			if routers.remove(n.slot); routers.empty() {
				delete(c.routers, r)
			}
		}
	}
	delete(c.nodes, n.ID)
}

func (c *Compiled) release(n *node) {
	c.slots[n.slot] = nil
	c.free = append(c.free, n.slot)
}

// changed voids what was computed from the selector's nodes.
func (s *selSet) changed() {
	for _, l := range s.inSrc {
		l.valid = false
	}
}

// fill brings the cache of a source list up to date.
func (l *srcList) fill(c *Compiled) {
	if l.valid {
		return
	}
	l.valid = true
	l.nodes, l.ranges, l.text = nil, nil, nil
	anywhere := false
	var named bitset // nodes meant by name: their addresses are sources
	for _, s := range l.sels {
		l.nodes.or(s.nodes)
		switch s.kind {
		case kindPrefix:
			l.ranges = append(l.ranges, rangeOf(s.prefix))
		case kindAll:
			l.ranges = append(l.ranges, meshRanges...)
			s.nodes.each(func(slot int) {
				for _, r := range c.slots[slot].Routes {
					if !isDefault(r) {
						l.ranges = append(l.ranges, rangeOf(r))
					}
				}
			})
		case kindAnywhere:
			anywhere = true
			l.ranges = append(l.ranges, everywhere...)
		default:
			named.or(s.nodes)
		}
	}
	l.ranges = merge(c.addrs(l.ranges, named))
	if l.text = texts(l.ranges); anywhere {
		l.text = []string{"*"}
	}
}

// addrs appends the addresses of nodes.
func (c *Compiled) addrs(list []addrRange, nodes bitset) []addrRange {
	nodes.each(func(slot int) {
		for _, a := range c.slots[slot].Addrs {
			list = append(list, addrRange{a, a})
		}
	})
	return list
}

func texts(list []addrRange) []string {
	out := make([]string, len(list))
	for i, r := range list {
		out[i] = r.String()
	}
	return out
}

// self returns the nodes of n's owner among the sources.
func (l *srcList) self(c *Compiled, n *node) bitset {
	l.fill(c)
	var own bitset
	if n.user != "" {
		own.orAnd(l.nodes, *c.byUser[n.user])
	}
	return own
}

// neighbours returns the nodes that may begin to talk to n or n to them,
// n itself included where it may talk to itself.
func (c *Compiled) neighbours(n *node) bitset {
	var out bitset
	lists := make(map[*srcList]bool)
	for _, s := range n.sels {
		for _, l := range s.inSrc {
			if lists[l] {
				continue
			}
			lists[l] = true
			for _, d := range l.dsts {
				if d.kind != kindSelf {
					out.or(d.nodes)
				} else if n.user != "" {
					out.or(*c.byUser[n.user])
				}
			}
		}
	}
	clear(lists)
	for _, s := range n.sels {
		for _, l := range s.dstOf {
			switch {
			case s.kind == kindSelf:
				out.or(l.self(c, n))
			case !lists[l]:
				lists[l] = true
				l.fill(c)
				out.or(l.nodes)
			}
		}
	}
	return out
}

// audience returns the nodes that are told something else when n changes: its
// neighbours, and other routers of its networks, to which another one is in
// charge then.
func (c *Compiled) audience(n *node) bitset {
	out := c.neighbours(n)
	for _, r := range n.Routes {
		if routers := c.routers[r]; routers != nil {
			out.or(*routers)
		}
	}
	return out
}

// Upsert adds a node, or changes the one with that ID. It returns, sorted, the
// nodes whose filter, peers or routes may differ from before, the node itself
// included; none if nothing that policies ask about has changed.
func (c *Compiled) Upsert(n Node) (affected []wire.NodeID) {
	var touched bitset
	r := c.nodes[n.ID]
	if r == nil {
		r = c.newNode(n)
	} else {
		if r.Node.equal(&n) {
			return nil
		}
		touched = c.audience(r)
		c.unlink(r)
		r.Node = n
		c.match(r)
	}
	c.link(r)
	touched.or(c.audience(r))
	touched.add(r.slot)
	return c.ids(touched)
}

// Remove forgets a node and returns, sorted, the others that could talk to it.
func (c *Compiled) Remove(id wire.NodeID) (affected []wire.NodeID) {
	r := c.nodes[id]
	if r == nil {
		return nil
	}
	touched := c.audience(r)
	touched.remove(r.slot)
	c.unlink(r)
	affected = c.ids(touched)
	c.release(r)
	return affected
}

func (c *Compiled) ids(nodes bitset) []wire.NodeID {
	var out []wire.NodeID
	nodes.each(func(slot int) { out = append(out, c.slots[slot].ID) })
	slices.Sort(out)
	return out
}

// Visible returns, sorted, the peers that the node may know: those that may talk
// to it and those that it may talk to.
func (c *Compiled) Visible(id wire.NodeID) []wire.NodeID {
	n := c.nodes[id]
	if n == nil {
		return nil
	}
	out := c.neighbours(n)
	out.remove(n.slot)
	return c.ids(out)
}
