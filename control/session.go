package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
	"mesh/internal/errand"
	"mesh/internal/netmap"
)

// steady is how long a map stream must have lived for its end not to count as
// one more failure in a row.
const steady = 30 * time.Second

// For ShortOutage after the last contact attempts to connect are at most
// QuickRetry apart.
const (
	ShortOutage = 2 * time.Hour
	QuickRetry  = 2 * time.Second
)

// HostState is what the control server and peers are told about a node.
type HostState struct {
	DiscoKey identity.DiscoPublic
	Hostinfo *wire.Hostinfo // with NetInfo, once that is known
	// Endpoints are where the node's UDP socket may be reached, and
	// EndpointTypes, in parallel, how each was found.
	Endpoints     []netip.AddrPort
	EndpointTypes []wire.EndpointType
}

// SessionConfig is what a Session is made from.
type SessionConfig struct {
	NodeKey identity.NodePublic // of a registered node; required
	// InForce is the map that the node works with already, from SavedMap; nil
	// = none. The first map of the control server is compared with it.
	InForce *netmap.Map
	// OnMap gets each new map, and what differs from the one before; required.
	// It is called by Run, one call at a time.
	OnMap func(*netmap.Map, netmap.Delta)
	// OnState is called by Run when the connection comes up (with nil) and for
	// each failure (with the reason). It may be nil.
	OnState func(error)
	// Ephemeral says that the node was registered as one to forget.
	Ephemeral bool
	// Store keeps the last map for SavedMap; nil = it is not kept.
	Store identity.Store
	// SaveEvery says how old what is kept for SavedMap may become while the
	// control server is there, 0 = any age. It may be nil.
	SaveEvery func() time.Duration
	// NoteFlows is called when the control server wants to hear of connection
	// attempts, or no longer does, and Flows returns those since the last call.
	// With nil nobody is told.
	NoteFlows func(on bool)
	Flows     func() []wire.Flow
}

// Session keeps a registered node in touch with its control server.
type Session struct {
	c   *Client
	cfg SessionConfig

	nudge chan struct{} // asks Run not to wait any longer

	// What Run has to do now and then, each on a goroutine only meanwhile.
	updating *errand.Errand // send a lite update
	probing  *errand.Errand // look at the connection
	saving   *errand.Errand // save the map
	flowing  *errand.Errand // report flows

	mu      sync.Mutex // guards the fields below
	host    HostState
	applied applied
	want    int // counts reasons for a lite update
	sent    int // value of want that a lite update has covered
	online  bool
	follows bool                    // the present map poll has brought a map
	endPoll context.CancelCauseFunc // of the present map poll
	last    *netmap.Map             // to be saved
	dirty   bool                    // it is not saved yet
	savedAt time.Time               // when a map was saved last
	nudged  time.Time               // when Retry was called last
	// flowsEvery is how often to report flows, 0 = never.
	flowsEvery time.Duration
	// ctx is Run's, and stop makes it end for a reason; nil while Run does not run.
	ctx  context.Context
	stop context.CancelCauseFunc
	// saveTimer and flowTimer ask for saving and flowing; nil = not set.
	saveTimer, flowTimer *time.Timer
}

// NewSession returns a session; Run starts it.
func (c *Client) NewSession(cfg SessionConfig) *Session {
	s := &Session{c: c, cfg: cfg, nudge: make(chan struct{}, 1)}
	s.updating = errand.New(s.sendUpdates)
	s.probing = errand.New(s.probe)
	s.saving = errand.New(s.saveMap)
	s.flowing = errand.New(s.reportFlows)
	return s
}

// context returns Run's, nil if that does not run.
func (s *Session) context() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ctx
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// SetHostState says how the node is now. The control server is told when that
// is news, at once or as soon as it is connected; if several changes come
// meanwhile it hears of the last. Relay latencies alone are no news. The
// contents of h must not change after.
func (s *Session) SetHostState(h HostState) {
	s.tell(func() (news bool) {
		news = !sameState(s.host, h)
		s.host = h
		return news
	})
}

