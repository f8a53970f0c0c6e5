package path

import (
	"net/netip"
	"time"

	"mesh/internal/disco"
)

const (
	meetWait  = 400 * time.Millisecond // for an answer to an ask, or twice for a start
	meetMost  = time.Second            // the longest half round trip that is waited for
	meetAgain = 40 * time.Second       // a router has forgotten by then what confused it
)

// meeting is the agreement with a peer to ping each other's public addresses for
// the first time at the same moment; see EXTENSIONS.md of package disco. Until
// then these addresses are held back: no ping goes there.
type meeting struct {
	able  bool // this node may ask: it is behind a NAT, there is a relay
	ours  bool // the peer has shown that it knows meetings
	stock bool // the peer did not answer

	phase disco.Phase // the last step of this meeting, 0 = there is none
	asked bool        // by us
	id    disco.TxID
	at    instant // when the ask was sent, or came
	until instant // when it is over: held addresses are pinged then
	last  instant // when the last one was over
}

// holds reports whether an address is held back.
func (c *chooser) holds(a netip.AddrPort, k *candidate) bool {
	return c.meet.phase != 0 && a.Addr().Is4() && k.ponged == 0 &&
		!a.Addr().IsPrivate() && !a.Addr().IsLoopback() && !a.Addr().IsLinkLocalUnicast()
}

// ask begins a meeting at the beginning of a session, if that may help.
func (c *chooser) ask(now instant, out *todo) {
	m := &c.meet
	if !m.able || m.stock || m.phase != 0 || c.best.IsValid() || m.last != 0 && now-m.last < meetAgain {
		return
	}
	m.phase, m.asked, m.id, m.at, m.until = disco.MeetAsk, true, disco.NewTxID(), now, now+meetWait
	out.meet = &disco.Meet{Phase: disco.MeetAsk, ID: m.id}
}

// askSent notes when an ask left really: it may have waited for endpoints.
func (c *chooser) askSent(id disco.TxID, now instant) {
	if m := &c.meet; m.phase == disco.MeetAsk && m.id == id {
		m.at, m.until = now, now+meetWait
	}
}

// met takes a step of the peer. first says that our own ask goes before its.
func (c *chooser) met(msg disco.Meet, first bool, now instant, b *budget, out *todo) {
	m := &c.meet
	m.ours, m.stock = true, false
	switch msg.Phase {
	case disco.MeetAsk:
		if m.phase != 0 && m.asked && first || !c.forced.take(now, forcedBurst, forcedEvery) {
			return
		}
		c.called(msg.Endpoints, now, out)
		m.phase, m.asked, m.id, m.at, m.until = disco.MeetAnswer, false, msg.ID, now, now+2*meetWait
		out.meet = &disco.Meet{Phase: disco.MeetAnswer, ID: msg.ID}
		c.ping(now, -1, b, out)
	case disco.MeetAnswer:
		if m.phase != disco.MeetAsk || m.id != msg.ID {
			return
		}
		c.called(msg.Endpoints, now, out)
		half := min(max(now-m.at-msg.Delay, 0)/2, meetMost)
		m.phase, m.until = disco.MeetStart, now+half
		out.meet = &disco.Meet{Phase: disco.MeetStart, ID: m.id}
		c.ping(now, -1, b, out)
	case disco.MeetStart:
		if m.phase == disco.MeetAnswer && m.id == msg.ID {
			m.phase = disco.MeetStart
			c.release(now, b, out)
		}
	}
}

// release ends a meeting: what was held back is pinged.
func (c *chooser) release(now instant, b *budget, out *todo) {
	m := &c.meet
	if m.phase != disco.MeetStart {
		// Nobody answered, or somebody could not wait. A stock peer has acted on
		// our call when we were not ready; it shall do so again.
		m.stock = m.asked && !m.ours
		out.call = c.active
		c.callAt = now
	}
	m.phase, m.last = 0, now
	c.ping(now, quickRetry/2, b, out)
	if c.active {
		c.retries, c.retry = quickRetries, now+quickRetry
	}
}
