package path

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// connectProxy is an HTTP proxy that knows CONNECT only.
func connectProxy(t *testing.T) (addr string, served *atomic.Int64) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served = new(atomic.Int64)
	var wg sync.WaitGroup
	serve := func(nc net.Conn) {
		defer nc.Close()
		r := bufio.NewReader(nc)
		req, err := http.ReadRequest(r)
		if err != nil || req.Method != http.MethodConnect {
			return
		}
		out, err := net.Dial("tcp", req.Host)
		if err != nil {
			return
		}
		defer out.Close()
		served.Add(1)
		io.WriteString(nc, "HTTP/1.1 200 OK\r\n\r\n")
		var both sync.WaitGroup
		both.Go(func() { io.Copy(out, r); out.Close() })
		io.Copy(nc, out)
		nc.Close()
		both.Wait()
	}
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(nc) })
		}
	})
	t.Cleanup(func() { // after the paths, which are closed first
		ln.Close()
		wg.Wait()
	})
	return ln.Addr().String(), served
}

// TestRelayByProxy: without UDP and behind a proxy two nodes reach each other.
func TestRelayByProxy(t *testing.T) {
	m := realNet(t)
	addr, served := connectProxy(t)
	by := func(c *Config) {
		c.RelayOnly = true
		c.Proxy = func(string) (*url.URL, error) { return &url.URL{Scheme: "http", Host: addr}, nil }
	}
	a, b := realNode(t, m, by), realNode(t, m, by)
	pa, pb := a.peer(900), b.peer(900)
	pa.Endpoints, pb.Endpoints = nil, nil
	a.knows(pb)
	b.knows(pa)
	for deadline := time.Now().Add(20 * time.Second); len(b.take()) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("nothing arrived")
		}
		if err := a.Send(b.key(), netip.AddrPort{}, [][]byte{[]byte("x")}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // polls; the cap is above
	}
	if n := served.Load(); n < 2 {
		t.Errorf("%d connections by the proxy", n)
	}
}
