package netmap

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"mesh/control/wire"
)

// ErrNoNode reports a first message that does not say who the receiver is.
var ErrNoNode = errors.New("first message of the map stream has no node")

// Delta says what differs between two maps, so that the work of following it is
// in proportion to the change. Lists are in order of node numbers.
type Delta struct {
	// Full is true when there was no map before: everything is new.
	Full bool

	Self, Relays, Filter, DNS bool
	// Policy is true when PolicyVersion changed. Control may say so with
	// nothing else: what is in force is that of the new policy already.
	Policy bool
	// Users lists the users whose profiles are new or changed.
	Users []wire.UserID

	Added   []*Peer
	Changed []Change
	Removed []*Peer

	// Ignored says in words what of the message was not believed, such as an
	// address that belongs to another peer. It is for logs, and bounded.
	Ignored []string
}

// Change is a peer before and after.
type Change struct{ Old, New *Peer }

// Empty reports whether nothing changed.
func (d *Delta) Empty() bool {
	return !d.Full && !d.Self && !d.Relays && !d.Filter && !d.DNS && !d.Policy &&
		len(d.Users) == 0 && len(d.Added) == 0 && len(d.Changed) == 0 && len(d.Removed) == 0
}

// Apply returns the map after a message of the map stream, and what changed.
// prev is nil before the first message of a stream, and never changes. The new
// map keeps parts of r, which must not be changed after. A keep-alive gives prev
// itself, or a copy with another clock.
//
// An error means that the message cannot be followed; the stream is of no more
// use, but prev is. Doubtful parts of a message are left out, see
// Delta.Ignored.
func Apply(prev *Map, r *wire.MapResponse) (*Map, Delta, error) {
	return ApplyAt(prev, r, time.Now())
}

// ApplyAt is Apply at the moment now of the local clock.
func ApplyAt(prev *Map, r *wire.MapResponse, now time.Time) (*Map, Delta, error) {
	var d Delta
	if r.KeepAlive {
		if prev == nil || r.ControlTime == nil {
			return prev, d, nil
		}
		m := *prev
		if m.setClock(r, now); m.offset == prev.offset {
			return prev, d, nil
		}
		return &m, d, nil
	}
	m := &Map{}
	if prev != nil {
		*m = *prev
	} else {
		d.Full = true
	}
	m.setClock(r, now)
	if r.Node != nil {
		self, err := clean(r.Node, d.ignore)
		if err != nil {
			return nil, Delta{}, fmt.Errorf("own node: %w", err)
		}
		m.self = self
	}
	if m.self == nil {
		return nil, Delta{}, ErrNoNode
	}
	base := m.index
	moved := prev != nil && !sameSelf(prev.self, m.self)
	if moved {
		base = index{} // what peers may claim has changed: settle it anew
	}
	e := newEdit(&base, m.self)
	if moved {
		for _, n := range prev.nodes.all() {
			e.putClean(n)
		}
	}
	e.applyPeers(r, now)
	var peers Delta
	m.index = e.finish(&peers)
	if moved {
		ignored := peers.Ignored
		peers = Delta{}
		diffPeers(&prev.index, &m.index, &peers)
		peers.Ignored = ignored
	}
	d.Added, d.Changed, d.Removed = peers.Added, peers.Changed, peers.Removed
	d.Ignored = append(d.Ignored, peers.Ignored...)

	m.applyRest(r, &d)
	if prev != nil {
		d.Self = prev.self != m.self && !reflect.DeepEqual(prev.self, m.self)
		d.Relays = prev.relays != m.relays && !reflect.DeepEqual(prev.relays, m.relays)
		d.DNS = prev.dns != m.dns && !reflect.DeepEqual(prev.dns, m.dns)
		d.Filter = d.Filter && !reflect.DeepEqual(prev.filter, m.filter)
		d.Policy = prev.policy != m.policy
	} else {
		d.Self, d.Relays, d.DNS, d.Filter, d.Policy = true, m.relays != nil, m.dns != nil, true, m.policy != 0
	}
	return m, d, nil
}

func (d *Delta) ignore(format string, args ...any) {
	if len(d.Ignored) < maxIgnored {
		d.Ignored = append(d.Ignored, fmt.Sprintf(format, args...))
	}
}

