package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/derp"
	"mesh/identity"
)

func TestHTTPPaths(t *testing.T) {
	srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
	defer srv.Close()
	h := srv.Handler()
	tests := []struct {
		method, path string
		header       http.Header
		status       int
		want         map[string]string
	}{
		{"GET", "/derp/probe", nil, 200, map[string]string{"Access-Control-Allow-Origin": "*"}},
		{"HEAD", "/derp/latency-check", nil, 200, map[string]string{"Access-Control-Allow-Origin": "*"}},
		{"POST", "/derp/probe", nil, 405, nil},
		{"GET", "/derp", nil, 426, map[string]string{"Upgrade": "DERP"}},
		{"GET", "/derp", http.Header{"Upgrade": {"h2c"}}, 426, nil},
		{"GET", "/derp", http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"chat, derp"}}, 426, nil},
		{"POST", "/derp", http.Header{"Upgrade": {"DERP"}}, 405, nil},
		{"GET", "/generate_204", nil, 204, map[string]string{responseHeader: "", "Cache-Control": "no-cache, no-store, must-revalidate, no-transform, max-age=0"}},
		{"GET", "/generate_204", http.Header{challengeHeader: {"ts_derp.example:1-2"}}, 204, map[string]string{responseHeader: "response ts_derp.example:1-2"}},
		{"GET", "/generate_204", http.Header{challengeHeader: {"a b"}}, 204, map[string]string{responseHeader: ""}},
		{"GET", "/generate_204", http.Header{challengeHeader: {strings.Repeat("a", 65)}}, 204, map[string]string{responseHeader: ""}},
		{"GET", "/generate_204", http.Header{challengeHeader: {strings.Repeat("a", 64)}}, 204, map[string]string{responseHeader: "response " + strings.Repeat("a", 64)}},
		{"GET", "/", nil, 200, nil},
		{"GET", "/robots.txt", nil, 200, nil},
		{"GET", "/secrets", nil, 404, nil},
		{"GET", "/derp/other", nil, 404, nil},
	}
	for _, tt := range tests {
		r := httptest.NewRequest(tt.method, tt.path, nil)
		for k, v := range tt.header {
			r.Header[k] = v
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.status {
			t.Errorf("%s %s %v: status %d, want %d", tt.method, tt.path, tt.header, w.Code, tt.status)
		}
		for k, v := range tt.want {
			if got := w.Header().Get(k); got != v {
				t.Errorf("%s %s: %s = %q, want %q", tt.method, tt.path, k, got, v)
			}
		}
	}
}

// The forms of the upgrade, byte by byte, behind a plain net/http server.
func TestUpgradeForms(t *testing.T) {
	relayKey := identity.NewNode()
	srv := New(Config{Key: relayKey, Admit: admitAll})
	defer srv.Close()
	web := httptest.NewServer(srv.Handler())
	defer web.Close()
	tests := []struct {
		name, request string
		fast          bool
	}{
		{"normal", "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n", false},
		{"lower case, ideal node", "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: derp\r\nConnection: upgrade\r\nIdeal-Node: 900a\r\n\r\n", false},
		{"ancient", "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n\r\n", false},
		{"fast", "GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			nc, err := net.Dial("tcp", web.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			nc.SetDeadline(time.Now().Add(patience))
			// Login and a packet right behind the request, in one segment.
			key := identity.NewNode()
			self := key.Public().Bytes()
			out := []byte(tt.request)
			out = derp.AppendFrame(out, derp.FrameClientInfo, derp.SealClientInfo(key, relayKey.Public(), derp.ClientInfo{}))
			out = derp.AppendFrame(out, derp.FrameSendPacket, self[:], []byte("early"))
			nc.Write(out)

			br := bufio.NewReader(nc)
			if !tt.fast {
				resp, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatal(err)
				}
				pub := srv.Key().Bytes()
				if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "DERP" || resp.Header.Get("Connection") != "Upgrade" ||
					resp.Header.Get("Derp-Version") != "2" || resp.Header.Get("Derp-Public-Key") != hex.EncodeToString(pub[:]) {
					t.Errorf("%v", resp)
				}
			}
			early, _ := br.Peek(br.Buffered())
			conn := derp.NewConn(nc, early, derp.ConnConfig{})
			for _, want := range []derp.FrameType{derp.FrameServerKey, derp.FrameServerInfo, derp.FrameRecvPacket} {
				f, err := conn.ReadFrame()
				if err != nil || f.Type != want {
					t.Fatalf("frame %#x, %v, want %#x", byte(f.Type), err, byte(want))
				}
			}
		})
	}
}

