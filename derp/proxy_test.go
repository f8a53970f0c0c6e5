package derp

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh/identity"
)

func TestProxyFromEnvironment(t *testing.T) {
	for _, c := range []struct {
		env  string // NAME=value separated by blanks, lists by commas
		addr string
		want string // "" = none, "error"
	}{
		{"", "relay.example:443", ""},
		{"HTTPS_PROXY=http://p:3128", "relay.example:443", "http://p:3128"},
		{"HTTPS_PROXY=p:3128", "relay.example:443", "http://p:3128"},
		{"https_proxy=http://q HTTPS_PROXY=http://p", "relay.example:443", "http://q"},
		{"ALL_PROXY=socks5://p", "relay.example:443", "socks5://p"},
		{"ALL_PROXY=socks5://p https_proxy=http://q", "relay.example:443", "http://q"},
		{"HTTP_PROXY=http://p", "relay.example:443", ""}, // not for TLS
		{"HTTPS_PROXY=ftp://p", "relay.example:443", "error"},
		{"HTTPS_PROXY=http://", "relay.example:443", "error"},
		{"HTTPS_PROXY=http://%zz", "relay.example:443", "error"},
		{"HTTPS_PROXY=http://p", "127.0.0.1:443", ""},
		{"HTTPS_PROXY=http://p", "[::1]:443", ""},
		{"HTTPS_PROXY=http://p", "localhost:443", ""},
		{"HTTPS_PROXY=http://p", "no port", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=*", "relay.example:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=example", "relay.example:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=a,.example", "relay.example.:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=*.EXAMPLE", "relay.example:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=ample", "relay.example:443", "http://p"},
		{"HTTPS_PROXY=http://p NO_PROXY=relay.example:443", "relay.example:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=relay.example:444", "relay.example:443", "http://p"},
		{"HTTPS_PROXY=http://p no_proxy=192.0.2.0/24", "192.0.2.9:443", ""},
		{"HTTPS_PROXY=http://p no_proxy=192.0.2.0/24", "[::ffff:192.0.2.9]:443", ""},
		{"HTTPS_PROXY=http://p no_proxy=192.0.2.0/24", "198.51.100.9:443", "http://p"},
		{"HTTPS_PROXY=http://p no_proxy=192.0.2.9", "192.0.2.9:443", ""},
		{"HTTPS_PROXY=http://p no_proxy=[2001:db8::1]:443", "[2001:db8::1]:443", ""},
		{"HTTPS_PROXY=http://p NO_PROXY=,", "relay.example:443", "http://p"},
	} {
		u, err := proxyFrom(func(name string) string {
			for _, f := range strings.Fields(c.env) {
				if k, v, _ := strings.Cut(f, "="); k == name {
					return v
				}
			}
			return ""
		}, c.addr)
		got := ""
		if u != nil {
			got = u.String()
		}
		if err != nil {
			got = "error"
		}
		if got != c.want {
			t.Errorf("%q %s: %q (%v), want %q", c.env, c.addr, got, err, c.want)
		}
	}
	_, err := proxyFrom(func(string) string { return "gopher://user:sesame@p" }, "relay.example:443")
	if !errors.Is(err, ErrProxy) || strings.Contains(err.Error(), "sesame") {
		t.Error(err)
	}
}

// proxyServer is a proxy of one kind that connects everything to one place.
type proxyServer struct {
	ln    net.Listener
	to    string
	user  string // user:password demanded
	wg    sync.WaitGroup
	mu    sync.Mutex // guards asked
	asked []string
}

func newProxy(t *testing.T, to, user string) *proxyServer {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxyServer{ln: ln, to: to, user: user}
	p.wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(nc) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		p.wg.Wait()
	})
	return p
}

func (p *proxyServer) serve(nc net.Conn) {
	defer nc.Close()
	r := bufio.NewReader(nc)
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	ok := false
	if first[0] == 5 {
		ok = p.socks(r, nc)
	} else {
		ok = p.http(r, nc)
	}
	if !ok {
		return
	}
	out, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(out, r); out.Close() })
	io.Copy(nc, out)
	nc.Close()
	wg.Wait()
}

func (p *proxyServer) note(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, addr)
}

func (p *proxyServer) http(r *bufio.Reader, nc net.Conn) bool {
	req, err := http.ReadRequest(r)
	if err != nil || req.Method != http.MethodConnect {
		return false
	}
	if p.user != "" && req.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(p.user)) {
		io.WriteString(nc, "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
		return false
	}
	p.note(req.Host)
	io.WriteString(nc, "HTTP/1.1 200 Connection established\r\n\r\n")
	return true
}

