package netmap

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// NodeID numbers a node; see wire.NodeID.
type NodeID = wire.NodeID

// Map is what a node knows at one moment. It is immutable, and so is all that
// its methods return: share it, never change it. Apply makes Maps; the zero
// value is that of a node that knows nothing.
type Map struct {
	self    *wire.Node
	network string // display name
	relays  *wire.DERPMap
	dns     *wire.DNSConfig
	policy  int64
	version int64         // as control last named it
	offset  time.Duration // of control's clock from ours

	chunks map[string][]wire.FilterRule
	filter []wire.FilterRule
	grants []grantRule

	users table[wire.UserID, *wire.UserProfile]
	index
}

// index holds the peers. A node that control sent is in nodes, and if it gets
// its key also in peers and the tables of claims.
type index struct {
	nodes    table[NodeID, *wire.Node] // as sent, but clean
	peers    table[NodeID, *Peer]
	keys     claimTable[identity.NodePublic]
	prefixes claimTable[netip.Prefix] // own addresses first, routes second class
	names    claimTable[string]       // lower case, without trailing dot
	stable   claimTable[string]
	disco    claimTable[identity.DiscoPublic]
	lengths  lengths
	expiry   expiries
}

// lengths counts the prefixes that somebody claims: by family, then by length.
type lengths [2][129]int32

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// Peer is another node, with what it may use. Addresses and AllowedIPs hold
// what really belongs to this peer: of two that claim the same prefix, one has
// it. AllowedIPs is complete (what is nil on the wire is Addresses here) and
// never holds a /0. All is read-only.
//
// A peer that changed in any way is another *Peer.
type Peer struct {
	*wire.Node
	// OffersExit is true for a peer that would carry traffic to everywhere.
	OffersExit bool

	sent    *wire.Node // what this was made of
	dropped []netip.Prefix
}

// FQDN returns the full name without trailing dot, "db.mesh.internal"; "" if
// the peer has none.
func (p *Peer) FQDN() string { return strings.TrimSuffix(p.Name, ".") }

// nobody is the node of the zero Map.
var nobody = &wire.Node{Hostinfo: &wire.Hostinfo{}}

// Self returns the node that the map is for. It is never nil; for the zero Map
// it has no key.
func (m *Map) Self() *wire.Node {
	if m.self == nil {
		return nobody
	}
	return m.self
}

// NumPeers returns the number of peers.
func (m *Map) NumPeers() int { return m.peers.n }

// Peers yields all peers, in no order.
func (m *Map) Peers() iter.Seq[*Peer] {
	return func(yield func(*Peer) bool) {
		for _, p := range m.peers.all() {
			if !yield(p) {
				return
			}
		}
	}
}

// PeerByID returns the peer of that number.
func (m *Map) PeerByID(id NodeID) (*Peer, bool) {
	p := m.peers.get(id)
	return p, p != nil
}

// Peer returns the peer with that node key.
func (m *Map) Peer(key identity.NodePublic) (*Peer, bool) { return m.PeerByID(m.keys.first(key)) }

// PeerByStableID returns the peer of that name for good.
func (m *Map) PeerByStableID(id string) (*Peer, bool) { return m.PeerByID(m.stable.first(id)) }

// PeersByDisco returns the peers that use a disco key, in order of their
// numbers: several nodes of one process may share theirs.
func (m *Map) PeersByDisco(d identity.DiscoPublic) []*Peer {
	var out []*Peer
	for r := range m.disco.get(d).all() {
		if p := m.peers.get(r.id()); p != nil {
			out = append(out, p)
		}
	}
	return out
}

// PeerByAddr returns the peer that a has to be sent to, and may come from: the
// one whose own address it is, else the one with the longest route to it.
func (m *Map) PeerByAddr(a netip.Addr) (*Peer, bool) {
	a = a.Unmap().WithZone("")
	if !a.IsValid() {
		return nil, false
	}
	counts := &m.lengths[family(a)]
	for bits := a.BitLen(); bits > 0; bits-- {
		if counts[bits] == 0 {
			continue
		}
		prefix, err := a.Prefix(bits)
		if err != nil {
			return nil, false
		}
		if id := m.prefixes.first(prefix); id != 0 {
			return m.PeerByID(id)
		}
	}
	return nil, false
}

// PeerByName returns the peer of a full name, or of a name in the own domain
// ("db" for "db.mesh.internal"). Case does not matter, nor a trailing dot.
func (m *Map) PeerByName(name string) (*Peer, bool) {
	name = normalName(name)
	if name == "" {
		return nil, false
	}
	id := m.names.first(name)
	if domain := normalName(m.Domain()); domain != "" {
		relative := m.names.first(name + "." + domain)
		if id == 0 || relative != 0 && !strings.Contains(name, ".") {
			id = relative
		}
	}
	return m.PeerByID(id)
}

func normalName(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }

// Domain returns the suffix of all names in the mesh, without dots around it:
// what follows the first label of the own name. It is "" if there is none.
func (m *Map) Domain() string {
	_, domain, _ := strings.Cut(strings.TrimSuffix(m.Self().Name, "."), ".")
	return domain
}

// Network returns the display name of the mesh.
func (m *Map) Network() string { return m.network }

// DERPMap returns the relays. It is nil if control named none.
func (m *Map) DERPMap() *wire.DERPMap { return m.relays }

// DNS returns how to resolve names, nil if control did not say.
func (m *Map) DNS() *wire.DNSConfig { return m.dns }

// Filter returns the rules of all chunks in one list. No rules means that
// nothing is let in.
func (m *Map) Filter() []wire.FilterRule { return m.filter }

// PolicyVersion returns the version of the policy behind peers and filter, 0 if
// control did not say.
func (m *Map) PolicyVersion() int64 { return m.policy }

// Version is the number that control gave the map of this stream when it last
// wanted to know what is in force, 0 if it did not.
func (m *Map) Version() int64 { return m.version }

// User returns the profile of a user.
func (m *Map) User(id wire.UserID) (*wire.UserProfile, bool) {
	u := m.users.get(id)
	return u, u != nil
}

// Response returns the whole map as the first message of a stream would bring
// it. Apply(nil, m.Response()) gives an equal map.
func (m *Map) Response() *wire.MapResponse {
	r := &wire.MapResponse{
		Node: m.self, DERPMap: m.relays, DNSConfig: m.dns, Domain: m.network,
		PacketFilters: m.chunks, MeshPolicy: m.policy,
	}
	for _, n := range m.nodes.all() {
		r.Peers = append(r.Peers, n)
	}
	slices.SortFunc(r.Peers, func(a, b *wire.Node) int { return cmp.Compare(a.ID, b.ID) })
	for _, u := range m.users.all() {
		r.UserProfiles = append(r.UserProfiles, *u)
	}
	slices.SortFunc(r.UserProfiles, func(a, b wire.UserProfile) int { return cmp.Compare(a.ID, b.ID) })
	return r
}
