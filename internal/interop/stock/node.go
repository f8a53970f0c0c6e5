package stock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
)

// node is one stock node.
type node struct {
	srv *tsnet.Server
	lc  *local.Client // set by up

	mu      sync.Mutex
	streams map[string]net.Conn // guarded by mu; by the name a test gave
	closers []io.Closer         // guarded by mu; listeners
}

func newNode(args []string) (map[string]handler, func()) {
	n := &node{srv: new(tsnet.Server), streams: make(map[string]net.Conn)}
	fs := flag.NewFlagSet("node", flag.ExitOnError)
	fs.StringVar(&n.srv.Hostname, "hostname", "", "name to ask for")
	fs.StringVar(&n.srv.Dir, "dir", "", "state directory")
	fs.StringVar(&n.srv.ControlURL, "control", "", "control server")
	fs.StringVar(&n.srv.AuthKey, "authkey", "", "enrolment key")
	fs.BoolVar(&n.srv.Ephemeral, "ephemeral", false, "forget the node when it leaves")
	tags := fs.String("tags", "", "tags to ask for, with commas")
	port := fs.Uint("port", 0, "UDP port")
	fs.Parse(args)
	n.srv.Port = uint16(*port)
	if *tags != "" {
		n.srv.AdvertiseTags = strings.Split(*tags, ",")
	}
	n.srv.Logf = log.New(os.Stderr, "", log.Lmicroseconds).Printf
	n.srv.UserLogf = n.srv.Logf
	return map[string]handler{
		"start":    typed(n.start),
		"up":       typed(n.up),
		"status":   typed(n.status),
		"whois":    typed(n.whois),
		"ping":     typed(n.ping),
		"logout":   typed(n.logout),
		"login":    typed(n.login),
		"serve":    typed(n.serve),
		"http":     typed(n.http),
		"udp":      typed(n.udp),
		"open":     typed(n.open),
		"exchange": typed(n.exchange),
		"shut":     typed(n.shut),
	}, n.close
}

func (n *node) close() {
	n.mu.Lock()
	for _, c := range n.closers {
		c.Close()
	}
	for _, c := range n.streams {
		c.Close()
	}
	n.mu.Unlock()
	n.srv.Close()
}

type none struct{}

// start starts the node without waiting, and tells states and login URLs as
// events "state" and "login".
func (n *node) start(ctx context.Context, _ none) (any, error) {
	if err := n.srv.Start(); err != nil {
		return nil, err
	}
	lc, err := n.srv.LocalClient()
	if err != nil {
		return nil, err
	}
	n.lc = lc
	w, err := lc.WatchIPNBus(ctx, ipn.NotifyInitialState)
	if err != nil {
		return nil, err
	}
	go func() {
		defer w.Close()
		for {
			m, err := w.Next()
			if err != nil {
				return
			}
			if m.State != nil {
				event("state", m.State.String())
			}
			if m.BrowseToURL != nil && *m.BrowseToURL != "" {
				event("login", *m.BrowseToURL)
			}
		}
	}()
	return nil, nil
}

// up waits until the node runs and returns its status.
func (n *node) up(ctx context.Context, _ none) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	st, err := n.srv.Up(ctx)
	if err != nil {
		return nil, err
	}
	if n.lc == nil {
		if n.lc, err = n.srv.LocalClient(); err != nil {
			return nil, err
		}
	}
	return st, nil
}

func (n *node) status(ctx context.Context, _ none) (any, error) { return n.lc.Status(ctx) }

type whoisArgs struct{ Addr string }

func (n *node) whois(ctx context.Context, a whoisArgs) (any, error) {
	w, err := n.lc.WhoIs(ctx, a.Addr)
	if err != nil {
		return nil, err
	}
	return identityOf(w.Node, w.UserProfile, w.CapMap), nil
}

// Identity is what a stock node says of a peer.
type Identity struct {
	Name  string
	User  string
	Tags  []string
	Caps  map[string][]json.RawMessage
	Addrs []netip.Prefix
}

func identityOf(n *tailcfg.Node, u *tailcfg.UserProfile, caps tailcfg.PeerCapMap) Identity {
	id := Identity{Name: n.Name, Tags: n.Tags, Addrs: n.Addresses, Caps: make(map[string][]json.RawMessage)}
	if u != nil {
		id.User = u.LoginName
	}
	for c, values := range caps {
		id.Caps[string(c)] = []json.RawMessage{}
		for _, v := range values {
			id.Caps[string(c)] = append(id.Caps[string(c)], json.RawMessage(v))
		}
	}
	return id
}

type pingArgs struct {
	Addr string
	Type string // "disco", "TSMP", "ICMP"
}

