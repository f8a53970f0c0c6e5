package netcheck

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/internal/stun"
)

const (
	stunTime = 3 * time.Second
	// httpsAfter is how long no STUN answer makes UDP look blocked.
	httpsAfter = time.Second
	// enough is after how many regions' answers others are waited for only as
	// long as the slowest of these took, twice that in a full report.
	enough       = 3
	minWait      = 20 * time.Millisecond
	resolveTime  = 1500 * time.Millisecond
	maxPending   = 1024
	maxDatagram  = 1500
	maxReadErrs  = 100
	hairpinTries = 3
	hairpinEvery = 100 * time.Millisecond
	hairpinTime  = 500 * time.Millisecond
)

// check is a report in the making.
type check struct {
	cfg     Config
	ctx     context.Context
	began   time.Time
	full    bool
	regions []*wire.DERPRegion
	own     []netip.Prefix
	has4    bool // an interface has an address that leads somewhere
	has6    bool

	wg    sync.WaitGroup // all goroutines
	socks []*socket      // the first two are those for IPv4 and IPv6, if any
	news  chan struct{}  // capacity 1; an answer came

	mu       sync.Mutex // guards what follows
	pending  map[stun.TxID]asked
	answers  map[key]answer
	mapped   map[netip.AddrPort]netip.AddrPort // by STUN server, IPv4
	global4  netip.AddrPort                    // as the first server saw us
	server4  netip.AddrPort                    // that server
	global6  netip.AddrPort
	hairpin  map[stun.TxID]bool // sent to ourselves; true = it arrived
	hairAddr netip.AddrPort     // of the second socket
	report   Report             // what others than STUN found out
}

// key names a target.
type key struct {
	region int
	v6     bool
}

// asked is a request under way.
type asked struct {
	key
	to   netip.AddrPort
	sock *socket
	at   time.Time
	hair bool // of the second socket for the hairpin test
}

type answer struct{ latency time.Duration }

// socket is a UDP socket with its reader.
type socket struct {
	pc net.PacketConn
	v6 bool
}

func newCheck(ctx context.Context, cfg Config, regions []*wire.DERPRegion) (*check, error) {
	c := &check{
		cfg: cfg, ctx: ctx, began: time.Now(), regions: regions,
		news:    make(chan struct{}, 1),
		pending: make(map[stun.TxID]asked),
		answers: make(map[key]answer),
		mapped:  make(map[netip.AddrPort]netip.AddrPort),
		hairpin: make(map[stun.TxID]bool),
	}
	c.full = cfg.Full || fullDue(cfg.Previous, c.began)
	own, err := cfg.Interfaces()
	if err != nil {
		c.cfg.Logger.Debug("list interfaces", zap.Error(err))
	}
	c.own = own
	for _, p := range own {
		if a := p.Addr().Unmap(); a.IsGlobalUnicast() {
			c.has4 = c.has4 || a.Is4()
			c.has6 = c.has6 || a.Is6()
		}
	}
	err4 := c.open(false)
	err6 := c.open(true)
	if len(c.socks) == 0 {
		return nil, errors.Join(err4, err6)
	}
	return c, nil
}

// open opens one more socket and starts its reader.
func (c *check) open(v6 bool) error {
	network, addr := "udp4", "0.0.0.0:0"
	if v6 {
		network, addr = "udp6", "[::]:0"
	}
	pc, err := c.cfg.ListenUDP(c.ctx, network, addr)
	if err != nil {
		return err
	}
	s := &socket{pc, v6}
	c.socks = append(c.socks, s)
	c.wg.Go(func() { c.read(s) })
	return nil
}

// socket returns the socket of a family, nil if there is none.
func (c *check) socket(v6 bool) *socket {
	for _, s := range c.socks {
		if s.v6 == v6 {
			return s
		}
	}
	return nil
}

