package path

import (
	"net/netip"
	"testing"
	"time"

	"mesh/internal/disco"
)

// meetTest is two choosers and the relay between them.
type meetTest struct {
	*testing.T
	a, b   chooserTest
	delay  time.Duration // of the relay, one way
	events []meetEvent
	began  [2]instant // first ping to a public address
}

type meetEvent struct {
	at  instant
	to  int
	msg *disco.Meet // nil: a CallMeMaybe
}

const meetA, meetB = "192.0.2.1:1", "192.0.2.2:1"

func (m *meetTest) side(i int) *chooserTest { return []*chooserTest{&m.a, &m.b}[i] }

// flush carries what a side wants to send.
func (m *meetTest) flush(i int, now instant) {
	s := m.side(i)
	list := []netip.AddrPort{ap([]string{meetA, meetB}[i]), ap("10.0.0.1:1")}
	if s.out.meet != nil {
		msg := *s.out.meet
		if msg.Phase != disco.MeetStart {
			msg.Endpoints = list
		}
		if msg.Phase == disco.MeetAsk {
			s.c.askSent(msg.ID, now)
		}
		m.events = append(m.events, meetEvent{now + m.delay, 1 - i, &msg})
	}
	if s.out.call {
		m.events = append(m.events, meetEvent{now + m.delay, 1 - i, nil})
	}
	for _, pg := range s.out.pings {
		if pg.to.IsValid() && !pg.to.Addr().IsPrivate() && m.began[i] == 0 {
			m.began[i] = now
		}
	}
	s.out = todo{}
}

// run plays the events, millisecond by millisecond.
func (m *meetTest) run(d time.Duration, do func(now instant)) {
	for now := start; now < start+d; now += ms {
		do(now)
		for i := range 2 {
			s := m.side(i)
			for k := 0; k < len(m.events); k++ {
				e := m.events[k]
				if e.to != i || e.at > now {
					continue
				}
				m.events = append(m.events[:k], m.events[k+1:]...)
				k--
				if e.msg == nil {
					s.c.callMeMaybe([]netip.AddrPort{ap([]string{meetB, meetA}[i])}, now, &s.b, &s.out)
				} else {
					s.c.met(*e.msg, i == 0, now, &s.b, &s.out)
				}
				m.flush(i, now)
			}
			s.c.tick(now, now, 0, &s.b, &s.out)
			m.flush(i, now)
		}
	}
}

func newMeetTest(t *testing.T, delay time.Duration) *meetTest {
	m := &meetTest{T: t, delay: delay}
	for i := range 2 {
		s := m.side(i)
		*s = *newChooserTest(t, []string{meetB, meetA}[i], "10.0.0.9:9")
		s.c.meet.able = true
	}
	return m
}

func TestMeeting(t *testing.T) {
	for _, delay := range []time.Duration{2 * ms, 40 * ms, 150 * ms} {
		for _, name := range []string{"a", "b", "together"} {
			m := newMeetTest(t, delay)
			m.run(2*time.Second, func(now instant) {
				for i, who := range []string{"a", "b"} {
					if now == start && (name == who || name == "together") {
						s := m.side(i)
						s.c.sent(now, &s.b, &s.out)
						if len(s.out.pings) != 1 || !s.out.pings[0].to.Addr().IsPrivate() || s.out.meet == nil {
							t.Fatalf("%s: %+v", who, s.out)
						}
						m.flush(i, now)
					}
				}
			})
			if m.began[0] == 0 || m.began[1] == 0 {
				t.Fatalf("%v %s: never began: %v", delay, name, m.began)
			}
			if skew := (m.began[0] - m.began[1]).Abs(); skew > 2*ms {
				t.Errorf("%v %s: began %v apart", delay, name, skew)
			}
			if d := max(m.began[0], m.began[1]) - start; d > 4*delay+5*ms {
				t.Errorf("%v %s: began after %v", delay, name, d)
			}
			for i := range 2 {
				if mt := m.side(i).c.meet; mt.phase != 0 || mt.stock || !mt.ours {
					t.Errorf("%v %s: %+v", delay, name, mt)
				}
			}
		}
	}
}

func TestMeetingWithStockPeer(t *testing.T) {
	ct := newChooserTest(t, meetB)
	c := &ct.c
	c.meet.able = true
	c.sent(ct.now, &ct.b, &ct.out)
	if ct.out.meet == nil || !ct.out.call || len(ct.out.pings) != 0 {
		t.Fatalf("%+v", ct.out)
	}
	ct.out = todo{}
	ct.pass(meetWait, true)
	if len(ct.out.pings) == 0 || !ct.out.call || !c.meet.stock {
		t.Fatalf("no answer: %+v", ct.out)
	}
	// The next session does not wait for it.
	ct.pass(sessionTimeout+time.Minute, false)
	ct.out = todo{}
	c.sent(ct.now, &ct.b, &ct.out)
	if ct.out.meet != nil || len(ct.out.pings) == 0 {
		t.Errorf("asked again: %+v", ct.out)
	}
}

func TestMeetingEndsWhenPinged(t *testing.T) {
	ct := newChooserTest(t, meetB)
	c := &ct.c
	c.meet.able = true
	c.sent(ct.now, &ct.b, &ct.out)
	ct.out = todo{}
	ct.now += 10 * ms
	if !c.pinged(ap(meetB), disco.NewTxID(), ct.now, &ct.b, &ct.out) || len(ct.out.pings) != 1 || c.meet.phase != 0 {
		t.Errorf("%+v %+v", ct.out, c.meet)
	}
}

func TestMeetingHostile(t *testing.T) {
	ct := newChooserTest(t, meetB)
	c := &ct.c
	c.meet.able = true
	meet := func(p disco.Phase, id disco.TxID) disco.Meet {
		return disco.Meet{Phase: p, ID: id, Endpoints: []netip.AddrPort{ap("203.0.113.66:53")}, Delay: time.Hour}
	}
	// Steps that nobody waits for do nothing.
	c.met(meet(disco.MeetStart, disco.NewTxID()), false, ct.now, &ct.b, &ct.out)
	c.met(meet(disco.MeetAnswer, disco.NewTxID()), false, ct.now, &ct.b, &ct.out)
	c.met(meet(99, disco.NewTxID()), false, ct.now, &ct.b, &ct.out)
	if len(ct.out.pings) != 0 || ct.out.meet != nil || len(c.candidates) != 1 {
		t.Fatalf("%+v", ct.out)
	}
	// A flood of asks is answered now and then, and never holds us back for good.
	pings, answers := 0, 0
	for range 1000 {
		ct.out = todo{}
		c.met(meet(disco.MeetAsk, disco.NewTxID()), false, ct.now, &ct.b, &ct.out)
		if ct.out.meet != nil {
			answers++
		}
		ct.now += 10 * ms
		c.tick(ct.now, ct.now, 0, &ct.b, &ct.out)
		pings += len(ct.out.pings)
	}
	if limit := forcedBurst + 10/2 + 1; answers == 0 || answers > limit {
		t.Errorf("%d answers", answers)
	}
	if pings == 0 || pings > 40 {
		t.Errorf("%d pings for 1000 asks", pings)
	}
	// An answer to our ask with a lie about its delay makes us start at once, no more.
	ct.now += meetAgain
	c.ask(ct.now, &ct.out)
	id := c.meet.id
	ct.now += 100 * ms
	c.met(meet(disco.MeetAnswer, id), false, ct.now, &ct.b, &ct.out)
	if c.meet.until != ct.now {
		t.Errorf("start in %v", c.meet.until-ct.now)
	}
}
