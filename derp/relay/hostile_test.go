package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh/derp"
	"mesh/identity"
)

func header(t derp.FrameType, n uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{byte(t)}, n)
}

// What a client must not send ends its connection, with one line in the log,
// and harms nobody else.
func TestViolations(t *testing.T) {
	someone := identity.NewNode().Public().Bytes()
	frame := func(t derp.FrameType, payload ...[]byte) []byte { return derp.AppendFrame(nil, t, payload...) }
	tests := map[string][]byte{
		"forged peer gone":     frame(derp.FramePeerGone, someone[:], []byte{0}),
		"forged sender":        frame(derp.FrameRecvPacket, someone[:], []byte("x")),
		"forged relay key":     frame(derp.FrameServerKey, derp.ServerKeyPayload(identity.NewNode().Public())),
		"forged health":        frame(derp.FrameHealth, []byte("x")),
		"forged restarting":    frame(derp.FrameRestarting, make([]byte, 8)),
		"peer present":         frame(derp.FramePeerPresent, make([]byte, 51)),
		"mesh watch":           frame(derp.FrameWatchConns),
		"mesh forward":         frame(derp.FrameForwardPacket, someone[:], someone[:], []byte("x")),
		"mesh close peer":      frame(derp.FrameClosePeer, someone[:]),
		"second login":         frame(derp.FrameClientInfo, make([]byte, 100)),
		"short packet":         frame(derp.FrameSendPacket, someone[:31]),
		"empty packet frame":   frame(derp.FrameSendPacket),
		"oversize packet":      frame(derp.FrameSendPacket, someone[:], make([]byte, derp.MaxPacket+1)),
		"length 2^31":          header(derp.FrameSendPacket, 1<<31),
		"length 2^32-1":        header(derp.FrameSendPacket, 1<<32-1),
		"unknown, over 1 MiB":  header(0x77, derp.MaxUnknownFrame+1),
		"note preferred empty": frame(derp.FrameNotePreferred),
		"note preferred long":  frame(derp.FrameNotePreferred, []byte{1, 1}),
		"short ping":           frame(derp.FramePing, make([]byte, 7)),
		"long ping":            frame(derp.FramePing, make([]byte, derp.MaxPing+1)),
	}
	for name, bad := range tests {
		t.Run(name, func(t *testing.T) {
			logger, logs := observedLogger()
			b := newBed(t, Config{Admit: admitAll, Logger: logger})
			other := b.dial()
			r := b.rawLogin(identity.NewNode())
			r.nc.Write(bad)
			r.nc.Write(bad)
			r.wantClosed()
			other.quiet()
			until(t, "violation counted", func() bool { return b.srv.Stats().Violations == 1 })
			until(t, "one line", func() bool { return logs.Len() == 1 })
		})
	}
}

func TestHarmlessFrames(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	r := b.rawLogin(identity.NewNode())
	r.write(derp.FrameKeepAlive)
	r.write(0x77, make([]byte, derp.MaxUnknownFrame))
	r.write(0x78, make([]byte, 100))
	r.write(derp.FramePong, make([]byte, 8))
	r.write(derp.FrameNotePreferred, []byte{1})
	r.write(derp.FrameNotePreferred, []byte{0})
	r.write(derp.FramePing, bytes.Repeat([]byte("longping"), derp.MaxPing/8))
	if f := r.read(); f.Type != derp.FramePong || string(f.Payload) != "longping" {
		t.Errorf("%#x %q", byte(f.Type), f.Payload)
	}
}

