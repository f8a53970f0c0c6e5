package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"go.uber.org/zap"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// relaySet is the relay map: regions given at the start, and relays that
// announced themselves. It is guarded by Server.mu.
type relaySet struct {
	fixed   *wire.DERPMap
	known   map[int]store.Relay         // by region
	streams map[int]*relayStream        // of those that are connected
	keys    map[identity.NodePublic]int // regions of known
}

// relayStream is an open /machine/relay request.
type relayStream struct {
	key  int64 // store.Key.ID
	end  chan struct{}
	code wire.ErrorCode // set before end is closed
}

func (r *relaySet) load(ctx context.Context, st store.Store, fixed *wire.DERPMap) error {
	if fixed == nil {
		fixed = &wire.DERPMap{}
	}
	r.fixed = fixed
	r.known = make(map[int]store.Relay)
	r.streams = make(map[int]*relayStream)
	r.keys = make(map[identity.NodePublic]int)
	relays, err := st.Relays(ctx)
	if err != nil {
		return err
	}
	for _, relay := range relays {
		r.put(relay)
	}
	return nil
}

func (r *relaySet) put(relay store.Relay) {
	id := relay.Region.RegionID
	if old, ok := r.known[id]; ok {
		delete(r.keys, old.NodeKey)
	}
	if at, ok := r.keys[relay.NodeKey]; ok {
		delete(r.known, at)
	}
	r.known[id], r.keys[relay.NodeKey] = relay, id
}

// derpMap returns the map as it is sent to nodes.
func (r *relaySet) derpMap() *wire.DERPMap {
	m := &wire.DERPMap{HomeParams: r.fixed.HomeParams, OmitDefaultRegions: true, Regions: make(map[int]*wire.DERPRegion)}
	for id, relay := range r.known {
		m.Regions[id] = relay.Region
	}
	for id, region := range r.fixed.Regions {
		m.Regions[id] = region
	}
	return m
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

// RelaysConnected counts the relay processes that are connected to this server:
// those besides the relays of Config.DERPMap.
func (s *Server) RelaysConnected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.relays.streams)
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
	if n.Name == "" {
		n.Name = fmt.Sprintf("%da", in.RegionID)
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

// serveRelay is POST /machine/relay.
func (s *Server) serveRelay(w http.ResponseWriter, r *http.Request, c *client) {
	if !s.limit.ok(c.source) {
		tooMany(w, 5)
		return
	}
	var req wire.RelayRequest
	if !readJSON(w, r, &req) {
		return
	}
	key, err := s.store.VerifyKey(r.Context(), store.KeyRelay, req.RelayKey, s.cfg.Now())
	if err != nil {
		if wire.CodeOf(err) == "" {
			s.log.Error("relay key could not be looked up", zap.Error(err))
			http.Error(w, "internal error", http.StatusInternalServerError)
			return
		}
		s.limit.failed(c.source)
		refuse(w, err)
		return
	}
	region, err := cleanRegion(req.Region)
	if err == nil && req.NodeKey.IsZero() {
		err = errors.New("relay has no key")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	rs, err := s.openRelay(r.Context(), key, req.NodeKey, region)
	switch {
	case errors.Is(err, store.ErrConflict):
		http.Error(w, fmt.Sprintf("region %d belongs to another relay", region.RegionID), http.StatusConflict)
		return
	case err != nil:
		s.log.Error("relay could not be stored", zap.Error(err))
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	c.known()
	defer s.closeRelay(region.RegionID, rs)
	if err := s.feedRelay(r.Context(), rs, newFramer(w, &wire.MapRequest{}, s.cfg.WriteTimeout)); err != nil {
		s.log.Debug("relay stream ended", zap.Int("region", region.RegionID), zap.Error(err))
	}
}

// openRelay stores the relay, tells the nodes, and makes this stream the
// relay's only one.
func (s *Server) openRelay(ctx context.Context, key store.Key, nodeKey identity.NodePublic, region *wire.DERPRegion) (*relayStream, error) {
	s.opMu.Lock()
	defer s.opMu.Unlock()
	id, now := region.RegionID, s.cfg.Now()
	s.mu.Lock()
	_, taken := s.relays.fixed.Regions[id]
	old, known := s.relays.known[id]
	s.mu.Unlock()
	relay := store.Relay{NodeKey: nodeKey, Region: region, Key: key.ID, Created: now}
	if taken || known && old.Key != key.ID {
		return nil, store.ErrConflict
	}
	if known {
		relay.Created = old.Created
	}
	if err := s.store.PutRelay(context.WithoutCancel(ctx), relay, now); err != nil {
		return nil, err
	}
	rs := &relayStream{key: key.ID, end: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endRelay(id, "")
	s.relays.put(relay)
	s.relays.streams[id] = rs
	s.derpChanged()
	return rs, nil
}

// endRelay ends the stream of a region, if there is one. Server.mu is held.
func (s *Server) endRelay(id int, code wire.ErrorCode) {
	if rs := s.relays.streams[id]; rs != nil {
		rs.code = code
		close(rs.end)
		delete(s.relays.streams, id)
	}
}

func (s *Server) closeRelay(id int, rs *relayStream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.relays.streams[id] == rs {
		delete(s.relays.streams, id)
	}
}

// feedRelay tells a relay whom to admit until the stream ends. It hears keys
// and nothing else.
func (s *Server) feedRelay(ctx context.Context, rs *relayStream, f *framer) error {
	sub, all := s.subscribe()
	defer s.unsubscribe(sub)
	if err := f.send(&wire.RelayUpdate{Full: true, Members: all}); err != nil {
		return err
	}
	for {
		idle := time.NewTimer(wire.KeepAliveInterval + rand.N(9*time.Second))
		u := wire.RelayUpdate{}
		select {
		case <-ctx.Done():
			idle.Stop()
			return ctx.Err()
		case <-rs.end:
			idle.Stop()
			if rs.code == "" {
				return nil
			}
			return f.send(&wire.RelayUpdate{MeshCode: rs.code})
		case <-idle.C:
			u.KeepAlive = true
		case <-sub.wake:
			if u.Members, u.Removed = s.membership(sub); len(u.Members)+len(u.Removed) == 0 {
				continue
			}
		}
		idle.Stop()
		if err := f.send(&u); err != nil {
			return err
		}
	}
}

// removeRelay forgets a relay.
func (s *Server) removeRelay(ctx context.Context, by string, id int) error {
	s.opMu.Lock()
	defer s.opMu.Unlock()
	if err := s.store.RemoveRelay(ctx, by, id, s.cfg.Now()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if relay, ok := s.relays.known[id]; ok {
		delete(s.relays.known, id)
		delete(s.relays.keys, relay.NodeKey)
	}
	s.endRelay(id, wire.CodeRelayKeyUnknown)
	s.derpChanged()
	return nil
}
