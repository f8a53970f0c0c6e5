package server

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"net/netip"
	"slices"
	"time"

	"mesh/control/wire"
)

// A node of ours that lost its connection, but not its map, gets what changed
// since the last message that it has. For that the server keeps what it told
// the node, and how to take the last messages back: which of them arrived is
// known only when the node comes again.
const (
	// maxTaken and maxTakenPeers bound the messages that can be taken back, and
	// the peers in them.
	maxTaken      = 32
	maxTakenPeers = 512
	// resumeFor is how long a node may be away and still resume.
	resumeFor = 10 * time.Minute
)

// session is what of a stream outlives its connection. It is guarded by
// Server.mu.
type session struct {
	handle string // "" = the node does not resume
	seq    int64  // of the last message
	oldest int64  // the node may be at this one, or later
	taken  []undo // leads back from seq to oldest; the oldest first
	peers  int    // in taken
}

// undo takes one message back.
type undo struct {
	seq      int64
	peers    []undoPeer
	filter   bool // it may have told of the filter
	profiles bool
}

// undoPeer is what the node knew of a peer before. nil = nothing.
type undoPeer struct {
	id     wire.NodeID
	view   *view
	routes []netip.Prefix
}

// parkedUntil is how long the last poll of a node that has none can be resumed.
// Server.mu is held.
func (n *node) parkedUntil() time.Time { return n.idleSince.Add(resumeFor) }

// tell notes the next message. Server.mu is held.
func (se *session) tell(u undo) int64 {
	if se.handle == "" {
		return 0
	}
	if se.seq++; se.seq == 1 {
		se.oldest = 1
		return 1
	}
	u.seq = se.seq
	se.taken = append(se.taken, u)
	se.peers += len(u.peers)
	for len(se.taken) > maxTaken || se.peers > maxTakenPeers {
		se.oldest = se.taken[0].seq
		se.peers -= len(se.taken[0].peers)
		se.taken = slices.Delete(se.taken, 0, 1)
	}
	return se.seq
}

// begin starts the session of a stream that resumes nothing. Server.mu is held.
func (st *stream) begin() {
	if st.instance != "" {
		st.session = session{handle: rand.Text()}
	}
}

// resume makes st go on where the node's former stream was when the node got
// message seq, and reports whether that can be. over says that nobody uses the
// former stream any more. Server.mu is held.
func (st *stream) resume(old *stream, over bool, handle string, seq int64) bool {
	if old == nil || old.handle == "" || subtle.ConstantTimeCompare([]byte(old.handle), []byte(handle)) != 1 ||
		st.instance != old.instance || seq < old.oldest || seq > old.seq || seq < 1 {
		return false
	}
	st.sent, st.routes = old.sent, old.routes
	// A stream that still runs may be about to use these.
	if over {
		st.filter, st.policy, st.profiles = old.filter, old.policy, old.profiles
	}
	kept := 0
	for _, u := range slices.Backward(old.taken) {
		if u.seq <= seq {
			kept++
			continue
		}
		for _, p := range slices.Backward(u.peers) {
			if p.view == nil {
				st.sent.drop(p.id)
			} else {
				st.sent.put(p.view)
			}
			st.setRoutes(p.id, p.routes)
		}
		if st.policy = 0; u.filter {
			st.filter = [sha256.Size]byte{}
		}
		if u.profiles {
			st.profiles = nil
		}
	}
	st.session = session{handle: handle, seq: seq, oldest: old.oldest, taken: old.taken[:kept:kept]}
	for _, u := range st.taken {
		st.peers += len(u.peers)
	}
	old.session, old.sent, old.routes = session{}, nil, nil
	return true
}
