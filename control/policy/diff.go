package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"mesh/control/wire"
	"mesh/internal/iprange"
)

// Change is access that one policy gives and another does not.
type Change struct {
	Gained bool     // else lost
	Src    []string // identities: users, tags, networks
	Dst    string
	// Access is what: "tcp 22", "* 80-443", "capability example.com/cap/tools".
	Access []string
	// Rules are those of the policy that gives it.
	Rules []wire.RuleOrigin
}

// String returns a line like
//
//   - alice@example.com, bob → tag:db: tcp 5432 (acls[2] at line 7)
func (c Change) String() string {
	sign := "-"
	if c.Gained {
		sign = "+"
	}
	var rules []string
	for _, r := range c.Rules {
		rules = append(rules, ruleText(r))
	}
	return fmt.Sprintf("%s %s → %s: %s (%s)", sign, strings.Join(c.Src, ", "), c.Dst, strings.Join(c.Access, "; "), strings.Join(rules, ", "))
}

// Limits of what Diff looks at and returns.
const (
	maxChanges    = 1000
	maxIdentities = 3000
	maxNamed      = 8         // identities that a change names one by one
	maxDiffWork   = 3_000_000 // rules that are looked at
	maxCapText    = 200       // bytes of a capability with its values
)

// Diff returns what the nodes gain and lose between two policies, nil meaning one
// that allows nothing. Nodes of one owner or with the same tags are one identity;
// networks and addresses of the policies are identities, too. The second result
// is false if there is more than is returned: more than 1,000 changes, or more
// than 3,000 identities, or too much to compare.
func Diff(old, new *Policy, nodes []Node) ([]Change, bool) {
	d := differ{old: Compile(old, nodes), new: Compile(new, nodes), complete: true}
	d.identities(nodes, old, new)
	d.keep()
	var out []Change
	for _, dst := range d.ids {
		out = append(out, d.to(dst)...)
		if len(out) > maxChanges {
			return out[:maxChanges], false
		}
	}
	return out, d.complete
}

// differ compares two compilations of the same nodes.
type differ struct {
	old, new *Compiled
	ids      []identity
	kept     map[string]bool // IDs of rules that mean the same in both
	work     int
	complete bool
}

// identity is a party under both policies.
type identity struct {
	names    []string
	old, new *party
}

// identities groups nodes that neither policy can tell apart.
func (d *differ) identities(nodes []Node, policies ...*Policy) {
	byClass := make(map[string]int)
	self := d.old.hasSelf() || d.new.hasSelf()
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b Node) int { return int(a.ID - b.ID) })
	add := func(class, name string, make func() identity) {
		i, ok := byClass[class]
		if !ok {
			if len(d.ids) == maxIdentities {
				d.complete = false
				return
			}
			i = len(d.ids)
			byClass[class] = i
			d.ids = append(d.ids, make())
		}
		if !slices.Contains(d.ids[i].names, name) && len(d.ids[i].names) <= maxNamed {
			if len(d.ids[i].names) == maxNamed {
				name = "and more"
			}
			d.ids[i].names = append(d.ids[i].names, name)
		}
	}
	for _, n := range nodes {
		a, b := d.old.nodes[n.ID], d.new.nodes[n.ID]
		if a == nil || b == nil {
			continue
		}
		add(a.class(self)+"|"+b.class(self), a.owner(), func() identity {
			return identity{old: d.old.newParty(a, a.Addrs, false), new: d.new.newParty(b, b.Addrs, false)}
		})
	}
	for _, p := range policies {
		if p == nil {
			continue
		}
		for i := range p.access {
			for _, s := range p.access[i].srcs {
				d.network(s, add)
			}
			for _, t := range p.access[i].dsts {
				d.network(t.sel, add)
			}
		}
	}
}

// hasSelf reports whether the policy has rules with autogroup:self.
func (c *Compiled) hasSelf() bool { return c.bySel[selector{kind: kindSelf}] != nil }

// network adds what a selector names by address, if no node is there.
func (d *differ) network(s *selector, add func(class, name string, make func() identity)) {
	if s.kind != kindPrefix && s.kind != kindVia {
		return
	}
	r := iprange.Of(s.prefix)
	if s.prefix.IsSingleIP() && d.new.byAddr[r.First] != nil {
		return
	}
	addrs := []netip.Addr{r.First}
	name := prefixText(s.prefix)
	add(name, name, func() identity {
		return identity{old: d.old.newParty(nil, addrs, true), new: d.new.newParty(nil, addrs, true)}
	})
}

// keep finds the rules that both policies have, with groups that have the same
// members in both.
func (d *differ) keep() {
	d.kept = make(map[string]bool)
	had := make(map[string]bool)
	for i := range d.old.rules {
		had[d.old.rules[i].origin.ID] = true
	}
	changed := func(s *selSet) bool {
		return s.kind == kindGroup && !slices.Equal(d.old.policy.groups[s.name], d.new.policy.groups[s.name])
	}
	for i := range d.new.rules {
		r := &d.new.rules[i]
		if had[r.origin.ID] && !slices.ContainsFunc(r.src.sels, changed) && !slices.ContainsFunc(r.dsts, changed) {
			d.kept[r.origin.ID] = true
		}
	}
}

