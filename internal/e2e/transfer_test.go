package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"

	"golang.org/x/sync/errgroup"

	"mesh/internal/meshtest"
)

// send writes n bytes that seed determines and returns their checksum.
func send(c net.Conn, seed uint64, n int64) ([]byte, error) {
	src := io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), n)
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{c}, io.TeeReader(src, h), make([]byte, 64<<10)); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	return h.Sum(nil), c.(interface{ CloseWrite() error }).CloseWrite()
}

// receive reads to the end and returns the checksum of n bytes.
func receive(c net.Conn, n int64) ([]byte, error) {
	h := sha256.New()
	got, err := io.CopyBuffer(h, struct{ io.Reader }{c}, make([]byte, 64<<10))
	if err == nil && got != n {
		err = fmt.Errorf("%d of %d bytes", got, n)
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return h.Sum(nil), nil
}

// exchange moves n bytes each way at once and compares checksums.
func exchange(a, b net.Conn, n int64) error {
	var sums [4][]byte
	var g errgroup.Group
	g.Go(func() (err error) { sums[0], err = send(a, 1, n); return })
	g.Go(func() (err error) { sums[1], err = receive(b, n); return })
	g.Go(func() (err error) { sums[2], err = send(b, 2, n); return })
	g.Go(func() (err error) { sums[3], err = receive(a, n); return })
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
				go send(c1, 1, size)
				if _, err := receive(c2, size); err != nil {
					b.Fatal(err)
				}
				c1.Close()
				c2.Close()
			}
		})
	}
}
