package server

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

const (
	maxRegionRelays = 16  // relays of one region
	maxRelays       = 256 // of all
)

// relaySet is the relay map: regions given at the start, and relays that
// announced themselves. It is guarded by Server.mu.
type relaySet struct {
	fixed *wire.DERPMap
	known map[identity.NodePublic]*knownRelay
	// others are the regions of other replicas' own relays.
	others map[int]*wire.DERPRegion
	secret []byte // from which the regions' mesh keys are derived; not changed
}

// knownRelay is a relay that announced itself.
type knownRelay struct {
	store.Relay
	stream *relayStream // nil = not connected
	left   bool         // it drains: not in the map, forgotten when its stream ends
	// until is when a relay that is not connected leaves the map; zero if it is
	// connected.
	until time.Time
	gone  bool // until has passed
}

func (k *knownRelay) node() *wire.DERPNode { return k.Region.Nodes[0] }

// relayStream is an open /machine/relay request.
type relayStream struct {
	key  int64         // store.Key.ID
	mesh chan struct{} // capacity 1: the relays of its region changed
	end  chan struct{}
	code wire.ErrorCode // set before end is closed
}

func (r *relaySet) load(ctx context.Context, st store.Store, fixed *wire.DERPMap, until time.Time) error {
	if fixed == nil {
		fixed = &wire.DERPMap{}
	}
	r.fixed = fixed
	r.known = make(map[identity.NodePublic]*knownRelay)
	relays, err := st.Relays(ctx)
	if err != nil {
		return err
	}
	for _, relay := range relays {
		r.known[relay.NodeKey] = &knownRelay{Relay: relay, until: until}
	}
	r.secret, err = st.Secret(ctx, "relay-mesh", func() ([]byte, error) {
		b := make([]byte, 32)
		rand.Read(b)
		return b, nil
	})
	return err
}

// sorted returns the relays by region and name.
func (r *relaySet) sorted() []*knownRelay {
	all := make([]*knownRelay, 0, len(r.known))
	for _, k := range r.known {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b *knownRelay) int {
		return cmp.Or(a.Region.RegionID-b.Region.RegionID, cmp.Compare(a.node().Name, b.node().Name))
	})
	return all
}

// mapped returns the relays that nodes are told of. Those that leave, or have
// been silent for too long, are not among them, unless there would be none at
// all: the last one may be restarted, and it may be the server that is cut off.
func (r *relaySet) mapped() []*knownRelay {
	all := r.sorted()
	here := slices.DeleteFunc(slices.Clone(all), func(k *knownRelay) bool { return k.left || k.gone })
	if len(here) == 0 && len(r.fixed.Regions) == 0 {
		return all
	}
	return here
}

// derpMap returns the map as it is sent to nodes.
func (r *relaySet) derpMap() *wire.DERPMap {
	m := &wire.DERPMap{HomeParams: r.fixed.HomeParams, OmitDefaultRegions: true, Regions: make(map[int]*wire.DERPRegion)}
	for _, k := range r.mapped() {
		id := k.Region.RegionID
		if m.Regions[id] == nil {
			region := *k.Region
			region.Nodes = nil
			m.Regions[id] = &region
		}
		m.Regions[id].Nodes = append(m.Regions[id].Nodes, k.node())
	}
	maps.Copy(m.Regions, r.others)
	maps.Copy(m.Regions, r.fixed.Regions)
	return m
}

// elsewhere sets the regions of other replicas' own relays, and reports whether
// they are others than before.
func (r *relaySet) elsewhere(regions map[int]*wire.DERPRegion) bool {
	if len(regions) == 0 && len(r.others) == 0 || reflect.DeepEqual(r.others, regions) {
		return false
	}
	r.others = regions
	return true
}

// meshOf returns what a relay is told about the others of its region.
func (r *relaySet) meshOf(self *knownRelay) *wire.RelayMesh {
	mesh := &wire.RelayMesh{}
	keys := []string{self.NodeKey.String()}
	for _, k := range r.sorted() {
		if k != self && k.Region.RegionID == self.Region.RegionID && !k.gone {
			mesh.Peers = append(mesh.Peers, wire.RelayPeer{NodeKey: k.NodeKey, Node: k.node()})
			keys = append(keys, k.NodeKey.String())
		}
	}
	if len(mesh.Peers) == 0 {
		return mesh
	}
	// Whoever leaves does not know the key of those who stay.
	slices.Sort(keys)
	h := hmac.New(sha256.New, r.secret)
	fmt.Fprintf(h, "region %d %q", self.Region.RegionID, keys)
	mesh.Key = hex.EncodeToString(h.Sum(nil))
	return mesh
}

