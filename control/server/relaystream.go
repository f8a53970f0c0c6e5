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

// serveRelay is POST /machine/relay.
func (s *Server) serveRelay(w http.ResponseWriter, r *http.Request, c *client) {
	if !s.limit.ok(c.source) {
		s.meters.denied(atRelay, nil, denyRate)
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
			s.broken(w, "relay key could not be looked up", err)
			return
		}
		s.limit.failed(c.source)
		s.meters.denied(atRelay, err, denyFail)
		refuse(w, err)
		return
	}
	f := s.newFramer(w, "", c)
	defer f.close()
	if req.Leaving {
		if err := s.leaveRelay(req.NodeKey, key.ID); err != nil {
			http.Error(w, "no such relay", http.StatusNotFound)
			return
		}
		f.send(&wire.RelayUpdate{})
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
	case errors.Is(err, errTooManyRelays):
		http.Error(w, err.Error(), http.StatusConflict)
		return
	case err != nil:
		s.broken(w, "relay could not be stored", err)
		return
	}
	c.known()
	defer s.closeRelay(r.Context(), req.NodeKey, rs)
	if err := s.feedRelay(r.Context(), req.NodeKey, rs, f); err != nil {
		s.log.Debug("relay stream ended", zap.Int("region", region.RegionID), zap.Error(err))
	}
}

// feedRelay tells a relay whom to admit, and with which others it forwards,
// until the stream ends. It hears keys, and of other relays their addresses.
func (s *Server) feedRelay(ctx context.Context, key identity.NodePublic, rs *relayStream, f *framer) error {
	sub, all := s.subscribe()
	defer s.unsubscribe(sub)
	if err := f.send(&wire.RelayUpdate{Full: true, Members: all, Mesh: s.relayMesh(key)}); err != nil {
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
		case <-rs.mesh:
			u.Mesh = s.relayMesh(key)
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

// relayMesh returns what a relay is told about the others, nil if it is not
// known any more.
func (s *Server) relayMesh(key identity.NodePublic) *wire.RelayMesh {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.relays.known[key]; k != nil {
		return s.relays.meshOf(k)
	}
	return nil
}
