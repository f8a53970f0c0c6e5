package netmap

import (
	"time"

	"mesh/control/wire"
)

// ClockOffset returns how far control's clock is ahead of ours, 0 if that is a
// minute at most.
func (m *Map) ClockOffset() time.Duration { return m.offset }

// sane is a moment before which no clock can be right.
var sane = time.Date(2023, 1, 10, 0, 0, 0, 0, time.UTC)

// clock returns the time by which keys expire at the moment now of the local
// clock: that of control, which set the expiry, or the local one where control's
// is absurd. It reports false if both are.
func (m *Map) clock(now time.Time) (time.Time, bool) {
	if at := now.Add(m.offset); at.After(sane) {
		return at, true
	}
	return now, now.After(sane)
}

// Expired reports whether the node's key is no longer good at the moment now of
// the local clock. Control's word alone decides while no clock can be right, and
// of an expiry that was set by no clock that is.
func (m *Map) Expired(n *wire.Node, now time.Time) bool {
	if n.Expired {
		return true
	}
	at, ok := m.clock(now)
	return ok && n.KeyExpiry.After(sane) && !at.Before(n.KeyExpiry)
}

// NextExpiry returns the first moment after now, by the local clock, at which
// the key of the own node or of a peer expires; the zero time if none does, or
// no clock can be right.
func (m *Map) NextExpiry(now time.Time) time.Time {
	at, ok := m.clock(now)
	if !ok {
		return time.Time{}
	}
	offset := at.Sub(now)
	var next time.Time
	look := func(n *wire.Node) {
		if !n.KeyExpiry.After(sane) || m.Expired(n, now) {
			return
		}
		if at := n.KeyExpiry.Add(-offset); next.IsZero() || at.Before(next) {
			next = at
		}
	}
	look(m.Self())
	switch soonest := m.expiry.soonest; {
	case m.expiry.count == 0:
	case soonest.After(at):
		look(&wire.Node{KeyExpiry: soonest})
	default: // some have expired and do not say so
		for p := range m.Peers() {
			look(p.Node)
		}
	}
	return next
}

// expiries says when the first of some keys expires, so that it need not be
// looked for in every change of a large map.
type expiries struct {
	soonest time.Time
	count   int // how many expire then; 0 = none expires
	unknown bool
}

// expires reports whether the key of n will expire by itself.
func expires(n *wire.Node) bool { return !n.Expired && n.KeyExpiry.After(sane) }

func (x *expiries) add(n *wire.Node) {
	switch {
	case !expires(n):
	case x.count == 0 || n.KeyExpiry.Before(x.soonest):
		x.soonest, x.count = n.KeyExpiry, 1
	case n.KeyExpiry.Equal(x.soonest):
		x.count++
	}
}

func (x *expiries) drop(n *wire.Node) {
	if expires(n) && x.count > 0 && n.KeyExpiry.Equal(x.soonest) {
		x.count--
		x.unknown = x.unknown || x.count == 0
	}
}

// expiries returns what is true of the peers as they are now.
func (e *edit) expiries() expiries {
	if !e.expiry.unknown {
		return e.expiry
	}
	var x expiries
	for _, p := range e.peers.all() {
		x.add(p.Node)
	}
	return x
}

// Renewal returns when the node should make itself another key, by the local
// clock; the zero time if it need not.
func (m *Map) Renewal(now time.Time) time.Time {
	at, ok := m.clock(now)
	if renew := m.Self().MeshRenew; ok && renew != nil && renew.After(sane) {
		return renew.Add(now.Sub(at))
	}
	return time.Time{}
}

// OwnExpiry returns when the node's own key expires, by the local clock; the zero
// time if it does not.
func (m *Map) OwnExpiry() time.Time {
	if expiry := m.Self().KeyExpiry; expiry.After(sane) {
		return expiry.Add(-m.offset)
	}
	return time.Time{}
}

// MaxStale returns how long the node may go on without its control server by the
// attributes that it has: the shortest of them, 0 = for ever.
func (m *Map) MaxStale() time.Duration {
	var least time.Duration
	for attr := range m.Self().CapMap {
		if d, ok := wire.AttrSpan(attr, wire.AttrMaxStale); ok && d != 0 && (least == 0 || d < least) {
			least = d
		}
	}
	return least
}

// Expire returns the map in which the peers whose keys are no longer good at the
// moment now of the local clock say so in Expired: control does not have to be
// there for that. It returns m itself where they all do.
func (m *Map) Expire(now time.Time) *Map {
	if at, ok := m.clock(now); !ok || m.expiry.count == 0 || at.Before(m.expiry.soonest) {
		return m
	}
	var ids []NodeID
	for p := range m.Peers() {
		if !p.Expired && m.Expired(p.Node, now) {
			ids = append(ids, p.ID)
		}
	}
	if len(ids) == 0 {
		return m
	}
	e := newEdit(&m.index, m.Self())
	for _, id := range ids {
		e.patch(id, func(n *wire.Node) { n.Expired = true })
	}
	next := *m
	next.index = e.finish(new(Delta))
	return &next
}
