package path

import (
	"errors"
	"reflect"
	"time"

	"mesh/control/wire"
)

// choices returns the region as often as it has relays, each time with one of
// them: in the map's order, but those that failed lately behind the others.
func (r *relay) choices(except *wire.DERPNode) []*wire.DERPRegion {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.set.now()
	var good, bad []*wire.DERPRegion
	for _, n := range r.def.Nodes {
		if n == nil || n.STUNOnly || except != nil && reflect.DeepEqual(n, except) {
			continue
		}
		one := *r.def
		one.Nodes = []*wire.DERPNode{n}
		if until, ok := r.avoid[n.Name]; ok && now < until {
			bad = append(bad, &one)
		} else {
			good = append(good, &one)
		}
	}
	return append(good, bad...)
}

// connect connects to a relay of the region, other than the one excepted.
func (r *relay) connect(except *wire.DERPNode) (*liveRelay, error) {
	choices := r.choices(except)
	if len(choices) == 0 && except == nil {
		r.mu.Lock()
		choices = []*wire.DERPRegion{r.def} // for dial to say what is wrong
		r.mu.Unlock()
	}
	var errs []error
	for _, def := range choices {
		keys := r.set.keys.Load()
		conn, err := r.set.dial(r.ctx, def)
		if err == nil {
			l := &liveRelay{conn: conn, keys: keys}
			if len(def.Nodes) > 0 {
				l.node = def.Nodes[0]
			}
			return l, nil
		}
		errs = append(errs, err)
		if r.ctx.Err() != nil {
			return nil, err
		}
		if len(choices) > 1 {
			r.shun(def.Nodes[0])
		}
	}
	if len(errs) == 1 {
		return nil, errs[0]
	}
	return nil, errors.Join(append(errs, errNoRelayNode)...)
}

// shun puts a relay behind the others of its region for a while.
func (r *relay) shun(n *wire.DERPNode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n == nil || len(r.def.Nodes) < 2 {
		return
	}
	if r.avoid == nil {
		r.avoid = make(map[string]instant)
	}
	now := r.set.now()
	for name, until := range r.avoid {
		if now >= until {
			delete(r.avoid, name)
		}
	}
	r.avoid[n.Name] = now + avoidFor
}

// redefineLocked takes what a new map says about the region. A connection to a
// relay that it does not name any more is left for another. relaySet.mu is held.
func (r *relay) redefineLocked(def *wire.DERPRegion) {
	r.mu.Lock()
	same := reflect.DeepEqual(def, r.def)
	r.def = def
	r.mu.Unlock()
	if same {
		return
	}
	if l := r.live.Load(); l != nil {
		r.leaveUnnamedLocked(l)
		return
	}
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// leaveUnnamed leaves a connection if the map that came while it was made does
// not name its relay.
func (r *relay) leaveUnnamed(l *liveRelay) {
	r.set.mu.RLock()
	defer r.set.mu.RUnlock()
	if r.live.Load() == l {
		r.leaveUnnamedLocked(l)
	}
}

// leaveUnnamedLocked leaves a connection for another if the map does not name its
// relay. relaySet.mu is held.
func (r *relay) leaveUnnamedLocked(l *liveRelay) {
	r.mu.Lock()
	nodes := r.def.Nodes
	r.mu.Unlock()
	named := len(nodes) == 0 && l.node == nil
	for _, n := range nodes {
		named = named || reflect.DeepEqual(n, l.node)
	}
	if !named {
		r.moveLocked(l, func() { l.conn.Close() })
	}
}

// restarting is called when the relay says that it is about to go: to another
// one of the region if there is one, to another region otherwise.
func (r *relay) restarting(l *liveRelay, in time.Duration) {
	if r.live.Load() != l {
		return
	}
	r.shun(l.node)
	home := func() { r.set.events.relayRestarting(r.id, in) }
	if len(r.choices(l.node)) == 0 {
		home()
		return
	}
	r.set.mu.RLock()
	defer r.set.mu.RUnlock()
	r.moveLocked(l, home)
}

// moveLocked leaves a connection for one to another relay of the region once
// there is one; fail is called if there is none. While that is under way nothing
// else moves: what the map says meanwhile is looked at when it is over.
// relaySet.mu is held.
func (r *relay) moveLocked(l *liveRelay, fail func()) {
	if r.set.closed || r.moving.Swap(true) {
		return
	}
	r.set.wg.Go(func() {
		next, err := r.connect(l.node)
		if err != nil {
			r.moving.Store(false)
			if r.ctx.Err() == nil {
				fail()
			}
			return
		}
		moved := r.replace(l, next, lingerFor)
		r.moving.Store(false)
		if moved {
			r.set.events.relayMoved(r.id)
			r.leaveUnnamed(next)
			r.run(next)
		}
	})
}

// replace puts a connection in use in the place of another, which is read for a
// while. It reports false, and closes the new one, if the other has ended
// meanwhile: whoever noticed connects again.
func (r *relay) replace(l, next *liveRelay, linger time.Duration) bool {
	timer := time.AfterFunc(linger, func() { l.conn.Close() })
	r.mu.Lock()
	home := r.home
	moved := r.live.Load() == l
	if moved { // else it has the timer of who left it before
		l.linger = timer
		moved = r.live.CompareAndSwap(l, next)
	}
	r.mu.Unlock()
	if !moved {
		timer.Stop()
		next.conn.Close()
		return false
	}
	r.failing.Store(false)
	if home {
		next.conn.NotePreferred(true)
	}
	l.conn.NotePreferred(false)
	r.flush(next.conn)
	r.leaveIfOld(next)
	return true
}