func TestPlainServe(t *testing.T) {
	srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln, nil) }()
	defer func() { srv.Close(); <-served }()
	b := &bed{t, srv, ln.Addr().String(), ""}
	dial := func() *node {
		cfg := b.config(identity.NewNode())
		cfg.Target.PlainHTTP = true
		c, err := derp.Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return newNode(t, c, cfg.Key)
	}
	x, y := dial(), dial()
	x.send(y.pub, "plain")
	y.wantPacket(x.pub, "plain")
}

func TestTLS(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	nc, err := tls.Dial("tcp", b.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	cs := nc.ConnectionState()
	if cs.NegotiatedProtocol != "http/1.1" || cs.Version != tls.VersionTLS13 || len(cs.PeerCertificates) != 2 {
		t.Fatalf("%q %#x %d certificates", cs.NegotiatedProtocol, cs.Version, len(cs.PeerCertificates))
	}
	meta := cs.PeerCertificates[1]
	pub := b.srv.Key().Bytes()
	if meta.Subject.CommonName != "derpkey"+hex.EncodeToString(pub[:]) || meta.SerialNumber.Int64() != 2 ||
		meta.PublicKeyAlgorithm != x509.Ed25519 || !meta.BasicConstraintsValid {
		t.Errorf("meta certificate %v %v", meta.Subject, meta.SerialNumber)
	}
	if before, after := time.Since(meta.NotBefore), time.Until(meta.NotAfter); before < 29*24*time.Hour || after < 29*24*time.Hour {
		t.Errorf("valid from %v to %v", meta.NotBefore, meta.NotAfter)
	}
	if string(b.srv.MetaCert()) != string(meta.Raw) {
		t.Error("made anew each time")
	}
	// The latency probe on the same server.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + b.addr + "/derp/latency-check")
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("%v %v", resp, err)
	} else {
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

func TestMetaCertIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := New(Config{Key: identity.NewNode()})
		defer srv.Close()
		first := string(srv.MetaCert())
		time.Sleep(9 * 24 * time.Hour)
		if string(srv.MetaCert()) != first {
			t.Error("renewed too early")
		}
		time.Sleep(2 * 24 * time.Hour)
		if string(srv.MetaCert()) == first {
			t.Error("not renewed")
		}
	})
}

func TestSelfSigned(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:192.0.2.2")}
	certPEM, keyPEM, pin, err := SelfSigned([]string{"relay.test"}, ips)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.Certificate) != 1 {
		t.Errorf("%d certificates", len(cert.Certificate))
	}
	leaf := cert.Leaf
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	for _, name := range []string{"relay.test", "192.0.2.1", "2001:db8::1", "192.0.2.2"} {
		for _, at := range []time.Time{time.Now(), time.Now().Add(9 * 365 * 24 * time.Hour)} {
			if _, err := leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: at}); err != nil {
				t.Error(err)
			}
		}
	}
	if got, err := PinOf(certPEM); err != nil || got != pin || len(pin) != len("sha256-raw:")+64 {
		t.Errorf("pin %q, %q, %v", pin, got, err)
	}
	if _, err := PinOf(keyPEM); err == nil {
		t.Error("pin of a key")
	}
	if _, _, _, err := SelfSigned(nil, nil); err == nil {
		t.Error("certificate for nothing")
	}
	if _, _, _, err := SelfSigned(nil, []netip.Addr{{}}); err == nil {
		t.Error("certificate for no address")
	}
}

