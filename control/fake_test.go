package control

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"mesh/control/noise"
	"mesh/control/wire"
	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a listener whose connections are pipes, for virtual time.
type memory struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newMemory() *memory { return &memory{conns: make(chan net.Conn), done: make(chan struct{})} }

func (m *memory) Accept() (net.Conn, error) {
	select {
	case c := <-m.conns:
		return c, nil
	case <-m.done:
		return nil, net.ErrClosed
	}
}

func (m *memory) Close() error { m.once.Do(func() { close(m.done) }); return nil }

func (m *memory) Addr() net.Addr { return &net.UnixAddr{Name: "memory"} }

func (m *memory) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case m.conns <- b:
		return a, nil
	case <-m.done:
		return nil, &net.OpError{Op: "dial", Net: "memory", Err: errors.New("connection refused")}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fake is a control server whose answers the test gives.
type fake struct {
	t        testing.TB
	listener net.Listener
	server   *http.Server
	key      atomic.Pointer[identity.MachinePrivate]
	early    []byte
	tooOld   atomic.Bool // closes right after the switch of protocols

	// What tests may set before use.
	register func(wire.RegisterRequest) any // an answer, or a func(http.ResponseWriter)
	update   func(wire.MapRequest) func(http.ResponseWriter)
	polls    chan *poll // gets each map poll and relay stream; nobody takes it = it hangs

	keys, upgrades atomic.Int32
	mu             sync.Mutex // guards the fields below
	heads          []string
	others         []string // requests inside that the server does not offer
	inner          []*http.Server
	conns          map[*noise.Conn]bool
	wires          []*wireConn
}

// wireConn can stop to carry anything, without ending.
type wireConn struct {
	net.Conn
	mu     sync.Mutex // guards frozen
	frozen chan struct{}
}

func (c *wireConn) pass() {
	c.mu.Lock()
	frozen := c.frozen
	c.mu.Unlock()
	if frozen != nil {
		<-frozen
	}
}

func (c *wireConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.pass()
	return n, err
}

// freeze makes all connections that there are carry nothing any more.
func (f *fake) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.wires {
		c.mu.Lock()
		c.frozen = make(chan struct{})
		c.mu.Unlock()
	}
}

// thaw ends what freeze began.
func (f *fake) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.wires {
		c.mu.Lock()
		if c.frozen != nil {
			close(c.frozen)
			c.frozen = nil
		}
		c.mu.Unlock()
	}
}

// Accept is for the server: it wraps what the listener gives.
func (f *fake) Accept() (net.Conn, error) {
	c, err := f.listener.Accept()
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &wireConn{Conn: c}
	f.wires = append(f.wires, w)
	return w, nil
}

func (f *fake) Close() error   { return f.listener.Close() }
func (f *fake) Addr() net.Addr { return f.listener.Addr() }

// poll is a stream that a client waits on.
type poll struct {
	t       testing.TB
	req     wire.MapRequest
	relay   wire.RelayRequest
	do      chan func(http.ResponseWriter) // what to do next, in the handler's goroutine
	done    chan struct{}                  // ends it
	closed  <-chan struct{}
	machine identity.MachinePublic
}

func (p *poll) end() { close(p.done) }

// answer does something with the stream, unless the client has left.
func (p *poll) answer(f func(http.ResponseWriter)) {
	did := make(chan struct{})
	select {
	case p.do <- func(w http.ResponseWriter) { defer close(did); f(w) }:
		<-did
	case <-p.closed:
	}
}

// raw sends bytes as they are.
func (p *poll) raw(b []byte) {
	p.answer(func(w http.ResponseWriter) {
		w.Write(b)
		http.NewResponseController(w).Flush()
	})
}

func frame(body []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func pack(b []byte) []byte {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	defer e.Close()
	return e.EncodeAll(b, nil)
}

func (p *poll) send(msg any) {
	b, err := json.Marshal(msg)
	if err != nil {
		p.t.Error(err)
	}
	if p.req.Compress == "zstd" {
		b = pack(b)
	}
	p.raw(frame(b))
}

func newFake(t testing.TB, ln net.Listener) *fake {
	f := &fake{t: t, listener: ln, polls: make(chan *poll), conns: map[*noise.Conn]bool{}}
	key := identity.NewMachine()
	f.key.Store(&key)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /key", func(w http.ResponseWriter, r *http.Request) {
		f.keys.Add(1)
		json.NewEncoder(w).Encode(wire.KeyAnswer{PublicKey: f.key.Load().Public()})
	})
	mux.HandleFunc("HEAD /ping", f.head)
	mux.HandleFunc(noise.Path, f.upgrade)
	f.server = &http.Server{Handler: mux}
	go f.server.Serve(f)
	t.Cleanup(f.stop)
	return f
}

