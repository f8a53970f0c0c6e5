package control

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/netmap"
)

// batching is a control server that behaves as Headscale does: it answers late
// and in batches, says the same several times, and offers no more than it must.
type batching struct {
	*fake
	mu    sync.Mutex                   // guards what follows
	nodes map[identity.NodePublic]bool // which it knows
	seen  []wire.MapRequest            // lite updates
}

func (b *batching) knows(k identity.NodePublic) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.nodes[k]
}

func (b *batching) set(k identity.NodePublic, known bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nodes[k] = known
}

const (
	liteDelay  = 500 * time.Millisecond
	batchDelay = 800 * time.Millisecond
)

func newBatching(f *fake) *batching {
	b := &batching{fake: f, nodes: map[identity.NodePublic]bool{}}
	f.early = []byte(`{"nodeKeyChallenge":"chalpub:` + strings.Repeat("cd", 32) + `"}`)
	f.register = func(r wire.RegisterRequest) any {
		time.Sleep(liteDelay)
		switch {
		case r.Auth == nil && !b.knows(r.NodeKey):
			return wire.RegisterResponse{AuthURL: "http://control.test/register/hskey-authreq-1"}
		case r.Auth != nil && r.Auth.AuthKey != "hskey-auth-right":
			return wire.RegisterResponse{Error: "invalid pre auth key"}
		}
		b.set(r.NodeKey, true)
		return wire.RegisterResponse{MachineAuthorized: true, Login: wire.Login{LoginName: "alice"}}
	}
	f.update = func(r wire.MapRequest) func(http.ResponseWriter) {
		time.Sleep(liteDelay)
		if !b.knows(r.NodeKey) {
			return status(http.StatusNotFound, "node not found\n")
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.seen = append(b.seen, r)
		return nil
	}
	return b
}

// poll waits for a map poll that the server knows.
func (b *batching) poll(t *testing.T) *poll {
	p := <-b.polls
	// What a poll lacks such a server forgets.
	if p.req.DiscoKey.IsZero() || p.req.Hostinfo == nil || p.req.Hostinfo.Hostname != "h" || len(p.req.Endpoints) != 1 {
		t.Errorf("poll %+v", p.req)
	}
	time.Sleep(batchDelay)
	return p
}

func liveAt(t *testing.T, f *fake, change func(*SessionConfig)) *life {
	return liveWith(t, f, change, func(l *life) {
		l.SetHostState(HostState{
			DiscoKey: identity.NewDisco().Public(), Hostinfo: &wire.Hostinfo{Hostname: "h"},
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:41641")},
		})
	})
}

// complete is how such a server describes a peer in the end; at first it knows
// neither endpoints nor relay.
func complete(n int, key identity.NodePublic) *wire.Node {
	p := peerNode(n, key)
	p.Hostinfo = &wire.Hostinfo{Hostname: p.StableID}
	p.DiscoKey = identity.NewDisco().Public()
	p.Endpoints = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.2:41641")}
	p.HomeDERP = 900
	p.AllowedIPs = p.Addresses
	yes := true
	p.Online = &yes
	return p
}

func bare(p *wire.Node) *wire.Node {
	b := *p
	b.Endpoints, b.HomeDERP, b.Online = nil, 0, nil
	return &b
}

// What a batching server repeats changes nothing, and what it completes changes
// just that.
func TestBatchingServer(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		b := newBatching(f)
		c := f.client()
		key := identity.NewNode().Public()
		var refused *RefusedError
		_, err := c.Register(t.Context(), wire.RegisterRequest{NodeKey: key, Auth: &wire.RegisterAuth{AuthKey: "hskey-auth-wrong"}})
		if !errors.Is(err, wire.ErrAuthKeyUnknown) || !errors.As(err, &refused) || !strings.Contains(err.Error(), "invalid pre auth key") {
			t.Errorf("with a wrong key: %v", err)
		}
		if _, err := c.Register(t.Context(), wire.RegisterRequest{NodeKey: key, Auth: &wire.RegisterAuth{AuthKey: "hskey-auth-right"}}); err != nil {
			t.Fatal(err)
		}
		l := liveAt(t, f, func(cfg *SessionConfig) { cfg.NodeKey = key })
		p := b.poll(t)
		k1, k2 := identity.NewNode().Public(), identity.NewNode().Public()
		one, two := complete(1, k1), complete(2, k2)
		first := l.whole(one)
		first.MeshPolicy = 0
		first.PacketFilters = map[string][]wire.FilterRule{"base": {{SrcIPs: []string{"*"}, DstPorts: []wire.NetPortRange{{IP: "*", Ports: wire.AllPorts}}}}}
		first.DERPMap = &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900: {RegionID: 900, Nodes: []*wire.DERPNode{{Name: "900a", RegionID: 900, HostName: "relay.test"}}}}}
		off := false
		first.CollectServices, first.Debug = &off, &wire.Debug{DisableLogTail: true}
		p.send(first)
		p.send(wire.MapResponse{Node: first.Node}) // and again the node itself
		time.Sleep(batchDelay)
		p.send(wire.MapResponse{PeersChanged: []*wire.Node{bare(two)}})
		time.Sleep(batchDelay)
		for range 5 {
			p.send(wire.MapResponse{PeersChanged: []*wire.Node{one, two}})
		}
		p.send(wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, Online: two.Online}}})
		// The complete list, the way of servers that know no deltas, and all
		// that goes with it.
		for range 3 {
			again := first
			again.Peers = []*wire.Node{one, two}
			p.send(again)
		}
		synctest.Wait()
		var changes []netmap.Delta
		for _, d := range l.deltas {
			if !d.Empty() {
				changes = append(changes, d)
			}
		}
		if len(changes) != 3 || !changes[0].Full || len(changes[1].Added) != 1 || len(changes[2].Changed) != 1 || changes[2].Self || changes[2].Filter || changes[2].Relays {
			t.Errorf("of %d messages %d changed something: %+v", len(l.deltas), len(changes), changes)
		}
		if q, ok := l.maps[len(l.maps)-1].Peer(k2); !ok || q.HomeDERP != 900 || len(q.Endpoints) != 1 || q.Online == nil || !*q.Online {
			t.Errorf("the peer is %+v", q)
		}

		// A policy that hides a peer, a logout, and a key that ends.
		past := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
		p.send(wire.MapResponse{PeersRemoved: []wire.NodeID{1}, PacketFilters: map[string][]wire.FilterRule{"base": {}}})
		p.send(wire.MapResponse{PeersChangedPatch: []*wire.PeerChange{{NodeID: 2, KeyExpiry: &past, Online: &off, LastSeen: &past}}})
		synctest.Wait()
		m := l.maps[len(l.maps)-1]
		q, ok := m.Peer(k2)
		if !ok || m.NumPeers() != 1 || len(m.Filter()) != 0 || !m.Expired(q.Node, past.Add(time.Second)) || *q.Online {
			t.Errorf("after policy and logout: %d peers, %+v", m.NumPeers(), q)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.seen) == 0 || len(f.others) != 0 {
			t.Errorf("%d updates, and requests that such a server does not offer: %q", len(b.seen), f.others)
		}
		c.Probe(t.Context()) // asks for something that it does not offer
		l.stop()
		<-l.end
	})
}

