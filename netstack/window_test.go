package netstack

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// far makes packets from a to b take a while.
func far(t *testing.T, w *wire, b *Stack, delay time.Duration) {
	type batch struct {
		packets [][]byte
		due     time.Time
	}
	under := make(chan batch, 1<<16)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for next := range under {
			<-time.After(time.Until(next.due))
			b.In(next.packets)
		}
	}()
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if !toB {
			return packets
		}
		next := batch{due: time.Now().Add(delay)}
		for _, p := range packets {
			next.packets = append(next.packets, bytes.Clone(p))
		}
		under <- next
		return nil
	})
	t.Cleanup(func() {
		w.setFilter(func(bool, [][]byte) [][]byte { return nil })
		for _, s := range []*Stack{w.a.Load(), b} {
			s.Close() // so that nothing comes any more
		}
		close(under)
		<-ended
	})
}

// A connection over a long way gets a larger window, from a store that all share
// and to which it returns at the end.
func TestWindowGrowsOverDistance(t *testing.T) {
	a, b, w := newPair(t, Config{})
	far(t, w, b, 40*time.Millisecond)
	ca, cb := connect(t, a, b, b4)
	grown := make(chan struct{})
	sent := make(chan error, 1)
	go func() {
		buf := make([]byte, 1<<20)
		for {
			select {
			case <-grown:
				sent <- ca.CloseWrite()
				return
			default:
			}
			if _, err := ca.Write(buf); err != nil {
				sent <- err
				return
			}
		}
	}()
	buf := make([]byte, 256<<10)
	for closed := false; ; {
		_, err := cb.Read(buf)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !closed && cb.ep.SocketOptions().GetReceiveBufferSize() >= 4<<20 {
			close(grown)
			closed = true
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	left := func() int64 {
		b.budget.mu.Lock()
		defer b.budget.mu.Unlock()
		return b.budget.wider
	}
	if got := left(); got != spareWindow-cb.window.extra || got >= spareWindow {
		t.Errorf("%d of the store are left beside the %d taken", got, cb.window.extra)
	}
	cb.Close()
	if got := left(); got != spareWindow {
		t.Errorf("%d of the store are left at the end", got)
	}
	if err := cb.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the second Close returns %v", err)
	}
	if got := left(); got != spareWindow {
		t.Errorf("%d of the store are left after closing twice", got)
	}
}

func TestWidenUpToWhatIsLeft(t *testing.T) {
	for _, b := range []*budget{{spare: 100, wider: 10}, {spare: 10, wider: 100}} {
		for i, want := range []int64{6, 4, 0} {
			if got := b.widen(6); got != want {
				t.Errorf("%d: took %d, want %d", i, got, want)
			}
		}
	}
}

// What comes with the end of the handshake may fill the window that a connection
// begins with before it has its share of the memory. Its peer hears of the larger
// window then, and need not ask for it.
func TestWindowOpensForEarlyData(t *testing.T) {
	a, b, w := newPair(t, Config{})
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		return slices.DeleteFunc(packets, func(p []byte) bool {
			return toB && len(p) == 20+int(p[32]>>4)*4+1 // asks whether there is room
		})
	})
	l, err := b.Listen("tcp", netip.AddrPortFrom(b4, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 20 {
		c, err := a.DialTCP(t.Context(), netip.Addr{}, netip.AddrPortFrom(b4, l.addr.Port()))
		if err != nil {
			t.Fatal(err)
		}
		const size = 64 << 10
		if _, err := c.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		in.SetDeadline(time.Now().Add(10 * time.Second))
		if n, err := io.ReadFull(in, make([]byte, size)); err != nil {
			t.Fatalf("after %d of %d bytes: %v", n, size, err)
		}
		c.Close()
		in.Close()
	}
}
