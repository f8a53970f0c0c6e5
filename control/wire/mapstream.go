package wire

import (
	"encoding/json"
	"net/netip"
	"time"
)

// EndpointType says how a node learned one of its endpoints.
type EndpointType int

// Endpoint types.
const (
	EndpointUnknown       EndpointType = 0
	EndpointLocal         EndpointType = 1
	EndpointSTUN          EndpointType = 2
	EndpointPortMapped    EndpointType = 3
	EndpointSTUNLocalPort EndpointType = 4
	EndpointExplicit      EndpointType = 5
)

// MapRequest is the body of POST /machine/map.
//
// Stream and not OmitPeers is the long poll; OmitPeers without Stream is a lite
// update that only stores state; neither is a one-shot fetch.
type MapRequest struct {
	Version       int
	Compress      string `json:",omitempty"` // "zstd" or ""
	KeepAlive     bool
	NodeKey       NodeKey
	DiscoKey      DiscoKey `json:",omitzero"`
	Stream        bool     `json:",omitzero"`
	Hostinfo      *Hostinfo
	Endpoints     []netip.AddrPort `json:",omitempty"`
	EndpointTypes []EndpointType   `json:",omitempty"` // parallel to Endpoints
	OmitPeers     bool             `json:",omitzero"`
	ReadOnly      bool             `json:",omitempty"`

	MapSessionHandle string   `json:",omitempty"`
	MapSessionSeq    int64    `json:",omitzero"`
	TKAHead          string   `json:",omitempty"`
	DebugFlags       []string `json:",omitempty"`

	// MeshApplied reports the policy version of the newest netmap the node
	// has in force.
	MeshApplied int64 `json:",omitzero"`
	// MeshReports says, in the request for a stream, that the node answers
	// MapResponse.MeshMapVersion.
	MeshReports bool `json:",omitzero"`
	// MeshMapVersion is the newest version that MapResponse.MeshMapVersion
	// named and that is in force at the node.
	MeshMapVersion int64 `json:",omitzero"`
	// MeshFlows are connection attempts that the node judged since its last
	// report: only in lite updates, and only if the server asked for them.
	MeshFlows []Flow `json:",omitempty"`
	// MeshInstance is as in RegisterRequest.
	MeshInstance string `json:",omitempty"`
}

// MaxFlows is how many flows one MapRequest may report. More are ignored.
const MaxFlows = 256

// Flow are attempts of one address to reach a port of another, as the packet
// filter of the receiver judged them.
type Flow struct {
	Src     netip.Addr
	Dst     netip.Addr
	Proto   int    // IP protocol
	Port    uint16 `json:",omitzero"` // of Dst
	Allowed int64  `json:",omitzero"` // how many were let in
	Denied  int64  `json:",omitzero"` // how many were not
}

// Node is a node as its peers and itself see it.
type Node struct {
	ID         NodeID
	StableID   string
	Name       string // FQDN with trailing dot
	User       UserID
	Key        NodeKey
	KeyExpiry  time.Time        `json:",omitzero"` // zero = never
	Machine    MachineKey       `json:",omitzero"`
	DiscoKey   DiscoKey         `json:",omitzero"`
	Addresses  []netip.Prefix   // own addresses, /32 and /128
	AllowedIPs []netip.Prefix   // nil = Addresses; empty, not nil = none
	Endpoints  []netip.AddrPort `json:",omitempty"`
	HomeDERP   int              `json:",omitzero"`
	LegacyDERP string           `json:"DERP,omitzero"` // "127.3.3.40:<region>", older form of HomeDERP
	Hostinfo   *Hostinfo        // always an object: some stock clients crash on absence
	Created    time.Time        `json:",omitzero"`
	Cap        int              `json:",omitzero"`
	Tags       []string         `json:",omitempty"` // tagged nodes have no user identity

	PrimaryRoutes     []netip.Prefix               `json:",omitempty"`
	LastSeen          *time.Time                   `json:",omitempty"` // only while offline
	Online            *bool                        `json:",omitempty"` // nil = unknown
	MachineAuthorized bool                         `json:",omitempty"`
	Capabilities      []string                     `json:",omitempty"` // older form of CapMap
	CapMap            map[string][]json.RawMessage `json:",omitempty"`
	Expired           bool                         `json:",omitzero"`

	// MeshRenew, of the receiver itself, is when it should make itself another
	// node key, while this one is good; nil = it need not, or it would not help.
	MeshRenew *time.Time `json:",omitempty"`

	UnsignedPeerAPIOnly bool `json:",omitempty"`
	IsJailed            bool `json:",omitempty"` // nothing this peer starts gets in
	IsWireGuardOnly     bool `json:",omitempty"`
}