// Who is deleted at such a server stays out, whoever else it forgot is taken
// back.
func TestForgotten(t *testing.T) {
	t.Run("deleted", func(t *testing.T) {
		inMemory(t, func(t *testing.T, f *fake) {
			b := newBatching(f)
			l := liveAt(t, f, nil)
			b.set(l.key, true)
			p := b.poll(t)
			p.send(l.whole())
			synctest.Wait()
			b.set(l.key, false)
			p.end()
			p = b.poll(t)
			p.answer(status(http.StatusNotFound, "node not found\n"))
			p.end()
			var login *NeedsLoginError
			if err := <-l.end; !errors.As(err, &login) {
				t.Errorf("ended with %v", err)
			}
		})
	})
	t.Run("deleted, but the stream stays", func(t *testing.T) {
		inMemory(t, func(t *testing.T, f *fake) {
			b := newBatching(f)
			l := liveAt(t, f, nil)
			b.set(l.key, true)
			p := b.poll(t)
			p.send(l.whole())
			synctest.Wait()
			b.set(l.key, false)
			l.SetApplied(5, 0) // anything that the server is told
			var login *NeedsLoginError
			if err := <-l.end; !errors.As(err, &login) {
				t.Errorf("ended with %v", err)
			}
		})
	})
	t.Run("started without memory", func(t *testing.T) {
		inMemory(t, func(t *testing.T, f *fake) {
			var known atomic.Bool
			var asked []wire.RegisterRequest
			f.register = func(r wire.RegisterRequest) any {
				if asked = append(asked, r); len(asked) == 1 {
					return status(http.StatusInternalServerError, "not yet")
				}
				known.Store(true)
				return wire.RegisterResponse{MachineAuthorized: true}
			}
			l := liveAt(t, f, func(c *SessionConfig) { c.NodeKey = identity.NewNode().Public(); c.Ephemeral = true })
			for !known.Load() {
				p := <-f.polls
				p.answer(status(http.StatusBadRequest, "node not found\n"))
				p.end()
				synctest.Wait()
			}
			p := <-f.polls
			p.send(l.whole())
			synctest.Wait()
			if len(l.maps) != 1 || len(asked) != 2 || asked[1].NodeKey != l.key || asked[1].Auth != nil || !asked[1].Ephemeral || asked[1].Hostinfo.Hostname != "h" {
				t.Errorf("%d maps; asked %+v", len(l.maps), asked)
			}
			l.stop()
			<-l.end
		})
	})
	t.Run("refused", func(t *testing.T) {
		inMemory(t, func(t *testing.T, f *fake) {
			f.register = func(wire.RegisterRequest) any { return wire.RegisterResponse{Error: "we know better"} }
			l := liveAt(t, f, nil)
			p := <-f.polls
			p.answer(status(400, "node not found"))
			p.end()
			if err := <-l.end; !errors.Is(err, wire.ErrNodeUnknown) || !strings.Contains(err.Error(), "we know better") {
				t.Errorf("ended with %v", err)
			}
		})
	})
}

