package e2e

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"mesh"
	"mesh/internal/meshtest"
)

// lossySocket loses one datagram of two hundred, and as many come late.
type lossySocket struct {
	net.PacketConn
	mu   sync.Mutex // guards the fields below
	late []byte
	to   net.Addr
}

func (s *lossySocket) WriteTo(b []byte, to net.Addr) (int, error) {
	s.mu.Lock()
	late, lateTo := s.late, s.to
	s.late, s.to = nil, nil
	chance := rand.IntN(400)
	if chance < 2 {
		s.late, s.to = bytes.Clone(b), to
	}
	s.mu.Unlock()
	if chance < 4 {
		return len(b), nil
	}
	n, err := s.PacketConn.WriteTo(b, to)
	if late != nil {
		s.PacketConn.WriteTo(late, lateTo)
	}
	return n, err
}

// Eight connections at once move data both ways, time and again, and every byte
// of each arrives as it was sent: direct, by relay, and where datagrams are lost
// and overtaken. MESH_FULL=1 has 100 runs of each.
func TestEightStreams(t *testing.T) {
	const streams = 8
	runs, size := 2, int64(1<<20)
	switch {
	case full():
		runs = 100
	case raceEnabled || testing.Short():
		size = 256 << 10
	}
	ways := append(paths[:len(paths):len(paths)], struct {
		name string
		opt  func(*mesh.Node)
		want string
	}{"direct with losses", func(n *mesh.Node) {
		n.ListenUDP = func(ctx context.Context, network, addr string) (net.PacketConn, error) {
			pc, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &lossySocket{PacketConn: pc}, nil
		}
	}, "direct"})
	for _, p := range ways {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			a, b := pair(t, m, p.opt, p.want)
			for run := range runs {
				var g errgroup.Group
				for range streams {
					ca, cb := connect(t, a, b)
					g.Go(func() error {
						defer ca.Close()
						defer cb.Close()
						return exchange(ca, cb, size)
					})
				}
				if err := g.Wait(); err != nil {
					t.Fatalf("run %d: %v", run, err)
				}
			}
		})
	}
}
