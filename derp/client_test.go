package derp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/identity"
)

// fakeRelay is a relay played by hand over a pipe.
type fakeRelay struct {
	t    *testing.T
	key  identity.NodePrivate
	nc   net.Conn
	conn *Conn
}

func newFakeRelay(t *testing.T) (*fakeRelay, net.Conn) {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return &fakeRelay{t, identity.NewNode(), b, NewConn(b, nil, ConnConfig{})}, a
}

func (r *fakeRelay) write(t FrameType, payload ...[]byte) {
	if err := r.conn.WriteFrame(t, payload...); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		r.t.Errorf("relay write: %v", err)
	}
}

// login plays the relay's part and returns the client's key.
func (r *fakeRelay) login(info ServerInfo) identity.NodePublic {
	r.write(FrameServerKey, ServerKeyPayload(r.key.Public()), []byte("ignored rest"))
	f, err := r.conn.ReadFrame()
	if err != nil || f.Type != FrameClientInfo {
		r.t.Errorf("client info: %v %v", f.Type, err)
		return identity.NodePublic{}
	}
	key, ci, err := OpenClientInfo(r.key, f.Payload)
	if err != nil || ci != (ClientInfo{Version: 2, CanAckPings: true}) {
		r.t.Errorf("client info: %+v %v", ci, err)
	}
	r.write(0x77, []byte("a frame of the future"))
	r.write(FrameServerInfo, SealServerInfo(r.key, key, info))
	return key
}

// connect logs a client in at a fakeRelay.
func connect(t *testing.T, cfg ClientConfig, info ServerInfo) (*Client, *fakeRelay) {
	r, nc := newFakeRelay(t)
	done := make(chan identity.NodePublic, 1)
	go func() { done <- r.login(info) }()
	cfg.Key = identity.NewNode()
	cfg.Target.Region = 900
	c, err := Login(t.Context(), nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if key := <-done; key != cfg.Key.Public() || c.ServerKey() != r.key.Public() {
		t.Fatal("keys differ")
	}
	return c, r
}

func TestClientReceives(t *testing.T) {
	c, r := connect(t, ClientConfig{}, ServerInfo{Version: 2})
	a, b := identity.NewNode().Public(), identity.NewNode().Public()
	ka, kb := a.Bytes(), b.Bytes()
	var stream []byte
	packet := func(k [32]byte, s string) { stream = AppendFrame(stream, FrameRecvPacket, k[:], []byte(s)) }
	packet(ka, "one")
	packet(ka, "two")
	packet(kb, "three")
	stream = AppendFrame(stream, FrameKeepAlive)
	stream = AppendFrame(stream, 0x77, make([]byte, 2*MaxFrame))
	packet(ka, "four")
	stream = AppendFrame(stream, FramePeerGone, ka[:])
	stream = AppendFrame(stream, FramePeerGone, kb[:], []byte{1})
	stream = AppendFrame(stream, FramePeerPresent, kb[:])
	stream = AppendFrame(stream, FrameHealth, []byte("ill\n\x1b[31m\xff"))
	stream = AppendFrame(stream, FrameHealth)
	stream = AppendFrame(stream, FrameRestarting, []byte{0, 0, 0, 10, 0, 0, 1, 0})
	packet(kb, "")
	go r.nc.Write(stream)

	var got []string
	for range 9 {
		m, err := c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		who := map[identity.NodePublic]string{a: "a", b: "b", {}: "-"}[m.Peer]
		got = append(got, fmt.Sprintf("%d %s %q %v %q %v %v", m.Kind, who, m.Packets, m.Reason, m.Text, m.ReconnectIn, m.TryFor))
	}
	want := []string{
		`1 a ["one" "two"] disconnected "" 0s 0s`,
		`1 b ["three"] disconnected "" 0s 0s`,
		`1 a ["four"] disconnected "" 0s 0s`,
		`2 a [] disconnected "" 0s 0s`,
		`2 b [] not here "" 0s 0s`,
		`3 - [] disconnected "ill  [31m�" 0s 0s`,
		`3 - [] disconnected "" 0s 0s`,
		`4 - [] disconnected "" 10ms 256ms`,
		`1 b [""] disconnected "" 0s 0s`,
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("message %d = %s, want %s", i, got[i], want[i])
		}
	}
}

