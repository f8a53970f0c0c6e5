package server

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	stdlog "log"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"mesh/control/noise"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// transport takes Noise connections from the outer HTTP server and serves
// HTTP/2 inside them.
type transport struct {
	s          *Server
	inner      *http.Server
	conns      chan net.Conn // accepted by inner
	done       chan struct{}
	handshakes chan struct{} // one token per handshake under way
	unknown    *Places       // one for each connection without a known node

	mu      sync.Mutex // guards the members below
	closing bool
	wg      sync.WaitGroup // connections, requests, and inner's Serve
	serving int            // requests
	quiet   chan struct{}  // closed when serving gets 0; nil = nobody waits
}

// client is one Noise connection. It is reached through the context of its
// requests.
type client struct {
	net.Conn
	machine identity.MachinePublic
	version int
	source  netip.Addr // of the outer connection
	closed  sync.Once
	leave   func() // gives back what the connection holds; called once
	known   func() // a request showed that the machine has a node
	member  atomic.Bool
}

type clientKey struct{}

// Close ends the connection.
func (c *client) Close() error {
	err := c.Conn.Close()
	c.closed.Do(c.leave)
	return err
}

func (t *transport) start(s *Server) {
	t.s = s
	t.conns = make(chan net.Conn)
	t.done = make(chan struct{})
	t.handshakes = make(chan struct{}, s.cfg.MaxHandshakes)
	t.unknown = NewPlaces(s.cfg.MaxUnknown, max(1, s.cfg.MaxUnknown/2))
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	t.inner = &http.Server{
		Handler:        http.HandlerFunc(t.serveInner),
		Protocols:      p,
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 16 << 10,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          16,
			MaxReceiveBufferPerConnection: 1 << 20,
			MaxReceiveBufferPerStream:     256 << 10,
			// A connection that is silent for so long is asked whether it lives:
			// rarely, for ten thousand idle ones are to cost next to nothing.
			SendPingTimeout: 60 * time.Second,
			PingTimeout:     15 * time.Second,
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, clientKey{}, c)
		},
		ErrorLog: stdlog.New(io.Discard, "", 0),
	}
	t.wg.Go(func() { t.inner.Serve(t) })
}

// Accept, Close and Addr make transport the listener of the inner server.
func (t *transport) Accept() (net.Conn, error) {
	select {
	case c := <-t.conns:
		return c, nil
	case <-t.done:
		return nil, net.ErrClosed
	}
}

// Close is called by the inner server; there is nothing of its own to close.
func (t *transport) Close() error { return nil }

// Addr names the inner listener.
func (t *transport) Addr() net.Addr { return &net.UnixAddr{Name: "ts2021", Net: "unix"} }

// enter counts one more connection or request, unless the server is closing.
func (t *transport) enter() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing {
		return false
	}
	t.wg.Add(1)
	return true
}

func (t *transport) isClosing() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.closing
}

// refuseNew turns away connections and requests from now on.
func (t *transport) refuseNew() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closing = true
}

// request counts one more request that is served, unless the server is closing;
// it is over when done is called.
func (t *transport) request() (done func(), ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing {
		return nil, false
	}
	t.serving++
	t.wg.Add(1)
	return func() {
		t.mu.Lock()
		if t.serving--; t.serving == 0 && t.quiet != nil {
			close(t.quiet)
			t.quiet = nil
		}
		t.mu.Unlock()
		t.wg.Done()
	}, true
}

// idle waits until no request is served, once refuseNew was called.
func (t *transport) idle(ctx context.Context) error {
	t.mu.Lock()
	if t.serving == 0 {
		t.mu.Unlock()
		return nil
	}
	if t.quiet == nil {
		t.quiet = make(chan struct{})
	}
	quiet := t.quiet
	t.mu.Unlock()
	select {
	case <-quiet:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *transport) close() {
	t.refuseNew()
	close(t.done)
	t.inner.Close()
	t.wg.Wait()
}

// Handler returns what the world may reach: GET /key, POST /ts2021, GET
// /login/CODE, GET /health, and what HealthHandler answers. It must be served over HTTP/1.1; see HTTPServer.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /key", s.serveKey)
	mux.HandleFunc("/ts2021", s.transport.serveUpgrade)
	mux.HandleFunc("GET /login/{code}", s.serveLogin)
	health := s.HealthHandler()
	mux.Handle("GET /healthz", health)
	mux.Handle("GET /readyz", health)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "pass"})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.requests.take(addrOf(r.RemoteAddr)) {
			s.meters.denied(atPublic, nil, denyRate)
			tooMany(w, 1)
			return
		}
		// None of these has a body: one that is announced is not read.
		r.Body = http.MaxBytesReader(w, r.Body, 0)
		mux.ServeHTTP(w, r)
	})
}

func (s *Server) serveKey(w http.ResponseWriter, r *http.Request) {
	v, err := strconv.Atoi(r.URL.Query().Get("v"))
	if err != nil || v < 1 {
		http.Error(w, "the v parameter must be a capability version", http.StatusBadRequest)
		return
	}
	if v < wire.MinCapabilityVersion {
		refuse(w, wire.ErrVersionTooOld)
		return
	}
	writeJSON(w, http.StatusOK, wire.KeyAnswer{PublicKey: s.Key()})
}

// turnPatience is how long a connection waits for its turn: all nodes come back
// at once after a restart, and who is sent away then comes again, and again.
const turnPatience = 5 * time.Second

