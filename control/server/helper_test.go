package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"mesh/control/noise"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
	"mesh/internal/pgserver/pgtest"
)

func TestMain(m *testing.M) {
	// Made here, not in the bubble of whichever test comes first.
	encoder().EncodeAll([]byte("x"), nil)
	decoder.DecodeAll(encoder().EncodeAll([]byte("x"), nil), nil)
	goleak.VerifyTestMain(pgtest.Runner{M: m})
}

// pipes is a listener in memory, for tests under virtual time.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case p.conns <- a:
		return b, nil
	case <-p.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// world is a server on loopback with a real store.
type world struct {
	t     testing.TB
	s     *Server
	store store.Store
	path  string // of the file, or URL of the database
	http  *http.Server
	dial  func(context.Context) (net.Conn, error)
	addr  string // of TCP; "" with pipes
	pipes bool   // a network in memory, for virtual time
	dead  bool   // it was cut off from its store
	done  chan struct{}
}

// bubble runs f under virtual time, with a server whose network is in memory.
func bubble(t *testing.T, change func(*Config), f func(*testing.T, *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, path: filepath.Join(t.TempDir(), "mesh.db"), pipes: true}
		w.start(change)
		t.Cleanup(w.stop)
		f(t, w)
	})
}

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, path: filepath.Join(t.TempDir(), "mesh.db")}
	if os.Getenv("MESH_POSTGRES") != "" { // all of the tests on PostgreSQL, by hand
		w.path = pgtest.Database(t)
	}
	w.start(change)
	t.Cleanup(w.stop)
	return w
}

// openStore opens a file, or a database as a replica of it.
func openStore(place string) (store.Store, error) {
	if !strings.HasPrefix(place, "postgres://") {
		return store.OpenSQLite(context.Background(), place)
	}
	pg, err := store.OpenPostgres(context.Background(), place)
	if err != nil {
		return nil, err
	}
	if _, err := pg.Join(context.Background(), rand.Text()); err != nil {
		pg.Close()
		return nil, err
	}
	return pg, nil
}

func (w *world) start(change func(*Config)) {
	w.t.Helper()
	var err error
	if w.store, err = openStore(w.path); err != nil {
		w.t.Fatal(err)
	}
	cfg := Config{Store: w.store, DERPMap: &wire.DERPMap{Regions: map[int]*wire.DERPRegion{900: {RegionID: 900, Nodes: []*wire.DERPNode{{Name: "900a", RegionID: 900, HostName: "127.0.0.1"}}}}}}
	if change != nil {
		change(&cfg)
	}
	if w.s, err = New(cfg); err != nil {
		w.t.Fatal(err)
	}
	var l net.Listener
	if w.pipes {
		p := newPipes()
		l, w.dial = p, p.dial
	} else {
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			w.t.Fatal(err)
		}
		w.addr = l.Addr().String()
		addr := w.addr
		w.dial = func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", addr) }
	}
	w.http = HTTPServer(w.s.Handler())
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		w.http.Serve(l)
	}()
}

func (w *world) stop() {
	w.http.Close()
	<-w.done
	if err := w.s.Close(); err != nil && !w.dead && !errors.Is(err, context.Canceled) {
		w.t.Error(err)
	}
	w.store.Close()
}

// key creates an auth key and returns its text.
func (w *world) key(k store.Key) string {
	w.t.Helper()
	if k.Kind == "" {
		k.Kind = store.KeyNode
	}
	if k.User == 0 && k.Tags == nil && k.Kind == store.KeyNode {
		k.Tags = []string{"tag:a"}
	}
	if k.Created.IsZero() {
		k.Created = time.Now()
	}
	_, text, err := w.store.CreateKey(context.Background(), "test", k)
	if err != nil {
		w.t.Fatal(err)
	}
	return text
}

// machine plays a node's side of the protocol.
type machine struct {
	t       testing.TB
	w       *world
	machine identity.MachinePrivate
	key     identity.NodePrivate
	disco   identity.DiscoPrivate
	version int
	http    *http.Client
	close   func()
}

