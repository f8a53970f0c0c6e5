package noise

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// accept serves upgrades with key and hands the connections over.
func accept(t testing.TB, key identity.MachinePrivate, opts AcceptOptions) (addr string, conns <-chan *Conn, errs <-chan error) {
	cc, ec := make(chan *Conn, 1), make(chan error, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r, key, opts)
		if err != nil {
			ec <- err
			return
		}
		cc <- c
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String(), cc, ec
}

func config(addr string, server identity.MachinePublic) ClientConfig {
	return ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
		Host:      addr,
		Machine:   identity.NewMachine(),
		ServerKey: server,
		Version:   131,
	}
}

func pair(t testing.TB, opts AcceptOptions) (client, server *Conn) {
	key := identity.NewMachine()
	addr, conns, _ := accept(t, key, opts)
	cfg := config(addr, key.Public())
	client, err := Dial(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	server = <-conns
	t.Cleanup(func() { client.Close(); server.Close() })
	if client.Peer() != key.Public() || server.Peer() != cfg.Machine.Public() {
		t.Fatalf("client sees %v, server sees %v", client.Peer(), server.Peer())
	}
	if server.Version() != 131 {
		t.Fatalf("version %d", server.Version())
	}
	return client, server
}

func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		c, s := pair(t, AcceptOptions{})
		// A client takes first bytes that begin like an early payload for the
		// head of one, and waits for the rest; the suite sends a lone 0xff.
		settings := []byte("settings")
		if _, err := s.Write(settings); err != nil {
			return nil, nil, nil, err
		}
		if _, err := io.ReadFull(c, settings); err != nil {
			return nil, nil, nil, err
		}
		return c, s, func() { c.Close(); s.Close() }, nil
	})
}

func TestEarlyPayload(t *testing.T) {
	for _, size := range []int{0, 1, 70, 5000, maxEarly} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			payload := bytes.Repeat([]byte("j"), size)
			c, s := pair(t, AcceptOptions{EarlyPayload: payload})
			go s.Write([]byte("settings"))
			got := make([]byte, 8)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "settings" {
				t.Fatalf("read %q, %v", got, err)
			}
			if !bytes.Equal(c.EarlyPayload(), payload) {
				t.Errorf("early payload of %d bytes, want %d", len(c.EarlyPayload()), size)
			}
		})
	}
}

// The head of the early payload, and what looks like it, may be spread over
// records in any way.
func TestEarlyPayloadInPieces(t *testing.T) {
	for _, test := range []struct{ in, early, rest string }{
		{"\xff\xff\xffTS\x00\x00\x00\x02{}after", "{}", "after"},
		{"\xff\xff\xffTS\x00\x00\x00\x00after", "", "after"},
		{"\xff\xff\xffTX\x00\x00after", "", "\xff\xff\xffTX\x00\x00after"},
		{"\x00\x00\x12\x04after", "", "\x00\x00\x12\x04after"},
	} {
		for step := 1; step <= len(test.in); step++ {
			c, s := pair(t, AcceptOptions{})
			go func() {
				for b := []byte(test.in); len(b) > 0; b = b[min(step, len(b)):] {
					s.Write(b[:min(step, len(b))])
				}
			}()
			got := make([]byte, len(test.rest))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != test.rest || string(c.EarlyPayload()) != test.early {
				t.Errorf("%q in steps of %d: read %q, early %q, error %v", test.in, step, got, c.EarlyPayload(), err)
			}
			c.Close()
			s.Close()
		}
	}
}

func TestEarlyPayloadTooLong(t *testing.T) {
	c, s := pair(t, AcceptOptions{})
	go s.Write(binary.BigEndian.AppendUint32(bytes.Clone(earlyMagic), maxEarly+1))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrRecord) {
		t.Errorf("got %v, want ErrRecord", err)
	}
}

