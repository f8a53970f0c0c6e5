package relay

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mesh/derp"
	"mesh/identity"
)

// BenchmarkForward measures what the relay passes on between one pair of
// nodes, each flooding the other with packets of 1300 bytes, over loopback TCP.
// An operation is a frame delivered; the load generator shares the processors.
func BenchmarkForward(b *testing.B) {
	for _, tt := range []struct {
		name string
		tls  bool
	}{{"plain", false}, {"tls", true}} {
		b.Run(tt.name, func(b *testing.B) { benchmarkForward(b, tt.tls) })
	}
}

func benchmarkForward(b *testing.B, secure bool) {
	cfg := Config{Key: identity.NewNode(), Admit: admitAll}
	var target derp.Target
	if secure {
		bed := newBed(b, cfg)
		target = bed.config(identity.NewNode()).Target
	} else {
		srv := New(cfg)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln, nil) }()
		b.Cleanup(func() { srv.Close(); <-served })
		target = derp.Target{Addr: ln.Addr().String(), PlainHTTP: true}
	}

	const size, train = 1300, 48
	var delivered atomic.Int64
	finished := make(chan struct{})
	var clients [2]*derp.Client
	var keys [2]identity.NodePrivate
	var wg sync.WaitGroup
	for i := range clients {
		keys[i] = identity.NewNode()
		c, err := derp.Dial(b.Context(), derp.ClientConfig{Key: keys[i], Target: target})
		if err != nil {
			b.Fatal(err)
		}
		clients[i] = c
		wg.Go(func() {
			for {
				m, err := c.Recv()
				if err != nil {
					return
				}
				n := int64(len(m.Packets))
				if have := delivered.Add(n); have >= int64(b.N) && have-n < int64(b.N) {
					close(finished)
				}
			}
		})
	}
	packets := make([][]byte, train)
	for i := range packets {
		packets[i] = make([]byte, size)
	}
	stop := make(chan struct{})
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	start := time.Now()
	for i, c := range clients {
		wg.Go(func() {
			// Stay a little ahead of what arrives: a sender that drops most
			// of what it makes would measure memory copies only.
			sent := int64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if sent*2 > delivered.Load()+2*256+2*int64(c.Dropped()) {
					time.Sleep(20 * time.Microsecond)
					sent -= 4 // drops at the relay must not stall us
					continue
				}
				c.Send(keys[1-i].Public(), packets...)
				sent += train
			}
		})
	}
	<-finished
	b.StopTimer()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds()/1e3, "kframes/s")
	close(stop)
	for _, c := range clients {
		c.Close()
	}
	wg.Wait()
}

// BenchmarkRelayOnly leaves our own client out: a script of frames is written
// and what comes back is counted by bytes, as cheaply as can be.
func BenchmarkRelayOnly(b *testing.B) {
	srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { srv.Accept(b.Context(), nc, nil) })
		}
	})
	login := func() (net.Conn, identity.NodePublic) {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		key := identity.NewNode()
		conn := derp.NewConn(nc, nil, derp.ConnConfig{})
		conn.ReadFrame()
		conn.WriteFrame(derp.FrameClientInfo, derp.SealClientInfo(key, srv.Key(), derp.ClientInfo{}))
		conn.ReadFrame()
		return nc, key.Public()
	}
	const size, train = 1300, 64
	frame := int64(derp.FrameHeaderLen + identity.KeyLen + size)
	x, xKey := login()
	y, yKey := login()
	var received atomic.Int64
	finished := make(chan struct{})
	var wg sync.WaitGroup
	pair := func(nc net.Conn, dst identity.NodePublic) {
		k := dst.Bytes()
		var script []byte
		for range train {
			script = derp.AppendFrame(script, derp.FrameSendPacket, k[:], make([]byte, size))
		}
		wg.Go(func() {
			for {
				if _, err := nc.Write(script); err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			buf := make([]byte, 256<<10)
			want := int64(b.N) * frame
			for {
				n, err := nc.Read(buf)
				if have := received.Add(int64(n)); have >= want && have-int64(n) < want {
					close(finished)
				}
				if err != nil {
					return
				}
			}
		})
	}
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	start := time.Now()
	pair(x, yKey)
	pair(y, xKey)
	<-finished
	b.StopTimer()
	st := srv.Stats()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds()/1e3, "kframes/s")
	b.ReportMetric(float64(st.PacketsIn)/time.Since(start).Seconds()/1e3, "kframes-in/s")
	x.Close()
	y.Close()
	srv.Close()
	ln.Close()
	wg.Wait()
	conns.Wait()
}
