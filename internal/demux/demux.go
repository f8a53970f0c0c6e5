// Package demux finds out for which node of a process a datagram is that came to
// a UDP socket which several nodes share.
//
// A node has a Seat, and the number of its seat is in what it has others answer
// to: WireGuard's receiver indexes and the transaction ids of STUN. Of a WireGuard
// initiation the MAC tells who it is for, whoever can compute that MAC knows the
// node's key. A disco packet names its sender only: the boxes of the nodes that
// talk with that sender are tried, and of some that know it. What takes trying is
// bounded, in packets and in time, so that a flood costs some percent of a core
// and at worst leaves the nodes to their relays, by which everything is addressed.
package demux

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"mesh/identity"
	"mesh/internal/disco"
	"mesh/internal/stun"
)

// Seats is how many nodes one Table takes.
const Seats = 256

// Bounds of what takes trying, in a Table, per second. Initiations from an address
// that began a handshake with the same node before cost nothing of them, neither
// do the first few boxes of a packet whose sender some node talks with.
const (
	macRate     = 50_000 // MACs of initiations, about half a microsecond each
	boxRate     = 50_000 // boxes of nodes that talk with the sender, one microsecond each
	searchRate  = 10_000 // nodes asked whether they know a sender whom no node talks with
	searchBoxes = 4      // boxes tried for one packet of those, which take a key agreement at first
	lostRate    = 20     // packets of sessions that nobody has
	freeBoxes   = 4
	maxCallers  = 4096 // addresses remembered from which handshakes were begun
	holdAmong   = 8    // nodes that may hold a packet of somebody unknown
)

// Verdict is what became of a disco packet at one node.
type Verdict int

// The verdicts.
const (
	Unknown Verdict = iota // the node knows nobody with the sender's key
	Refused                // the box does not open
	Opened                 // it was for this node, which has dealt with it
)

// Node is one of those who share. The methods are called by several goroutines
// at once. Datagrams are lent for the call.
type Node interface {
	// Take takes datagrams of one source for this node, WireGuard and STUN.
	Take(from netip.AddrPort, datagrams [][]byte)
	// Owns reports whether an initiation was made for a key of this node.
	Owns(initiation []byte) bool
	// Disco takes a disco packet if it is for this node.
	Disco(from netip.AddrPort, sender identity.DiscoPublic, packet []byte) Verdict
	// Hold keeps a disco packet whose sender nobody knows, for a moment.
	Hold(from netip.AddrPort, sender identity.DiscoPublic, packet []byte)
	// Lost takes a datagram of a session that nobody has.
	Lost(from netip.AddrPort, datagram []byte)
}

// Stats counts what a Table dropped.
type Stats struct {
	Strays  uint64 // for no node: malformed, of no seat, or what nobody could open
	Refused uint64 // more than the bounds let try
}

// Table are the nodes that share a socket. The zero value is not usable.
type Table struct {
	seats [Seats]Seat

	macs, boxes, searches, losses *rate.Limiter
	strays, refused               atomic.Uint64

	mu      sync.RWMutex // guards what follows, and Seat.taken
	nodes   int
	next    int // where to look for a free seat
	talks   map[identity.DiscoPublic]*talk
	callers map[netip.AddrPort]*Seat
}

// talk is who exchanges packets with the owner of a disco key. The last for whom
// one was comes first, then those after it: peers send to many in a fixed order.
type talk struct {
	seats  []*Seat // replaced, never changed
	counts []int   // parallel to seats; guarded by Table.mu
	last   atomic.Int32
}

// New returns a Table without nodes.
func New() *Table {
	t := &Table{
		macs:     rate.NewLimiter(macRate, macRate/2),
		boxes:    rate.NewLimiter(boxRate, boxRate/2),
		searches: rate.NewLimiter(searchRate, searchRate),
		losses:   rate.NewLimiter(lostRate, lostRate),
		talks:    make(map[identity.DiscoPublic]*talk),
		callers:  make(map[netip.AddrPort]*Seat),
	}
	for i := range t.seats {
		t.seats[i].table, t.seats[i].number = t, uint8(i)
	}
	return t
}

// Stats returns the counts so far.
func (t *Table) Stats() Stats { return Stats{t.strays.Load(), t.refused.Load()} }

// Seat is the place of one node in a Table.
type Seat struct {
	table  *Table
	number uint8
	taken  bool

	node atomic.Pointer[Node] // nil = nobody
	busy sync.RWMutex         // held for reading during calls of the node
}