func TestUpgradeRefused(t *testing.T) {
	key := identity.NewMachine()
	addr, _, errs := accept(t, key, AcceptOptions{})
	for _, test := range []struct{ name, method, upgrade, handshake string }{
		{"get", "GET", upgradeToken, "AAAA"},
		{"no upgrade", "POST", "", "AAAA"},
		{"other upgrade", "POST", "websocket", "AAAA"},
		{"no handshake", "POST", upgradeToken, ""},
		{"bad base64", "POST", upgradeToken, "%%%"},
		{"short", "POST", upgradeToken, "AAAA"},
	} {
		t.Run(test.name, func(t *testing.T) {
			req, _ := http.NewRequest(test.method, "http://"+addr+Path, nil)
			req.Header.Set("Connection", "upgrade")
			if test.upgrade != "" {
				req.Header.Set("Upgrade", test.upgrade)
			}
			if test.handshake != "" {
				req.Header.Set(handshakeHeader, test.handshake)
			}
			tr := &http.Transport{DisableKeepAlives: true}
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("status %d, want 400", resp.StatusCode)
			}
			if err := <-errs; err == nil {
				t.Error("Accept gave no error")
			}
		})
	}
}

func TestServerKeyMismatch(t *testing.T) {
	addr, _, errs := accept(t, identity.NewMachine(), AcceptOptions{})
	_, err := Dial(context.Background(), config(addr, identity.NewMachine().Public()))
	if !errors.Is(err, ErrServerKey) {
		t.Errorf("client got %v, want ErrServerKey", err)
	}
	if err := <-errs; !errors.Is(err, ErrServerKey) {
		t.Errorf("server got %v, want ErrServerKey", err)
	}
}

// rawServer answers each upgrade with the given bytes and closes.
func rawServer(t *testing.T, answer string) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				http.ReadRequest(bufioReader(c))
				io.WriteString(c, answer)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