// PeerChange patches a peer that is already known. Nil and zero members leave
// it as it is.
type PeerChange struct {
	NodeID     NodeID
	DERPRegion int                          `json:",omitempty"`
	Cap        int                          `json:",omitempty"`
	CapMap     map[string][]json.RawMessage `json:",omitempty"`
	Endpoints  []netip.AddrPort             `json:",omitempty"`
	Key        *NodeKey                     `json:",omitempty"`
	DiscoKey   *DiscoKey                    `json:",omitempty"`
	Online     *bool                        `json:",omitempty"`
	LastSeen   *time.Time                   `json:",omitempty"`
	KeyExpiry  *time.Time                   `json:",omitempty"`
}

// MapResponse is one message of a map stream. Absent members leave things as
// they are; the first message of a stream is complete.
type MapResponse struct {
	KeepAlive        bool   `json:",omitempty"` // nothing else in the message counts, save PingRequest and ControlTime
	MapSessionHandle string `json:",omitempty"`
	Seq              int64  `json:",omitempty"`

	Node    *Node    `json:",omitempty"` // the receiver itself
	DERPMap *DERPMap `json:",omitempty"`

	Peers             []*Node         `json:",omitempty"` // non-empty = complete replacement
	PeersChanged      []*Node         `json:",omitempty"`
	PeersRemoved      []NodeID        `json:",omitempty"`
	PeersChangedPatch []*PeerChange   `json:",omitempty"`
	PeerSeenChange    map[NodeID]bool `json:",omitempty"`
	OnlineChange      map[NodeID]bool `json:",omitempty"`

	UserProfiles []UserProfile `json:",omitempty"` // merged by ID
	Domain       string        `json:",omitempty"`
	DNSConfig    *DNSConfig    `json:",omitempty"`

	// PacketFilter nil = unchanged; empty, not nil = block everything. Our
	// server sends PacketFilters instead, which can say "empty".
	PacketFilter []FilterRule `json:",omitempty"`
	// PacketFilters maps chunk names to rules; a nil value deletes the chunk
	// and "*" with nil deletes all before the rest applies.
	PacketFilters map[string][]FilterRule `json:",omitempty"`

	CollectServices *bool        `json:",omitempty"`
	ControlTime     *time.Time   `json:",omitempty"`
	PingRequest     *PingRequest `json:",omitempty"`
	Health          []string     `json:",omitempty"`
	Debug           *Debug       `json:",omitempty"`

	// MeshPolicy is the version of the policy that the peers and filters of
	// this stream come from; 0 = unchanged.
	MeshPolicy int64 `json:",omitempty"`
	// MeshMapVersion names the map as it is with this message. The server
	// wants to know when it is in force: with the node's next request, which
	// is due. Sent only to nodes with MeshReports.
	MeshMapVersion int64 `json:",omitzero"`
	// MeshCode ends the stream for a reason that the node should act on, such
	// as CodeNodeRevoked.
	MeshCode ErrorCode `json:",omitempty"`
	// MeshRetryWithin ends the stream because the server goes away for a moment:
	// the node connects again at a moment of its choice within so many
	// milliseconds, so that not all do so at once.
	MeshRetryWithin int `json:",omitzero"`
	// MeshReportFlows asks the node to report connection attempts, at most
	// every so many seconds; 0 ends that, nil leaves it as it is.
	MeshReportFlows *int `json:",omitempty"`
}

// PingRequest asks the receiver to show that it lives, or to ping another node.
type PingRequest struct {
	URL        string
	URLIsNoise bool       `json:",omitempty"`
	Log        bool       `json:",omitempty"`
	Types      string     `json:",omitempty"`
	IP         netip.Addr `json:",omitzero"`
	Payload    []byte     `json:",omitempty"`
}

// Debug is one-shot advice to stock clients.
type Debug struct {
	SleepSeconds   float64 `json:",omitempty"`
	DisableLogTail bool    `json:",omitempty"`
	Exit           *int    `json:",omitempty"`
}
