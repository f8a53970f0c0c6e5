package derp

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"mesh/identity"
	"mesh/internal/errand"
)

// ClientConfig says how to connect to a relay. Durations and sizes of 0 mean
// their defaults.
type ClientConfig struct {
	// Key is the node's identity; peers address it by the public half.
	Key    identity.NodePrivate
	Target Target
	// Dial opens the TCP connection; nil means a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Proxy names the proxy by which to reach a host:port, nil for none; see
	// ProxyFromEnvironment. Proxies are dialled by Dial. nil = no proxies.
	Proxy func(addr string) (*url.URL, error)
	// RootCAs verify the relay's certificate; nil means those of the system.
	RootCAs *x509.CertPool
	// Logger receives the end of the connection, at debug level; nil is silent.
	Logger *zap.Logger

	// MeshKey makes the client another relay of the region, see Watch; "" = a node.
	MeshKey string
	// RelayKey, if not zero, is the key that the relay must have. Nothing is
	// shown to one with another key.
	RelayKey identity.NodePublic

	DialTimeout    time.Duration // for Dial; default DefaultDialTimeout
	ConnectTimeout time.Duration // of that for TCP, to the relay or the proxy; default all of it
	IdleTimeout    time.Duration // without any frame; default DefaultIdleTimeout
	WriteTimeout   time.Duration // of one write; default DefaultWriteTimeout
	QueuePackets   int           // packets waiting to go out; default 512
	QueueBytes     int           // and their bytes; default 512 KiB
	QueueDisco     int           // path discovery messages waiting to go out; default 32
}

func (cfg *ClientConfig) dialTimeout() time.Duration {
	if cfg.DialTimeout > 0 {
		return cfg.DialTimeout
	}
	return DefaultDialTimeout
}

// Kind says what a Message holds.
type Kind int

// The kinds of messages that Recv returns.
const (
	KindPackets     Kind = iota + 1 // Peer, Packets
	KindPeerGone                    // Peer, Reason
	KindHealth                      // Text
	KindRestarting                  // ReconnectIn, TryFor
	KindPeerPresent                 // Peer, Flags; after Watch
)

// Message is what a relay sent.
type Message struct {
	Kind Kind
	// Peer is the sender of Packets, proven by the relay, or the peer that is gone.
	Peer identity.NodePublic
	// Packets are a run of packets of one sender, in order. They are valid
	// until the next Recv and may be changed in place until then.
	Packets [][]byte
	Reason  PeerGoneReason
	Flags   PresentFlags
	// Text is a problem that the relay sees with this connection; empty means
	// that there is none any more.
	Text string
	// ReconnectIn is after which time a relay that restarts wants to be
	// dialled again, TryFor for how long that is worthwhile.
	ReconnectIn, TryFor time.Duration
}

// Client is one logged-in connection to a relay. Send, Ping and the other
// methods may be called from any goroutine, Recv from one at a time. Someone
// has to call Recv until it fails: it also answers pings and notices when the
// relay falls silent.
type Client struct {
	target Target
	conn   *Conn
	relay  identity.NodePublic
	mesh   bool // it is another relay
	logger *zap.Logger
	idle   time.Duration
	// limiter is what the relay asked us to stay below; nil = no limit.
	limiter *rate.Limiter
	limited atomic.Uint64 // packets dropped for it

	held    Frame    // received, not yet returned; of Recv
	hasHeld bool     // of Recv
	packets [][]byte // of Recv

	writing *errand.Errand

	done chan struct{} // closed when the connection ended

	mu        sync.Mutex // guards what follows
	err       error      // why it ended
	pings     map[[PingLen]byte]chan struct{}
	preferred bool
}

// maxPings bounds how many pings wait at once.
const maxPings = 16

// Login logs in over nc, on which the protocol is spoken from the first byte
// (that is, after the upgrade). It owns nc from now on. Most callers want Dial.
func Login(ctx context.Context, nc net.Conn, cfg ClientConfig) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.dialTimeout())
	defer cancel()
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := login(nc, nil, cfg)
	if err == nil && !stop() {
		c.Close()
		err = ctx.Err()
	}
	if err != nil {
		abort(nc)
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, &DialError{cfg.Target, StageLogin, err}
	}
	return c, nil
}

