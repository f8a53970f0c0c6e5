package tunnel

import (
	"crypto/rand"
	"encoding/binary"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"mesh/identity"
)

// knocking is a handshake message on its way to the worker.
type knocking struct {
	src Source
	n   int
	msg [initiationSize]byte
}

func (k *knocking) bytes() []byte { return k.msg[:k.n] }

// heldInitiation is a proper initiation from a key that the netmap does not
// know: the peer may have heard of us a moment before we hear of it.
type heldInitiation struct {
	*knocking
	at time.Time
}

const (
	holdFor = 5 * time.Second // then the sender has tried again
	maxHeld = 64

	rekeyTimeout = 5 * time.Second
	attemptFor   = 90 * time.Second
	// freeAnswers is how many wrong answers to an initiation are opened before
	// they count against the rate of strangers.
	freeAnswers = 16
	// beginGap is the least distance of two initiations to one peer.
	beginGap = 100 * time.Millisecond
)

// firstRetries are the pauses after the first initiations to a peer that we have
// no session with. WireGuard's five seconds are long for somebody who waits,
// and what is lost at the first contact of two nodes is lost for reasons that
// are over a moment later: one has not heard of the other yet, or a translator
// is only now open.
var firstRetries = []time.Duration{250 * time.Millisecond, 750 * time.Millisecond, 2 * time.Second}

// pause is how long to wait for an answer to an attempt, counted from 1.
func pause(attempt int, renewal bool) time.Duration {
	if !renewal && attempt <= len(firstRetries) {
		d := firstRetries[attempt-1]
		return d + mathrand.N(d/8)
	}
	return rekeyTimeout + mathrand.N(334*time.Millisecond)
}

// sourceOf is what cookies are bound to.
func sourceOf(src *Source) []byte {
	if src.Addr.IsValid() {
		b, _ := src.Addr.MarshalBinary()
		return b
	}
	k := src.Peer.Bytes()
	return k[:]
}

// knock decides whether a handshake message is worth the cost of reading it.
func (t *Tunnel) knock(src *Source, msg []byte, now time.Time) {
	key := t.keys.Load().knownTo(msg, now)
	if key == nil {
		t.stats.dropMAC.Add(1)
		return
	}
	if msg[0] == typeInitiation && !t.vouched(src, now) && !t.strange.AllowN(now, 1) {
		// There are too many. Who can read what we send to its address shows
		// that it is there, and so has a budget that is not the flood's.
		if !key.door.lives(msg, sourceOf(src), now) {
			t.stats.dropRate.Add(1)
			if t.cfg.Reply != nil && src.Addr.IsValid() && t.cookies.AllowN(now, 1) {
				reply := key.door.reply(msg, sourceOf(src), now)
				t.cfg.Reply(src.Addr, reply[:])
				t.stats.cookiesOut.Add(1)
			}
			return
		}
		if !t.seated.AllowN(now, 1) {
			t.stats.dropRate.Add(1)
			return
		}
	}
	t.queue(src, msg)
}

// queue leaves a handshake message to the worker.
func (t *Tunnel) queue(src *Source, msg []byte) {
	k := &knocking{src: *src, n: len(msg)}
	copy(k.msg[:], msg)
	select {
	case t.knocks <- k:
		t.stats.datagramsIn.Add(1)
		t.working.Ask()
	default:
		t.stats.dropBacklog.Add(1)
	}
}

// vouched reports whether the path knows the source of an initiation as a peer
// that has not tried a moment ago: it has its own small budget, so that a flood
// from elsewhere does not keep it out. All of them together have one too, for
// the addresses of many can be forged.
func (t *Tunnel) vouched(src *Source, now time.Time) bool {
	if src.Peer.IsZero() {
		return false
	}
	_, known := t.cfg.Lookup(src.Peer)
	return known && t.history.mayTry(src.Peer, now) && t.familiar.AllowN(now, 1)
}

// answer reads a handshake message that was let in.
func (t *Tunnel) answer(k *knocking) {
	switch k.msg[0] {
	case typeInitiation:
		t.admit(k)
	case typeResponse:
		t.conclude(k)
	case typeCookie:
		t.takeCookie(k)
	}
}

