package path_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/derp/relay"
	"mesh/identity"
	"mesh/internal/path"
	"mesh/internal/stun"
	"mesh/internal/vnet"
)

// world is an internet in memory with real relays, real STUN servers, a control
// server as far as paths need one, and agents that are real paths with traffic
// on them. All in virtual time.
type world struct {
	t      testing.TB
	n      *vnet.Net
	wg     sync.WaitGroup // what ends with n
	relays map[int]*relayHost
	deaf   bool // agents are not told when their interfaces change; set before they start

	mu     sync.Mutex // guards what follows
	mute   bool       // control is dead: nobody hears news of others
	agents map[identity.NodePublic]*agent
	peers  map[identity.NodePublic]path.Peer // what control knows
}

// controlDelay is how long news takes from one agent to the others.
const controlDelay = 20 * time.Millisecond

// inWorld runs a test in virtual time in a world with relay regions 1 to n.
func inWorld(t *testing.T, regions int, f func(t *testing.T, w *world), seed ...uint64) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, regions, append(seed, 7)[0])
		defer w.close()
		f(t, w)
	})
}

// setMute lets control die, or come back: then it hears what it missed.
func (w *world) setMute(on bool) {
	w.mu.Lock()
	back := w.mute && !on
	w.mute = on
	agents := slices.Collect(maps.Values(w.agents))
	w.mu.Unlock()
	if back {
		for _, a := range agents {
			a.publish()
		}
	}
}

func newWorld(t testing.TB, regions int, seed uint64) *world {
	w := &world{
		t: t, n: vnet.New(seed), relays: make(map[int]*relayHost),
		agents: make(map[identity.NodePublic]*agent), peers: make(map[identity.NodePublic]path.Peer),
	}
	for id := 1; id <= regions; id++ {
		w.relays[id] = w.newRelay(id)
	}
	return w
}

func (w *world) close() {
	for _, a := range w.agents {
		a.close()
	}
	for _, r := range w.relays {
		r.kill()
		r.cancel()
		r.wg.Wait()
	}
	w.n.Close()
	w.wg.Wait()
}

// relayHost is a region: a host with DERP and STUN, and another one with STUN
// at another address and port.
type relayHost struct {
	w           *world
	region      int
	host, other *vnet.Host
	key         identity.NodePrivate
	cert        tls.Certificate
	pin         string
	cancel      context.CancelFunc
	wg          sync.WaitGroup // STUN
	srv         *relay.Server  // nil while it is dead
	served      chan error
}

