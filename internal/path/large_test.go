package path

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"mesh/internal/disco"
)

// sizeWorld answers questions of a size after a while, 0 = never.
type sizeWorld func(bytes int, now instant) time.Duration

// sizeRun has bulk data go by a way for a while. It tells how many questions of
// each size were asked, and what was known at each moment.
func sizeRun(s *sizing, way netip.AddrPort, from, to instant, w sizeWorld, seen func(now instant, bytes int)) map[int]int {
	type answer struct {
		tx disco.TxID
		at instant
	}
	asked := make(map[int]int)
	var answers []answer
	for now := from; now < to; now += 10 * time.Millisecond {
		for len(answers) > 0 && answers[0].at <= now {
			s.answered(answers[0].tx, now)
			answers = answers[1:]
		}
		for _, a := range s.ask(way, now, largePatience) {
			asked[a.bytes()]++
			if d := w(a.bytes(), now); d > 0 {
				answers = append(answers, answer{a.tx, now + d})
			}
		}
		bytes, until := s.largest()
		if now > until {
			bytes = 0
		}
		if seen != nil {
			seen(now, bytes)
		}
	}
	return asked
}

func TestSizing(t *testing.T) {
	const begin = time.Hour
	way := netip.MustParseAddrPort("192.0.2.1:1")
	limit := func(most int) sizeWorld {
		return func(bytes int, _ instant) time.Duration {
			if bytes > most {
				return 0
			}
			return 20 * time.Millisecond
		}
	}
	at := func(s *sizing, now instant) int {
		bytes, until := s.largest()
		if now > until {
			return 0
		}
		return bytes
	}
	t.Run("stock peers are asked little", func(t *testing.T) {
		var s sizing
		asked := sizeRun(&s, way, begin, begin+10*time.Minute, limit(0), func(_ instant, bytes int) {
			if bytes != 0 {
				t.Fatal("no answer, but", bytes)
			}
		})
		if asked[disco.SizeLen] > 40 || len(asked) != 1 {
			t.Errorf("asked %v", asked)
		}
	})
	t.Run("loopback", func(t *testing.T) {
		var s sizing
		asked := sizeRun(&s, way, begin, begin+10*time.Second, limit(hugeDatagram), nil)
		if at(&s, begin+10*time.Second) != hugeDatagram || asked[hugeDatagram] > 25 {
			t.Errorf("%d bytes, asked %v", at(&s, begin+10*time.Second), asked)
		}
	})
	t.Run("jumbo frames", func(t *testing.T) {
		var s sizing
		first := instant(0)
		asked := sizeRun(&s, way, begin, begin+10*time.Minute, limit(9000-28), func(now instant, bytes int) {
			if first == 0 && bytes != 0 {
				first = now
			}
			if bytes > jumboDatagram || first != 0 && bytes != jumboDatagram {
				t.Fatalf("%v: %d bytes", now-begin, bytes)
			}
		})
		if first == 0 || first > begin+time.Second || asked[hugeDatagram] > 40 {
			t.Errorf("first after %v, asked %v", first-begin, asked)
		}
	})
	t.Run("a way that takes less all at once", func(t *testing.T) {
		var s sizing
		const dark, light = begin + 10*time.Second, begin + 40*time.Second
		last := instant(0)
		sizeRun(&s, way, begin, begin+3*time.Minute, func(bytes int, now instant) time.Duration {
			if now >= dark && now < light && bytes > fullDatagram {
				return 0
			}
			return 20 * time.Millisecond
		}, func(now instant, bytes int) {
			if bytes > 0 && now < light {
				last = now
			}
		})
		if after := last - dark; after > largeRenew+largePatience+20*time.Millisecond {
			t.Errorf("large datagrams are lost for %v", after)
		}
		if at(&s, begin+3*time.Minute) != hugeDatagram {
			t.Errorf("later it is at level %d", s.level)
		}
	})
	t.Run("answers that get lost now and then", func(t *testing.T) {
		var s sizing
		n, small := 0, 0
		sizeRun(&s, way, begin, begin+time.Minute, func(int, instant) time.Duration {
			if n++; n%3 == 0 {
				return 0
			}
			return 20 * time.Millisecond
		}, func(now instant, bytes int) {
			if now > begin+5*time.Second && bytes == 0 {
				small++
			}
		})
		if s.level != 3 || small > 2000 {
			t.Errorf("level %d, small for %d ms", s.level, small*10)
		}
	})
	t.Run("the system refuses", func(t *testing.T) {
		var s sizing
		sizeRun(&s, way, begin, begin+time.Second, limit(hugeDatagram), nil)
		s.fall(1, begin+time.Second)
		if at(&s, begin+time.Second) != 0 {
			t.Error("it is still large")
		}
		asked := sizeRun(&s, way, begin+time.Second, begin+30*time.Second, limit(hugeDatagram), nil)
		if len(asked) != 0 {
			t.Errorf("asked again %v", asked)
		}
	})
	t.Run("another way begins anew", func(t *testing.T) {
		var s sizing
		sizeRun(&s, way, begin, begin+time.Second, limit(hugeDatagram), nil)
		sizeRun(&s, netip.AddrPort{}, begin+time.Second, begin+1100*time.Millisecond, limit(hugeDatagram), nil)
		if got := at(&s, begin+1100*time.Millisecond); got != relayDatagram {
			t.Errorf("%d bytes by relay", got)
		}
		sizeRun(&s, way, begin+1100*time.Millisecond, begin+time.Minute, limit(0), nil)
		if got := at(&s, begin+time.Minute); got != 0 {
			t.Errorf("%d bytes", got)
		}
	})
}

