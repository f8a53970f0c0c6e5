package host

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/crypto/acme"

	"mesh/derp/relay"
)

// shownBy returns the leaf that a server shows to who asks for name.
func shownBy(t *testing.T, addr, name string) (*x509.Certificate, error) {
	t.Helper()
	c, err := tls.Dial("tcp", addr, &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0], nil
}

// A certificate that is replaced on disk is shown to the next client, and a
// broken one is not.
func TestCertificateFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	write := func(name string) {
		c, k, _, err := relay.SelfSigned([]string{name}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for file, b := range map[string][]byte{cert: c, key: k} {
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("one.example")
	f, err := openFileCert(cert, key, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	name := func() string {
		t.Helper()
		f.checked = time.Time{} // as if time had passed
		c, err := f.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(c.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		return leaf.DNSNames[0]
	}
	if got := name(); got != "one.example" {
		t.Errorf("at first %s", got)
	}
	write("second.example")
	if got := name(); got != "second.example" {
		t.Errorf("after the change %s", got)
	}
	if err := os.WriteFile(cert, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := name(); got != "second.example" {
		t.Errorf("with a broken file %s", got)
	}
	write("third.example")
	if got := name(); got != "third.example" {
		t.Errorf("once it is whole %s", got)
	}
	if _, err := openFileCert(filepath.Join(dir, "nosuch"), key, zap.NewNop()); err == nil {
		t.Error("started without a certificate")
	}
}

// authority is as much of an ACME authority as one certificate takes. It issues
// it only after the host has answered its question in a TLS handshake.
type authority struct {
	*httptest.Server
	t    *testing.T
	at   string // where port 443 of every domain leads to
	key  *ecdsa.PrivateKey
	mu   sync.Mutex // guards the members below
	jwk  *ecdsa.PublicKey
	name string
	done string // state of the authorization
	cert []byte
}

const acmeToken = "a-token-that-nobody-guesses"

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, done: "pending"}
	a.Server = httptest.NewTLSServer(http.HandlerFunc(a.serve))
	t.Cleanup(a.Close)
	return a
}

func (a *authority) serve(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Replay-Nonce", "nonce")
	answer := func(status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v)
	}
	var jws struct{ Protected, Payload string }
	var head struct {
		JWK struct{ X, Y string }
	}
	var payload struct {
		Identifiers []struct{ Value string }
		CSR         string
	}
	if r.Method == http.MethodPost {
		json.NewDecoder(r.Body).Decode(&jws)
		b, _ := base64.RawURLEncoding.DecodeString(jws.Protected)
		json.Unmarshal(b, &head)
		b, _ = base64.RawURLEncoding.DecodeString(jws.Payload)
		json.Unmarshal(b, &payload)
	}
	challenge := map[string]string{"type": "tls-alpn-01", "url": a.URL + "/challenge", "token": acmeToken, "status": a.done}
	order := func() map[string]any {
		state := map[bool]string{true: "ready", false: "pending"}[a.done == "valid"]
		if a.cert != nil {
			state = "valid"
		}
		return map[string]any{"status": state, "identifiers": []map[string]string{{"type": "dns", "value": a.name}},
			"authorizations": []string{a.URL + "/authz"}, "finalize": a.URL + "/finalize", "certificate": a.URL + "/cert"}
	}
	w.Header().Set("Location", a.URL+"/order")
	switch r.URL.Path {
	case "/dir":
		answer(200, map[string]string{"newNonce": a.URL + "/nonce", "newAccount": a.URL + "/account", "newOrder": a.URL + "/order/new", "revokeCert": a.URL + "/x", "keyChange": a.URL + "/x"})
	case "/nonce":
	case "/account":
		x, _ := base64.RawURLEncoding.DecodeString(head.JWK.X)
		y, _ := base64.RawURLEncoding.DecodeString(head.JWK.Y)
		if key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y)); err == nil {
			a.jwk = key
		}
		w.Header().Set("Location", a.URL+"/account/1")
		answer(201, map[string]string{"status": "valid"})
	case "/order/new":
		a.name = payload.Identifiers[0].Value
		answer(201, order())
	case "/order":
		answer(200, order())
	case "/authz":
		answer(200, map[string]any{"status": a.done, "identifier": map[string]string{"type": "dns", "value": a.name}, "challenges": []any{challenge}})
	case "/challenge":
		if a.done = "valid"; !a.asked() {
			a.done = "invalid"
		}
		challenge["status"] = a.done
		answer(200, challenge)
	case "/finalize":
		der, _ := base64.RawURLEncoding.DecodeString(payload.CSR)
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil || a.done != "valid" {
			answer(403, map[string]string{"type": "urn:ietf:params:acme:error:unauthorized"})
			return
		}
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: a.name}, DNSNames: []string{a.name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
		if der, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, csr.PublicKey, a.key); err != nil {
			a.t.Error(err)
		}
		a.cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		answer(200, order())
	case "/cert":
		w.Header().Set("Content-Type", "application/pem-certificate-chain")
		w.Write(a.cert)
	default:
		http.NotFound(w, r)
	}
}

