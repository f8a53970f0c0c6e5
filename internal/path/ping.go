package path

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"mesh/identity"
)

// ErrNoAnswer reports that a peer answered no ping by any path.
var ErrNoAnswer = errors.New("no answer")

const (
	pingGrace  = 250 * time.Millisecond // Ping waits so long for further answers after the first
	maxPingers = 8                      // calls of Ping for one peer at a time
)

// Pong is the answer of a peer by one path.
type Pong struct {
	Addr    netip.AddrPort // of the peer by UDP, zero by relay
	Region  int            // of the relay, zero by UDP
	Latency time.Duration  // round trip
}

// String returns the path in words, as in "direct 192.0.2.1:41641" or "relay 900".
func (g Pong) String() string {
	if g.Addr.IsValid() {
		return "direct " + g.Addr.String()
	}
	return fmt.Sprintf("relay %d", g.Region)
}

// Ping asks a peer of the netmap by its relay and at every address at which it
// may be, and hands each answer to the function when it comes, the fastest
// first, one path at most once. It counts as traffic: discovery of a direct path
// begins. It returns when all have answered, shortly after the first answer, or
// when ctx ends, five seconds from now at the latest. The error is
// ErrUnknownPeer, ErrNoPath when there was nothing to ask, ErrNoAnswer,
// net.ErrClosed or that of ctx. answer is called from this goroutine.
func (p *Path) Ping(ctx context.Context, key identity.NodePublic, answer func(Pong)) error {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	fail := func(err error) error { return fmt.Errorf("ping %s: %w", key.Short(), err) }
	if ctx.Err() != nil {
		return fail(context.Cause(ctx)) // a quick peer's answer might be taken first
	}
	pe := p.open(key)
	if pe == nil {
		return fail(ErrUnknownPeer)
	}
	pongs := make(chan Pong, maxCandidates+1)
	var out todo
	now := p.now()
	p.mu.Lock()
	switch {
	case pe.gone:
		p.mu.Unlock()
		return fail(ErrUnknownPeer)
	case len(pe.pingers) >= maxPingers:
		p.mu.Unlock()
		return fail(errors.New("too many at once"))
	}
	pe.pingers = append(pe.pingers, pongs)
	defer func() {
		p.mu.Lock()
		pe.pingers = slices.DeleteFunc(pe.pingers, func(c chan Pong) bool { return c == pongs })
		p.mu.Unlock()
	}()
	pe.sent.Store(int64(now))
	pe.ch.askAll(now, !p.cfg.RelayOnly, &p.budget, &out)
	if !p.cfg.RelayOnly {
		pe.ch.sent(now, &p.budget, &out)
		p.wakeEndpointsLocked(now)
	}
	p.settleLocked(pe, now)
	known := !pe.info.Disco.IsZero()
	p.mu.Unlock()
	if !known {
		return fail(fmt.Errorf("%w: the peer takes no pings", ErrNoPath))
	}
	p.perform(pe, &out)

	asked := make(map[netip.AddrPort]bool) // and whether it answered
	for _, pg := range out.pings {
		if pg.to.IsValid() || p.relayOf(pe) != 0 {
			asked[pg.to] = false
		}
	}
	if len(asked) == 0 {
		return fail(ErrNoPath)
	}
	var grace <-chan time.Time
	for answered := 0; answered < len(asked); {
		select {
		case g := <-pongs:
			if done, ok := asked[g.Addr]; !ok || done {
				continue
			}
			asked[g.Addr] = true
			if answered++; answered == 1 {
				t := time.NewTimer(pingGrace)
				defer t.Stop()
				grace = t.C
			}
			answer(g)
		case <-grace:
			return nil
		case <-p.ctx.Done():
			return fail(net.ErrClosed)
		case <-ctx.Done():
			if err := context.Cause(ctx); grace == nil && !errors.Is(err, context.DeadlineExceeded) {
				return fail(err)
			} else if grace == nil {
				return fail(fmt.Errorf("%w by %d paths: %w", ErrNoAnswer, len(asked), err))
			}
			return nil
		}
	}
	return nil
}

// askAll pings every address and the relay for a user.
func (c *chooser) askAll(now instant, direct bool, b *budget, out *todo) {
	c.pingRelay(now, out)
	if direct {
		c.ping(now, 0, b, out)
	}
	for _, pg := range out.pings {
		pr := c.pending[pg.tx]
		pr.asked = true
		c.pending[pg.tx] = pr
	}
}

// tellPingersLocked hands an answer to those who wait for it.
func (p *Path) tellPingersLocked(pe *peer, g Pong) {
	for _, c := range pe.pingers {
		select {
		case c <- g:
		default: // it has had more answers than paths
		}
	}
}
