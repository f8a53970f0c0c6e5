package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// heap is the memory in use after a collection.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools held
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestLimitsFill(t *testing.T) {
	for _, c := range []struct{ in, want Limits }{
		{Limits{}, Limits{32 << 20, 1024, 128}},
		{Limits{ReceiveMemory: 1 << 20}, Limits{1 << 20, 32, 128}},
		{Limits{ReceiveMemory: 1 << 30, AcceptBacklog: 7}, Limits{1 << 30, 1024, 7}},
		{Limits{Connections: 10}, Limits{32 << 20, 10, 128}},
		{Limits{Connections: 10_000}, Limits{10_000 * 32 << 10, 10_000, 128}},
	} {
		if got, err := c.in.fill(); err != nil || got != c.want {
			t.Errorf("%+v: %+v, %v", c.in, got, err)
		}
	}
	for _, bad := range []Limits{{ReceiveMemory: -1}, {Connections: -1}, {AcceptBacklog: -1}, {ReceiveMemory: 1}, {ReceiveMemory: 1 << 20, Connections: 33}} {
		if _, err := bad.fill(); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

// untouched checks that a budget has got back all that it gave.
func untouched(t *testing.T, s *Stack, l Limits) {
	t.Helper()
	l, err := l.fill()
	if err != nil {
		t.Fatal(err)
	}
	b := s.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	send := b.spareSend
	for _, l := range b.lingering {
		send += l.held
	}
	if spare := l.ReceiveMemory - int64(l.Connections)*sureBuffer; b.conns != 0 || b.spare != spare || send != spare || b.wider != spareWindow {
		t.Errorf("at the end %d connections are counted, %d and %d bytes are spare and %d to widen by", b.conns, b.spare, send, b.wider)
	}
}

// TestSlowReaders lets 200 connections bring what nobody reads: windows close, and
// neither heap nor reservations exceed the bound. Later all is read, and the
// memory is given back.
func TestSlowReaders(t *testing.T) {
	const conns, memory = 200, 8 << 20
	limits := Limits{ReceiveMemory: memory, Connections: 256}
	a, b, _ := newPair(t, Config{Limits: limits})
	before := heap()
	l := listen(t, b, "tcp", netip.AddrPort{})
	to := netip.AddrPortFrom(b4, portOf(l))
	var senders, readers []*Conn
	for range conns {
		ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, to)
		if err != nil {
			t.Fatal(err)
		}
		cb, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		senders, readers = append(senders, ca), append(readers, cb)
	}
	var written, read atomic.Int64
	var wg sync.WaitGroup
	stuck := make(chan struct{}, conns)
	for _, c := range senders {
		wg.Go(func() {
			buf := make([]byte, 16<<10)
			full := false
			for {
				// A sender that makes no progress for a while is stuck.
				c.SetWriteDeadline(time.Now().Add(time.Second))
				n, err := c.Write(buf)
				written.Add(int64(n))
				if err != nil {
					if ne, ok := err.(net.Error); !ok || !ne.Timeout() || full {
						t.Errorf("a sender ended: %v", err)
					}
					full = true
					stuck <- struct{}{}
					break
				}
			}
		})
	}
	for range conns {
		<-stuck
	}
	reserved := int64(0)
	for _, c := range readers {
		reserved += c.ep.SocketOptions().GetReceiveBufferSize()
	}
	if reserved > memory {
		t.Errorf("%d bytes are reserved, %d are allowed", reserved, memory)
	}
	// Both ends are in this process: what waits to be sent counts as well.
	if grew := heap() - before; grew > 3*memory {
		t.Errorf("the heap grew by %d bytes, with a limit of %d", grew, memory)
	}
	for _, c := range senders {
		c.CloseWrite()
	}
	for _, c := range readers {
		wg.Go(func() {
			n, err := io.Copy(io.Discard, c)
			read.Add(n)
			if err != nil {
				t.Errorf("a reader ended: %v", err)
			}
		})
	}
	wg.Wait()
	if read.Load() != written.Load() || read.Load() < 1<<20 {
		t.Errorf("%d bytes were read, %d written", read.Load(), written.Load())
	}
	if grew := heap() - before; grew > memory {
		t.Errorf("after the burst the heap is still larger by %d bytes", grew)
	}
	for i := range conns {
		senders[i].Close()
		readers[i].Close()
	}
	untouched(t, a, limits)
	untouched(t, b, limits)
}

func TestTooManyConnections(t *testing.T) {
	limits := Limits{Connections: 3}
	a, b, _ := newPair(t, Config{Limits: limits})
	a.budget.most = 100
	la, lb := listen(t, a, "tcp", netip.AddrPort{}), listen(t, b, "tcp", netip.AddrPort{})
	toA, toB := netip.AddrPortFrom(a4, portOf(la)), netip.AddrPortFrom(b4, portOf(lb))
	var open []*Conn
	for range 3 {
		ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, toB)
		if err != nil {
			t.Fatal(err)
		}
		cb, err := lb.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, ca, cb)
	}
	if _, err := b.DialTCP(dialCtx(t), netip.Addr{}, toA); !errors.Is(err, ErrTooManyConnections) {
		t.Errorf("a fourth dial: %v", err)
	}
	ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, toB)
	if err == nil { // the handshake was over before there was a connection to refuse
		_, err = ca.Read(make([]byte, 1))
		ca.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a peer's fourth: %v", err)
	}
	// Nothing happened to the others.
	for i := 0; i < len(open); i += 2 {
		ca, cb := open[i], open[i+1]
		if _, err := ca.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(cb, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	open[1].Close()
	cb, err := b.DialTCP(dialCtx(t), netip.Addr{}, toA)
	if err != nil {
		t.Fatalf("a dial after one has ended: %v", err)
	}
	cb.Close()
	for _, c := range open {
		c.Close()
	}
	untouched(t, b, limits)
}

// TestBacklogFlood dials what nobody accepts: a bounded number waits, the others
// are reset, and none of them is counted for good.
func TestBacklogFlood(t *testing.T) {
	limits := Limits{AcceptBacklog: 8}
	a, b, _ := newPair(t, Config{Limits: limits})
	l := listen(t, b, "tcp", netip.AddrPort{})
	to := netip.AddrPortFrom(b4, portOf(l))
	for range 500 {
		if c, err := a.DialTCP(dialCtx(t), netip.Addr{}, to); err == nil {
			c.Close()
		}
	}
	b.budget.mu.Lock()
	if b.budget.conns > limits.AcceptBacklog+1 { // one may be on its way
		t.Errorf("%d connections wait", b.budget.conns)
	}
	b.budget.mu.Unlock()
	l.Close()
	untouched(t, a, limits)
	untouched(t, b, limits)
}

// TestLingerIsBounded closes connections whose peer never reads what is still to
// be sent: as many as the limit go on, the oldest give way.
func TestLingerIsBounded(t *testing.T) {
	const most = 16
	limits := Limits{Connections: most}
	a, b, _ := newPair(t, Config{Limits: limits})
	b.budget.most = 1 << 20
	l := listen(t, b, "tcp", netip.AddrPort{})
	to := netip.AddrPortFrom(b4, portOf(l))
	var theirs []*Conn
	for range 8 * most {
		ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, to)
		if err != nil {
			t.Fatal(err)
		}
		cb, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		theirs = append(theirs, cb)
		ca.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		ca.Write(make([]byte, 4<<20))
		ca.Close()
	}
	n := 0
	for _, tep := range a.registered() {
		if ep, ok := tep.(*tcp.Endpoint); ok && live(ep) {
			n++
		}
	}
	// Between two looks the list doubles.
	if n > 2*most+64 || n < most {
		t.Errorf("%d closed connections still have data to send", n)
	}
	for _, c := range theirs {
		c.Close()
	}
}
