package relay

import (
	"sync/atomic"
	"time"
)

// traffic is what came from one client, or from all that have left.
type traffic struct {
	packetsIn, bytesIn, packetsOut, bytesOut atomic.Uint64
}

// add adds what another one counts.
func (t *traffic) add(o *traffic) {
	t.packetsIn.Add(o.packetsIn.Load())
	t.bytesIn.Add(o.bytesIn.Load())
	t.packetsOut.Add(o.packetsOut.Load())
	t.bytesOut.Add(o.bytesOut.Load())
}

// counters are the running sums behind Stats.
type counters struct {
	left traffic // of clients that have left; the others count for themselves

	unknown, dropped                                      atomic.Uint64
	forwardedIn, forwardedOut, forwardedDropped, meshFull atomic.Uint64
	accepted, refused, violations                         atomic.Uint64
	paused                                                atomic.Int64 // nanoseconds
}

// trafficLocked sums what clients and other relays sent.
func (s *Server) trafficLocked() *traffic {
	sum := new(traffic)
	sum.add(&s.counters.left)
	for _, p := range s.peers {
		for _, c := range p.sessions {
			sum.add(&c.traffic)
		}
	}
	for _, c := range s.mesh.sessions {
		sum.add(&c.traffic)
	}
	return sum
}

// passed counts the packets that the relay was good for.
func (s *Server) passed() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.trafficLocked().packetsOut.Load() + s.counters.forwardedOut.Load()
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
	BytesOut   uint64 // and their bytes
	Unknown    uint64 // packets dropped because their receiver is not connected
	Dropped    uint64 // packets dropped because the queue of their receiver was full

	MeshPeers        int    // relays of the region to which this one forwards now
	MeshClients      int    // keys that are connected there
	MeshFull         uint64 // keys not noted because a relay has too many, or watchers that fell behind
	ForwardedIn      uint64 // packets that other relays forwarded to clients of this one
	ForwardedOut     uint64 // packets queued for another relay; some of these may be in ForwardedDropped
	ForwardedDropped uint64 // packets dropped because the queue of that relay was full

	// Paused is how long clients were kept from sending because they were above
	// Config.BytesPerSecond, all of them together.
	Paused time.Duration
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	s.mu.RLock()
	st := Stats{Clients: s.clients, Homes: s.homesLocked(), Draining: s.notice != nil}
	k := &s.counters
	st.Dropped = k.dropped.Load()
	st.ForwardedDropped = k.forwardedDropped.Load()
	for _, l := range s.mesh.links {
		if c := l.client.Load(); c != nil {
			st.MeshPeers++
			st.ForwardedDropped += c.Dropped()
		}
	}
	for _, p := range s.peers {
		if len(p.sessions) > 0 {
			st.Keys++
		}
		if len(p.links) > 0 {
			st.MeshClients++
		}
		for _, c := range p.sessions {
			st.Dropped += c.conn.Dropped()
		}
	}
	t := s.trafficLocked()
	s.mu.RUnlock()
	st.PacketsIn, st.BytesIn, st.PacketsOut, st.BytesOut = t.packetsIn.Load(), t.bytesIn.Load(), t.packetsOut.Load(), t.bytesOut.Load()
	st.Pending = s.gate.pending()
	st.Accepted, st.Refused = k.accepted.Load(), k.refused.Load()
	st.Evicted, st.Violations = s.gate.evictions(), k.violations.Load()
	st.MeshFull = k.meshFull.Load()
	st.ForwardedIn, st.ForwardedOut = k.forwardedIn.Load(), k.forwardedOut.Load()
	st.Unknown, st.Paused = k.unknown.Load(), time.Duration(k.paused.Load())
	return st
}
