package netmap

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"mesh/control/wire"
	"mesh/identity"
)

// maxIgnored bounds the reports of one message.
const maxIgnored = 100

// edit makes a new index. Nodes are put and dropped first; finish then works
// out, for those that this touches, who gets what.
type edit struct {
	base *index
	self *wire.Node

	nodes    editor[NodeID, *wire.Node]
	peers    editor[NodeID, *Peer]
	keys     claimEditor[identity.NodePublic]
	prefixes claimEditor[netip.Prefix]
	names    claimEditor[string]
	stable   claimEditor[string]
	disco    claimEditor[identity.DiscoPublic]
	lengths  lengths
	expiry   expiries

	// With nothing to begin with every node is touched, and what they claim
	// need not be noted.
	touched         map[NodeID]bool
	touchedKeys     map[identity.NodePublic]bool // nil = not noted
	touchedPrefixes map[netip.Prefix]bool        // nil = not noted
	ignored         []string
}

func newEdit(base *index, self *wire.Node) *edit {
	e := &edit{base: base, self: self, lengths: base.lengths, expiry: base.expiry, touched: map[NodeID]bool{}}
	if base.nodes.n > 0 {
		e.touchedKeys, e.touchedPrefixes = map[identity.NodePublic]bool{}, map[netip.Prefix]bool{}
	}
	e.nodes.table = base.nodes
	e.peers.table = base.peers
	e.keys = claimEditor[identity.NodePublic]{editor[identity.NodePublic, claims]{table: base.keys.table}, e}
	e.prefixes = claimEditor[netip.Prefix]{editor[netip.Prefix, claims]{table: base.prefixes.table}, e}
	e.names = claimEditor[string]{editor[string, claims]{table: base.names.table}, e}
	e.stable = claimEditor[string]{editor[string, claims]{table: base.stable.table}, e}
	e.disco = claimEditor[identity.DiscoPublic]{editor[identity.DiscoPublic, claims]{table: base.disco.table}, e}
	return e
}

func (e *edit) report(format string, args ...any) {
	if len(e.ignored) < maxIgnored {
		e.ignored = append(e.ignored, fmt.Sprintf(format, args...))
	}
}

// put adds or replaces a node as it was sent. What cannot be a node takes the
// former one of its number away: nothing stale stays in force.
func (e *edit) put(sent *wire.Node) {
	n, err := clean(sent, e.report)
	if err != nil {
		e.report("%v", err)
		if sent != nil {
			e.drop(sent.ID)
		}
		return
	}
	e.putClean(n)
}

func (e *edit) putClean(n *wire.Node) {
	old := e.nodes.get(n.ID)
	if old != nil && sameNode(old, n) {
		return
	}
	e.nodes.set(n.ID, n)
	e.touched[n.ID] = true
	if old != nil && old.Key == n.Key {
		return
	}
	if old != nil {
		e.unclaimKey(old)
	}
	e.keys.claim(n.Key, rank(n.ID))
	e.touchKey(n.Key)
}

func (e *edit) unclaimKey(n *wire.Node) {
	e.keys.unclaim(n.Key, rank(n.ID))
	e.touchKey(n.Key)
}

func (e *edit) touchKey(k identity.NodePublic) {
	if e.touchedKeys != nil {
		e.touchedKeys[k] = true
	}
}

func (e *edit) touchPrefix(p netip.Prefix) {
	if e.touchedPrefixes != nil {
		e.touchedPrefixes[p] = true
	}
}

func (e *edit) drop(id NodeID) {
	old := e.nodes.get(id)
	if old == nil {
		return
	}
	e.nodes.del(id)
	e.touched[id] = true
	e.unclaimKey(old)
}