// relayPair is the same certificate for all tests: making one is slow.
var relayPair = sync.OnceValues(func() (tls.Certificate, string) {
	certPEM, keyPEM, pin, err := relay.SelfSigned([]string{"relay"}, nil)
	if err != nil {
		panic(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		panic(err)
	}
	return cert, pin
})

func (w *world) newRelay(region int) *relayHost {
	r := &relayHost{w: w, region: region, host: w.n.Host(vnet.Dual), other: w.n.Host(vnet.Dual), key: identity.NewNode()}
	r.cert, r.pin = relayPair()
	// The next region is farther away.
	link := vnet.Link{Latency: 5 * time.Millisecond * time.Duration(1+3*(region-1))}
	r.host.SetLink(link)
	r.other.SetLink(link)
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	for _, h := range []*vnet.Host{r.host, r.other} {
		for _, addr := range []string{":3478", ":3479"} {
			pc, err := h.ListenUDP(ctx, "udp", addr)
			if err != nil {
				w.t.Fatal(err)
			}
			r.wg.Go(func() {
				defer pc.Close()
				(&stun.Server{Rate: -1}).Serve(ctx, pc)
			})
		}
	}
	r.start()
	return r
}

// start starts the relay, again after kill.
func (r *relayHost) start() {
	if r.srv != nil {
		return
	}
	ln, err := r.host.ListenTCP("tcp", ":443")
	if err != nil {
		r.w.t.Fatal(err)
	}
	srv := relay.New(relay.Config{Key: r.key, Admit: func(context.Context, identity.NodePublic, netip.Addr) error { return nil }})
	r.srv, r.served = srv, make(chan error, 1)
	go func() { r.served <- srv.Serve(ln, relay.TLSConfig(r.cert, srv)) }()
}

// kill ends the relay's process; STUN goes on.
func (r *relayHost) kill() {
	if r.srv != nil {
		r.srv.Close()
		<-r.served
		r.srv = nil
	}
}

// cut makes the whole region silent, or ends that.
func (r *relayHost) cut(on bool) {
	r.host.Cut(on)
	r.other.Cut(on)
}

func (r *relayHost) def() *wire.DERPRegion {
	node := func(name string, h *vnet.Host, port int, only bool) *wire.DERPNode {
		return &wire.DERPNode{
			Name: name, RegionID: r.region, HostName: "relay", CertName: r.pin,
			IPv4: h.Addr().String(), IPv6: h.Addr6().String(), STUNPort: port, STUNOnly: only,
		}
	}
	return &wire.DERPRegion{RegionID: r.region, Nodes: []*wire.DERPNode{
		node("a", r.host, 3478, false), node("b", r.other, 3479, true),
	}}
}

func (w *world) relayMap() *wire.DERPMap {
	m := &wire.DERPMap{Regions: make(map[int]*wire.DERPRegion)}
	for id, r := range w.relays {
		m.Regions[id] = r.def()
	}
	return m
}

// agent is a path on a host of the world.
type agent struct {
	*path.Path
	w    *world
	name string
	host *vnet.Host
	key  identity.NodePublic
	disc identity.DiscoPrivate

	also   []io.Closer // closed before the path
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex // guards what follows
	report path.Report
	flows  map[identity.NodePublic]*flow
}

// flow is what an agent has with a peer: a session as WireGuard would have
// one, and what came over it.
type flow struct {
	up      bool
	asked   time.Time // last initiation
	next    uint64
	seen    map[uint64]bool
	first   time.Time // arrival of the first data
	last    time.Time // and of the last, unless it came twice
	gap     time.Duration
	direct  int
	relayed int
	udp     time.Time // arrival of the last directly
}

// agent starts a path on a host and waits until it is ready.
func (w *world) agent(name string, h *vnet.Host, change ...func(*path.Config)) *agent {
	w.t.Helper()
	a := w.agentNoWait(name, h, change...)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := a.Ready(ctx); err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	return a
}

func (w *world) agentNoWait(name string, h *vnet.Host, change ...func(*path.Config)) *agent {
	w.t.Helper()
	a := &agent{w: w, name: name, host: h, disc: identity.NewDisco(), flows: make(map[identity.NodePublic]*flow)}
	key := identity.NewNode()
	a.key = key.Public()
	cfg := path.Config{
		Key: key, Disco: a.disc,
		Lookup: func(k identity.NodePublic) (path.Peer, bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			pr, ok := w.peers[k]
			return pr, ok && k != a.key
		},
		LookupDisco: func(k identity.DiscoPublic) (out []path.Peer) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, pr := range w.peers {
				if pr.Disco == k && pr.Key != a.key {
					out = append(out, pr)
				}
			}
			return out
		},
		Receive:    a.receive,
		Report:     a.reported,
		ListenUDP:  h.ListenUDP,
		DialTCP:    h.DialTCP,
		Interfaces: h.Interfaces,
	}
	for _, c := range change {
		c(&cfg)
	}
	p, err := path.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	a.Path = p
	w.mu.Lock()
	w.agents[a.key] = a
	w.peers[a.key] = path.Peer{Key: a.key, Disco: a.disc.Public()}
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	// What the operating system tells of its interfaces.
	a.wg.Go(func() {
		for k := uint64(0); ; {
			next, err := h.WaitChange(ctx, k)
			if err != nil || ctx.Err() != nil {
				return
			}
			if k = next; !w.deaf {
				p.NetworkChanged()
			}
		}
	})
	p.SetRelays(w.relayMap())
	return a
}

func (a *agent) close() {
	a.cancel()
	for _, c := range a.also {
		c.Close()
	}
	a.Path.Close()
	a.wg.Wait()
}

// reported is Config.Report.
func (a *agent) reported(r path.Report) {
	a.mu.Lock()
	a.report = r
	a.mu.Unlock()
	time.AfterFunc(controlDelay, a.publish)
}

// publish is what control does with the news of a node.
func (a *agent) publish() {
	a.mu.Lock()
	r := a.report
	a.mu.Unlock()
	w := a.w
	w.mu.Lock()
	if w.mute {
		w.mu.Unlock()
		return
	}
	w.peers[a.key] = path.Peer{Key: a.key, Disco: a.disc.Public(), Endpoints: r.Endpoints, HomeRegion: r.NetInfo.PreferredDERP}
	others := slices.Collect(maps.Values(w.agents))
	w.mu.Unlock()
	for _, o := range others {
		if o != a {
			o.Update([]identity.NodePublic{a.key})
		}
	}
}