// admit opens an initiation, makes sure that its sender is a peer and that it
// is no replay, and answers it.
func (t *Tunnel) admit(k *knocking) {
	now := time.Now()
	ring := t.keys.Load()
	key := ring.knownTo(k.bytes(), now)
	if key == nil {
		t.stats.dropMAC.Add(1) // the key has changed meanwhile
		return
	}
	o, ok := key.open(k.bytes())
	if !ok {
		t.stats.dropForged.Add(1)
		return
	}
	byRelay := !k.src.Addr.IsValid()
	if byRelay && !k.src.Peer.IsZero() && k.src.Peer != o.static {
		t.stats.dropMismatch.Add(1)
		return
	}
	own := ring.owns(o.static)
	_, known := t.cfg.Lookup(o.static)
	if known = known && !own; !known {
		t.stats.dropUnknownKey.Add(1)
		if !byRelay || k.src.Peer != o.static || own {
			return
		}
	}
	ts, ok := key.prove(&o)
	if !ok {
		t.stats.dropForged.Add(1)
		return
	}
	if !known {
		t.hold(o.static, k)
		return
	}
	if ok, behind := t.history.accept(o.static, ts, now); !ok {
		t.stats.dropReplay.Add(1)
		if behind {
			// It cannot be answered, but our own initiation can: a node with
			// a clock that was put back is not locked out until its old time
			// has come again (CVE-2021-46873).
			t.greet(o.static)
		}
		return
	}
	p, err := t.obtain(o.static, now)
	if err != nil {
		t.stats.dropNoPeer.Add(1)
		return
	}
	ep, ok := p.from(&k.src, now)
	if !ok {
		return
	}
	var msg [responseSize]byte
	p.mu.Lock()
	s, ok := t.respond(p, &o, &msg, now)
	if ok && key == t.keys.Load().current {
		p.hasty = false // it knows the key, and has the session of it
	}
	p.mu.Unlock()
	if !ok {
		return
	}
	p.here.Store(ep)
	t.wake(p, s.born.Add(rejectAfter))
	t.transmit(p, [][]byte{msg[:]}, false)
}

// respond makes the session of an answered initiation, which waits for the
// peer's first message. The caller holds p.mu.
func (t *Tunnel) respond(p *peer, o *opened, msg *[responseSize]byte, now time.Time) (*session, bool) {
	index, ok := t.newIndex(p)
	if !ok {
		return nil, false
	}
	send, receive, err := o.respond(msg, index, p.preshared)
	if err != nil {
		t.dropIndex(index)
		t.stats.dropForged.Add(1)
		return nil, false
	}
	s := t.newSession(p, index, o.sender, send, receive, false, now)
	t.setIndex(index, s)
	if p.next != nil {
		t.dropIndex(p.next.index)
	}
	p.next = s
	p.guest.sign(msg[:], now)
	return s, true
}

// begin sends an initiation, unless a handshake is under way already; with
// again that is the next attempt of it. What waits for the session is sent when
// it is there.
func (t *Tunnel) begin(p *peer, again bool) {
	now := time.Now()
	var msg [initiationSize]byte
	p.mu.Lock()
	if p.dead.Load() || (p.begun != nil) != again {
		p.mu.Unlock()
		return
	}
	if !again {
		if now.Sub(p.since) < beginGap {
			p.mu.Unlock()
			return
		}
		p.since, p.attempts = now, 0
	} else if now.Sub(p.since) > attemptFor {
		t.giveUp(p)
		p.mu.Unlock()
		return
	}
	index, ok := t.newIndex(p)
	if !ok {
		p.mu.Unlock()
		return
	}
	h, err := t.keys.Load().current.initiate(&msg, p.key, index, t.history.stamp(p.key))
	if err != nil {
		t.dropIndex(index)
		t.giveUp(p)
		p.mu.Unlock()
		return
	}
	if p.begun != nil {
		t.dropIndex(p.begun.index)
	}
	h.sent = now
	p.begun = h
	p.attempts++
	s := p.current.Load()
	p.retry = now.Add(pause(p.attempts, s != nil && s.usable(now) && !p.hasty))
	retry := p.retry
	p.guest.sign(msg[:], now)
	p.mu.Unlock()
	t.wake(p, retry)
	t.transmit(p, [][]byte{msg[:]}, false)
}

// giveUp ends a handshake that nobody answers. The caller holds p.mu.
func (t *Tunnel) giveUp(p *peer) {
	if p.begun != nil {
		t.dropIndex(p.begun.index)
		p.begun = nil
	}
	t.stats.dropStalled.Add(uint64(len(p.staged)))
	p.staged, p.stagedLen = nil, 0
}

// conclude reads the response to a handshake that we began.
func (t *Tunnel) conclude(k *knocking) {
	now := time.Now()
	index := binary.LittleEndian.Uint32(k.msg[8:])
	p := t.slot(index).peer
	if p == nil {
		t.stats.dropSession.Add(1)
		return
	}
	ep, ok := p.from(&k.src, now)
	if !ok {
		t.stats.dropMismatch.Add(1)
		return
	}
	p.mu.Lock()
	h := p.begun
	if h == nil || h.index != index || p.dead.Load() {
		p.mu.Unlock()
		t.stats.dropReplay.Add(1) // a copy, or the answer to an attempt before
		return
	}
	// Whoever saw the initiation can make as many wrong answers as he likes.
	if h.forged >= freeAnswers && !t.strange.AllowN(now, 1) {
		p.mu.Unlock()
		t.stats.dropRate.Add(1)
		return
	}
	send, receive, remote, ok := h.finish(k.bytes(), p.preshared)
	if !ok {
		h.forged++
		p.mu.Unlock()
		t.stats.dropForged.Add(1)
		return
	}
	s := t.newSession(p, index, remote, send, receive, true, now)
	s.trip = now.Sub(h.sent)
	t.setIndex(index, s)
	p.begun, p.hasty = nil, false
	if p.next != nil { // theirs crossed ours: they may use it
		t.shelve(p, p.next)
		p.next = nil
	}
	t.replace(p, s)
	staged := p.unstage()
	p.mu.Unlock()
	p.here.Store(ep)
	t.heard(p, s, now, false)
	t.wake(p, s.born.Add(rejectAfter))
	// The responder sends nothing before it has heard from us.
	if len(staged) == 0 {
		t.keepalive(p, s)
	} else {
		t.sendStaged(p, s, staged, now)
	}
}

