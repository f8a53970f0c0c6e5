package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

func peerNode(n int, key identity.NodePublic) *wire.Node {
	return &wire.Node{
		ID: wire.NodeID(n), StableID: fmt.Sprint("s", n), Name: fmt.Sprintf("n%d.mesh.internal.", n), Key: key,
		Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, 0, byte(n)}), 32)},
	}
}

// life is a session under test, and what it told.
type life struct {
	*Session
	c      *Client
	key    identity.NodePublic
	maps   []*netmap.Map
	deltas []netmap.Delta
	states []error
	end    chan error
	stop   context.CancelFunc
}

func live(t *testing.T, f *fake, change func(*SessionConfig)) *life {
	return liveWith(t, f, change, func(*life) {})
}

// liveWith lets prepare speak to the session before it runs.
func liveWith(t *testing.T, f *fake, change func(*SessionConfig), prepare func(*life)) *life {
	l := &life{c: f.client(), key: identity.NewNode().Public(), end: make(chan error, 1)}
	cfg := SessionConfig{
		NodeKey: l.key,
		OnMap:   func(m *netmap.Map, d netmap.Delta) { l.maps, l.deltas = append(l.maps, m), append(l.deltas, d) },
		OnState: func(err error) { l.states = append(l.states, err) },
	}
	if change != nil {
		change(&cfg)
		l.key = cfg.NodeKey
	}
	l.Session = l.c.NewSession(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = cancel
	prepare(l)
	go func() { l.end <- l.Run(ctx) }()
	return l
}

func (l *life) whole(peers ...*wire.Node) wire.MapResponse {
	return wire.MapResponse{Node: peerNode(200, l.key), Peers: peers, MeshPolicy: 1}
}

func TestSession(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		l := live(t, f, nil)
		k1, k2, k3 := identity.NewNode().Public(), identity.NewNode().Public(), identity.NewNode().Public()
		p := <-f.polls
		p.send(l.whole(peerNode(1, k1), peerNode(2, k2)))
		p.send(wire.MapResponse{PeersRemoved: []wire.NodeID{1}})
		p.send(wire.MapResponse{KeepAlive: true})
		synctest.Wait()
		if len(l.maps) != 2 || !l.deltas[0].Full || l.maps[1].NumPeers() != 1 || len(l.deltas[1].Removed) != 1 {
			t.Fatalf("maps %v, deltas %+v", l.maps, l.deltas)
		}
		if len(l.states) != 1 || l.states[0] != nil {
			t.Errorf("states %v", l.states)
		}

		// The server restarts: nothing that stayed the same is disturbed.
		f.cut()
		p = <-f.polls
		p.send(l.whole(peerNode(2, k2)))
		synctest.Wait()
		if d := l.deltas[2]; !d.Empty() {
			t.Errorf("an equal map after a reconnect changed %+v", d)
		}
		p.end()
		p = <-f.polls
		p.send(l.whole(peerNode(2, k2), peerNode(3, k3)))
		synctest.Wait()
		if d := l.deltas[3]; d.Full || len(d.Added) != 1 || len(d.Changed)+len(d.Removed) != 0 {
			t.Errorf("delta %+v", d)
		}
		var un *UnreachableError
		if len(l.states) != 5 || !errors.As(l.states[1], &un) || l.states[2] != nil || !errors.Is(l.states[3], ErrStreamEnded) || l.states[4] != nil {
			t.Errorf("states %v", l.states)
		}
		l.stop()
		if err := <-l.end; err != context.Canceled {
			t.Errorf("end: %v", err)
		}
	})
}

// A server that is away, broken or hostile is tried again for ever, less and
// less often; a new network makes it be tried at once.
func TestSessionRetries(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		l := live(t, f, nil)
		other := peerNode(200, identity.NewNode().Public())
		for _, play := range []func(*poll){
			func(p *poll) { p.send(wire.MapResponse{Node: other}) },
			func(p *poll) { p.send(wire.MapResponse{PeersRemoved: []wire.NodeID{1}}) },
			func(p *poll) { p.raw([]byte("GARBAGE!")) },
			func(p *poll) { p.answer(status(500, "oops")) },
			func(p *poll) { p.send(l.whole()) },
			func(p *poll) {}, func(p *poll) {}, func(p *poll) {}, func(p *poll) {}, func(p *poll) {},
		} {
			p := <-f.polls
			play(p)
			p.end()
		}
		gone := time.Now()
		var p *poll
		for time.Since(gone) <= ShortOutage {
			start := time.Now()
			p = <-f.polls
			// The last contact was some seconds before the loop began.
			if d := time.Since(start); d > QuickRetry && start.Sub(gone) < ShortOutage-30*time.Second {
				t.Errorf("%v after the server went the wait is %v", start.Sub(gone), d)
			}
			p.end()
		}
		start := time.Now()
		p = <-f.polls
		if d := time.Since(start); d < 15*time.Second || d > 30*time.Second {
			t.Errorf("after many failures the wait is %v", d)
		}
		if len(l.maps) != 1 {
			t.Errorf("%d maps", len(l.maps))
		}
		p.answer(status(http.StatusTooManyRequests, "", "Retry-After", "600"))
		p.end()
		start = time.Now()
		p = <-f.polls
		if d := time.Since(start); d < 600*time.Second || d > 800*time.Second {
			t.Errorf("the server asked for 600 s, the wait is %v", d)
		}
		p.end()
		synctest.Wait()
		l.Retry()
		start = time.Now()
		p = <-f.polls
		if time.Since(start) != 0 {
			t.Errorf("in spite of Retry the wait is %v", time.Since(start))
		}
		p.send(l.whole())
		synctest.Wait()

		// While all is well Retry disturbs nothing.
		before := len(l.states)
		l.Retry()
		time.Sleep(time.Minute)
		if len(l.states) != before {
			t.Errorf("states %v", l.states[before:])
		}
		// But a connection that has died, as when the network changed, is
		// found out long before the watchdog would.
		f.freeze()
		l.Retry()
		start = time.Now()
		<-f.polls
		if d := time.Since(start); d > time.Minute || len(l.states) < before+1 {
			t.Errorf("a dead connection was replaced after %v, states %v", d, l.states)
		}
		l.stop()
		<-l.end
		f.thaw()
	})
}

