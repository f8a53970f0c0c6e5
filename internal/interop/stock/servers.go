package stock

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// servers are the stock test control server with the stock relay and a STUN
// responder.
type servers struct {
	relay *derpserver.Server
	web   *httptest.Server // relay
	stun  net.PacketConn

	relayMap *tailcfg.DERPMap
	authKey  string
	login    bool
	logf     func(format string, args ...any)

	url     string
	addr    string
	current atomic.Pointer[control]

	mu       sync.Mutex
	listener *tracker // of the control server; guarded by mu; nil while it is stopped
}

// control is the control server with its memory.
type control struct {
	*testcontrol.Server
	front *front
}

func newServers(args []string) (map[string]handler, func()) {
	s := new(servers)
	fs := flag.NewFlagSet("servers", flag.ExitOnError)
	ip := fs.String("ip", "127.0.0.1", "address to serve at")
	fs.StringVar(&s.authKey, "authkey", "", "enrolment key that nodes must bring")
	fs.BoolVar(&s.login, "login", false, "nodes must log in by URL")
	fs.Parse(args)
	s.logf = log.New(os.Stderr, "", log.Lmicroseconds).Printf

	s.relay = derpserver.New(key.NewNode(), s.logf)
	mux := http.NewServeMux()
	mux.Handle("/derp", derpserver.Handler(s.relay))
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	s.web = httptest.NewUnstartedServer(mux)
	s.web.Listener.Close()
	s.web.Listener = listen(net.JoinHostPort(*ip, "0"))
	// The relay takes the connection over, which HTTP/2 cannot give.
	s.web.Config.TLSNextProto = make(map[string]func(*http.Server, *tls.Conn, http.Handler))
	s.web.StartTLS()

	pc, err := net.ListenPacket("udp", net.JoinHostPort(*ip, "0"))
	if err != nil {
		fatal("STUN: %v", err)
	}
	s.stun = pc
	go answerSTUN(pc)

	s.relayMap = &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{900: {
		RegionID: 900, RegionCode: "test", RegionName: "Test",
		Nodes: []*tailcfg.DERPNode{{
			Name: "900a", RegionID: 900, HostName: *ip, IPv4: *ip, IPv6: "none",
			DERPPort: s.web.Listener.Addr().(*net.TCPAddr).Port,
			STUNPort: pc.LocalAddr().(*net.UDPAddr).Port, STUNTestIP: *ip,
			InsecureForTests: true,
		}},
	}}}
	s.addr = net.JoinHostPort(*ip, "0")
	s.open()
	s.forget()
	return map[string]handler{
		"info":     typed(s.info),
		"nodes":    typed(s.nodes),
		"push":     typed(s.push),
		"complete": typed(s.complete),
		"stop":     typed(s.stop),
		"start":    typed(s.start),
		"cut":      typed(s.cut),
		"fault":    typed(s.fault),
		"junk":     typed(s.junk),
		"raw":      typed(s.raw),
		"requests": typed(s.requests),
		"expire":   typed(s.expire),
		"jail":     typed(s.jail),
		"disguise": typed(s.disguise),
		"ping":     typed(s.ping),
	}, s.close
}

// open makes the control server reachable, again at the port it had.
func (s *servers) open() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		return
	}
	s.listener = &tracker{Listener: listen(s.addr), open: make(map[net.Conn]bool)}
	s.addr = s.listener.Addr().String()
	s.url = "http://" + s.addr
	go http.Serve(s.listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.current.Load().ServeHTTP(w, r)
	}))
}

// forget replaces the control server by one with another key that knows no
// node.
func (s *servers) forget() {
	c := &testcontrol.Server{
		Logf: s.logf, DERPMap: s.relayMap, MagicDNSDomain: "stock.test",
		DNSConfig:      &tailcfg.DNSConfig{Proxied: true, Domains: []string{"stock.test"}},
		RequireAuthKey: s.authKey, RequireAuth: s.login, ExplicitBaseURL: s.url,
	}
	s.current.Store(&control{c, putBefore(c)})
}

// tracker is a listener that can cut what came through it.
type tracker struct {
	net.Listener
	mu   sync.Mutex
	open map[net.Conn]bool // guarded by mu
}

func (t *tracker) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err == nil {
		t.mu.Lock()
		t.open[c] = true
		t.mu.Unlock()
	}
	return c, err
}

func (t *tracker) cut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.open {
		c.Close()
	}
	clear(t.open)
}

func listen(addr string) net.Listener {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		fatal("listen: %v", err)
	}
	return ln
}

func answerSTUN(pc net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		k, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		if tx, err := stun.ParseBindingRequest(buf[:k]); err == nil {
			pc.WriteTo(stun.Response(tx, from.(*net.UDPAddr).AddrPort()), from)
		}
	}
}

func (s *servers) close() {
	s.stop(context.Background(), none{})
	s.relay.Close()
	s.web.CloseClientConnections()
	s.web.Close()
	s.stun.Close()
}

