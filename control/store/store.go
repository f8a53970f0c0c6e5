// Package store keeps what a control server must not forget: users, enrolment
// keys, nodes, policies, relays and the record of who changed what. A write
// that returned without error survives the death of the process.
//
// SQLite keeps it in a file, which one server has for itself; Postgres in a
// PostgreSQL database, which several servers may use at once.
package store

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Errors that callers branch on. Refused enrolment keys are reported with the
// errors of package wire.
var (
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("conflict")       // a unique value is taken, or the object is in use
	ErrFull     = errors.New("disk is full")   // nothing was changed
	ErrReadOnly = errors.New("not writable")   // nothing was changed
	ErrLocked   = errors.New("already in use") // another process has the store open
	ErrCorrupt  = errors.New("damaged")        // the file is not a store, or broken
	ErrNewer    = errors.New("written by a newer version of this program")
	// ErrUnavailable says that the database cannot be reached. Nothing was
	// changed, unless the connection broke in the moment of the commit.
	ErrUnavailable = errors.New("database cannot be reached")
)

// User owns nodes and keys.
type User struct {
	ID      wire.UserID
	Name    string // login name, lower case, unique
	Role    string // RoleOwner or RoleMember
	Created time.Time
	// Suspended is since when the user's nodes and keys are refused; zero = they
	// are not.
	Suspended time.Time
}

// Roles of users.
const (
	RoleOwner  = "owner"
	RoleMember = "member"
)

// KeyKind says what a key admits.
type KeyKind string

// Kinds of keys.
const (
	KeyNode  KeyKind = "auth"  // enrols nodes
	KeyRelay KeyKind = "relay" // admits relays
)

// Key is an enrolment key without its secret, which nobody can read back.
type Key struct {
	ID        int64
	Kind      KeyKind
	User      wire.UserID // 0 for keys with tags and relay keys
	Tags      []string    // "tag:…", sorted; nodes get exactly these
	Reusable  bool
	Ephemeral bool
	Created   time.Time
	Expires   time.Time // zero = never
	Revoked   time.Time // zero = not revoked
	Used      time.Time // last use, zero = never
	UsedBy    wire.NodeID
	// NodeExpiry is how long the keys of nodes that enrol with it are good
	// for; 0 = as the server has it, negative = they never expire.
	NodeExpiry time.Duration
}

// State says whether the key can be used at now: nil, or the error that tells
// why not.
func (k Key) State(now time.Time) error {
	switch {
	case !k.Revoked.IsZero():
		return wire.ErrAuthKeyRevoked
	case !k.Expires.IsZero() && !now.Before(k.Expires):
		return wire.ErrAuthKeyExpired
	case !k.Reusable && !k.Used.IsZero():
		return wire.ErrAuthKeyUsed
	}
	return nil
}

// Node is a registered node.
type Node struct {
	ID        wire.NodeID
	StableID  identity.StableID
	Machine   identity.MachinePublic
	Key       identity.NodePublic
	User      wire.UserID // 0 for tagged nodes
	Tags      []string    // sorted; empty for a user's nodes
	Hostname  string      // the label the node asked for, after sanitising
	Name      string      // the label it has, unique
	Named     bool        // an administrator chose Name: it does not follow Hostname
	IPv4      netip.Addr  // unique
	IPv6      netip.Addr  // unique
	Ephemeral bool
	Created   time.Time
	Expires   time.Time // of the node key, zero = never
	AuthKey   int64     // Key.ID it enrolled with, 0 = an administrator admitted it
	// KeyLife is how long a key lives that the node makes itself, in place of
	// one that is still good: 0 = it is good no longer than the one before,
	// negative = as the server has it. ExpireNode and RevokeKey make it 0.
	KeyLife time.Duration
	// Routes are those that an administrator approved, whether the node
	// advertises them or not.
	Routes []netip.Prefix

	NodeState
}

// NodeState is what a node reports about itself. It is written in batches: the
// node reports it again whenever it reconnects.
type NodeState struct {
	Disco     identity.DiscoPublic
	Endpoints []netip.AddrPort
	HomeDERP  int
	Hostinfo  *wire.Hostinfo
	Cap       int       // capability version
	LastSeen  time.Time // end of its last map poll, zero = it never polled
	Polled    bool      // it has polled the map at least once
	Instance  string    // names the process that is the node, "" = unknown
	// Replica is the server that it has its map poll at, "" = none; only in a
	// Shared store.
	Replica string
}

