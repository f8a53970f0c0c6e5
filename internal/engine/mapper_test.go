package engine

import (
	"net/netip"
	"slices"
	"testing"

	"mesh/control/wire"
	"mesh/internal/path"
)

// Only a node whose address is changed on the way to a STUN server asks the
// gateway.
func TestWhoIsBehindNAT(t *testing.T) {
	for _, tc := range []struct {
		name      string
		local     []string
		stun      []string
		wantNAT   bool
		wantPlace []string
	}{
		{"home", []string{"192.168.1.5:1"}, []string{"192.0.2.1:7"}, true, []string{"192.0.2.1"}},
		{"symmetric", []string{"192.168.1.5:1"}, []string{"192.0.2.1:7", "192.0.2.1:8"}, true, []string{"192.0.2.1"}},
		{"public", []string{"192.0.2.1:7"}, []string{"192.0.2.1:7"}, false, []string{"192.0.2.1"}},
		{"same LAN as the server", []string{"192.168.1.5:1"}, []string{"192.168.1.5:1"}, false, []string{"192.168.1.5"}},
		{"loopback", nil, []string{"127.0.0.1:7"}, false, []string{"127.0.0.1"}},
		{"no UDP", []string{"192.168.1.5:1"}, nil, false, nil},
		{"IPv6", []string{"[2001:db8::1]:1"}, []string{"[2001:db8::2]:1"}, false, []string{"2001:db8::2"}},
	} {
		var r path.Report
		add := func(list []string, typ wire.EndpointType) {
			for _, a := range list {
				r.Endpoints, r.Types = append(r.Endpoints, netip.MustParseAddrPort(a)), append(r.Types, typ)
			}
		}
		add(tc.local, wire.EndpointLocal)
		add(tc.stun, wire.EndpointSTUN)
		seen, natted := outside(r)
		var place []string
		for _, a := range seen {
			place = append(place, a.String())
		}
		if natted != tc.wantNAT || !slices.Equal(place, tc.wantPlace) {
			t.Errorf("%s: %v %v", tc.name, place, natted)
		}
	}
}
