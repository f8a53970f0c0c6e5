package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"

	"mesh/internal/bench/load"

	"tailscale.com/client/local"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// tsNode is a node of tsnet.
type tsNode struct {
	*tsnet.Server
	lc   *local.Client
	addr string
	dir  string
}

func newTsnet(ctx context.Context, a load.NodeArgs) (load.Node, error) {
	dir, err := os.MkdirTemp("", "tsnet")
	if err != nil {
		return nil, err
	}
	s := &tsnet.Server{
		Hostname: a.Name, Dir: dir, ControlURL: a.Control, AuthKey: a.AuthKey, Ephemeral: true,
		Logf: logger.Discard, UserLogf: logger.Discard,
	}
	st, err := s.Up(ctx)
	if err != nil {
		return nil, err
	}
	lc, err := s.LocalClient()
	if err != nil {
		return nil, err
	}
	return &tsNode{s, lc, st.TailscaleIPs[0].String(), dir}, nil
}

func (n *tsNode) Addr() string { return n.addr }
func (n *tsNode) Listen(port int) (net.Listener, error) {
	return n.Server.Listen("tcp", fmt.Sprintf(":%d", port))
}
func (n *tsNode) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return n.Server.Dial(ctx, "tcp", addr)
}

func (n *tsNode) Peers() int {
	st, err := n.lc.Status(context.Background())
	if err != nil {
		return 0
	}
	return len(st.Peer)
}

func (n *tsNode) Direct(addr string) bool {
	st, err := n.lc.Status(context.Background())
	if err != nil {
		return false
	}
	want := netip.MustParseAddr(addr)
	for _, p := range st.Peer {
		for _, ip := range p.TailscaleIPs {
			if ip == want {
				return p.CurAddr != ""
			}
		}
	}
	return false
}

func (n *tsNode) Close() error {
	defer os.RemoveAll(n.dir)
	return n.Server.Close()
}

// servers are the stock test control server, relay with TLS, and STUN.
type servers struct {
	control *testcontrol.Server
	web     *httptest.Server
	relay   *derpserver.Server
	tls     *httptest.Server
	stun    net.PacketConn
}

func newServers() (load.Servers, error) {
	s := &servers{relay: derpserver.New(key.NewNode(), logger.Discard)}
	s.tls = httptest.NewUnstartedServer(derpserver.Handler(s.relay))
	// The relay takes the connection over, which HTTP/2 cannot give.
	s.tls.Config.TLSNextProto = make(map[string]func(*http.Server, *tls.Conn, http.Handler))
	s.tls.StartTLS()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.stun = pc
	go func() {
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
	}()
	s.control = &testcontrol.Server{
		Logf: logger.Discard,
		DERPMap: &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{900: {
			RegionID: 900, RegionCode: "test", RegionName: "Test",
			Nodes: []*tailcfg.DERPNode{{
				Name: "900a", RegionID: 900, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none",
				DERPPort: s.tls.Listener.Addr().(*net.TCPAddr).Port,
				STUNPort: pc.LocalAddr().(*net.UDPAddr).Port, STUNTestIP: "127.0.0.1",
				InsecureForTests: true,
			}},
		}}},
	}
	s.web = httptest.NewServer(s.control)
	s.control.ExplicitBaseURL = s.web.URL
	return s, nil
}

func (s *servers) Info() (load.ServersInfo, error) {
	return load.ServersInfo{Control: s.web.URL, AuthKey: "any"}, nil
}

func (s *servers) Fake(n int) error {
	// The server's own makes up identifiers that may be negative; the first only
	// makes the server ready for more.
	s.control.AddFakeNode()
	for i := range n {
		id := 1_000_000 + i
		addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 100 + byte(i>>16), byte(i >> 8), byte(i)}), 32)
		s.control.UpdateNode(&tailcfg.Node{
			ID: tailcfg.NodeID(id), StableID: tailcfg.StableNodeID(fmt.Sprint("FAKE", id)), User: tailcfg.UserID(id),
			Name: fmt.Sprintf("fake%d.test.", i), Machine: key.NewMachine().Public(), Key: key.NewNode().Public(),
			DiscoKey: key.NewDisco().Public(), MachineAuthorized: true, HomeDERP: 900,
			Addresses: []netip.Prefix{addr}, AllowedIPs: []netip.Prefix{addr},
		})
	}
	return nil
}

func (s *servers) Groups(int) ([]string, error) {
	return nil, errors.New("the servers show every node to all")
}

func (s *servers) Close() {
	s.relay.Close()
	s.stun.Close()
}
