package path

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
)

const (
	homeDown    = 2 * time.Second        // without its relay, before another region is tried
	homeRefused = 300 * time.Millisecond // the same when the relay was dialled again in vain
	badFor      = 60 * time.Second       // a region whose relay failed is not chosen for its latency
	maxRace     = 4                      // regions connected at once to see who answers
	homeMargin  = 10 * time.Millisecond
	maxRegions  = 256
	maxRegionID = 65535
)

// home is the choice of the home region; guarded by Path.mu.
type home struct {
	haveMap  bool
	defs     map[int]*wire.DERPRegion
	measured []int // regions that may be home, ascending
	scores   map[int]float64

	region int             // 0 = none yet
	down   instant         // since when its relay is not connected, 0 = it is
	bad    map[int]instant // until then
	failed map[int]error   // regions whose last attempt failed
	next   instant         // when to evaluate again, 0 = on events only
}

func (h *home) init() {
	h.bad = make(map[int]instant)
	h.failed = make(map[int]error)
}

// SetRelays takes the relay map, nil or empty for none. It must not be changed
// afterwards. Connections to regions that stay the same are kept.
func (p *Path) SetRelays(m *wire.DERPMap) {
	defs := make(map[int]*wire.DERPRegion)
	var scores map[int]float64
	if m != nil {
		for _, id := range slices.Sorted(maps.Keys(m.Regions)) {
			if def := m.Regions[id]; def != nil && id > 0 && id <= maxRegionID && len(defs) < maxRegions {
				defs[id] = def
			}
		}
		if m.HomeParams != nil {
			scores = m.HomeParams.RegionScore
		}
	}
	if !p.cfg.DirectOnly {
		p.relays.setRegions(defs)
	}
	p.mu.Lock()
	h := &p.home
	h.haveMap = true
	h.defs, h.scores = defs, scores
	h.measured = h.measured[:0:0]
	for _, id := range slices.Sorted(maps.Keys(defs)) {
		if !defs[id].NoMeasureNoHome {
			h.measured = append(h.measured, id)
		}
	}
	maps.DeleteFunc(h.bad, func(id int, _ instant) bool { return defs[id] == nil })
	clear(h.failed)
	maps.DeleteFunc(p.ends.latency, func(id int, _ *regionLatency) bool { return defs[id] == nil })
	p.ends.round = nil
	p.forbidLocked()
	p.gatherLocked(p.now())
	p.mu.Unlock()
	p.evaluateHome()
	p.poke()
}

// HomeRegion returns the home relay region, 0 = none yet.
func (p *Path) HomeRegion() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.home.region
}

// relayUp implements relayEvents.
func (p *Path) relayUp(region int) {
	p.mu.Lock()
	delete(p.home.failed, region)
	if r := p.ends.round; r != nil && !r.settled {
		r.hurry = true
		p.ends.next = p.now()
	}
	p.mu.Unlock()
	p.evaluateHome()
}

// relayDown implements relayEvents.
func (p *Path) relayDown(region int, err error) {
	p.log.Debug("relay not connected", zap.Int("relay", region), zap.Error(err))
	p.mu.Lock()
	p.home.failed[region] = err
	p.mu.Unlock()
	p.evaluateHome()
}

// relayMoved implements relayEvents: peers that send by the relay that goes hear
// this node by the other.
func (p *Path) relayMoved(region int) {
	if region == p.HomeRegion() {
		p.greetPeers()
	}
}

// greetPeers lets the peers of active sessions hear this node at their own
// relays: until control has told them of its new home, they know by that how to
// answer.
func (p *Path) greetPeers() {
	now := p.now()
	for _, pe := range p.peers.all() {
		var out todo
		p.mu.Lock()
		if !pe.gone && pe.ch.active && !pe.ch.hasDirect(now) {
			pe.ch.pingRelay(now, &out)
			p.settleLocked(pe, now)
		}
		p.mu.Unlock()
		p.perform(pe, &out)
	}
}

// relayRestarting implements relayEvents: the relay is about to go. Its region is
// no place to be for a while; the connection serves until there is another.
func (p *Path) relayRestarting(region int, in time.Duration) {
	p.mu.Lock()
	now := p.now()
	if _, known := p.home.defs[region]; known {
		p.home.bad[region] = now + min(max(in, badFor/2), 10*badFor)
	}
	p.mu.Unlock()
	p.evaluateHome()
}

// relayWatch implements relayEvents.
func (p *Path) relayWatch(at instant) {
	p.mu.Lock()
	if p.watchAt == 0 || at < p.watchAt {
		p.watchAt = at
	}
	p.mu.Unlock()
	p.poke()
}

// dueHome evaluates again when it is time to.
func (p *Path) dueHome(now instant) {
	p.mu.Lock()
	due := p.home.next != 0 && now >= p.home.next
	p.mu.Unlock()
	if due {
		p.evaluateHome()
	}
}

// electorate is what the election of a target depends on.
type electorate struct {
	regions   []int                 // that may be home, ascending
	latency   map[int]time.Duration // of those measured, scored
	home      int                   // 0 = none
	connected bool                  // to home
	settled   bool                  // latencies have been asked for
	bad       func(int) bool
}

// usable returns the regions whose relays did not fail lately, all if each did.
func (v electorate) usable() []int {
	var out []int
	for _, id := range v.regions {
		if !v.bad(id) {
			out = append(out, id)
		}
	}
	if len(out) == 0 {
		return v.regions
	}
	return out
}