// Join gives a seat to a node, for which Begin has datagrams handed over; nil if
// all are taken. A seat that was left is the last to be given again, so that what
// is still on its way to it meets nobody.
func (t *Table) Join() *Seat {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range t.seats {
		s := &t.seats[t.next]
		t.next = (t.next + 1) % Seats
		if !s.taken {
			s.taken = true
			t.nodes++
			return s
		}
	}
	return nil
}

// Begin has datagrams handed to the node from now on.
func (s *Seat) Begin(n Node) { s.node.Store(&n) }

// Stop has no more datagrams handed to the node. Some may still be on their way.
func (s *Seat) Stop() { s.node.Store(nil) }

// Leave gives the seat back and returns when no call of the node is going on any
// more. It must not be called from one.
func (s *Seat) Leave() {
	s.Stop()
	s.busy.Lock()
	defer s.busy.Unlock()
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if !s.taken {
		return
	}
	s.taken = false
	t.nodes--
	for a, c := range t.callers {
		if c == s {
			delete(t.callers, a)
		}
	}
	for key := range t.talks {
		t.hangUpLocked(key, s, true)
	}
}

// enter returns the node for a call, nil if there is none; exit follows.
func (s *Seat) enter() Node {
	if s.node.Load() == nil {
		return nil
	}
	s.busy.RLock()
	if n := s.node.Load(); n != nil {
		return *n
	}
	s.busy.RUnlock()
	return nil
}

func (s *Seat) exit() { s.busy.RUnlock() }

// Index returns a random receiver index whose datagrams come to this seat.
func (s *Seat) Index() uint32 { return rand.Uint32()>>8 | uint32(s.number)<<24 }

// Mark has the answer with a transaction id come to this seat.
func (s *Seat) Mark(tx *stun.TxID) { tx[0] = s.number }

// Talk notes that the node exchanges packets with the owner of a disco key from
// now on, as often as Hang says that it is over.
func (s *Seat) Talk(key identity.DiscoPublic) {
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if !s.taken {
		return
	}
	k := t.talks[key]
	if k == nil {
		k = &talk{}
		t.talks[key] = k
	}
	if i := slices.Index(k.seats, s); i >= 0 {
		k.counts[i]++
		return
	}
	k.seats = append(slices.Clone(k.seats), s)
	k.counts = append(k.counts, 1)
}

// Hang ends one Talk.
func (s *Seat) Hang(key identity.DiscoPublic) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	s.table.hangUpLocked(key, s, false)
}

func (t *Table) hangUpLocked(key identity.DiscoPublic, s *Seat, all bool) {
	k := t.talks[key]
	if k == nil {
		return
	}
	i := slices.Index(k.seats, s)
	if i < 0 {
		return
	}
	if k.counts[i]--; k.counts[i] > 0 && !all {
		return
	}
	k.seats = slices.Delete(slices.Clone(k.seats), i, i+1)
	k.counts = slices.Delete(k.counts, i, i+1)
	if len(k.seats) == 0 {
		delete(t.talks, key)
	}
}

// Take hands datagrams of one source to those they are for. What goes to one node
// goes in one piece.
func (t *Table) Take(from netip.AddrPort, datagrams [][]byte) {
	var to *Seat // of the run that ends before i
	start := 0
	for i, b := range datagrams {
		isDisco := disco.Is(b)
		var s *Seat
		if !isDisco {
			s = t.find(from, b)
		}
		if s != to || isDisco {
			t.give(to, from, datagrams[start:i])
			start, to = i, s
		}
		if isDisco {
			t.disco(from, b)
			start = i + 1
		}
	}
	t.give(to, from, datagrams[start:])
}

// give hands a run of datagrams to a node.
func (t *Table) give(s *Seat, from netip.AddrPort, run [][]byte) {
	if len(run) == 0 {
		return
	}
	if s != nil {
		if n := s.enter(); n != nil {
			n.Take(from, run)
			s.exit()
			return
		}
	}
	for _, b := range run {
		t.lost(from, b)
	}
}

// The messages of WireGuard, as far as they tell who they are for.
const (
	initiation    = 1
	response      = 2
	cookie        = 3
	data          = 4
	initiationLen = 148
	responseLen   = 92
	cookieLen     = 64
	keepaliveLen  = 32 // the shortest message with data
)

