// Package host runs the servers of a mesh on their sockets: Start is what
// `mesh serve` runs (control plane, relay and STUN in one process), StartRelay
// what `mesh relay` runs.
package host

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/admin"
	"mesh/control/policy"
	"mesh/control/server"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/derp/relay"
	"mesh/identity"
)

const (
	// DefaultListen is where control and relay listen unless told otherwise.
	DefaultListen = "127.0.0.1:8080"
	// DefaultSTUNPort is where STUN listens, on the host of DefaultListen.
	DefaultSTUNPort = 3478
	// SocketName is the unix socket for administrators, in the data directory.
	SocketName = "mesh.sock"

	databaseName   = "mesh.db"
	embeddedRegion = 900
	// replicaRegion and a replica's number make the region of its embedded
	// relay; the first replica has the one that a server alone has.
	replicaRegion = 64900
)

// Config says what Start starts. The zero value, with DataDir set, is usable.
type Config struct {
	DataDir string // database, keys and the administrators' socket; made if missing
	// Database is the URL of a PostgreSQL database to use instead of a file in
	// DataDir, "" = the file. Several hosts may use the same one.
	Database string
	Listen   string // TCP address of control and relay; "" = DefaultListen
	STUN     string // UDP address of STUN; "" = Listen's host and DefaultSTUNPort, "off" = none
	// URL is how nodes reach Listen; "" is derived from Listen.
	URL        string
	Domain     string // suffix of the nodes' names; "" = "mesh.internal"
	PolicyFile string // policy to put in force if it differs; "" = the stored one
	// NodeExpiry is how long the keys of users' nodes live; 0 = 90 days,
	// negative = they never expire. Keys of nodes with tags do not expire.
	NodeExpiry time.Duration
	NoRelay    bool // run no relay; another must announce itself
	RelayRate  int  // most bytes a second that one node may send through the relay; 0 = no limit
	// Drain is how long Close serves nodes on while they move to another relay,
	// if one is connected; it ends as soon as they have. 0 = not at all.
	Drain time.Duration
	// TLSCert and TLSKey are PEM files. With them everything is TLS; without,
	// control is plain HTTP (the protocol inside is encrypted) and the relay
	// has a certificate of its own, which nodes pin.
	// The files are read again when they change.
	TLSCert, TLSKey string
	// ACME gets certificates from an authority instead.
	ACME ACME
	// Metrics is the TCP address where /metrics, /healthz and /readyz are
	// answered, in plain HTTP and to everybody who reaches it; "" = nowhere.
	Metrics string
	// Pprof opens a unix socket in DataDir (PprofName) for profiles.
	Pprof  bool
	Logger *zap.Logger // nil = silent

	// OfflineGrace and EphemeralTimeout are server.Config's, for tests.
	OfflineGrace, EphemeralTimeout time.Duration
}

// Host is a running set of servers.
type Host struct {
	cfg    Config
	log    *zap.Logger
	addr   string
	url    string
	stun   string // "" = none
	region int    // of the embedded relay
	socket string
	// metrics is where they are served, "" = nowhere
	metrics string
	store   store.Store
	server  *server.Server
	relay   *relay.Server // nil with NoRelay

	closers  []func() // in order of starting; Close runs them in reverse
	wg       sync.WaitGroup
	failed   chan error // the first listener that broke; buffered
	closing  chan struct{}
	shutdown sync.Once
}

