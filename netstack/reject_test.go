package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"
)

var errDenied = errors.New("denied by policy")

// flowIn reads the flow of a TCP or UDP packet without options or extension headers.
func flowIn(p []byte) Flow {
	var f Flow
	var src, dst netip.Addr
	var l4 []byte
	if p[0]>>4 == 4 {
		f.Proto, l4 = p[9], p[20:]
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	} else {
		f.Proto, l4 = p[6], p[40:]
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	}
	f.Local = netip.AddrPortFrom(src, binary.BigEndian.Uint16(l4))
	f.Remote = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(l4[2:]))
	return f
}

// The rejection comes from within Out, so before gVisor's Connect returned, and
// also from another goroutine, so at any time.
func TestRejectDial(t *testing.T) {
	a, b, w := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPort{})
	var others sync.WaitGroup
	defer others.Wait()
	for _, tc := range []struct {
		name   string
		reject func(f Flow)
	}{
		{"from Out", func(f Flow) {
			if !a.Reject(f, errDenied) {
				t.Error("no such dial")
			}
		}},
		{"from elsewhere", func(f Flow) { others.Go(func() { a.Reject(f, errDenied) }) }},
	} {
		w.setFilter(func(toB bool, packets [][]byte) [][]byte {
			if toB {
				tc.reject(flowIn(packets[0]))
			}
			return nil
		})
		for range 50 {
			for _, addr := range []netip.Addr{b4, b6} {
				_, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(addr, portOf(l)))
				var op *net.OpError
				if !errors.Is(err, errDenied) || !errors.As(err, &op) || op.Op != "dial" {
					t.Fatalf("%s: %v", tc.name, err)
				}
			}
		}
	}
}

// A rejection names one flow: another dial to the same address goes on.
func TestRejectOneOfMany(t *testing.T) {
	a, _, w := newPair(t, Config{})
	syns := make(chan Flow, 100)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		syns <- flowIn(packets[0])
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	errs := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := a.DialTCP(ctx, netip.Addr{}, netip.AddrPortFrom(b4, 80))
			errs <- err
		}()
	}
	first := <-syns
	other := first
	other.Local = netip.AddrPortFrom(a4, first.Local.Port()+1)
	if a.Reject(other, errDenied) {
		t.Error("rejected a flow that does not exist")
	}
	if a.Reject(Flow{}, errDenied) || a.Reject(Flow{Proto: TCP}, errDenied) || a.Reject(Flow{Proto: 1, Local: first.Local, Remote: first.Remote}, errDenied) {
		t.Error("rejected nonsense")
	}
	if !a.Reject(first, errDenied) {
		t.Error("no such dial")
	}
	if err := <-errs; !errors.Is(err, errDenied) {
		t.Errorf("rejected dial: %v", err)
	}
	if a.Reject(first, errDenied) {
		t.Error("rejected a dial that ended")
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("the other dial: %v", err)
	}
}

func TestRejectLeavesEstablished(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	if a.Reject(ca.Flow(), errDenied) || b.Reject(cb.Flow(), errDenied) {
		t.Error("Reject found an established connection")
	}
	listening := Flow{Proto: TCP, Local: cb.Flow().Local, Remote: netip.AddrPortFrom(a4, 1)}
	if b.Reject(listening, errDenied) {
		t.Error("Reject found a listener")
	}
	if _, err := ca.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(cb, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestRejectUDP(t *testing.T) {
	a, _, w := newPair(t, Config{})
	w.setFilter(func(bool, [][]byte) [][]byte { return nil })
	u, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	read := make(chan error)
	go func() {
		_, err := u.Read(make([]byte, 10))
		read <- err
	}()
	if !a.Reject(u.Flow(), errDenied) {
		t.Error("no such socket")
	}
	if err := <-read; !errors.Is(err, errDenied) {
		t.Errorf("read: %v", err)
	}
	if _, err := u.Write([]byte("x")); err != nil {
		t.Errorf("write after the rejection was told: %v", err)
	}
	a.Reject(u.Flow(), errDenied)
	if _, err := u.Write([]byte("x")); !errors.Is(err, errDenied) {
		t.Errorf("write: %v", err)
	}
	other := u.Flow()
	other.Remote = netip.AddrPortFrom(b4, 54)
	if a.Reject(other, errDenied) {
		t.Error("rejected another flow")
	}
	u.Close()
	if a.Reject(u.Flow(), errDenied) {
		t.Error("rejected a closed socket")
	}
}

func TestAbort(t *testing.T) {
	a, b, w := newPair(t, Config{})
	gone1, peer1 := connect(t, a, b, b4)
	stay, peer2 := connect(t, a, b, b6)
	u, err := b.DialUDP(netip.Addr{}, netip.AddrPortFrom(a4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	l := listen(t, b, "tcp", netip.AddrPort{})
	waiting, err := a.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, portOf(l)))
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	if _, err := gone1.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}

	// A dial under way from b.
	syn := make(chan struct{}, 100)
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if !toB && flowIn(packets[0]).Remote.Port() == 7 {
			syn <- struct{}{}
			return nil
		}
		return packets
	})
	dialled := make(chan error, 1)
	go func() {
		_, err := b.DialTCP(context.Background(), netip.Addr{}, netip.AddrPortFrom(a4, 7))
		dialled <- err
	}()
	<-syn
	pendingRead := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(peer1)
		pendingRead <- err
	}()

	n := b.Abort(func(f Flow) bool { return f.Remote.Addr() == a4 }, errDenied)
	if n != 4 {
		t.Errorf("aborted %d flows, want 4", n)
	}
	if err := <-pendingRead; !errors.Is(err, errDenied) {
		t.Errorf("read under way: %v", err)
	}
	if err := <-dialled; !errors.Is(err, errDenied) {
		t.Errorf("dial under way: %v", err)
	}
	var op *net.OpError
	for range 2 {
		if _, err := peer1.Read(make([]byte, 1)); !errors.Is(err, errDenied) || !errors.As(err, &op) {
			t.Errorf("read: %v", err)
		}
		if _, err := peer1.Write([]byte("x")); !errors.Is(err, errDenied) || !errors.As(err, &op) {
			t.Errorf("write: %v", err)
		}
		if _, err := u.Read(make([]byte, 1)); !errors.Is(err, errDenied) {
			t.Errorf("UDP read: %v", err)
		}
		if _, err := u.Write([]byte("x")); !errors.Is(err, errDenied) {
			t.Errorf("UDP write: %v", err)
		}
	}
	if err := peer1.CloseWrite(); !errors.Is(err, errDenied) {
		t.Errorf("CloseWrite: %v", err)
	}
	if err := peer1.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	for _, c := range []*Conn{gone1, waiting} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read on the other side: %v", err)
		}
	}
	l.SetDeadline(time.Now().Add(20 * time.Millisecond))
	if c, err := l.AcceptConn(); err == nil {
		t.Errorf("accepted %v, which was aborted", c.Flow())
	}
	if _, err := stay.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(peer2, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	if n := b.Abort(func(Flow) bool { return false }, errDenied); n != 0 {
		t.Errorf("aborted %d flows, want none", n)
	}
}

