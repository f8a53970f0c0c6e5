package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"mesh"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// cable carries the UDP of nodes; when cut it swallows packets, as a firewall
// does, and says nothing.
type cable struct{ cut atomic.Bool }

func (c *cable) listen(ctx context.Context, network, addr string) (net.PacketConn, error) {
	pc, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return cabled{pc, c}, nil
}

type cabled struct {
	net.PacketConn
	c *cable
}

func (p cabled) WriteTo(b []byte, to net.Addr) (int, error) {
	if p.c.cut.Load() {
		return len(b), nil
	}
	return p.PacketConn.WriteTo(b, to)
}

func (p cabled) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := p.PacketConn.ReadFrom(b)
		if err != nil || !p.c.cut.Load() {
			return n, from, err
		}
	}
}

// sendUntil sends random bytes, a few megabytes a second, until stop is closed
// and returns their checksum.
func sendUntil(c net.Conn, seed byte, stop <-chan struct{}) ([]byte, error) {
	src := rand.NewChaCha8([32]byte{seed})
	h := sha256.New()
	b := make([]byte, 16<<10)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return h.Sum(nil), c.(*mesh.Conn).CloseWrite()
		case <-tick.C:
		}
		src.Read(b)
		h.Write(b)
		if _, err := c.Write(b); err != nil {
			return nil, fmt.Errorf("send: %w", err)
		}
	}
}

func receiveAll(c net.Conn, count *atomic.Int64) ([]byte, error) {
	h := sha256.New()
	if _, err := io.Copy(h, struct{ io.Reader }{actor.Counted{Conn: c, N: count}}); err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return h.Sum(nil), nil
}

// A connection lives through every change of path: it begins by relay since
// UDP does not work, is upgraded when it does, falls back when UDP dies
// silently, and is upgraded again.
func TestPathChangesLoseNoConnection(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	c := new(cable)
	c.cut.Store(true)
	hook := func(n *mesh.Node) { n.ListenUDP = c.listen }
	a, b := m.Node("a", []string{"tag:a"}, hook), m.Node("b", []string{"tag:a"}, hook)
	meshtest.Up(t, a, b)
	out, in := connect(t, a, b)
	defer out.Close()
	defer in.Close()

	var sums [4][]byte
	var counts [2]atomic.Int64
	stop := make(chan struct{})
	var g errgroup.Group
	g.Go(func() (err error) { sums[0], err = sendUntil(out, 1, stop); return })
	g.Go(func() (err error) { sums[1], err = receiveAll(in, &counts[0]); return })
	g.Go(func() (err error) { sums[2], err = sendUntil(in, 2, stop); return })
	g.Go(func() (err error) { sums[3], err = receiveAll(out, &counts[1]); return })
	for _, step := range []struct {
		cut  bool
		path string
	}{{true, "relay"}, {false, "direct"}, {true, "relay"}, {false, "direct"}} {
		begin := time.Now()
		c.cut.Store(step.cut)
		meshtest.Until(t, "the path to be "+step.path, func() bool { return pathTo(a, b) == step.path && pathTo(b, a) == step.path })
		t.Logf("%s after %v", step.path, time.Since(begin))
		before := [2]int64{counts[0].Load(), counts[1].Load()}
		meshtest.Until(t, "data to flow by "+step.path, func() bool {
			return counts[0].Load() > before[0]+256<<10 && counts[1].Load() > before[1]+256<<10
		})
	}
	close(stop)
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if string(sums[0]) != string(sums[1]) || string(sums[2]) != string(sums[3]) {
		t.Errorf("checksums differ: %x %x, %x %x", sums[0], sums[1], sums[2], sums[3])
	}
}

// Goal 15 and D 54: that there is no path at all is told apart from a refusal.
func TestNoPathIsNoRefusal(t *testing.T) {
	t.Parallel() // it waits for time-outs
	m := meshtest.Start(t, openPolicy)
	c := new(cable)
	a, _ := pair(t, m, func(n *mesh.Node) {
		n.ListenUDP = c.listen
		n.DialTCP = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if c.cut.Load() {
				return nil, errors.New("cut")
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	}, "direct")
	m.Stop() // control and relay
	c.cut.Store(true)
	_, err := a.Dial(t.Context(), "tcp", "b:1")
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() || errors.Is(err, mesh.ErrDenied) {
		t.Errorf("dial into silence: %v", err)
	}
}