// Start opens the data directory, starts the servers and returns when they
// accept connections.
func Start(cfg Config) (_ *Host, err error) {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Listen == "" {
		cfg.Listen = DefaultListen
	}
	h := &Host{cfg: cfg, log: cfg.Logger, region: embeddedRegion, failed: make(chan error, 1), closing: make(chan struct{})}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if cfg.DataDir == "" {
		return nil, errors.New("no data directory")
	}
	if err := makeDataDir(cfg.DataDir); err != nil {
		return nil, err
	}
	if h.socket, err = socketPath(cfg.DataDir, SocketName); err != nil {
		return nil, err
	}
	if err := h.openStore(); err != nil {
		return nil, err
	}
	h.onClose(func() { h.store.Close() })
	h.watchRecord()

	ln, err := listen(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen for nodes: %w; choose another address with --listen", err)
	}
	h.onClose(func() { ln.Close() })
	h.addr = ln.Addr().String()
	if len(cfg.ACME.Domains) > 0 && cfg.URL == "" {
		cfg.URL = "https://" + cfg.ACME.Domains[0]
	}
	if h.url, err = publicURL(cfg.URL, ln.Addr(), cfg.allTLS()); err != nil {
		return nil, err
	}
	var stun *stunServer
	if cfg.STUN != "off" && !cfg.NoRelay {
		if stun, err = startSTUN(cfg.STUN, cfg.Listen, h.log, func(err error) { h.fail("", err) }); err != nil {
			return nil, err
		}
		h.onClose(stun.close)
		h.stun = stun.pc.LocalAddr().String()
	}
	tlsConf, region, err := h.makeRelay(stun.port())
	if err != nil {
		return nil, err
	}
	derpMap := &wire.DERPMap{OmitDefaultRegions: true, Regions: map[int]*wire.DERPRegion{}}
	if region != nil {
		derpMap.Regions[region.RegionID] = region
	}
	// First, so that the server starts with it: it says so if there is none.
	if err := h.loadPolicy(); err != nil {
		return nil, err
	}
	h.server, err = server.New(server.Config{
		Store:            h.store,
		Domain:           cfg.Domain,
		BaseURL:          h.url,
		DERPMap:          derpMap,
		KeyExpiry:        cfg.NodeExpiry,
		OfflineGrace:     cfg.OfflineGrace,
		EphemeralTimeout: cfg.EphemeralTimeout,
		OnReplaced:       func(err error) { h.fail("replica", err) },
		Logger:           cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	h.onClose(func() { h.server.Close() })
	if h.relay != nil {
		cancel := h.server.Subscribe(func(_, removed []identity.NodePublic) { h.relay.Revoke(removed...) })
		h.onClose(cancel)
	}
	h.serve(ln, tlsConf)
	for _, serve := range []func() error{h.serveMetrics, h.servePprof, h.serveAdmin} {
		if err := serve(); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// openStore opens the database, and makes sure that nobody else serves this data
// directory.
func (h *Host) openStore() (err error) {
	ctx := context.Background()
	file := filepath.Join(h.cfg.DataDir, databaseName)
	if h.cfg.Database == "" {
		h.store, err = store.OpenSQLite(ctx, file)
		return err
	}
	lock, err := store.Lock(file + ".lock") // the one that the file would have
	if err != nil {
		return fmt.Errorf("data directory %s: %w", h.cfg.DataDir, err)
	}
	h.onClose(func() { lock.Close() })
	files, err := openFiles(h.cfg.DataDir)
	if err != nil {
		return err
	}
	defer files.Close()
	pg, err := store.OpenPostgres(ctx, h.cfg.Database)
	if err != nil {
		return err
	}
	h.store = pg
	number, err := joinReplicas(ctx, pg, files, h.log)
	if err != nil {
		pg.Close()
		return err
	}
	if number > 0 {
		h.region = replicaRegion + number
	}
	return nil
}

// replicaFile has the name that the other replicas of a database know a data
// directory by.
const replicaFile = "replica.id"

// joinReplicas makes the server a replica and returns its number among them. It
// takes another name if the data directory is a copy of one that is in use.
func joinReplicas(ctx context.Context, pg *store.Postgres, files *identity.FileStore, log *zap.Logger) (int, error) {
	name, err := files.Read(replicaFile)
	if errors.Is(err, fs.ErrNotExist) {
		name, err = newReplicaName(files)
	}
	if err != nil {
		return 0, fmt.Errorf("name among the replicas: %w", err)
	}
	number, err := pg.Join(ctx, string(name))
	if !errors.Is(err, store.ErrLocked) {
		return number, err
	}
	log.Warn("the data directory is a copy of that of a replica that lives: this one takes another name", zap.Error(err))
	if name, err = newReplicaName(files); err != nil {
		return 0, fmt.Errorf("name among the replicas: %w", err)
	}
	return pg.Join(ctx, string(name))
}

func newReplicaName(files *identity.FileStore) ([]byte, error) {
	name := []byte(rand.Text())
	return name, files.Write(replicaFile, name)
}

// URL is how nodes reach the control server.
func (h *Host) URL() string { return h.url }

// Addr is the TCP address that control and relay listen on.
func (h *Host) Addr() string { return h.addr }

// STUNAddr is the UDP address that STUN listens on, "" if it is off.
func (h *Host) STUNAddr() string { return h.stun }

// Key is the control server's key, which nodes may pin.
func (h *Host) Key() identity.MachinePublic { return h.server.Key() }

// Socket is the path of the administrators' unix socket.
func (h *Host) Socket() string { return h.socket }

// Server is the coordination server.
func (h *Host) Server() *server.Server { return h.server }

// Failed gives an error when a listener broke by itself.
func (h *Host) Failed() <-chan error { return h.failed }

func (h *Host) onClose(f func()) { h.closers = append(h.closers, f) }

// Close ends all connections and waits until nothing is left running.
func (h *Host) Close() error {
	h.shutdown.Do(func() {
		close(h.closing)
		h.drainRelay()
		h.endStreams()
		for i := len(h.closers) - 1; i >= 0; i-- {
			h.closers[i]()
		}
		h.wg.Wait()
	})
	return nil
}

// endTime is how long requests that are being served have to be answered.
const endTime = 5 * time.Second

// endStreams tells nodes when to come back and lets requests end.
func (h *Host) endStreams() {
	if h.server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	if err := h.server.Shutdown(ctx); err != nil {
		h.log.Info("requests are cut short", zap.Error(err))
	}
}

// fail notes the first listener that broke while nobody was closing.
func (h *Host) fail(what string, err error) {
	select {
	case <-h.closing:
		return
	default:
	}
	if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, http.ErrServerClosed) {
		return
	}
	if what != "" {
		err = fmt.Errorf("%s: %w", what, err)
	}
	select {
	case h.failed <- err:
	default:
	}
}

// loadPolicy stores the policy file as the newest policy unless it already is.
func (h *Host) loadPolicy() error {
	if h.cfg.PolicyFile == "" {
		return nil
	}
	text, err := readLimited(h.cfg.PolicyFile, admin.MaxPolicy)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	if _, err := policy.Parse(text); err != nil {
		return fmt.Errorf("policy %s: %w", h.cfg.PolicyFile, err)
	}
	ctx := context.Background()
	if p, err := h.store.Policy(ctx); err == nil && p.Text == string(text) {
		return nil
	}
	if _, err := h.store.SetPolicy(ctx, "file "+h.cfg.PolicyFile, string(text), "", -1, time.Now()); err != nil {
		return fmt.Errorf("policy %s: %w", h.cfg.PolicyFile, err)
	}
	return nil
}

func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return b, nil
}

// serve answers on the one TCP port. With certificate files everything is TLS
// and told apart by path; without, the first byte tells TLS, which is for the
// relay, from plain HTTP, which is for control.
func (h *Host) serve(ln net.Listener, tlsConf *tls.Config) {
	control := h.server.Handler()
	if h.cfg.allTLS() {
		mux := http.NewServeMux()
		mux.Handle("/", control)
		if h.relay != nil {
			relayHandler := h.relay.Handler()
			for _, p := range []string{"/derp", "/derp/", "/generate_204"} {
				mux.Handle(p, relayHandler)
			}
		}
		h.serveHTTP("control", relay.TLSListener(ln, tlsConf), mux)
		return
	}
	s := newSplitter(ln)
	h.wg.Go(func() { h.fail("accept connections", s.run()) })
	h.onClose(s.Close)
	h.serveHTTP("control", s.plain, control)
	if h.relay == nil {
		s.tls.Close()
		return
	}
	h.wg.Go(func() { h.fail("relay", h.relay.Serve(s.tls, tlsConf)) })
}

func (h *Host) serveHTTP(what string, ln net.Listener, handler http.Handler) {
	srv := server.HTTPServer(handler)
	// Strangers' mistakes are not worth more than debug level.
	srv.ErrorLog = log.New(debugWriter{h.log}, "", 0)
	h.wg.Go(func() { h.fail(what, srv.Serve(ln)) })
	h.onClose(func() { srv.Close() })
}

type debugWriter struct{ log *zap.Logger }

func (w debugWriter) Write(b []byte) (int, error) {
	w.log.Debug("http server", zap.ByteString("text", b))
	return len(b), nil
}

// publicURL is how nodes reach the listener at addr.
func publicURL(given string, addr net.Addr, tls bool) (string, error) {
	if given != "" {
		u, err := url.Parse(given)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "", fmt.Errorf("URL %q: want http://HOST[:PORT] or https://HOST[:PORT]", given)
		}
		return u.Scheme + "://" + u.Host, nil
	}
	ap := addr.(*net.TCPAddr).AddrPort()
	ip := ap.Addr().Unmap()
	if ip.IsUnspecified() {
		return "", fmt.Errorf("nodes need a URL: listening on all addresses (%s) does not say which one they reach; give --url", addr)
	}
	scheme := "http"
	if tls {
		scheme = "https"
	}
	return scheme + "://" + netip.AddrPortFrom(ip, ap.Port()).String(), nil
}

// hostOf returns host and port of a URL made by publicURL.
func hostOf(public string) (host string, port int) {
	u, err := url.Parse(public)
	if err != nil {
		return "", 0
	}
	port, _ = strconv.Atoi(u.Port())
	if port == 0 {
		port = map[string]int{"http": 80, "https": 443}[u.Scheme]
	}
	return u.Hostname(), port
}
