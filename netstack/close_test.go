package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Both sides send as fast as they can while one stack, then the other, closes.
func TestCloseWhileSending(t *testing.T) {
	rounds := 200
	if testing.Short() || raceEnabled {
		rounds = 20
	}
	for i := range rounds {
		a, b, _ := newPair(t, Config{})
		addr := b4
		if i%2 == 1 {
			addr = b6
		}
		l := listen(t, b, "tcp", netip.AddrPort{})
		var wg sync.WaitGroup
		for range 3 {
			ca, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, portOf(l)))
			if err != nil {
				t.Fatal(err)
			}
			cb, err := l.AcceptConn()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []*Conn{ca, cb} {
				started := make(chan struct{})
				wg.Go(func() {
					buf := make([]byte, 100_000)
					for n := 0; ; n++ {
						if _, err := c.Write(buf); err != nil {
							return
						}
						if n == 2 {
							close(started)
						}
					}
				})
				wg.Go(func() { io.Copy(io.Discard, c) })
				<-started
			}
		}
		wg.Go(func() { // dials and accepts go on meanwhile
			for {
				c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, portOf(l)))
				if err != nil {
					return
				}
				c.Close()
			}
		})
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		})
		first, second := a, b
		if i%4 >= 2 {
			first, second = b, a
		}
		first.Close()
		second.Close()
		wg.Wait()
	}
}

func TestCloseErrors(t *testing.T) {
	a, b, w := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	l := listen(t, a, "tcp", netip.AddrPort{})
	p, err := a.ListenUDP("udp", netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, 1))
	if err != nil {
		t.Fatal(err)
	}
	syn := make(chan struct{}, 10)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if toB && flowIn(packets[0]).Remote.Port() == 7 {
			syn <- struct{}{}
			return nil
		}
		return packets
	})
	waiting := map[string]func() error{
		"read":     func() error { _, err := ca.Read(make([]byte, 1)); return err },
		"accept":   func() error { _, err := l.Accept(); return err },
		"ReadFrom": func() error { _, _, err := p.ReadFrom(make([]byte, 1)); return err },
		"UDP read": func() error { _, err := u.Read(make([]byte, 1)); return err },
		"dial": func() error {
			_, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, 7))
			return err
		},
	}
	var wg sync.WaitGroup
	for name, op := range waiting {
		wg.Go(func() {
			if err := op(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s under way: %v", name, err)
			}
		})
	}
	<-syn
	for range 3 {
		wg.Go(func() { a.Close() })
	}
	wg.Wait()
	if _, err := cb.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read on the other side: %v", err)
	}
	after := map[string]func() error{
		"write":    func() error { _, err := ca.Write(make([]byte, 1)); return err },
		"listen":   func() error { _, err := a.Listen("tcp", netip.AddrPort{}); return err },
		"udp":      func() error { _, err := a.ListenUDP("udp", netip.AddrPort{}); return err },
		"dialUDP":  func() error { _, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, 1)); return err },
		"SetAddrs": func() error { return a.SetAddrs(nil) },
	}
	for name, op := range waiting {
		after[name] = op
	}
	for name, op := range after {
		if err := op(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	a.In([][]byte{{0x45}, nil})
	if a.Reject(ca.Flow(), errDenied) || a.Abort(func(Flow) bool { return true }, errDenied) != 0 {
		t.Error("a closed stack has flows")
	}
}

// Out is never called once Close returned, and closing does not take long,
// whatever the connections are doing.
func TestCloseManyStates(t *testing.T) {
	a, b, w := newPair(t, Config{Limits: Limits{AcceptBacklog: 64}})
	var closed sync.Map // of true for the side that closed
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if _, late := closed.Load(toB); late {
			t.Error("packets from a closed stack")
		}
		return packets
	})
	l := listen(t, b, "tcp", netip.AddrPort{})
	total := 2000
	if testing.Short() || raceEnabled {
		total = 400
	}
	for i := range total {
		c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
		if err != nil {
			t.Fatal(err)
		}
		peer, err := l.AcceptConn()
		if err != nil {
			t.Fatal(err)
		}
		switch i % 4 {
		case 0: // TIME_WAIT on the server's side
			peer.Close()
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			c.Close()
		case 1: // TIME_WAIT on the client's side
			c.Close()
			if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			peer.Close()
		case 2: // half closed
			c.CloseWrite()
		case 3: // closed by one side only
			peer.Close()
		}
	}
	for _, s := range []struct {
		stack *Stack
		toB   bool
	}{{b, false}, {a, true}} {
		start := time.Now()
		s.stack.Close()
		closed.Store(s.toB, true)
		t.Logf("closed in %v", time.Since(start))
	}
}

// Server closes first, so that TIME_WAIT is on its side and the client's random
// ports meet it again.
func TestShortConnections(t *testing.T) {
	total := 20000
	if testing.Short() || raceEnabled {
		total = 2000
	}
	a, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	for range 4 {
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Write([]byte("hello"))
				c.Close()
			}
		})
	}
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range total / 4 {
				c, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
				if err != nil {
					t.Errorf("dial: %v", err)
					return
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				got, err := io.ReadAll(c)
				if err != nil || string(got) != "hello" {
					t.Errorf("read %q: %v", got, err)
					return
				}
				c.Close()
			}
		})
	}
	clients.Wait()
}