// Messages look like WireGuard's as far as a path looks at them.
const (
	initiationLen = 148
	responseLen   = 92
	dataLen       = 96
	fullLen       = 1312 // a packet of 1280 bytes, sealed
	retryAfter    = 5 * time.Second
)

func (a *agent) message(kind byte, size int, number uint64) []byte {
	b := make([]byte, size)
	b[0] = kind
	key := a.key.Bytes()
	copy(b[8:], key[:])
	binary.LittleEndian.PutUint64(b[40:], number)
	return b
}

func (a *agent) flowLocked(k identity.NodePublic) *flow {
	f := a.flows[k]
	if f == nil {
		f = &flow{seen: make(map[uint64]bool)}
		a.flows[k] = f
	}
	return f
}

// receive is Config.Receive.
func (a *agent) receive(src path.Source, datagrams [][]byte) {
	for _, b := range datagrams {
		if len(b) < 48 {
			a.w.t.Errorf("%s received %d bytes", a.name, len(b))
			continue
		}
		from := identity.NodePublicFrom([32]byte(b[8:40]))
		if src.Addr.IsValid() && src.Peer != from {
			a.Authenticated(from, src)
		}
		number := binary.LittleEndian.Uint64(b[40:])
		var answer []byte
		a.mu.Lock()
		f := a.flowLocked(from)
		f.up = true
		switch {
		case b[0] == 1:
			answer = a.message(2, responseLen, 0)
		case b[0] == 4:
			now := time.Now()
			if src.Addr.IsValid() {
				f.direct++
				f.udp = now
			} else {
				f.relayed++
			}
			if f.seen[number] {
				break
			}
			f.seen[number] = true
			if f.first.IsZero() {
				f.first = now
			} else {
				f.gap = max(f.gap, now.Sub(f.last))
			}
			f.last = now
		}
		a.mu.Unlock()
		if answer != nil {
			a.Send(from, src.Addr, [][]byte{answer})
		}
	}
}

// say sends one datagram, after a handshake.
func (a *agent) say(to *agent, size int) {
	a.mu.Lock()
	f := a.flowLocked(to.key)
	var b []byte
	switch {
	case f.up:
		b = a.message(4, size, f.next)
		f.next++
	case time.Since(f.asked) >= retryAfter:
		b = a.message(1, initiationLen, 0)
		f.asked = time.Now()
	}
	a.mu.Unlock()
	if b != nil {
		a.Send(to.key, netip.AddrPort{}, [][]byte{b}) // best effort, as ever
	}
}

// every is how often agents that talk send.
const every = 40 * time.Millisecond

// talk lets agents send to each other for a while.
func talk(a, b *agent, d time.Duration) { talkUntil(a, b, d, dataLen, func() bool { return false }) }

func talkUntil(a, b *agent, d time.Duration, size int, done func() bool) {
	for end := time.Now().Add(d); time.Now().Before(end) && !done(); time.Sleep(every) {
		a.say(b, size)
		b.say(a, size)
	}
	synctest.Wait()
}

// resetGap forgets the gaps until now.
func (a *agent) resetGap(from *agent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.flowLocked(from.key)
	f.gap = 0
	f.direct, f.relayed = 0, 0
}

// gapFrom is the longest time without anything from a peer, until now.
func (a *agent) gapFrom(from *agent) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.flowLocked(from.key)
	if f.first.IsZero() {
		return time.Hour
	}
	return max(f.gap, time.Since(f.last))
}

func (a *agent) heardFrom(from *agent) (first time.Time, direct, relayed int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f := a.flowLocked(from.key)
	return f.first, f.direct, f.relayed
}

func (a *agent) directTo(b *agent) bool { return a.Status(b.key).Trusted }

func bothDirect(a, b *agent) bool { return a.directTo(b) && b.directTo(a) }

// how tells the state of a pair.
func how(a, b *agent) string {
	one := func(a, b *agent) string {
		st := a.Status(b.key)
		if st.Trusted {
			return st.Direct.String()
		}
		return fmt.Sprintf("relay %d (%s)", st.Region, st.Why)
	}
	return one(a, b) + " / " + one(b, a)
}
