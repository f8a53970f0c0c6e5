package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"mesh/derp"
	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds what is expected to happen, never what is measured.
const patience = 20 * time.Second

func admitAll(context.Context, identity.NodePublic, netip.Addr) error { return nil }

// bed is a relay on loopback with real TLS.
type bed struct {
	t    testing.TB
	srv  *Server
	addr string
	pin  string
}

func newBed(t testing.TB, cfg Config) *bed {
	t.Helper()
	if cfg.Key.IsZero() {
		cfg.Key = identity.NewNode()
	}
	srv := New(cfg)
	certPEM, keyPEM, pin, err := SelfSigned(nil, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln, TLSConfig(cert, srv)) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		if st := srv.Stats(); st.Clients != 0 || st.Keys != 0 || st.Pending != 0 {
			t.Errorf("after Close: %+v", st)
		}
	})
	return &bed{t, srv, ln.Addr().String(), pin}
}

func (b *bed) config(key identity.NodePrivate) derp.ClientConfig {
	return derp.ClientConfig{Key: key, Target: derp.Target{
		Region: 900, Name: "900a", HostName: "127.0.0.1", CertName: b.pin, Addr: b.addr,
	}}
}

// node is a logged-in client whose messages are collected.
type node struct {
	*derp.Client
	t   testing.TB
	key identity.NodePrivate
	pub identity.NodePublic
	in  chan any // string of a packet, derp.Message of another kind, error at the end
}

func (b *bed) dial() *node { return b.dialAs(identity.NewNode()) }

func (b *bed) dialAs(key identity.NodePrivate) *node {
	b.t.Helper()
	c, err := derp.Dial(b.t.Context(), b.config(key))
	if err != nil {
		b.t.Fatal(err)
	}
	return newNode(b.t, c, key)
}

// packet is a received packet with its sender.
type packet struct {
	from identity.NodePublic
	text string
}

func newNode(t testing.TB, c *derp.Client, key identity.NodePrivate) *node {
	n := &node{c, t, key, key.Public(), make(chan any, 1000)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			m, err := c.Recv()
			if err != nil {
				n.in <- err
				return
			}
			if m.Kind != derp.KindPackets {
				n.in <- m
				continue
			}
			for _, p := range m.Packets {
				n.in <- packet{m.Peer, string(p)}
			}
		}
	})
	t.Cleanup(func() {
		c.Close()
		go func() {
			for range n.in {
			}
		}()
		wg.Wait()
		close(n.in)
	})
	return n
}

func (n *node) next() any {
	n.t.Helper()
	select {
	case v := <-n.in:
		return v
	case <-time.After(patience):
		n.t.Fatal("nothing came")
		return nil
	}
}

func (n *node) wantPacket(from identity.NodePublic, text string) {
	n.t.Helper()
	if v := n.next(); v != (packet{from, text}) {
		n.t.Fatalf("got %+v, want %q from %v", v, text, from.Short())
	}
}

func (n *node) wantGone(peer identity.NodePublic, why derp.PeerGoneReason) {
	n.t.Helper()
	m, ok := n.next().(derp.Message)
	if !ok || m.Kind != derp.KindPeerGone || m.Peer != peer || m.Reason != why {
		n.t.Fatalf("got %+v, want that %v is gone: %v", m, peer.Short(), why)
	}
}

func (n *node) wantHealth(text string) {
	n.t.Helper()
	m, ok := n.next().(derp.Message)
	if !ok || m.Kind != derp.KindHealth || m.Text != text {
		n.t.Fatalf("got %+v, want health %q", m, text)
	}
}

func (n *node) wantEnd() error {
	n.t.Helper()
	v := n.next()
	err, ok := v.(error)
	if !ok {
		n.t.Fatalf("got %+v, want the end of the connection", v)
	}
	return err
}

// sync waits until the relay has handled everything this node sent.
func (n *node) sync() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	// The first ping may overtake packets that were queued before it; the
	// second is sent behind them. The same holds for the answers.
	for range 2 {
		if _, err := n.Ping(ctx); err != nil {
			n.t.Fatal(err)
		}
	}
}

// quiet fails if something arrived; call it after a sync.
func (n *node) quiet() {
	n.t.Helper()
	n.sync()
	select {
	case v := <-n.in:
		n.t.Errorf("unexpected %+v", v)
	default:
	}
}

func (n *node) send(dst identity.NodePublic, texts ...string) {
	n.t.Helper()
	for _, s := range texts {
		if err := n.Send(dst, []byte(s)); err != nil {
			n.t.Fatal(err)
		}
	}
}

func disco(text string) string { return "TS💬" + fmt.Sprintf("%-60s", text) }

func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond) // polling, bounded by patience
	}
}

func observedLogger() (*zap.Logger, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.WarnLevel)
	return zap.New(core), logs
}

// raw is a client played by hand, inside real TLS.
type raw struct {
	t    testing.TB
	nc   net.Conn
	conn *derp.Conn
}

// raw connects with a fast start: no HTTP response.
func (b *bed) raw() *raw {
	b.t.Helper()
	nc, err := tls.Dial("tcp", b.addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	io.WriteString(nc, "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n")
	return &raw{b.t, nc, derp.NewConn(nc, nil, derp.ConnConfig{})}
}

// rawLogin is raw, logged in.
func (b *bed) rawLogin(key identity.NodePrivate) *raw {
	b.t.Helper()
	r := b.raw()
	r.write(derp.FrameClientInfo, derp.SealClientInfo(key, r.serverKey(), derp.ClientInfo{}))
	f := r.read()
	if f.Type != derp.FrameServerInfo {
		b.t.Fatalf("frame %#x", byte(f.Type))
	}
	want := derp.ServerInfo{Version: 2}
	if n := b.srv.cfg.BytesPerSecond; n > 0 {
		want.TokenBucketBytesPerSecond, want.TokenBucketBytesBurst = n, max(n, derp.FrameHeaderLen+derp.MaxFrame)
	}
	if info, err := derp.OpenServerInfo(key, b.srv.Key(), f.Payload); err != nil || info != want {
		b.t.Fatal(info, err)
	}
	return r
}

func (r *raw) write(t derp.FrameType, payload ...[]byte) {
	r.t.Helper()
	if err := r.conn.WriteFrame(t, payload...); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) read() derp.Frame {
	r.t.Helper()
	f, err := r.conn.ReadFrame()
	if err != nil {
		r.t.Fatal(err)
	}
	return f
}

func (r *raw) serverKey() identity.NodePublic {
	r.t.Helper()
	f := r.read()
	key, err := derp.ParseServerKey(f.Payload)
	if f.Type != derp.FrameServerKey || err != nil {
		r.t.Fatal(f, err)
	}
	return key
}

func (r *raw) wantClosed() {
	r.t.Helper()
	for {
		f, err := r.conn.ReadFrame()
		if err == nil {
			if f.Type != derp.FramePong && f.Type != derp.FrameHealth {
				r.t.Fatalf("frame %#x instead of the end", byte(f.Type))
			}
			continue
		}
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			r.t.Fatal("connection stays open")
		}
		return
	}
}