// Over real sockets on loopback the largest size is found, and arrives; also by a
// relay. Sockets of which nobody knows whether they cut datagrams are left alone.
func TestDatagramSize(t *testing.T) {
	if !neverFragments {
		t.Skip("this system may cut datagrams")
	}
	m := realNet(t)
	for _, c := range []struct {
		name   string
		want   int
		change func(*Config)
	}{
		{"direct", hugeDatagram, func(*Config) {}},
		{"relay", relayDatagram, func(c *Config) { c.RelayOnly = true }},
		{"sockets of others", 0, func(c *Config) {
			c.ListenUDP = func(ctx context.Context, network, addr string) (net.PacketConn, error) {
				pc, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
				return wrapped{pc}, err
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := make(chan int, 1024)
			a := realNode(t, m, c.change)
			b := realNode(t, m, func(cfg *Config) {
				c.change(cfg)
				cfg.Receive = func(_ Source, datagrams [][]byte) {
					for _, d := range datagrams {
						select {
						case got <- len(d):
						default:
						}
					}
				}
			})
			pa, pb := a.peer(900), b.peer(900)
			if c.name == "relay" {
				pa.Endpoints, pb.Endpoints = nil, nil
			}
			a.knows(pb)
			b.knows(pa)
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			timeout := time.After(20 * time.Second)
			large := make([]byte, max(c.want, fullDatagram))
			direct := c.name == "relay"
			for settled := 0; ; {
				small := make([]byte, 100)
				if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{small}); err != nil {
					t.Fatal(err)
				}
				size := a.DatagramSize(b.key())
				if size == c.want && size > 0 {
					if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{large}); err != nil {
						t.Fatal(err)
					}
				}
				if pe := a.peers.get(b.key()); pe != nil && pe.full.Load() > int64(a.now()) {
					direct = true
				}
				if c.want == 0 && direct {
					if settled++; size != 0 {
						t.Fatalf("%d bytes", size)
					} else if settled == 100 {
						return
					}
				}
				select {
				case n := <-got:
					if n == c.want {
						return
					}
				case <-tick.C:
				case <-timeout:
					t.Fatalf("the largest datagram is %d bytes, want %d", size, c.want)
				}
			}
		})
	}
}
