package path

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"mesh/control/wire"
	"mesh/identity"
)

// A node is at its relay with its next key before it leaves with the old one, so
// that nothing is lost whichever of them a peer knows; it sends by one of them.
func TestKeyAtRelays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n, a := regions(t, func(c *Config) { c.RelayOnly = true })
		cfg, b := n.config("192.0.2.2")
		cfg.RelayOnly = true
		n.start(cfg, b)
		for _, nd := range []*node{a, b} {
			nd.SetRelays(relayMap(1))
			nd.Ready(t.Context())
		}
		next := identity.NewNode()
		old, fresh := a.peer(1), a.peer(1)
		fresh.Key = next.Public()
		a.knows(b.peer(1))
		b.knows(old, fresh)
		relay := n.relays[1]
		hears := func(key identity.NodePublic) bool {
			t.Helper()
			if err := b.Send(key, netip.AddrPort{}, [][]byte{[]byte("x")}); err != nil {
				t.Fatal(err)
			}
			settle(100 * time.Millisecond)
			return len(a.take()) == 1
		}
		says := func() identity.NodePublic {
			t.Helper()
			if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{[]byte("y")}); err != nil {
				t.Fatal(err)
			}
			settle(100 * time.Millisecond)
			got := b.take()
			if len(got) != 1 {
				t.Fatalf("%d datagrams", len(got))
			}
			return got[0].src.Peer
		}
		if !hears(old.Key) || says() != old.Key {
			t.Fatal("before")
		}
		a.AddKey(t.Context(), next)
		if !hears(old.Key) || !hears(fresh.Key) || says() != old.Key {
			t.Error("with both keys: not heard by both, or sent by the new one")
		}
		a.UseKey(next)
		if !hears(old.Key) || !hears(fresh.Key) || says() != fresh.Key {
			t.Error("with the new key: not heard by both, or sent by the old one")
		}
		if _, home := relay.isHome(fresh.Key); !home {
			t.Error("the new connection is not said to be home")
		}
		settle(wire.KeptKeyFor)
		if c, _ := relay.isHome(old.Key); c {
			t.Error("still there with the old key")
		}
		if !hears(fresh.Key) || says() != fresh.Key {
			t.Error("after all that")
		}
		// A connection that ends comes back with the new key.
		relay.setDown(true)
		relay.setDown(false)
		settle(5 * time.Second)
		if c, _ := relay.isHome(fresh.Key); !c || !hears(fresh.Key) {
			t.Error("not back")
		}

		// A relay that cannot be had for the new key, and one that is lost with
		// it before it is used, are connected when it is.
		for _, lost := range []bool{true, false} {
			was := next.Public()
			next = identity.NewNode()
			fresh.Key = next.Public()
			b.knows(fresh)
			if !lost {
				relay.mu.Lock()
				relay.down = true
				relay.mu.Unlock()
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			a.AddKey(ctx, next)
			cancel()
			if lost {
				relay.mu.Lock()
				c := relay.conns[fresh.Key]
				relay.mu.Unlock()
				c.Close()
				settle(time.Second)
			}
			relay.mu.Lock()
			relay.down = false
			relay.mu.Unlock()
			if c, _ := relay.isHome(was); !c {
				t.Errorf("lost %v: not there with the key in use", lost)
			}
			a.UseKey(next)
			settle(5 * time.Second)
			if !hears(fresh.Key) || says() != fresh.Key {
				t.Errorf("lost %v: not there with the new key", lost)
			}
		}
	})
}
