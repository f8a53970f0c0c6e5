package session

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"mesh/identity"
	"mesh/internal/path"
)

// Path tells how packets to a peer travel at one moment. The zero Path means
// that there was no traffic with the peer lately.
type Path struct {
	// Kind is "direct" for UDP from host to host, "relay" for the detour by a
	// relay, which sees ciphertext only, and "" for neither.
	Kind string
	// Endpoint is the peer's address by which a direct path goes.
	Endpoint netip.AddrPort `json:",omitzero"`
	// Relay is the region of a relayed path.
	Relay int `json:",omitzero"`
	// Latency is the time of a round trip as last measured, 0 = unknown.
	Latency time.Duration `json:",omitzero"`
	// Since is when the path became what it is, zero if unknown, and Why the
	// reason, for people: "first pong", "path silent", "network changed".
	Since time.Time `json:",omitzero"`
	Why   string    `json:",omitempty"`
}

// String describes the way, as in "direct 192.0.2.7:41641" or "relay 900"; "none"
// for the zero Path.
func (p Path) String() string {
	switch p.Kind {
	case "direct":
		return "direct " + p.Endpoint.String()
	case "relay":
		return fmt.Sprintf("relay %d", p.Relay)
	}
	return "none"
}

// Pong is a peer's answer to Ping by one path.
type Pong struct {
	Peer identity.Peer
	Path // with the latency of this answer, without Since and Why
}

// PathTo tells how packets to a peer travel.
func (s *Session) PathTo(peer identity.NodePublic) Path {
	st := s.engine.Load().PathTo(peer)
	p := Path{Since: st.Since, Why: st.Why}
	switch {
	case st.Direct.IsValid() && (st.Trusted || !st.Active || st.Region == 0):
		p.Kind, p.Endpoint, p.Latency = "direct", st.Direct, st.Latency
	case st.Region != 0:
		p.Kind, p.Relay, p.Latency = "relay", st.Region, st.RelayLatency
		if st.Direct.IsValid() {
			// Traffic goes both ways, as the direct one may be dead: a path
			// that may be none is not told.
			p.Since, p.Why = time.Time{}, st.Direct.String()+" does not answer at present"
		}
	default:
		return Path{}
	}
	return p
}

// Ping asks a peer by all ways and hands each answer to the function. Of a peer
// that has just come up no way may be known yet: the news are waited for, atMost.
func (s *Session) Ping(ctx context.Context, peer identity.Peer, atMost time.Duration, answer func(Pong)) error {
	for until := time.Now().Add(atMost); ; {
		next := s.nextMap()
		err := s.engine.Load().Ping(ctx, peer.Key, func(g path.Pong) {
			p := Pong{Peer: peer, Path: Path{Kind: "relay", Relay: g.Region, Latency: g.Latency}}
			if g.Addr.IsValid() {
				p.Kind, p.Endpoint = "direct", g.Addr
			}
			answer(p)
		})
		if !errors.Is(err, path.ErrNoPath) {
			return err
		}
		select {
		case <-next:
		case <-time.After(time.Until(until)):
			return err
		case <-ctx.Done():
			return err
		}
	}
}

// DescribePath says how packets to a peer were last sent, for error texts.
func (s *Session) DescribePath(peer identity.NodePublic) string {
	p := s.PathTo(peer)
	switch p.Kind {
	case "direct":
		return "directly at " + p.Endpoint.String()
	case "relay":
		return fmt.Sprintf("by relay %d", p.Relay)
	}
	if t := s.Trouble(); t != nil {
		return fmt.Sprintf("by no path (%v)", t)
	}
	return "by no path"
}