// Info says where the servers are.
type Info struct {
	ControlURL string
	DERPMap    *tailcfg.DERPMap
}

func (s *servers) info(context.Context, none) (any, error) { return Info{s.url, s.relayMap}, nil }

func (s *servers) nodes(context.Context, none) (any, error) { return s.current.Load().AllNodes(), nil }

type pushArgs struct {
	NodeKey string
	Map     json.RawMessage // a MapResponse
}

func parseKey(s string) (k key.NodePublic, err error) { return k, k.UnmarshalText([]byte(s)) }

// push sends a map message to a node by the server's own means: after it the
// server sends that node nothing unasked any more.
func (s *servers) push(_ context.Context, a pushArgs) (any, error) {
	k, err := parseKey(a.NodeKey)
	if err != nil {
		return nil, err
	}
	m := new(tailcfg.MapResponse)
	if err := json.Unmarshal(a.Map, m); err != nil {
		return nil, err
	}
	if !s.current.Load().AddRawMapResponse(k, m) {
		return nil, fmt.Errorf("node %s is not connected", a.NodeKey)
	}
	return nil, nil
}

// raw sends a node the JSON as it is, between what the server sends.
func (s *servers) raw(_ context.Context, a pushArgs) (any, error) {
	m, err := s.current.Load().front.stream(a.NodeKey)
	if err != nil {
		return nil, err
	}
	return nil, m.raw(a.Map)
}

type completeArgs struct{ URL string }

// complete finishes a login.
func (s *servers) complete(_ context.Context, a completeArgs) (any, error) {
	if !s.current.Load().CompleteAuth(a.URL) {
		return nil, fmt.Errorf("no login waits at %s", a.URL)
	}
	return nil, nil
}

// stop makes the control server unreachable; it keeps its memory.
func (s *servers) stop(context.Context, none) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		s.listener.Close()
		s.listener.cut()
		s.listener = nil
	}
	return nil, nil
}

type startArgs struct{ Forget bool }

// start ends a stop, perhaps as a server that knows nobody and has a new key.
func (s *servers) start(_ context.Context, a startArgs) (any, error) {
	if a.Forget {
		s.forget()
	}
	s.open()
	return nil, nil
}

// cut breaks all connections to the control server.
func (s *servers) cut(context.Context, none) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		s.listener.cut()
	}
	return nil, nil
}

func (s *servers) fault(_ context.Context, a fault) (any, error) {
	f := s.current.Load().front
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &a)
	return nil, nil
}

type switchArgs struct{ On bool }

// junk adds unknown members to all map messages from now on.
func (s *servers) junk(_ context.Context, a switchArgs) (any, error) {
	f := s.current.Load().front
	f.mu.Lock()
	defer f.mu.Unlock()
	f.junk = a.On
	return nil, nil
}

// requests tells how many requests came, by method ("POLL" for map polls) and
// path.
func (s *servers) requests(context.Context, none) (any, error) {
	f := s.current.Load().front
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string]int)
	for what, n := range f.seen {
		out[what] = n
	}
	return out, nil
}

// expire says that the keys of all nodes have expired.
func (s *servers) expire(_ context.Context, a switchArgs) (any, error) {
	s.current.Load().SetExpireAllNodes(a.On)
	return nil, nil
}

type pairArgs struct {
	Node, Peer string // keys
	On         bool
	Addr       string
}

func (a pairArgs) keys() (node, peer key.NodePublic, err error) {
	if node, err = parseKey(a.Node); err == nil {
		peer, err = parseKey(a.Peer)
	}
	return node, peer, err
}

// jail says that Peer is jailed at Node.
func (s *servers) jail(_ context.Context, a pairArgs) (any, error) {
	node, peer, err := a.keys()
	if err == nil {
		s.current.Load().SetJailed(node, peer, a.On)
	}
	return nil, err
}

// disguise says that Peer sees Node at another address.
func (s *servers) disguise(_ context.Context, a pairArgs) (any, error) {
	node, peer, err := a.keys()
	if err != nil {
		return nil, err
	}
	ip, err := netip.ParseAddr(a.Addr)
	if err != nil {
		return nil, err
	}
	s.current.Load().SetMasqueradeAddresses([]testcontrol.MasqueradePair{{Node: node, Peer: peer, NodeMasqueradesAs: ip}})
	return nil, nil
}

type controlPingArgs struct {
	NodeKey string
	Request json.RawMessage // a PingRequest
}

// ping asks a node to show that it lives.
func (s *servers) ping(_ context.Context, a controlPingArgs) (any, error) {
	k, err := parseKey(a.NodeKey)
	if err != nil {
		return nil, err
	}
	r := new(tailcfg.PingRequest)
	if err := json.Unmarshal(a.Request, r); err != nil {
		return nil, err
	}
	if !s.current.Load().AddPingRequest(k, r) {
		return nil, fmt.Errorf("node %s is not connected", a.NodeKey)
	}
	return nil, nil
}