// find returns the seat that a datagram is for, disco apart; nil if none.
func (t *Table) find(from netip.AddrPort, b []byte) *Seat {
	if stun.IsSTUN(b) {
		return &t.seats[b[8]] // the first byte of the transaction id
	}
	if len(b) < keepaliveLen || b[1]|b[2]|b[3] != 0 {
		return nil
	}
	switch {
	case b[0] == data, b[0] == cookie && len(b) == cookieLen:
		return &t.seats[binary.LittleEndian.Uint32(b[4:])>>24]
	case b[0] == response && len(b) == responseLen:
		return &t.seats[binary.LittleEndian.Uint32(b[8:])>>24]
	case b[0] == initiation && len(b) == initiationLen:
		return t.called(from, b)
	}
	return nil
}

// called returns the seat that an initiation was made for.
func (t *Table) called(from netip.AddrPort, b []byte) *Seat {
	t.mu.RLock()
	last, nodes := t.callers[from], t.nodes
	t.mu.RUnlock()
	if last != nil && last.owns(b) {
		return last
	}
	if !t.macs.AllowN(time.Now(), nodes) {
		t.refused.Add(1)
		return nil
	}
	for i := range t.seats {
		s := &t.seats[i]
		if s == last || !s.owns(b) {
			continue
		}
		t.mu.Lock()
		if s.taken {
			if len(t.callers) >= maxCallers {
				for a := range t.callers {
					delete(t.callers, a)
					break
				}
			}
			t.callers[from] = s
		}
		t.mu.Unlock()
		return s
	}
	return nil
}

func (s *Seat) owns(b []byte) bool {
	n := s.enter()
	if n == nil {
		return false
	}
	defer s.exit()
	return n.Owns(b)
}

// disco finds the node that can open a disco packet.
func (t *Table) disco(from netip.AddrPort, b []byte) {
	sender, ok := disco.Sender(b)
	if !ok {
		t.strays.Add(1)
		return
	}
	t.mu.RLock()
	k := t.talks[sender]
	var talking []*Seat
	if k != nil {
		talking = k.seats
	}
	others := t.nodes - len(talking)
	t.mu.RUnlock()
	now := time.Now()
	for i := range talking {
		if i == freeBoxes && !t.boxes.AllowN(now, len(talking)-i) {
			t.refused.Add(1)
			return
		}
		at := (int(k.last.Load()) + i) % len(talking)
		if talking[at].opens(from, sender, b) == Opened {
			k.last.Store(int32(at))
			return
		}
	}
	if !t.searches.AllowN(now, others) {
		t.refused.Add(1)
		return
	}
	t.search(from, sender, talking, b)
}

// search looks for a node that can open a disco packet among those that know the
// sender without talking with it.
func (t *Table) search(from netip.AddrPort, sender identity.DiscoPublic, but []*Seat, b []byte) {
	known, tried, asked := len(but) > 0, 0, 0
	first := rand.IntN(Seats)
	for i := range t.seats {
		s := &t.seats[(first+i)%Seats]
		if s.node.Load() == nil || slices.Contains(but, s) {
			continue
		}
		asked++
		switch s.opens(from, sender, b) {
		case Opened:
			return
		case Refused:
			known = true
			if tried++; tried == searchBoxes {
				t.refused.Add(1)
				return
			}
		}
	}
	t.strays.Add(1)
	if known || asked > holdAmong {
		return
	}
	// The owner of the key may have heard of a node before the node hears of it.
	for i := range t.seats {
		if n := t.seats[i].enter(); n != nil {
			n.Hold(from, sender, b)
			t.seats[i].exit()
		}
	}
}

func (s *Seat) opens(from netip.AddrPort, sender identity.DiscoPublic, b []byte) Verdict {
	n := s.enter()
	if n == nil {
		return Unknown
	}
	defer s.exit()
	return n.Disco(from, sender, b)
}

// lost shows a datagram that is for nobody to all nodes, if it belongs to a
// session: one of them may be the peer's, started anew with another seat, and has
// to tell it.
func (t *Table) lost(from netip.AddrPort, b []byte) {
	t.strays.Add(1)
	if len(b) <= keepaliveLen || b[0] != data || b[1]|b[2]|b[3] != 0 || !t.losses.Allow() {
		return
	}
	for i := range t.seats {
		if n := t.seats[i].enter(); n != nil {
			n.Lost(from, b)
			t.seats[i].exit()
		}
	}
}