// login runs the key exchange. Deadlines are the caller's.
func login(nc net.Conn, early []byte, cfg ClientConfig) (*Client, error) {
	if cfg.Key.IsZero() {
		return nil, errors.New("no node key")
	}
	c := &Client{
		target: cfg.Target,
		mesh:   cfg.MeshKey != "",
		logger: cfg.Logger,
		idle:   cfg.IdleTimeout,
		done:   make(chan struct{}),
		pings:  make(map[[PingLen]byte]chan struct{}),
	}
	c.writing = errand.New(c.write)
	c.conn = NewConn(nc, early, ConnConfig{
		WriteTimeout: cfg.WriteTimeout,
		DataPackets:  cfg.QueuePackets,
		DataBytes:    cfg.QueueBytes,
		DiscoPackets: cfg.QueueDisco,
		Fair:         true,
		Wake:         c.writing.Ask,
	})
	if c.logger == nil {
		c.logger = zap.NewNop()
	}
	c.logger = c.logger.With(zap.Int("relay", cfg.Target.Region), zap.String("name", cfg.Target.Name))
	if c.idle <= 0 {
		c.idle = DefaultIdleTimeout
	}

	f, err := c.expect(FrameServerKey)
	if err != nil {
		return nil, err
	}
	if c.relay, err = ParseServerKey(f.Payload); err != nil {
		return nil, err
	}
	if !cfg.RelayKey.IsZero() && cfg.RelayKey != c.relay {
		return nil, fmt.Errorf("%w: its key is %v, want %v", ErrRelayKey, c.relay.Short(), cfg.RelayKey.Short())
	}
	info := ClientInfo{Version: Version, CanAckPings: true, MeshKey: cfg.MeshKey}
	if err := c.conn.WriteFrame(FrameClientInfo, SealClientInfo(cfg.Key, c.relay, info)); err != nil {
		return nil, notAdmitted(err)
	}
	if f, err = c.expect(FrameServerInfo); err != nil {
		if !errors.Is(err, ErrProtocol) {
			err = notAdmitted(err)
		}
		return nil, err
	}
	sinfo, err := OpenServerInfo(cfg.Key, c.relay, f.Payload)
	if err != nil {
		return nil, err
	}
	if n := sinfo.TokenBucketBytesPerSecond; n > 0 {
		// A burst below one packet would block large packets for good.
		burst := max(sinfo.TokenBucketBytesBurst, FrameHeaderLen+MaxFrame)
		c.limiter = rate.NewLimiter(rate.Limit(n), burst)
	}
	return c, nil
}

// write is the errand of the client: to send what is queued.
func (c *Client) write() {
	if err := c.conn.WritePending(); err != nil {
		c.fail(err)
	}
}

// notAdmitted explains the end of a connection after we showed our key.
func notAdmitted(err error) error {
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		return err
	}
	return fmt.Errorf("%w (%w)", ErrNotAdmitted, err)
}

// expect reads the next frame that matters, which must be of type t.
func (c *Client) expect(t FrameType) (Frame, error) {
	for {
		f, err := c.conn.ReadFrame()
		switch {
		case err != nil:
			return Frame{}, err
		case f.Type == t:
			return f, nil
		case f.Type.known() && f.Type != FrameKeepAlive && f.Type != FrameHealth:
			return Frame{}, fmt.Errorf("%w: frame type %#x during login, want %#x", ErrProtocol, byte(f.Type), byte(t))
		}
	}
}

// Recv returns the next message. Packets that arrived together come together.
// After an error the connection is closed and every further call returns the
// same error: ErrTimeout, io.EOF or another error of the connection, one that
// matches ErrProtocol, or net.ErrClosed after Close.
func (c *Client) Recv() (Message, error) {
	for {
		f, err := c.next()
		if err != nil {
			c.fail(err)
			return Message{}, c.Err()
		}
		m, ok, err := c.handle(f)
		if err != nil {
			c.fail(err)
			return Message{}, c.Err()
		}
		if ok {
			return m, nil
		}
	}
}