// elect returns the region that should be home; race says that nothing favours
// one, so that the first to be connected wins.
func elect(v electorate) (target int, race bool) {
	regions := v.usable()
	best := 0
	for _, id := range regions {
		if d, ok := v.latency[id]; ok && (best == 0 || d < v.latency[best]) {
			best = id
		}
	}
	stay := v.home != 0 && slices.Contains(regions, v.home)
	if best != 0 {
		if !stay || best == v.home {
			return best, false
		}
		old, measured := v.latency[v.home]
		if v.connected && (!measured || old-v.latency[best] < homeMargin || v.latency[best] > old*2/3) {
			return v.home, false
		}
		return best, false
	}
	switch {
	case stay:
		return v.home, false
	case len(regions) == 1:
		return regions[0], false
	}
	return 0, v.settled && len(regions) > 0
}

// evaluateHome brings home in line with what is known. No lock is held.
func (p *Path) evaluateHome() {
	p.mu.Lock()
	now := p.now()
	old := p.home.region
	p.evaluateHomeLocked(now)
	region := p.home.region
	becameReady := !p.isReady && p.reachableLocked()
	p.isReady = p.isReady || becameReady
	p.mu.Unlock()
	p.homeNow.Store(int32(region))
	if region != old {
		p.greetPeers()
		p.log.Debug("home relay", zap.Int("relay", region), zap.Int("was", old))
		p.reporting.Ask()
	}
	if becameReady {
		close(p.ready)
	}
	p.poke()
}

func (p *Path) evaluateHomeLocked(now instant) {
	h := &p.home
	if p.cfg.DirectOnly {
		return
	}
	if h.region != 0 && !slices.Contains(h.measured, h.region) {
		h.region, h.down = 0, 0
	}
	h.noteDown(p.relays.connected(h.region), now)
	h.next = 0
	failing := false
	patience := homeDown
	if r := p.relays.get(h.region); r != nil && r.failing.Load() {
		patience = homeRefused
	}
	if h.down != 0 && len(h.measured) > 1 {
		if failing = now-h.down >= patience; failing {
			h.bad[h.region] = now + badFor
		} else {
			h.next = h.down + patience
		}
	}
	maps.DeleteFunc(h.bad, func(_ int, until instant) bool { return now >= until })
	for _, until := range h.bad {
		if h.next == 0 || until < h.next {
			h.next = until
		}
	}

	v := electorate{
		regions:   h.measured,
		latency:   p.latenciesLocked(now),
		home:      h.region,
		connected: h.region != 0 && h.down == 0,
		settled:   p.ends.round != nil && p.ends.round.settled,
		bad:       func(id int) bool { return h.bad[id] != 0 },
	}
	target, race := elect(v)
	keep := map[int]bool{}
	if race || failing {
		for _, id := range v.usable() {
			if len(keep) == maxRace {
				break
			}
			keep[id] = true
		}
	}
	if target != 0 {
		keep[target] = true
	}
	switch {
	case h.region == 0 && target != 0:
		h.setRegion(target)
	case target != h.region && p.relays.connected(target):
		h.setRegion(target)
	case race || failing:
		for _, id := range h.measured {
			if keep[id] && p.relays.connected(id) {
				h.setRegion(id)
				clear(keep) // the race is over
				break
			}
		}
	}
	h.noteDown(p.relays.connected(h.region), now)
	if h.down != 0 && len(h.measured) > 1 && h.next == 0 {
		h.next = h.down + patience
	}
	if h.region != 0 {
		keep[h.region] = true
	}
	p.relays.setKeep(keep, h.region)
	if p.idleCheck == 0 {
		p.idleCheck = now + relayIdleCheck
	}
}

func (h *home) setRegion(id int) { h.region, h.down = id, 0 }

// noteDown keeps the time since when home is not connected.
func (h *home) noteDown(connected bool, now instant) {
	switch {
	case h.region == 0 || connected:
		h.down = 0
	case h.down == 0:
		h.down = now
	}
}

// latenciesLocked returns the measured latencies of regions, scored.
func (p *Path) latenciesLocked(now instant) map[int]time.Duration {
	out := make(map[int]time.Duration)
	for id, l := range p.ends.latency {
		if d, ok := l.best(now); ok {
			if s := p.home.scores[id]; s > 0 {
				d = time.Duration(float64(d) * s)
			}
			out[id] = d
		}
	}
	return out
}

// reachableLocked reports whether peers can reach the node by what is known.
func (p *Path) reachableLocked() bool {
	return p.missingLocked() == ""
}

// missing says what Ready waits for.
func (p *Path) missing() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missingLocked()
}

func (p *Path) missingLocked() string {
	h := &p.home
	switch {
	case !h.haveMap:
		return "no relay map from control yet"
	case p.ends.at == 0:
		return "endpoints are not known yet"
	case h.region != 0 && p.relays.connected(h.region):
		return ""
	case !p.cfg.RelayOnly && (p.cfg.DirectOnly || len(h.failed) >= len(h.measured)):
		return "" // no relay to be had: direct paths only
	case len(h.measured) == 0:
		return "the relay map has no region to choose"
	}
	var why []string
	for _, id := range slices.Sorted(maps.Keys(h.failed)) {
		if err := h.failed[id]; err != nil {
			why = append(why, err.Error())
		}
	}
	if len(why) == 0 {
		return fmt.Sprintf("relay %d is not connected yet", h.region)
	}
	return strings.Join(why, "; ")
}
