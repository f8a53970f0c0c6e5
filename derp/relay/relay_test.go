package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
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

func TestExchange(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x, y := b.dial(), b.dial()
	if x.ServerKey() != b.srv.Key() {
		t.Error("relay key")
	}
	x.send(y.pub, "one", "two", disco("three"), "")
	// Path discovery may overtake.
	got := map[any]bool{}
	for range 4 {
		got[y.next()] = true
	}
	for _, s := range []string{"one", "two", disco("three"), ""} {
		if !got[packet{x.pub, s}] {
			t.Errorf("missing %q in %v", s, got)
		}
	}
	y.send(x.pub, "back")
	x.wantPacket(y.pub, "back")
	x.send(x.pub, "to myself")
	x.wantPacket(x.pub, "to myself")
	big := string(bytes.Repeat([]byte{7}, derp.MaxPacket))
	x.send(y.pub, big)
	y.wantPacket(x.pub, big)
	x.NotePreferred(true)
	x.sync()
	if st := b.srv.Stats(); st.Clients != 2 || st.Keys != 2 || st.PacketsIn != 7 || st.PacketsOut != 7 || st.Accepted != 2 || st.Pending != 0 {
		t.Errorf("%+v", st)
	}
	if keys := b.srv.Connected(); len(keys) != 2 {
		t.Errorf("connected %v", keys)
	}
}

func TestOrderAndContent(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, DataPackets: 1 << 20, DataBytes: 64 << 20})
	key := identity.NewNode()
	cfg := b.config(key)
	cfg.QueuePackets, cfg.QueueBytes = 1<<20, 64<<20
	c, err := derp.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	x, y := newNode(t, c, key), b.dial()
	const n = 5000
	for i := range n {
		p := binary.BigEndian.AppendUint32(nil, uint32(i))
		p = append(p, bytes.Repeat([]byte{byte(i)}, i%3000)...)
		if err := x.Send(y.pub, p); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		p, ok := y.next().(packet)
		if !ok || p.from != x.pub || binary.BigEndian.Uint32([]byte(p.text)) != uint32(i) {
			t.Fatalf("packet %d is %.20q", i, p.text)
		}
		if want := bytes.Repeat([]byte{byte(i)}, i%3000); p.text[4:] != string(want) {
			t.Fatalf("packet %d changed", i)
		}
	}
}

func TestAdmission(t *testing.T) {
	member := identity.NewNode()
	var sources []netip.Addr
	var mu sync.Mutex
	b := newBed(t, Config{Admit: func(_ context.Context, key identity.NodePublic, source netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		sources = append(sources, source)
		if key != member.Public() {
			return errors.New("no such node")
		}
		return nil
	}})
	x := b.dialAs(member)
	stranger := identity.NewNode()
	_, err := derp.Dial(t.Context(), b.config(stranger))
	if !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("stranger: %v", err)
	}
	// It is not reachable either.
	x.send(stranger.Public(), disco("hello"))
	x.wantGone(stranger.Public(), derp.PeerNotHere)
	if len(sources) != 2 || sources[0] != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("sources %v", sources)
	}
	if st := b.srv.Stats(); st.Refused != 1 || st.Clients != 1 {
		t.Errorf("%+v", st)
	}
}

