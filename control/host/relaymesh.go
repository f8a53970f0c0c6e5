package host

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"strconv"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/derp/relay"
	"mesh/identity"
)

// meshState is what a relay remembers of the others of its region.
type meshState struct {
	Region int
	// Keys are the secret of now and the one before, which a relay that has not
	// heard of the change still shows.
	Keys  []string
	Peers []wire.RelayPeer
}

const meshName = "mesh.json"

// setMesh takes what the control server says about the others of the region.
func (r *Relay) setMesh(m *wire.RelayMesh) {
	r.mu.Lock()
	next := meshState{Region: r.cfg.Region, Peers: m.Peers}
	if m.Key != "" {
		next.Keys = []string{m.Key}
		if before := r.mesh.Keys; len(before) > 0 && before[0] != m.Key {
			next.Keys = append(next.Keys, before[0])
		}
	}
	r.mesh = next
	r.mu.Unlock()
	r.relay.SetMesh(next.mesh())
	b, err := json.Marshal(next)
	if err == nil {
		err = r.files.Write(meshName, b)
	}
	if err != nil {
		r.log.Warn("the other relays of the region could not be saved; after a restart without control server the relay is alone", zap.Error(err))
	}
}

// loadMesh reads who the others were when the relay last heard of them.
func (r *Relay) loadMesh() {
	b, err := r.files.Read(meshName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var m meshState
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		r.log.Warn("the saved relays of the region are of no use; waiting for the control server", zap.Error(err))
		return
	}
	if m.Region == r.cfg.Region {
		r.mesh = m
		r.relay.SetMesh(m.mesh())
	}
}

func (m meshState) mesh() relay.Mesh {
	out := relay.Mesh{Keys: m.Keys}
	for _, p := range m.Peers {
		if p.Node != nil {
			out.Peers = append(out.Peers, relay.MeshPeer{Key: identity.NodePublic(p.NodeKey), Target: meshTarget(m.Region, p.Node)})
		}
	}
	return out
}

// meshTarget says how one relay reaches another.
func meshTarget(region int, n *wire.DERPNode) derp.Target {
	host, port := n.HostName, n.DERPPort
	for _, text := range []string{n.IPv6, n.IPv4} {
		if _, err := netip.ParseAddr(text); err == nil {
			host = text
		}
	}
	if port == 0 {
		port = 443
	}
	return derp.Target{
		Region: region, Name: n.Name, HostName: n.HostName, CertName: n.CertName,
		Addr: net.JoinHostPort(host, strconv.Itoa(port)), InsecureForTests: n.InsecureForTests,
	}
}
