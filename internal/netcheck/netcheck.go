// Package netcheck makes one report on the network that a node is in: whether
// UDP works, under which addresses others see the node, what its NAT does, how
// far the relays are and which of them is to be home.
//
// It asks the relays of the relay map, and nobody else: by STUN, by HTTPS where
// no UDP passes, and by plain HTTP for a captive portal if a relay offers that.
// It keeps nothing between reports; who makes several hands in the earlier
// ones. Answers count only from the server that was asked, with the transaction
// ID that it was asked with.
package netcheck

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/internal/hostaddr"
)

const (
	// DefaultTimeout bounds a report.
	DefaultTimeout = 5 * time.Second
	// Memory is how long measurements count for the choice of home, and how
	// long after a full report others may be incremental.
	Memory = 5 * time.Minute
)

// Config says whom to ask and how.
type Config struct {
	// Relays is the relay map. It is not changed.
	Relays *wire.DERPMap
	// Previous are earlier reports of the same network, in order. With a full
	// one of the last minutes among them the new one is incremental: it asks
	// the nearest regions and the home region only. The preferred relay of the
	// last one is kept unless another is clearly better.
	Previous []*Report
	// HomeAlive says that the connection to the preferred relay of the last
	// report is known to work: it counts as answering even if STUN is lost.
	HomeAlive bool
	// Full makes a full report in any case.
	Full bool
	// PortMapping asks the gateway what it speaks; nil = not asked. Only full
	// reports do.
	PortMapping func(ctx context.Context) PortMapping
	// ListenUDP opens a UDP socket; nil means net.ListenConfig. It is called
	// for udp4, for udp6, and by a full report once more for udp4, as a second
	// host behind the NAT. What it returns is closed at the end, and ReadFrom
	// must then fail with net.ErrClosed. Sources that it returns must be
	// *net.UDPAddr.
	ListenUDP func(ctx context.Context, network, addr string) (net.PacketConn, error)
	// DialTCP connects to relays; nil means net.Dialer.
	DialTCP func(ctx context.Context, network, addr string) (net.Conn, error)
	// Resolve looks up relays of which the map knows only the name; nil means
	// the host's resolver. The network is "ip4" or "ip6".
	Resolve func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// Interfaces lists the addresses of the host's interfaces that are up; nil
	// asks the system.
	Interfaces func() ([]netip.Prefix, error)
	// RootCAs verify the relays; nil means those of the system.
	RootCAs *x509.CertPool
	// Timeout bounds the report; 0 means DefaultTimeout.
	Timeout time.Duration
	// Logger receives what went wrong, at debug level; nil is silent.
	Logger *zap.Logger
}

// Report describes a network at one moment. A nil pointer means that it is not
// known.
type Report struct {
	Time time.Time `json:"time"`
	// Full says that all regions were asked.
	Full bool `json:"full"`
	// UDP says whether UDP passes to the relays and back.
	UDP  *bool  `json:"udp,omitempty"`
	IPv4 Family `json:"ipv4"`
	IPv6 Family `json:"ipv6"`
	// NAT says that the IPv4 address that relays see is none of this host.
	NAT *bool `json:"nat,omitempty"`
	// MappingVaries says that different destinations see different IPv4
	// addresses or ports, which makes direct paths hard.
	MappingVaries *bool `json:"mappingVariesByDestination,omitempty"`
	// Hairpin says that hosts behind the NAT reach each other by its address.
	Hairpin *bool `json:"hairpin,omitempty"`
	// PortMapping is what the gateway speaks, nil if it was not asked.
	PortMapping *PortMapping `json:"portMapping,omitempty"`
	// CaptivePortal says that somebody in between answers in a relay's name,
	// such as a network that wants a login first. Only relays that offer plain
	// HTTP are asked.
	CaptivePortal *bool `json:"captivePortal,omitempty"`
	// Preferred is the region that should be home, 0 if nothing favours one.
	Preferred int `json:"preferredRelay,omitempty"`
	// Regions are those that were asked, in ascending order of ID.
	Regions []Region `json:"regions"`
}

// Family is what a report knows of one version of IP.
type Family struct {
	// Available says that an interface has an address of it with which hosts
	// elsewhere can be reached.
	Available bool `json:"available"`
	// Works says that a relay answered by it.
	Works *bool `json:"works,omitempty"`
	// Global is the address and port of the asking socket as a relay saw it.
	Global netip.AddrPort `json:"global,omitzero"`
}

