package policy

import (
	"net/netip"
	"slices"
	"strings"
)

// approver says whose routes need nobody's word.
type approver struct {
	prefix netip.Prefix // routes within; not valid: exit nodes
	who    []*selector
}

// readApprovers reads "autoApprovers".
func (r *reader) readApprovers(m member) {
	for _, m := range r.members(m.value, `"autoApprovers"`) {
		switch m.name {
		case "routes":
			for _, m := range r.members(m.value, `"routes"`) {
				p, err := parsePrefix(m.name)
				if h, ok := r.hosts[m.name]; ok {
					p, err = h, nil
				}
				if err != nil {
					r.fail(m.nameAt, "", "%v", err)
					continue
				}
				r.approvers = append(r.approvers, approver{p, r.approving(m)})
			}
		case "exitNode":
			r.approvers = append(r.approvers, approver{who: r.approving(m)})
		case "services":
			if !isEmpty(m.value) {
				r.unsupported(m.nameAt, "member %q", m.name)
			}
		default:
			r.unknown(m, []string{"routes", "exitNode"})
		}
	}
}

func (r *reader) approving(m member) []*selector {
	who := []*selector{}
	for _, t := range r.texts(m.value, m.name) {
		if sels, ok := r.selectors(t.text, t.at, inApprovers); ok {
			who = append(who, sels...)
		}
	}
	return who
}

// AutoApproves reports whether a route that the node advertises is approved by
// the policy. Default routes are approved by "exitNode" alone, others by a
// network of "routes" that contains them.
func (p *Policy) AutoApproves(n Node, route netip.Prefix) bool {
	route = route.Masked()
	return slices.ContainsFunc(p.approvers, func(a approver) bool {
		if isDefault(route) != !a.prefix.IsValid() {
			return false
		}
		if a.prefix.IsValid() && (a.prefix.Bits() > route.Bits() || !a.prefix.Contains(route.Addr())) {
			return false
		}
		return slices.ContainsFunc(a.who, func(s *selector) bool { return p.isOf(&n, s) })
	})
}

// User is what a policy may ask about a user.
type User struct {
	Name  string // login name
	Email string // where it is another
	Role  string // as Node.Role
}

// TagOwner reports whether user may give its nodes the tag. user is a login
// name; "tag:…" asks for a node that carries that tag. A tag that the policy
// does not define has no owners. A user known by a login name and an e-mail
// address owns what either of them owns. OwnsTag knows roles, too.
func (p *Policy) TagOwner(user, tag string) bool {
	if strings.HasPrefix(user, "tag:") {
		return p.ownsTag(&Node{Tags: []string{user}}, tag)
	}
	return p.OwnsTag(User{Name: user}, tag)
}

// OwnsTag reports whether a user may give its nodes the tag.
func (p *Policy) OwnsTag(u User, tag string) bool {
	return p.ownsTag(&Node{User: u.Name, Email: u.Email, Role: u.Role}, tag)
}

func (p *Policy) ownsTag(n *Node, tag string) bool {
	return slices.ContainsFunc(p.tagOwners[tag], func(s *selector) bool { return p.isOf(n, s) })
}

// isOf reports whether a selector means the node, by name or by its own
// addresses.
func (p *Policy) isOf(n *Node, s *selector) bool {
	tagged := len(n.Tags) > 0
	if s.kind == kindTag {
		return slices.Contains(n.Tags, s.name)
	}
	switch s.kind {
	case kindAll, kindAnywhere:
		return true
	case kindTagged:
		return tagged
	case kindPrefix:
		return n.at(s.prefix)
	}
	if tagged || n.User == "" {
		return false
	}
	is := func(u userRef) bool {
		return u == canonicalUser(n.User) || n.Email != "" && u == canonicalUser(n.Email)
	}
	switch s.kind {
	case kindMember:
		return true
	case kindUser:
		return is(userRef(s.name))
	case kindGroup:
		return slices.ContainsFunc(p.groups[s.name], is)
	case kindRole:
		return n.Role == s.name
	case kindDomain:
		return n.domain() == s.name
	}
	return false
}

// at reports whether the node has an address within p.
func (n *Node) at(p netip.Prefix) bool { return slices.ContainsFunc(n.Addrs, p.Contains) }