// DeadKey is a node key that will not be accepted again.
type DeadKey struct {
	Key     identity.NodePublic
	Machine identity.MachinePublic
	Removed bool        // an administrator removed the node; else the node replaced the key
	AuthKey int64       // Key.ID the node had enrolled with
	Node    wire.NodeID // whose key it was, 0 = unknown
}

// KeptKey is a dead node key that goes on for a while beside the node's new one.
type KeptKey struct {
	Key   identity.NodePublic
	Node  wire.NodeID
	Until time.Time
}

// Policy is one version of the policy.
type Policy struct {
	Version int64 // counts from 1
	Text    string
	Author  string
	Created time.Time
	Note    string // where it comes from, such as "rollback to version 3", or ""
}

// Grant is access that an administrator gave for a time, beside the policy.
type Grant struct {
	ID       int64
	Src, Dst []string // selectors of the policy language
	IP       []string // "tcp:22"
	// Asked is what the administrator wrote: sources, destinations, ports.
	Asked [3][]string
	// Nodes are those that Src and Dst name by address: the grant ends with
	// any of them.
	Nodes   []wire.NodeID
	Reason  string
	Author  string
	Created time.Time
	Until   time.Time
	Ended   time.Time // zero = not yet
	EndedBy string
	Why     string // it ended: "revoked", "over", …
}

// Relay is a relay process that announced itself. A region may have several.
type Relay struct {
	NodeKey identity.NodePublic
	Region  *wire.DERPRegion // with this relay only
	Key     int64            // Key.ID of its relay key
	Created time.Time
}

