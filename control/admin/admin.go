// Package admin is the contract between a control server and those who
// administer it: the JSON types of its API and a client for it.
//
// The API is plain HTTP on a unix socket, whose file permissions are the
// authentication. Nothing in it ever returns a secret but the call that
// creates one.
package admin

import (
	"errors"
	"net/netip"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Host is what requests must name as their host, so that no browser can be
// made to send one.
const Host = "mesh-admin"

// MaxBody is the longest request and answer, in bytes.
const MaxBody = 64 << 20

// MaxPolicy is the longest policy, in bytes.
const MaxPolicy = 1 << 20

// MaxAudit is how many entries one answer of the audit record has at most.
const MaxAudit = 10000

// Errors that Error matches with errors.Is.
var (
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("conflict")
	ErrInvalid  = errors.New("invalid request")
)

// Error is a refusal of the server.
type Error struct {
	Status  int    `json:"-"` // HTTP
	Message string `json:"error"`
}

// Error returns the server's text.
func (e *Error) Error() string { return e.Message }

// Is matches ErrNotFound, ErrConflict and ErrInvalid by status.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.Status == 404
	case ErrConflict:
		return e.Status == 409
	case ErrInvalid:
		return e.Status == 400
	}
	return false
}

// User is a user.
type User struct {
	ID      wire.UserID `json:"id"`
	Name    string      `json:"name"`
	Role    string      `json:"role"` // "owner" or "member"
	Created time.Time   `json:"created"`
	Nodes   int         `json:"nodes"`
	// Suspended is since when the user's nodes and keys are refused, zero = they
	// are not.
	Suspended time.Time `json:"suspended,omitzero"`
	Applied   *Applied  `json:"applied,omitempty"` // only if somebody waited
}

// Applied tells how far a withdrawal is in force at the nodes that could see what
// was withdrawn and were connected then.
type Applied struct {
	Peers       int           `json:"peers"`   // those that say what they have in force
	Applied     int           `json:"applied"` // of Peers, that have this
	Slowest     time.Duration `json:"slowest"` // from the order to the word of the last of these
	SlowestNode string        `json:"slowestNode,omitempty"`
	Missing     []string      `json:"missing,omitempty"` // of Peers, that have not said so: names, some at most
	Mute        int           `json:"mute"`              // nodes that do not say, those of other makers
	Elsewhere   int           `json:"elsewhere"`         // nodes that are connected to other replicas, and were not asked
}

// NodeRemoved is the answer to DELETE /v1/nodes/NAME.
type NodeRemoved struct {
	Applied *Applied `json:"applied,omitempty"` // only if somebody waited
}

// UserCreate is the body of POST /v1/users.
type UserCreate struct {
	Name string `json:"name"` // an e-mail address or plain login name
}

// Key is an enrolment key, without its secret.
type Key struct {
	ID        int64     `json:"id"`
	Kind      string    `json:"kind"` // "auth" for nodes, "relay" for relays
	User      string    `json:"user,omitempty"`
	Tags      []string  `json:"tags,omitempty"`
	Reusable  bool      `json:"reusable"`
	Ephemeral bool      `json:"ephemeral"`
	Created   time.Time `json:"created"`
	Expires   time.Time `json:"expires,omitzero"`
	Revoked   time.Time `json:"revoked,omitzero"`
	Used      time.Time `json:"used,omitzero"`
	State     string    `json:"state"` // "valid", "expired", "revoked" or "used"
	// NodeExpiry is how long the keys of nodes that enrol with it are good
	// for; 0 = as the server has it, negative = for ever.
	NodeExpiry time.Duration `json:"nodeExpiry,omitempty"`
	// Removed are the names of nodes that were revoked with the key.
	Removed []string `json:"removed,omitempty"`
	Applied *Applied `json:"applied,omitempty"` // only if somebody waited
}

// KeyCreate is the body of POST /v1/keys. One of User, Tags and Relay is
// required, and only one.
type KeyCreate struct {
	User      string   `json:"user,omitempty"`
	Tags      []string `json:"tags,omitempty"` // must be in the policy's tagOwners
	Relay     bool     `json:"relay,omitempty"`
	Reusable  bool     `json:"reusable,omitempty"`
	Ephemeral bool     `json:"ephemeral,omitempty"`
	// Expires is how long the key is good for; 0 = the server's default of 90
	// days. For relay keys 0 = for ever.
	Expires time.Duration `json:"expires,omitempty"`
	// NodeExpiry is as Key has it.
	NodeExpiry time.Duration `json:"nodeExpiry,omitempty"`
}

