package loadtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"mesh/control/noise"
	"mesh/control/wire"
	"mesh/identity"
)

// node is a simulated node: it registers, keeps a map stream and follows it.
type node struct {
	mesh *Mesh
	name string
	// instance is what a process of our own is told apart by.
	instance string
	group    int
	machine  identity.MachinePrivate
	// key is what others know it by; nobody needs the private half. It is made
	// once: views are compared with it a million times.
	key   identity.NodePublic
	truth atomic.Pointer[truth]
	id    atomic.Int64 // 0 = not known yet
	place atomic.Int32 // of Mesh.addrs, that it uses
	view  view

	end  context.CancelFunc // of run; set by start
	done chan struct{}      // closed when run is over
	over error              // why the server ended it; read after done

	dialing   sync.Mutex // held by who opens a connection
	reporting sync.Mutex // held by who sends a report: what is older must not come later

	mu      sync.Mutex // guards the members below
	conn    *http.ClientConn
	streams int           // that got their first message
	up      chan struct{} // closed when streams grows, then made anew
}

// truth is what a node says of itself.
type truth struct {
	disco     identity.DiscoPublic
	endpoints []netip.AddrPort
}

func (m *Mesh) newNode(name string, group int) *node {
	n := &node{
		mesh: m, name: name, instance: strconv.FormatUint(rand.Uint64(), 36), group: group, machine: identity.NewMachine(), key: identity.NewNode().Public(),
		done: make(chan struct{}), up: make(chan struct{}), view: view{peers: make(map[wire.NodeID]*peer)},
	}
	n.place.Store(int32(rand.N(len(m.addrs))))
	n.truth.Store(&truth{disco: identity.NewDisco().Public(), endpoints: m.endpoints()})
	return n
}

// endpoints returns two that no node has had before.
func (m *Mesh) endpoints() []netip.AddrPort {
	i := m.port.Add(1)
	at := func(b byte, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{b, byte(i >> 24), byte(i >> 16), byte(i>>8) | 1}), port)
	}
	return []netip.AddrPort{at(198, 41641), at(10, uint16(i)|1024)}
}

// errBusy is a server that asks to come back later.
type errBusy struct {
	status int
	after  time.Duration
}

func (e errBusy) Error() string { return fmt.Sprintf("the server answers with status %d", e.status) }

// dial opens a connection to a replica, as package control does.
func (n *node) dial(ctx context.Context) (*http.ClientConn, error) {
	addr := n.addr()
	nc, err := noise.Dial(ctx, noise.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
		Host: addr, Machine: n.machine, ServerKey: n.mesh.cfg.Key, Version: wire.CapabilityVersion,
	})
	var up *noise.UpgradeError
	if errors.As(err, &up) {
		s, _ := strconv.Atoi(up.RetryAfter)
		return nil, errBusy{up.StatusCode, time.Duration(s) * time.Second}
	}
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return nc, nil },
		Protocols:          new(http.Protocols),
		DisableCompression: true,
	}
	t.Protocols.SetUnencryptedHTTP2(true)
	conn, err := t.NewClientConn(ctx, "http", addr)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return conn, nil
}

// connected returns the node's connection, and opens it if there is none.
func (n *node) connected(ctx context.Context) (*http.ClientConn, error) {
	n.dialing.Lock()
	defer n.dialing.Unlock()
	n.mu.Lock()
	conn := n.conn
	n.mu.Unlock()
	if conn != nil && conn.Err() == nil {
		return conn, nil
	}
	conn, err := n.dialAny(ctx)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.conn = conn
	n.mu.Unlock()
	return conn, nil
}