// takeTurn waits for a token of handshakes, and reports whether it got one. How
// many wait is bounded by the places for strangers.
func (t *transport) takeTurn(ctx context.Context) bool {
	over := time.NewTimer(turnPatience)
	defer over.Stop()
	select {
	case t.handshakes <- struct{}{}:
		return true
	case <-over.C:
	case <-ctx.Done():
	case <-t.done:
	}
	return false
}

// serveUpgrade is POST /ts2021.
func (t *transport) serveUpgrade(w http.ResponseWriter, r *http.Request) {
	busy := func() {
		t.s.meters.denied(atUpgrade, nil, denyBusy)
		w.Header().Set("Retry-After", "5")
		http.Error(w, "server is busy", http.StatusServiceUnavailable)
	}
	// Given back when the machine turns out to have a node, or leaves.
	release, ok := t.unknown.enter(addrOf(r.RemoteAddr))
	if !ok {
		busy()
		return
	}
	if !t.enter() {
		release()
		busy()
		return
	}
	if !t.takeTurn(r.Context()) {
		release()
		t.wg.Done()
		busy()
		return
	}
	conn, err := noise.Accept(w, r, t.s.key, noise.AcceptOptions{})
	<-t.handshakes
	if err != nil {
		release()
		t.wg.Done()
		t.s.log.Debug("control handshake failed", zap.String("from", r.RemoteAddr), zap.Error(err))
		return
	}
	c := &client{Conn: conn, machine: conn.Peer(), version: conn.Version(), source: addrOf(r.RemoteAddr)}
	c.known = func() {
		release()
		c.member.Store(true)
	}
	c.leave = func() {
		release()
		t.wg.Done()
	}
	// The inner server takes the deadline off when HTTP/2 begins.
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	select {
	case t.conns <- c:
	case <-t.done:
		c.Close()
	}
}

// serveInner handles the requests inside a Noise connection.
func (t *transport) serveInner(w http.ResponseWriter, r *http.Request) {
	c, ok := r.Context().Value(clientKey{}).(*client)
	var done func()
	if ok {
		done, ok = t.request()
	}
	if !ok {
		http.Error(w, "server is closing", http.StatusServiceUnavailable)
		return
	}
	defer done()
	if !c.member.Load() && !t.s.requests.take(c.source) {
		t.s.meters.denied(atMachine, nil, denyRate)
		tooMany(w, 1)
		return
	}
	// Closing the server ends the request whatever it waits for.
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(t.s.ctx, cancel)()
	if c.source.IsValid() {
		ctx = store.WithSource(ctx, c.source.String())
	}
	t.s.serveMachine(w, r.WithContext(ctx), c)
}

// serveMachine is the table of what a machine can ask for.
func (s *Server) serveMachine(w http.ResponseWriter, r *http.Request, c *client) {
	var f func(http.ResponseWriter, *http.Request, *client)
	switch r.URL.Path {
	case "/machine/register":
		f = s.serveRegister
	case "/machine/map":
		f = s.serveMap
	case "/machine/relay":
		f = s.serveRelay
	case "/machine/set-dns", "/machine/feature/query", "/machine/id-token", "/machine/audit-log",
		"/machine/set-device-attr", "/machine/update-health":
		http.Error(w, "this server has no such feature", http.StatusNotImplemented)
		return
	default:
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST only", http.StatusMethodNotAllowed)
		return
	}
	f(w, r, c)
}

// readJSON reads a request body in bounded time and space. It has answered if
// it returns false.
func readJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(20 * time.Second))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxRequestBody))
	var tooBig *http.MaxBytesError
	switch {
	case errors.As(err, &tooBig):
		http.Error(w, "request is too long", http.StatusRequestEntityTooLarge)
		return false
	case err != nil:
		http.Error(w, "could not read the request", http.StatusBadRequest)
		return false
	}
	rc.SetReadDeadline(time.Time{})
	if err := json.Unmarshal(body, v); err != nil {
		http.Error(w, "request is not what it should be", http.StatusBadRequest)
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", mime.FormatMediaType("application/json", nil))
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

// refuse answers a request with the HTTP form of a typed refusal.
func refuse(w http.ResponseWriter, err error) {
	status := http.StatusForbidden
	switch {
	case errors.Is(err, wire.ErrNodeUnknown):
		status = http.StatusNotFound
	case errors.Is(err, wire.ErrVersionTooOld):
		status = http.StatusBadRequest
	case errors.Is(err, wire.ErrNodeKeyExpired), errors.Is(err, wire.ErrNeedsLogin):
		status = http.StatusUnauthorized
	}
	if code := wire.CodeOf(err); code != "" {
		w.Header().Set(wire.ErrorHeader, string(code))
		// The text of the code alone: the chain around it is ours.
		err = code.Err()
	}
	http.Error(w, err.Error(), status)
}

// retryDatabase is the Retry-After of answers while the database is away, in
// seconds.
const retryDatabase = "5"

// broken answers a request that fails for a reason of our own.
func (s *Server) broken(w http.ResponseWriter, what string, err error) {
	if errors.Is(err, store.ErrUnavailable) {
		w.Header().Set("Retry-After", retryDatabase)
		http.Error(w, "the database of the control server cannot be reached; try again", http.StatusServiceUnavailable)
		return
	}
	s.log.Error(what, zap.Error(err))
	http.Error(w, "internal error", http.StatusInternalServerError)
}

// tooMany answers with 429.
func tooMany(w http.ResponseWriter, seconds int) {
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	http.Error(w, "too many requests", http.StatusTooManyRequests)
}

// decodeStrict reads one JSON value without members that v does not have.
func decodeStrict(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the JSON value")
	}
	return nil
}