// NewKey is the answer to KeyCreate: the only time that the secret is shown.
type NewKey struct {
	Key
	Secret string `json:"secret"`
}

// Node is a registered node.
type Node struct {
	ID        wire.NodeID         `json:"id"`
	StableID  identity.StableID   `json:"stableId"`
	Name      string              `json:"name"`               // first label
	FullName  string              `json:"fullName"`           // without trailing dot
	Hostname  string              `json:"hostname,omitempty"` // as the node says
	Named     bool                `json:"named,omitempty"`    // an administrator chose the name
	Addresses []netip.Addr        `json:"addresses"`
	User      string              `json:"user,omitempty"`
	Tags      []string            `json:"tags,omitempty"`
	NodeKey   identity.NodePublic `json:"nodeKey"`
	Online    bool                `json:"online"`
	LastSeen  time.Time           `json:"lastSeen,omitzero"` // zero while online, or never
	Ephemeral bool                `json:"ephemeral"`
	Created   time.Time           `json:"created"`
	Expires   time.Time           `json:"expires,omitzero"`
	Expired   bool                `json:"expired"`
	OS        string              `json:"os,omitempty"`
	Version   int                 `json:"capabilityVersion,omitempty"`
	HomeRelay int                 `json:"homeRelay,omitempty"`
	Endpoints []netip.AddrPort    `json:"endpoints,omitempty"`
	Routes    []NodeRoute         `json:"routes,omitempty"`
	Applied   *Applied            `json:"applied,omitempty"` // of an expiry, only if somebody waited
	Peers     []string            `json:"peers,omitempty"`   // names of the nodes it may see; only in a single node's answer
}

// NodeRoute is a network behind a node.
type NodeRoute struct {
	Prefix     netip.Prefix `json:"prefix"`
	Advertised bool         `json:"advertised"` // the node offers it
	// Approved says by whom it is approved: "administrator", "policy", or ""
	// that it is not.
	Approved string `json:"approved,omitempty"`
	Primary  bool   `json:"primary,omitempty"` // the node is in charge of it
}

// NodeRename is the body of POST /v1/nodes/NAME/rename.
type NodeRename struct {
	Name string `json:"name"` // a DNS label; "" = what the node's host is called
}

// NodeOwner is the body of POST /v1/nodes/NAME/owner and
// POST /v1/logins/CODE/approve: one of the two is required, and only one.
type NodeOwner struct {
	User string   `json:"user,omitempty"`
	Tags []string `json:"tags,omitempty"` // all that the node shall have
}

// NodeExpire is the body of POST /v1/nodes/NAME/expire. One of its members at
// most is set; the zero value means now.
type NodeExpire struct {
	At    time.Time     `json:"at,omitzero"`
	In    time.Duration `json:"in,omitempty"`
	Never bool          `json:"never,omitempty"`
}

// Login is a machine without an auth key that asks to be let in. What it says
// about itself is not proven; its keys are.
type Login struct {
	Code      string                 `json:"code"` // names it in ApproveLogin and RejectLogin
	URL       string                 `json:"url"`  // the page that its user sees
	Hostname  string                 `json:"hostname"`
	OS        string                 `json:"os,omitempty"`
	Tags      []string               `json:"tags,omitempty"` // that it asks for
	Machine   identity.MachinePublic `json:"machineKey"`
	NodeKey   identity.NodePublic    `json:"nodeKey"`
	From      string                 `json:"from,omitempty"` // source address, of IPv6 the network
	Ephemeral bool                   `json:"ephemeral,omitempty"`
	Renews    string                 `json:"renews,omitempty"` // name of the node that it was
	Waiting   bool                   `json:"waiting"`          // it is connected and waits for the answer
	Asked     time.Time              `json:"asked"`
	Expires   time.Time              `json:"expires"`
}

// Policy is a version of the policy.
type Policy struct {
	Version int64     `json:"version"` // 0 = there is none
	Text    string    `json:"text"`
	Author  string    `json:"author,omitempty"`
	Created time.Time `json:"created,omitzero"`
	Note    string    `json:"note,omitempty"` // where it comes from: "rollback to version 3"
	// Warnings are about a policy that is valid but probably not meant so.
	Warnings []string `json:"warnings,omitempty"`
}

// PolicySet is the body of PUT /v1/policy and POST /v1/policy/check.
type PolicySet struct {
	Text string `json:"text"`
	// Replaces is the version that the writer has seen; another one in force
	// is ErrConflict. nil = whatever is in force.
	Replaces *int64 `json:"replaces,omitempty"`
	// Guard refuses a policy under which no node may reach any other, if some
	// may now.
	Guard bool `json:"guard,omitempty"`
}