func TestClientSends(t *testing.T) {
	c, r := connect(t, ClientConfig{}, ServerInfo{})
	dst := identity.NewNode().Public()
	if err := c.Send(dst, []byte("one"), []byte("two")); err != nil {
		t.Fatal(err)
	}
	c.NotePreferred(true)
	c.NotePreferred(true) // says nothing new
	c.NotePreferred(false)
	seen := map[string]bool{}
	for range 4 {
		f, err := r.conn.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f.Type {
		case FrameSendPacket:
			key, body, _ := SplitKey(f.Payload)
			if key != dst {
				t.Errorf("to %v", key)
			}
			seen[string(body)] = true
		case FrameNotePreferred:
			seen[fmt.Sprint(f.Payload)] = true
		default:
			t.Errorf("frame %#x", byte(f.Type))
		}
	}
	if len(seen) != 4 {
		t.Errorf("saw %v", seen)
	}
	if err := c.Send(dst, make([]byte, MaxPacket+1)); !errors.Is(err, ErrPacketTooLarge) {
		t.Errorf("Send = %v", err)
	}
	if c.Dropped() != 0 {
		t.Errorf("dropped %d", c.Dropped())
	}
}

// Flush returns when what was sent is with the relay, or the caller does not want to
// wait any longer.
func TestClientFlushes(t *testing.T) {
	c, r := connect(t, ClientConfig{}, ServerInfo{})
	c.Flush(t.Context()) // nothing
	if err := c.Send(identity.NewNode().Public(), []byte("one")); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	c.Flush(over)
	flushed := make(chan struct{})
	go func() { defer close(flushed); c.Flush(t.Context()) }()
	select {
	case <-flushed:
		t.Error("flushed before anybody read it")
	default:
	}
	if f, err := r.conn.ReadFrame(); err != nil || f.Type != FrameSendPacket {
		t.Fatal(f.Type, err)
	}
	<-flushed
	c.Send(identity.NewNode().Public(), []byte("two"))
	c.Close()
	c.Flush(t.Context())
}

func TestClientPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r := connect(t, ClientConfig{}, ServerInfo{})
		go func() {
			for {
				if _, err := c.Recv(); err != nil {
					return
				}
			}
		}()
		// Theirs.
		r.write(FramePing, []byte("12345678 and more"))
		f, err := r.conn.ReadFrame()
		if err != nil || f.Type != FramePong || string(f.Payload) != "12345678" {
			t.Fatal(f, err)
		}
		// Ours.
		go func() {
			f, _ := r.conn.ReadFrame()
			ping := bytes.Clone(f.Payload)
			r.write(FramePong, []byte("not this"))
			time.Sleep(30 * time.Millisecond)
			r.write(FramePong, ping)
			r.conn.ReadFrame()
		}()
		if d, err := c.Ping(t.Context()); err != nil || d != 30*time.Millisecond {
			t.Errorf("Ping = %v, %v", d, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("unanswered Ping = %v", err)
		}
		c.Close()
		if _, err := c.Ping(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Ping after Close = %v", err)
		}
	})
}

func TestClientWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r := connect(t, ClientConfig{}, ServerInfo{})
		go func() {
			time.Sleep(100 * time.Second)
			r.write(FrameKeepAlive)
		}()
		start := time.Now()
		_, err := c.Recv()
		if !errors.Is(err, ErrTimeout) || !strings.HasPrefix(err.Error(), "relay 900: ") {
			t.Errorf("Recv = %v", err)
		}
		if d := time.Since(start); d != 220*time.Second {
			t.Errorf("dead after %v", d)
		}
		if _, again := c.Recv(); again != err || c.Err() != err {
			t.Errorf("then %v and %v", again, c.Err())
		}
		if err := c.Send(identity.NodePublic{}); !errors.Is(err, ErrTimeout) {
			t.Errorf("Send = %v", err)
		}
	})
}

func TestClientObeysRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		frame := FrameHeaderLen + identity.KeyLen + 1000
		c, r := connect(t, ClientConfig{QueuePackets: 1000}, ServerInfo{TokenBucketBytesPerSecond: 10 * frame, TokenBucketBytesBurst: 100 * frame})
		received := make(chan int, 1)
		go func() {
			n := 0
			for {
				if _, err := r.conn.ReadFrame(); err != nil {
					received <- n
					return
				}
				n++
			}
		}()
		for range 200 {
			c.Send(identity.NodePublic{}, make([]byte, 1000))
		}
		synctest.Wait()
		time.Sleep(time.Second)
		for range 200 {
			c.Send(identity.NodePublic{}, make([]byte, 1000))
		}
		synctest.Wait()
		c.Close()
		if n := <-received; n != 110 || c.Dropped() != 290 {
			t.Errorf("%d sent, %d dropped", n, c.Dropped())
		}
	})
}

func TestClientDropsWhenRelayIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := connect(t, ClientConfig{QueuePackets: 10, WriteTimeout: 5 * time.Second}, ServerInfo{})
		start := time.Now()
		for range 1000 {
			if err := c.Send(identity.NodePublic{}, make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
		if c.Dropped() < 900 || time.Since(start) != 0 {
			t.Errorf("dropped %d in %v", c.Dropped(), time.Since(start))
		}
		<-c.Done()
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("dead after %v", d)
		}
		if _, err := c.Recv(); err == nil || !strings.Contains(err.Error(), "write") {
			t.Errorf("Recv = %v", err)
		}
	})
}

