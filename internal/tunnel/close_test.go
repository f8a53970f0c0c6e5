package tunnel

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// Close at any moment ends everything: no panic, no goroutine, no callback.
func TestCloseRaces(t *testing.T) {
	for i := range unlessRace(200, 40) {
		nw := newNetwork()
		a, b := pair(t, nw)
		var closed [2]bool
		var mu sync.Mutex
		for k, n := range []*node{a, b} {
			n.mu.Lock()
			n.onDeliver = func(got) {
				mu.Lock()
				defer mu.Unlock()
				if closed[k] {
					t.Error("delivered after Close")
				}
			}
			n.mu.Unlock()
		}
		var wg sync.WaitGroup
		for _, dir := range [][2]*node{{a, b}, {b, a}} {
			from, to := dir[0], dir[1]
			wg.Go(func() {
				for range 40 {
					err := from.t.Send(to.key, [][]byte{packet(from.v4, to.v4, "x"), packet(from.v6, to.v6, "y")})
					if err != nil && !errors.Is(err, ErrClosed) && !errors.Is(err, ErrUnknownPeer) {
						t.Error(err)
						return
					}
				}
			})
			wg.Go(func() {
				for range 10 {
					from.t.Update([]identity.NodePublic{to.key})
					from.t.Receive(Source{Peer: to.key}, [][]byte{make([]byte, 148), {4, 0, 0, 0}})
					from.t.Block(nil)
					from.t.Stats()
					from.t.LastHandshake(to.key)
				}
				if err := from.t.SetKey(identity.NewNode()); err != nil && !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			})
		}
		for range rand.IntN(20) {
			a.say(t, b, "z")
		}
		wg.Go(func() { a.t.Close() })
		for k, n := range []*node{a, b} {
			if err := n.t.Close(); err != nil {
				t.Error(err)
			}
			mu.Lock()
			closed[k] = true
			mu.Unlock()
		}
		wg.Wait()
		if i == 0 {
			if err := a.t.Send(b.key, [][]byte{packet(a.v4, b.v4, "")}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("send after close: %v", err)
			}
			a.t.Close()
		}
		nw.close()
	}
}

// Close waits for the calls that are under way, and lets none in after.
func TestCloseWaitsForCalls(t *testing.T) {
	bubble(t, func(t *testing.T, nw *network) {
		hang := make(chan struct{})
		var started atomic.Bool
		a := nw.add(t, "a", 1, func(c *Config) {
			send := c.Send
			c.Send = func(k identity.NodePublic, ad netip.AddrPort, d [][]byte) error {
				if started.Load() && d[0][0] == typeData {
					<-hang
				}
				return send(k, ad, d)
			}
		})
		b := nw.add(t, "b", 2)
		a.knows(b)
		b.knows(a)
		a.say(t, b, "x")
		b.wantGot(t, a, "x")
		started.Store(true)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if err := a.t.Send(b.key, [][]byte{packet(a.v4, b.v4, "y")}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		closed := make(chan struct{})
		go func() {
			a.t.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close did not wait")
		default:
		}
		if err := a.t.Send(b.key, [][]byte{packet(a.v4, b.v4, "z")}); !errors.Is(err, ErrClosed) {
			t.Errorf("send while closing: %v", err)
		}
		close(hang)
		<-closed
		wg.Wait()
	})
}

func FuzzReceive(f *testing.F) {
	f.Add([]byte{4, 0, 0, 0}, true, uint8(3))
	f.Add(make([]byte, 148), false, uint8(0))
	for kind, size := range map[byte]int{typeInitiation: initiationSize, typeResponse: responseSize, typeCookie: cookieSize, typeData: keepaliveSize} {
		b := make([]byte, size)
		b[0] = kind
		f.Add(b, true, uint8(1))
		f.Add(b, false, uint8(2))
	}
	nw := newNetwork()
	f.Cleanup(nw.close)
	a, b := pair(f, nw)
	delivered := make(chan string, 1<<16)
	b.onDeliver = func(g got) { b.take(); delivered <- payload(g.packet) }
	a.say(f, b, "ready")
	<-delivered
	f.Fuzz(func(t *testing.T, data []byte, relay bool, how uint8) {
		b.t.mu.RLock()
		var index uint32
		for i := range b.t.indexes {
			index = i
		}
		b.t.mu.RUnlock()
		data = append([]byte(nil), data...)
		if how&1 != 0 && len(data) >= 8 { // addressed to the live session
			data[4], data[5], data[6], data[7] = byte(index), byte(index>>8), byte(index>>16), byte(index>>24)
		}
		if how&2 != 0 && len(data) >= initiationSize {
			data = data[:initiationSize]
			data[0], data[1], data[2], data[3] = typeInitiation, 0, 0, 0
			sign(data, b.key)
		}
		src := Source{Addr: netip.MustParseAddrPort("192.0.2.1:1")}
		if relay {
			src = Source{Peer: a.key, Region: 1}
		}
		b.t.Receive(src, [][]byte{data, nil, data})
		// The session survives, whatever it was.
		a.say(t, b, "alive")
		select {
		case <-delivered:
		case <-time.After(10 * time.Second):
			t.Fatal("the session died")
		}
	})
}