// Store is the memory of a control server. All methods may be called
// concurrently; each is one transaction. The by argument is the actor written
// to the audit record; WithSource says where it acts from.
type Store interface {
	// Secret returns the named secret of the server. On first use it is what
	// fresh returns.
	Secret(ctx context.Context, name string, fresh func() ([]byte, error)) ([]byte, error)
	// ServerKey returns the server's Noise key, made together with the store.
	ServerKey(ctx context.Context) (identity.MachinePrivate, error)

	// CreateUser adds a user. The first one is owner. ErrConflict: the name is
	// taken.
	CreateUser(ctx context.Context, by, name string, now time.Time) (User, error)
	Users(ctx context.Context) ([]User, error)
	// SuspendUser suspends a user, or ends that. It is idempotent.
	SuspendUser(ctx context.Context, by string, id wire.UserID, suspended bool, now time.Time) (User, error)
	// RemoveUser removes a user and its keys. ErrConflict: it still has nodes.
	RemoveUser(ctx context.Context, by string, id wire.UserID, now time.Time) error

	// CreateKey stores k, whose ID, Used and Revoked are ignored, and returns
	// it with the only copy of its text.
	CreateKey(ctx context.Context, by string, k Key) (Key, string, error)
	Keys(ctx context.Context) ([]Key, error)
	// RevokeKey is idempotent. Nodes that enrolled with the key stay until their
	// node keys expire: they cannot put that off any more.
	RevokeKey(ctx context.Context, by string, id int64, now time.Time) (Key, error)
	// VerifyKey finds the key that text is the secret of. The error is
	// wire.ErrAuthKeyUnknown (or ErrRelayKeyUnknown) with a zero Key, or, only
	// for a caller with the full secret, the reason why it cannot be used.
	VerifyKey(ctx context.Context, kind KeyKind, text string, now time.Time) (Key, error)

	Nodes(ctx context.Context) ([]Node, error)
	// LastNodeID returns the highest NodeID that was ever given out.
	LastNodeID(ctx context.Context) (wire.NodeID, error)
	// RegisterNode checks and uses up the key with the given text, and stores
	// n: as a new node if n.ID is 0, else in place of the node with that ID,
	// whose former key dies. Errors are VerifyKey's, ErrConflict when name,
	// node key or an address is taken or the node key is dead, ErrNotFound
	// when the node with that ID is gone.
	RegisterNode(ctx context.Context, keyText string, n Node, now time.Time) (Node, error)
	// AdmitNode stores n as RegisterNode does, but on the word of an
	// administrator instead of a key.
	AdmitNode(ctx context.Context, by string, n Node, now time.Time) (Node, error)
	// RotateNodeKey gives a node another key, which expires then (zero =
	// never); the former one dies, but is among KeptKeys until kept (zero = it
	// is not).
	RotateNodeKey(ctx context.Context, id wire.NodeID, key identity.NodePublic, expires, kept, now time.Time) error
	// KeptKeys returns the former keys that go on beside the present ones of
	// their nodes: one of a node at most.
	KeptKeys(ctx context.Context, now time.Time) ([]KeptKey, error)
	// ExpireNode sets the expiry of the node's key, and for any but zero, which
	// is never, that the node cannot put it off.
	ExpireNode(ctx context.Context, by string, id wire.NodeID, at, now time.Time) error
	// RenameNode sets hostname, name and whether an administrator chose it.
	// ErrConflict: the name is taken.
	RenameNode(ctx context.Context, by string, id wire.NodeID, hostname, name string, named bool, now time.Time) error
	// SetOwner gives a node to a user, or to tags (user 0), and sets the expiry
	// of its key.
	SetOwner(ctx context.Context, by string, id wire.NodeID, user wire.UserID, tags []string, expires, now time.Time) error
	// ApproveRoutes sets the routes of a node that an administrator approved.
	ApproveRoutes(ctx context.Context, by string, id wire.NodeID, routes []netip.Prefix, now time.Time) error
	// RemoveNode forgets a node. With bury its key stays known as removed by an
	// administrator.
	RemoveNode(ctx context.Context, by string, id wire.NodeID, bury bool, now time.Time) error
	// SaveStates stores what nodes reported; nodes that are gone are skipped.
	SaveStates(ctx context.Context, states map[wire.NodeID]NodeState) error
	// DeadKey looks a dead node key up. ErrNotFound: it is not dead.
	DeadKey(ctx context.Context, key identity.NodePublic) (DeadKey, error)
	// Buried reports whether an administrator removed a node of this machine
	// that had enrolled with the key authKey.
	Buried(ctx context.Context, machine identity.MachinePublic, authKey int64) (bool, error)

	// Policy returns the newest policy. ErrNotFound: there is none.
	Policy(ctx context.Context) (Policy, error)
	// SetPolicy stores the next version. expect is the version it replaces
	// (ErrConflict if another is the newest by now), or -1 for any.
	SetPolicy(ctx context.Context, by, text, note string, expect int64, now time.Time) (Policy, error)
	// PolicyVersion returns one version. ErrNotFound: there is none such.
	PolicyVersion(ctx context.Context, version int64) (Policy, error)
	// Policies returns the newest versions without their texts, newest first,
	// limit at most.
	Policies(ctx context.Context, limit int) ([]Policy, error)

	// AddGrant stores a grant, whose ID, Ended, EndedBy and Why are ignored.
	AddGrant(ctx context.Context, g Grant, now time.Time) (Grant, error)
	// Grants returns the grants that have not ended, oldest first; with ended
	// the newest of those too, limit at most.
	Grants(ctx context.Context, ended bool, limit int) ([]Grant, error)
	// EndGrant ends a grant. ErrNotFound: there is none such. ErrConflict: it
	// had ended already.
	EndGrant(ctx context.Context, by string, id int64, why string, now time.Time) (Grant, error)

	// Shadow returns the candidate beside the policy, without a version.
	// ErrNotFound: there is none.
	Shadow(ctx context.Context) (Policy, error)
	// SetShadow puts a candidate beside the policy; "" takes it away.
	SetShadow(ctx context.Context, by, text string, now time.Time) (Policy, error)

	// PutRelay stores a relay under its key. ErrConflict: its region has, or
	// the relay had, another relay key.
	PutRelay(ctx context.Context, r Relay, now time.Time) error
	Relays(ctx context.Context) ([]Relay, error)
	RemoveRelay(ctx context.Context, by string, key identity.NodePublic, now time.Time) error

	// PutLogin stores a machine that asks to be let in, by its code. One that was
	// decided stays as it is.
	PutLogin(ctx context.Context, l Login) error
	RemoveLogin(ctx context.Context, code string) error
	// Logins returns all of them, those that are over too until somebody removes
	// them.
	Logins(ctx context.Context) ([]Login, error)

	// Note records something that changes nothing else in the store.
	Note(ctx context.Context, by, action, object, detail string, now time.Time) error
	// Audit returns the entries since a time that follow the one with the ID
	// after (0 = all), oldest first, limit at most.
	Audit(ctx context.Context, since time.Time, after int64, limit int) ([]AuditEntry, error)
	// AuditHead names the newest entry, as it is kept apart from the entries.
	AuditHead(ctx context.Context) (AuditHead, error)

	// Writable writes something of no consequence, and fails if that does.
	Writable(ctx context.Context) error
	// Observe has f called after every operation with whether it may write, how
	// long it took and how it ended. f must be quick and safe for concurrent use.
	Observe(f func(write bool, took time.Duration, err error))

	Close() error
}
