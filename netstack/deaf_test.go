package netstack

import (
	"io"
	"net/netip"
	"sync"
	"testing"
)

// TestDeafReceivers has 500 connections send to receivers that read for a while,
// so that all would send in bulk, and then no more, and 24 others go on beside
// them: these come to their end, and what waits to be sent stays within the
// limit.
func TestDeafReceivers(t *testing.T) {
	const deaf, warm, streams, size = 500, 96 << 10, 24, 512 << 10
	a, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	to := netip.AddrPortFrom(b4, portOf(l))
	pair := func() (ca, cb *Conn) {
		ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, to)
		if err != nil {
			t.Fatal(err)
		}
		if cb, err = l.AcceptConn(); err != nil {
			t.Fatal(err)
		}
		return ca, cb
	}
	block := make([]byte, 1<<20)
	before := heap()
	var sent sync.WaitGroup
	var conns []*Conn
	for range deaf {
		ca, cb := pair()
		conns = append(conns, ca, cb)
		sent.Go(func() {
			for {
				if _, err := ca.Write(block); err != nil {
					return // when it is closed
				}
			}
		})
		if _, err := io.CopyN(io.Discard, cb, warm); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range streams {
		ca, cb := pair()
		conns = append(conns, ca, cb)
		wg.Go(func() {
			if _, err := ca.Write(make([]byte, size)); err != nil {
				t.Error(i, err)
			}
			ca.CloseWrite()
		})
		wg.Go(func() {
			if n, err := io.Copy(io.Discard, cb); n != size || err != nil {
				t.Errorf("stream %d: %d bytes, %v", i, n, err)
			}
		})
	}
	wg.Wait()
	// Both stacks are here: what one holds to send and the other to be read.
	if held, most := heap()-before, int64(3*defaultReceiveMemory); held > most {
		t.Errorf("%d MB are held, want at most %d", held>>20, most>>20)
	}
	for _, c := range conns {
		c.Close()
	}
	sent.Wait()
	untouched(t, a, Limits{})
	untouched(t, b, Limits{})
}