// finish settles all claims and adds to d what became of the peers.
func (e *edit) finish(d *Delta) index {
	for k := range e.touchedKeys {
		for r := range e.keys.get(k).all() {
			e.touched[r.id()] = true
		}
		for r := range e.base.keys.get(k).all() {
			e.touched[r.id()] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(e.touched)) {
		var was *wire.Node
		if p := e.peers.get(id); p != nil {
			was = p.sent
		}
		e.move(id, was, e.visible(id))
	}
	for p := range e.touchedPrefixes {
		if was, is := e.base.prefixes.first(p), e.holder(p); was != is {
			e.touched[was] = true
			e.touched[is] = true
		}
	}
	delete(e.touched, 0)
	for _, id := range slices.Sorted(maps.Keys(e.touched)) {
		e.settle(id, d)
	}
	d.Ignored = append(d.Ignored, e.ignored...)
	return index{
		nodes: e.nodes.table, peers: e.peers.table, keys: claimTable[identity.NodePublic]{e.keys.table},
		prefixes: claimTable[netip.Prefix]{e.prefixes.table}, names: claimTable[string]{e.names.table},
		stable: claimTable[string]{e.stable.table}, disco: claimTable[identity.DiscoPublic]{e.disco.table},
		lengths: e.lengths, expiry: e.expiries(),
	}
}

func (e *edit) holder(p netip.Prefix) NodeID {
	t := claimTable[netip.Prefix]{e.prefixes.table}
	return t.first(p)
}

// visible returns the node if it is a peer: nobody else has its key.
func (e *edit) visible(id NodeID) *wire.Node {
	n := e.nodes.get(id)
	if n == nil {
		return nil
	}
	if n.ID == e.self.ID || n.Key == e.self.Key {
		e.report("node %d: it claims to be this node", id)
		return nil
	}
	keys := claimTable[identity.NodePublic]{e.keys.table}
	if first := keys.first(n.Key); first != id {
		e.report("node %d: its key %s belongs to node %d", id, n.Key.Short(), first)
		return nil
	}
	return n
}

// move changes the claims of a node from what was visible to what is.
func (e *edit) move(id NodeID, was, is *wire.Node) {
	if was == is {
		return
	}
	r := rank(id)
	ownWas, routesWas := claimed(was, e.self)
	ownIs, routesIs := claimed(is, e.self)
	if !slices.Equal(ownWas, ownIs) || !slices.Equal(routesWas, routesIs) {
		e.movePrefixes(ownWas, ownIs, r)
		e.movePrefixes(routesWas, routesIs, r|second)
	}
	var none wire.Node
	if was == nil {
		was = &none
	}
	if is == nil {
		is = &none
	}
	moveOne(&e.names, e.indexName(was), e.indexName(is), r)
	moveOne(&e.stable, was.StableID, is.StableID, r)
	moveOne(&e.disco, was.DiscoKey, is.DiscoKey, r)
}

// indexName returns the name by which a node is found; never that of self.
func (e *edit) indexName(n *wire.Node) string {
	name := normalName(n.Name)
	if name == normalName(e.self.Name) {
		return ""
	}
	return name
}

// moveOne moves a claim; the zero value is claimed by nobody.
func moveOne[K comparable](e *claimEditor[K], was, is K, r rank) {
	var zero K
	if was == is {
		return
	}
	if was != zero {
		e.unclaim(was, r)
	}
	if is != zero {
		e.claim(is, r)
	}
}

func (e *edit) movePrefixes(was, is []netip.Prefix, r rank) {
	for _, p := range was {
		e.touchPrefix(p)
		if e.prefixes.unclaim(p, r) {
			e.lengths[family(p.Addr())][p.Bits()]--
		}
	}
	for _, p := range is {
		e.touchPrefix(p)
		if e.prefixes.claim(p, r) {
			e.lengths[family(p.Addr())][p.Bits()]++
		}
	}
}

// settle remakes a peer, and notes in d how it differs from before.
func (e *edit) settle(id NodeID, d *Delta) {
	old := e.base.peers.get(id)
	n := e.visibleQuietly(id)
	if n == nil {
		if old != nil {
			e.peers.del(id)
			e.expiry.drop(old.Node)
			d.Removed = append(d.Removed, old)
		}
		return
	}
	p := e.peer(n)
	for _, x := range p.dropped {
		if old == nil || !slices.Contains(old.dropped, x) {
			e.report("node %d: prefix %v belongs to %s", id, x, e.ownerOf(x))
		}
	}
	e.peers.set(id, p)
	if old != nil {
		e.expiry.drop(old.Node)
	}
	e.expiry.add(p.Node)
	switch {
	case old == nil:
		d.Added = append(d.Added, p)
	case !samePeer(old, p):
		d.Changed = append(d.Changed, Change{Old: old, New: p})
	}
}

func (e *edit) visibleQuietly(id NodeID) *wire.Node {
	kept := e.ignored
	n := e.visible(id)
	e.ignored = kept
	return n
}

func (e *edit) ownerOf(p netip.Prefix) string {
	if id := e.holder(p); id != 0 {
		return fmt.Sprintf("node %d", id)
	}
	return "this node"
}

// peer makes the Peer of a visible node out of what it got.
func (e *edit) peer(n *wire.Node) *Peer {
	p := &Peer{Node: n, sent: n}
	gets := func(x netip.Prefix) bool {
		if e.holder(x) == n.ID {
			return true
		}
		if !slices.Contains(p.dropped, x) {
			p.dropped = append(p.dropped, x)
		}
		return false
	}
	addresses := keep(n.Addresses, gets)
	allowed := keep(n.AllowedIPs, gets)
	p.OffersExit = slices.ContainsFunc(n.AllowedIPs, isExit)
	if len(addresses) != len(n.Addresses) || len(allowed) != len(n.AllowedIPs) {
		c := *n
		c.Addresses, c.AllowedIPs = addresses, allowed
		p.Node = &c
	}
	return p
}

// keep returns the prefixes that gets lets through, without exits: list itself
// if that is all of it.
func keep(list []netip.Prefix, gets func(netip.Prefix) bool) []netip.Prefix {
	out, all := list, true
	for i, p := range list {
		ok := !isExit(p) && gets(p)
		if !ok && all {
			out, all = append(make([]netip.Prefix, 0, len(list)-1), list[:i]...), false
		}
		if ok && !all {
			out = append(out, p)
		}
	}
	return out
}

func samePeer(a, b *Peer) bool {
	return a == b || a.OffersExit == b.OffersExit && sameNode(a.Node, b.Node)
}
