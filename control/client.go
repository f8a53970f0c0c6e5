package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/backoff"
)

// requestTime bounds what is no stream: one request with its answer.
const requestTime = 60 * time.Second

// Config says which control server to talk to, and as whom.
type Config struct {
	// URL of the control server, http://host[:port] or https://host[:port];
	// required. Of a server that runs as several replicas it may be a list with
	// commas: the client uses one of them until that fails, then another.
	URL string
	// ServerKey pins the server's key. Zero: believe what it says itself, at
	// /key, which is as safe as the web PKI for https, and not for http.
	ServerKey identity.MachinePublic
	// Machine is the key of this installation; required.
	Machine identity.MachinePrivate
	// Instance names this process to the control server, so that it can tell
	// copies of one identity apart: letters and digits, 32 at most. Optional.
	Instance string
	// Dial opens TCP connections; nil = a net.Dialer. Proxy variables of the
	// environment do not count.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// TLSRootCAs are whom to believe for https; nil = the system's.
	TLSRootCAs *x509.CertPool
	// Logger gets what an operator might want to know; nil = silence.
	Logger *zap.Logger
}

// Client talks to one control server. It is safe for concurrent use.
type Client struct {
	cfg  Config
	base string // URL without trailing slash, or all of them with commas
	log  *zap.Logger

	life context.Context // ends at Close
	end  context.CancelCauseFunc

	places []place
	at     atomic.Pointer[place] // of places, never nil

	dialing chan struct{} // holds one token: whoever takes it may dial, and use turn and serverKey
	turn    int           // index of at

	serverKey identity.MachinePublic // of the server as far as known

	heard atomic.Pointer[time.Time] // see LastHeard; nil = never

	mu     sync.Mutex // guards conn
	conn   *http.ClientConn
	closed bool
}

// New returns a client for a control server. It does no I/O. Its errors say
// what is wrong with cfg.
func New(cfg Config) (*Client, error) {
	places, err := parsePlaces(cfg.URL)
	if err != nil {
		return nil, err
	}
	if cfg.Machine.IsZero() {
		return nil, errors.New("control client: no machine key")
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	c := &Client{
		cfg: cfg, places: places, serverKey: cfg.ServerKey, log: cfg.Logger, dialing: make(chan struct{}, 1),
	}
	var bases []string
	for _, p := range places {
		bases = append(bases, p.base)
	}
	c.base = strings.Join(bases, ",")
	c.start()
	if c.log == nil {
		c.log = zap.NewNop()
	}
	c.life, c.end = context.WithCancelCause(context.Background())
	return c, nil
}

func parseURL(s string) (*url.URL, error) {
	const want = "want http://host[:port] or https://host[:port]"
	if s == "" {
		return nil, errors.New("no control URL is set: " + want)
	}
	u, err := url.Parse(s)
	if err != nil {
		// Not err itself: it would repeat a password in the URL.
		return nil, fmt.Errorf("control URL cannot be read: %s", want)
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("control URL %q: scheme %q: %s", u.Redacted(), u.Scheme, want)
	case u.Hostname() == "":
		return nil, fmt.Errorf("control URL %q: no host: %s", u.Redacted(), want)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("control URL %q: user, query and fragment have no meaning here: %s", u.Redacted(), want)
	}
	return u, nil
}

// URL returns the control server's URL.
func (c *Client) URL() string { return c.base }

// Proven returns ErrUnproven if whoever sits between could pose as the control
// server. Who cares asks it before anything else: the client itself goes on.
func (c *Client) Proven() error {
	unproven := func(p place) bool { return p.url.Scheme != "https" && !p.local() }
	if !c.cfg.ServerKey.IsZero() || !slices.ContainsFunc(c.places, unproven) {
		return nil
	}
	return fmt.Errorf("control server %s: %w", c.base, ErrUnproven)
}

// LastHeard returns when a map stream last brought something, be it that there is
// nothing new, or its connection answered Session.Ask; zero = never.
func (c *Client) LastHeard() time.Time {
	if t := c.heard.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

func (c *Client) noteHeard() {
	now := time.Now()
	c.heard.Store(&now)
}

// Local reports whether the control server's URL names this host.
func (c *Client) Local() bool {
	return !slices.ContainsFunc(c.places, func(p place) bool { return !p.local() })
}

// Close ends all that goes on, which fails with ErrClosed, and closes the
// connection. It may be called at any time, and again.
func (c *Client) Close() error {
	c.end(ErrClosed)
	c.mu.Lock()
	conn := c.conn
	c.conn, c.closed = nil, true
	c.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
	return nil
}

// during returns a context that also ends with the client, and after limit
// unless that is 0.
func (c *Client) during(ctx context.Context, limit time.Duration) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.life, func() { cancel(ErrClosed) })
	var timer *time.Timer
	if limit > 0 {
		timer = time.AfterFunc(limit, func() { cancel(&UnreachableError{c.base, fmt.Errorf("no answer within %v", limit)}) })
	}
	return ctx, func(cause error) {
		stop()
		if timer != nil {
			timer.Stop()
		}
		cancel(cause)
	}
}

