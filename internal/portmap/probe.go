package portmap

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"
)

const (
	// discoverTime is how long a search listens: gateways may take a second to
	// answer a search by multicast.
	discoverTime = 1500 * time.Millisecond
	// quickGrace is how long a search that has found something waits for
	// something better.
	quickGrace = 150 * time.Millisecond
	// maxLocations bounds the descriptions that are fetched.
	maxLocations = 4
)

// discoverSends are the times at which the questions of a search are sent.
var discoverSends = []time.Duration{0, 300 * time.Millisecond, 800 * time.Millisecond}

// Result says what a gateway speaks.
type Result struct {
	PMP, PCP, UPnP bool
	// Gateway is who was asked, zero if none is known.
	Gateway netip.Addr
	// External is the gateway's own external address by NAT-PMP or UPnP, zero
	// if it did not tell. A private one means another NAT behind it.
	External netip.Addr
}

// Probe asks the gateway what it speaks and changes nothing. It takes about a
// second and a half, more with a slow UPnP gateway. The error says why there
// is nobody to ask; a gateway that does not answer is none.
func (c *Client) Probe(ctx context.Context) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	l, err := c.network()
	if err != nil {
		return Result{}, err
	}
	f, err := c.discover(ctx, l, false)
	r := Result{PMP: f.pmp, PCP: f.pcp, UPnP: len(f.services) > 0, Gateway: l.gw, External: f.external}
	if errors.Is(err, errNothing) {
		err = nil
	}
	return r, err
}

// finding is the result of a search.
type finding struct {
	pcp, pmp  bool
	locations []endpoint // of UPnP descriptions
	services  []service  // that can map ports, the best one first
	external  netip.Addr
}

func (f *finding) protocols() (list []Protocol) {
	if f.pcp {
		list = append(list, PCP)
	}
	if f.pmp {
		list = append(list, PMP)
	}
	if len(f.services) > 0 {
		list = append(list, UPnP)
	}
	return list
}

// discover asks by all protocols at once. A quick search ends when it has
// found something; any other wants to know everything. The error is errNothing
// if there is nothing.
func (c *Client) discover(ctx context.Context, l link, quick bool) (finding, error) {
	var f finding
	if err := c.listenForAnswers(ctx, l, quick, &f); err != nil {
		return f, cause(ctx, err)
	}
	if !quick || !f.pcp && !f.pmp {
		c.describe(ctx, l, &f)
	}
	if err := ctx.Err(); err != nil {
		return f, err
	}
	if len(f.protocols()) == 0 {
		return f, errNothing
	}
	return f, nil
}

// listenForAnswers asks and collects the datagrams that come back.
func (c *Client) listenForAnswers(ctx context.Context, l link, quick bool, f *finding) error {
	s, err := c.open(ctx, l)
	if err != nil {
		return err
	}
	defer s.close()
	began := time.Now()
	end := began.Add(discoverTime)
	for sent := 0; ; {
		if sent < len(discoverSends) && time.Since(began) >= discoverSends[sent] {
			sent++
			if err := c.askAll(s, l, f); err != nil && sent == len(discoverSends) {
				return err
			}
		}
		deadline := end
		if sent < len(discoverSends) {
			if next := began.Add(discoverSends[sent]); next.Before(end) {
				deadline = next
			}
		}
		b, from, err := s.receive(deadline)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !time.Now().Before(end) {
				return nil
			}
			continue
		case err != nil:
			return err
		case from.Addr() != l.gw || !f.take(c, l, b, from.Port()):
			continue
		}
		switch {
		case f.pcp && (quick || f.pmp && len(f.locations) > 0):
			return nil
		case quick && time.Until(end) > quickGrace:
			end = time.Now().Add(quickGrace)
		}
	}
}

// askAll sends the questions that have no answer yet. It fails if none could
// be sent.
func (c *Client) askAll(s *socket, l link, f *finding) error {
	var errs []error
	sent := false
	send := func(to netip.AddrPort, b []byte) {
		if err := s.send(to, b); err != nil {
			errs = append(errs, err)
		} else {
			sent = true
		}
	}
	gw := netip.AddrPortFrom(l.gw, gatewayPort)
	if !f.pcp {
		send(gw, pcpRequest(pcpOpAnnounce, l.self, 0))
	}
	if l.gw.Is4() {
		if !f.pmp {
			send(gw, pmpAddressRequest())
		}
		if len(f.locations) == 0 {
			for _, target := range ssdpTargets {
				send(ssdpGroup, ssdpSearch(target))
				// Not every gateway hears the group, across some access points.
				send(netip.AddrPortFrom(l.gw, ssdpGroup.Port()), ssdpSearch(target))
			}
		}
	}
	if sent {
		return nil
	}
	return errors.Join(errs...)
}

// take notes an answer of the gateway and reports whether it said something
// new.
func (f *finding) take(c *Client, l link, b []byte, port uint16) bool {
	if port != gatewayPort {
		at, ok := parseSSDP(b, l.gw)
		if ok = ok && len(f.locations) < maxLocations && !slices.Contains(f.locations, at); ok {
			f.locations = append(f.locations, at)
		}
		return ok
	}
	if a, ok := parsePCP(b); ok && a.op == pcpOpAnnounce && a.result == pcpOK && !f.pcp {
		f.pcp = true
		c.noteEpoch(l, PCP, a.epoch)
		return true
	}
	a, ok := parsePMP(b)
	if !ok || a.op != pmpOpAddress || a.result != pmpOK && a.result != pmpNetworkFailure || f.pmp {
		return false
	}
	f.pmp = true
	if sensible(netip.AddrPortFrom(a.address, 1)) {
		f.external = a.address
	}
	c.noteEpoch(l, PMP, a.epoch)
	return true
}

// noteEpoch has the lease renewed at once if the gateway lost it.
func (c *Client) noteEpoch(l link, p Protocol, epoch uint32) {
	c.mu.Lock()
	cur := c.lease
	lost := cur != nil && c.link == l && cur.protocol == p && restarted(cur.epoch, cur.got, epoch, time.Now())
	if lost {
		c.renew = time.Time{}
	}
	c.mu.Unlock()
	if lost {
		c.poke()
	}
}

// describe finds out what a UPnP gateway can do.
func (c *Client) describe(ctx context.Context, l link, f *finding) {
	for _, at := range f.locations {
		list, err := c.fetchServices(ctx, at)
		if err != nil {
			c.log.Debug("UPnP description", zap.Stringer("gateway", l.gw), zap.Error(err))
			continue
		}
		for _, s := range list {
			addr, err := c.externalUPnP(ctx, s)
			if err != nil {
				c.log.Debug("UPnP service", zap.Stringer("gateway", l.gw), zap.Error(err))
				continue
			}
			f.services = append(f.services, s)
			if !f.external.IsValid() {
				f.external = addr
			}
			return
		}
	}
}