// tell changes what the control server is told of the node, and asks for a lite
// update if change reports that it is news. change runs with mu held.
func (s *Session) tell(change func() (news bool)) {
	s.mu.Lock()
	news := change()
	if news {
		s.want++
	}
	s.mu.Unlock()
	if news {
		s.updating.Ask()
	}
}

// applied are versions that are in force.
type applied struct{ policy, version int64 }

// SetApplied says which version of the policy and which version of the map are
// in force at the node, which the control server is told like host state.
func (s *Session) SetApplied(policy, version int64) {
	s.tell(func() (news bool) {
		now := applied{policy, version}
		news = s.applied != now
		s.applied = now
		return news
	})
}

// Retry says that the network has changed. A session that waits to connect
// again does so now, since there is reason to hope; one that is connected looks
// whether it still is.
func (s *Session) Retry() {
	s.mu.Lock()
	s.nudged = time.Now()
	s.mu.Unlock()
	signal(s.nudge)
	s.probing.Ask()
}

// Ask asks whether the control server is there, for Client.LastHeard, while a map
// stream is followed: it may have nothing to say for wire.KeepAliveInterval.
func (s *Session) Ask() { s.probing.Ask() }

// probe looks at the connection.
func (s *Session) probe() {
	ctx := s.context()
	if ctx == nil || !s.c.Probe(ctx) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.follows { // else there may be news that nobody gets
		s.c.noteHeard()
	}
}

// forgetNudge drops a Retry from so long before a failure that it was not about
// that.
func (s *Session) forgetNudge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.nudged) > 2*probeTime {
		select {
		case <-s.nudge:
		default:
		}
	}
}

// sameState compares all but relay latencies.
func sameState(a, b HostState) bool {
	return a.DiscoKey == b.DiscoKey && reflect.DeepEqual(a.Endpoints, b.Endpoints) &&
		reflect.DeepEqual(a.EndpointTypes, b.EndpointTypes) && reflect.DeepEqual(withoutLatency(a.Hostinfo), withoutLatency(b.Hostinfo))
}

func withoutLatency(h *wire.Hostinfo) *wire.Hostinfo {
	if h == nil || h.NetInfo == nil {
		return h
	}
	c, n := *h, *h.NetInfo
	n.DERPLatency = nil
	c.NetInfo = &n
	return &c
}

// request returns the body of a map request with all that is known, since some
// servers take over what polls say, and forget what they do not.
func (s *Session) request() (wire.MapRequest, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := wire.MapRequest{
		Version: wire.CapabilityVersion, NodeKey: s.cfg.NodeKey, DiscoKey: s.host.DiscoKey, KeepAlive: true,
		Hostinfo: s.host.Hostinfo, Endpoints: s.host.Endpoints, EndpointTypes: s.host.EndpointTypes, MeshApplied: s.applied.policy, MeshMapVersion: s.applied.version,
	}
	if r.Hostinfo == nil {
		r.Hostinfo = &wire.Hostinfo{}
	}
	return r, s.want
}

// Run keeps a map stream going until ctx ends or the control server does not
// want this node any more. It returns ctx's cause, or the reason: an error for
// which IsFatal holds. When it has returned nothing of it is running. A session
// runs once.
func (s *Session) Run(ctx context.Context) error {
	err := s.run(ctx)
	// Only now: the map may have been saved up to here.
	if s.cfg.Store != nil && (errors.Is(err, wire.ErrNodeRevoked) || errors.Is(err, wire.ErrMachineMismatch)) {
		if err := ForgetMap(s.cfg.Store); err != nil {
			s.c.log.Warn("a netmap that is void stays saved", zap.Error(err))
		}
	}
	return err
}