// PolicyRollback is the body of POST /v1/policy/rollback.
type PolicyRollback struct {
	Version  int64  `json:"version"` // whose text comes in force again, as a new version
	Replaces *int64 `json:"replaces,omitempty"`
}

// Grant is access that was given for a time, beside the policy.
type Grant struct {
	ID      int64     `json:"id"`
	From    []string  `json:"from"` // as asked for
	To      []string  `json:"to"`
	Src     []string  `json:"src"` // what that means in the policy language
	Dst     []string  `json:"dst"`
	IP      []string  `json:"ip"`
	Reason  string    `json:"reason,omitempty"`
	Author  string    `json:"author"`
	Created time.Time `json:"created"`
	Until   time.Time `json:"until"`
	Ended   time.Time `json:"ended,omitzero"`
	EndedBy string    `json:"endedBy,omitempty"`
	Why     string    `json:"why,omitempty"` // it ended: "over", "revoked", …
}

// GrantAdd is the body of POST /v1/grants.
type GrantAdd struct {
	Src    []string      `json:"src"` // selectors of the policy language, or names of nodes
	Dst    []string      `json:"dst"`
	IP     []string      `json:"ip"` // "tcp:22", "443", "*"
	For    time.Duration `json:"for"`
	Reason string        `json:"reason,omitempty"`
}

// ShadowReport is what a candidate would have decided otherwise than the policy
// in force, on connection attempts that nodes saw since Since.
type ShadowReport struct {
	Since    time.Time    `json:"since"`
	Attempts int64        `json:"attempts"` // that were judged by both
	Dropped  int64        `json:"dropped"`  // differences that found no room in the report
	Pairs    []ShadowPair `json:"pairs"`
}

// ShadowPair are attempts of one identity at another.
type ShadowPair struct {
	Src      string    `json:"src"` // a user, or tags
	Dst      string    `json:"dst"`
	Proto    int       `json:"proto"`
	Port     uint16    `json:"port"`
	Allowed  bool      `json:"allowed"`  // newly allowed; else newly denied
	Attempts int64     `json:"attempts"` // how many
	First    time.Time `json:"first"`
	Last     time.Time `json:"last"`
	// Rules are those that let them in: of the candidate if it allows, else of
	// the policy in force.
	Rules []wire.RuleOrigin `json:"rules,omitempty"`
}

// NodeRoutes is the body of POST /v1/nodes/NAME/routes.
type NodeRoutes struct {
	Approved []netip.Prefix `json:"approved"` // all that an administrator approves
}

// Relay is a relay of the relay map.
type Relay struct {
	Region    int       `json:"region"`
	Name      string    `json:"name"` // unique over all regions
	Code      string    `json:"code,omitempty"`
	Host      string    `json:"host"`
	BuiltIn   bool      `json:"builtIn"`             // given by the server's configuration
	Connected bool      `json:"connected,omitempty"` // has its stream of members open
	Draining  bool      `json:"draining,omitempty"`  // said that it goes
	Hidden    bool      `json:"hidden,omitempty"`    // nodes are not told of it: it drains, or is away for long
	Created   time.Time `json:"created,omitzero"`
}

// Backup is the body of POST /v1/backup.
type Backup struct {
	Path string `json:"path"` // absolute, on the server's machine; must not exist
}

// Status describes the server.
type Status struct {
	URL           string          `json:"url,omitempty"`
	Domain        string          `json:"domain"`
	Key           wire.MachineKey `json:"key"` // what nodes may pin
	Users         int             `json:"users"`
	Nodes         int             `json:"nodes"`
	Online        int             `json:"online"`
	Pending       int             `json:"pending"` // logins that wait for an answer
	Relays        int             `json:"relays"`
	PolicyVersion int64           `json:"policyVersion"`
	DenyAll       bool            `json:"denyAll"` // there is no policy
}

// AuditEntry records a change.
type AuditEntry struct {
	ID     int64     `json:"id"`
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`
	Source string    `json:"source,omitempty"` // where from: an address, "unix socket"
	Action string    `json:"action"`
	Object string    `json:"object"`
	Detail string    `json:"detail,omitempty"`
	Before string    `json:"before,omitempty"` // what a change replaced
	After  string    `json:"after,omitempty"`
	Prev   string    `json:"prev"` // hash of the entry before, hexadecimal
	Hash   string    `json:"hash"` // of all the rest
}

// AuditHead names the newest entry of the audit record.
type AuditHead struct {
	ID   int64  `json:"id"` // 0 = the record is empty
	Hash string `json:"hash"`
}
