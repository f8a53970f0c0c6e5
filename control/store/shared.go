package store

import (
	"context"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// Shared is a Store that several servers use at once, each as a replica of the
// others. They share nothing else: every change is in a log of the database,
// and each replica follows it.
type Shared interface {
	Store

	// Replica is the name that this server has among the others.
	Replica() string
	// Beat tells the others that this replica lives and what it is, and returns
	// those that have told so within Lease, itself not among them. It also
	// tidies up what nobody needs any more. ErrLocked: another process is this
	// replica by now, and this one misses what that one does.
	Beat(ctx context.Context, about ReplicaInfo) (map[string]ReplicaInfo, error)
	// Leave says that this replica ends.
	Leave(ctx context.Context) error

	// Position is where the log of changes ends.
	Position(ctx context.Context) (Position, error)
	// Changes returns what other replicas changed after a position, as a set,
	// and the position it leads to. After a write of this one that failed in a
	// way that leaves open whether it was done, also what this one changed.
	Changes(ctx context.Context, after Position) (Changes, error)
	// Listen calls wake whenever something was written by anybody, until the
	// connection breaks or ctx ends. A call may be missing: who must not miss
	// anything looks at Changes from time to time.
	Listen(ctx context.Context, wake func()) error
	// NodesByID returns those of the nodes that there are.
	NodesByID(ctx context.Context, ids []wire.NodeID) ([]Node, error)
	// SaveReports is SaveStates for a replica: what is reported of a node that
	// has its poll at another replica by now is not taken, unless claims has the
	// node: its poll is new here.
	SaveReports(ctx context.Context, states map[wire.NodeID]NodeState, claims map[wire.NodeID]bool) error
}

// A replica says every BeatEvery that it lives, and counts as alive for Lease
// after that.
const (
	BeatEvery = 2 * time.Second
	Lease     = 10 * time.Second
)

// ReplicaInfo is what a replica tells the others.
type ReplicaInfo struct {
	Regions []*wire.DERPRegion    // of its own relays
	Relays  []identity.NodePublic // relay processes that are connected to it
}

// Position is a place in the log of changes.
type Position struct {
	Log    int64 // of what was decided
	States int64 // of what nodes reported
}

// Changes is what happened between two positions of the log.
type Changes struct {
	Next Position
	// Nodes are those that came, went or changed; true = what they report did.
	Nodes map[wire.NodeID]bool
	// What has the tables that changed besides nodes: "users", "keys",
	// "policies", "grants", "shadow", "relays", "logins".
	What map[string]bool
	// Lost says that the log does not reach back that far: anything may have
	// changed.
	Lost bool
}