func (s *Session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	s.ctx, s.stop = ctx, cancel
	s.mu.Unlock()
	defer s.finish()
	defer cancel(nil)

	inForce := s.cfg.InForce
	var resume mapSession
	var wait backoff.Backoff
	contact := time.Now() // when the control server was last there
	for {
		var upSince time.Time
		var cur *netmap.Map
		poll, endPoll := context.WithCancelCause(ctx)
		s.setPoll(endPoll)
		err := s.c.Stream(poll, func() wire.MapRequest {
			r, _ := s.request()
			r.MapSessionHandle, r.MapSessionSeq = resume.handle, resume.seq
			s.setOnline(true)
			return r
		}, func(r *wire.MapResponse) error {
			s.askFlows(r.MeshReportFlows)
			prev := cur
			resumed := cur == nil && resume.handle != "" && r.MapSessionHandle == resume.handle
			if resumed {
				prev = inForce
			}
			next, d, err := netmap.Apply(prev, r)
			resume.follow(r, cur == nil, err)
			if err != nil || next == cur {
				return err
			}
			if next.Self().Key != s.cfg.NodeKey {
				return fmt.Errorf("control server sent the map of another node, %s", next.Self().Key.Short())
			}
			if cur == nil {
				if !resumed {
					ignored := d.Ignored
					d = netmap.Rebase(inForce, next)
					d.Ignored = ignored
				}
				upSince = time.Now()
				s.setFollows()
				s.state(nil)
			}
			if len(d.Ignored) > 0 {
				s.c.log.Warn("parts of a netmap are not believed", zap.Strings("parts", d.Ignored))
			}
			cur, inForce = next, next
			s.keep(next)
			s.cfg.OnMap(next, d)
			return nil
		})
		endPoll(nil)
		s.setOnline(false)
		s.askFlows(new(int)) // until another stream asks
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if forgotten(err) {
			err = s.registerAgain(ctx, err)
		}
		if IsFatal(err) {
			return err
		}
		s.state(err)
		if !upSince.IsZero() {
			contact = time.Now()
			if contact.Sub(upSince) >= steady {
				wait.Reset()
			}
		}
		// What nodes wait for after an outage, new grants above all, should
		// take no longer than a moment. A server that is gone for good is
		// another thing, and one that is busy says so with Retry-After.
		wait.Max = QuickRetry
		if time.Since(contact) > ShortOutage {
			wait.Max = backoff.DefaultMax
		}
		s.c.log.Debug("map stream ended, will try again", zap.Error(err))
		s.forgetNudge()
		if wait.Wait(ctx, RetryAfter(err), s.nudge, nil) != nil {
			return context.Cause(ctx)
		}
	}
}

// mapSession is how far a map stream was followed: what the next one may go on
// from. A server that does not know it any more sends a complete map.
type mapSession struct {
	handle string // "" = there is nothing to go on from
	seq    int64
}

// follow notes a message that was applied, the first of a stream or a later one.
// One that cannot be followed is not asked for again.
func (m *mapSession) follow(r *wire.MapResponse, first bool, err error) {
	if first {
		m.handle = r.MapSessionHandle
	}
	if r.Seq != 0 {
		m.seq = r.Seq
	}
	if err != nil {
		*m = mapSession{}
	}
}

// registerAgain asks a control server that has forgotten the node, which is why,
// to take it back as it is. An enrolment key is not used for that: who was
// removed by an administrator stays out. It returns what to go on with, never
// nil.
func (s *Session) registerAgain(ctx context.Context, why error) error {
	r, _ := s.request()
	_, err := s.c.Register(ctx, wire.RegisterRequest{NodeKey: s.cfg.NodeKey, Hostinfo: r.Hostinfo, Ephemeral: s.cfg.Ephemeral})
	switch {
	case err == nil:
		s.c.log.Info("control server had forgotten this node and took it back")
		return ErrStreamEnded
	case ctx.Err() != nil, IsTemporary(err), IsFatal(err):
		return err
	}
	return fmt.Errorf("%w; %w", why, err)
}

func (s *Session) state(err error) {
	if s.cfg.OnState != nil {
		s.cfg.OnState(err)
	}
}

func (s *Session) setPoll(end context.CancelCauseFunc) {
	s.mu.Lock()
	s.endPoll = end
	s.mu.Unlock()
}

