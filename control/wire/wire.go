// Package wire holds the JSON types of the ts2021 control protocol as nodes,
// control servers and relays exchange them, and nothing else: no I/O, no state.
//
// Members are named as the protocol names them. Absent, null and empty differ
// in places; where they do, the field says so. What this project adds to the
// protocol has names that start with "Mesh" (EXTENSIONS.md lists them all);
// stock peers ignore them.
package wire

import "time"

// CapabilityVersion is the protocol level our node announces, in the Noise
// handshake and in each request. It is raised only together with the behaviour
// that the level stands for.
const CapabilityVersion = 131

// MinCapabilityVersion is the oldest level our control server serves: what
// stock clients of the last two years announce.
const MinCapabilityVersion = 113

// Limits on what is read from the other side, in bytes.
const (
	MaxRequestBody  = 1 << 20   // body of a register or map request
	MaxResponseBody = 1 << 20   // body of any answer but a map stream
	MaxMapFrame     = 64 << 20  // one message of a map stream as it is on the wire
	MaxMapMessage   = 256 << 20 // the same after decompression
	MaxEarlyPayload = 1 << 20   // JSON of the early payload
)

// KeepAliveInterval is the longest silence of a map stream's sender, and
// Watchdog the silence after which a receiver gives the stream up.
const (
	KeepAliveInterval = 50 * time.Second
	Watchdog          = 120 * time.Second
)

// NodeID numbers a node within one control server. It is never reused and
// never zero.
type NodeID int64

// UserID numbers a user within one control server. It is never zero.
type UserID int64

// TaggedUser is the owner named for nodes that belong to tags, not to a user.
const TaggedUser UserID = 2147455555

// KeyAnswer is the body of GET /key?v=N.
type KeyAnswer struct {
	LegacyPublicKey MachineKey `json:"legacyPublicKey"` // historical, zero
	PublicKey       MachineKey `json:"publicKey"`
}

// EarlyPayload may precede HTTP/2 inside the Noise session.
type EarlyPayload struct {
	NodeKeyChallenge ChallengeKey `json:"nodeKeyChallenge"`
}

// UserProfile describes a user to other nodes.
type UserProfile struct {
	ID            UserID
	LoginName     string
	DisplayName   string   `json:",omitempty"`
	ProfilePicURL string   `json:",omitempty"`
	Groups        []string `json:",omitempty"`
}

// Login is the account of a user at an identity provider.
type Login struct {
	ID            int64
	Provider      string
	LoginName     string
	DisplayName   string
	ProfilePicURL string `json:",omitempty"`
}

// User is the owner in a register response.
type User struct {
	ID            UserID
	DisplayName   string
	ProfilePicURL string    `json:",omitempty"`
	Created       time.Time `json:",omitzero"`
}

// Resolver is a DNS server.
type Resolver struct {
	Addr                string   `json:",omitempty"`
	BootstrapResolution []string `json:",omitempty"`
	UseWithExitNode     bool     `json:",omitempty"`
}

// DNSRecord is an extra name that nodes resolve.
type DNSRecord struct {
	Name  string
	Type  string `json:",omitempty"` // "" = A or AAAA, by Value
	Value string
}

// DNSConfig tells nodes how to resolve names.
type DNSConfig struct {
	Resolvers           []Resolver            `json:",omitempty"`
	Routes              map[string][]Resolver `json:",omitempty"`
	FallbackResolvers   []Resolver            `json:",omitempty"`
	Domains             []string              `json:",omitempty"`
	Proxied             bool                  `json:",omitempty"`
	Nameservers         []string              `json:",omitempty"`
	CertDomains         []string              `json:",omitempty"`
	ExtraRecords        []DNSRecord           `json:",omitempty"`
	ExitNodeFilteredSet []string              `json:",omitempty"`
}