// asked reports whether the host at the name answers as only who holds the
// account's key can.
func (a *authority) asked() bool {
	c, err := tls.Dial("tcp", a.at, &tls.Config{ServerName: a.name, InsecureSkipVerify: true, NextProtos: []string{acme.ALPNProto}})
	if err != nil {
		a.t.Errorf("the question is not answered: %v", err)
		return false
	}
	defer c.Close()
	state := c.ConnectionState()
	thumb, err := acme.JWKThumbprint(a.jwk)
	if err != nil {
		a.t.Error(err)
		return false
	}
	sum := sha256.Sum256([]byte(acmeToken + "." + thumb))
	want, _ := asn1.Marshal(sum[:])
	leaf := state.PeerCertificates[0]
	for _, e := range leaf.Extensions {
		if e.Id.String() == "1.3.6.1.5.5.7.1.31" {
			return state.NegotiatedProtocol == acme.ALPNProto && len(state.PeerCertificates) == 1 &&
				len(leaf.DNSNames) == 1 && leaf.DNSNames[0] == a.name && bytes.Equal(e.Value, want)
		}
	}
	a.t.Error("the answer has no proof")
	return false
}

// A server gets its certificate by itself, keeps it for itself, and asks for no
// name but its own.
func TestACME(t *testing.T) {
	a := newAuthority(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	// The port must be known to the authority before the server asks.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.at = l.Addr().String()
	l.Close()
	change := func(c *Config) {
		c.Listen = a.at
		c.ACME = ACME{Domains: []string{"mesh.example"}, Directory: a.URL + "/dir", CA: ca}
	}
	h := startHost(t, change)
	if h.URL() != "https://mesh.example" {
		t.Errorf("URL %s", h.URL())
	}
	if _, err := shownBy(t, a.at, "other.example"); err == nil {
		t.Error("it has a certificate for a name that is not its own")
	}
	leaf, err := shownBy(t, a.at, "mesh.example")
	if err != nil || fmt.Sprint(leaf.DNSNames) != "[mesh.example]" || !leaf.NotAfter.After(time.Now().Add(24*time.Hour)) {
		t.Fatalf("certificate %+v, %v", leaf, err)
	}
	dir := filepath.Join(h.cfg.DataDir, acmeName)
	files := 0
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if runtime.GOOS != "windows" && err == nil && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, fi.Mode())
		}
		files++
		return err
	}); err != nil || files < 2 {
		t.Errorf("%d files, %v", files, err)
	}
	// What it has is enough after a restart: the authority may be away.
	data := h.cfg.DataDir
	h.Close()
	a.Close()
	startHost(t, func(c *Config) {
		change(c)
		c.DataDir = data
	})
	again, err := shownBy(t, a.at, "mesh.example")
	if err != nil || !again.Equal(leaf) {
		t.Errorf("after a restart: %v", err)
	}
	if _, err := Start(Config{DataDir: t.TempDir(), Listen: "127.0.0.1:0", ACME: ACME{Domains: []string{"x.example"}}}); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("without a directory: %v", err)
	}
}