func TestClientProtocolErrors(t *testing.T) {
	tests := map[string][]byte{
		"short packet":    AppendFrame(nil, FrameRecvPacket, make([]byte, 31)),
		"short peer gone": AppendFrame(nil, FramePeerGone, make([]byte, 31)),
		"short ping":      AppendFrame(nil, FramePing, make([]byte, 7)),
		"long ping":       AppendFrame(nil, FramePing, make([]byte, MaxPing+1)),
		"short pong":      AppendFrame(nil, FramePong, make([]byte, 7)),
		"short restart":   AppendFrame(nil, FrameRestarting, make([]byte, 7)),
		"huge packet":     header(FrameRecvPacket, MaxFrame+1),
		"huge unknown":    header(0x99, 1<<20+1),
	}
	for name, stream := range tests {
		t.Run(name, func(t *testing.T) {
			c, r := connect(t, ClientConfig{}, ServerInfo{})
			go r.nc.Write(stream)
			if m, err := c.Recv(); !errors.Is(err, ErrProtocol) {
				t.Errorf("Recv = %+v, %v", m, err)
			}
		})
	}
}

func TestLoginFailures(t *testing.T) {
	key := identity.NewNode()
	serverKey := func(r *fakeRelay) { r.write(FrameServerKey, ServerKeyPayload(r.key.Public())) }
	tests := []struct {
		name string
		play func(r *fakeRelay)
		want error
		text string
	}{
		{"closed at once", func(r *fakeRelay) { r.nc.Close() }, io.EOF, "relay 900: login: EOF"},
		{"closed after client info", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
			r.nc.Close()
		}, ErrNotAdmitted, "relay 900: login: relay did not admit this node key (EOF)"},
		{"wrong magic", func(r *fakeRelay) {
			r.write(FrameServerKey, []byte("DERPDERP"), make([]byte, 32))
		}, ErrProtocol, "malformed relay key"},
		{"short key", func(r *fakeRelay) { r.write(FrameServerKey, []byte(Magic), make([]byte, 31)) }, ErrProtocol, "malformed"},
		{"zero key", func(r *fakeRelay) { r.write(FrameServerKey, []byte(Magic), make([]byte, 32)) }, ErrProtocol, "zero"},
		{"other frame first", func(r *fakeRelay) { r.write(FrameRecvPacket, make([]byte, 40)) }, ErrProtocol, "0x5"},
		{"huge frame first", func(r *fakeRelay) { r.nc.Write(header(FrameServerKey, 1<<31)) }, ErrFrameTooLarge, ""},
		{"box of another relay", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
			r.write(FrameServerInfo, SealServerInfo(identity.NewNode(), key.Public(), ServerInfo{}))
		}, ErrProtocol, "relay info"},
		{"box for another node", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
			r.write(FrameServerInfo, SealServerInfo(r.key, identity.NewNode().Public(), ServerInfo{}))
		}, ErrProtocol, "relay info"},
		{"empty box", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
			r.write(FrameServerInfo)
		}, ErrProtocol, "relay info"},
		{"box of no JSON", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
			r.write(FrameServerInfo, r.key.Shared(key.Public()).Seal(nil, []byte("{")))
		}, ErrProtocol, "JSON"},
		{"silent", func(r *fakeRelay) {}, context.DeadlineExceeded, ""},
		{"silent after client info", func(r *fakeRelay) {
			serverKey(r)
			r.conn.ReadFrame()
		}, context.DeadlineExceeded, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, nc := newFakeRelay(t)
				go tt.play(r)
				start := time.Now()
				_, err := Login(t.Context(), nc, ClientConfig{Key: key, Target: Target{Region: 900}})
				var de *DialError
				if !errors.Is(err, tt.want) || !errors.As(err, &de) || de.Stage != StageLogin || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("Login = %v, want %v", err, tt.want)
				}
				if d := time.Since(start); d > DefaultDialTimeout {
					t.Errorf("took %v", d)
				}
			})
		})
	}
}

func TestCloseAnytime(t *testing.T) {
	c, r := connect(t, ClientConfig{}, ServerInfo{})
	go io.Copy(io.Discard, r.nc)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Recv()
		failed <- err
	}()
	for range 4 {
		go c.Close()
	}
	c.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Recv = %v", err)
	}
	c.Send(identity.NodePublic{}, []byte("x"))
	c.NotePreferred(true)
	if err := c.Err(); err.Error() != "relay 900: use of closed network connection" {
		t.Errorf("Err = %v", err)
	}
}

