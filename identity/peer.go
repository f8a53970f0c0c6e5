package identity

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// StableID names a node for good: it survives key rotation and renaming.
type StableID string

// Peer is the identity of the other end of a connection. It is proven by the
// peer's WireGuard key and described by the control server. A Peer is a value
// of the moment it was asked for; its slices and maps are shared and must not
// be changed.
type Peer struct {
	ID        StableID
	Key       NodePublic
	Name      string       // full name without trailing dot, "db.mesh.internal"
	Addresses []netip.Addr // mesh addresses, the IPv4 one first

	// User is the owner's login name. It is empty for a node that belongs to
	// tags.
	User   string
	Tags   []string // "tag:…", sorted; empty for a node that belongs to a user
	Groups []string // of the user, where the control server tells

	// Capabilities are the application grants that the policy gives this peer
	// at the node that asks: name → values. CapabilitiesOf decodes them.
	Capabilities map[string][]json.RawMessage

	// Rule is the policy rule that admitted the connection. It is zero for
	// connections that this node opened and where no connection is meant.
	Rule Rule
}

// Rule names a rule of the policy. The zero value is an unknown rule: stock
// control servers do not tell which of their rules a packet filter comes from.
type Rule struct {
	Policy int64  // version of the policy that the rest is about, 0 = unknown
	Name   string // place in the policy file, "acls[2]"; "" = unknown
	// ID follows what the rule says and not where it stands: it stays the same
	// when other rules are edited, and names the rule across versions of the
	// policy. "" = unknown.
	ID   string
	Line int // 1-based line in the policy file, 0 = unknown
}

// String returns a form like "acls[2] (line 14, policy 3)", or "" for the zero
// Rule.
func (r Rule) String() string {
	if r.Name == "" {
		return ""
	}
	var more []string
	if r.Line > 0 {
		more = append(more, fmt.Sprintf("line %d", r.Line))
	}
	if r.Policy > 0 {
		more = append(more, fmt.Sprintf("policy %d", r.Policy))
	}
	if len(more) == 0 {
		return r.Name
	}
	return r.Name + " (" + strings.Join(more, ", ") + ")"
}

// IsZero reports whether p is nobody.
func (p Peer) IsZero() bool { return p.Key.IsZero() }

// ShortName is the first label of the name, "db".
func (p Peer) ShortName() string {
	short, _, _ := strings.Cut(p.Name, ".")
	return short
}

// HasTag reports whether the peer carries the tag ("tag:…").
func (p Peer) HasTag(tag string) bool { return slices.Contains(p.Tags, tag) }

// String returns name and owner, like "db.mesh.internal (tag:db)".
func (p Peer) String() string {
	owner := p.User
	if len(p.Tags) > 0 {
		owner = strings.Join(p.Tags, " ")
	}
	if owner == "" {
		return p.Name
	}
	return p.Name + " (" + owner + ")"
}

// CapabilitiesOf decodes the values that the policy gives the peer for the
// named capability. A capability without values gives an empty, not nil,
// slice; one that the peer does not have gives nil.
func CapabilitiesOf[T any](p Peer, name string) ([]T, error) {
	values, ok := p.Capabilities[name]
	if !ok {
		return nil, nil
	}
	out := make([]T, 0, len(values))
	for i, raw := range values {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, fmt.Errorf("capability %s of %s, value %d: %w", name, p.Name, i, err)
		}
		out = append(out, v)
	}
	return out, nil
}
