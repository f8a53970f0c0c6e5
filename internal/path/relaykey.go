package path

import (
	"context"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// ownKey is a key of the node's.
type ownKey struct {
	private identity.NodePrivate
	public  identity.NodePublic
}

func newOwnKey(k identity.NodePrivate) *ownKey { return &ownKey{k, k.Public()} }

// AddKey connects to the relays in use with another key of the node's, besides
// the one that it has: what is sent to either is received. It waits until all
// are connected, but not longer than ctx.
func (p *Path) AddKey(ctx context.Context, k identity.NodePrivate) {
	p.relays.prepare(ctx, func(ctx context.Context, def *wire.DERPRegion) (relayConn, error) {
		return p.dial(ctx, def, k)
	})
}

// UseKey makes a key, of AddKey, the one by which the node sends. Connections
// with the former one are read for wire.KeptKeyFor: peers may not know the new one
// yet.
func (p *Path) UseKey(k identity.NodePrivate) {
	if own := newOwnKey(k); own.public != p.own.Swap(own).public {
		p.relays.switchOver()
	}
}

// prepare makes a second connection to each relay that is connected, which is
// read from then on, and sent by after switchOver.
func (s *relaySet) prepare(ctx context.Context, dial func(context.Context, *wire.DERPRegion) (relayConn, error)) {
	done := make(chan struct{})
	n := 0
	s.mu.RLock()
	if !s.closed {
		for _, r := range s.regions {
			if l := r.live.Load(); l != nil {
				n++
				s.wg.Go(func() {
					r.prepare(l, dial)
					select {
					case done <- struct{}{}:
					case <-ctx.Done():
					case <-s.ctx.Done():
					}
				})
			}
		}
	}
	s.mu.RUnlock()
	for range n {
		select {
		case <-done:
		case <-ctx.Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// prepare makes a connection to the same relay as another.
func (r *relay) prepare(l *liveRelay, dial func(context.Context, *wire.DERPRegion) (relayConn, error)) {
	r.mu.Lock()
	def := *r.def
	r.mu.Unlock()
	if l.node != nil {
		def.Nodes = []*wire.DERPNode{l.node}
	}
	conn, err := dial(r.ctx, &def)
	if err != nil {
		return // switchOver connects anew
	}
	// One that is never used does not stay for ever.
	next := &liveRelay{conn: conn, node: l.node, keys: r.set.keys.Load() + 1, linger: time.AfterFunc(wire.KeptKeyFor, func() { conn.Close() })}
	if old := r.next.Swap(next); old != nil {
		old.conn.Close()
	}
	r.set.mu.RLock() // so that close does not begin to wait before Add
	defer r.set.mu.RUnlock()
	if r.set.closed {
		conn.Close()
		return
	}
	r.set.wg.Go(func() { r.run(next) })
}

// switchOver puts the connections of prepare in use, in place of those that they
// were made beside; where there is none the relay is connected anew.
func (s *relaySet) switchOver() {
	s.keys.Add(1)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return
	}
	for _, r := range s.regions {
		next, l := r.next.Swap(nil), r.live.Load()
		switch {
		case l == nil && next != nil:
			s.wg.Go(func() { next.conn.Close() })
		case l == nil:
		case next == nil || !next.linger.Stop():
			// It has not connected, or did not stay.
			s.wg.Go(func() { l.conn.Close() })
		case !r.replace(l, next, wire.KeptKeyFor):
		case next.ended.Load() && r.live.CompareAndSwap(next, nil):
			// It ended while it was not in use yet, and whoever read it has gone.
			s.wg.Go(func() { r.run(nil) })
		default:
			r.leaveUnnamedLocked(next)
		}
	}
}

// leaveIfOld ends a connection that was being made with the key before while
// that was replaced.
func (r *relay) leaveIfOld(l *liveRelay) {
	if l.keys != r.set.keys.Load() {
		r.set.wg.Go(func() { l.conn.Close() })
	}
}
