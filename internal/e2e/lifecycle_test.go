package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// Close works in any state: before a start, during it, twice, at once from
// many goroutines; and everything fails with net.ErrClosed after it.
func TestCloseInAnyState(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	for name, prepare := range map[string]func(*mesh.Node){
		"never started": func(*mesh.Node) {},
		"starting":      func(n *mesh.Node) { go n.Up(context.Background()) },
		"up":            func(n *mesh.Node) { meshtest.Up(t, n) },
		"listening": func(n *mesh.Node) {
			if _, err := n.Listen("tcp", ":1"); err != nil {
				t.Error(err)
			}
		},
		"failed": func(n *mesh.Node) {
			n.ControlURL = "http://127.0.0.1:1"
			if _, err := n.Up(t.Context()); err == nil {
				t.Error("started at a port where nobody is")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := m.Node("n", []string{"tag:a"})
			prepare(n)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if err := n.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if _, err := n.Up(t.Context()); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Up: %v", err)
			}
			if _, err := n.Dial(t.Context(), "tcp", "x:1"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Dial: %v", err)
			}
			if _, err := n.Listen("tcp", ":1"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Listen: %v", err)
			}
			n.Status()
		})
	}
}

func TestCloseRacesWithStart(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	for i := range 20 {
		n := m.Node("n", []string{"tag:a"})
		var wg sync.WaitGroup
		wg.Go(func() { n.Up(t.Context()) })
		wg.Go(func() { n.Dial(t.Context(), "tcp", "x:1") })
		wg.Go(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond) // meets the start at different points
			n.Close()
		})
		wg.Wait()
	}
}

func TestCloseEndsConnectionsAndListeners(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	c1, c2 := connect(t, a, b)
	l, err := a.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	accept := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accept <- err
	}()
	pc, err := a.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 2)
	go func() {
		_, err := c1.Read(make([]byte, 1))
		read <- err
	}()
	go func() {
		_, _, err := pc.ReadFrom(make([]byte, 1))
		read <- err
	}()
	a.Close()
	if err := <-accept; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	for range 2 {
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read: %v", err)
		}
	}
	// The peer is told: its connection does not hang.
	c2.SetReadDeadline(time.Now().Add(meshtest.Patience))
	if _, err := io.ReadAll(c2); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer of a closed node read %v", err)
	}
	c2.Close()
}

func TestOfflinePeer(t *testing.T) {
	m := meshtest.Start(t, openPolicy, quickOffline)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	b.Close()
	meshtest.Until(t, "the peer to be known as offline", func() bool { return !a.Status().Peers[0].Online })
	began := time.Now()
	_, err := a.Dial(t.Context(), "tcp", "b:1")
	t.Logf("found out in %v", time.Since(began))
	var offline *mesh.PeerOfflineError
	if !errors.As(err, &offline) || !errors.Is(err, mesh.ErrPeerOffline) || offline.LastSeen.IsZero() {
		t.Fatalf("dial: %v", err)
	}
	if age := time.Since(offline.LastSeen); age < 0 || age > meshtest.Patience {
		t.Errorf("last seen %v ago", age)
	}
}
