package netcheck

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
)

const (
	maxAtOnce  = 8 // relays asked by HTTPS
	maxHTTP    = 64 << 10
	portalTime = 2 * time.Second
	maxPortals = 2 // relays asked for a captive portal

	// What relays call the header by which a client tells them from somebody
	// who answers in their name, and that of the answer.
	challengeHeader = "X-Tailscale-Challenge"
	responseHeader  = "X-Tailscale-Response"
)

// measureHTTPS asks every region by HTTPS, in the background.
func (c *check) measureHTTPS(ctx context.Context, side *sync.WaitGroup) {
	slots := make(chan struct{}, maxAtOnce)
	for _, def := range c.regions {
		side.Go(func() {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			defer func() { <-slots }()
			g := Region{ID: def.RegionID}
			d, err := c.httpsLatency(ctx, def)
			if err != nil {
				c.cfg.Logger.Debug("ask relay by HTTPS", zap.Int("relay", g.ID), zap.Error(err))
				g.Error = err.Error()
			} else {
				g.HTTPS = Latency(max(d, time.Microsecond))
			}
			c.mu.Lock()
			c.report.Regions = append(c.report.Regions, g)
			c.mu.Unlock()
		})
	}
}

// httpsLatency returns the time from a request to its answer, over a connection
// that stands.
func (c *check) httpsLatency(ctx context.Context, def *wire.DERPRegion) (time.Duration, error) {
	err := errors.New("the region has no relay")
	for _, n := range def.Nodes {
		if n == nil || n.STUNOnly {
			continue
		}
		var d time.Duration
		if d, err = c.nodeLatency(ctx, n); err == nil {
			return d, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return 0, err
}

func (c *check) nodeLatency(ctx context.Context, n *wire.DERPNode) (time.Duration, error) {
	conf, err := tlsConfig(n, c.cfg.RootCAs)
	if err != nil {
		return 0, err
	}
	raw, err := c.dial(ctx, n, port(n.DERPPort, 443))
	if err != nil {
		return 0, err
	}
	defer raw.Close()
	// The end of ctx shows as a time-out of the socket.
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
	nc := tls.Client(raw, conf)
	if err := nc.HandshakeContext(ctx); err != nil {
		return 0, fmt.Errorf("TLS: %w", err)
	}
	began := time.Now()
	resp, err := get(nc, hostHeader(n, n.DERPPort, 443), "/derp/latency-check", "")
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("unexpected answer %q", resp.Status)
	}
	return took, nil
}

// dial connects to a relay.
func (c *check) dial(ctx context.Context, n *wire.DERPNode, port string) (net.Conn, error) {
	a4, name := nodeHost(n, false)
	a6, name6 := nodeHost(n, true)
	switch {
	case a4.IsValid():
		return c.cfg.DialTCP(ctx, "tcp", net.JoinHostPort(a4.String(), port))
	case a6.IsValid() && name == "":
		return c.cfg.DialTCP(ctx, "tcp", net.JoinHostPort(a6.String(), port))
	case name != "" && name6 != "":
		return c.cfg.DialTCP(ctx, "tcp", net.JoinHostPort(name, port))
	case name != "":
		return c.cfg.DialTCP(ctx, "tcp4", net.JoinHostPort(name, port))
	case name6 != "":
		return c.cfg.DialTCP(ctx, "tcp6", net.JoinHostPort(name6, port))
	}
	return nil, errors.New("the relay has no address")
}

// hostHeader names a relay as HTTP wants it.
func hostHeader(n *wire.DERPNode, port, standard int) string {
	host := n.HostName
	if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
		host = "[" + host + "]"
	}
	if port != 0 && port != standard {
		host = fmt.Sprintf("%s:%d", host, port)
	}
	return host
}

// get makes a request and returns the head of the answer.
func get(nc net.Conn, host, path, challenge string) (*http.Response, error) {
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return nil, errors.New("the relay's name is no host name")
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n", path, host)
	if challenge != "" {
		fmt.Fprintf(&b, "%s: %s\r\n", challengeHeader, challenge)
	}
	b.WriteString("\r\n")
	if _, err := nc.Write(b.Bytes()); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(nc, maxHTTP)), &http.Request{Method: http.MethodGet})
	if err != nil {
		return nil, err
	}
	return resp, nil // nobody reads the body, which holds nothing
}

// tlsConfig says how a relay proves who it is, as the relay map has it: by a
// certificate for its name or another one, or by the one that is pinned. (The
// handshake proves possession of the first certificate; so it is the one that
// the pin must name.)
func tlsConfig(n *wire.DERPNode, roots *x509.CertPool) (*tls.Config, error) {
	conf := &tls.Config{ServerName: n.HostName, RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	pin, pinned := strings.CutPrefix(n.CertName, "sha256-raw:")
	switch {
	case pinned:
		want, err := hex.DecodeString(pin)
		if err != nil || len(want) != sha256.Size {
			return nil, errors.New("the relay map has a malformed pin")
		}
		conf.InsecureSkipVerify = true
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 || sha256.Sum256(cs.PeerCertificates[0].Raw) != [sha256.Size]byte(want) {
				return errors.New("certificate does not match the pin")
			}
			return nil
		}
	case n.InsecureForTests:
		conf.InsecureSkipVerify = true
	case n.CertName != "":
		conf.InsecureSkipVerify = true // VerifyConnection does it, for the other name
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("no certificate")
			}
			opts := x509.VerifyOptions{DNSName: n.CertName, Roots: roots, Intermediates: x509.NewCertPool()}
			for _, cert := range cs.PeerCertificates[1:] {
				opts.Intermediates.AddCert(cert)
			}
			_, err := cs.PeerCertificates[0].Verify(opts)
			return err
		}
	}
	return conf, nil
}

// captivePortal asks relays that offer it for an answer that only they can
// give.
func (c *check) captivePortal(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, portalTime)
	defer cancel()
	tried := 0
	for _, def := range c.regions {
		for _, n := range def.Nodes {
			if n == nil || !n.CanPort80 || n.STUNOnly || tried == maxPortals {
				continue
			}
			tried++
			portal, err := c.portalAt(ctx, n)
			if err != nil {
				c.cfg.Logger.Debug("look for a captive portal", zap.Int("relay", def.RegionID), zap.Error(err))
				continue
			}
			c.mu.Lock()
			c.report.CaptivePortal = &portal
			c.mu.Unlock()
			return
		}
	}
}

func (c *check) portalAt(ctx context.Context, n *wire.DERPNode) (portal bool, err error) {
	nc, err := c.dial(ctx, n, "80")
	if err != nil {
		return false, err
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })()
	challenge := rand.Text()
	resp, err := get(nc, hostHeader(n, 80, 80), "/generate_204", challenge)
	if err != nil {
		return false, err
	}
	return resp.StatusCode != http.StatusNoContent || resp.Header.Get(responseHeader) != "response "+challenge, nil
}