func TestClientInfoForms(t *testing.T) {
	relay, node := identity.NewNode(), identity.NewNode()
	payload := func(pub identity.NodePublic, from identity.NodePrivate, json string) []byte {
		k := pub.Bytes()
		return from.Shared(relay.Public()).Seal(k[:], []byte(json))
	}
	good := payload(node.Public(), node, `{}`)
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	// All of these make X25519 give the same secret whatever the private key.
	low := identity.NodePublicFrom([32]byte{1})
	tests := []struct {
		name string
		in   []byte
		ok   bool
	}{
		{"empty object", good, true},
		{"stock", payload(node.Public(), node, `{"version":2,"CanAckPings":true,"AppName":"x"}`), true},
		{"flipped bit", flipped, false},
		{"key of another", payload(identity.NewNode().Public(), node, `{}`), false},
		{"zero key", append(make([]byte, 32), good[32:]...), false},
		{"low order key", append(append([]byte{1}, make([]byte, 31)...), good[32:]...), false},
		{"not JSON", payload(node.Public(), node, `hello`), false},
		{"wrong types", payload(node.Public(), node, `{"version":"2"}`), false},
		{"nothing", nil, false},
	}
	for _, tt := range tests {
		key, _, err := OpenClientInfo(relay, tt.in)
		if tt.ok && (err != nil || key != node.Public()) || !tt.ok && !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v, %v", tt.name, key, err)
		}
	}
	for n := range good {
		if _, _, err := OpenClientInfo(relay, good[:n]); err == nil {
			t.Errorf("cut to %d bytes accepted", n)
		}
	}
	if !lowOrder(relay, low) || lowOrder(relay, node.Public()) {
		t.Error("lowOrder")
	}
}

func FuzzClientInfo(f *testing.F) {
	relay, node := identity.NewNode(), identity.NewNode()
	f.Add([]byte(`{"version":2,"CanAckPings":true}`), true)
	f.Add(SealClientInfo(node, relay.Public(), ClientInfo{}), false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if !sealed {
			if key, _, err := OpenClientInfo(relay, b); err == nil && key.IsZero() {
				t.Error("zero key")
			}
			OpenServerInfo(node, relay.Public(), b)
			ParseServerKey(b)
			return
		}
		k := node.Public().Bytes()
		box := node.Shared(relay.Public()).Seal(k[:], b)
		if key, _, err := OpenClientInfo(relay, box); err == nil && key != node.Public() {
			t.Error("other key")
		}
		OpenServerInfo(node, relay.Public(), relay.Shared(node.Public()).Seal(nil, b))
	})
}

// FuzzClient feeds a logged-in client: whatever a relay sends, the client ends
// with an error, gives no more bytes than came, and leaves nothing behind.
func FuzzClient(f *testing.F) {
	f.Add(AppendFrame(AppendFrame(nil, FrameRecvPacket, make([]byte, 50)), FramePeerGone, make([]byte, 33)))
	f.Add(AppendFrame(AppendFrame(nil, FramePing, make([]byte, 8)), FrameRestarting, make([]byte, 8)))
	f.Add(AppendFrame(AppendFrame(nil, FrameHealth, []byte("x")), FrameRecvPacket, make([]byte, 31)))
	key, relay := identity.NewNode(), identity.NewNode()
	login := AppendFrame(nil, FrameServerKey, ServerKeyPayload(relay.Public()))
	login = AppendFrame(login, FrameServerInfo, SealServerInfo(relay, key.Public(), ServerInfo{}))
	f.Fuzz(func(t *testing.T, stream []byte) {
		nc := &scriptConn{r: bytes.NewReader(append(login[:len(login):len(login)], stream...))}
		c, err := Login(t.Context(), nc, ClientConfig{Key: key})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		n := 0
		for {
			m, err := c.Recv()
			if err != nil {
				break
			}
			for _, p := range m.Packets {
				n += FrameHeaderLen + identity.KeyLen + len(p)
			}
		}
		if n > len(stream) {
			t.Errorf("%d bytes of packets from %d bytes", n, len(stream))
		}
	})
}

// scriptConn reads from a script and swallows what is written.
type scriptConn struct {
	net.Conn
	r io.Reader
}

func (c *scriptConn) Read(b []byte) (int, error)  { return c.r.Read(b) }
func (c *scriptConn) Write(b []byte) (int, error) { return len(b), nil }
func (c *scriptConn) Close() error                { return nil }

func (c *scriptConn) SetDeadline(time.Time) error      { return nil }
func (c *scriptConn) SetReadDeadline(time.Time) error  { return nil }
func (c *scriptConn) SetWriteDeadline(time.Time) error { return nil }