func (f *fake) head(_ http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.heads = append(f.heads, r.RequestURI)
}

func (f *fake) upgrade(w http.ResponseWriter, r *http.Request) {
	f.upgrades.Add(1)
	if f.tooOld.Load() {
		if raw, _, err := http.NewResponseController(w).Hijack(); err == nil {
			io.WriteString(raw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n")
			raw.Close()
		}
		return
	}
	c, err := noise.Accept(w, r, *f.key.Load(), noise.AcceptOptions{EarlyPayload: f.early})
	if err != nil {
		return
	}
	f.mu.Lock()
	f.conns[c] = true
	f.mu.Unlock()
	defer c.Close()
	h := http.NewServeMux()
	h.HandleFunc("HEAD /ping", func(w http.ResponseWriter, r *http.Request) { r.RequestURI = "inside " + r.RequestURI; f.head(w, r) })
	h.HandleFunc("POST /machine/register", func(w http.ResponseWriter, r *http.Request) {
		var req wire.RegisterRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			f.t.Error(err)
		}
		answer := f.register(req)
		if special, ok := answer.(func(http.ResponseWriter)); ok {
			special(w)
			return
		}
		json.NewEncoder(w).Encode(answer)
	})
	h.HandleFunc("POST /machine/map", func(w http.ResponseWriter, r *http.Request) {
		var req wire.MapRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			f.t.Error(err)
		}
		if !req.Stream {
			if f.update != nil {
				if special := f.update(req); special != nil {
					special(w)
				}
			}
			return
		}
		f.poll(w, r, &poll{req: req, machine: c.Peer()})
	})
	h.HandleFunc("POST /machine/relay", func(w http.ResponseWriter, r *http.Request) {
		var req wire.RelayRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			f.t.Error(err)
		}
		f.poll(w, r, &poll{relay: req, machine: c.Peer()})
	})
	h.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.others = append(f.others, r.Method+" "+r.URL.Path)
		f.mu.Unlock()
		http.Error(w, "Not implemented yet", http.StatusNotImplemented)
	})
	// The server of the standard library works in virtual time.
	s := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	f.mu.Lock()
	f.inner = append(f.inner, s)
	f.mu.Unlock()
	s.Protocols.SetUnencryptedHTTP2(true)
	one := newMemory()
	closed := make(chan struct{})
	s.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateClosed {
			close(closed)
		}
	}
	go func() { one.conns <- c }()
	go s.Serve(one)
	<-closed
	s.Close()
}

func (f *fake) poll(w http.ResponseWriter, r *http.Request, p *poll) {
	p.t, p.do, p.done, p.closed = f.t, make(chan func(http.ResponseWriter)), make(chan struct{}), r.Context().Done()
	select {
	case f.polls <- p:
	case <-p.closed:
		return
	}
	for {
		select {
		case f := <-p.do:
			f(w)
		case <-p.done:
			return
		case <-p.closed:
			return
		}
	}
}

// goAway tells clients to send no more requests over the connections that there
// are. What goes on over them goes on.
func (f *fake) goAway(ctx context.Context) {
	f.mu.Lock()
	servers := f.inner
	f.inner = nil
	f.mu.Unlock()
	for _, s := range servers {
		go s.Shutdown(ctx)
	}
}

// cut breaks all connections.
func (f *fake) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
	clear(f.conns)
}

func (f *fake) stop() {
	f.server.Close()
	f.cut()
}

// client returns a client of a fake in memory.
func (f *fake) client(change ...func(*Config)) *Client {
	cfg := Config{URL: "http://control.test", Machine: identity.NewMachine()}
	if m, ok := f.listener.(*memory); ok {
		cfg.Dial = m.dial
	} else {
		cfg.URL = "http://" + f.listener.Addr().String()
	}
	for _, c := range change {
		c(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

func status(code int, text string, headers ...string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, text)
	}
}
