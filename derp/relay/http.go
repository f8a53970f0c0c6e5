package relay

import (
	"bufio"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/derp"
)

// Handler returns the HTTP side of the relay: the upgrade at /derp, the
// latency probes /derp/probe and /derp/latency-check, the captive portal
// check /generate_204, and a line of text at /. The server around it must
// speak HTTP/1.1 only (see TLSConfig); Serve is such a server.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/derp", s.serveDERP)
	mux.HandleFunc("/derp/probe", serveProbe)
	mux.HandleFunc("/derp/latency-check", serveProbe)
	mux.HandleFunc("/generate_204", serveNoContent)
	mux.HandleFunc("/robots.txt", serveText("User-agent: *\nDisallow: /\n"))
	mux.HandleFunc("/{$}", serveText("This is a relay of a private network.\n"))
	return mux
}

// Serve accepts connections from ln until Close, with TLS if conf is not nil
// (see TLSConfig). Unlike a server of your own around Handler it counts each
// connection as pending from the moment it is accepted, so that half-open TLS
// handshakes are bounded too. It closes ln and returns nil after Close.
func (s *Server) Serve(ln net.Listener, conf *tls.Config) error {
	defer ln.Close()
	h := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: s.cfg.LoginTimeout, // bounds the TLS handshake, too
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
		// Whatever strangers make it say belongs at debug level.
		ErrorLog:     log.New(logWriter{s.cfg.Logger}, "", 0),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, // no HTTP/2
	}
	// Shutting down waits for the goroutine of each connection; those that
	// are taken over are counted by serveDERP.
	var conns sync.WaitGroup
	h.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			conns.Add(1)
		case http.StateClosed, http.StateHijacked:
			conns.Done()
		}
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.servers[h] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		delete(s.servers, h)
		s.mu.Unlock()
	}()

	var gated net.Listener = gatedListener{ln, s.gate}
	if conf != nil {
		gated = TLSListener(gated, conf)
	}
	err := h.Serve(gated)
	h.Close()
	conns.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("relay: serve %v: %w", ln.Addr(), err)
}

// TLSListener returns a listener for the TLS of a relay: as tls.NewListener
// does, but packets that come in bursts cost fewer system calls. Servers around
// Handler should have it; Serve has it by itself.
func TLSListener(ln net.Listener, conf *tls.Config) net.Listener {
	return tls.NewListener(gatherListener{ln}, conf)
}

// gatherListener prepares connections for TLS whose records go out by batches.
type gatherListener struct{ net.Listener }

func (l gatherListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return derp.NewGather(nc), nil
}

type logWriter struct{ logger *zap.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	w.logger.Debug("relay http", zap.ByteString("message", b))
	return len(b), nil
}

// serveDERP turns the connection over to the protocol.
func (s *Server) serveDERP(w http.ResponseWriter, r *http.Request) {
	if !wantsDERP(r) {
		w.Header().Set("Upgrade", "DERP")
		w.Header().Set("Connection", "Upgrade")
		http.Error(w, "this is a relay: ask for Upgrade: DERP", http.StatusUpgradeRequired)
		return
	}
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	if !s.begin() {
		http.Error(w, ErrClosed.Error(), http.StatusServiceUnavailable)
		return
	}
	defer s.wg.Done()
	fast := r.Header.Get("Derp-Fast-Start") == "1"
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "needs HTTP/1.1", http.StatusHTTPVersionNotSupported)
		return
	}
	// A client that starts fast has sent its first frame already and wants
	// no response.
	if !fast {
		nc.SetDeadline(time.Now().Add(s.cfg.LoginTimeout))
		key := s.pub.Bytes()
		_, err = fmt.Fprintf(nc, "HTTP/1.1 101 Switching Protocols\r\n"+
			"Upgrade: DERP\r\nConnection: Upgrade\r\n"+
			"Derp-Version: 2\r\nDerp-Public-Key: %s\r\n\r\n", hex.EncodeToString(key[:]))
		if err != nil {
			nc.Close()
			return
		}
	}
	// The context of a hijacked request never ends by itself, but that of the
	// server's base context does.
	s.Accept(r.Context(), nc, rw)
}

// wantsDERP reports whether the request asks for the protocol. Clients of old
// say "websocket" and mean it; those that mean real WebSocket name a
// subprotocol, and are not served.
func wantsDERP(r *http.Request) bool {
	switch strings.ToLower(r.Header.Get("Upgrade")) {
	case "derp":
		return true
	case "websocket":
		for _, v := range r.Header.Values("Sec-WebSocket-Protocol") {
			for p := range strings.SplitSeq(v, ",") {
				if strings.EqualFold(strings.TrimSpace(p), "derp") {
					return false
				}
			}
		}
		return true
	}
	return false
}

// takeOver takes what of a connection was read already, and its place in the gate.
func (s *Server) takeOver(nc net.Conn, rw *bufio.ReadWriter) (early []byte, bare net.Conn, pass *ticket, err error) {
	if rw != nil && rw.Reader.Buffered() > 0 {
		early, err = rw.Reader.Peek(rw.Reader.Buffered())
		if err != nil {
			return nil, nc, nil, err
		}
	}
	if g, ok := nc.(*gatedConn); ok {
		// Without TLS: the socket itself can write many buffers at once.
		return early, g.Conn, g.ticket, nil
	}
	if t, ok := nc.(*tls.Conn); ok {
		under := t.NetConn()
		if g, ok := under.(*derp.Gather); ok {
			under = g.NetConn()
		}
		if g, ok := under.(*gatedConn); ok {
			return early, nc, g.ticket, nil
		}
	}
	pass, err = s.gate.enter(sourceOf(nc), func() { nc.Close() })
	return early, nc, pass, err
}

func serveProbe(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		w.Header().Set("Access-Control-Allow-Origin", "*")
	default:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}
}

// challengeHeader and responseHeader are the names that clients of the open
// protocol use to tell this server from a captive portal.
const (
	challengeHeader = "X-Tailscale-Challenge"
	responseHeader  = "X-Tailscale-Response"
	maxChallenge    = 64
)

func serveNoContent(w http.ResponseWriter, r *http.Request) {
	if c := r.Header.Get(challengeHeader); validChallenge(c) {
		w.Header().Set(responseHeader, "response "+c)
	}
	w.Header().Set("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0")
	w.WriteHeader(http.StatusNoContent)
}

func validChallenge(c string) bool {
	if c == "" || len(c) > maxChallenge {
		return false
	}
	for i := range len(c) {
		b := c[i]
		if !('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || strings.IndexByte("._:-", b) >= 0) {
			return false
		}
	}
	return true
}

func serveText(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, text)
	}
}
