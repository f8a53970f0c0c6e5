package derp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"mesh/identity"
)

type testCert struct {
	der  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func makeCert(t *testing.T, cn string, parent *testCert, change func(*x509.Certificate)) *testCert {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(tmpl)
	}
	signer, issuer := key, tmpl
	if parent != nil {
		signer, issuer = parent.key, parent.cert
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCert{der, cert, key}
}

func (c *testCert) pin() string { return fmt.Sprintf("%s%x", pinPrefix, sha256.Sum256(c.der)) }

// serveOnce answers one connection and returns its address.
func serveOnce(t *testing.T, conf *tls.Config, answer func(net.Conn)) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		if conf != nil {
			tc := tls.Server(nc, conf)
			if tc.Handshake() != nil {
				return
			}
			nc = tc
		}
		answer(nc)
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return ln.Addr().String()
}

func TestCertificates(t *testing.T) {
	names := func(c *x509.Certificate) {
		c.DNSNames = []string{"relay.test", "other.test"}
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	ca := makeCert(t, "test ca", nil, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
	signed := makeCert(t, "relay", ca, names)
	self := makeCert(t, "relay", nil, names)
	expired := makeCert(t, "relay", nil, func(c *x509.Certificate) { names(c); c.NotAfter = time.Now().Add(-time.Minute) })
	nameless := makeCert(t, "relay", nil, nil)
	meta := makeCert(t, metaPrefix+strings.Repeat("ab", 32), nil, nil)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)

	tests := []struct {
		name, host, certName string
		insecure             bool
		chain                []*testCert
		ok                   bool
		pinErr               bool
	}{
		{"pin", "127.0.0.1", self.pin(), false, []*testCert{self}, true, false},
		{"pin with meta", "127.0.0.1", self.pin(), false, []*testCert{self, meta}, true, false},
		{"pin, upper case digits", "127.0.0.1", pinPrefix + strings.ToUpper(self.pin()[len(pinPrefix):]), false, []*testCert{self}, true, false},
		{"pin, dates over", "127.0.0.1", expired.pin(), false, []*testCert{expired}, true, false},
		{"pin, no names", "relay.test", nameless.pin(), false, []*testCert{nameless}, true, false},
		{"wrong pin", "127.0.0.1", expired.pin(), false, []*testCert{self}, false, true},
		{"wrong pin, insecure", "127.0.0.1", expired.pin(), true, []*testCert{self}, false, true},
		{"wrong pin, good chain", "relay.test", expired.pin(), false, []*testCert{signed, ca}, false, true},
		{"pin of the second", "127.0.0.1", self.pin(), false, []*testCert{nameless, self}, false, true},
		{"pin and another", "127.0.0.1", self.pin(), false, []*testCert{self, nameless}, false, true},
		// The pinned certificate is public; whoever shows it must hold its key.
		{"pin behind a meta certificate", "127.0.0.1", self.pin(), false, []*testCert{meta, self}, false, true},
		{"only a meta certificate", "127.0.0.1", meta.pin(), false, []*testCert{meta}, false, true},
		{"short pin", "127.0.0.1", self.pin()[:70], false, []*testCert{self}, false, true},
		{"pin of no digits", "127.0.0.1", pinPrefix + strings.Repeat("x", 64), false, []*testCert{self}, false, true},
		{"verified", "relay.test", "", false, []*testCert{signed, meta}, true, false},
		{"verified by address", "127.0.0.1", "", false, []*testCert{signed}, true, false},
		{"wrong name", "evil.test", "", false, []*testCert{signed}, false, false},
		{"self-signed", "relay.test", "", false, []*testCert{self}, false, false},
		{"other name", "evil.test", "other.test", false, []*testCert{signed}, true, false},
		{"other wrong name", "relay.test", "evil.test", false, []*testCert{signed}, false, false},
		{"other name, self-signed", "relay.test", "other.test", false, []*testCert{self}, false, false},
		{"insecure", "evil.test", "", true, []*testCert{self}, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cert := tls.Certificate{PrivateKey: tt.chain[0].key}
			for _, c := range tt.chain {
				cert.Certificate = append(cert.Certificate, c.der)
			}
			addr := serveOnce(t, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}, func(nc net.Conn) {
				if p := nc.(*tls.Conn).ConnectionState().NegotiatedProtocol; p != "http/1.1" {
					t.Errorf("ALPN chose %q", p)
				}
			})
			_, err := Dial(t.Context(), ClientConfig{
				Key: identity.NewNode(), RootCAs: roots,
				Target: Target{Region: 900, HostName: tt.host, CertName: tt.certName, Addr: addr, InsecureForTests: tt.insecure},
			})
			var de *DialError
			if !errors.As(err, &de) {
				t.Fatal(err)
			}
			if passed := de.Stage == StageUpgrade; passed != tt.ok || errors.Is(err, ErrPin) != tt.pinErr {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestDialErrors(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	ln.Close()
	say := func(s string) func(net.Conn) {
		return func(nc net.Conn) {
			buf := make([]byte, 4096)
			nc.Read(buf)
			io.WriteString(nc, s)
		}
	}
	tests := []struct {
		name  string
		addr  string
		plain bool
		stage Stage
		text  string
	}{
		{"refused", closed, true, StageDial, "relay 900: dial " + closed + ": connection refused"},
		{"no TLS", serveOnce(t, nil, say("hello world")), false, StageTLS, "relay 900: tls: "},
		{"not found", serveOnce(t, nil, say("HTTP/1.1 404 Not Found\r\n\r\n")), true, StageUpgrade, `relay 900: upgrade: unexpected answer "404 Not Found"`},
		{"other protocol", serveOnce(t, nil, say("HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n")), true, StageUpgrade, `upgrade to "websocket"`},
		{"no HTTP", serveOnce(t, nil, say("SSH-2.0-x\r\n\r\n")), true, StageUpgrade, "malformed"},
		{"half a response", serveOnce(t, nil, say("HTTP/1.1 101 X\r\n")), true, StageUpgrade, "unexpected EOF"},
		{"endless response", serveOnce(t, nil, say("HTTP/1.1 101 X\r\n"+strings.Repeat("A: b\r\n", 1<<16))), true, StageUpgrade, "response too long"},
		{"no login", serveOnce(t, nil, say("HTTP/1.1 101 X\r\nUpgrade: derp\r\n\r\n")), true, StageLogin, "relay 900: login: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Dial(t.Context(), ClientConfig{Key: identity.NewNode(), Target: Target{Region: 900, Addr: tt.addr, PlainHTTP: tt.plain}})
			var de *DialError
			if !errors.As(err, &de) || de.Stage != tt.stage || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Dial = %v", err)
			}
		})
	}
}

func TestDialCancelled(t *testing.T) {
	for _, answer := range []string{"", "HTTP/1.1 101 X\r\nUpgrade: DERP\r\n\r\n"} {
		asked, release := make(chan struct{}), make(chan struct{})
		addr := serveOnce(t, nil, func(nc net.Conn) {
			nc.Read(make([]byte, 4096))
			io.WriteString(nc, answer)
			close(asked)
			<-release
		})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-asked; cancel() }()
		_, err := Dial(ctx, ClientConfig{Key: identity.NewNode(), Target: Target{Addr: addr, PlainHTTP: true}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Dial = %v", err)
		}
		close(release)
	}
}

func TestRequest(t *testing.T) {
	for _, tt := range []struct {
		target Target
		host   string
	}{
		{Target{HostName: "relay.test", Addr: "192.0.2.1:443"}, "relay.test"},
		{Target{HostName: "relay.test", Addr: "192.0.2.1:8443"}, "relay.test:8443"},
		{Target{HostName: "2001:db8::1", Addr: "[2001:db8::1]:8443"}, "[2001:db8::1]:8443"},
		{Target{Addr: "127.0.0.1:80", PlainHTTP: true}, "127.0.0.1"},
		{Target{Addr: "127.0.0.1:443", PlainHTTP: true}, "127.0.0.1:443"},
	} {
		a, b := net.Pipe()
		got := make(chan string, 1)
		go func() {
			buf := make([]byte, 4096)
			n, _ := b.Read(buf)
			got <- string(buf[:n])
			// What follows the response in the same segment is not lost.
			io.WriteString(b, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\n\r\nearly")
		}()
		early, err := upgrade(a, tt.target.hostHeader())
		if err != nil || string(early) != "early" {
			t.Errorf("upgrade = %q, %v", early, err)
		}
		want := "GET /derp HTTP/1.1\r\nHost: " + tt.host + "\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n"
		if r := <-got; r != want {
			t.Errorf("request %q, want %q", r, want)
		}
		a.Close()
	}
}

func FuzzUpgradeResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\n\r\nrest"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		early, err := upgrade(&scriptConn{r: bytes.NewReader(b)}, "x")
		if err == nil && !bytes.HasSuffix(b[:min(len(b), maxResponse)], early) {
			t.Error("early bytes are not the rest")
		}
	})
}
