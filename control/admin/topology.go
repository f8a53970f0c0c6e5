package admin

import (
	"net/netip"

	"mesh/control/wire"
)

// Topology is who is in a mesh, as far as policies ask: what `mesh policy
// compile` reads.
type Topology struct {
	Users []TopologyUser          `json:"users"`
	Nodes map[string]TopologyNode `json:"nodes"` // by name
}

// TopologyUser is a user.
type TopologyUser struct {
	ID    wire.UserID `json:"id"`
	Name  string      `json:"name"`            // login name
	Email string      `json:"email,omitempty"` // where it is another
	Role  string      `json:"role,omitempty"`  // as autogroups name it: "admin", "owner"…
}

// TopologyNode is a node.
type TopologyNode struct {
	ID             wire.NodeID    `json:"id,omitempty"`   // 0 = in the order of the names
	User           string         `json:"user,omitempty"` // a user's name; nobody owns a node with tags
	Tags           []string       `json:"tags,omitempty"`
	IPv4           netip.Addr     `json:"ipv4,omitzero"`
	IPv6           netip.Addr     `json:"ipv6,omitzero"`
	RoutableIPs    []netip.Prefix `json:"routable_ips,omitempty"` // routes that it advertises
	ApprovedRoutes []netip.Prefix `json:"approved_routes,omitempty"`
	Offline        bool           `json:"offline,omitempty"` // another router of the same network is preferred
}