func (s *Session) setOnline(on bool) {
	s.mu.Lock()
	s.online, s.follows = on, false
	if on {
		s.want++ // each connection begins with an update
	}
	s.mu.Unlock()
	if on {
		s.updating.Ask()
	}
}

func (s *Session) setFollows() {
	s.mu.Lock()
	s.follows = true
	s.mu.Unlock()
}

// due returns the next lite update, and the count that it covers.
func (s *Session) due() (wire.MapRequest, int, bool) {
	r, want := s.request()
	s.mu.Lock()
	defer s.mu.Unlock()
	// Without a disco key there is nothing to tell yet.
	return r, want, s.online && s.sent != want && !r.DiscoKey.IsZero()
}

// finish waits until all errands are done, and saves the last map.
func (s *Session) finish() {
	for _, e := range []*errand.Errand{s.updating, s.probing, s.saving, s.flowing} {
		e.Close()
	}
	s.mu.Lock()
	for _, t := range []*time.Timer{s.saveTimer, s.flowTimer} {
		if t != nil {
			t.Stop()
		}
	}
	m, dirty := s.last, s.dirty
	s.mu.Unlock()
	if dirty {
		s.save(m)
	}
}

// sendUpdates sends the lite updates that are due, one at a time.
func (s *Session) sendUpdates() {
	var wait backoff.Backoff
	for {
		r, want, due := s.due()
		if !due {
			return
		}
		s.mu.Lock()
		ctx, stop := s.ctx, s.stop
		s.mu.Unlock()
		err := s.c.Update(ctx, r)
		if err == nil {
			s.mu.Lock()
			s.sent = want
			s.mu.Unlock()
			wait.Reset()
			continue
		}
		if ctx.Err() != nil {
			return
		}
		switch {
		case forgotten(err):
			// Some servers delete a node and keep its stream, which
			// hears of nothing any more.
			s.mu.Lock()
			endPoll := s.endPoll
			s.mu.Unlock()
			endPoll(err)
		case IsFatal(err):
			stop(err)
			return
		}
		s.c.log.Debug("update failed, will try again", zap.Error(err))
		if wait.Wait(ctx, RetryAfter(err), nil, nil) != nil {
			return
		}
	}
}

// saveInterval is how often a map is saved at most.
const saveInterval = 10 * time.Second

func (s *Session) keep(m *netmap.Map) {
	if s.cfg.Store == nil {
		return
	}
	s.mu.Lock()
	s.last, s.dirty = m, true
	s.mu.Unlock()
	s.saving.Ask()
}

// saveMap saves the latest map when that is due: it has changed, or what is
// saved has to be younger, and it was not saved a moment ago.
func (s *Session) saveMap() {
	var every time.Duration
	if s.cfg.SaveEvery != nil {
		every = s.cfg.SaveEvery()
	}
	s.mu.Lock()
	m, ago, due := s.last, time.Since(s.savedAt), saveInterval
	if !s.dirty {
		due = max(every, saveInterval)
	}
	switch {
	case m == nil || !s.dirty && every == 0:
		m = nil
	case !s.savedAt.IsZero() && ago < due:
		s.saveLaterLocked(due - ago)
		m = nil
	case !s.dirty && time.Since(s.c.LastHeard()) >= wire.Watchdog:
		s.saveLaterLocked(due)
		m = nil
	default:
		s.dirty, s.savedAt = false, time.Now()
		if s.cfg.SaveEvery != nil {
			s.saveLaterLocked(saveInterval) // by then the map is in force that says how old it may become
		}
	}
	s.mu.Unlock()
	if m != nil {
		s.save(m)
	}
}

func (s *Session) saveLaterLocked(d time.Duration) {
	if s.saveTimer == nil {
		s.saveTimer = time.AfterFunc(d, s.saving.Ask)
	} else {
		s.saveTimer.Reset(d)
	}
}

func (s *Session) save(m *netmap.Map) {
	if err := s.c.SaveMap(s.cfg.Store, m); err != nil {
		s.c.log.Warn("the netmap cannot be saved: without control server this node could not start again", zap.Error(err))
	}
}