func TestSessionFatal(t *testing.T) {
	for _, code := range []wire.ErrorCode{wire.CodeNodeRevoked, wire.CodeCloned, wire.CodeMachineMismatch, wire.CodeNodeKeyExpired} {
		inMemory(t, func(t *testing.T, f *fake) {
			store := &identity.MemoryStore{}
			l := live(t, f, func(c *SessionConfig) { c.Store = store })
			p := <-f.polls
			p.send(l.whole())
			synctest.Wait()
			if _, _, err := l.c.SavedMap(store, l.key); err != nil {
				t.Error(err)
			}
			p.send(wire.MapResponse{MeshCode: code})
			if err := <-l.end; !errors.Is(err, code.Err()) {
				t.Errorf("%s: %v", code, err)
			}
			_, _, err := l.c.SavedMap(store, l.key)
			gone := code == wire.CodeNodeRevoked || code == wire.CodeMachineMismatch
			if gone != errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: the saved map: %v", code, err)
			}

			// As the answer to an update it is as final.
			f.update = func(wire.MapRequest) func(http.ResponseWriter) {
				return status(403, "no", wire.ErrorHeader, string(code))
			}
			l = live(t, f, nil)
			l.SetHostState(HostState{DiscoKey: identity.NewDisco().Public()})
			if err := <-l.end; !errors.Is(err, code.Err()) {
				t.Errorf("%s: %v", code, err)
			}
		})
	}
}

func TestUpdates(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		var got []wire.MapRequest
		inFlight := 0
		goOn := make(chan bool)
		f.update = func(r wire.MapRequest) func(http.ResponseWriter) {
			if inFlight++; inFlight > 1 {
				t.Error("two updates at once")
			}
			defer func() { inFlight-- }()
			got = append(got, r)
			if !<-goOn {
				return status(500, "")
			}
			return nil
		}
		l := live(t, f, nil)
		p := <-f.polls
		p.send(l.whole())
		synctest.Wait()
		if len(got) != 0 {
			t.Error("an update without state was sent")
		}
		disco := identity.NewDisco().Public()
		state := func(region int, latency float64, ports ...uint16) HostState {
			h := HostState{DiscoKey: disco, Hostinfo: &wire.Hostinfo{Hostname: "h", NetInfo: &wire.NetInfo{PreferredDERP: region, DERPLatency: map[string]float64{"900-v4": latency}}}}
			for _, port := range ports {
				h.Endpoints = append(h.Endpoints, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), port))
			}
			return h
		}
		l.SetHostState(state(1, 0.1, 1))
		synctest.Wait()
		// While one is under way the next ones become one.
		l.SetHostState(state(1, 0.1, 2))
		l.SetHostState(state(2, 0.1, 3))
		l.SetApplied(1, 0)
		goOn <- true
		goOn <- false // and that fails, and is sent again
		goOn <- true
		synctest.Wait()
		l.SetHostState(state(2, 0.9, 3)) // no news
		l.SetApplied(1, 0)
		synctest.Wait()
		if len(got) != 3 {
			t.Fatalf("%d updates", len(got))
		}
		for i, r := range got {
			want := uint16(3)
			if i == 0 {
				want = 1
			}
			if r.Stream || !r.OmitPeers || r.NodeKey != l.key || r.DiscoKey != disco || r.Endpoints[0].Port() != want || r.Hostinfo.Hostname != "h" || i > 0 && r.MeshApplied != 1 {
				t.Errorf("update %d: %+v", i, r)
			}
		}
		// Each connection starts with one, and its poll says the same.
		f.cut()
		p = <-f.polls
		goOn <- true
		synctest.Wait()
		if len(got) != 4 || p.req.DiscoKey != disco || len(p.req.Endpoints) != 1 || p.req.Hostinfo.NetInfo.PreferredDERP != 2 {
			t.Errorf("%d updates; poll %+v", len(got), p.req)
		}
		l.stop()
		<-l.end
	})
}