// A server that finds us too old closes without a word, and the error says what
// that may mean.
func TestTooOldForServer(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		f.tooOld.Store(true)
		_, err := f.client().Register(t.Context(), wire.RegisterRequest{NodeKey: identity.NewNode().Public()})
		if !IsTemporary(err) || !strings.Contains(err.Error(), "too new for this client (version 131)") {
			t.Errorf("got %v", err)
		}
		// With a pin it is not taken for a server with another key.
		pinned := f.client(func(c *Config) { c.ServerKey = f.key.Load().Public() })
		if _, err = pinned.Register(t.Context(), wire.RegisterRequest{}); !IsTemporary(err) || errors.Is(err, ErrServerKeyMismatch) {
			t.Errorf("pinned: %v", err)
		}
		// But one that says to have another key is.
		other := f.client(func(c *Config) { c.ServerKey = identity.NewMachine().Public() })
		if _, err = other.Register(t.Context(), wire.RegisterRequest{}); !errors.Is(err, ErrServerKeyMismatch) {
			t.Errorf("wrong pin: %v", err)
		}
	})
}

// GOAWAY sends new requests elsewhere; the map stream goes on to its end.
func TestGoAway(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		updates := 0
		f.update = func(wire.MapRequest) func(http.ResponseWriter) { updates++; return nil }
		l := liveAt(t, f, nil)
		p := <-f.polls
		p.send(l.whole())
		synctest.Wait()
		if updates != 1 || f.upgrades.Load() != 1 {
			t.Fatalf("%d updates over %d connections", updates, f.upgrades.Load())
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		f.goAway(ctx)
		synctest.Wait()
		l.SetApplied(9, 0)
		synctest.Wait()
		if updates != 2 || f.upgrades.Load() != 2 {
			t.Errorf("%d updates over %d connections %v", updates, f.upgrades.Load(), l.states)
		}
		p.send(wire.MapResponse{PeersChanged: []*wire.Node{peerNode(1, identity.NewNode().Public())}})
		synctest.Wait()
		if len(l.maps) != 2 {
			t.Errorf("%d maps", len(l.maps))
		}
		p.end()
		p = <-f.polls
		p.send(l.whole())
		synctest.Wait()
		if f.upgrades.Load() != 2 || len(l.maps) != 3 {
			t.Errorf("%d connections, %d maps", f.upgrades.Load(), len(l.maps))
		}
		l.stop()
		<-l.end
	})
}
