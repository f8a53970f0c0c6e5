package relay

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"time"

	"mesh/derp"
)

// TLSConfig returns the configuration for the TLS of a relay: cert with the
// relay's meta certificate behind it, HTTP/1.1 only. Leaf-only and chained
// certificates both work; a client that pins wants cert to be a single one.
func TLSConfig(cert tls.Certificate, s *Server) *tls.Config {
	return TLSConfigFunc(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }, s)
}

// TLSConfigFunc is TLSConfig with a certificate that get gives for each
// handshake, and that may be another each time.
func TLSConfigFunc(get func(*tls.ClientHelloInfo) (*tls.Certificate, error), s *Server) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := get(hello)
			if err != nil {
				return nil, err
			}
			c := *cert
			c.Certificate = append(c.Certificate[:len(c.Certificate):len(c.Certificate)], s.MetaCert())
			return &c, nil
		},
		// Full records from the start: packets come in bursts.
		DynamicRecordSizingDisabled: true,
	}
}

// metaCert caches the meta certificate, which is made anew before it expires.
type metaCert struct {
	mu   sync.Mutex // guards what follows
	der  []byte
	made time.Time
}

const (
	metaValid = 30 * 24 * time.Hour
	metaRenew = 10 * 24 * time.Hour
)

// MetaCert returns the DER form of a certificate that tells clients the
// relay's key, to be appended to the TLS chain: a client that knows the key
// from there can start one round trip earlier. It proves nothing.
func (s *Server) MetaCert() []byte {
	m := &s.meta
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if age := now.Sub(m.made); m.der != nil && age >= 0 && age < metaRenew {
		return m.der
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic("relay: " + err.Error()) // no randomness
	}
	key := s.pub.Bytes()
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(derp.Version),
		Subject:               pkix.Name{CommonName: "derpkey" + hex.EncodeToString(key[:])},
		NotBefore:             now.Add(-metaValid),
		NotAfter:              now.Add(metaValid),
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, priv)
	if err != nil {
		panic("relay: meta certificate: " + err.Error()) // the template is fixed
	}
	m.der, m.made = der, now
	return der
}

// selfSignedFor is how long a self-signed certificate is valid. Stock clients
// check the dates even of a pinned one.
const selfSignedFor = 10 * 365 * 24 * time.Hour

// SelfSigned makes a certificate for a relay that has none: valid for ten
// years and for all the given DNS names and addresses, of which there must be
// at least one. pin is how the relay map names it ("sha256-raw:…"). The caller
// keeps the PEM forms; keyPEM is a secret.
func SelfSigned(names []string, ips []netip.Addr) (certPEM, keyPEM []byte, pin string, err error) {
	if len(names)+len(ips) == 0 {
		return nil, nil, "", errors.New("relay: self-signed certificate: no name and no address")
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, "", fmt.Errorf("relay: self-signed certificate: %w", err)
	}
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] &= 0x7f // positive
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial),
		NotBefore:             now.Add(-24 * time.Hour), // for clocks that are behind
		NotAfter:              now.Add(selfSignedFor),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		DNSNames:              names,
	}
	for _, ip := range ips {
		if !ip.IsValid() {
			return nil, nil, "", errors.New("relay: self-signed certificate: invalid address")
		}
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(ip.Unmap().WithZone("").AsSlice()))
	}
	tmpl.Subject.CommonName = "relay"
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		return nil, nil, "", fmt.Errorf("relay: self-signed certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, nil, "", fmt.Errorf("relay: self-signed certificate: %w", err)
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	return certPEM, keyPEM, pinOf(der), nil
}

// PinOf returns the pin of the first certificate in certPEM: what SelfSigned
// returned with it.
func PinOf(certPEM []byte) (string, error) {
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return "", errors.New("relay: no certificate in PEM form")
	}
	return pinOf(block.Bytes), nil
}

func pinOf(der []byte) string {
	sum := sha256.Sum256(der)
	return "sha256-raw:" + hex.EncodeToString(sum[:])
}
