package tunnel

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/tai64n"

	"mesh/identity"
)

// timestamp is a TAI64N label; later ones compare greater.
type timestamp = tai64n.Timestamp

// label returns the timestamp of a time, as coarse as others make theirs: it is
// not to tell how fast this machine is.
func label(at time.Time) (ts timestamp) {
	const unixEpoch, coarse = 0x400000000000000a, 1<<24 - 1
	binary.BigEndian.PutUint64(ts[:], unixEpoch+uint64(at.Unix()))
	binary.BigEndian.PutUint32(ts[8:], uint32(at.Nanosecond())&^coarse)
	return ts
}

// after returns a timestamp of now that is later than last, which neither
// coarse labels nor a clock that was put back give by themselves.
func after(last timestamp, at time.Time) timestamp {
	if now := label(at); now.After(last) {
		return now
	}
	for i := len(last) - 1; i >= 0; i-- {
		if last[i]++; last[i] != 0 {
			break
		}
	}
	return last
}

// maxHistory bounds how many peers' last timestamps are remembered.
const maxHistory = 1 << 16

// history remembers the last initiation of every peer, longer than the peers
// themselves live, so that an old one cannot be played back.
type history struct {
	mu    sync.Mutex // guards what follows
	peers map[identity.NodePublic]*past
	// floor is the newest timestamp that was ever forgotten: peers that are
	// not in the map may have used anything up to it.
	floor timestamp
	limit int              // 0 means maxHistory
	clock func() time.Time // nil means time.Now; only for timestamps
}

type past struct {
	last  timestamp // of theirs
	at    time.Time // when last was accepted
	ours  timestamp // of ours to them
	tried time.Time
}

// mayTry reports whether this key, which the netmap knows, has not tried too
// recently.
func (h *history) mayTry(key identity.NodePublic, now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	if !p.tried.IsZero() && now.Sub(p.tried) < initGap {
		return false
	}
	p.tried = now
	return true
}

// overtaken is how long after an initiation older ones may still arrive that
// were sent before it.
const overtaken = rekeyTimeout

// accept notes the timestamp of a genuine initiation and reports whether it is
// newer than all before. One that is older without having been overtaken is
// behind: a replay, or made by a node that was started anew with its clock put
// back.
func (h *history) accept(key identity.NodePublic, ts timestamp, now time.Time) (ok, behind bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	switch bytes.Compare(ts[:], p.last[:]) {
	case 0:
		return false, false
	case -1:
		return false, now.Sub(p.at) >= overtaken
	}
	p.last, p.at = ts, now
	return true, false
}

// stamp returns the timestamp of our next initiation to a peer.
func (h *history) stamp(key identity.NodePublic) timestamp {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	clock := h.clock
	if clock == nil {
		clock = time.Now
	}
	p.ours = after(p.ours, clock())
	return p.ours
}

func (h *history) get(key identity.NodePublic) *past {
	if p := h.peers[key]; p != nil {
		return p
	}
	if h.peers == nil {
		h.peers = make(map[identity.NodePublic]*past)
	}
	limit := h.limit
	if limit == 0 {
		limit = maxHistory
	}
	if len(h.peers) >= limit {
		h.forget(len(h.peers) - limit*7/8)
	}
	p := &past{last: h.floor}
	h.peers[key] = p
	return p
}

// forget drops the n oldest records and raises the floor accordingly.
func (h *history) forget(n int) {
	type record struct {
		key  identity.NodePublic
		last timestamp
	}
	all := make([]record, 0, len(h.peers))
	for k, p := range h.peers {
		all = append(all, record{k, p.last})
	}
	slices.SortFunc(all, func(a, b record) int { return bytes.Compare(a.last[:], b.last[:]) })
	for _, r := range all[:min(n, len(all))] {
		delete(h.peers, r.key)
		if bytes.Compare(r.last[:], h.floor[:]) > 0 {
			h.floor = r.last
		}
	}
}