// connect returns the connection, dialling it if there is none that works.
func (c *Client) connect(ctx context.Context) (*http.ClientConn, error) {
	if conn := c.current(); conn != nil {
		return conn, nil
	}
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, c.because(ctx, ctx.Err())
	}
	if conn := c.current(); conn != nil { // another dialled meanwhile
		return conn, nil
	}
	conn, err := c.dialAny(ctx)
	if err != nil {
		return nil, c.because(ctx, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		conn.Close()
		return nil, ErrClosed
	}
	c.conn = conn
	return conn, nil
}

// current returns the connection if it works and takes another request.
func (c *Client) current() *http.ClientConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.conn == nil:
	case c.conn.Err() != nil:
		c.conn = nil
	case c.conn.Available() == 0:
		// The server asked for no more requests, as it does when it is about
		// to restart. What goes on over the connection goes on.
		outlive(c.conn)
		c.conn = nil
	}
	return c.conn
}

// outlive closes a connection when the last of its requests is over.
func outlive(conn *http.ClientConn) {
	over := func(conn *http.ClientConn) {
		if conn.InFlight() == 0 {
			conn.Close()
		}
	}
	conn.SetStateHook(over)
	over(conn)
}

// drop closes a connection that has proven to be dead.
func (c *Client) drop(conn *http.ClientConn) {
	c.mu.Lock()
	if c.conn == conn {
		c.conn = nil
	}
	c.mu.Unlock()
	conn.Close()
}

// post sends body as JSON to a path inside the encrypted connection, and
// returns an answer of status 200; anything else is an error.
func (c *Client) post(ctx context.Context, path string, body any) (*http.Response, *http.ClientConn, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, nil, err
	}
	if len(b) > wire.MaxRequestBody {
		return nil, nil, fmt.Errorf("request of %d bytes is too long", len(b))
	}
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.here().host+path, bytes.NewReader(b))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := conn.RoundTrip(req)
	if err != nil {
		if ctx.Err() == nil {
			c.drop(conn)
			err = fmt.Errorf("connection lost: %w", err)
		}
		return nil, conn, c.unreachable(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, conn, statusError(resp)
	}
	return resp, conn, nil
}

func statusError(resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	e := &StatusError{
		Status: resp.StatusCode, Text: string(bytes.TrimSpace(text)),
		RetryAfter: backoff.RetryAfter(resp.Header.Get("Retry-After"), time.Now()),
	}
	if code := wire.ErrorCode(resp.Header.Get(wire.ErrorHeader)); code.Err() != nil {
		e.Code = code
	}
	return e
}

// exchange is post with the whole answer decoded into answer, nil = discarded.
func (c *Client) exchange(ctx context.Context, path string, body, answer any) error {
	resp, _, err := c.post(ctx, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxResponseBody+1))
	if err != nil {
		return c.unreachable(ctx, fmt.Errorf("read answer: %w", err))
	}
	if answer == nil {
		return nil
	}
	if len(b) > wire.MaxResponseBody {
		return errors.New("answer is too long")
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("answer makes no sense: %w", err)
	}
	return nil
}

// tlsConfig is for HTTP/1.1 over TLS to the control server.
func (c *Client) tlsConfig() *tls.Config {
	return &tls.Config{
		ServerName: c.here().url.Hostname(), RootCAs: c.cfg.TLSRootCAs, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
	}
}