// remesh makes the relays of a region learn who the others are.
func (r *relaySet) remesh(region int) {
	for _, k := range r.known {
		if k.stream != nil && k.Region.RegionID == region {
			select {
			case k.stream.mesh <- struct{}{}:
			default:
			}
		}
	}
}

// nameFree reports whether no other relay has the name.
func (r *relaySet) nameFree(name string, self identity.NodePublic) bool {
	for key, k := range r.known {
		if key != self && k.node().Name == name {
			return false
		}
	}
	for _, region := range r.fixed.Regions {
		for _, n := range region.Nodes {
			if n != nil && n.Name == name {
				return false
			}
		}
	}
	return true
}

// name chooses the name of a relay in the map: what it had, what it asks for, or
// the first that is free.
func (r *relaySet) name(self identity.NodePublic, region *wire.DERPRegion) {
	n := region.Nodes[0]
	if old := r.known[self]; old != nil && old.Region.RegionID == region.RegionID {
		n.Name = old.node().Name
		return
	}
	for letter := 'a'; n.Name == "" || !r.nameFree(n.Name, self); letter++ {
		n.Name = fmt.Sprintf("%d%c", region.RegionID, letter)
	}
}

// SetDERPMap replaces Config.DERPMap, for instance when the certificate that
// its relay is pinned to changed, and tells all nodes.
func (s *Server) SetDERPMap(m *wire.DERPMap) {
	if m == nil {
		m = &wire.DERPMap{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.relays.fixed = m
	s.derpChanged()
}

// RelaysConnected counts the relay processes that are connected to this server
// and stay: those besides the relays of Config.DERPMap.
func (s *Server) RelaysConnected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.relaysConnected()
}

func (s *Server) relaysConnected() int {
	n := 0
	for _, k := range s.relays.known {
		if k.stream != nil && !k.left {
			n++
		}
	}
	return n
}

// derpChanged makes all streams send the relay map. Server.mu is held.
func (s *Server) derpChanged() {
	for _, n := range s.nodes.byID {
		if n.stream != nil {
			n.stream.pending.derp = true
			n.stream.poke()
		}
	}
}

var errBadRegion = errors.New("region is not valid")

// cleanRegion checks what a relay says about itself and keeps what is known.
func cleanRegion(in *wire.DERPRegion) (*wire.DERPRegion, error) {
	if in == nil || in.RegionID < 1 || in.RegionID > 65535 {
		return nil, fmt.Errorf("%w: want a number between 1 and 65535", errBadRegion)
	}
	if len(in.Nodes) != 1 || in.Nodes[0] == nil {
		return nil, fmt.Errorf("%w: want exactly one relay in it", errBadRegion)
	}
	n := *in.Nodes[0]
	n.RegionID = in.RegionID
	for _, text := range []string{in.RegionCode, in.RegionName, n.Name, n.HostName, n.CertName, n.IPv4, n.IPv6, n.STUNTestIP} {
		if clip(text) != text {
			return nil, fmt.Errorf("%w: a text in it is too long or not plain", errBadRegion)
		}
	}
	if n.HostName == "" || n.DERPPort < 0 || n.DERPPort > 65535 || n.STUNPort < -1 || n.STUNPort > 65535 {
		return nil, fmt.Errorf("%w: host name or port", errBadRegion)
	}
	return &wire.DERPRegion{
		RegionID: in.RegionID, RegionCode: in.RegionCode, RegionName: in.RegionName,
		Latitude: in.Latitude, Longitude: in.Longitude, Avoid: in.Avoid, NoMeasureNoHome: in.NoMeasureNoHome,
		Nodes: []*wire.DERPNode{&n},
	}, nil
}

// errTooManyRelays refuses one more.
var errTooManyRelays = errors.New("too many relays; remove those that are gone with `mesh relay remove`")

// openRelay stores the relay, tells the nodes, and makes this stream the
// relay's only one.
func (s *Server) openRelay(ctx context.Context, key store.Key, nodeKey identity.NodePublic, region *wire.DERPRegion) (*relayStream, error) {
	s.lockOps()
	defer s.opMu.Unlock()
	now := s.cfg.Now()
	relay := store.Relay{NodeKey: nodeKey, Region: region, Key: key.ID, Created: now.UTC().Round(0)} // as the store gives it back
	s.mu.Lock()
	same, err := s.relays.place(relay)
	if err == nil {
		s.relays.name(nodeKey, region)
	}
	if old := s.relays.known[nodeKey]; old != nil {
		relay.Created = old.Created
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	if same != nil {
		// It came back with another key.
		if err := s.forgetRelay(ctx, fmt.Sprintf("key %d", key.ID), same); err != nil {
			return nil, err
		}
	}
	if err := s.store.PutRelay(ctx, relay, now); err != nil {
		return nil, err
	}
	rs := &relayStream{key: key.ID, mesh: make(chan struct{}, 1), end: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.relays.known[nodeKey]
	if k == nil {
		k = &knownRelay{}
		s.relays.known[nodeKey] = k
	} else {
		k.end("")
		if before := k.Region.RegionID; before != region.RegionID {
			defer s.relays.remesh(before)
		}
	}
	*k = knownRelay{Relay: relay, stream: rs}
	s.relays.remesh(region.RegionID)
	s.derpChanged()
	return rs, nil
}

// place says whether a relay may be part of the set, and which one that is away
// it replaces, since it has the same address or there are too many.
func (r *relaySet) place(relay store.Relay) (same *knownRelay, err error) {
	id := relay.Region.RegionID
	_, taken := r.fixed.Regions[id]
	if _, other := r.others[id]; taken || other {
		return nil, store.ErrConflict
	}
	others, inRegion := 0, 0
	var gone *knownRelay // of the region
	n := relay.Region.Nodes[0]
	for key, k := range r.known {
		in := k.Region.RegionID == id
		switch {
		case (in || key == relay.NodeKey) && k.Key != relay.Key:
			return nil, store.ErrConflict
		case key == relay.NodeKey:
			continue
		case in && k.stream == nil && k.node().HostName == n.HostName && k.node().DERPPort == n.DERPPort:
			same = k
			continue
		}
		others++
		if in {
			inRegion++
			if k.gone && (gone == nil || k.until.Before(gone.until)) {
				gone = k
			}
		}
	}
	if others >= maxRelays || inRegion >= maxRegionRelays {
		if same = cmp.Or(same, gone); same == nil {
			return nil, errTooManyRelays
		}
	}
	return same, nil
}

// end ends the stream of a relay, if there is one. Server.mu is held.
func (k *knownRelay) end(code wire.ErrorCode) {
	if k.stream != nil {
		k.stream.code = code
		close(k.stream.end)
		k.stream = nil
	}
}

// closeRelay notes that a stream has ended. The relay stays in the map for a
// while, unless it said that it goes.
func (s *Server) closeRelay(ctx context.Context, key identity.NodePublic, rs *relayStream) {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	k := s.relays.known[key]
	if k == nil || k.stream != rs {
		s.mu.Unlock()
		return
	}
	k.stream, k.until = nil, s.cfg.Now().Add(s.cfg.RelayLease)
	left := k.left && !slices.Contains(s.relays.mapped(), k)
	k.left = left
	s.mu.Unlock()
	if left {
		if err := s.forgetRelay(context.WithoutCancel(ctx), fmt.Sprintf("key %d", rs.key), k); err == nil {
			return
		} else if s.ctx.Err() == nil {
			s.log.Error("relay that left could not be removed", zap.Error(err))
		}
	}
	s.wakeJanitor()
}

// leaveRelay takes a relay that drains out of the map.
func (s *Server) leaveRelay(key identity.NodePublic, id int64) error {
	s.lockOps()
	defer s.opMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.relays.known[key]
	if k == nil || k.Key != id {
		return store.ErrNotFound
	}
	if !k.left {
		k.left = true
		s.derpChanged()
	}
	return nil
}

// endLeases takes relays that have been silent for too long out of the map and
// returns the time to the next.
func (s *Server) endLeases(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := time.Hour
	changed := false
	for _, k := range s.relays.known {
		switch d := k.until.Sub(now); {
		case k.until.IsZero() || k.gone:
		case d > 0:
			wait = min(wait, d)
		default:
			s.log.Info("relay is gone", zap.String("name", k.node().Name))
			k.gone, changed = true, true
			s.relays.remesh(k.Region.RegionID)
		}
	}
	if changed {
		s.derpChanged()
	}
	return wait
}

// forgetRelay removes a relay. opMu is held.
func (s *Server) forgetRelay(ctx context.Context, by string, k *knownRelay) error {
	if err := s.store.RemoveRelay(ctx, by, k.NodeKey, s.cfg.Now()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.relays.known, k.NodeKey)
	k.end(wire.CodeRelayKeyUnknown)
	s.relays.remesh(k.Region.RegionID)
	s.derpChanged()
	return nil
}

// removeRelay forgets the relay with a name, or all of the region with a number.
func (s *Server) removeRelay(ctx context.Context, by, name string) error {
	s.lockOps()
	defer s.opMu.Unlock()
	region, err := strconv.Atoi(name)
	if err != nil {
		region = 0
	}
	s.mu.Lock()
	var remove []*knownRelay
	for _, k := range s.relays.known {
		if k.node().Name == name || k.Region.RegionID == region {
			remove = append(remove, k)
		}
	}
	s.mu.Unlock()
	if len(remove) == 0 {
		return store.ErrNotFound
	}
	for _, k := range remove {
		if err := s.forgetRelay(ctx, by, k); err != nil {
			return err
		}
	}
	return nil
}