func (c *Client) next() (Frame, error) {
	if c.hasHeld {
		c.hasHeld = false
		return c.held, nil
	}
	if f, ok := c.conn.Buffered(); ok {
		return f, nil // a frame is here: no need for a deadline
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(c.idle)); err != nil {
		return Frame{}, err
	}
	f, err := c.conn.ReadFrame()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: nothing for %v", ErrTimeout, c.idle)
	}
	return f, err
}

// handle interprets a frame; ok says that there is a message to return.
func (c *Client) handle(f Frame) (m Message, ok bool, err error) {
	short := func() error {
		return fmt.Errorf("%w: frame type %#x of %d bytes", ErrProtocol, byte(f.Type), len(f.Payload))
	}
	switch f.Type {
	case FrameRecvPacket:
		src, packet, ok := SplitKey(f.Payload)
		if !ok {
			return m, false, short()
		}
		return Message{Kind: KindPackets, Peer: src, Packets: c.gather(src, packet)}, true, nil
	case FramePeerGone:
		key, rest, ok := SplitKey(f.Payload)
		if !ok {
			return m, false, short()
		}
		m = Message{Kind: KindPeerGone, Peer: key}
		if len(rest) > 0 {
			m.Reason = PeerGoneReason(rest[0])
		}
		return m, true, nil
	case FramePeerPresent:
		if !c.mesh {
			break
		}
		key, flags, ok := ParsePeerPresent(f.Payload)
		if !ok {
			return m, false, short()
		}
		return Message{Kind: KindPeerPresent, Peer: key, Flags: flags}, true, nil
	case FramePing:
		if len(f.Payload) < PingLen || len(f.Payload) > MaxPing {
			return m, false, short()
		}
		c.conn.EnqueuePong([PingLen]byte(f.Payload))
	case FramePong:
		if len(f.Payload) < PingLen {
			return m, false, short()
		}
		c.pong([PingLen]byte(f.Payload))
	case FrameHealth:
		m = Message{Kind: KindHealth, Text: healthText(f.Payload)}
		return m, true, nil
	case FrameRestarting:
		if len(f.Payload) < 8 {
			return m, false, short()
		}
		ms := func(b []byte) time.Duration {
			return time.Duration(binary.BigEndian.Uint32(b)) * time.Millisecond
		}
		return Message{Kind: KindRestarting, ReconnectIn: ms(f.Payload), TryFor: ms(f.Payload[4:])}, true, nil
	}
	// KeepAlive did its work by arriving; others have no meaning for a client.
	return m, false, nil
}

// maxRun bounds the packets of one message, so that the reader of a flood
// comes round to other things.
const maxRun = 256

// gather returns first and the packets of the same sender that are already
// received behind it. What breaks the run is held for the next call.
func (c *Client) gather(src identity.NodePublic, first []byte) [][]byte {
	c.packets = append(c.packets[:0], first)
	for len(c.packets) < maxRun {
		f, ok := c.conn.Buffered()
		if !ok {
			break
		}
		key, packet, whole := SplitKey(f.Payload)
		if f.Type != FrameRecvPacket || !whole || key != src {
			c.held, c.hasHeld = f, true
			break
		}
		c.packets = append(c.packets, packet)
	}
	return c.packets
}

