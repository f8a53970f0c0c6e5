package loadtest

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"

	"mesh/control/wire"
	"mesh/identity"
)

// peer is what a node knows of another. It is immutable, and one for all nodes
// that were sent the same bytes: the views of a thousand nodes of each other
// are a million pointers.
type peer struct {
	id        wire.NodeID
	key       identity.NodePublic
	disco     identity.DiscoPublic
	endpoints []netip.AddrPort
	online    bool

	next sync.Map // *wire.PeerChange → *peer: what patches make of it
}

// interned keeps what was decoded, by a hash of its bytes. The hash is of 64
// bits and seeded; that two different parts of one run collide is not to be
// feared.
type interned[T any] struct {
	seed maphash.Seed
	mu   sync.RWMutex // guards m
	m    map[uint64]*T
}

func newInterned[T any]() *interned[T] {
	return &interned[T]{seed: maphash.MakeSeed(), m: make(map[uint64]*T)}
}

func (x *interned[T]) get(b []byte, decode func([]byte) (*T, error)) (*T, error) {
	h := maphash.Bytes(x.seed, b)
	x.mu.RLock()
	v := x.m[h]
	x.mu.RUnlock()
	if v != nil {
		return v, nil
	}
	v, err := decode(b)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if have := x.m[h]; have != nil {
		return have, nil
	}
	x.m[h] = v
	return v, nil
}

// forget empties the memory: what nobody will be sent again.
func (x *interned[T]) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	clear(x.m)
}

func decodePeer(b []byte) (*peer, error) {
	var n wire.Node
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, err
	}
	p := &peer{id: n.ID, key: n.Key, disco: n.DiscoKey, endpoints: n.Endpoints, online: n.Online != nil && *n.Online}
	if p.id == 0 || p.key.IsZero() {
		return nil, fmt.Errorf("peer without ID or key: %.100s", b)
	}
	return p, nil
}

func decodeChange(b []byte) (*wire.PeerChange, error) {
	c := new(wire.PeerChange)
	return c, json.Unmarshal(b, c)
}

// with returns p after a patch.
func (p *peer) with(c *wire.PeerChange) *peer {
	if n, ok := p.next.Load(c); ok {
		return n.(*peer)
	}
	n := &peer{id: p.id, key: p.key, disco: p.disco, endpoints: p.endpoints, online: p.online}
	if c.Key != nil {
		n.key = *c.Key
	}
	if c.DiscoKey != nil {
		n.disco = *c.DiscoKey
	}
	if c.Endpoints != nil {
		n.endpoints = c.Endpoints
	}
	if c.Online != nil {
		n.online = *c.Online
	}
	have, _ := p.next.LoadOrStore(c, n)
	return have.(*peer)
}

// view is what a node knows of the mesh, from its map stream.
type view struct {
	mu     sync.Mutex // guards the members below
	self   wire.NodeID
	peers  map[wire.NodeID]*peer
	filter map[string]uint64 // hash of the rules of each chunk
	policy int64
	handle string // of the session, to resume it
	seq    int64
	fulls  int   // complete maps received
	news   int   // messages received that are no keep-alive
	bytes  int64 // of those, on the wire
}

// message is a message of the map stream, taken apart.
type message struct {
	keepAlive, full bool
	self            *wire.Node
	whole           []*peer
	removed         []wire.NodeID
	patches         []*wire.PeerChange
	filter          map[string]uint64
	policy          int64
	code            wire.ErrorCode
	handle          string
	seq             int64
}

// parse takes a message apart.
func (m *Mesh) parse(b []byte) (msg message, err error) {
	addPeer := func(b []byte) error {
		p, err := m.peers.get(b, decodePeer)
		msg.whole = append(msg.whole, p)
		return err
	}
	err = members(b, func(key, value []byte) error {
		switch string(key) {
		case "KeepAlive":
			msg.keepAlive = string(value) == "true"
		case "Node":
			msg.self = new(wire.Node)
			return json.Unmarshal(value, msg.self)
		case "Peers":
			msg.full = true
			return elements(value, addPeer)
		case "PeersChanged":
			return elements(value, addPeer)
		case "PeersRemoved":
			return json.Unmarshal(value, &msg.removed)
		case "PeersChangedPatch":
			return elements(value, func(b []byte) error {
				c, err := m.changes.get(b, decodeChange)
				msg.patches = append(msg.patches, c)
				return err
			})
		case "PacketFilters":
			msg.filter = make(map[string]uint64)
			return members(value, func(name, rules []byte) error {
				msg.filter[string(name)] = maphash.Bytes(m.peers.seed, rules)
				return nil
			})
		case "MeshPolicy":
			return json.Unmarshal(value, &msg.policy)
		case "MeshCode":
			return json.Unmarshal(value, &msg.code)
		case "MapSessionHandle":
			return json.Unmarshal(value, &msg.handle)
		case "Seq":
			return json.Unmarshal(value, &msg.seq)
		}
		return nil
	})
	return msg, err
}

// apply follows a message of size bytes, the first of a stream or a later one.
// It calls saw for each peer that differs from before: nil = gone.
func (v *view) apply(msg message, first bool, size int, saw func(was, is *peer)) error {
	if msg.keepAlive {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.news++
	v.bytes += int64(size)
	put := func(p *peer) {
		if was := v.peers[p.id]; was != p {
			v.peers[p.id] = p
			saw(was, p)
		}
	}
	drop := func(id wire.NodeID) {
		if was := v.peers[id]; was != nil {
			delete(v.peers, id)
			saw(was, nil)
		}
	}
	resumed := first && v.handle != "" && msg.handle == v.handle
	if first && !resumed {
		if msg.self == nil {
			return fmt.Errorf("the first message of a stream has no node")
		}
		v.fulls++
	}
	if msg.self != nil {
		v.self = msg.self.ID
	}
	if first && !resumed || msg.full {
		have := make(map[wire.NodeID]bool, len(msg.whole))
		for _, p := range msg.whole {
			have[p.id] = true
		}
		for id := range v.peers {
			if !have[id] {
				drop(id)
			}
		}
		v.filter = nil
	}
	for _, id := range msg.removed {
		drop(id)
	}
	for _, p := range msg.whole {
		if p.id == v.self {
			return fmt.Errorf("node %d is sent itself as a peer", p.id)
		}
		put(p)
	}
	for _, c := range msg.patches {
		p := v.peers[c.NodeID]
		if p == nil {
			return fmt.Errorf("node %d is sent a patch of node %d, which it does not know", v.self, c.NodeID)
		}
		put(p.with(c))
	}
	for name, sum := range msg.filter {
		if v.filter == nil {
			v.filter = make(map[string]uint64)
		}
		v.filter[name] = sum
	}
	if msg.policy != 0 {
		v.policy = msg.policy
	}
	if msg.handle != "" {
		v.handle = msg.handle
	}
	if msg.seq != 0 {
		v.seq = msg.seq
	}
	return nil
}

// is reports whether p is what n says of itself.
func (p *peer) is(n *node) bool {
	t := n.truth.Load()
	return p.key == n.key && p.disco == t.disco && p.online && slices.Equal(p.endpoints, t.endpoints)
}

// id returns the number of the node whose view it is.
func (v *view) id() wire.NodeID {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.self
}
