package policy

import (
	"encoding/json"
	"fmt"
	"slices"

	"mesh/control/wire"
)

// Replace applies another policy to the same nodes, with work in proportion to
// what the change touches. It returns, sorted, the nodes whose filter, peers,
// routes or attributes may differ from before. Nodes whose rules mean the same
// but stand elsewhere in the file now are not among them: rules are recognised
// by their ID. A nil policy allows nothing.
func (c *Compiled) Replace(p *Policy) (affected []wire.NodeID) {
	if p == nil {
		p = &Policy{}
	}
	old := c.policy
	if old == nil {
		old = &Policy{}
	}
	regrouped := func(s *selSet) bool {
		return s.kind == kindGroup && !slices.Equal(old.groups[s.name], p.groups[s.name])
	}
	was, is := ids(old), ids(p)
	changed := func(r *rule) bool {
		return !was[r.origin.ID] || !is[r.origin.ID] || slices.ContainsFunc(r.src.sels, regrouped) || slices.ContainsFunc(r.dsts, regrouped)
	}
	wasAttrs, isAttrs := attrKeys(old), attrKeys(p)

	c.begin()
	c.collectRules(changed)
	c.collectAttrs(wasAttrs, isAttrs, regrouped)
	if old.randomPort != p.randomPort {
		for _, n := range c.nodes {
			c.collect(n.slot)
		}
	}
	for key, s := range c.bySel {
		s.used, s.inSrc, s.dstOf, s.dsts, s.attrs = false, nil, nil, nil, nil
		if regrouped(s) {
			delete(c.bySel, key)
			c.drop(s, old)
		}
	}
	c.build(p)
	for key, s := range c.bySel {
		if !s.used {
			delete(c.bySel, key)
			c.drop(s, old)
		}
	}
	unused := func(s *selSet) bool { return !s.used }
	c.nets, c.vias = slices.DeleteFunc(c.nets, unused), slices.DeleteFunc(c.vias, unused)
	for _, s := range c.fresh {
		c.members(s, func(n *node) {
			// A new set has a higher ID than all before: the order stays.
			n.sels = append(n.sels, s)
			s.nodes.add(n.slot)
		})
	}
	c.again()
	c.collectRules(changed)
	c.collectAttrs(isAttrs, wasAttrs, regrouped)
	return c.ids(-1)
}

// ids returns the IDs of a policy's entries.
func ids(p *Policy) map[string]bool {
	out := make(map[string]bool, len(p.access))
	for i := range p.access {
		out[p.access[i].origin.ID] = true
	}
	return out
}

// attrKeys returns what the entries of "nodeAttrs" say.
func attrKeys(p *Policy) []string {
	var out []string
	for i := range p.attrs {
		a := &p.attrs[i]
		app, err := json.Marshal(a.app) // keys are sorted
		if err != nil {
			app = fmt.Append(nil, a.app)
		}
		key := fmt.Sprintf("%q %s", a.attrs, app)
		for _, t := range a.targets {
			key += " " + t.String()
		}
		out = append(out, key)
	}
	return out
}

// collectRules collects the nodes of rules.
func (c *Compiled) collectRules(which func(r *rule) bool) {
	for i := range c.rules {
		r := &c.rules[i]
		if !which(r) {
			continue
		}
		for _, s := range r.src.sels {
			c.collectSel(s)
		}
		for _, s := range r.dsts {
			if s.kind != kindSelf {
				c.collectSel(s)
				continue
			}
			for _, src := range r.src.sels {
				for _, slot := range src.nodes {
					c.collectOwn(c.slots[slot])
				}
			}
		}
	}
}

// collectAttrs collects the targets of entries of "nodeAttrs" in the policy in
// force that the other one does not have.
func (c *Compiled) collectAttrs(mine, others []string, regrouped func(*selSet) bool) {
	for _, s := range c.bySel {
		for _, i := range s.attrs {
			if regrouped(s) || !slices.Contains(others, mine[i]) {
				c.collectSel(s)
			}
		}
	}
}

// drop forgets a set, but for the lists of networks.
func (c *Compiled) drop(s *selSet, old *Policy) {
	for _, slot := range s.nodes {
		n := c.slots[slot]
		if i := slices.Index(n.sels, s); i >= 0 {
			n.sels = slices.Delete(n.sels, i, i+1)
		}
	}
	is := func(o *selSet) bool { return o == s }
	forget := func(u userRef) {
		if c.users[u] = slices.DeleteFunc(c.users[u], is); len(c.users[u]) == 0 {
			delete(c.users, u)
		}
	}
	switch s.kind {
	case kindUser:
		forget(userRef(s.name))
	case kindGroup:
		for _, u := range old.groups[s.name] {
			forget(u)
		}
	case kindPrefix:
		if c.netBits[s.prefix.Bits()]--; c.netBits[s.prefix.Bits()] == 0 {
			delete(c.netBits, s.prefix.Bits())
		}
	}
}

// members calls f for each node that a selector matches, once.
func (c *Compiled) members(s *selSet, f func(n *node)) {
	each := func(set *nodeSet) {
		if set == nil {
			return
		}
		for _, slot := range *set {
			if n := c.slots[slot]; c.matches(s, n) && !n.in(s) {
				f(n)
			}
		}
	}
	switch s.kind {
	case kindTag, kindVia, kindViaNet:
		each(c.byTag[s.name])
	case kindUser:
		each(c.byUser[userRef(s.name)])
		each(c.byEmail[userRef(s.name)])
	case kindGroup:
		for _, u := range c.policy.groups[s.name] {
			each(c.byUser[u])
			each(c.byEmail[u])
		}
	default:
		for _, n := range c.slots {
			if n != nil && c.matches(s, n) {
				f(n)
			}
		}
	}
}

// matches reports whether a selector matches a node, as match finds it.
func (c *Compiled) matches(s *selSet, n *node) bool {
	switch s.kind {
	case kindPrefix:
		return n.touches(s.prefix)
	case kindVia:
		return slices.Contains(n.Tags, s.name) && n.routes(s.prefix)
	case kindViaNet:
		return slices.Contains(n.Tags, s.name) && slices.ContainsFunc(n.Routes, isDefault)
	case kindInternet:
		return slices.ContainsFunc(n.Routes, isDefault)
	case kindSelf:
		return n.user != ""
	}
	return c.policy.isOf(&n.Node, &s.selector)
}