// run makes the report and leaves nothing behind.
func (c *check) run() *Report {
	ctx, cancel := context.WithCancel(c.ctx)
	defer c.wg.Wait()
	defer func() {
		cancel()
		for _, s := range c.socks {
			s.pc.Close()
		}
	}()
	var side sync.WaitGroup // what goes on beside STUN
	if c.full {
		side.Go(func() { c.portMapping(ctx) })
		side.Go(func() { c.captivePortal(ctx) })
	}
	targets := plan(c.regions, c.full, bestOf(c.cfg.Previous, c.began), homeOf(c.cfg.Previous))
	if !c.full && len(targets) == 0 {
		c.full = true
		targets = plan(c.regions, true, nil, 0)
	}
	targets = slices.DeleteFunc(targets, func(t target) bool { return !c.reachable(t) })
	c.stun(ctx, targets, &side)
	if c.full {
		c.testHairpin(ctx)
	}
	side.Wait()
	return c.compose(targets)
}

// reachable reports whether a target can be asked at all.
func (c *check) reachable(t target) bool {
	if c.socket(t.v6) == nil {
		return false
	}
	if t.v6 && c.has6 || !t.v6 && c.has4 {
		return true
	}
	return slices.ContainsFunc(t.nodes, isTest)
}

// stun asks the targets and returns when their answers are in or not worth
// waiting for.
func (c *check) stun(ctx context.Context, targets []target, side *sync.WaitGroup) {
	if len(targets) == 0 {
		c.measureHTTPS(ctx, side)
		return
	}
	asking, done := context.WithCancel(ctx)
	var askers sync.WaitGroup
	for _, t := range targets {
		askers.Go(func() { c.ask(asking, t) })
	}
	defer askers.Wait()
	defer done()

	https, giveUp := context.WithCancel(ctx)
	defer func() {
		// What the relays answer by UDP makes the rest superfluous. Otherwise
		// the end of ctx ends it.
		if c.progress(targets).regions > 0 {
			giveUp()
		}
	}()
	end := time.NewTimer(stunTime)
	defer end.Stop()
	blocked := time.NewTimer(httpsAfter)
	defer blocked.Stop()
	rest := time.NewTimer(stunTime) // of waiting for the slower ones
	defer rest.Stop()
	waiting := false
	for {
		select {
		case <-c.news:
			p := c.progress(targets)
			if p.complete {
				return
			}
			if p.regions >= min(enough, len(c.regions)) && !waiting {
				waiting = true
				rest.Reset(c.patience(p))
			}
		case <-blocked.C:
			if c.progress(targets).regions == 0 {
				c.measureHTTPS(https, side)
			}
		case <-rest.C:
			return
		case <-end.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// patience is how long to wait for the rest when enough regions have answered.
func (c *check) patience(p progress) time.Duration {
	if !c.full {
		return max(p.slowest, minWait)
	}
	wait := max(2*p.slowest, minWait)
	if p.oneView {
		// Until the last requests could have been answered.
		wait = max(wait, time.Until(c.began.Add((fullTries-1)*fullSpacing))+2*p.slowest)
	}
	return wait
}

// progress is how far STUN has come.
type progress struct {
	regions  int           // that answered
	slowest  time.Duration // the longest of their shortest times
	oneView  bool          // of our IPv4 address, where there could be a second to tell the NAT's kind
	complete bool          // there is nothing to wait for
}

func (c *check) progress(targets []target) (p progress) {
	c.mu.Lock()
	defer c.mu.Unlock()
	best := make(map[int]time.Duration)
	servers := make(map[*wire.DERPNode]bool)
	p.complete = true
	for _, t := range targets {
		a, ok := c.answers[key{t.region, t.v6}]
		p.complete = p.complete && ok
		if ok && (best[t.region] == 0 || a.latency < best[t.region]) {
			best[t.region] = a.latency
		}
		if !t.v6 {
			for _, n := range t.nodes {
				servers[n] = true
			}
		}
	}
	for _, d := range best {
		p.slowest = max(p.slowest, d)
	}
	p.regions = len(best)
	p.oneView = len(c.mapped) == 1 && len(servers) > 1
	p.complete = p.complete && !p.oneView
	return p
}

// ask sends a target its requests until it has answered.
func (c *check) ask(ctx context.Context, t target) {
	for i, after := range t.after {
		wait := time.NewTimer(time.Until(c.began.Add(after)))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return
		}
		n := t.nodes[i%len(t.nodes)]
		if !c.worthAsking(t, i) {
			continue
		}
		a, name := stunHost(n, t.v6)
		if name != "" {
			a = c.resolve(ctx, name, t.v6)
		}
		port := n.STUNPort
		if port == 0 {
			port = defaultSTUNPort
		}
		if a.IsValid() {
			c.request(asked{key: key{t.region, t.v6}, to: netip.AddrPortFrom(a, uint16(port)), sock: c.socket(t.v6)})
		}
	}
}

// worthAsking reports whether another request to a target tells anything.
func (c *check) worthAsking(t target, try int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, answered := c.answers[key{t.region, t.v6}]
	return !answered || !t.v6 && len(c.mapped) < 2 && try < len(t.nodes)
}

// resolve returns an address of a name, the zero one if there is none.
func (c *check) resolve(ctx context.Context, name string, v6 bool) netip.Addr {
	ctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	network := "ip4"
	if v6 {
		network = "ip6"
	}
	list, err := c.cfg.Resolve(ctx, network, name)
	if err != nil {
		c.cfg.Logger.Debug("resolve relay", zap.String("name", name), zap.Error(err))
		return netip.Addr{}
	}
	for _, a := range list {
		if a = a.Unmap(); a.IsValid() && a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// request sends a STUN request.
func (c *check) request(q asked) {
	tx := stun.NewTxID()
	q.at = time.Now()
	c.mu.Lock()
	full := len(c.pending) >= maxPending
	if !full {
		c.pending[tx] = q
	}
	c.mu.Unlock()
	if !full {
		c.send(q.sock, q.to, tx)
	}
}

func (c *check) send(s *socket, to netip.AddrPort, tx stun.TxID) {
	var b [stun.RequestLen]byte
	if _, err := s.pc.WriteTo(stun.AppendRequest(b[:0], tx), net.UDPAddrFromAddrPort(to)); err != nil {
		c.cfg.Logger.Debug("send STUN request", zap.Stringer("to", to), zap.Error(err))
	}
}

// read takes what comes to a socket until that is closed.
func (c *check) read(s *socket) {
	var b [maxDatagram]byte
	for errs := 0; errs < maxReadErrs; {
		n, a, err := s.pc.ReadFrom(b[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // an ICMP error, on some systems
			errs++
			continue
		}
		errs = 0
		u, ok := a.(*net.UDPAddr)
		if !ok {
			continue
		}
		from := u.AddrPort()
		c.take(s, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), b[:n])
	}
}

// take takes a datagram.
func (c *check) take(s *socket, from netip.AddrPort, b []byte) {
	now := time.Now()
	if tx, err := stun.ParseRequest(b); err == nil {
		c.mu.Lock()
		_, ours := c.hairpin[tx]
		if ours {
			c.hairpin[tx] = true
		}
		c.mu.Unlock()
		if ours {
			c.tell()
		}
		return
	}
	tx, mapped, err := stun.ParseResponse(b)
	if err != nil || !usable(mapped) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	q, ok := c.pending[tx]
	if !ok || q.to != from || q.sock != s || mapped.Addr().Is6() != q.v6 {
		return
	}
	delete(c.pending, tx)
	defer c.tell()
	if q.hair {
		c.hairAddr = mapped
		return
	}
	if a, ok := c.answers[q.key]; !ok || now.Sub(q.at) < a.latency {
		c.answers[q.key] = answer{max(now.Sub(q.at), time.Microsecond)}
	}
	switch {
	case q.v6 && !c.global6.IsValid():
		c.global6 = mapped
	case !q.v6:
		if !c.global4.IsValid() {
			c.global4, c.server4 = mapped, from
		}
		c.mapped[from] = mapped
	}
}

func (c *check) tell() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// usable reports whether somebody may have an address.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.Port() != 0 && ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast()
}

// testHairpin finds out whether the NAT sends to a host what another host
// behind it sends to its public address. Both ends send, as two peers would.
func (c *check) testHairpin(ctx context.Context) {
	c.mu.Lock()
	global, server := c.global4, c.server4
	c.mu.Unlock()
	first := c.socket(false)
	if first == nil || !global.IsValid() || c.isOwn(global.Addr()) || c.open(false) != nil {
		return
	}
	second := c.socks[len(c.socks)-1]
	ctx, cancel := context.WithTimeout(ctx, hairpinTime)
	defer cancel()
	again := time.NewTicker(hairpinEvery)
	defer again.Stop()
	arrived := false
	for sent := 0; ctx.Err() == nil; {
		c.mu.Lock()
		other := c.hairAddr
		for _, ok := range c.hairpin {
			arrived = arrived || ok
		}
		c.mu.Unlock()
		if arrived {
			break
		}
		if sent < hairpinTries {
			if other.IsValid() {
				sent++
				a, b := stun.NewTxID(), stun.NewTxID()
				c.mu.Lock()
				c.hairpin[a], c.hairpin[b] = false, false
				c.mu.Unlock()
				c.send(first, other, a)
				c.send(second, global, b)
			} else {
				c.request(asked{to: server, sock: second, hair: true})
			}
		}
		select {
		case <-again.C:
		case <-c.news:
		case <-ctx.Done():
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hairAddr.IsValid() && c.ctx.Err() == nil {
		c.report.Hairpin = &arrived
	}
}

func (c *check) isOwn(a netip.Addr) bool {
	return slices.ContainsFunc(c.own, func(p netip.Prefix) bool { return p.Addr().Unmap() == a })
}

func (c *check) portMapping(ctx context.Context) {
	if c.cfg.PortMapping == nil {
		return
	}
	p := c.cfg.PortMapping(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.PortMapping = &p
}

// compose puts everything together.
func (c *check) compose(targets []target) *Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.report
	r.Time, r.Full = c.began.UTC(), c.full
	r.IPv4.Available, r.IPv6.Available = c.has4, c.has6
	r.IPv4.Global, r.IPv6.Global = c.global4, c.global6
	is := func(b bool) *bool { return &b }
	if len(targets) > 0 {
		r.UDP = is(len(c.answers) > 0)
	}
	for _, t := range targets {
		_, ok := c.answers[key{t.region, t.v6}]
		f := &r.IPv4
		if t.v6 {
			f = &r.IPv6
		}
		f.Works = is(ok || f.Works != nil && *f.Works)
	}
	if c.global4.IsValid() {
		r.NAT = is(!c.isOwn(c.global4.Addr()))
	}
	if len(c.mapped) > 1 {
		r.MappingVaries = is(false)
		for _, m := range c.mapped {
			if m != c.global4 {
				r.MappingVaries = is(true)
			}
		}
	}
	https := c.report.Regions // of measureHTTPS
	r.Regions = []Region{}
	for _, def := range c.regions {
		g := Region{ID: def.RegionID, Code: def.RegionCode, Name: def.RegionName}
		g.V4 = Latency(c.answers[key{g.ID, false}].latency)
		g.V6 = Latency(c.answers[key{g.ID, true}].latency)
		in := slices.ContainsFunc(targets, func(t target) bool { return t.region == g.ID })
		if len(c.answers) == 0 {
			for _, h := range https {
				if h.ID == g.ID {
					g.HTTPS, g.Error, in = h.HTTPS, h.Error, true
				}
			}
		}
		if in || c.full {
			r.Regions = append(r.Regions, g)
		}
	}
	return &r
}

func port(n, standard int) string {
	if n == 0 {
		n = standard
	}
	return strconv.Itoa(n)
}