// cut closes the node's connection, as a network does.
func (n *node) cut() {
	n.mu.Lock()
	conn := n.conn
	n.conn = nil
	n.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

func (n *node) post(ctx context.Context, path string, body any) (*http.Response, error) {
	conn, err := n.connected(ctx)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+n.addr()+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	resp, err := conn.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	if code := wire.ErrorCode(resp.Header.Get(wire.ErrorHeader)); code.Err() != nil {
		return nil, code.Err()
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		return nil, errBusy{resp.StatusCode, time.Duration(s) * time.Second}
	}
	return nil, fmt.Errorf("%s: status %d: %s", path, resp.StatusCode, text)
}

// register enrols the node with an auth key, or takes it out with none.
func (n *node) register(ctx context.Context, authKey string) error {
	req := wire.RegisterRequest{Version: wire.CapabilityVersion, NodeKey: n.key, Hostinfo: n.hostinfo(), MeshInstance: n.instance}
	if authKey != "" {
		req.Auth = &wire.RegisterAuth{AuthKey: authKey}
	} else {
		req.Expiry = wire.LogoutExpiry
	}
	return n.patiently(ctx, func() error {
		resp, err := n.post(ctx, "/machine/register", req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var answer wire.RegisterResponse
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			return err
		}
		if authKey != "" && !answer.MachineAuthorized {
			return fmt.Errorf("registration refused: %q", answer.Error)
		}
		return nil
	})
}

// patiently calls f again as long as the server asks for that, or the
// connection breaks.
func (n *node) patiently(ctx context.Context, f func() error) error {
	for try := 0; ; try++ {
		err := f()
		var busy errBusy
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case errors.As(err, &busy):
			n.mesh.busy.Add(1)
		case try >= 3:
			return err
		default:
			n.mesh.broken.Add(1)
			n.cut()
		}
		if wait(ctx, busy.after/2+rand.N(busy.after/2+100*time.Millisecond)) != nil {
			return err
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (n *node) hostinfo() *wire.Hostinfo {
	return &wire.Hostinfo{Hostname: n.name, OS: "linux", NetInfo: &wire.NetInfo{PreferredDERP: 900}}
}

func (n *node) request() wire.MapRequest {
	t := n.truth.Load()
	return wire.MapRequest{
		Version: wire.CapabilityVersion, NodeKey: n.key, DiscoKey: t.disco, KeepAlive: true,
		Hostinfo: n.hostinfo(), Endpoints: t.endpoints, MeshInstance: n.instance,
	}
}

// report sends a lite update: what the node says of itself now.
func (n *node) report(ctx context.Context) error {
	n.reporting.Lock()
	defer n.reporting.Unlock()
	r := n.request()
	r.OmitPeers = true
	return n.patiently(ctx, func() error {
		resp, err := n.post(ctx, "/machine/map", r)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return errors.Join(err, resp.Body.Close())
	})
}

// start keeps a map stream until end is called or the server ends the node.
func (n *node) start(ctx context.Context) {
	ctx, n.end = context.WithCancel(ctx)
	n.mesh.wg.Go(func() {
		defer close(n.done)
		defer n.cut()
		n.over = n.run(ctx)
	})
}

// stop ends the node and waits for that.
func (n *node) stop() {
	n.end()
	<-n.done
	n.cut() // a request may have opened it again
}

func (n *node) run(ctx context.Context) error {
	for {
		err := n.stream(ctx)
		var busy errBusy
		switch {
		case ctx.Err() != nil:
			return nil
		case wire.CodeOf(err) != "":
			return err
		case errors.As(err, &busy):
			n.mesh.busy.Add(1)
		case errors.Is(err, errView):
			n.mesh.complain("%s: %v", n.name, err)
			return err
		default:
			n.mesh.streamsLost.Add(1)
			n.mesh.lost(err)
			n.cut()
		}
		if wait(ctx, busy.after/2+rand.N(busy.after/2+100*time.Millisecond)) != nil {
			return nil
		}
	}
}

// errView is a stream that a node cannot follow.
var errView = errors.New("the map stream makes no sense")

// stream opens a map stream, tells how the node is, and follows the stream.
func (n *node) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if _, err := n.connected(ctx); err != nil {
		return err
	}
	r := n.request()
	r.Stream, r.Compress = true, "zstd"
	r.Endpoints, r.Hostinfo = nil, &wire.Hostinfo{Hostname: n.name}
	if n.mesh.cfg.Resume {
		n.view.mu.Lock()
		r.MapSessionHandle, r.MapSessionSeq = n.view.handle, n.view.seq
		n.view.mu.Unlock()
	}
	wg.Go(func() {
		if err := n.report(ctx); err != nil && ctx.Err() == nil && wire.CodeOf(err) == "" {
			n.mesh.lost(err)
			n.cut()
		}
	})
	resp, err := n.post(ctx, "/machine/map", r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for first := true; ; first = false {
		if err := n.next(resp.Body, first); err != nil {
			return err
		}
	}
}

// frames holds *[]byte of compressed messages.
var frames = sync.Pool{New: func() any { return new([]byte) }}

// packing is how many times a message is longer, at most as a rule, than its
// compressed form.
const packing = 10

// next reads a message and follows it.
func (n *node) next(r io.Reader, first bool) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := int(binary.LittleEndian.Uint32(head[:]))
	if size > wire.MaxMapFrame {
		return fmt.Errorf("%w: message of %d bytes", errView, size)
	}
	buf := frames.Get().(*[]byte)
	defer frames.Put(buf)
	if cap(*buf) < size {
		*buf = make([]byte, size)
	}
	b := (*buf)[:size]
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	msg, err := n.mesh.decode(b)
	if err == nil {
		err = n.view.apply(msg, first, size+len(head), n.saw)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errView, err)
	}
	if first {
		n.id.Store(int64(n.view.id()))
		n.mu.Lock()
		n.streams++
		close(n.up)
		n.up = make(chan struct{})
		n.mu.Unlock()
	}
	return msg.code.Err()
}

// decode takes a compressed message apart. Only so many do it at a time as have
// a processor: the texts are long, and their memory is used again and again.
func (m *Mesh) decode(b []byte) (message, error) {
	text := <-m.texts
	defer func() { m.texts <- text }()
	// A message is many zstd frames: that the decoder makes more room for each
	// is what would cost most.
	text = slices.Grow(text[:0], packing*len(b))
	text, err := m.zstd.DecodeAll(b, text)
	if err != nil {
		return message{}, err
	}
	return m.parse(text)
}

// saw tells who waits for it that the node sees a peer in another way.
func (n *node) saw(was, is *peer) {
	p := is
	if p == nil {
		p = was
	}
	if w, ok := n.mesh.watches.Load(p.key); ok {
		w.(*watch).saw(n, is)
	}
}

// upTo waits until the node has had count streams.
func (n *node) upTo(ctx context.Context, count int) error {
	for {
		n.mu.Lock()
		have, up := n.streams, n.up
		n.mu.Unlock()
		if have >= count {
			return nil
		}
		select {
		case <-up:
		case <-n.done:
			return fmt.Errorf("%s ended: %w", n.name, n.over)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