func TestWrongPin(t *testing.T) {
	b := newBed(t, Config{Admit: admitAll})
	cfg := b.config(identity.NewNode())
	cfg.Target.CertName = "sha256-raw:" + strings.Repeat("0", 64)
	_, err := derp.Dial(t.Context(), cfg)
	if !errors.Is(err, derp.ErrPin) || !strings.HasPrefix(err.Error(), "relay 900: tls: ") || !strings.Contains(err.Error(), b.pin) {
		t.Errorf("Dial = %v", err)
	}
}

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(4, 3)
		var cut []string
		enter := func(name, source string) (*ticket, error) {
			return g.enter(netip.MustParseAddr(source), func() { cut = append(cut, name) })
		}
		must := func(tk *ticket, err error) *ticket {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			return tk
		}
		refused := func(_ *ticket, err error) {
			t.Helper()
			if !errors.Is(err, errGateFull) {
				t.Fatal("entered a full gate", err)
			}
		}
		a1 := must(enter("a1", "192.0.2.1"))
		must(enter("a2", "192.0.2.1"))
		must(enter("a3", "192.0.2.1"))
		refused(enter("a4", "192.0.2.1")) // full for this source
		b1 := must(enter("b1", "2001:db8::1"))
		refused(enter("c1", "192.0.2.3")) // full for all
		b1.leave()
		b1.leave()
		must(enter("b2", "2001:db8::2"))
		time.Sleep(linger)
		must(enter("a4", "192.0.2.1")) // in place of a1
		must(enter("c1", "192.0.2.3")) // in place of a2
		a1.leave()                     // too late to matter
		if fmt.Sprint(cut) != "[a1 a2]" || g.pending() != 4 || g.evictions() != 4 {
			t.Errorf("cut %v, %d pending, %d evicted", cut, g.pending(), g.evictions())
		}
		must(enter("d1", "192.0.2.4"))
		if fmt.Sprint(cut) != "[a1 a2 a3]" {
			t.Errorf("cut %v", cut)
		}
		if len(g.sources) != 4 {
			t.Errorf("%d sources", len(g.sources))
		}
		must(enter("b3", "2001:db8::3")) // in place of b2, the oldest: one /64
		if fmt.Sprint(cut) != "[a1 a2 a3 b2]" || len(g.sources) != 4 {
			t.Errorf("cut %v, %d sources", cut, len(g.sources))
		}
	})
}

// pipe returns a client's end of a connection that srv serves.
func pipe(t *testing.T, srv *Server) (net.Conn, chan error) {
	a, b := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- srv.Accept(t.Context(), a, nil) }()
	return b, ended
}

func TestKeepAliveAndTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := New(Config{Key: identity.NewNode(), Admit: admitAll})
		defer srv.Close()

		// A stock-like client that only reads hears something every 60 to 65 seconds.
		nc, _ := pipe(t, srv)
		conn := derp.NewConn(nc, nil, derp.ConnConfig{})
		conn.ReadFrame()
		conn.WriteFrame(derp.FrameClientInfo, derp.SealClientInfo(identity.NewNode(), srv.Key(), derp.ClientInfo{}))
		conn.ReadFrame()
		last := time.Now()
		for range 10 {
			f, err := conn.ReadFrame()
			if d := time.Since(last); err != nil || f.Type != derp.FrameKeepAlive || d < 60*time.Second || d > 65*time.Second {
				t.Errorf("%#x %v after %v", byte(f.Type), err, d)
			}
			last = time.Now()
		}
		conn.Close()

		// Our client lives on for a day, doing nothing.
		nc, _ = pipe(t, srv)
		c, err := derp.Login(t.Context(), nc, derp.ClientConfig{Key: identity.NewNode()})
		if err != nil {
			t.Fatal(err)
		}
		recv := make(chan error, 1)
		go func() {
			_, err := c.Recv()
			recv <- err
		}()
		time.Sleep(24 * time.Hour)
		select {
		case err := <-recv:
			t.Errorf("Recv = %v", err)
		default:
		}
		c.Close()
		<-recv

		// Who does not log in leaves after ten seconds.
		nc, ended := pipe(t, srv)
		start := time.Now()
		conn = derp.NewConn(nc, nil, derp.ConnConfig{})
		conn.ReadFrame()
		if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		conn.Close()

		// Who does not read leaves two seconds after something came for it.
		key := identity.NewNode()
		nc, ended = pipe(t, srv)
		conn = derp.NewConn(nc, nil, derp.ConnConfig{})
		conn.ReadFrame()
		conn.WriteFrame(derp.FrameClientInfo, derp.SealClientInfo(key, srv.Key(), derp.ClientInfo{}))
		conn.ReadFrame()
		start = time.Now()
		self := key.Public().Bytes()
		conn.WriteFrame(derp.FrameSendPacket, self[:], []byte("x"))
		if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != 2*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		conn.Close()

		// The caller's context ends a connection too.
		ctx, cancel := context.WithCancel(t.Context())
		a, b := net.Pipe()
		go b.Read(make([]byte, 1000))
		done := make(chan error, 1)
		go func() { done <- srv.Accept(ctx, a, nil) }()
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Accept = %v", err)
		}
		b.Close()
	})
}
