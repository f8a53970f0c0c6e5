package derp

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Dial connects to the relay cfg.Target and logs in. The whole of it is
// bounded by ctx and by cfg.DialTimeout. The error is a *DialError; it matches
// ErrNotAdmitted, ErrPin and ErrProtocol where these are the cause.
func Dial(ctx context.Context, cfg ClientConfig) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.dialTimeout())
	defer cancel()

	dial := cfg.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	fail := func(stage Stage, err error) error {
		var netErr net.Error
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) && (errors.As(err, &netErr) && netErr.Timeout() || errors.Is(err, net.ErrClosed)) {
			err = ctx.Err() // the deadline that we put on the socket for it
		}
		return &DialError{cfg.Target, stage, err}
	}
	connect := cfg.dialTimeout()
	if cfg.ConnectTimeout > 0 {
		connect = min(connect, cfg.ConnectTimeout)
	}
	var proxy *url.URL
	if cfg.Proxy != nil {
		var err error
		if proxy, err = cfg.Proxy(cfg.Target.Addr); err != nil {
			return nil, fail(StageDial, err)
		}
	}
	var raw net.Conn
	var err error
	if proxy != nil {
		raw, err = dialVia(ctx, dial, proxy, cfg.Target.Addr, connect)
	} else {
		cctx, cancel := context.WithTimeout(ctx, connect)
		raw, err = dial(cctx, "tcp", cfg.Target.Addr)
		cancel()
	}
	if err != nil {
		var op *net.OpError
		if proxy == nil && errors.As(err, &op) {
			err = op.Err // the rest of its text is in ours
		}
		var sys *os.SyscallError
		if proxy == nil && errors.As(err, &sys) {
			err = sys.Err
		}
		return nil, fail(StageDial, err)
	}
	// From here on the end of ctx shows as a time-out of the socket.
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	nc := raw
	if !cfg.Target.PlainHTTP {
		tc, err := cfg.startTLS(ctx, raw)
		if err != nil {
			raw.Close()
			return nil, fail(StageTLS, err)
		}
		nc = tc
	}
	early, err := upgrade(nc, cfg.Target.hostHeader())
	if err != nil {
		abort(nc)
		return nil, fail(StageUpgrade, err)
	}
	c, err := login(nc, early, cfg)
	if err == nil && !stop() {
		c.Close() // ctx ended; its deadline sits on the socket
		err = ctx.Err()
	}
	if err != nil {
		abort(nc)
		return nil, fail(StageLogin, err)
	}
	return c, nil
}

// hostHeader returns HostName with the port unless that is the default one.
func (t Target) hostHeader() string {
	host := t.HostName
	dialHost, port, err := net.SplitHostPort(t.Addr)
	if host == "" && err == nil {
		host = dialHost
	}
	if strings.Contains(host, ":") {
		host = "[" + strings.Trim(host, "[]") + "]"
	}
	if err != nil || port == "" || port == "443" && !t.PlainHTTP || port == "80" && t.PlainHTTP {
		return host
	}
	return host + ":" + port
}

func (t Target) serverName() string {
	if t.HostName != "" {
		return strings.Trim(t.HostName, "[]")
	}
	host, _, err := net.SplitHostPort(t.Addr)
	if err != nil {
		return t.Addr
	}
	return host
}

func (cfg *ClientConfig) startTLS(ctx context.Context, nc net.Conn) (*tls.Conn, error) {
	name := cfg.Target.serverName()
	conf := &tls.Config{
		ServerName: name,
		RootCAs:    cfg.RootCAs,
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"}, // HTTP/2 has no upgrade to raw bytes
		// Full records from the start: packets come in bursts.
		DynamicRecordSizingDisabled: true,
	}
	pin, pinned := strings.CutPrefix(cfg.Target.CertName, pinPrefix)
	switch {
	case pinned:
		want, err := hex.DecodeString(pin)
		if err != nil || len(want) != sha256.Size {
			return nil, fmt.Errorf("%w: malformed pin %q", ErrPin, cfg.Target.CertName)
		}
		conf.InsecureSkipVerify = true
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			return checkPin(cs.PeerCertificates, [sha256.Size]byte(want))
		}
	case cfg.Target.InsecureForTests:
		conf.InsecureSkipVerify = true
	case cfg.Target.CertName != "":
		conf.InsecureSkipVerify = true // VerifyConnection does it, for the other name
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			return verifyChain(cs.PeerCertificates, cfg.Target.CertName, cfg.RootCAs)
		}
	}
	tc := tls.Client(NewGather(nc), conf)
	return tc, tc.HandshakeContext(ctx)
}

const (
	pinPrefix = "sha256-raw:"
	// metaPrefix starts the common name of the extra certificate in which a
	// relay announces its key; it plays no part in verification.
	metaPrefix = "derpkey"
)

// checkPin demands that the chain holds exactly one certificate apart from
// meta certificates, that it is the one whose private key the handshake
// proved, and that its hash is want. Dates and names play no part: the pin
// names this very certificate, and comes from the control server.
func checkPin(chain []*x509.Certificate, want [sha256.Size]byte) error {
	real := 0
	for _, c := range chain {
		if !strings.HasPrefix(c.Subject.CommonName, metaPrefix) {
			real++
		}
	}
	if real != 1 {
		return fmt.Errorf("%w: %d certificates presented, want one", ErrPin, real)
	}
	// A meta certificate in front would let its owner present the pinned
	// certificate, which is public, behind it.
	if strings.HasPrefix(chain[0].Subject.CommonName, metaPrefix) {
		return fmt.Errorf("%w: not presented first", ErrPin)
	}
	if got := sha256.Sum256(chain[0].Raw); got != want {
		return fmt.Errorf("%w: presented %s%x, want %s%x", ErrPin, pinPrefix, got, pinPrefix, want)
	}
	return nil
}

func verifyChain(chain []*x509.Certificate, name string, roots *x509.CertPool) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	opts := x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

// maxResponse bounds the HTTP response to the upgrade.
const maxResponse = 16 << 10

// upgrade asks for the protocol and returns the bytes that came behind the
// response.
func upgrade(nc net.Conn, host string) (early []byte, err error) {
	_, err = fmt.Fprintf(nc, "GET /derp HTTP/1.1\r\nHost: %s\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n", host)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 0, maxResponse)
	for {
		n, err := nc.Read(buf[len(buf):cap(buf)])
		from := max(0, len(buf)-3)
		buf = buf[:len(buf)+n]
		if i := bytes.Index(buf[from:], []byte("\r\n\r\n")); i >= 0 {
			head := from + i + 4
			return buf[head:], checkResponse(buf[:head])
		}
		if len(buf) == cap(buf) {
			return nil, fmt.Errorf("%w: response too long", ErrProtocol)
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
}

func checkResponse(head []byte) error {
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), nil)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("unexpected answer %q", resp.Status)
	}
	if !strings.EqualFold(resp.Header.Get("Upgrade"), "DERP") {
		return fmt.Errorf("%w: upgrade to %q", ErrProtocol, resp.Header.Get("Upgrade"))
	}
	return nil
}
