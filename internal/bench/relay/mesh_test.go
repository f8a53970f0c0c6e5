package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	stock "tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/netmon"
	"tailscale.com/types/key"

	"mesh/derp"
	"mesh/derp/relay"
	"mesh/identity"
)

// guest is a client of either relay.
type guest struct {
	*derp.Client
	key identity.NodePublic
	in  chan derp.Message
}

func visit(t *testing.T, addr string) *guest {
	t.Helper()
	k := identity.NewNode()
	c, err := derp.Dial(t.Context(), derp.ClientConfig{Key: k, Target: derp.Target{Addr: addr, PlainHTTP: true}})
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{c, k.Public(), make(chan derp.Message, 1000)}
	t.Cleanup(func() { c.Close() })
	go func() {
		for {
			m, err := c.Recv()
			if err != nil {
				return
			}
			if m.Kind == derp.KindPackets {
				m.Packets = [][]byte{append([]byte(nil), m.Packets[0]...)}
			}
			g.in <- m
		}
	}()
	return g
}

// reach sends until something arrives: relays learn of clients in their own time.
func (g *guest) reach(t *testing.T, to *guest, text string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(30 * time.Second); ; {
		if err := g.Send(to.key, []byte(text)); err != nil {
			t.Fatal(err)
		}
		select {
		case m := <-to.in:
			if m.Kind == derp.KindPackets && string(m.Packets[0]) == text {
				if m.Peer != g.key {
					t.Fatalf("from %v, want %v", m.Peer, g.key)
				}
				return
			}
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%q never arrives", text)
		}
	}
}

// Our relay and the stock one serve a region together: each forwards to the
// other's clients, and tells its own when those leave.
func TestMeshWithStock(t *testing.T) {
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	raw := make([]byte, 32)
	rand.Read(raw)
	secret := hex.EncodeToString(raw)

	stockLn := listen()
	theirs := derpserver.New(key.NewNode(), t.Logf)
	defer theirs.Close()
	if err := theirs.SetMeshKey(secret); err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: derpserver.Handler(theirs)}
	go web.Serve(stockLn)
	defer web.Close()

	ourLn := listen()
	ours := relay.New(relay.Config{
		Key:   identity.NewNode(),
		Admit: func(context.Context, identity.NodePublic, netip.Addr) error { return nil },
	})
	go ours.Serve(ourLn, nil)
	defer ours.Close()

	theirKey, err := identity.ParseNodePublic(theirs.PublicKey().String())
	if err != nil {
		t.Fatal(err)
	}
	ours.SetMesh(relay.Mesh{Keys: []string{secret}, Peers: []relay.MeshPeer{
		{Key: theirKey, Target: derp.Target{Addr: stockLn.Addr().String(), PlainHTTP: true}},
	}})
	ctx, cancel := context.WithCancel(t.Context())
	loop := make(chan struct{})
	watcher, err := derphttp.NewClient(theirs.PrivateKey(), "http://"+ourLn.Addr().String()+"/derp", t.Logf, netmon.NewStatic())
	if err != nil {
		t.Fatal(err)
	}
	watcher.MeshKey, watcher.WatchConnectionChanges = theirs.MeshKey(), true
	go func() {
		defer close(loop)
		watcher.RunWatchConnectionLoop(ctx, theirs.PublicKey(), t.Logf,
			func(m stock.PeerPresentMessage) { theirs.AddPacketForwarder(m.Key, watcher) },
			func(m stock.PeerGoneMessage) { theirs.RemovePacketForwarder(m.Peer, watcher) },
			func(error) {})
	}()
	defer func() {
		cancel()
		watcher.Close()
		<-loop
	}()

	x, y := visit(t, ourLn.Addr().String()), visit(t, stockLn.Addr().String())
	x.reach(t, y, "from ours to stock")
	y.reach(t, x, "from stock to ours")
	y.Close()
	for deadline := time.After(30 * time.Second); ; {
		select {
		case m := <-x.in:
			if m.Kind == derp.KindPeerGone && m.Peer == y.key {
				return
			}
		case <-deadline:
			t.Fatal("ours does not hear that a client of the stock relay left")
		}
	}
}
