package wire

import "encoding/json"

// FilterRule lets some sources in. Either DstPorts or CapGrant is set.
type FilterRule struct {
	SrcIPs   []string       // "*", address, CIDR, "a-b", or "cap:NAME"
	SrcBits  []int          `json:",omitempty"` // obsolete; a rule set that uses it is refused whole
	DstPorts []NetPortRange `json:",omitempty"`
	IPProto  []int          `json:",omitempty"` // empty = TCP, UDP, ICMP, ICMPv6
	CapGrant []CapGrant     `json:",omitempty"`

	// MeshOrigins[i] names the policy rules that DstPorts[i] comes from: one
	// rule on the wire may merge several of the file. Shorter or absent means
	// unknown.
	MeshOrigins [][]RuleOrigin `json:",omitempty"`
}

// RuleOrigin names a rule of the policy file.
type RuleOrigin struct {
	Rule string // "acls[2]", "grants[0]"
	// ID is derived from what the rule says, not from where it stands, so that
	// it outlives edits of other rules. Empty: unknown.
	ID   string `json:",omitempty"`
	Line int    `json:",omitempty"` // 1-based line of the file it starts at
}

// NetPortRange is a set of addresses and ports.
type NetPortRange struct {
	IP    string // as SrcIPs, without "cap:"
	Bits  *int   `json:",omitempty"` // obsolete, as SrcBits
	Ports PortRange
}

// PortRange is inclusive at both ends; 0–65535 is every port.
type PortRange struct {
	First, Last uint16
}

// AllPorts is every port.
var AllPorts = PortRange{0, 65535}

// CapGrant gives application capabilities to the rule's sources, at the
// receiver's addresses Dsts.
type CapGrant struct {
	Dsts   []string                     // CIDR
	Caps   []string                     `json:",omitempty"` // older form, names without values
	CapMap map[string][]json.RawMessage `json:",omitempty"`
}