// without returns the destinations of rules that are not in kept.
func (c *Compiled) without(refs []dstRef, kept map[string]bool) (out []dstRef) {
	for _, ref := range refs {
		if r := &c.rules[ref.rule]; !kept[r.origin.ID] && !r.companion {
			out = append(out, ref)
		}
	}
	return out
}

func (c *Compiled) anyAdmits(refs []dstRef, a, b *party) bool {
	m := matcher{c: c, a: a, b: b}
	return slices.ContainsFunc(refs, func(ref dstRef) bool {
		_, _, ok := m.admits(ref)
		return ok
	})
}

// to returns the changes of what may be reached at one identity.
func (d *differ) to(dst identity) (out []Change) {
	if d.work > maxDiffWork {
		d.complete = false
		return nil
	}
	was, is := d.old.targets(dst.old), d.new.targets(dst.new)
	d.work += len(was) + len(is)
	wasOnly, isOnly := d.old.without(was, d.kept), d.new.without(is, d.kept)
	if len(wasOnly) == 0 && len(isOnly) == 0 {
		return nil
	}
	index := make(map[string]int)
	for _, src := range d.ids {
		if d.work += 2 + len(wasOnly) + len(isOnly); d.work > maxDiffWork {
			d.complete = false
			return out
		}
		if !d.old.anyAdmits(wasOnly, src.old, dst.old) && !d.new.anyAdmits(isOnly, src.new, dst.new) {
			continue
		}
		d.work += len(was) + len(is)
		before, after := d.old.accessOf(was, src.old, dst.old), d.new.accessOf(is, src.new, dst.new)
		if before.equal(after) {
			continue
		}
		for _, c := range []Change{
			{Gained: false, Access: before.minus(after), Rules: before.rules},
			{Gained: true, Access: after.minus(before), Rules: after.rules},
		} {
			if len(c.Access) == 0 {
				continue
			}
			k := fmt.Sprint(c.Gained, c.Access)
			i, ok := index[k]
			if !ok {
				i = len(out)
				index[k] = i
				c.Dst = strings.Join(dst.names, ", ")
				out = append(out, c)
			}
			for _, name := range src.names {
				if len(out[i].Src) <= 2*maxNamed && !slices.Contains(out[i].Src, name) {
					out[i].Src = append(out[i].Src, name)
				}
			}
		}
	}
	return out
}

// opened is what one party may do at another: ports by protocol, and
// capabilities.
type opened struct {
	ports map[int][]portRange
	caps  []string
	rules []wire.RuleOrigin
}

func (c *Compiled) accessOf(refs []dstRef, a, b *party) opened {
	o := opened{ports: make(map[int][]portRange)}
	m := matcher{c: c, a: a, b: b}
	for _, ref := range refs {
		r := &c.rules[ref.rule]
		if r.companion {
			continue
		}
		if _, _, ok := m.admits(ref); !ok {
			continue
		}
		for name, values := range r.app {
			for _, v := range values {
				name += " " + string(v)
			}
			if name = name[:min(len(name), maxCapText)]; !slices.Contains(o.caps, name) {
				o.caps = append(o.caps, name)
			}
		}
		if r.app == nil {
			protos := r.protos
			if protos == nil {
				protos = []int{6, 17}
			}
			for _, p := range protos {
				o.ports[p] = append(o.ports[p], r.access.dsts[ref.dst].ports...)
			}
		}
		if len(o.rules) < maxOrigins && !slices.Contains(o.rules, r.origin) {
			o.rules = append(o.rules, r.origin)
		}
	}
	for p, list := range o.ports {
		o.ports[p] = mergePorts(list)
	}
	slices.Sort(o.caps)
	return o
}

func (o opened) equal(x opened) bool {
	return len(o.minus(x)) == 0 && len(x.minus(o)) == 0
}

// minus says what o opens and x does not.
func (o opened) minus(x opened) (out []string) {
	var protos []int
	for p := range o.ports {
		protos = append(protos, p)
	}
	slices.Sort(protos)
	left := make(map[int]string)
	for _, p := range protos {
		if rest := minusPorts(o.ports[p], x.ports[p]); len(rest) > 0 {
			left[p] = portsText(rest)
		}
	}
	if left[6] != "" && left[6] == left[17] {
		out = append(out, "tcp, udp "+left[6])
		delete(left, 6)
		delete(left, 17)
	}
	for _, p := range protos {
		if left[p] != "" {
			out = append(out, protosText([]int{p})+" "+left[p])
		}
	}
	for _, name := range o.caps {
		if !slices.Contains(x.caps, name) {
			out = append(out, "capability "+name)
		}
	}
	return out
}

// minusPorts takes merged ranges out of merged ranges.
func minusPorts(from, what []portRange) []portRange {
	for _, w := range what {
		var left []portRange
		for _, p := range from {
			if p.last < w.first || w.last < p.first {
				left = append(left, p)
				continue
			}
			if p.first < w.first {
				left = append(left, portRange{p.first, w.first - 1})
			}
			if w.last < p.last {
				left = append(left, portRange{w.last + 1, p.last})
			}
		}
		from = left
	}
	return from
}
