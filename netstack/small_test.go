package netstack

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// TestSmallSegmentsAreBounded sends single bytes, of which each takes near a
// kilobyte, to who does not read. They all arrive when it does.
func TestSmallSegmentsAreBounded(t *testing.T) {
	const memory = 1 << 20
	a, b, _ := newPair(t, Config{Limits: Limits{ReceiveMemory: memory}})
	ca, cb := connect(t, a, b, b4)
	before := heap()
	n := 0
	for {
		// The buffer of the sender would take far more of them than pass.
		ca.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := ca.Write([]byte{byte(n)}); err != nil || n == 300_000 {
			break
		}
		n++
	}
	got := int64(0)
	// Without bounds it is more than 200 MB.
	if grew := heap() - before; grew > 20<<20 {
		t.Errorf("%d single bytes take %d bytes of memory", n, grew)
	}
	ca.CloseWrite()
	buf := make([]byte, 64)
	for {
		k, err := cb.Read(buf)
		for _, c := range buf[:k] {
			if c != byte(got) {
				t.Fatalf("byte %d is %d", got, c)
			}
			got++
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if int(got) < n {
		t.Errorf("%d bytes arrived of %d", got, n)
	}
}

// TestTinySegmentsAreBounded plays a peer that fills a window with segments of one
// byte.
func TestTinySegmentsAreBounded(t *testing.T) {
	a, b, w := newPair(t, Config{Limits: Limits{ReceiveMemory: 2 << 20}})
	ca, cb := connect(t, a, b, b4)
	seen := make(chan []byte, 1)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		for _, p := range packets {
			if toB && len(p) == 53 { // a byte with a timestamp
				select {
				case seen <- bytes.Clone(p):
				default:
				}
			}
		}
		return packets
	})
	if _, err := ca.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	p := <-seen
	seq := binary.BigEndian.Uint32(p[24:])
	for i := range uint32(20_000) {
		binary.BigEndian.PutUint32(p[24:], seq+i)
		b.In([][]byte{p})
	}
	wait := func() int {
		n, terr := cb.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
		if terr != nil {
			t.Fatal(terr)
		}
		return n
	}
	most := int(cb.reserved / smallCost)
	for deadline := time.Now().Add(20 * time.Second); wait() < most/2 && time.Now().Before(deadline); {
		runtime.Gosched() // the stack works through what it was given
	}
	if n := wait(); n < most/2 || n > most+most/2 {
		t.Errorf("%d segments of a byte wait, %d may", n, most)
	}
}

// TestBufferFollowsPieces checks that small writes get a small buffer, and large
// ones that which they had.
func TestBufferFollowsPieces(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	go io.Copy(io.Discard, cb)
	ops := ca.ep.SocketOptions()
	for _, c := range []struct{ piece, most, least int }{{8, 64 << 10, 0}, {4096, 1 << 30, defaultBuffer}} {
		for range 2 * fewPieces {
			if _, err := ca.Write(make([]byte, c.piece)); err != nil {
				t.Fatal(err)
			}
		}
		if size := int(ops.GetSendBufferSize()); size > c.most || size < c.least {
			t.Errorf("with pieces of %d bytes the buffer is %d", c.piece, size)
		}
	}
}

// TestBufferGrowsWithRoom has the buffer of a writer grow while he waits for room:
// he must not wait for ever.
func TestBufferGrowsWithRoom(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	ca.ep.SocketOptions().SetSendBufferSize(minBuffer, false)
	for { // until nothing fits
		ca.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := ca.Write(make([]byte, 4096)); err != nil {
			break
		}
	}
	select {
	case <-ca.writable:
	default:
	}
	ca.SetWriteDeadline(time.Now().Add(20 * time.Second))
	ca.out = pieces{count: fewPieces - 1, bytes: fewPieces * 4096, normal: maxBuffer}
	result := make(chan error, 1)
	go func() {
		_, err := ca.Write(make([]byte, 4096))
		result <- err
	}()
	runtime.Gosched()
	go io.Copy(io.Discard, cb)
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// TestWhatIsReadMakesRoom reads small packets as they come, and never more than
// there are: none may be dropped.
func TestWhatIsReadMakesRoom(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	in, err := b.ListenUDP("udp", netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	out, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, in.local.Port()))
	if err != nil {
		t.Fatal(err)
	}
	in.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 64)
	for i := range 3 * udpBuffer / smallCost {
		if _, err := out.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, _, err := in.ReadFromUDPAddrPort(buf); err != nil {
			t.Fatalf("datagram %d: %v", i, err)
		}
	}
	ca, cb := connect(t, a, b, b4)
	if _, err := ca.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := cb.Read(buf); err != nil {
		t.Fatal(err)
	}
	if n := cb.in.waiting.Load(); n != 0 {
		t.Errorf("%d segments wait when all is read", n)
	}
}

// TestEmptyDatagramsAreBounded sends datagrams that say nothing to who does not
// read: they fill no buffer, and still take memory.
func TestEmptyDatagramsAreBounded(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	any, err := b.ListenUDP("udp", netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	defer any.Close()
	one, err := b.ListenUDP("udp", netip.AddrPortFrom(b6, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	for name, to := range map[string]struct {
		addr   netip.Addr
		socket *PacketConn
	}{
		"any address, IPv4": {b4, any}, "any address, IPv6": {b6, any}, "one address": {b6, one},
	} {
		port := to.socket.local.Port()
		from, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(to.addr, port))
		if err != nil {
			t.Fatal(err)
		}
		before := heap()
		for range 100_000 {
			if _, err := from.Write(nil); err != nil {
				t.Fatal(err)
			}
		}
		if grew := heap() - before; grew > 8<<20 {
			t.Errorf("%s: empty datagrams take %d bytes of memory", name, grew)
		}
		// What waits is read, and then others come again.
		waited := 0
		for {
			to.socket.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, _, err := to.socket.ReadFromUDPAddrPort(make([]byte, 1)); err != nil {
				break
			}
			waited++
		}
		if waited < 100 || waited > 2000 {
			t.Errorf("%s: %d datagrams waited", name, waited)
		}
		if _, err := from.Write(nil); err != nil {
			t.Fatal(err)
		}
		to.socket.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, _, err := to.socket.ReadFromUDPAddrPort(make([]byte, 1)); err != nil {
			t.Errorf("%s: after the flood: %v", name, err)
		}
		from.Close()
	}
	any.Close()
	one.Close()
	b.link.tallies.mu.Lock()
	defer b.link.tallies.mu.Unlock()
	if n := len(b.link.tallies.m); n > 0 {
		t.Errorf("%d sockets are remembered that are closed", n)
	}
}

// TestTrickle checks that a stream that waits for one packet gets it although
// too many have come.
func TestTrickle(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	cb.in.waiting.Store(1 << 30)
	go ca.Write([]byte("x"))
	buf := make([]byte, 1)
	cb.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(cb, buf); err != nil || buf[0] != 'x' {
		t.Errorf("%q, %v", buf, err)
	}
}

func FuzzAddresses(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 2})
	six := make([]byte, 52)
	six[0], six[6], six[40] = 0x60, 44, 17
	f.Add(six)
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, ok := admit(p); !ok {
			return
		}
		var c tallies
		c.drop(p)
		if flow, l4, ok := addresses(p); ok && (len(l4) < 4 || !flow.Local.IsValid() || !flow.Remote.IsValid()) {
			t.Errorf("%v, %x", flow, l4)
		}
	})
}
