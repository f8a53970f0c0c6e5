package session

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"mesh/identity"
	"mesh/internal/engine"
	"mesh/internal/netmap"
	"mesh/netstack"
)

// IsSelf reports whether a is an address of the node that m is for.
func IsSelf(m *netmap.Map, a netip.Addr) bool {
	return slices.ContainsFunc(m.Self().Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
}

// IsSelfName reports whether name is the short or full name of the node that m
// is for.
func IsSelfName(m *netmap.Map, name string) bool {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	self := m.SelfIdentity()
	return name != "" && (name == strings.ToLower(self.Name) || name == strings.ToLower(self.ShortName()))
}

// WhoIs tells which node has a mesh address.
func (s *Session) WhoIs(a netip.Addr) (identity.Peer, bool) {
	m, a := s.engine.Load().Map(), a.Unmap()
	if IsSelf(m, a) {
		return m.SelfIdentity(), true
	}
	p, ok := m.PeerByAddr(a)
	if !ok {
		return identity.Peer{}, false
	}
	return m.Identity(p), true
}

// Origin tells who is at the other end of an inbound flow, and by which rule.
// It reports false when the flow is not, or no longer, admitted.
func (s *Session) Origin(f netstack.Flow) (identity.Peer, bool) {
	m, p, rule, ok := s.engine.Load().Admitted(f.Proto, f.Local, f.Remote)
	switch {
	case ok:
		who := m.Identity(p)
		who.Rule = rule
		return who, true
	case IsSelf(m, f.Remote.Addr()):
		return m.SelfIdentity(), true // never left the stack
	}
	return identity.Peer{}, false
}

// Refine replaces an error that only says that the stack is gone by the reason
// for which it is.
func (s *Session) Refine(err error) error {
	if end := s.Err(); end != nil {
		return end
	}
	return err
}

// Status describes a node at one moment. It holds no secret.
type Status struct {
	Running bool          // the node is up
	Self    identity.Peer // who this node is; zero until it is up
	// Control is empty while the control server is connected, else it says
	// why not. What is known goes on to work meanwhile.
	Control       string
	PolicyVersion int64 // of the policy in force, 0 = unknown
	HomeRelay     int   // relay region where peers find this node, 0 = none
	// LoginURL is where a person has to log in before the node comes up, or
	// goes on after its key expired; "" if nobody has to.
	LoginURL string `json:",omitempty"`
	// KeyExpiry is when the node's key expires, zero = never. KeyRenewal is when
	// the node makes itself another before that; zero, while it expires, means
	// that it cannot: unless an auth key renews it when it has expired, a person
	// has to log in then.
	KeyExpiry  time.Time `json:",omitzero"`
	KeyRenewal time.Time `json:",omitzero"`
	Dropped    Dropped
	Peers      []PeerStatus // sorted by name
}

// Dropped counts packets that went nowhere since the node started, or since its
// key was renewed.
type Dropped struct {
	engine.Dropped
	// Late counts datagrams that waited for a PacketConn to read them when
	// their sender lost the permission to send them.
	Late uint64
}

// CountLate counts a datagram for Dropped.Late.
func (s *Session) CountLate() { s.late.Add(1) }

// PeerStatus describes a peer that a node may see.
type PeerStatus struct {
	identity.Peer
	Online   bool      // as the control server believes
	Expired  bool      // its key has expired: it cannot be reached until it logs in again
	LastSeen time.Time // zero if unknown or online
	Path     Path      // how packets travel at present
}

// Starting describes a session that has not come up.
func (s *Session) Starting() *Status {
	if err := s.Err(); err != nil {
		return &Status{Control: err.Error()}
	}
	if url, err := s.pendingLogin(); err != nil {
		return &Status{Control: err.Error(), LoginURL: url}
	}
	if b := s.isBarred(); b != nil {
		return &Status{Control: b.Error()}
	}
	if t := s.Trouble(); t != nil {
		return &Status{Control: "starting: " + t.Error()}
	}
	return &Status{Control: "starting"}
}

// Status returns what is known now, of a session that came up.
func (s *Session) Status() *Status {
	m := s.engine.Load().Map()
	st := &Status{
		Running:       s.Err() == nil && s.isBarred() == nil && s.isStale() == nil,
		Self:          m.SelfIdentity(),
		PolicyVersion: m.PolicyVersion(),
		HomeRelay:     s.engine.Load().HomeRegion(),
		KeyExpiry:     m.OwnExpiry(),
		KeyRenewal:    m.Renewal(time.Now()),
	}
	url, login := s.pendingLogin()
	st.LoginURL = url
	if err := cmp.Or(s.Err(), login, s.isBarred(), s.isStale(), s.Trouble()); err != nil {
		st.Control = err.Error()
	}
	st.Dropped = Dropped{s.engine.Load().Dropped(), s.late.Load()}
	for p := range m.Peers() {
		ps := PeerStatus{Peer: m.Identity(p), Expired: p.Expired, Path: s.PathTo(p.Key)}
		ps.Online = p.Online != nil && *p.Online
		if p.LastSeen != nil && !ps.Online {
			ps.LastSeen = *p.LastSeen
		}
		st.Peers = append(st.Peers, ps)
	}
	slices.SortFunc(st.Peers, func(a, b PeerStatus) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(string(a.ID), string(b.ID)))
	})
	return st
}
