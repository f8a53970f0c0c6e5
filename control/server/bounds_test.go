package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

// A stranger who asks too often hears 429, on every endpoint outside the Noise
// channel; others, and nodes of the mesh, are served on.
func TestRequestsOfStrangersAreBounded(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex // guards now
	w := newWorld(t, func(c *Config) {
		c.RequestRate, c.RequestBurst = 1, 6
		c.Now = func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return now
		}
	})
	h := w.s.Handler()
	ask := func(method, path, from string) int {
		r := httptest.NewRequest(method, path, nil)
		r.RemoteAddr = from
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code == 429 && rec.Header().Get("Retry-After") == "" {
			t.Error("429 without Retry-After")
		}
		return rec.Code
	}
	endpoints := [][2]string{{"GET", "/key?v=131"}, {"POST", "/ts2021"}, {"GET", "/login/x"}, {"GET", "/health"}, {"GET", "/readyz"}, {"GET", "/nothing"}}
	for _, e := range endpoints {
		if code := ask(e[0], e[1], "[2001:db8::1]:1"); code == 429 {
			t.Fatalf("%s %s: too many at once", e[0], e[1])
		}
	}
	for _, e := range endpoints {
		if code := ask(e[0], e[1], "[2001:db8::2]:1"); code != 429 { // of the same /64
			t.Errorf("%s %s beyond the limit: %d", e[0], e[1], code)
		}
		if code := ask("GET", "/key?v=131", "192.0.2.1:1"); code != 200 {
			t.Errorf("somebody else: %d", code)
		}
	}
	mu.Lock()
	now = now.Add(time.Second)
	mu.Unlock()
	if code := ask("GET", "/key?v=131", "[2001:db8::2]:1"); code != 200 {
		t.Errorf("a second later: %d", code)
	}

	// Inside the channel: who becomes a node is a stranger no more.
	m := w.machine().join(w.key(store.Key{}))
	for range 20 {
		if status, _ := m.lite(nil); status != 200 {
			t.Fatalf("a node's update: %d", status)
		}
	}
	s := w.machine() // from the same address; some of its burst is used up
	codes := map[int]int{}
	for range 20 {
		resp, err := s.post(context.Background(), "/machine/nothing", struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		codes[resp.StatusCode]++
	}
	if codes[429] < 14 || codes[404] == 0 {
		t.Errorf("a stranger's requests: %v", codes)
	}
}

func TestPlaces(t *testing.T) {
	p := NewPlaces(4, 2)
	enter := func(a string) func() {
		leave, ok := p.enter(netip.MustParseAddr(a))
		if !ok {
			return nil
		}
		return leave
	}
	a, b := enter("192.0.2.1"), enter("192.0.2.1")
	if a == nil || b == nil || enter("192.0.2.1") != nil {
		t.Error("not two of one source")
	}
	if enter("2001:db8::1") == nil || enter("2001:db8::2") == nil || enter("2001:db8::3") != nil {
		t.Error("an IPv6 source is not its /64")
	}
	if enter("192.0.2.2") != nil {
		t.Error("five of four")
	}
	a()
	a()
	if p.Taken() != 3 || enter("192.0.2.2") == nil || enter("192.0.2.3") != nil {
		t.Errorf("%d taken after one left", p.Taken())
	}
	b()
	if len(p.sources) != 2 {
		t.Errorf("%d sources remembered of 2", len(p.sources))
	}
}

// Connections of one address that are not upgraded have a bound; closing one
// makes room, and upgraded ones do not count.
func TestConnectionsOfOneSource(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	upgraded := make(chan net.Conn, 1)
	srv := HTTPServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/up" {
			c, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				upgraded <- c
			}
		}
	}))
	places := NewPlaces(100, 3)
	boundConns(srv, places)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(l)
	}()
	defer func() {
		srv.Close()
		<-done
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}
	get := func(c net.Conn, path string) error {
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	conns := []net.Conn{dial(), dial(), dial()}
	for i, c := range conns {
		if err := get(c, "/"); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if err := get(dial(), "/"); err == nil {
		t.Error("a fourth connection is served")
	}
	fmt.Fprintf(conns[0], "GET /up HTTP/1.1\r\nHost: x\r\n\r\n")
	up := <-upgraded
	defer up.Close()
	if err := get(dial(), "/"); err != nil {
		t.Errorf("after one was upgraded: %v", err)
	}
	if n := places.Taken(); n > 4 {
		t.Errorf("%d places taken", n)
	}
}

// Who sends its header a byte at a time, a header without end, or a body that
// nobody asked for, is cut, and costs no memory.
func TestSlowAndHugeRequests(t *testing.T) {
	run := func(name string, f func(t *testing.T, dial func() net.Conn)) {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, func(t *testing.T, w *world) {
				f(t, func() net.Conn {
					c, err := w.dial(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					return c
				})
				time.Sleep(time.Second) // the server lingers before it closes
			})
		})
	}
	run("slow header", func(t *testing.T, dial func() net.Conn) {
		c := dial()
		defer c.Close()
		started := time.Now()
		var err error
		for _, b := range []byte("GET /key?v=131 HTTP/1.1\r\nHost: " + strings.Repeat("x", 1000)) {
			if _, err = c.Write([]byte{b}); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		if d := time.Since(started); err == nil || d > 45*time.Second {
			t.Errorf("%v after %v", err, d)
		}
	})
	run("huge header", func(t *testing.T, dial func() net.Conn) {
		c := dial()
		defer c.Close()
		go func() {
			io.WriteString(c, "GET /key?v=131 HTTP/1.1\r\nHost: x\r\n")
			for {
				if _, err := io.WriteString(c, "X-"+strings.Repeat("y", 1000)+": z\r\n"); err != nil {
					return
				}
			}
		}()
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("status %d", resp.StatusCode)
		}
	})
	run("huge body", func(t *testing.T, dial func() net.Conn) {
		for _, path := range []string{"/key?v=131", "/ts2021", "/login/x", "/health"} {
			c := dial()
			sent := make(chan int64, 1)
			go func() {
				fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", path, 1<<40)
				n, _ := io.Copy(c, io.LimitReader(zeros{}, 1<<30))
				sent <- n
			}()
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err == nil {
				resp.Body.Close()
				if resp.StatusCode < 400 {
					t.Errorf("%s: status %d", path, resp.StatusCode)
				}
			}
			c.Close()
			if n := <-sent; n > 1<<20 {
				t.Errorf("%s: %d bytes of a body were read", path, n)
			}
		}
	})
	run("idle", func(t *testing.T, dial func() net.Conn) {
		c := dial()
		defer c.Close()
		fmt.Fprintf(c, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		started := time.Now()
		if _, err := r.ReadByte(); err == nil || time.Since(started) > 2*time.Minute {
			t.Errorf("%v after %v", err, time.Since(started))
		}
	})
}

// One source does not take all connections that strangers may have.
func TestStrangersOfOneSource(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxUnknown = 4 })
	key := w.key(store.Key{Reusable: true})
	idle := []*machine{w.machine(), w.machine()}
	for _, m := range idle {
		m.refused(m.registerRequest(""), wire.CodeNeedsLogin)
	}
	third := w.machine()
	if _, err := third.register(third.registerRequest(key)); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("third stranger of one source: %v, want 503", err)
	}
	if leave, ok := w.s.transport.unknown.enter(netip.MustParseAddr("192.0.2.1")); !ok {
		t.Error("no place for another source")
	} else {
		leave()
	}
	idle[0].join(key) // no stranger any more
	third.join(key)
}