// A connection that ends in the middle of anything leaves nothing behind.
func TestTruncatedEverywhere(t *testing.T) {
	srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
	defer srv.Close()
	key, peer := identity.NewNode(), identity.NewNode().Public().Bytes()
	script := derp.AppendFrame(nil, derp.FrameClientInfo, derp.SealClientInfo(key, srv.Key(), derp.ClientInfo{}))
	login := len(script)
	script = derp.AppendFrame(script, derp.FrameSendPacket, peer[:], []byte("hello"))
	script = derp.AppendFrame(script, derp.FramePing, make([]byte, 8))
	for n := range len(script) + 1 {
		a, c := net.Pipe()
		result := make(chan error, 1)
		go func() { result <- srv.Accept(t.Context(), a, nil) }()
		go io.Copy(io.Discard, c)
		c.Write(script[:n])
		c.Close()
		if err := <-result; err == nil {
			t.Errorf("cut after %d bytes: no error", n)
		} else if n < login && !strings.Contains(err.Error(), "login") {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	if st := srv.Stats(); st.Clients != 0 || st.Pending != 0 || st.Violations != 0 {
		t.Errorf("%+v", st)
	}
}

func TestBadLogins(t *testing.T) {
	tests := map[string][]byte{
		"no login":         derp.AppendFrame(nil, derp.FrameSendPacket, make([]byte, 40)),
		"garbage":          []byte("GET / HTTP/1.1\r\n\r\n"),
		"short info":       derp.AppendFrame(nil, derp.FrameClientInfo, make([]byte, 40)),
		"zero key":         derp.AppendFrame(nil, derp.FrameClientInfo, make([]byte, 200)),
		"huge info":        header(derp.FrameClientInfo, 1<<30),
		"low order key":    derp.AppendFrame(nil, derp.FrameClientInfo, []byte{1}, make([]byte, 200)),
		"other relay":      derp.AppendFrame(nil, derp.FrameClientInfo, derp.SealClientInfo(identity.NewNode(), identity.NewNode().Public(), derp.ClientInfo{})),
		"mesh frame first": derp.AppendFrame(nil, derp.FrameWatchConns),
	}
	logger, logs := observedLogger()
	b := newBed(t, Config{Admit: admitAll, Logger: logger})
	for name, in := range tests {
		t.Run(name, func(t *testing.T) {
			r := b.raw()
			r.serverKey()
			r.nc.Write(in)
			r.wantClosed()
		})
	}
	until(t, "all counted", func() bool { return b.srv.Stats().Violations == uint64(len(tests)) })
	if logs.Len() != 0 {
		t.Error("strangers can fill the log")
	}
}

// A receiver that stops reading costs bounded memory and its connection, and
// nobody else notices.
func TestSlowReader(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, WriteTimeout: 300 * time.Millisecond})
	slowKey := identity.NewNode()
	b.rawLogin(slowKey) // and never reads
	flooder, x, y := b.dial(), b.dial(), b.dial()

	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	payload := make([]byte, 60000)
	sent := 0
	for len(b.srv.Connected()) == 4 {
		for range 8 {
			if err := flooder.Send(slowKey.Public(), payload); err != nil {
				t.Fatal(err)
			}
			sent += len(payload)
		}
		x.send(y.pub, "meanwhile")
		y.wantPacket(x.pub, "meanwhile")
		if sent > 1<<30 {
			t.Fatal("never cut")
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 16<<20 {
		t.Errorf("heap grew by %d bytes while %d were sent", grown, sent)
	}
	flooder.quiet() // it never heard from the slow one, so nobody is gone for it
	x.send(y.pub, "after")
	y.wantPacket(x.pub, "after")
}

// One pair goes on while a sender floods somebody else, with tiny frames and
// with large ones.
func TestFlood(t *testing.T) {
	for _, size := range []int{1, 64 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			b := newBed(t, Config{Admit: admitAll})
			flooder, x, y := b.dial(), b.dial(), b.dial()
			victim := b.rawLogin(identity.NewNode())
			victimKey := b.keyOtherThan(flooder, x, y)
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { io.Copy(io.Discard, victim.nc) })
			wg.Go(func() {
				p := make([]byte, size)
				for {
					select {
					case <-stop:
						return
					default:
						flooder.Send(victimKey, p, p, p, p)
					}
				}
			})
			for i := range 300 {
				s := fmt.Sprint(i)
				x.send(y.pub, s)
				y.wantPacket(x.pub, s)
				y.send(x.pub, s)
				x.wantPacket(y.pub, s)
			}
			close(stop)
			victim.nc.Close()
			wg.Wait()
		})
	}
}

func (b *bed) keyOtherThan(nodes ...*node) identity.NodePublic {
	for _, k := range b.srv.Connected() {
		known := false
		for _, n := range nodes {
			known = known || n.pub == k
		}
		if !known {
			return k
		}
	}
	b.t.Fatal("no other key")
	return identity.NodePublic{}
}

