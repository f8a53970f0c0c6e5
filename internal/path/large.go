package path

import (
	"net/netip"
	"time"

	"mesh/identity"
	"mesh/internal/disco"
)

// Between nodes of ours datagrams may be larger than the mesh's MTU needs, which
// saves most of the work per packet, where a question of that size was answered
// lately. Nobody else answers such questions. They are asked while there is bulk
// data only.
const (
	jumboDatagram = 9000 - 40 - 8          // for links with jumbo frames
	hugeDatagram  = 60 << 10               // for loopback
	relayDatagram = 16<<10 - 32 - 5        // by relay, where a frame then fills one record
	largeFor      = 3 * time.Second        // an answer speaks for its size so long,
	largeRenew    = time.Second / 2        // and is asked for again after this
	largePatience = 300 * time.Millisecond // beyond which, and two round trips, it is missing
	largeTries    = 3                      // questions without an answer until
	largeAgain    = time.Minute            // a pause before the next ones
)

// sizing finds out how large the datagrams of one way may be. Level 0 is not
// knowing whether the peer is one of ours, level 1 that it is, and those above
// have a size each; by relay level 1 is all. Like chooser it is a function of
// events and time.
type sizing struct {
	way     netip.AddrPort // zero: by relay
	level   int            // the highest that was answered
	until   instant        // that holds until then
	due     instant        // when the answer awaited for it is missing; 0 = none awaited
	missed  int            // answers for it, in a row
	next    instant        // when to ask again
	climb   instant        // when to ask for the level above
	climbed int            // questions for it without an answer
	asked   [4]sizeAsked
	turn    int // of asked
}

type sizeAsked struct {
	tx    disco.TxID
	level int
	at    instant
}

// sizeAsk is a question to send.
type sizeAsk struct {
	tx    disco.TxID
	level int
}

// bytes is how long the question for a level is.
func (a sizeAsk) bytes() int {
	switch a.level {
	case 2:
		return jumboDatagram
	case 3:
		return hugeDatagram
	}
	return disco.SizeLen
}

func (s *sizing) top() int {
	if s.way.IsValid() {
		return 3
	}
	return 1
}

// ask returns what to ask now that there is bulk data to send by a way.
func (s *sizing) ask(way netip.AddrPort, now, patience instant) (out []sizeAsk) {
	if way != s.way {
		*s = sizing{way: way}
	}
	if now < s.next {
		return nil
	}
	s.next = now + largeRenew
	if s.due != 0 && now >= s.due {
		s.due = 0
		if s.missed++; s.missed >= largeTries {
			s.fall(s.level-1, now)
		}
	}
	if s.level == s.top() || s.level > 1 {
		if s.due == 0 {
			s.due = now + patience
		}
		out = append(out, s.question(s.level, now))
	}
	if s.level < s.top() && now >= s.climb {
		if s.climbed++; s.climbed >= largeTries {
			s.climbed, s.climb = 0, now+largeAgain
		}
		out = append(out, s.question(s.level+1, now))
	}
	return out
}

func (s *sizing) question(level int, now instant) sizeAsk {
	a := sizeAsk{disco.NewTxID(), level}
	s.asked[s.turn] = sizeAsked{a.tx, level, now}
	s.turn = (s.turn + 1) % len(s.asked)
	return a
}

// fall goes down to a level, and does not try the one above for a while.
func (s *sizing) fall(level int, now instant) {
	s.level = max(min(s.level, level), 0)
	s.until, s.due, s.missed, s.climbed = 0, 0, 0, 0
	s.climb = now + largeAgain
}

// answered takes the answer to a question.
func (s *sizing) answered(tx disco.TxID, now instant) {
	for i := range s.asked {
		a := &s.asked[i]
		if a.at == 0 || a.tx != tx {
			continue
		}
		a.at = 0
		if a.level > s.level {
			s.level, s.climb, s.climbed, s.next = a.level, now, 0, now
		}
		if a.level == s.level {
			s.until, s.due, s.missed = now+largeFor, 0, 0
		}
		return
	}
}

