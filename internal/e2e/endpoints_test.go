package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"mesh"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// Where a node is on the internet is told to those that the policy lets talk with
// it, and to nobody else.
func TestEndpointsAreForPeersOnly(t *testing.T) {
	m := meshtest.Start(t, `{
		"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
		"acls": [
			{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:80"]},
			{"action": "accept", "src": ["tag:c"], "dst": ["tag:c:*"]},
		],
	}`)
	const secret = "192.0.2.55:4242"
	a := m.Node("a", []string{"tag:a"}, func(n *mesh.Node) { n.Endpoints = []netip.AddrPort{netip.MustParseAddrPort(secret)} })
	meshtest.Up(t, a)

	if got := hearsOnce(t, m, "b", "tag:b"); !strings.Contains(got, secret) {
		t.Errorf("who may talk to a does not hear where it is: %s", got)
	}
	if got := hearsOnce(t, m, "c", "tag:c"); strings.Contains(got, secret) || strings.Contains(got, "192.0.2.55") {
		t.Errorf("a stranger hears where a is: %s", got)
	}
}

// hearsOnce enrols a node and returns all that the control server tells it until
// it has its peers.
func hearsOnce(t *testing.T, m *meshtest.Mesh, name, tag string) string {
	t.Helper()
	r := enrolRaw(t, m, name, []string{tag})
	disco := identity.NewDisco().Public()
	enough := errors.New("enough")
	var all strings.Builder
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	err := r.client.Stream(ctx, func() wire.MapRequest {
		return wire.MapRequest{Version: wire.CapabilityVersion, NodeKey: r.state.Node.Public(), DiscoKey: disco, Hostinfo: rawInfo(name)}
	}, func(resp *wire.MapResponse) error {
		b, err := json.Marshal(resp)
		if err != nil {
			return err
		}
		all.Write(b)
		if resp.Node != nil { // the first map: it is whole
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
	return all.String()
}