// confirm makes a session that the peer has used for the first time the one
// that we use too.
func (t *Tunnel) confirm(p *peer, s *session, now time.Time) {
	p.mu.Lock()
	if p.next != s {
		p.mu.Unlock()
		return
	}
	p.next = nil
	t.replace(p, s)
	staged := p.unstage()
	p.mu.Unlock()
	if len(staged) > 0 {
		t.sendStaged(p, s, staged, now)
	}
}

// sendStaged sends what waited for a session.
func (t *Tunnel) sendStaged(p *peer, s *session, staged [][]byte, now time.Time) {
	t.stats.dropStalled.Add(uint64(t.seal(p, s, staged, now)))
	p.mu.Lock()
	p.leaving -= len(staged)
	p.mu.Unlock()
}

// replace puts a session in use. The caller holds p.mu.
func (t *Tunnel) replace(p *peer, s *session) {
	if old := p.current.Load(); old != nil {
		t.shelve(p, old)
	}
	p.current.Store(s)
	p.handshake.Store(time.Now().UnixNano())
}

// shelve keeps a session for what is still on its way. The caller holds p.mu.
func (t *Tunnel) shelve(p *peer, s *session) {
	p.old = append([]*session{s}, p.old...)
	for len(p.old) > oldSessions {
		t.dropIndex(p.old[len(p.old)-1].index)
		p.old = p.old[:len(p.old)-1]
	}
}

// takeCookie reads what the door of an overloaded peer says.
func (t *Tunnel) takeCookie(k *knocking) {
	p := t.slot(indexOf(k.msg[:])).peer
	if p == nil {
		t.stats.dropSession.Add(1)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.guest.take(k.bytes(), time.Now()) {
		t.stats.dropForged.Add(1)
		return
	}
	t.stats.cookiesIn.Add(1)
}

func (t *Tunnel) hold(key identity.NodePublic, k *knocking) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, h := range t.held {
		if now.Sub(h.at) > holdFor {
			delete(t.held, k)
		}
	}
	if _, again := t.held[key]; again || len(t.held) < maxHeld {
		t.held[key] = heldInitiation{k, now}
	}
}

// retryHeld gives initiations that came too early their second chance.
func (t *Tunnel) retryHeld(keys []identity.NodePublic) {
	now := time.Now()
	var again []*knocking
	t.mu.Lock()
	if len(t.held) > 0 {
		for _, k := range keys {
			if h, ok := t.held[k]; ok {
				delete(t.held, k)
				if now.Sub(h.at) <= holdFor {
					again = append(again, h.knocking)
				}
			}
		}
	}
	t.mu.Unlock()
	for _, k := range again {
		select {
		case t.knocks <- k:
			t.working.Ask()
		default:
			t.stats.dropBacklog.Add(1)
		}
	}
}

// slot is what one of our indexes stands for.
type slot struct {
	peer    *peer
	session *session // nil while the handshake is under way
}

func (t *Tunnel) slot(index uint32) slot {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.indexes[index]
}

// newIndex makes an index for a handshake with p; false if p is gone.
func (t *Tunnel) newIndex(p *peer) (uint32, bool) {
	for {
		index := t.cfg.Index()
		t.mu.Lock()
		_, taken := t.indexes[index]
		dead := p.dead.Load()
		if !taken && !dead {
			t.indexes[index] = slot{peer: p}
			p.indexes = append(p.indexes, index)
		}
		t.mu.Unlock()
		if !taken || dead {
			return index, !dead
		}
	}
}

func randomIndex() uint32 {
	var b [4]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// Owns reports whether a handshake message was made for a key of this node.
func (t *Tunnel) Owns(msg []byte) bool { return t.keys.Load().knownTo(msg, time.Now()) != nil }

// Whose names the peer whose handshake or session a message belongs to, by the
// index in it. That proves nothing yet.
func (t *Tunnel) Whose(msg []byte) (peer identity.NodePublic, ok bool) {
	kind, index, ok := classify(msg)
	if !ok || kind == typeInitiation {
		return peer, false
	}
	p := t.slot(index).peer
	if p == nil {
		return peer, false
	}
	return p.key, true
}

// setIndex says which session an index stands for, unless the peer is gone.
func (t *Tunnel) setIndex(index uint32, s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.indexes[index]; ok {
		t.indexes[index] = slot{s.peer, s}
	}
}

func (t *Tunnel) dropIndex(index uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s, ok := t.indexes[index]; ok {
		delete(t.indexes, index)
		s.peer.indexes = slices.DeleteFunc(s.peer.indexes, func(i uint32) bool { return i == index })
	}
}
