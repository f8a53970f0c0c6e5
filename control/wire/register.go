package wire

import (
	"time"

	"mesh/identity"
)

// Key types of the protocol, as JSON members.
type (
	MachineKey   = identity.MachinePublic
	NodeKey      = identity.NodePublic
	DiscoKey     = identity.DiscoPublic
	ChallengeKey = identity.ChallengePublic
)

// RegisterAuth carries an enrolment key.
type RegisterAuth struct {
	AuthKey string `json:",omitempty"`
}

// RegisterRequest is the body of POST /machine/register. The machine key of
// the Noise session it arrives on says which installation asks.
type RegisterRequest struct {
	Version    int
	NodeKey    NodeKey
	OldNodeKey NodeKey       // zero unless NodeKey replaces it
	NLKey      string        `json:",omitempty"` // tailnet lock, ignored
	Auth       *RegisterAuth `json:",omitempty"`
	// Expiry in the past, with the current NodeKey, logs the node out.
	// The zero time asks for nothing; the future asks for an earlier expiry.
	Expiry           time.Time
	Followup         string // AuthURL of an earlier answer: wait until the user is done
	Hostinfo         *Hostinfo
	Ephemeral        bool   `json:",omitempty"`
	NodeKeySignature []byte // tailnet lock, null
	Tailnet          string `json:",omitempty"`

	// MeshInstance names the process that asks: letters and digits, chosen anew
	// at each start. Two that are alive at once are copies of one identity.
	MeshInstance string `json:",omitempty"`
	// MeshYield says that the state of this process was found to be copied, and
	// another copy the newer one: it wants in only if no other is there.
	MeshYield bool `json:",omitempty"`
	// MeshKeeps says that the node goes on answering to OldNodeKey for a while:
	// relays should admit both keys, and peers hear of the new one when it
	// polls with that.
	MeshKeeps bool `json:",omitempty"`
}

// KeptKeyFor is how long a former key goes on where MeshKeeps was said: it stays a
// member, and the node answers to it.
const KeptKeyFor = 3 * time.Minute

// MaxInstance is the length in bytes of a MeshInstance; one that is longer
// counts as none.
const MaxInstance = 32

// LogoutExpiry is the past Expiry that means "log out".
var LogoutExpiry = time.Unix(123, 0).UTC()

// RegisterResponse answers a RegisterRequest, with HTTP status 200 also when
// it refuses.
type RegisterResponse struct {
	User              User
	Login             Login
	NodeKeyExpired    bool   // make a new node key and register again
	MachineAuthorized bool   // informational
	AuthURL           string // the user must visit it, then ask again with Followup
	NodeKeySignature  []byte
	Error             string // refused; shown to the user

	// MeshCode is the ErrorCode behind Error, for callers that branch.
	MeshCode ErrorCode `json:",omitempty"`
	// MeshReplaced says that another process was this node until now, and has
	// been told to stop.
	MeshReplaced bool `json:",omitempty"`
}

// Hostinfo describes a node's installation. Everything is omitted when zero.
type Hostinfo struct {
	IPNVersion   string    `json:",omitempty"`
	BackendLogID string    `json:",omitempty"`
	OS           string    `json:",omitempty"`
	OSVersion    string    `json:",omitempty"`
	Hostname     string    `json:",omitempty"`
	GoArch       string    `json:",omitempty"`
	GoVersion    string    `json:",omitempty"`
	Package      string    `json:",omitempty"`
	App          string    `json:",omitempty"`
	ShieldsUp    bool      `json:",omitempty"`
	RoutableIPs  []string  `json:",omitempty"` // advertised routes, CIDR
	RequestTags  []string  `json:",omitempty"`
	Services     []Service `json:",omitempty"`
	NetInfo      *NetInfo  `json:",omitempty"` // nil = unknown, not "no relay"
	Userspace    *bool     `json:",omitempty"`
}

// Service is something a node listens on for its peers.
type Service struct {
	Proto       string
	Port        uint16
	Description string `json:",omitempty"`
}

// NetInfo is a node's view of its network. Nil booleans are unknown.
type NetInfo struct {
	MappingVariesByDestIP *bool              `json:",omitempty"`
	WorkingIPv6           *bool              `json:",omitempty"`
	OSHasIPv6             *bool              `json:",omitempty"`
	WorkingUDP            *bool              `json:",omitempty"`
	WorkingICMPv4         *bool              `json:",omitempty"`
	UPnP                  *bool              `json:",omitempty"`
	PMP                   *bool              `json:",omitempty"`
	PCP                   *bool              `json:",omitempty"`
	HavePortMap           bool               `json:",omitempty"`
	PreferredDERP         int                `json:",omitempty"` // home relay region, 0 = none
	LinkType              string             `json:",omitempty"`
	FirewallMode          string             `json:",omitempty"`
	DERPLatency           map[string]float64 `json:",omitempty"` // "900-v4" → seconds
}