// Connections that are only held open do not keep a client out for long.
func TestHalfOpen(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, MaxPending: 40, MaxPendingPerSource: 1000})
	inside := b.dial()
	for i := range 300 {
		nc, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if i%2 == 0 {
			nc.Write([]byte{0x16, 3, 1, 0, 100, 1}) // the start of a TLS handshake
		}
	}
	if st := b.srv.Stats(); st.Pending > 40 {
		t.Errorf("%d pending", st.Pending)
	}
	until(t, "a client gets in", func() bool {
		c, err := derp.Dial(t.Context(), b.config(identity.NewNode()))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	inside.quiet() // those inside do not count and are not cut
}

// A client that does not keep to the rate it was told is read no faster.
func TestClientRateLimit(t *testing.T) {
	const perSecond = 200 << 10
	b := newBed(t, Config{Admit: admitAll, BytesPerSecond: perSecond})
	r := b.rawLogin(identity.NewNode())
	key := identity.NewNode().Public().Bytes()
	start := time.Now()
	n := 0
	for i := range byte(16) { // the burst and about one and a half seconds more
		r.write(derp.FrameSendPacket, key[:], make([]byte, 32<<10))
		n += 32 << 10
		r.write(derp.FramePing, bytes.Repeat([]byte{i}, 8))
		if f := r.read(); f.Type != derp.FramePong || f.Payload[0] != i {
			t.Fatalf("%#x %x", byte(f.Type), f.Payload)
		}
	}
	// Not faster than allowed; how much slower is the machine's business.
	if allowed := perSecond + int(time.Since(start).Seconds()*perSecond) + derp.MaxFrame; n > allowed {
		t.Errorf("%d bytes passed, allowed %d", n, allowed)
	}
	if n < 2*perSecond {
		t.Error("test sends too little")
	}
	if b.srv.Stats().Paused == 0 {
		t.Error("no pause counted")
	}
}

// A client of ours that is above the rate drops packets itself, and never waits.
// Whoever sends above its rate is held back, and nobody with it: what others send
// in the meantime arrives, all of it.
func TestRateLimitSparesOthers(t *testing.T) {
	const perSecond = 100 << 10
	b := newBed(t, Config{Admit: admitAll, BytesPerSecond: perSecond})
	x, y := b.dial(), b.dial()
	flooder := b.rawLogin(identity.NewNode())
	to := y.pub.Bytes()
	began := time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for flooder.conn.WriteFrame(derp.FrameSendPacket, to[:], make([]byte, 8<<10)) == nil {
		}
	}()
	until(t, "the flooder to be held back", func() bool { return b.srv.Stats().Paused > 0 })
	for i := range 200 {
		text := fmt.Sprint("number ", i)
		x.send(y.pub, text)
		for v := y.next(); v != (packet{x.pub, text}); v = y.next() {
			if p, ok := v.(packet); !ok || p.from == x.pub {
				t.Fatalf("got %+v, want %q", v, text)
			}
		}
	}
	st := b.srv.Stats()
	if allowed := perSecond + int(time.Since(began).Seconds()*perSecond) + 2*derp.MaxFrame; int(st.BytesIn) > allowed {
		t.Errorf("%d bytes passed, allowed %d", st.BytesIn, allowed)
	}
	flooder.nc.Close()
	<-done
}

func TestClientKeepsRate(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, BytesPerSecond: 100 << 10, BytesBurst: 1})
	x, y := b.dial(), b.dial()
	for range 100 {
		x.send(y.pub, strings.Repeat("x", 32<<10))
	}
	if x.Dropped() < 90 {
		t.Errorf("%d of 100 packets dropped", x.Dropped())
	}
	x.sync()
	if n := len(y.in); n == 0 {
		y.next() // the first two fit into the burst
	}
}

// Many connections from one place do not keep out those from elsewhere.
func TestMaxPerSource(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, MaxPerSource: 3})
	a := b.dial()
	b.dial()
	b.dial()
	if _, err := derp.Dial(t.Context(), b.config(identity.NewNode())); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("one too many: %v", err)
	}
	a.Close()
	until(t, "a place is free", func() bool { return b.srv.Stats().Clients == 2 })
	b.dial()
}