// sameSelf reports whether peers may claim the same beside a as beside b.
func sameSelf(a, b *wire.Node) bool {
	return a.ID == b.ID && a.Key == b.Key && a.Name == b.Name && slices.Equal(a.Addresses, b.Addresses)
}

// setClock keeps the difference to control's clock if it is not just latency.
func (m *Map) setClock(r *wire.MapResponse, now time.Time) {
	if r.ControlTime == nil || r.ControlTime.IsZero() {
		return
	}
	offset := r.ControlTime.Sub(now)
	if offset.Abs() <= time.Minute {
		offset = 0
	}
	if offset == 0 || (offset-m.offset).Abs() > clockNoise {
		m.offset = offset
	}
}

// clockNoise is how much a large offset may vary with the time that messages
// take, without being taken for another.
const clockNoise = 10 * time.Second

// applyPeers follows the peer members of a message, in the order that the
// protocol gives them.
func (e *edit) applyPeers(r *wire.MapResponse, now time.Time) {
	if len(r.Peers) > 0 {
		e.replaceAll(r.Peers)
		return
	}
	for _, id := range r.PeersRemoved {
		e.drop(id)
	}
	for _, n := range r.PeersChanged {
		e.put(n)
	}
	for id, seen := range r.PeerSeenChange {
		e.patch(id, func(n *wire.Node) {
			n.LastSeen = nil
			if seen {
				n.LastSeen = &now
			}
		})
	}
	for id, online := range r.OnlineChange {
		e.patch(id, func(n *wire.Node) { n.Online = &online })
	}
	for _, c := range r.PeersChangedPatch {
		if c != nil {
			e.patch(c.NodeID, func(n *wire.Node) { patchNode(n, c) })
		}
	}
}

// replaceAll makes list the only nodes. Of two with one number the later
// counts.
func (e *edit) replaceAll(list []*wire.Node) {
	last := make(map[NodeID]*wire.Node, len(list))
	inOrder := true
	for i, n := range list {
		if n != nil {
			last[n.ID] = n
		}
		inOrder = inOrder && n != nil && (i == 0 || list[i-1].ID < n.ID)
	}
	var gone []NodeID
	for id := range e.nodes.all() {
		if last[id] == nil {
			gone = append(gone, id)
		}
	}
	for _, id := range gone {
		e.drop(id)
	}
	// In order of numbers, so that claims are appended.
	if !inOrder {
		list = slices.SortedFunc(maps.Values(last), func(a, b *wire.Node) int { return cmp.Compare(a.ID, b.ID) })
	}
	for _, n := range list {
		e.put(n)
	}
}

// patch changes a copy of a known node.
func (e *edit) patch(id NodeID, change func(*wire.Node)) {
	old := e.nodes.get(id)
	if old == nil {
		return
	}
	n := *old
	change(&n)
	e.put(&n)
}

func patchNode(n *wire.Node, c *wire.PeerChange) {
	if c.DERPRegion != 0 {
		n.HomeDERP = c.DERPRegion
	}
	if c.Cap != 0 {
		n.Cap = c.Cap
	}
	if c.CapMap != nil {
		n.CapMap = c.CapMap
	}
	if len(c.Endpoints) > 0 {
		n.Endpoints = c.Endpoints
	}
	if c.Key != nil {
		n.Key = *c.Key
	}
	if c.DiscoKey != nil {
		n.DiscoKey = *c.DiscoKey
	}
	if c.Online != nil {
		n.Online = c.Online
	}
	if c.LastSeen != nil {
		n.LastSeen = c.LastSeen
	}
	if c.KeyExpiry != nil {
		n.KeyExpiry = *c.KeyExpiry
	}
}

// applyRest follows the members that are not about nodes.
func (m *Map) applyRest(r *wire.MapResponse, d *Delta) {
	if r.DERPMap != nil {
		m.relays = mergeRelays(m.relays, r.DERPMap)
	}
	if r.PacketFilter != nil || r.PacketFilters != nil {
		m.chunks = mergeChunks(m.chunks, r)
		m.setFilter(d)
		d.Filter = true
	}
	if r.DNSConfig != nil {
		m.dns = r.DNSConfig
	}
	if r.Domain != "" {
		m.network = r.Domain
	}
	if r.MeshPolicy != 0 {
		m.policy = r.MeshPolicy
	}
	if r.MeshMapVersion != 0 {
		m.version = r.MeshMapVersion
	}
	if len(r.UserProfiles) > 0 {
		users := editor[wire.UserID, *wire.UserProfile]{table: m.users}
		for i := range r.UserProfiles {
			u := &r.UserProfiles[i]
			if old := users.get(u.ID); u.ID <= 0 || old != nil && reflect.DeepEqual(old, u) {
				continue
			}
			users.set(u.ID, u)
			d.Users = append(d.Users, u.ID)
		}
		m.users = users.table
		slices.Sort(d.Users)
		d.Users = slices.Compact(d.Users)
	}
}

