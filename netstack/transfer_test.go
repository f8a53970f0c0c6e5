package netstack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// lossy drops one packet of a hundred and now and then keeps one back until a later
// batch passes.
func lossy(w *wire) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(1, 2))
	late := make(map[bool][][]byte)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		var pass [][]byte
		held := late[toB]
		late[toB] = nil
		for _, p := range packets {
			switch rng.IntN(200) {
			case 0, 1:
			case 2:
				late[toB] = append(late[toB], bytes.Clone(p))
			default:
				pass = append(pass, p)
			}
		}
		return append(pass, held...)
	})
}

// Both ends send 64 MiB at once, the link loses and reorders, everything arrives.
// It is spread over connections because with such loss one mostly waits for timers.
func TestTransferLossy(t *testing.T) {
	const conns = 8
	size := int64(64<<20) / conns
	if testing.Short() || raceEnabled {
		size /= 16
	}
	a, b, w := newPair(t, Config{})
	lossy(w)
	var wg sync.WaitGroup
	for n := range conns {
		ca, cb := connect(t, a, b, []netip.Addr{b4, b6}[n%2])
		wg.Go(func() { exchange(t, ca, cb, size, byte(n)) })
	}
	wg.Wait()
}

// exchange sends size random bytes each way at the same time and compares.
func exchange(t *testing.T, ca, cb *Conn, size int64, seed byte) {
	var wg sync.WaitGroup
	sums := make([]hash.Hash, 4)
	for i, c := range []*Conn{ca, cb} {
		sent, got := sha256.New(), sha256.New()
		sums[i], sums[3-i] = sent, got // what one sends the other gets
		wg.Go(func() {
			src := rand.NewChaCha8([32]byte{byte(i), seed})
			if n, err := io.Copy(c, io.TeeReader(io.LimitReader(src, size), sent)); n != size || err != nil {
				t.Errorf("sent %d bytes: %v", n, err)
			}
			c.CloseWrite()
		})
		wg.Go(func() {
			if n, err := io.Copy(got, c); n != size || err != nil {
				t.Errorf("received %d bytes: %v", n, err)
			}
		})
	}
	wg.Wait()
	if !bytes.Equal(sums[0].Sum(nil), sums[2].Sum(nil)) || !bytes.Equal(sums[1].Sum(nil), sums[3].Sum(nil)) {
		t.Error("what arrived is not what was sent")
	}
}

func BenchmarkTransfer(b *testing.B) {
	for _, mtu := range []int{1280, 1420, 8900} {
		b.Run(fmt.Sprintf("MTU%d", mtu), func(b *testing.B) {
			sa, sb, _ := newPair(b, Config{MTU: mtu})
			ca, cb := connect(b, sa, sb, b4)
			const chunk = 1 << 20
			buf := make([]byte, chunk)
			b.SetBytes(chunk)
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				for range b.N {
					if _, err := ca.Write(buf); err != nil {
						return
					}
				}
				ca.CloseWrite()
			}()
			dst := make([]byte, 256<<10)
			var total int64
			for {
				n, err := cb.Read(dst)
				total += int64(n)
				if err == io.EOF {
					break
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			if total != int64(b.N)*chunk {
				b.Fatalf("received %d bytes", total)
			}
		})
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	sa, sb, _ := newPair(b, Config{})
	ca, cb := connect(b, sa, sb, b4)
	go io.Copy(cb, cb)
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(ca, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDial(b *testing.B) {
	sa, sb, _ := newPair(b, Config{})
	l := listen(b, sb, "tcp", netip.AddrPort{})
	go func() {
		for {
			c, err := l.AcceptConn()
			if err != nil {
				return
			}
			go func() {
				io.Copy(io.Discard, c)
				c.Close()
			}()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		c, err := sa.DialTCP(ctx, netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
		if err != nil {
			b.Fatal(err)
		}
		c.SetLinger(0) // leave no TIME_WAIT behind
		c.Close()
	}
}

func BenchmarkUDP(b *testing.B) {
	sa, sb, _ := newPair(b, Config{})
	p, err := sb.ListenUDP("udp", netip.AddrPort{})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	c, err := sa.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, p.local.Port()))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 1200)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, _, err := p.ReadFromUDPAddrPort(buf); err != nil {
			b.Fatal(err)
		}
	}
}