// healthText makes what a relay says fit for logs and status.
func healthText(b []byte) string {
	const limit = 256
	out := make([]rune, 0, min(len(b), limit))
	for _, r := range string(b[:min(len(b), 4*limit)]) {
		if len(out) == limit {
			break
		}
		if r < ' ' || r == 0x7f {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}

// Send queues packets for the peer dst and returns at once; it copies them.
// When the relay takes them too slowly the oldest in the queue are dropped, or
// the new ones of a peer that has more than its share of it; see Dropped. The error is ErrPacketTooLarge, or why the connection ended.
func (c *Client) Send(dst identity.NodePublic, packets ...[]byte) error {
	for _, p := range packets {
		if len(p) > MaxPacket {
			return fmt.Errorf("%v: %w: %d bytes", c.target, ErrPacketTooLarge, len(p))
		}
	}
	for len(packets) > 0 {
		p := PacketPriority(packets[0])
		n := 1
		for n < len(packets) && PacketPriority(packets[n]) == p {
			n++
		}
		c.enqueue(p, dst, packets[:n])
		packets = packets[n:]
	}
	select {
	case <-c.done:
		return c.Err()
	default:
		return nil
	}
}

func (c *Client) enqueue(p Priority, dst identity.NodePublic, packets [][]byte) {
	if c.limiter == nil {
		c.conn.EnqueuePackets(p, FrameSendPacket, dst, packets...)
		return
	}
	now := time.Now()
	for i := range packets {
		if c.limiter.AllowN(now, FrameHeaderLen+identity.KeyLen+len(packets[i])) {
			c.conn.EnqueuePackets(p, FrameSendPacket, dst, packets[i])
		} else {
			c.limited.Add(1)
		}
	}
}

// Watch asks a relay of the same region, at which the client logged in with a
// mesh key, for the clients that are connected to it now and for those that
// come and go: messages of KindPeerPresent and KindPeerGone.
func (c *Client) Watch() { c.conn.EnqueueControl(FrameWatchConns, nil) }

// Forward queues packets of src for dst, a client of the relay at which this
// client logged in with a mesh key. It treats them as Send does; they must not
// be longer than MaxPacket.
func (c *Client) Forward(p Priority, src, dst identity.NodePublic, packets ...[]byte) {
	c.conn.EnqueueForward(p, src, dst, packets...)
}

// Dropped returns how many packets were dropped on this side: because the
// queue was full or above the rate that the relay asked for.
func (c *Client) Dropped() uint64 { return c.conn.Dropped() + c.limited.Load() }

// NotePreferred tells the relay whether it is this node's home. It serves the
// relay's statistics only.
func (c *Client) NotePreferred(home bool) {
	c.mu.Lock()
	changed := c.preferred != home
	c.preferred = home
	c.mu.Unlock()
	if !changed {
		return
	}
	payload := []byte{0}
	if home {
		payload[0] = 1
	}
	c.conn.EnqueueControl(FrameNotePreferred, payload)
}

// Ping measures the round trip to the relay. It needs Recv to run.
func (c *Client) Ping(ctx context.Context) (time.Duration, error) {
	var data [PingLen]byte
	rand.Read(data[:])
	answer := make(chan struct{})
	c.mu.Lock()
	if len(c.pings) >= maxPings {
		c.mu.Unlock()
		return 0, fmt.Errorf("%v: ping: too many outstanding", c.target)
	}
	c.pings[data] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pings, data)
		c.mu.Unlock()
	}()

	start := time.Now()
	c.conn.EnqueueControl(FramePing, data[:])
	select {
	case <-answer:
		return time.Since(start), nil
	case <-c.done:
		return 0, c.Err()
	case <-ctx.Done():
		return 0, fmt.Errorf("%v: ping: %w", c.target, ctx.Err())
	}
}

func (c *Client) pong(data [PingLen]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.pings[data]; ok {
		delete(c.pings, data)
		close(answer)
	}
}

// fail ends the connection; the first error stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		if !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
			c.logger.Debug("relay connection ended", zap.Error(err))
		}
		c.err = fmt.Errorf("%v: %w", c.target, err)
		close(c.done)
	}
	c.mu.Unlock()
	if first {
		c.conn.Close()
	}
}

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns why the connection ended, nil while it lives. After Close it
// matches net.ErrClosed.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Flush waits until nothing that was sent is queued any more, or the connection or
// ctx ends. It is for last words before Close.
func (c *Client) Flush(ctx context.Context) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for c.conn.pending() {
		select {
		case <-tick.C:
		case <-c.done:
			return
		case <-ctx.Done():
			return
		}
	}
}

// Close ends the connection at once and waits for the writer. A pending Recv
// returns. Queued packets are lost.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	c.writing.Close()
	return nil
}

// ServerKey returns the relay's public key.
func (c *Client) ServerKey() identity.NodePublic { return c.relay }

// Target returns where the client is connected.
func (c *Client) Target() Target { return c.target }

// LocalAddr returns the address of this end of the connection.
func (c *Client) LocalAddr() net.Addr { return c.conn.nc.LocalAddr() }

// RemoteAddr returns the address of the relay's end of the connection.
func (c *Client) RemoteAddr() net.Addr { return c.conn.nc.RemoteAddr() }
