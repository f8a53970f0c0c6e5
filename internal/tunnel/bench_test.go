package tunnel

import (
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"mesh/identity"
)

// BenchmarkThroughput sends 1280-byte packets from one tunnel to another joined
// in memory, in trains of sixteen.
func BenchmarkThroughput(b *testing.B) {
	nw := newNetwork()
	nw.inline = true
	defer nw.close()
	var received atomic.Int64
	x := nw.add(b, "x", 1)
	y := nw.add(b, "y", 2, func(c *Config) {
		c.Deliver = func(_ identity.NodePublic, packets [][]byte) { received.Add(int64(len(packets))) }
	})
	x.knows(y)
	y.knows(x)
	p := packet(x.v4, y.v4, string(make([]byte, MTU-20)))
	burst := make([][]byte, trainPackets)
	for i := range burst {
		burst[i] = p
	}
	nw.inline = false // handshakes need a turn of their own
	x.t.Send(y.key, burst[:1])
	for received.Load() == 0 {
		runtime.Gosched()
	}
	nw.inline = true
	b.SetBytes(MTU)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; i += trainPackets {
		x.t.Send(y.key, burst[:min(trainPackets, b.N-i)])
	}
	b.StopTimer()
	b.ReportMetric(float64(received.Load())/float64(b.N+1), "delivered/op")
}

// BenchmarkInitiationCheck is what one initiation of a flood costs us.
func BenchmarkInitiationCheck(b *testing.B) {
	private := identity.NewNode()
	key, err := newLocalKey(private)
	if err != nil {
		b.Fatal(err)
	}
	msg := forge(b, private.Public(), identity.NewNode(), time.Unix(1e9, 0))
	b.Run("mac1", func(b *testing.B) {
		for range b.N {
			key.door.knows(msg)
		}
	})
	b.Run("sender", func(b *testing.B) {
		for range b.N {
			key.open(msg)
		}
	})
	b.Run("sender and timestamp", func(b *testing.B) {
		for range b.N {
			o, _ := key.open(msg)
			key.prove(&o)
		}
	})
}

// BenchmarkIdle reports what one tunnel costs that has no peer.
func BenchmarkIdle(b *testing.B) {
	const count = 20
	var before, after runtime.MemStats
	for range b.N {
		runtime.GC()
		runtime.GC() // pools keep what they have through one collection
		runtime.ReadMemStats(&before)
		goroutines := runtime.NumGoroutine()
		tunnels := make([]*Tunnel, count)
		for i := range tunnels {
			t, err := New(Config{
				Key:     identity.NewNode(),
				Lookup:  func(identity.NodePublic) (Peer, bool) { return Peer{}, false },
				Send:    func(identity.NodePublic, netip.AddrPort, [][]byte) error { return nil },
				Deliver: func(identity.NodePublic, [][]byte) {},
			})
			if err != nil {
				b.Fatal(err)
			}
			tunnels[i] = t
		}
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/count, "goroutines/tunnel")
		b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/count/1024, "heapKB/tunnel")
		for _, t := range tunnels {
			t.Close()
		}
	}
}
