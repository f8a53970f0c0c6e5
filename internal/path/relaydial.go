package path

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"mesh/control/wire"
	"mesh/derp"
	"mesh/identity"
)

const (
	// connectTimeout bounds TCP to one address of a relay: after a time
	// without network an attempt that began too early must not hold up the
	// next.
	connectTimeout = 1500 * time.Millisecond
	loginTimeout   = 8 * time.Second // bounds all of a connection's making
)

// errNoRelayNode reports a region of the map without a relay.
var errNoRelayNode = errors.New("no node of the region relays")

// dialRegion connects to the relay of a region that was chosen to be its only
// one, at the first of its addresses that answers.
func (p *Path) dialRegion(ctx context.Context, def *wire.DERPRegion, key identity.NodePrivate) (relayConn, error) {
	if len(def.Nodes) == 0 || def.Nodes[0] == nil || def.Nodes[0].STUNOnly {
		return nil, fmt.Errorf("relay %d: %w", def.RegionID, errNoRelayNode)
	}
	n := def.Nodes[0]
	port := n.DERPPort
	if port == 0 {
		port = 443
	}
	var errs []error
	for _, host := range relayHosts(n) {
		c, err := derp.Dial(ctx, derp.ClientConfig{
			Key:            key,
			Dial:           p.cfg.DialTCP,
			Proxy:          p.cfg.Proxy,
			RootCAs:        p.cfg.RootCAs,
			Logger:         p.log,
			DialTimeout:    loginTimeout,
			ConnectTimeout: connectTimeout,
			Target: derp.Target{
				Region: def.RegionID, Name: n.Name, HostName: n.HostName, CertName: n.CertName,
				Addr: joinHostPort(host, port), InsecureForTests: n.InsecureForTests,
			},
		})
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			return nil, err
		}
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("relay %d: %w", def.RegionID, errNoRelayNode)
	}
	return nil, errors.Join(errs...)
}

// relayHosts returns what to dial for a node: its addresses, or its name when
// it lists none.
func relayHosts(n *wire.DERPNode) []string {
	var hosts []string
	for _, text := range []string{n.IPv4, n.IPv6} {
		if _, err := netip.ParseAddr(text); err == nil {
			hosts = append(hosts, text)
		}
	}
	if len(hosts) == 0 && n.HostName != "" {
		hosts = []string{n.HostName}
	}
	return hosts
}
