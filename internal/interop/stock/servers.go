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
	"os"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// servers are the stock test control server with the stock relay and a STUN
// responder.
type servers struct {
	relay   *derpserver.Server
	web     *httptest.Server // relay
	stun    net.PacketConn
	control *testcontrol.Server
	http    *httptest.Server // control
}

func newServers(args []string) (map[string]handler, func()) {
	s := new(servers)
	fs := flag.NewFlagSet("servers", flag.ExitOnError)
	ip := fs.String("ip", "127.0.0.1", "address to serve at")
	authKey := fs.String("authkey", "", "enrolment key that nodes must bring")
	login := fs.Bool("login", false, "nodes must log in by URL")
	fs.Parse(args)
	logf := log.New(os.Stderr, "", log.Lmicroseconds).Printf

	s.relay = derpserver.New(key.NewNode(), logf)
	mux := http.NewServeMux()
	mux.Handle("/derp", derpserver.Handler(s.relay))
	mux.HandleFunc("/derp/probe", derpserver.ProbeHandler)
	mux.HandleFunc("/derp/latency-check", derpserver.ProbeHandler)
	mux.HandleFunc("/generate_204", derpserver.ServeNoContent)
	s.web = httptest.NewUnstartedServer(mux)
	s.web.Listener.Close()
	s.web.Listener = listen(*ip)
	// The relay takes the connection over, which HTTP/2 cannot give.
	s.web.Config.TLSNextProto = make(map[string]func(*http.Server, *tls.Conn, http.Handler))
	s.web.StartTLS()

	pc, err := net.ListenPacket("udp", net.JoinHostPort(*ip, "0"))
	if err != nil {
		fatal("STUN: %v", err)
	}
	s.stun = pc
	go answerSTUN(pc)

	relayMap := &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{900: {
		RegionID: 900, RegionCode: "test", RegionName: "Test",
		Nodes: []*tailcfg.DERPNode{{
			Name: "900a", RegionID: 900, HostName: *ip, IPv4: *ip, IPv6: "none",
			DERPPort: s.web.Listener.Addr().(*net.TCPAddr).Port,
			STUNPort: pc.LocalAddr().(*net.UDPAddr).Port, STUNTestIP: *ip,
			InsecureForTests: true,
		}},
	}}}
	s.control = &testcontrol.Server{
		Logf: logf, DERPMap: relayMap, MagicDNSDomain: "stock.test",
		DNSConfig:      &tailcfg.DNSConfig{Proxied: true, Domains: []string{"stock.test"}},
		RequireAuthKey: *authKey, RequireAuth: *login,
	}
	s.http = httptest.NewUnstartedServer(s.control)
	s.http.Listener.Close()
	s.http.Listener = listen(*ip)
	s.control.HTTPTestServer = s.http
	s.http.Start()
	return map[string]handler{
		"info":     typed(s.info),
		"nodes":    typed(s.nodes),
		"push":     typed(s.push),
		"complete": typed(s.complete),
	}, s.close
}

func listen(ip string) net.Listener {
	ln, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
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
	s.http.CloseClientConnections()
	s.http.Close()
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

func (s *servers) info(context.Context, none) (any, error) {
	return Info{s.http.URL, s.control.DERPMap}, nil
}

func (s *servers) nodes(context.Context, none) (any, error) { return s.control.AllNodes(), nil }

type pushArgs struct {
	NodeKey string
	Map     json.RawMessage // a MapResponse
}

// push sends a raw map message to a node.
func (s *servers) push(_ context.Context, a pushArgs) (any, error) {
	var k key.NodePublic
	if err := k.UnmarshalText([]byte(a.NodeKey)); err != nil {
		return nil, err
	}
	m := new(tailcfg.MapResponse)
	if err := json.Unmarshal(a.Map, m); err != nil {
		return nil, err
	}
	if !s.control.AddRawMapResponse(k, m) {
		return nil, fmt.Errorf("node %s is not connected", a.NodeKey)
	}
	return nil, nil
}

type completeArgs struct{ URL string }

// complete finishes a login.
func (s *servers) complete(_ context.Context, a completeArgs) (any, error) {
	if !s.control.CompleteAuth(a.URL) {
		return nil, fmt.Errorf("no login waits at %s", a.URL)
	}
	return nil, nil
}