// largest is what the way takes, and until when.
func (s *sizing) largest() (bytes int, until instant) {
	until = s.until
	if s.due != 0 {
		until = min(until, s.due)
	}
	switch {
	case s.missed > 0: // not before it is answered again
	case !s.way.IsValid() && s.level == 1:
		return relayDatagram, until
	case s.level > 1:
		return sizeAsk{level: s.level}.bytes(), until
	}
	return 0, 0
}

// large is what packets out look at: the largest datagram of a way.
type large struct {
	way   netip.AddrPort
	bytes int
	until instant
}

// DatagramSize returns the largest datagram that is sure to reach a peer by the
// way that Send takes now, 0 for what the mesh's MTU makes. It is to be asked
// when there is bulk data to send, and finds out about the way then.
func (p *Path) DatagramSize(key identity.NodePublic) int {
	pe := p.peers.get(key)
	if pe == nil {
		return 0
	}
	now := p.now()
	var way netip.AddrPort
	if direct := pe.direct.Load(); direct != nil {
		if way = *direct; int64(now) > pe.full.Load() || !p.whole(way) {
			return 0
		}
	}
	if int64(now) >= pe.askSize.Load() {
		p.askSize(pe, way, now)
	}
	if l := pe.large.Load(); l != nil && l.way == way && now <= l.until {
		return l.bytes
	}
	return 0
}

// whole reports whether datagrams to an address arrive in one piece or not at
// all, so that an answer proves what it seems to.
func (p *Path) whole(to netip.AddrPort) bool {
	s := p.socks.Load().to(to.Addr())
	return neverFragments && s != nil && s.udp != nil
}

// askSize asks a peer what is due.
func (p *Path) askSize(pe *peer, way netip.AddrPort, now instant) {
	region := 0
	if !way.IsValid() {
		if region = p.relayOf(pe); !p.relays.connected(region) {
			return
		}
	}
	p.mu.Lock()
	to := pe.info.Disco
	if pe.gone || to.IsZero() {
		pe.askSize.Store(int64(now + largeAgain))
		p.mu.Unlock()
		return
	}
	asks := pe.sizing.ask(way, now, largePatience+2*pe.ch.latency)
	p.publishSizeLocked(pe)
	p.mu.Unlock()
	for _, a := range asks {
		m := disco.Size{TxID: a.tx, Bytes: a.bytes()}
		b := p.sealer.Seal(make([]byte, 0, m.Bytes), to, m)
		if region != 0 {
			p.sendRelay(region, pe.key, b)
		} else if err := p.writeUDP(way, [][]byte{b}); err != nil && !passing(err) {
			p.refused(pe, a.level-1)
		}
	}
}

// refused notes that the system does not send datagrams above a level.
func (p *Path) refused(pe *peer, level int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pe.sizing.fall(level, p.now())
	p.publishSizeLocked(pe)
}

func (p *Path) publishSizeLocked(pe *peer) {
	pe.askSize.Store(int64(pe.sizing.next))
	bytes, until := pe.sizing.largest()
	if bytes == 0 {
		pe.large.Store(nil)
		return
	}
	pe.large.Store(&large{pe.sizing.way, bytes, until})
}

// sizeAnswered takes the answer of a peer to one of our questions.
func (p *Path) sizeAnswered(pe *peer, m disco.Size) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pe.sizing.answered(m.TxID, p.now())
	p.publishSizeLocked(pe)
}

// sizeUDP handles a message about sizes. Who asks is answered where he is known
// to be: not wherever somebody sends his words from.
func (p *Path) sizeUDP(from netip.AddrPort, key identity.DiscoPublic, known []Peer, m disco.Size) {
	for _, k := range known {
		pe := p.peers.get(k.Key)
		switch {
		case pe == nil:
		case m.Answer:
			p.sizeAnswered(pe, m)
		case p.peers.uses(pe, from):
			m.Answer = true
			p.writeUDP(from, [][]byte{p.sealer.Seal(nil, key, m)})
			return
		}
	}
}

// sizeRelay is the same for one that came by relay.
func (p *Path) sizeRelay(region int, from identity.NodePublic, key identity.DiscoPublic, m disco.Size) {
	if !m.Answer {
		m.Answer = true
		p.sendRelay(region, from, p.sealer.Seal(nil, key, m))
	} else if pe := p.peers.get(from); pe != nil {
		p.sizeAnswered(pe, m)
	}
}