func TestSessionFromCache(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		store := &identity.MemoryStore{}
		l := live(t, f, func(c *SessionConfig) { c.Store = store })
		k1 := identity.NewNode().Public()
		p := <-f.polls
		p.send(l.whole(peerNode(1, k1)))
		synctest.Wait()
		p.send(wire.MapResponse{MeshPolicy: 7}) // saved at the end, if not before
		synctest.Wait()
		l.stop()
		<-l.end
		m, at, err := l.c.SavedMap(store, l.key)
		if err != nil || m.NumPeers() != 1 || m.PolicyVersion() != 7 || at.IsZero() {
			t.Fatalf("saved: %v, %v, %v", m, at, err)
		}
		next := live(t, f, func(c *SessionConfig) { c.NodeKey = l.key; c.InForce = m })
		p = <-f.polls
		r := next.whole(peerNode(1, k1))
		r.MeshPolicy = 7
		p.send(r)
		synctest.Wait()
		if len(next.deltas) != 1 || !next.deltas[0].Empty() {
			t.Errorf("deltas %+v", next.deltas)
		}
		next.stop()
		<-next.end
	})
}

func TestCache(t *testing.T) {
	machine := identity.NewMachine()
	open := func(change ...func(*Config)) *Client {
		cfg := Config{URL: "https://control.test", Machine: machine}
		for _, c := range change {
			c(&cfg)
		}
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	c := open()
	store := &identity.MemoryStore{}
	key := identity.NewNode().Public()
	if _, _, err := c.SavedMap(store, key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("empty store: %v", err)
	}
	for peers := range 3 {
		r := &wire.MapResponse{Node: peerNode(1, key), Domain: "mesh"}
		for i := range peers {
			r.Peers = append(r.Peers, peerNode(2+i, identity.NewNode().Public()))
		}
		m, _, err := netmap.Apply(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SaveMap(store, m); err != nil {
			t.Fatal(err)
		}
		got, at, err := c.SavedMap(store, key)
		if err != nil || time.Since(at).Abs() > time.Minute {
			t.Fatal(err)
		}
		if d := netmap.Rebase(m, got); !d.Empty() || got.NumPeers() != peers || got.Network() != "mesh" {
			t.Errorf("the saved map differs: %+v", d)
		}
	}
	bad := func(name string, c *Client, key identity.NodePublic) {
		t.Helper()
		if m, _, err := c.SavedMap(store, key); !errors.Is(err, ErrBadCache) || m != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	bad("another machine", open(func(c *Config) { c.Machine = identity.NewMachine() }), key)
	bad("another server", open(func(c *Config) { c.URL = "https://other.test" }), key)
	bad("another node", c, identity.NewNode().Public())
	whole, _ := store.Read(mapName)
	for i := 0; i < len(whole); i += 7 {
		b := bytes.Clone(whole)
		b[i] ^= 1
		store.Write(mapName, b)
		bad(fmt.Sprintf("byte %d", i), c, key)
		if i == 0 {
			continue
		}
		store.Write(mapName, whole[:i])
		bad(fmt.Sprintf("cut to %d", i), c, key)
	}
	if strings.Contains(string(whole), machine.Secret()) || !slices.Contains([]byte(whole), '{') {
		t.Error("what is saved holds a secret")
	}
	if err := ForgetMap(store); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.SavedMap(store, key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("forgotten: %v", err)
	}
}

// What the control server answers counts as hearing of it while a map stream is
// followed, and what is saved is as old as that.
func TestAskIsHeard(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		store := new(identity.MemoryStore)
		l := live(t, f, func(c *SessionConfig) { c.Store = store })
		p := <-f.polls
		l.Ask() // the poll has brought nothing yet
		synctest.Wait()
		if at := l.c.LastHeard(); !at.IsZero() {
			t.Errorf("heard before there is a map: %v", at)
		}
		p.send(l.whole())
		synctest.Wait()
		time.Sleep(30 * time.Second)
		l.Ask()
		synctest.Wait()
		heard := time.Now()
		if at := l.c.LastHeard(); !at.Equal(heard) {
			t.Errorf("heard at %v, asked at %v", at, heard)
		}
		f.freeze()
		time.Sleep(20 * time.Second)
		l.Ask()
		synctest.Wait()
		if at := l.c.LastHeard(); !at.Equal(heard) {
			t.Errorf("a silent server was heard at %v", at)
		}
		if err := l.c.SaveMap(store, l.maps[0]); err != nil {
			t.Fatal(err)
		}
		if _, at, err := l.c.SavedMap(store, l.key); err != nil || !at.Equal(heard) {
			t.Errorf("saved as of %v: %v", at, err)
		}
		f.thaw()
		l.stop()
		<-l.end
	})
}