// PortMapping is what the gateway of the local network speaks.
type PortMapping struct {
	PCP  bool `json:"pcp"`
	PMP  bool `json:"natPMP"`
	UPnP bool `json:"upnp"`
	// External is the gateway's own address, if it told.
	External netip.Addr `json:"external,omitzero"`
	// Error says why nobody was asked, "" otherwise.
	Error string `json:"error,omitempty"`
}

// Region is the way to a region's relays.
type Region struct {
	ID   int    `json:"region"`
	Code string `json:"code,omitempty"`
	Name string `json:"name,omitempty"`
	// V4 and V6 are the times of a round trip by UDP, 0 = no answer.
	V4 Latency `json:"ipv4Milliseconds,omitzero"`
	V6 Latency `json:"ipv6Milliseconds,omitzero"`
	// HTTPS is that of a request by HTTPS, measured where no UDP passes.
	HTTPS Latency `json:"httpsMilliseconds,omitzero"`
	// Error says why HTTPS gave no answer, "" if it did or was not asked.
	Error string `json:"error,omitempty"`
}

// Best returns the shortest of the latencies, 0 = none was measured.
func (g Region) Best() Latency {
	var best Latency
	for _, l := range []Latency{g.V4, g.V6, g.HTTPS} {
		if l > 0 && (best == 0 || l < best) {
			best = l
		}
	}
	return best
}

// Latency is the time of a round trip. In JSON it is a number of milliseconds.
type Latency time.Duration

// String returns milliseconds for people, as in "12.3 ms".
func (l Latency) String() string { return fmt.Sprintf("%.1f ms", l.milliseconds()) }

func (l Latency) milliseconds() float64 {
	return float64(time.Duration(l).Microseconds()) / 1000
}

// MarshalJSON writes milliseconds.
func (l Latency) MarshalJSON() ([]byte, error) { return json.Marshal(l.milliseconds()) }

// UnmarshalJSON reads milliseconds.
func (l *Latency) UnmarshalJSON(b []byte) error {
	var ms float64
	if err := json.Unmarshal(b, &ms); err != nil {
		return err
	}
	if !(ms >= 0 && ms < math.MaxInt64/float64(time.Millisecond)) {
		return fmt.Errorf("latency of %v ms", ms)
	}
	*l = Latency(ms * float64(time.Millisecond))
	return nil
}

// NetInfo returns the report in the form that control hears.
func (r *Report) NetInfo() wire.NetInfo {
	n := wire.NetInfo{
		MappingVariesByDestIP: r.MappingVaries,
		WorkingIPv6:           r.IPv6.Works,
		OSHasIPv6:             &r.IPv6.Available,
		WorkingUDP:            r.UDP,
		PreferredDERP:         r.Preferred,
	}
	if p := r.PortMapping; p != nil && p.Error == "" {
		n.PCP, n.PMP, n.UPnP = &p.PCP, &p.PMP, &p.UPnP
	}
	for _, g := range r.Regions {
		for family, l := range map[string]Latency{"v4": g.V4, "v6": g.V6} {
			if l > 0 {
				if n.DERPLatency == nil {
					n.DERPLatency = make(map[string]float64)
				}
				n.DERPLatency[fmt.Sprintf("%d-%s", g.ID, family)] = time.Duration(l).Seconds()
			}
		}
	}
	return n
}

// errNoRelays is what Run says of an empty map.
var errNoRelays = errors.New("network report: the relay map has no region that may be asked")

// Run makes a report. It fails if there is nobody to ask, no socket can be had,
// or ctx ends; whatever the network does is part of the report.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.ListenUDP == nil {
		cfg.ListenUDP = new(net.ListenConfig).ListenPacket
	}
	if cfg.DialTCP == nil {
		cfg.DialTCP = new(net.Dialer).DialContext
	}
	if cfg.Resolve == nil {
		cfg.Resolve = net.DefaultResolver.LookupNetIP
	}
	if cfg.Interfaces == nil {
		cfg.Interfaces = hostaddr.Up
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	regions := measured(cfg.Relays)
	if len(regions) == 0 {
		return nil, errNoRelays
	}
	within, cancel := context.WithTimeout(ctx, cfg.Timeout)
	defer cancel()
	c, err := newCheck(within, cfg, regions)
	if err != nil {
		return nil, fmt.Errorf("network report: %w", err)
	}
	r := c.run()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("network report: %w", err)
	}
	r.Preferred = choose(cfg.Relays, r, cfg.Previous, cfg.HomeAlive)
	return r, nil
}