func (w *world) machine() *machine {
	m := &machine{t: w.t, w: w, machine: identity.NewMachine(), key: identity.NewNode(), disco: identity.NewDisco(), version: wire.CapabilityVersion}
	m.connect()
	return m
}

// connect gives m a Noise connection of its own.
func (m *machine) connect() {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{
		Protocols: p,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return noise.Dial(ctx, noise.ClientConfig{
				Dial: m.w.dial, Host: "control", Machine: m.machine, ServerKey: m.w.s.Key(), Version: uint16(m.version),
			})
		},
	}
	m.http = &http.Client{Transport: tr}
	m.close = tr.CloseIdleConnections
	m.t.Cleanup(m.close)
}

// clone returns another connection of the same machine and node.
func (m *machine) clone() *machine {
	c := *m
	c.connect()
	return &c
}

func (m *machine) post(ctx context.Context, path string, v any) (*http.Response, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://control"+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	return m.http.Do(req)
}

func (m *machine) registerRequest(authKey string) *wire.RegisterRequest {
	r := &wire.RegisterRequest{Version: m.version, NodeKey: m.key.Public(), Hostinfo: &wire.Hostinfo{Hostname: "agent", OS: "linux"}}
	if authKey != "" {
		r.Auth = &wire.RegisterAuth{AuthKey: authKey}
	}
	return r
}

func (m *machine) register(req *wire.RegisterRequest) (*wire.RegisterResponse, error) {
	resp, err := m.post(context.Background(), "/machine/register", req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	out := new(wire.RegisterResponse)
	return out, json.Unmarshal(body, out)
}

// join enrols m and fails the test if it is refused.
func (m *machine) join(authKey string) *machine {
	m.t.Helper()
	resp, err := m.register(m.registerRequest(authKey))
	if err != nil {
		m.t.Fatal(err)
	}
	if resp.Error != "" || resp.NodeKeyExpired {
		m.t.Fatalf("join: %+v", resp)
	}
	return m
}

func (m *machine) mapRequest() *wire.MapRequest {
	return &wire.MapRequest{Version: m.version, Compress: "zstd", KeepAlive: true, NodeKey: m.key.Public(), DiscoKey: m.disco.Public(), Hostinfo: &wire.Hostinfo{Hostname: "agent", OS: "linux"}}
}

// lite sends a lite update and returns the status and the error code.
func (m *machine) lite(change func(*wire.MapRequest)) (int, wire.ErrorCode) {
	m.t.Helper()
	req := m.mapRequest()
	req.OmitPeers = true
	if change != nil {
		change(req)
	}
	resp, err := m.post(context.Background(), "/machine/map", req)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode, wire.ErrorCode(resp.Header.Get(wire.ErrorHeader))
}

// netmap is what a node knows after applying a stream.
type netmap struct {
	body     io.ReadCloser
	cancel   func()
	patience time.Duration // of until and end
	zstd     bool

	self   *wire.Node
	peers  map[wire.NodeID]*wire.Node
	filter []wire.FilterRule
	derp   *wire.DERPMap
	users  map[wire.UserID]wire.UserProfile
	policy int64
	code   wire.ErrorCode
	last   *wire.MapResponse
	count  int                  // of messages
	flows  *int                 // seconds between reports that the server asked for
	seen   map[wire.NodeID]bool // every node that any message named
}

// poll opens a map stream and reads its first message.
func (m *machine) poll(change func(*wire.MapRequest)) *netmap {
	m.t.Helper()
	n := m.open(change)
	if err := n.read(); err != nil {
		m.t.Fatal(err)
	}
	return n
}

// open opens a map stream.
func (m *machine) open(change func(*wire.MapRequest)) *netmap {
	m.t.Helper()
	req := m.mapRequest()
	req.Stream = true
	if change != nil {
		change(req)
	}
	ctx, cancel := context.WithCancel(context.Background())
	resp, err := m.post(ctx, "/machine/map", req)
	if err != nil {
		cancel()
		m.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		cancel()
		m.t.Fatalf("poll: status %d %s: %s", resp.StatusCode, resp.Header.Get(wire.ErrorHeader), b)
	}
	n := &netmap{
		body: resp.Body, zstd: req.Compress == "zstd", peers: map[wire.NodeID]*wire.Node{},
		users: map[wire.UserID]wire.UserProfile{}, seen: map[wire.NodeID]bool{},
	}
	if n.patience = 20 * time.Second; m.w.pipes {
		n.patience = 10 * 365 * 24 * time.Hour
	}
	n.cancel = func() {
		cancel()
		resp.Body.Close()
	}
	m.t.Cleanup(n.cancel)
	return n
}

var decoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))

