package vnet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

// streams connects a host behind a router with a public one.
func streams(t testing.TB, n *Net, r *Router) (client, server net.Conn) {
	t.Helper()
	s := n.Host(V4)
	return dial(t, r.Host(), s)
}

func dial(t testing.TB, from, to *Host) (client, server net.Conn) {
	t.Helper()
	ln, err := to.ListenTCP("tcp4", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := from.DialTCP(context.Background(), "tcp", ln.Addr().(*net.TCPAddr).AddrPort().String()[len("0.0.0.0:"):]); err == nil {
		t.Fatal("dialled a port alone")
	}
	c, err := from.DialTCP(context.Background(), "tcp", netip.AddrPortFrom(to.Addr(), 80).String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

// The streams behave as net.Conn demands, in real time and under race.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		n := New(1)
		r := n.NAT(Home())
		r.SetLink(Link{})
		a, b := r.Host(), n.Host(V4)
		a.SetLink(Link{})
		b.SetLink(Link{})
		c1, c2 = dial(t, a, b)
		return c1, c2, n.Close, nil
	})
}

// transfer sends size random bytes and reports how long it took.
func transfer(t *testing.T, from, to net.Conn, size int) time.Duration {
	t.Helper()
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	began := time.Now()
	go func() {
		if _, err := from.Write(data); err != nil {
			t.Error(err)
		}
		from.(interface{ CloseWrite() error }).CloseWrite()
	}()
	h := sha256.New()
	if n, err := io.Copy(h, to); err != nil || n != int64(size) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
		t.Error("other bytes")
	}
	return time.Since(began)
}

