package policy

import (
	"slices"

	"mesh/control/wire"
)

// collection is a set of nodes that grows, with work in proportion to it and not
// to the mesh. There is one at a time.
type collection struct {
	bits  []uint64 // has slot; all clear between collections
	slots []int32
	stamp int // tells what was collected already
}

// begin starts a collection.
func (c *Compiled) begin() {
	c.collection.slots = c.collection.slots[:0]
	c.again()
}

// again says that selectors may have other nodes now than when the collection
// began.
func (c *Compiled) again() { c.collection.stamp++ }

func (c *Compiled) collect(slot int) {
	for len(c.bits) <= slot>>6 {
		c.bits = append(c.bits, 0)
	}
	if w, bit := &c.bits[slot>>6], uint64(1)<<(slot&63); *w&bit == 0 {
		*w |= bit
		c.collection.slots = append(c.collection.slots, int32(slot))
	}
}

// collectSel collects the nodes of a selector.
func (c *Compiled) collectSel(s *selSet) {
	if s.stamp == c.collection.stamp {
		return
	}
	s.stamp = c.collection.stamp
	for _, slot := range s.nodes {
		c.collect(int(slot))
	}
}

// ids ends a collection and returns its nodes, sorted, but one.
func (c *Compiled) ids(but int) []wire.NodeID {
	var out []wire.NodeID
	if n := len(c.collection.slots); n > 0 {
		out = make([]wire.NodeID, 0, n)
	}
	for _, slot := range c.collection.slots {
		c.bits[slot>>6] &^= 1 << (slot & 63)
		if int(slot) != but {
			out = append(out, c.slots[slot].ID)
		}
	}
	if len(out) == 0 {
		return nil
	}
	slices.Sort(out)
	return out
}

// collectOwn collects the nodes of n's owner.
func (c *Compiled) collectOwn(n *node) {
	if own := c.byUser[n.user]; own != nil && n.user != "" {
		for _, slot := range *own {
			c.collect(int(slot))
		}
	}
}

// neighbours collects the nodes that may begin to talk to n or n to them, n
// itself included where it may talk to itself.
func (c *Compiled) neighbours(n *node) {
	for _, s := range n.sels {
		for _, l := range s.inSrc {
			if l.stamp == c.collection.stamp {
				continue
			}
			l.stamp = c.collection.stamp
			for _, d := range l.dsts {
				if d.kind != kindSelf {
					c.collectSel(d)
				} else {
					c.collectOwn(n)
				}
			}
		}
	}
	for _, s := range n.sels {
		for _, l := range s.dstOf {
			if s.kind == kindSelf {
				l.eachOwn(c, n, func(o *node) { c.collect(o.slot) })
				continue
			}
			for _, src := range l.sels {
				c.collectSel(src)
			}
		}
	}
}

// audience collects the nodes that are told something else when n changes: its
// neighbours, and other routers of its networks, to which another one is in
// charge then.
func (c *Compiled) audience(n *node) {
	c.neighbours(n)
	for _, r := range n.Routes {
		if routers := c.routers[r]; routers != nil {
			for _, slot := range *routers {
				c.collect(int(slot))
			}
		}
	}
}

// Visible returns, sorted, the peers that the node may know: those that may talk
// to it and those that it may talk to.
func (c *Compiled) Visible(id wire.NodeID) []wire.NodeID {
	n := c.nodes[id]
	if n == nil {
		return nil
	}
	c.begin()
	c.neighbours(n)
	return c.ids(n.slot)
}
