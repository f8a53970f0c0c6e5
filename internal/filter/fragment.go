package filter

import (
	"net/netip"
	"time"
)

// fragTable remembers first fragments that were let in, for the others of their
// datagram. Stacks send them in order, so a later fragment that comes before
// its first is dropped. One that begins before the first ended would rewrite
// the header that was judged, so it is dropped as well.
//
// The table is a ring: a flood of first fragments costs other datagrams at
// worst a retransmission, and only peers whose packets were let in fill it.
type fragTable struct {
	ring [64]fragEntry
	next int
}

type fragEntry struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
	end      int // of the first fragment's data
	seen     int64
}

const idleFragment = 10 * time.Second

func (t *fragTable) note(p *Packet, now int64) {
	t.ring[t.next] = fragEntry{p.Src.Addr(), p.Dst.Addr(), p.FragmentID, p.Proto, p.fragEnd, now}
	t.next = (t.next + 1) % len(t.ring)
}

func (t *fragTable) covers(p *Packet, now int64) bool {
	covered := false
	for i := range t.ring {
		e := &t.ring[i]
		if e.id != p.FragmentID || e.proto != p.Proto || e.src != p.Src.Addr() || e.dst != p.Dst.Addr() ||
			now-e.seen > int64(idleFragment) {
			continue
		}
		if p.fragOff < e.end {
			return false
		}
		covered = true
	}
	return covered
}
