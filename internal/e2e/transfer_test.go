package e2e

import (
	"fmt"
	"net"
	"testing"

	"golang.org/x/sync/errgroup"

	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// exchange moves n bytes each way at once and compares checksums.
func exchange(a, b net.Conn, n int64) error {
	var sums [4][]byte
	var g errgroup.Group
	g.Go(func() (err error) { sums[0], err = actor.Send(a, 1, n); return })
	g.Go(func() (err error) { sums[1], err = actor.Receive(b, n); return })
	g.Go(func() (err error) { sums[2], err = actor.Send(b, 2, n); return })
	g.Go(func() (err error) { sums[3], err = actor.Receive(a, n); return })
	if err := g.Wait(); err != nil {
		return err
	}
	if string(sums[0]) != string(sums[1]) || string(sums[2]) != string(sums[3]) {
		return fmt.Errorf("checksums differ: %x %x, %x %x", sums[0], sums[1], sums[2], sums[3])
	}
	return nil
}

func TestTransferBothWays(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, openPolicy)
			a, b := pair(t, m, p.opt, p.want)
			c1, c2 := connect(t, a, b)
			defer c1.Close()
			defer c2.Close()
			size := int64(16 << 20)
			if raceEnabled || testing.Short() {
				size = 4 << 20
			}
			if err := exchange(c1, c2, size); err != nil {
				t.Error(err)
			}
			if got := pathTo(a, b); got != p.want {
				t.Errorf("the path ended as %s", got)
			}
		})
	}
}

func BenchmarkTransfer(b *testing.B) {
	for _, p := range paths {
		b.Run(p.name, func(b *testing.B) {
			m := meshtest.Start(b, openPolicy)
			x, y := m.Node("x", []string{"tag:a"}, p.opt), m.Node("y", []string{"tag:a"}, p.opt)
			meshtest.Up(b, x, y)
			awaitPeers(b, x, y)
			const size = 64 << 20
			c1, c2 := connect(b, x, y)
			c1.Close()
			c2.Close()
			b.SetBytes(size)
			b.ResetTimer()
			for range b.N {
				c1, c2 := connect(b, x, y)
				go actor.Send(c1, 1, size)
				if _, err := actor.Receive(c2, size); err != nil {
					b.Fatal(err)
				}
				c1.Close()
				c2.Close()
			}
		})
	}
}