// One sender that floods a receiver leaves room there for the packets of others.
func TestFloodLeavesRoom(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	flooder, x, y := b.dial(), b.dial(), b.rawLogin(identity.NewNode())
	key := b.keyOtherThan(flooder, x)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		p := make([]byte, 1300)
		for {
			select {
			case <-stop:
				return
			default:
				flooder.Send(key, p, p, p, p, p, p, p, p)
			}
		}
	})
	// y reads slower than the flood comes.
	until(t, "the flood overflows", func() bool { return b.srv.Stats().Dropped > 1000 })
	const n = 200
	got := 0
	read := func() {
		f := y.read()
		if src, _, ok := derp.SplitKey(f.Payload); ok && src == x.pub {
			got++
		}
	}
	for range n {
		x.send(key, "small")
		for range 60 {
			read()
		}
	}
	for range 3000 {
		read()
	}
	close(stop)
	wg.Wait()
	if got < n*8/10 {
		t.Errorf("%d of %d packets beside the flood", got, n)
	}
}

// FuzzServer feeds the relay after a login: it neither panics nor hangs, and
// what it sends is a stream of whole frames.
func FuzzServer(f *testing.F) {
	key := identity.NewNode()
	self := key.Public().Bytes()
	f.Add(derp.AppendFrame(derp.AppendFrame(nil, derp.FrameSendPacket, self[:], []byte("x")), derp.FramePing, make([]byte, 8)))
	f.Add(derp.AppendFrame(derp.AppendFrame(nil, derp.FrameNotePreferred, []byte{1}), derp.FrameWatchConns))
	f.Add(append(header(0x77, 3), 1, 2, 3))
	srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
	f.Cleanup(func() { srv.Close() })
	login := derp.AppendFrame(nil, derp.FrameClientInfo, derp.SealClientInfo(key, srv.Key(), derp.ClientInfo{}))
	f.Fuzz(func(t *testing.T, stream []byte) {
		a, c := net.Pipe()
		result := make(chan error, 1)
		go func() { result <- srv.Accept(t.Context(), a, nil) }()
		read := make(chan struct{})
		go func() {
			defer close(read)
			conn := derp.NewConn(c, nil, derp.ConnConfig{})
			for i := 0; ; i++ {
				fr, err := conn.ReadFrame()
				if err != nil {
					return
				}
				if i == 0 && fr.Type != derp.FrameServerKey || i == 1 && fr.Type != derp.FrameServerInfo {
					t.Errorf("frame %d is %#x", i, byte(fr.Type))
				}
				if src, _, ok := derp.SplitKey(fr.Payload); fr.Type == derp.FrameRecvPacket && (!ok || src != key.Public()) {
					t.Error("packet of another sender")
				}
			}
		}()
		c.Write(login)
		c.Write(stream)
		c.Close()
		if err := <-result; err == nil {
			t.Error("no error")
		}
		<-read
		if n := len(srv.Connected()); n != 0 {
			t.Errorf("%d left", n)
		}
	})
}

// FuzzServerLogin feeds the relay from the first byte.
func FuzzServerLogin(f *testing.F) {
	relayKey := identity.NewNode()
	f.Add(derp.AppendFrame(nil, derp.FrameClientInfo, derp.SealClientInfo(identity.NewNode(), relayKey.Public(), derp.ClientInfo{})))
	f.Add([]byte("GET /derp"))
	srv := New(Config{Key: relayKey, Admit: nil})
	f.Cleanup(func() { srv.Close() })
	f.Fuzz(func(t *testing.T, stream []byte) {
		a, c := net.Pipe()
		result := make(chan error, 1)
		go func() { result <- srv.Accept(t.Context(), a, nil) }()
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(io.Discard, c)
		}()
		c.Write(stream)
		c.Close()
		if err := <-result; err == nil {
			t.Error("no error")
		}
		<-done
		if st := srv.Stats(); st.Clients != 0 || st.Accepted != 0 {
			t.Errorf("%+v", st)
		}
	})
}