func (n *node) ping(ctx context.Context, a pingArgs) (any, error) {
	ip, err := netip.ParseAddr(a.Addr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return n.lc.Ping(ctx, ip, tailcfg.PingType(a.Type))
}

func (n *node) logout(ctx context.Context, _ none) (any, error) { return nil, n.lc.Logout(ctx) }

type loginArgs struct{ AuthKey string }

// login logs in again, which makes another node key: with an enrolment key, or
// by a URL that comes as an event.
func (n *node) login(ctx context.Context, a loginArgs) (any, error) {
	if a.AuthKey != "" {
		if err := n.lc.Start(ctx, ipn.Options{AuthKey: a.AuthKey}); err != nil {
			return nil, err
		}
	}
	return nil, n.lc.StartLoginInteractive(ctx)
}

type serveArgs struct {
	Kind string // "http", "echo" (TCP), "udp" (echo)
	Port int
}

// serve starts a service on the node's mesh addresses. The HTTP service
// answers /whois with the Identity of its caller, /bytes?n=N with N bytes of
// Pattern, and POST /sum with the SHA-256 of what it got.
func (n *node) serve(ctx context.Context, a serveArgs) (any, error) {
	if a.Kind == "udp" {
		st, err := n.lc.Status(ctx)
		if err != nil {
			return nil, err
		}
		for _, ip := range st.TailscaleIPs {
			pc, err := n.srv.ListenPacket("udp", net.JoinHostPort(ip.String(), strconv.Itoa(a.Port)))
			if err != nil {
				return nil, err
			}
			n.keep(pc)
			go echoPackets(pc)
		}
		return nil, nil
	}
	ln, err := n.srv.Listen("tcp", ":"+strconv.Itoa(a.Port))
	if err != nil {
		return nil, err
	}
	n.keep(ln)
	if a.Kind == "http" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /whois", func(w http.ResponseWriter, r *http.Request) {
			who, err := n.lc.WhoIs(r.Context(), r.RemoteAddr)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			json.NewEncoder(w).Encode(identityOf(who.Node, who.UserProfile, who.CapMap))
		})
		mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
			size, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
			io.CopyN(w, Pattern(), size)
		})
		mux.HandleFunc("POST /sum", func(w http.ResponseWriter, r *http.Request) {
			h := sha256.New()
			if _, err := io.Copy(h, r.Body); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			fmt.Fprint(w, hex.EncodeToString(h.Sum(nil)))
		})
		go http.Serve(ln, mux)
		return nil, nil
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return nil, nil
}

func echoPackets(pc net.PacketConn) {
	buf := make([]byte, 65536)
	for {
		k, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		pc.WriteTo(buf[:k], from)
	}
}

func (n *node) keep(c io.Closer) {
	n.mu.Lock()
	n.closers = append(n.closers, c)
	n.mu.Unlock()
}

type httpArgs struct {
	URL     string
	Post    int64 // bytes of Pattern to post, 0 = a GET
	Seconds int   // 0 = 30
}

// HTTPResult is what an HTTP request brought.
type HTTPResult struct {
	Status int
	Bytes  int64
	SHA256 string
	Body   string // its first 4 KiB
}

func (n *node) http(ctx context.Context, a httpArgs) (any, error) {
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.Seconds)*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", a.URL, nil)
	if a.Post > 0 {
		req, err = http.NewRequestWithContext(ctx, "POST", a.URL, io.LimitReader(Pattern(), a.Post))
	}
	if err != nil {
		return nil, err
	}
	client := n.srv.HTTPClient()
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	h := sha256.New()
	var head strings.Builder
	k, err := io.Copy(io.MultiWriter(h, &limited{&head, 4096}), resp.Body)
	if err != nil {
		return nil, err
	}
	return HTTPResult{Status: resp.StatusCode, Bytes: k, SHA256: hex.EncodeToString(h.Sum(nil)), Body: head.String()}, nil
}

// limited keeps the first bytes written to it.
type limited struct {
	w    *strings.Builder
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	k := min(len(p), l.left)
	l.w.Write(p[:k])
	l.left -= k
	return len(p), nil
}

type udpArgs struct {
	Addr string
	Text string
}

// udp sends a datagram until an answer comes, and returns it.
func (n *node) udp(ctx context.Context, a udpArgs) (any, error) {
	c, err := n.srv.Dial(ctx, "udp", a.Addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	buf := make([]byte, 65536)
	for range 20 {
		if _, err := c.Write([]byte(a.Text)); err != nil {
			return nil, err
		}
		c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		k, err := c.Read(buf)
		if err == nil {
			return string(buf[:k]), nil
		}
	}
	return nil, errors.New("no answer")
}

type openArgs struct {
	Name, Addr string
	Seconds    int // 0 = 30
}

// open dials an echo service and keeps the connection under a name.
func (n *node) open(ctx context.Context, a openArgs) (any, error) {
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	dial, cancel := context.WithTimeout(ctx, time.Duration(a.Seconds)*time.Second)
	defer cancel()
	c, err := n.srv.Dial(dial, "tcp", a.Addr)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.streams[a.Name] = c
	n.mu.Unlock()
	return nil, nil
}

func (n *node) stream(name string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.streams[name]
	if c == nil {
		return nil, fmt.Errorf("no connection %q", name)
	}
	return c, nil
}

type exchangeArgs struct {
	Name    string
	Bytes   int64 // of Pattern to send and to get back
	Seconds int   // 0 = 30
}

// exchange sends bytes over an open connection to an echo service and returns
// the SHA-256 of what came back.
func (n *node) exchange(ctx context.Context, a exchangeArgs) (any, error) {
	c, err := n.stream(a.Name)
	if err != nil {
		return nil, err
	}
	if a.Seconds == 0 {
		a.Seconds = 30
	}
	c.SetDeadline(time.Now().Add(time.Duration(a.Seconds) * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, Pattern(), a.Bytes)
		sent <- err
	}()
	h := sha256.New()
	if _, err := io.CopyN(h, c, a.Bytes); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	if err := <-sent; err != nil {
		return nil, fmt.Errorf("write: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

type shutArgs struct{ Name string }

func (n *node) shut(_ context.Context, a shutArgs) (any, error) {
	c, err := n.stream(a.Name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	delete(n.streams, a.Name)
	n.mu.Unlock()
	return nil, c.Close()
}
