package path

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/internal/disco"
)

// Guessing ports finds a direct path between a node whose NAT gives each
// destination another port and one whose NAT lets in only what it was sent to.
// The first opens many ports towards the second, which tries ports at random:
// as with birthdays, few tries are needed until they meet. It is done only with
// Config.GuessPorts on both sides, after a meeting did not help, one peer at a
// time and seldom, for it loads NATs and looks like a scan.
const (
	guessSockets = 256
	guessEvery   = 5 * time.Millisecond // between tries
	guessFor     = 12 * time.Second
	guessWait    = 1500 * time.Millisecond // after a meeting, for what it may bring
	guessAgain   = 10 * time.Minute        // for one peer
	guessLowest  = 1024                    // ports below are not given by NATs
)

// ways says by which socket, other than the usual one, an address is reached.
type ways map[netip.AddrPort]*socket

// dueGuess begins to guess for a peer if that is the last resort. It holds no
// lock; sent is when the last packet went out.
func (p *Path) dueGuess(pe *peer, now instant) {
	p.mu.Lock()
	c, m := &pe.ch, &pe.ch.meet
	to, ok := c.publicIPv4()
	if !p.cfg.GuessPorts || p.guessing || pe.gone || !c.active || c.best.IsValid() || !m.ours || m.phase != 0 ||
		m.last == 0 || now-m.last < guessWait || pe.guessed != 0 && now-pe.guessed < guessAgain ||
		p.ends.varies == nil || !*p.ends.varies || !p.ends.fresh(now) || !ok {
		p.mu.Unlock()
		return
	}
	p.guessing, pe.guessed = true, now
	p.mu.Unlock()
	p.log.Debug("guess ports", zap.String("peer", pe.key.Short()))
	p.sendMeet(pe, disco.Meet{Phase: disco.MeetGuess, ID: disco.NewTxID()}, now)
	p.wg.Go(func() { // from mind, which Close waits for
		p.openMany(pe, to)
		p.mu.Lock()
		p.guessing = false
		p.mu.Unlock()
	})
}

// publicIPv4 returns the first address of the peer that a NAT may have.
func (c *chooser) publicIPv4() (a netip.AddrPort, ok bool) {
	for b, k := range c.candidates {
		if ip := b.Addr(); (k.control || k.called) && ip.Is4() && !ip.IsPrivate() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() && (!ok || b.Compare(a) < 0) {
			a, ok = b, true
		}
	}
	return a, ok
}

// openMany opens ports towards a peer until it comes by one of them, which then
// is the way to it.
func (p *Path) openMany(pe *peer, to netip.AddrPort) {
	var mu sync.Mutex // guards won
	var won *socket
	var all []*socket
	defer func() {
		mu.Lock()
		keep := won
		mu.Unlock()
		for _, s := range all {
			if s != keep {
				s.pc.Close()
			}
		}
	}()
	win := func(s *socket) bool {
		mu.Lock()
		defer mu.Unlock()
		if won == nil && p.setWay(to, s) {
			won = s
		}
		return won == s
	}
	p.mu.Lock()
	key := pe.info.Disco
	p.mu.Unlock()
	if key.IsZero() {
		return
	}
	// The pings only open the NAT: what comes back are the peer's own.
	packet := p.sealer.Seal(nil, key, disco.Ping{TxID: disco.NewTxID(), Node: p.own.Load().public})
	for range guessSockets {
		pc, err := p.cfg.ListenUDP(p.ctx, "udp4", ":0")
		if err != nil {
			break // so many must do
		}
		s := &socket{pc: pc} // plain: it carries one ping, or one peer
		all = append(all, s)
		s.writeOne(to, packet)
		p.wg.Go(func() { p.readGuess(s, to, win) })
	}
	for end := p.now() + guessFor; p.now() < end; {
		mu.Lock()
		done := won != nil
		mu.Unlock()
		if done || !sleep(p.ctx, 50*time.Millisecond) {
			return
		}
	}
}

