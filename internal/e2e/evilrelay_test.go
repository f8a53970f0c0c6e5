package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"

	"mesh"
	"mesh/control"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/control/wire"
	"mesh/derp"
	"mesh/derp/relay"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// F 76: a relay cannot read what it carries, nor change it, nor put it in
// somebody else's mouth; when it says that a peer is gone that only delays.
// Connections through it outlive all that by sending again.
func TestEvilRelay_F76(t *testing.T) {
	m := meshtest.Start(t, openPolicy, func(c *host.Config) { c.NoRelay = true })
	evil := startEvilRelay(t, m)
	alone := func(n *mesh.Node) { n.RelayOnly = true }
	a, b := m.Node("a", []string{"tag:a"}, alone), m.Node("b", []string{"tag:a"}, alone)
	meshtest.Up(t, a, b)
	say := func(from, to net.Conn) {
		t.Helper()
		if _, err := from.Write([]byte(evilSecret)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(evilSecret))
		if _, err := io.ReadFull(to, got); err != nil || string(got) != evilSecret {
			t.Fatalf("%q arrived: %v", got, err)
		}
	}
	for _, does := range []string{"flips", "lies", "misnames", "repeats"} {
		out, in := connect(t, a, b)
		say(out, in)
		evil.start(does)
		if err := exchange(out, in, 1<<18); err != nil {
			t.Errorf("a relay that %s: %v", does, err)
		}
		if n := evil.start(""); n == 0 {
			t.Errorf("it never %s", does)
		} else {
			t.Logf("%s %d times", does, n)
		}
		out.Close()
		in.Close()
		// Nor is anybody lost to it who begins anew.
		out, in = connect(t, b, a)
		say(out, in)
		out.Close()
		in.Close()
	}
	evil.mu.Lock()
	defer evil.mu.Unlock()
	if evil.carried == 0 || evil.read {
		t.Errorf("%d packets were carried, one could be read: %v", evil.carried, evil.read)
	}
}

const evilSecret = "what is said here is not for relays"

// evilRelay is a relay that does not do as it should to some of what it carries.
type evilRelay struct {
	net.Listener

	mu      sync.Mutex // guards what follows
	does    string
	times   int
	carried int
	read    bool
}

// start has it do something else, and returns how often it did what it did before.
func (e *evilRelay) start(does string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := e.times
	e.does, e.times = does, 0
	return n
}

// startEvilRelay announces it to the control server as the only relay.
func startEvilRelay(t *testing.T, m *meshtest.Mesh) *evilRelay {
	loopback := netip.MustParseAddr("127.0.0.1")
	certPEM, keyPEM, pin, err := relay.SelfSigned(nil, []netip.Addr{loopback})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	key := identity.NewNode()
	r := relay.New(relay.Config{Key: key, Admit: func(context.Context, identity.NodePublic, netip.Addr) error { return nil }})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	evil := &evilRelay{Listener: tls.NewListener(ln, relay.TLSConfig(cert, r))}
	srv := &http.Server{Handler: r.Handler()}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(evil) })
	client, err := control.New(control.Config{URL: m.Host.URL(), Machine: identity.NewMachine()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	admitted := make(chan struct{})
	once := sync.OnceFunc(func() { close(admitted) })
	secret := m.Key(admin.KeyCreate{Relay: true})
	port := ln.Addr().(*net.TCPAddr).Port
	wg.Go(func() {
		client.Relay(ctx, wire.RelayRequest{
			RelayKey: secret, NodeKey: key.Public(), Region: &wire.DERPRegion{RegionID: 906, RegionCode: "evil", RegionName: "evil", Nodes: []*wire.DERPNode{
				{Name: "906a", RegionID: 906, HostName: loopback.String(), IPv4: loopback.String(), CertName: pin, DERPPort: port, STUNPort: -1},
			}},
		}, func(*wire.RelayUpdate) error { once(); return nil })
	})
	t.Cleanup(func() {
		cancel()
		client.Close()
		srv.Close()
		r.Close()
		wg.Wait()
	})
	meshtest.Until(t, "the relay to be in the map", func() bool {
		select {
		case <-admitted:
			return true
		default:
			return false
		}
	})
	return evil
}

func (e *evilRelay) Accept() (net.Conn, error) {
	c, err := e.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &evilConn{Conn: c, e: e}, nil
}

// evilConn is what goes from the relay to one client. Only Write changes it.
type evilConn struct {
	net.Conn
	e      *evilRelay
	inside bool   // frames have begun
	rest   []byte // of a frame that is not whole
	count  int    // packets
}

func (c *evilConn) Write(b []byte) (int, error) {
	n := len(b)
	if !c.inside && bytes.HasPrefix(b, []byte("HTTP/")) {
		return c.Conn.Write(b) // in one piece, before the first frame
	}
	c.inside = true
	c.rest = append(c.rest, b...)
	var out []byte
	for len(c.rest) >= derp.FrameHeaderLen {
		size := derp.FrameHeaderLen + int(binary.BigEndian.Uint32(c.rest[1:]))
		if len(c.rest) < size {
			break
		}
		out = c.change(out, c.rest[:size])
		c.rest = c.rest[size:]
	}
	if _, err := c.Conn.Write(out); err != nil {
		return 0, err
	}
	return n, nil
}

// change appends what becomes of a frame.
func (c *evilConn) change(out, frame []byte) []byte {
	const every = 16 // what TCP stands well
	body := frame[derp.FrameHeaderLen:]
	if derp.FrameType(frame[0]) != derp.FrameRecvPacket || len(body) <= identity.KeyLen {
		return append(out, frame...)
	}
	from, packet := body[:identity.KeyLen], body[identity.KeyLen:]
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.carried++
	c.e.read = c.e.read || bytes.Contains(packet, []byte(evilSecret))
	if c.count++; c.e.does == "" || c.count%every != 0 {
		return append(out, frame...)
	}
	c.e.times++
	switch c.e.does {
	case "flips":
		packet[c.count%len(packet)] ^= 1 << (c.count % 8)
	case "lies":
		out = derp.AppendFrame(out, derp.FramePeerGone, from, []byte{1}) // "it is not here"
	case "misnames":
		key := identity.NewNode().Public().Bytes()
		copy(from, key[:])
	case "repeats":
		out = append(out, frame...)
	}
	return append(out, frame...)
}