func mergeRelays(old, r *wire.DERPMap) *wire.DERPMap {
	out := *r
	if r.Regions == nil {
		if old != nil {
			out.Regions = old.Regions
		}
	} else {
		out.Regions = make(map[int]*wire.DERPRegion, len(r.Regions))
		for id, region := range r.Regions {
			if region != nil {
				out.Regions[id] = region
			}
		}
	}
	if old != nil && old.HomeParams != nil && (r.HomeParams == nil || r.HomeParams.RegionScore == nil) {
		out.HomeParams = old.HomeParams
	}
	return &out
}

func mergeChunks(old map[string][]wire.FilterRule, r *wire.MapResponse) map[string][]wire.FilterRule {
	chunks := maps.Clone(old)
	if chunks == nil {
		chunks = map[string][]wire.FilterRule{}
	}
	if r.PacketFilter != nil {
		chunks["base"] = r.PacketFilter
	}
	if all, ok := r.PacketFilters["*"]; ok && all == nil {
		clear(chunks)
	}
	for name, rules := range r.PacketFilters {
		if rules == nil {
			delete(chunks, name)
		} else {
			chunks[name] = rules
		}
	}
	return chunks
}

// setFilter makes the list of rules out of the chunks. Rules in the obsolete
// form of bits refuse the lot, as other clients do: nothing is let in.
func (m *Map) setFilter(d *Delta) {
	var rules []wire.FilterRule
	for _, name := range slices.Sorted(maps.Keys(m.chunks)) {
		rules = append(rules, m.chunks[name]...)
	}
	for i := range rules {
		if usesBits(&rules[i]) {
			d.ignore("packet filter: a rule uses SrcBits or Bits; the filter is refused and nothing is let in")
			rules = nil
			break
		}
	}
	m.filter, m.grants = rules, compileGrants(rules)
}

func usesBits(r *wire.FilterRule) bool {
	return len(r.SrcBits) > 0 || slices.ContainsFunc(r.DstPorts, func(p wire.NetPortRange) bool { return p.Bits != nil })
}

// Rebase returns what differs between two maps that come from different
// streams, so that a new stream disturbs nothing that stayed the same. old may
// be nil.
func Rebase(old, new *Map) Delta {
	var d Delta
	if old == nil {
		d.Full, d.Self, d.Filter = true, true, true
		d.Relays, d.DNS, d.Policy = new.relays != nil, new.dns != nil, new.policy != 0
		old = &Map{}
	} else {
		d.Self = !reflect.DeepEqual(old.self, new.self)
		d.Relays = !reflect.DeepEqual(old.relays, new.relays)
		d.Filter = !reflect.DeepEqual(old.filter, new.filter)
		d.DNS = !reflect.DeepEqual(old.dns, new.dns)
		d.Policy = old.policy != new.policy
	}
	diffPeers(&old.index, &new.index, &d)
	for id, u := range new.users.all() {
		if was := old.users.get(id); was == nil || !reflect.DeepEqual(was, u) {
			d.Users = append(d.Users, id)
		}
	}
	slices.Sort(d.Users)
	return d
}

func diffPeers(old, new *index, d *Delta) {
	for id, p := range new.peers.all() {
		switch was := old.peers.get(id); {
		case was == nil:
			d.Added = append(d.Added, p)
		case !samePeer(was, p):
			d.Changed = append(d.Changed, Change{Old: was, New: p})
		}
	}
	for id, p := range old.peers.all() {
		if new.peers.get(id) == nil {
			d.Removed = append(d.Removed, p)
		}
	}
	byID := func(a, b *Peer) int { return cmp.Compare(a.ID, b.ID) }
	slices.SortFunc(d.Added, byID)
	slices.SortFunc(d.Removed, byID)
	slices.SortFunc(d.Changed, func(a, b Change) int { return cmp.Compare(a.New.ID, b.New.ID) })
}