func (p *proxyServer) socks(r *bufio.Reader, nc net.Conn) bool {
	take := func(n int) []byte {
		b := make([]byte, n)
		io.ReadFull(r, b)
		return b
	}
	methods := take(int(take(2)[1]))
	if p.user == "" {
		nc.Write([]byte{5, 0})
	} else if strings.IndexByte(string(methods), 2) < 0 {
		nc.Write([]byte{5, 0xff})
		return false
	} else {
		nc.Write([]byte{5, 2})
		name := string(take(int(take(2)[1])))
		if name+":"+string(take(int(take(1)[0]))) != p.user {
			nc.Write([]byte{1, 1})
			return false
		}
		nc.Write([]byte{1, 0})
	}
	switch take(4)[3] {
	case 1:
		p.note(net.IP(take(4)).String())
	case 3:
		p.note(string(take(int(take(1)[0]))))
	case 4:
		p.note(net.IP(take(16)).String())
	}
	take(2)
	nc.Write([]byte{5, 0, 0, 3, 1, 'x', 0, 0})
	return true
}

func TestDialByProxy(t *testing.T) {
	// What is reached by the proxy answers, though not as a relay.
	for _, c := range []struct {
		scheme, demand, give string
		addr, asked          string
		err                  string
	}{
		{"http", "", "", "relay.example:443", "relay.example:443", ""},
		{"http", "u:pw", "u:pw", "relay.example:443", "relay.example:443", ""},
		{"http", "u:pw", "u:bad", "relay.example:443", "", "407"},
		{"socks5", "", "", "relay.example:443", "relay.example", ""},
		{"socks5", "", "u:pw", "192.0.2.1:443", "192.0.2.1", ""},
		{"socks5h", "u:pw", "u:pw", "[2001:db8::1]:443", "2001:db8::1", ""},
		{"socks5", "u:pw", "u:bad", "relay.example:443", "", "refuses"},
		{"socks5", "u:pw", "", "relay.example:443", "", "another way to log in"},
	} {
		p := newProxy(t, serveOnce(t, nil, func(nc net.Conn) {
			nc.Read(make([]byte, 4096))
			io.WriteString(nc, "HTTP/1.1 418 Here I am\r\n\r\n")
		}), c.demand)
		u := &url.URL{Scheme: c.scheme, Host: p.ln.Addr().String()}
		if c.give != "" {
			name, pw, _ := strings.Cut(c.give, ":")
			u.User = url.UserPassword(name, pw)
		}
		cfg := ClientConfig{Key: identity.NewNode(), Target: Target{Region: 900, Addr: c.addr, PlainHTTP: true}}
		cfg.Proxy = func(string) (*url.URL, error) { return u, nil }
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := Dial(ctx, cfg)
		cancel()
		if want := cmp.Or(c.err, "418 Here I am"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c, err)
		}
		if errors.Is(err, ErrProxy) != (c.err != "") || strings.Contains(err.Error(), "bad") {
			t.Errorf("%+v: %v", c, err)
		}
		p.mu.Lock()
		if got := strings.Join(p.asked, " "); got != c.asked {
			t.Errorf("%+v: asked for %q", c, got)
		}
		p.mu.Unlock()
	}
	// Nobody listens, and somebody who never answers.
	cfg := ClientConfig{Key: identity.NewNode(), Target: Target{Region: 900, Addr: "relay.example:443"}}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, host := range []string{"127.0.0.1:1", ln.Addr().String()} {
		cfg.Proxy = func(string) (*url.URL, error) { return &url.URL{Scheme: "http", Host: host}, nil }
		cfg.DialTimeout = 100 * time.Millisecond
		if _, err := Dial(context.Background(), cfg); !errors.Is(err, ErrProxy) {
			t.Errorf("%s: %v", host, err)
		}
	}
}

// FuzzProxyAnswers feeds what a hostile proxy may say.
func FuzzProxyAnswers(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.1 407 No\r\nContent-Length: 9\r\n\r\n"), false)
	f.Add([]byte{5, 0, 5, 0, 0, 1, 1, 2, 3, 4, 0, 1}, true)
	f.Add([]byte{5, 2, 1, 0, 5, 9, 0, 3}, true)
	f.Fuzz(func(t *testing.T, b []byte, socks bool) {
		nc := &scripted{r: strings.NewReader(string(b))}
		if socks {
			socksConnect(nc, url.UserPassword("u", "p"), "relay.example:443")
		} else {
			httpConnect(nc, url.UserPassword("u", "p"), "relay.example:443")
		}
	})
}

// scripted is a connection that says what is written in it.
type scripted struct {
	net.Conn
	r io.Reader
}

func (s *scripted) Read(b []byte) (int, error)  { return s.r.Read(b) }
func (s *scripted) Write(b []byte) (int, error) { return len(b), nil }