func TestNilAdmitRefusesEveryone(t *testing.T) {
	b := newBed(t, Config{})
	if _, err := derp.Dial(t.Context(), b.config(identity.NewNode())); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestSlowAdmitRefuses(t *testing.T) {
	b := newBed(t, Config{AdmitTimeout: 10 * time.Millisecond, Admit: func(ctx context.Context, _ identity.NodePublic, _ netip.Addr) error {
		<-ctx.Done()
		return nil // too late to count
	}})
	if _, err := derp.Dial(t.Context(), b.config(identity.NewNode())); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestForgedKey(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	victim := identity.NewNode().Public()
	raw := b.raw()
	key := raw.serverKey()
	payload := derp.SealClientInfo(identity.NewNode(), key, derp.ClientInfo{})
	k := victim.Bytes()
	copy(payload, k[:])
	raw.write(derp.FrameClientInfo, payload)
	raw.wantClosed()
	if len(b.srv.Connected()) != 0 {
		t.Error("logged in with a forged key")
	}
}

func TestRevoke(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	bad, good, other := b.dial(), b.dial(), b.dial()
	second := b.dialAs(bad.key) // both connections of the key are cut
	second.wantHealth(healthDuplicate)
	bad.wantHealth(healthDuplicate)
	second.send(good.pub, "hi")
	good.wantPacket(bad.pub, "hi")

	b.srv.Revoke(bad.pub, identity.NewNode().Public())
	if n := len(b.srv.Connected()); n != 2 {
		t.Errorf("%d keys connected after Revoke", n)
	}
	bad.wantEnd()
	second.wantEnd()
	good.wantGone(bad.pub, derp.PeerDisconnected)
	good.send(other.pub, "still here")
	other.wantPacket(good.pub, "still here")
	good.send(bad.pub, disco("x"))
	good.wantGone(bad.pub, derp.PeerNotHere)
}

func TestRevokeDuringAdmission(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	b := newBed(t, Config{Admit: func(context.Context, identity.NodePublic, netip.Addr) error {
		close(asked)
		<-answer
		return nil // decided before the revocation
	}})
	key := identity.NewNode()
	result := make(chan error, 1)
	go func() {
		_, err := derp.Dial(t.Context(), b.config(key))
		result <- err
	}()
	<-asked
	b.srv.Revoke(key.Public())
	close(answer)
	if err := <-result; !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
	if len(b.srv.Connected()) != 0 {
		t.Error("slipped through")
	}
}

func TestRecheck(t *testing.T) {
	var mu sync.Mutex
	banned := map[identity.NodePublic]bool{}
	b := newBed(t, Config{Admit: func(_ context.Context, key identity.NodePublic, _ netip.Addr) error {
		mu.Lock()
		defer mu.Unlock()
		if banned[key] {
			return errors.New("banned")
		}
		return nil
	}})
	var nodes []*node
	for range 20 {
		nodes = append(nodes, b.dial())
	}
	if n := b.srv.Recheck(t.Context()); n != 0 {
		t.Errorf("cut %d", n)
	}
	mu.Lock()
	for _, n := range nodes[:7] {
		banned[n.pub] = true
	}
	mu.Unlock()
	if n := b.srv.Recheck(t.Context()); n != 7 {
		t.Errorf("cut %d, want 7", n)
	}
	for _, n := range nodes[:7] {
		n.wantEnd()
	}
	for _, n := range nodes[7:] {
		n.quiet()
	}
}

func TestRecheckDuringAdmission(t *testing.T) {
	asked := make(chan struct{}, 10)
	answers := make(chan error)
	b := newBed(t, Config{Admit: func(context.Context, identity.NodePublic, netip.Addr) error {
		asked <- struct{}{}
		return <-answers
	}})
	result := make(chan error, 1)
	go func() {
		_, err := derp.Dial(t.Context(), b.config(identity.NewNode()))
		result <- err
	}()
	<-asked
	b.srv.Recheck(t.Context()) // the rules have changed while Admit thinks
	answers <- nil
	<-asked // so it is asked again
	answers <- errors.New("no longer")
	if err := <-result; !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("Dial = %v", err)
	}
}

func TestPeerGone(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x, heard, spoke, other := b.dial(), b.dial(), b.dial(), b.dial()
	x.send(heard.pub, "hi")
	heard.wantPacket(x.pub, "hi")
	spoke.send(x.pub, "hello")
	x.wantPacket(spoke.pub, "hello")
	x.Close()
	heard.wantGone(x.pub, derp.PeerDisconnected)
	spoke.quiet() // sent to it but never heard from it
	other.quiet()
	// Once it is gone: data to it vanishes, path discovery is answered.
	heard.send(x.pub, "data", "data")
	heard.quiet()
	heard.send(x.pub, disco("ping"))
	heard.wantGone(x.pub, derp.PeerNotHere)
}

func TestPeerNotHereIsRateLimited(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	start := time.Now()
	for i := range 50 {
		x.send(identity.NewNode().Public(), disco(fmt.Sprint(i)))
		x.sync()
	}
	limit := unknownBurst + int(time.Since(start)/time.Second)*unknownRate + 1
	if n := len(x.in); n < unknownBurst || n > limit {
		t.Errorf("%d answers, want %d to %d", n, unknownBurst, limit)
	}
}

func TestDuplicateKey(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll, MaxPerKey: 3})
	x := b.dial()
	y1 := b.dial()
	x.send(y1.pub, "1")
	y1.wantPacket(x.pub, "1")
	y1.send(x.pub, "hello")
	x.wantPacket(y1.pub, "hello")

	y2 := b.dialAs(y1.key)
	y1.wantHealth(healthDuplicate)
	y2.wantHealth(healthDuplicate)
	x.send(y1.pub, "to the newest")
	y2.wantPacket(x.pub, "to the newest")
	y1.sync() // y1 sent last now
	x.send(y1.pub, "to the last sender")
	y1.wantPacket(x.pub, "to the last sender")
	y2.quiet() // no split delivery; and now y2 sent last

	y2.Close()
	y1.wantHealth("")
	x.send(y1.pub, "to the one left")
	y1.wantPacket(x.pub, "to the one left")
	x.quiet() // no word that y is gone

	y3, y4 := b.dialAs(y1.key), b.dialAs(y1.key)
	y5 := b.dialAs(y1.key)        // one too many: the oldest leaves
	for ended := false; !ended; { // after the word about y3 and y4, unless it was cut before
		_, ended = y1.next().(error)
	}
	for _, n := range []*node{y3, y4, y5} {
		n.Close()
	}
	x.wantGone(y1.pub, derp.PeerDisconnected)
}

func TestDuplicateSwitchesUnderLoad(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	key := identity.NewNode()
	for range 20 {
		y := b.dialAs(key)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				z := b.dialAs(key)
				for range 50 {
					z.Send(x.pub, []byte("z"))
				}
				z.Close()
			})
		}
		wg.Go(func() { b.srv.Recheck(t.Context()) })
		wg.Wait()
		y.Close()
	}
	until(t, "only x is left", func() bool { return len(b.srv.Connected()) == 1 })
}

func TestClose(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	x := b.dial()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { b.srv.Close() })
	}
	wg.Wait()
	x.wantEnd()
	if err := b.srv.Accept(t.Context(), closedPipe(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Accept = %v", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.srv.Serve(ln, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve = %v", err)
	}
}

func closedPipe() net.Conn {
	a, b := net.Pipe()
	b.Close()
	return a
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
	if info, err := derp.OpenServerInfo(key, b.srv.Key(), f.Payload); err != nil || info != (derp.ServerInfo{Version: 2}) {
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