func TestDialErrors(t *testing.T) {
	const ok = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n"
	var refused *UpgradeError
	for _, test := range []struct {
		name, answer string
		check        func(error) bool
	}{
		{"refused", "HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 4\r\n\r\nlate", func(err error) bool {
			return errors.As(err, &refused) && refused.StatusCode == 503 && refused.RetryAfter == "7" && refused.Text == "late"
		}},
		{"closed", ok, func(err error) bool { return errors.Is(err, ErrClosed) }},
		{"cut", ok + "\x02\x00", func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"cut later", ok + "\x02\x00\x30abc", func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"error frame", ok + "\x03\x00\x02no", func(err error) bool {
			return errors.Is(err, ErrServerKey) && strings.Contains(err.Error(), `"no"`)
		}},
		{"forged", ok + "\x02\x00\x30" + strings.Repeat("a", 48), func(err error) bool { return errors.Is(err, ErrServerKey) }},
		{"record", ok + "\x04\x00\x30" + strings.Repeat("a", 48), func(err error) bool { return errors.Is(err, ErrHandshake) }},
		{"other protocol", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", func(err error) bool { return err != nil }},
		{"no HTTP", "SSH-2.0-x\r\n", func(err error) bool { return err != nil }},
		{"endless head", "HTTP/1.1 101 Switching Protocols\r\nX: " + strings.Repeat("x", 2*maxHead), func(err error) bool { return err != nil }},
		{"nothing", "", func(err error) bool { return err != nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := Dial(context.Background(), config(rawServer(t, test.answer), identity.NewMachine().Public()))
			if err == nil {
				c.Close()
			}
			if !test.check(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDialCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	mine := errors.New("user went home")
	a, b := net.Pipe()
	defer b.Close()
	cfg := config("x", identity.NewMachine().Public())
	cfg.Dial = func(context.Context) (net.Conn, error) { return a, nil }
	go func() {
		b.Read(make([]byte, 1)) // the request has begun
		cancel(mine)
	}()
	if _, err := Dial(ctx, cfg); !errors.Is(err, mine) {
		t.Errorf("got %v, want the cause", err)
	}
}

// sealed returns the bytes of records that a server sends to the client of the
// returned Conn, which reads them from stream.
func sealed(t testing.TB, plains ...string) []byte {
	_, s := memory(t, nil)
	var wire bytes.Buffer
	s.conn = writerConn{&wire}
	for _, p := range plains {
		if p == "" { // Write never makes an empty record
			nonce := make([]byte, 12)
			binary.BigEndian.PutUint64(nonce[4:], s.wcount)
			wire.Write([]byte{typeRecord, 0, tagLen})
			wire.Write(s.seal.Seal(nil, nonce, nil, nil))
			s.wcount++
			continue
		}
		if _, err := s.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	return wire.Bytes()
}

type writerConn struct{ io.Writer }

func (writerConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (writerConn) Close() error                     { return nil }
func (writerConn) LocalAddr() net.Addr              { return nil }
func (writerConn) RemoteAddr() net.Addr             { return nil }
func (writerConn) SetDeadline(time.Time) error      { return nil }
func (writerConn) SetReadDeadline(time.Time) error  { return nil }
func (writerConn) SetWriteDeadline(time.Time) error { return nil }

// memory returns both ends after a handshake with fixed keys; the client reads
// stream.
func memory(t testing.TB, stream io.Reader) (client, server *Conn) {
	cs, ss := machineKey(t, fixedKey(0x11)), machineKey(t, fixedKey(0x33))
	hs, init, err := initiateWith(ecdhKey(t, fixedKey(0x22)), cs, ss.Public(), 131)
	if err != nil {
		t.Fatal(err)
	}
	a, err := respondWith(ecdhKey(t, fixedKey(0x44)), ss, init)
	if err != nil {
		t.Fatal(err)
	}
	up, down, err := hs.finish(a.response)
	if err != nil {
		t.Fatal(err)
	}
	if stream == nil {
		stream = strings.NewReader("")
	}
	client = newConn(writerConn{io.Discard}, stream, ss.Public(), 131, down, up)
	server = newConn(writerConn{io.Discard}, strings.NewReader(""), cs.Public(), 131, a.up, a.down)
	return client, server
}

func TestRecords(t *testing.T) {
	long := strings.Repeat("0123456789", 10000)
	in := sealed(t, "a", "", "", "bc", long)
	c, _ := memory(t, bytes.NewReader(in))
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "abc"+long {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
}

func TestTruncatedRecords(t *testing.T) {
	in := sealed(t, "hello", "world!")
	first := frameHeader + 5 + tagLen
	for n := range in {
		c, _ := memory(t, bytes.NewReader(in[:n]))
		got, err := io.ReadAll(c)
		whole := n == 0 || n == first // ReadAll hides io.EOF
		if whole != (err == nil) || !whole && err != io.ErrUnexpectedEOF {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
		if want := (n / first) * 5; len(got) != min(want, 5) {
			t.Errorf("cut to %d bytes: read %q", n, got)
		}
	}
}

func TestTamperedRecords(t *testing.T) {
	in := sealed(t, "hello", "world!")
	for i := range in {
		bad := bytes.Clone(in)
		bad[i] ^= 1
		c, _ := memory(t, bytes.NewReader(bad))
		got, err := io.ReadAll(c)
		if err == nil || !strings.HasPrefix("helloworld!", string(got)) || len(got) == 11 {
			t.Errorf("byte %d changed: read %q, %v", i, got, err)
		}
		if _, again := c.Read(make([]byte, 1)); again != err {
			t.Errorf("byte %d changed: the error did not last: %v, then %v", i, err, again)
		}
	}
}

func TestRecordOrder(t *testing.T) {
	in := sealed(t, "one", "two")
	half := len(in) / 2
	for name, bad := range map[string][]byte{
		"swapped":  append(bytes.Clone(in[half:]), in[:half]...),
		"replayed": append(bytes.Clone(in[:half]), in[:half]...),
		"dropped":  in[half:],
	} {
		c, _ := memory(t, bytes.NewReader(bad))
		if _, err := io.ReadAll(c); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: got %v, want ErrRecord", name, err)
		}
	}
}

func TestBadFrames(t *testing.T) {
	for name, frame := range map[string]string{
		"too long":        "\x04\x0f\xfe" + strings.Repeat("x", 4094),
		"longest":         "\x04\x0f\xfd" + strings.Repeat("x", 4093),
		"no tag":          "\x04\x00\x0f" + strings.Repeat("x", 15),
		"error":           "\x03\x00\x02no",
		"initiation":      "\x01\x00\x60" + strings.Repeat("x", 96),
		"response":        "\x02\x00\x30" + strings.Repeat("x", 48),
		"unknown":         "\x09\x00\x00",
		"not from server": "\x04\x00\x10" + strings.Repeat("x", 16),
	} {
		c, _ := memory(t, strings.NewReader(frame))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: got %v, want ErrRecord", name, err)
		}
	}
}

// countingConn counts writes, and breaks after left bytes.
type countingConn struct {
	writerConn
	writes, left int
	err          error
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes++
	if c.left < len(p) {
		n := c.left
		c.Writer.Write(p[:n])
		c.left = 1 << 30 // heals, which must not help after a fatal error
		return n, c.err
	}
	c.left -= len(p)
	return c.Writer.Write(p)
}

func TestWritesAreBatched(t *testing.T) {
	c, _ := memory(t, nil)
	under := &countingConn{writerConn: writerConn{io.Discard}, left: 1 << 30}
	c.conn = under
	if n, err := c.Write(make([]byte, 16<<10)); n != 16<<10 || err != nil {
		t.Fatal(n, err)
	}
	if under.writes != 1 {
		t.Errorf("16 KiB took %d writes", under.writes)
	}
}

func TestPartialWriteIsFatal(t *testing.T) {
	c, _ := memory(t, nil)
	broken := errors.New("cable cut")
	c.conn = &countingConn{writerConn: writerConn{io.Discard}, left: 10, err: broken}
	if _, err := c.Write([]byte("hello")); err != broken {
		t.Errorf("got %v", err)
	}
	if _, err := c.Write([]byte("hello")); err != broken {
		t.Errorf("the second write: got %v", err)
	}
}

func TestWriteTimeoutKeepsOrder(t *testing.T) {
	for left := range 48 { // both of the first two writes can be hit
		_, s := memory(t, nil)
		var wire bytes.Buffer
		s.conn = &countingConn{writerConn: writerConn{&wire}, left: left, err: os.ErrDeadlineExceeded}
		n, err := s.Write([]byte("hello"))
		if n != 5 || (err != nil) != (left < 24) {
			t.Fatalf("after %d bytes: wrote %d, %v", left, n, err)
		}
		if _, err := s.Write([]byte("world")); err != nil && left < 24 {
			t.Fatalf("after %d bytes, second: %v", left, err)
		}
		if _, err := s.Write([]byte("!")); err != nil {
			t.Fatal(err)
		}
		c, _ := memory(t, &wire)
		if got, err := io.ReadAll(c); string(got) != "helloworld!" || err != nil {
			t.Fatalf("after %d bytes: read %q, %v", left, got, err)
		}
	}
}

func TestNoncesUsedUp(t *testing.T) {
	c, _ := memory(t, bytes.NewReader(sealed(t, "x")))
	c.wcount, c.rcount = maxCount, maxCount
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrRecord) {
		t.Errorf("write: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrRecord) {
		t.Errorf("read: %v", err)
	}
}

func FuzzRecords(f *testing.F) {
	good := sealed(f, "hello", "", "world")
	f.Add(good, true)
	f.Add(good[:30], false)
	f.Add([]byte("\x04\x0f\xff"), true)
	f.Add([]byte("\x03\x00\x02no"), false)
	f.Fuzz(func(t *testing.T, in []byte, client bool) {
		c, s := memory(t, bytes.NewReader(in))
		if client {
			c.wantEarly = true
		} else {
			s.in = ahead{r: bytes.NewReader(in)}
			c = s
		}
		got, _ := io.ReadAll(c)
		if !strings.HasPrefix("helloworld", string(got)) {
			t.Errorf("read %q that nobody sealed", got)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	c, _ := memory(b, nil)
	buf := make([]byte, 16<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		c.Write(buf)
	}
}

func BenchmarkHandshake(b *testing.B) {
	server := identity.NewMachine()
	client := identity.NewMachine()
	for b.Loop() {
		hs, init, _ := initiate(client, server.Public(), 131)
		a, err := respond(server, init)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := hs.finish(a.response); err != nil {
			b.Fatal(err)
		}
	}
}
