package control

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"go.uber.org/zap"

	"mesh/control/noise"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
)

const (
	// dialTime bounds getting a connection: key, TCP, TLS and handshake.
	dialTime = 15 * time.Second
	// dialTimeEach is the same where there is another place to go to.
	dialTimeEach = 5 * time.Second
	maxKeyBody   = 64 << 10

	// A connection without any frame for pingAfter is asked whether it lives.
	// Keep-alives of the map stream come more often, so an idle node never
	// pings a server that is well.
	pingAfter   = 65 * time.Second
	pingTimeout = 15 * time.Second
)

// dialAny makes a new connection to the place that was used last, or to the next
// that answers. Only the holder of the token in c.dialing calls it.
func (c *Client) dialAny(ctx context.Context) (*http.ClientConn, error) {
	var errs []error
	for range c.places {
		conn, err := c.dial(ctx)
		if err == nil || len(c.places) == 1 || ctx.Err() != nil {
			return conn, err
		}
		c.log.Info("this place of the control server does not answer: trying the next", zap.String("url", c.here().base), zap.Error(err))
		errs = append(errs, err)
		c.move()
	}
	return nil, errors.Join(errs...)
}

// dial makes a new connection. Only the holder of the token in c.dialing calls
// it.
func (c *Client) dial(ctx context.Context) (*http.ClientConn, error) {
	limit := dialTime
	if len(c.places) > 1 {
		limit = dialTimeEach
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, &UnreachableError{c.base, fmt.Errorf("no connection to %s within %v", c.here().addr, limit)})
	defer cancel()
	nc, err := c.dialNoise(ctx)
	if err != nil {
		return nil, c.because(ctx, err)
	}
	t := &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return nc, nil },
		Protocols:              new(http.Protocols),
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxKeyBody,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout, WriteByteTimeout: pingTimeout},
	}
	t.Protocols.SetUnencryptedHTTP2(true)
	conn, err := t.NewClientConn(ctx, "http", c.here().addr)
	if err != nil {
		nc.Close()
		return nil, c.unreachable(ctx, fmt.Errorf("start HTTP/2: %w", err))
	}
	return conn, nil
}

// dialNoise does the handshake with the key that is known, or the one that the
// server tells.
func (c *Client) dialNoise(ctx context.Context) (*noise.Conn, error) {
	fresh := c.serverKey.IsZero()
	if fresh {
		key, err := c.fetchKey(ctx)
		if err != nil {
			return nil, err
		}
		if c.here().url.Scheme == "http" {
			c.log.Info("control server is reached over plain HTTP and its key is not pinned: whoever is in between can pose as the server",
				zap.String("url", c.here().base), zap.String("key", key.String()))
		}
		c.serverKey = key
	}
	nc, err := c.handshake(ctx)
	if err == nil {
		return nc, nil
	}
	mismatch := errors.Is(err, noise.ErrServerKey)
	if !mismatch && !errors.Is(err, noise.ErrClosed) || fresh {
		return nil, c.noiseError(ctx, err)
	}
	key, keyErr := c.fetchKey(ctx)
	switch {
	case !c.cfg.ServerKey.IsZero():
		// Servers that cannot read a handshake may also just close.
		if key != c.serverKey && (mismatch || keyErr == nil) {
			return nil, &ServerKeyError{Pinned: c.serverKey, Got: key}
		}
	case keyErr == nil && key != c.serverKey:
		c.log.Warn("control server has a new key", zap.String("old", c.serverKey.Short()), zap.String("new", key.Short()))
		c.serverKey = key
		if nc, err = c.handshake(ctx); err == nil {
			return nc, nil
		}
	}
	return nil, c.noiseError(ctx, err)
}

// noiseError sorts what may go wrong in a handshake.
func (c *Client) noiseError(ctx context.Context, err error) error {
	var up *noise.UpgradeError
	if errors.As(err, &up) {
		return &StatusError{Status: up.StatusCode, Text: up.Text, RetryAfter: backoff.RetryAfter(up.RetryAfter, time.Now())}
	}
	if errors.Is(err, noise.ErrClosed) {
		err = fmt.Errorf("%w: is it too new for this client (version %d), or behind a proxy?", err, wire.CapabilityVersion)
	}
	return c.unreachable(ctx, err)
}

func (c *Client) handshake(ctx context.Context) (*noise.Conn, error) {
	return noise.Dial(ctx, noise.ClientConfig{
		Dial:      c.dialTransport,
		Host:      c.here().host,
		Machine:   c.cfg.Machine,
		ServerKey: c.serverKey,
		Version:   wire.CapabilityVersion,
	})
}

// dialTransport opens what the handshake runs over. The handshake proves a
// pinned key, so that no certificate is needed then.
func (c *Client) dialTransport(ctx context.Context) (net.Conn, error) {
	conn, err := c.cfg.Dial(ctx, "tcp", c.here().addr)
	if err != nil || c.here().url.Scheme == "http" {
		return conn, err
	}
	cfg := c.tlsConfig()
	cfg.InsecureSkipVerify = !c.cfg.ServerKey.IsZero()
	tc := tls.Client(conn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("TLS with %s: %w", c.here().addr, err)
	}
	return tc, nil
}

// fetchKey asks the server for its key.
func (c *Client) fetchKey(ctx context.Context) (identity.MachinePublic, error) {
	var none identity.MachinePublic
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/key?v=%d", c.here().base, wire.CapabilityVersion), nil)
	if err != nil {
		return none, err
	}
	resp, done, err := c.plain(req)
	if err != nil {
		return none, c.unreachable(ctx, err)
	}
	defer done()
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return none, fmt.Errorf("control server %s redirects to %q: set that as the control URL", c.base, resp.Header.Get("Location"))
	case resp.StatusCode != http.StatusOK:
		return none, fmt.Errorf("ask control server for its key: %w", statusError(resp))
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyBody))
	if err != nil {
		return none, c.unreachable(ctx, fmt.Errorf("read the server's key: %w", err))
	}
	var answer wire.KeyAnswer
	if err := json.Unmarshal(b, &answer); err != nil {
		return none, fmt.Errorf("%s is no control server: its answer to /key makes no sense: %w", c.base, err)
	}
	if answer.PublicKey.IsZero() {
		return none, fmt.Errorf("%s is no control server of this protocol: it has no key", c.base)
	}
	return answer.PublicKey, nil
}

// plain sends a request outside the encrypted connection, over a connection of
// its own that ends with done. Redirects are not followed.
func (c *Client) plain(req *http.Request) (resp *http.Response, done func(), err error) {
	t := &http.Transport{
		DialContext: c.cfg.Dial, TLSClientConfig: c.tlsConfig(), DisableKeepAlives: true, DisableCompression: true,
		MaxResponseHeaderBytes: maxKeyBody, Protocols: new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	resp, err = t.RoundTrip(req)
	if err != nil {
		t.CloseIdleConnections()
		return nil, nil, err
	}
	return resp, func() { resp.Body.Close(); t.CloseIdleConnections() }, nil
}