func readFrame(r io.Reader, compressed bool) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.LittleEndian.Uint32(size[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	if compressed {
		return decoder.DecodeAll(b, nil)
	}
	return b, nil
}

// read applies the next message.
func (n *netmap) read() error {
	b, err := readFrame(n.body, n.zstd)
	if err != nil {
		return err
	}
	m := new(wire.MapResponse)
	if err := json.Unmarshal(b, m); err != nil {
		return err
	}
	n.last = m
	n.count++
	if m.MeshReportFlows != nil {
		n.flows = m.MeshReportFlows
	}
	if m.Node != nil {
		n.self = m.Node
	}
	if m.DERPMap != nil {
		n.derp = m.DERPMap
	}
	for _, p := range append(m.Peers, m.PeersChanged...) {
		n.seen[p.ID] = true
	}
	if len(m.Peers) > 0 {
		clear(n.peers)
		for _, p := range m.Peers {
			n.peers[p.ID] = p
		}
	}
	for _, id := range m.PeersRemoved {
		n.seen[id] = true
		delete(n.peers, id)
	}
	for _, p := range m.PeersChanged {
		n.peers[p.ID] = p
	}
	for _, c := range m.PeersChangedPatch {
		n.seen[c.NodeID] = true
		p := n.peers[c.NodeID]
		if p == nil {
			return fmt.Errorf("patch for unknown peer %d", c.NodeID)
		}
		if c.DERPRegion != 0 {
			p.HomeDERP = c.DERPRegion
		}
		if c.Cap != 0 {
			p.Cap = c.Cap
		}
		if c.Endpoints != nil {
			p.Endpoints = c.Endpoints
		}
		if c.DiscoKey != nil {
			p.DiscoKey = *c.DiscoKey
		}
		if c.Online != nil {
			p.Online = c.Online
			if *c.Online {
				p.LastSeen = nil
			}
		}
		if c.LastSeen != nil {
			p.LastSeen = c.LastSeen
		}
		if c.KeyExpiry != nil {
			p.KeyExpiry = *c.KeyExpiry
		}
	}
	if f, ok := m.PacketFilters["base"]; ok {
		n.filter = f
	}
	for _, u := range m.UserProfiles {
		n.users[u.ID] = u
	}
	if m.MeshPolicy != 0 {
		n.policy = m.MeshPolicy
	}
	if m.MeshCode != "" {
		n.code = m.MeshCode
	}
	return nil
}

// until reads on until ok holds.
func (n *netmap) until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	guard := time.AfterFunc(n.patience, n.cancel)
	defer guard.Stop()
	for !ok() {
		if err := n.read(); err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

// end reads until the stream is over and returns the code it ended with.
func (n *netmap) end(t testing.TB) wire.ErrorCode {
	t.Helper()
	guard := time.AfterFunc(n.patience, n.cancel)
	defer guard.Stop()
	for {
		if err := n.read(); err != nil {
			if err != io.EOF {
				t.Errorf("stream ended with %v, want EOF", err)
			}
			return n.code
		}
	}
}
