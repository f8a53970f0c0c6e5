package e2e

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

const udpPolicy = `{
	"tagOwners": {"tag:client": [], "tag:server": []},
	"acls": [
		{"action": "accept", "proto": "tcp", "src": ["tag:client"], "dst": ["tag:server:*"]},
		{"action": "accept", "proto": "udp", "src": ["tag:client"], "dst": ["tag:server:53,54"]},
	],
}`

// meshMTU is the largest packet inside the tunnel.
const meshMTU = 1280

func TestUDP(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, udpPolicy)
			client, server := m.Node("client", []string{"tag:client"}, p.opt), m.Node("server", []string{"tag:server"}, p.opt)
			meshtest.Up(t, client, server)
			awaitPath(t, client, server, p.want)
			for _, network := range []string{"udp", "udp4", "udp6"} {
				t.Run(network, func(t *testing.T) { testUDPEcho(t, client, server, network) })
			}
			t.Run("denied", func(t *testing.T) { testUDPDenied(t, client, server) })
			t.Run("refused", func(t *testing.T) { testUDPRefused(t, client) })
			t.Run("outside", func(t *testing.T) { testUDPOutside(t, client, server) })
		})
	}
}

func testUDPEcho(t *testing.T, client, server *mesh.Node, network string) {
	pc, err := server.ListenPacket(network, ":53")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	type from struct {
		addr *mesh.Addr
		err  error
	}
	seen := make(chan from, 1)
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, addr, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			a, ok := addr.(*mesh.Addr)
			if !ok {
				err = errors.New("not a *mesh.Addr: " + addr.String())
			}
			select {
			case seen <- from{a, err}:
			default:
			}
			pc.WriteTo(b[:n], addr)
		}
	}()
	c, err := client.Dial(t.Context(), network, "server:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p, ok := mesh.PeerOf(c); !ok || p.ShortName() != "server" || !slices.Equal(p.Tags, []string{"tag:server"}) {
		t.Errorf("dialled %+v, %v", p, ok)
	}
	header := 28
	if netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Is6() {
		header = 48
	}
	// From nothing to more than a packet holds, which goes in fragments.
	for _, size := range []int{0, 1, 512, meshMTU - header - 1, meshMTU - header, meshMTU - header + 1, 4000, 60000} {
		out := bytes.Repeat([]byte{byte(size)}, size)
		if !echoes(t, c, out) {
			t.Errorf("%d bytes do not come back", size)
		}
	}
	f := <-seen
	if f.err != nil {
		t.Fatal(f.err)
	}
	self := client.Status().Self
	if f.addr.Peer.ID != self.ID || f.addr.Peer.Rule.Name != "acls[1]" || f.addr.String() != c.LocalAddr().String() || f.addr.Network() != "udp" {
		t.Errorf("the server saw %+v", f.addr)
	}
}

// echoes sends until the answer comes, for datagrams may get lost.
func echoes(t *testing.T, c net.Conn, out []byte) bool {
	t.Helper()
	in := make([]byte, 64<<10)
	for range 30 {
		if _, err := c.Write(out); err != nil {
			t.Error(err)
			return false
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, err := c.Read(in)
			if err != nil {
				if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
					t.Error(err)
					return false
				}
				break
			}
			if bytes.Equal(in[:n], out) {
				return true
			}
		}
	}
	return false
}

// untilError writes until a Read or Write says what is wrong.
func untilError(t *testing.T, c net.Conn) error {
	t.Helper()
	deadline := time.Now().Add(meshtest.Patience)
	for time.Now().Before(deadline) {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		_, err := c.Read(make([]byte, 16))
		if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
			return err
		}
	}
	return errors.New("no answer at all")
}

func testUDPDenied(t *testing.T, client, server *mesh.Node) {
	// Whether or not somebody listens (D 54).
	pc, err := server.ListenPacket("udp", ":99")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	for _, port := range []int{99, 100} {
		c, err := client.Dial(t.Context(), "udp", "server:"+strconv.Itoa(port))
		if err != nil {
			t.Fatal(err)
		}
		err = untilError(t, c)
		var denied *mesh.DeniedError
		if !errors.Is(err, mesh.ErrDenied) || !errors.As(err, &denied) || denied.Proto != "udp" || int(denied.Port) != port || denied.Peer.ShortName() != "server" {
			t.Errorf("port %d: %v", port, err)
		}
		c.Close()
	}
}

func testUDPRefused(t *testing.T, client *mesh.Node) {
	c, err := client.Dial(t.Context(), "udp", "server:54")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := untilError(t, c); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("port that nobody listens on: %v", err)
	}
}

// Nothing outside the mesh is ever written to.
func testUDPOutside(t *testing.T, client, server *mesh.Node) {
	host, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	pc, err := client.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	for _, to := range []net.Addr{
		host.LocalAddr(),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:53")),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[2001:db8::1]:53")),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("255.255.255.255:53")),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("224.0.0.251:5353")),
		net.UDPAddrFromAddrPort(netip.MustParseAddrPort("100.100.100.100:53")),
		&mesh.Addr{AddrPort: netip.MustParseAddrPort("192.0.2.1:53")},
		&net.UDPAddr{Port: 53},
	} {
		if n, err := pc.WriteTo([]byte("x"), to); n != 0 || !errors.Is(err, mesh.ErrUnknownHost) {
			t.Errorf("write to %v: %d, %v", to, n, err)
		}
		if _, err := client.Dial(t.Context(), "udp", to.String()); !errors.Is(err, mesh.ErrUnknownHost) && to.String() != ":53" {
			t.Errorf("dial %v: %v", to, err)
		}
	}
	if _, err := pc.WriteTo([]byte("x"), &net.UnixAddr{Name: "x"}); err == nil {
		t.Error("a unix socket was written to")
	}
	// The host's socket has heard nothing but what we send now.
	probe, err := net.Dial("udp", host.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	probe.Write([]byte("probe"))
	b := make([]byte, 16)
	n, _, err := host.ReadFrom(b)
	if err != nil || string(b[:n]) != "probe" {
		t.Errorf("the host's socket got %q, %v", b[:n], err)
	}
}

// know waits until nodes see each other: one that is up is not yet known to
// all.
func know(t testing.TB, nodes ...*mesh.Node) {
	t.Helper()
	for _, n := range nodes {
		for _, o := range nodes {
			meshtest.Until(t, n.Hostname+" to know "+o.Hostname, func() bool {
				return n == o || pathTo(n, o) != "unknown peer"
			})
		}
	}
}