// readGuess reads one of many sockets. Only the one by which the peer came goes
// on; what came by it is judged as ever.
func (p *Path) readGuess(s *socket, to netip.AddrPort, win func(*socket) bool) {
	defer p.dropWay(to, s)
	defer s.pc.Close()
	r := &reader{s: s, buf: make([]byte, 2048)}
	for {
		datagrams, from, err := r.read()
		if err != nil {
			return
		}
		if from != to || !p.isWay(to, s) && (!isDisco(datagrams[0]) || !win(s)) {
			continue
		}
		p.fromUDP(from, datagrams)
	}
}

// setWay makes a socket the way to an address, until it closes.
func (p *Path) setWay(to netip.AddrPort, s *socket) bool {
	p.waysMu.Lock()
	defer p.waysMu.Unlock()
	if p.closed {
		return false
	}
	m := make(ways)
	if old := p.ways.Load(); old != nil {
		maps.Copy(m, *old)
	}
	if old := m[to]; old != nil {
		old.pc.Close()
	}
	m[to] = s
	p.ways.Store(&m)
	return true
}

func (p *Path) isWay(to netip.AddrPort, s *socket) bool {
	m := p.ways.Load()
	return m != nil && (*m)[to] == s
}

// dropWay forgets a socket that has closed.
func (p *Path) dropWay(to netip.AddrPort, s *socket) {
	p.waysMu.Lock()
	defer p.waysMu.Unlock()
	if !p.isWay(to, s) {
		return
	}
	m := maps.Clone(*p.ways.Load())
	delete(m, to)
	if len(m) == 0 {
		p.ways.Store(nil)
	} else {
		p.ways.Store(&m)
	}
}

// closeWays closes the sockets of one address, or all if it is zero.
func (p *Path) closeWays(to netip.AddrPort) {
	if m := p.ways.Load(); m != nil {
		for a, s := range *m {
			if a == to || !to.IsValid() {
				s.pc.Close()
			}
		}
	}
}

// guess tries ports of a peer that opened many.
func (p *Path) guess(pe *peer, list []netip.AddrPort) {
	now := p.now()
	p.mu.Lock()
	var ip netip.Addr
	for _, a := range bounded(list) {
		if a.Addr().Is4() && !a.Addr().IsPrivate() && !a.Addr().IsLoopback() && !a.Addr().IsLinkLocalUnicast() {
			ip = a.Addr()
			break
		}
	}
	if !p.cfg.GuessPorts || p.guessing || pe.gone || !ip.IsValid() || pe.ch.hasDirect(now) ||
		pe.guessed != 0 && now-pe.guessed < guessAgain || p.ends.varies != nil && *p.ends.varies {
		p.mu.Unlock()
		return
	}
	p.guessing, pe.guessed = true, now
	tx := disco.NewTxID()
	pe.ch.guess = guessed{ip: ip, tx: tx}
	key := pe.info.Disco
	p.mu.Unlock()
	packet := p.sealer.Seal(nil, key, disco.Ping{TxID: tx, Node: p.own.Load().public})
	p.wg.Go(func() { // from the reader of a relay, which Close waits for first
		for end := now + guessFor; p.now() < end && sleep(p.ctx, guessEvery); {
			p.mu.Lock()
			done := pe.gone || pe.ch.guess.tx != tx || pe.ch.hasDirect(p.now())
			a := netip.AddrPortFrom(ip, uint16(guessLowest+rand.IntN(1<<16-guessLowest)))
			_, never := p.budget.never[a]
			p.mu.Unlock()
			if done {
				break
			}
			if !never {
				p.writeUDP(a, [][]byte{packet})
			}
		}
		p.mu.Lock()
		pe.ch.guess = guessed{}
		p.guessing = false
		p.mu.Unlock()
	})
}

// guessed is what the tries have in common.
type guessed struct {
	ip netip.Addr
	tx disco.TxID
}

// guessedRight takes an answer to a try: now the address is known, and pinged
// as any other. ok is false if it answers none.
func (c *chooser) guessedRight(from netip.AddrPort, tx disco.TxID, now instant, out *todo) (ok bool) {
	if !c.guess.ip.IsValid() || tx != c.guess.tx || from.Addr() != c.guess.ip {
		return false
	}
	c.guess = guessed{}
	if k, _ := c.candidate(from, now); k != nil {
		k.learned = now + learnedFor
		c.pingOne(from, k, false, now, out)
	}
	return true
}
