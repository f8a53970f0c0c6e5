package tunnel

import (
	"bytes"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/tai64n"

	"mesh/identity"
)

// timestamp is a TAI64N label; later ones compare greater.
type timestamp = tai64n.Timestamp

// after returns a timestamp of now that is later than last, which the coarse
// clock of these labels does not give by itself.
func after(last timestamp) timestamp {
	now := tai64n.Now()
	if now.After(last) {
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
	limit int // 0 means maxHistory
}

type past struct {
	last  timestamp // of theirs
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

// accept notes the timestamp of a genuine initiation and reports whether it is
// newer than all before.
func (h *history) accept(key identity.NodePublic, ts timestamp) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	if bytes.Compare(ts[:], p.last[:]) <= 0 {
		return false
	}
	p.last = ts
	return true
}

// stamp returns the timestamp of our next initiation to a peer.
func (h *history) stamp(key identity.NodePublic) timestamp {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.get(key)
	p.ours = after(p.ours)
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
