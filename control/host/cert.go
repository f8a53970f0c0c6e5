package host

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

// certFunc gives the certificate for a TLS handshake.
type certFunc func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// fileCert is a certificate in two files, read again when they change.
type fileCert struct {
	certFile, keyFile string
	log               *zap.Logger

	mu      sync.Mutex // guards the members below
	cert    *tls.Certificate
	stamp   [2]fileStamp // of the files that cert was read from, or that could not be read
	checked time.Time
}

// fileStamp tells two states of a file apart.
type fileStamp struct {
	size int64
	at   time.Time
}

// certCheck is how often the files are looked at, at most.
const certCheck = time.Second

func openFileCert(certFile, keyFile string, log *zap.Logger) (*fileCert, error) {
	f := &fileCert{certFile: certFile, keyFile: keyFile, log: log}
	f.stamp = f.stamps()
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	f.cert = &cert
	return f, nil
}

func (f *fileCert) stamps() (out [2]fileStamp) {
	for i, name := range []string{f.certFile, f.keyFile} {
		if fi, err := os.Stat(name); err == nil {
			out[i] = fileStamp{fi.Size(), fi.ModTime()}
		}
	}
	return out
}

// get is a certFunc. If the files are of no use, as they may be for a moment
// while they are replaced, the certificate from before stays.
func (f *fileCert) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.checked) >= certCheck {
		f.checked = now
		if stamp := f.stamps(); stamp != f.stamp {
			f.stamp = stamp
			if cert, err := tls.LoadX509KeyPair(f.certFile, f.keyFile); err != nil {
				f.log.Error("the new certificate cannot be used, the former one stays", zap.Error(err))
			} else {
				f.cert = &cert
				f.log.Info("certificate read again", zap.String("file", f.certFile))
			}
		}
	}
	return f.cert, nil
}

// ACME says how to get certificates from an authority by the ACME protocol.
type ACME struct {
	Domains   []string // names to get certificates for; none = no ACME
	Directory string   // URL of the authority's directory; required
	Email     string   // for the authority to write to, or ""
	CA        string   // PEM file of those whom Directory's own TLS is trusted to; "" = the system's
}

// acmeName is the folder of the data directory for account key and certificates.
const acmeName = "acme"

// manager returns what gets and renews the certificates. It answers the
// authority's question in a TLS handshake (tls-alpn-01), so that port 443 of the
// domains must lead to the port for nodes.
func (a *ACME) manager(dir string) (*autocert.Manager, error) {
	if a.Directory == "" {
		return nil, errors.New("no ACME directory: give the URL of the authority's")
	}
	client := &acme.Client{DirectoryURL: a.Directory, UserAgent: "mesh"}
	if a.CA != "" {
		pem, err := readLimited(a.CA, 1<<20)
		if err != nil {
			return nil, fmt.Errorf("ACME authority: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ACME authority: %s holds no certificate", a.CA)
		}
		client.HTTPClient = &http.Client{Timeout: time.Minute, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
		}}
	}
	cache := filepath.Join(dir, acmeName)
	if err := makeDataDir(cache); err != nil {
		return nil, err
	}
	return &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      autocert.DirCache(cache), // which writes files of mode 0600, atomically
		HostPolicy: a.allow,
		Client:     client,
		Email:      a.Email,
	}, nil
}

// allow refuses names that are not ours: whoever connects could make us ask for
// certificates of any name.
func (a *ACME) allow(_ context.Context, host string) error {
	if slices.Contains(a.Domains, host) {
		return nil
	}
	return errors.New("not a name of this server")
}

// isChallenge reports whether a handshake is an ACME authority's question, whose
// answer is a certificate of a form of its own.
func isChallenge(hello *tls.ClientHelloInfo) bool {
	return slices.Contains(hello.SupportedProtos, acme.ALPNProto)
}

// withChallenge has conf answer an ACME authority's question with what get gives
// and nothing behind it.
func withChallenge(conf *tls.Config, get certFunc) *tls.Config {
	next := conf.GetCertificate
	conf.NextProtos = append(conf.NextProtos, acme.ALPNProto)
	conf.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if isChallenge(hello) {
			return get(hello)
		}
		return next(hello)
	}
	return conf
}

// certificates returns where certificates come from that authorities vouch for;
// nil if there are none.
func (h *Host) certificates() (certFunc, error) {
	switch {
	case h.cfg.TLSCert != "":
		f, err := openFileCert(h.cfg.TLSCert, h.cfg.TLSKey, h.log)
		if err != nil {
			return nil, err
		}
		return f.get, nil
	case len(h.cfg.ACME.Domains) > 0:
		m, err := h.cfg.ACME.manager(h.cfg.DataDir)
		if err != nil {
			return nil, err
		}
		return m.GetCertificate, nil
	}
	return nil, nil
}

// allTLS reports whether the port for nodes speaks nothing but TLS.
func (c *Config) allTLS() bool { return c.TLSCert != "" || len(c.ACME.Domains) > 0 }
