package path

import (
	"net/netip"
	"slices"
	"time"

	"mesh/identity"
)

// An answer to a handshake goes first the way the handshake came, and the other
// ways a moment later. Upstream's WireGuard, which stock nodes are built on, may
// take two copies that arrive together for two answers: it then begins the same
// session twice, and what it sends first is lost.

const (
	answerLag = 100 * time.Millisecond
	maxLate   = 256 // answers that wait for their turn
)

// Ways by which a peer's last handshake initiation came.
const (
	askedByUDP   = 1
	askedByRelay = 2
)

const responseLen = 92 // of WireGuard's answer to an initiation

func isInitiation(b []byte) bool { return len(b) == initiationLen && b[0] == 1 }

func isAnswer(datagrams [][]byte) bool {
	return len(datagrams) == 1 && len(datagrams[0]) == responseLen && datagrams[0][0] == 2
}

// lateAnswer is an answer that waits for its turn, to an address or by relay.
type lateAnswer struct {
	at     instant
	key    identity.NodePublic
	to     netip.AddrPort // zero: by relay
	region int
	data   []byte
}

// sendAnswer sends an answer to a handshake. It reports false if no way took it.
func (p *Path) sendAnswer(pe *peer, now instant, direct *netip.AddrPort, hint netip.AddrPort, region int, answer [][]byte) bool {
	var addrs []netip.AddrPort
	if hint.IsValid() {
		addrs = append(addrs, hint)
	}
	if direct != nil && !slices.Contains(addrs, *direct) {
		addrs = append(addrs, *direct)
	}
	late := lateAnswer{at: now + answerLag, key: pe.key, region: region, data: answer[0]}
	if pe.asked.Load() == askedByRelay && !hint.IsValid() && region != 0 && p.sendRelay(region, pe.key, answer...) {
		for _, a := range addrs {
			late.to = a
			p.answerLater(late)
		}
		return true
	}
	sent := false
	for _, a := range addrs {
		if sent {
			late.to = a
			p.answerLater(late)
			continue
		}
		err := p.writeUDP(a, answer)
		if sent = err == nil || passing(err); !sent {
			p.sendFailed(pe, a, err)
		}
	}
	if sent && region != 0 {
		late.to = netip.AddrPort{}
		p.answerLater(late)
		return true
	}
	return sent || region != 0 && p.sendRelay(region, pe.key, answer...)
}

func (p *Path) answerLater(a lateAnswer) {
	a.data = slices.Clone(a.data)
	p.mu.Lock()
	if len(p.late) < maxLate {
		p.late = append(p.late, a) // all wait equally long: the list is in order
	}
	p.mu.Unlock()
	p.poke()
}

// dueLate sends the answers whose turn has come.
func (p *Path) dueLate(now instant) {
	p.mu.Lock()
	n := 0
	for n < len(p.late) && p.late[n].at <= now {
		n++
	}
	due := p.late[:n:n]
	if p.late = p.late[n:]; len(p.late) == 0 {
		p.late = nil
	}
	p.mu.Unlock()
	for _, a := range due {
		if p.peers.get(a.key) == nil {
			continue
		}
		if a.to.IsValid() {
			_ = p.writeUDP(a.to, [][]byte{a.data}) // a second copy, on the chance
		} else {
			p.sendRelay(a.region, a.key, a.data)
		}
	}
}