// A connection the application closed may still have data to send to a peer that
// is no longer allowed.
func TestAbortClosedWithData(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, cb := connect(t, a, b, b4)
	cb.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	for {
		if _, err := cb.Write(make([]byte, 1<<20)); err != nil { // until the buffers are full
			break
		}
	}
	cb.Close()
	if n := b.Abort(func(f Flow) bool { return f == cb.Flow() }, errDenied); n != 1 {
		t.Errorf("aborted %d flows, want 1", n)
	}
	if _, err := io.Copy(io.Discard, ca); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read on the other side: %v", err)
	}
}

// AbortFlow ends one flow, at any stage, and no other.
func TestAbortFlow(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	for _, addr := range []netip.Addr{b4, b6} {
		ca, cb := connect(t, a, b, addr)
		other, _ := connect(t, a, b, addr)
		u, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(addr, 9))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		for name, c := range map[string]interface {
			Flow() Flow
			Read([]byte) (int, error)
			Write([]byte) (int, error)
		}{"tcp": ca, "udp": u} {
			reading := make(chan error, 1)
			go func() {
				_, err := c.Read(make([]byte, 1))
				reading <- err
			}()
			if !a.AbortFlow(c.Flow(), errDenied) {
				t.Errorf("%s: no such flow", name)
			}
			if err := <-reading; !errors.Is(err, errDenied) {
				t.Errorf("%s read: %v", name, err)
			}
			if _, err := c.Write([]byte("x")); !errors.Is(err, errDenied) {
				t.Errorf("%s write: %v", name, err)
			}
			if a.AbortFlow(c.Flow(), io.EOF) {
				t.Errorf("%s: ended twice", name)
			}
		}
		if _, err := cb.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other end: %v", err)
		}
		if _, err := other.Write([]byte("x")); err != nil {
			t.Errorf("another connection: %v", err)
		}
		for _, f := range []Flow{{}, {Proto: TCP}, {Proto: 99, Local: ca.Flow().Local, Remote: ca.Flow().Remote}, {Proto: TCP, Local: ca.Flow().Local, Remote: netip.AddrPortFrom(addr, 1)}} {
			if a.AbortFlow(f, errDenied) {
				t.Errorf("%v: something ended", f)
			}
		}
	}
	// A dial under way.
	a2, _, w := newPair(t, Config{})
	w.setFilter(func(toB bool, packets [][]byte) [][]byte {
		if toB && !a2.AbortFlow(flowIn(packets[0]), errDenied) {
			t.Error("no such dial")
		}
		return nil
	})
	if _, err := a2.DialTCP(dialCtx(t), netip.Addr{}, netip.AddrPortFrom(b4, 1)); !errors.Is(err, errDenied) {
		t.Errorf("dial: %v", err)
	}
}

// A listener is no flow, whatever it is asked for.
func TestAbortFlowSparesListeners(t *testing.T) {
	_, b, _ := newPair(t, Config{})
	l := listen(t, b, "tcp", netip.AddrPortFrom(b4, 80))
	if b.AbortFlow(Flow{Proto: TCP, Local: netip.AddrPortFrom(b4, 80), Remote: netip.AddrPortFrom(a4, 1)}, errDenied) {
		t.Error("something ended")
	}
	l.SetDeadline(time.Now())
	if _, err := l.Accept(); errors.Is(err, errDenied) {
		t.Error("the listener ended")
	}
}

// Close keeps the reason of what was aborted before it.
func TestCloseKeepsTheReason(t *testing.T) {
	a, b, _ := newPair(t, Config{})
	ca, _ := connect(t, a, b, b4)
	u, err := a.DialUDP(netip.Addr{}, netip.AddrPortFrom(b4, 9))
	if err != nil {
		t.Fatal(err)
	}
	a.Abort(func(Flow) bool { return true }, errDenied)
	a.Close()
	for _, c := range []net.Conn{ca, u} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, errDenied) {
			t.Errorf("read: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
	}
}