func TestTransfer(t *testing.T) {
	for _, c := range []struct {
		name string
		link Link
		most time.Duration
	}{
		{"clean", Link{Latency: 10 * time.Millisecond}, time.Second},
		{"5 % loss", Link{Latency: 10 * time.Millisecond, Loss: 0.05}, 60 * time.Second},
		{"20 % loss", Link{Latency: 10 * time.Millisecond, Loss: 0.2}, 20 * time.Minute},
		{"reordering", Link{Latency: 10 * time.Millisecond, Reorder: 0.1}, 60 * time.Second},
		{"duplication", Link{Latency: 10 * time.Millisecond, Duplicate: 0.3}, 10 * time.Second},
		{"narrow", Link{Latency: 10 * time.Millisecond, Bandwidth: 100_000}, 30 * time.Second},
		{"MTU 1280", Link{MTU: 1280, NoFragments: true}, time.Second},
		{"everything", Link{Latency: 30 * time.Millisecond, Jitter: 30 * time.Millisecond, Loss: 0.05, Burst: 3, Reorder: 0.05, Duplicate: 0.05}, 5 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Net) {
				r := n.NAT(Home())
				r.SetLink(c.link)
				a, b := streams(t, n, r)
				d := transfer(t, a, b, 1<<20)
				t.Log("up", d)
				if d > c.most {
					t.Error("too long")
				}
				d = transfer(t, b, a, 1<<20)
				t.Log("down", d)
				if d > c.most {
					t.Error("too long")
				}
				a.Close()
				b.Close()
				time.Sleep(2 * orphanLife)
				synctest.Wait()
				if st := n.Stats(); st.Sockets != 0 || st.Pending != 0 {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

func TestDialFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *Net) {
		h, s := n.NAT(Corporate()).Host(), n.Host(V4)
		try := func(addr string, limit time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			began := time.Now()
			c, err := h.DialTCP(ctx, "tcp", addr)
			if err == nil {
				c.Close()
			}
			return time.Since(began), err
		}
		at := func(port uint16) string { return netip.AddrPortFrom(s.Addr(), port).String() }
		if d, err := try(at(443), time.Minute); !errors.Is(err, syscall.ECONNREFUSED) || d != 20400*time.Microsecond {
			t.Error(err, d)
		}
		if d, err := try(at(22), time.Hour); !errors.Is(err, syscall.ETIMEDOUT) || d != 127*time.Second {
			t.Error(err, d)
		}
		if d, err := try(at(22), time.Second); !errors.Is(err, context.DeadlineExceeded) || d != time.Second {
			t.Error(err, d)
		}
		if _, err := try("[2001:db8::1]:443", time.Second); !errors.Is(err, syscall.ENETUNREACH) {
			t.Error(err)
		}
		h.SetUp(false)
		if _, err := try(at(443), time.Second); !errors.Is(err, syscall.ENETUNREACH) {
			t.Error(err)
		}
	})
}

// A connection survives a cut and goes on when a retransmission meets the
// healed network; it does not survive a change of its address.
func TestFaults(t *testing.T) {
	read := func(c net.Conn) (string, error) {
		b := make([]byte, 100)
		k, err := c.Read(b)
		return string(b[:k]), err
	}
	bubble(t, func(t *testing.T, n *Net) {
		r := n.NAT(Home())
		a, b := streams(t, n, r)
		a.Write([]byte("one"))
		if text, err := read(b); text != "one" {
			t.Fatal(err)
		}
		r.Cut(true)
		a.Write([]byte("two"))
		time.Sleep(20 * time.Second)
		r.Cut(false)
		healed := time.Now()
		if text, err := read(b); text != "two" {
			t.Fatal(err)
		}
		d := time.Since(healed)
		t.Logf("20 s black hole: data %v after it healed", d)
		if d == 0 || d > 20*time.Second {
			t.Error("no back-off")
		}
		r.Flush() // a port-preserving NAT picks the connection up again
		a.Write([]byte("three"))
		if text, err := read(b); text != "three" {
			t.Fatal(err)
		}
		r.NewWAN()
		a.Write([]byte("four"))
		if _, err := read(a); !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
		if _, err := a.Write([]byte("x")); err == nil {
			t.Error("write on a dead connection")
		}
		b.Close()
	})
	bubble(t, func(t *testing.T, n *Net) { // given up after all retries
		r := n.NAT(Home())
		a, b := streams(t, n, r)
		r.Cut(true)
		began := time.Now()
		a.Write([]byte("x"))
		_, err := read(a)
		if d := time.Since(began); !errors.Is(err, syscall.ETIMEDOUT) || d < 10*time.Minute || d > 20*time.Minute {
			t.Error(err, d)
		}
		b.Close()
	})
	bubble(t, func(t *testing.T, n *Net) { // roaming: silence
		r := n.NAT(Home())
		h, s := r.Host(), n.Host(V4)
		a, b := dial(t, h, s)
		h.Move(n.NAT(Home()))
		a.Write([]byte("x"))
		b.SetReadDeadline(time.Now().Add(time.Minute))
		if text, err := read(b); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
			t.Error(text, err)
		}
	})
	bubble(t, func(t *testing.T, n *Net) { // closing with unread data resets
		a, b := streams(t, n, n.NAT(Symmetric()))
		a.Write([]byte("x"))
		time.Sleep(time.Second)
		b.Close()
		if _, err := read(a); !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	})
	bubble(t, func(t *testing.T, n *Net) { // back-pressure
		a, b := streams(t, n, n.NAT(Home()))
		a.SetWriteDeadline(time.Now().Add(time.Minute))
		k, err := a.Write(make([]byte, 10<<20))
		if !isTimeout(err) || k < recvBuffer || k > 2*(recvBuffer+sendBuffer) {
			t.Error(k, err)
		}
		time.Sleep(10 * time.Minute)
		got, err := io.ReadFull(b, make([]byte, k))
		if got != k || err != nil {
			t.Error(got, err)
		}
	})
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func BenchmarkStream(b *testing.B) {
	n := New(1)
	defer n.Close()
	r := n.NAT(Home())
	r.SetLink(Link{})
	c, s := streams(b, n, r)
	go io.Copy(io.Discard, s)
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		c.Write(buf)
	}
}
