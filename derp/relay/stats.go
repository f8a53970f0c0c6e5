package relay

import (
	"sync/atomic"
	"time"
)

// counters are the running sums behind Stats.
type counters struct {
	packetsIn, bytesIn, packetsOut, unknown, dropped atomic.Uint64
	accepted, refused, violations                    atomic.Uint64
	paused                                           atomic.Int64 // nanoseconds
}

// Stats is a snapshot of what the relay does. Counters start at New.
type Stats struct {
	Clients    int    // logged-in connections
	Keys       int    // different keys among them
	Homes      int    // connections of clients whose home this relay is
	Pending    int    // connections that have not logged in
	Draining   bool   // Drain was called
	Accepted   uint64 // logins that succeeded
	Refused    uint64 // logins that Admit refused
	Evicted    uint64 // connections turned away or cut because too many were pending
	Violations uint64 // connections closed because the client broke the protocol

	PacketsIn  uint64 // packets received from clients
	BytesIn    uint64 // and their bytes
	PacketsOut uint64 // packets queued for a client; some of these may be in Dropped
	Unknown    uint64 // packets for keys that are not connected
	Dropped    uint64 // packets dropped because the queue of their receiver was full
	// Paused is how long clients were kept from sending because they were above
	// Config.BytesPerSecond, all of them together.
	Paused time.Duration
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	s.mu.RLock()
	st := Stats{Clients: s.clients, Keys: len(s.peers), Homes: s.homesLocked(), Draining: s.notice != nil}
	k := &s.counters
	st.Dropped = k.dropped.Load()
	for _, p := range s.peers {
		for _, c := range p.sessions {
			st.Dropped += c.conn.Dropped()
		}
	}
	s.mu.RUnlock()
	st.Pending = s.gate.pending()
	st.Accepted, st.Refused = k.accepted.Load(), k.refused.Load()
	st.Evicted, st.Violations = s.gate.evictions(), k.violations.Load()
	st.PacketsIn, st.BytesIn, st.PacketsOut = k.packetsIn.Load(), k.bytesIn.Load(), k.packetsOut.Load()
	st.Unknown, st.Paused = k.unknown.Load(), time.Duration(k.paused.Load())
	return st
}
