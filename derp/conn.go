package derp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"mesh/identity"
)

// ConnConfig sets the limits of a Conn's sending side. Each 0 means its default.
type ConnConfig struct {
	WriteTimeout time.Duration // for each write of at most 64 KiB; default DefaultWriteTimeout
	KeepAlive    time.Duration // interval of the KeepAlive frames that a relay sends; default none
	DataPackets  int           // queued packets that are not path discovery; default 512
	DataBytes    int           // and their bytes; default 512 KiB, at least one packet of MaxPacket fits
	DiscoPackets int           // queued path discovery messages; default 32
	// ControlFrames and ControlBytes bound frames of the connection's own
	// business; default 4096 and 256 KiB.
	ControlFrames, ControlBytes int
	Fair                        bool // among the packets no key takes the place of others
	// Wake, if there is one, has somebody call WritePending soon, in place of
	// WriteLoop. It is called with locks held and must not wait.
	Wake func()
}

const (
	defaultDataPackets  = 512
	defaultDataBytes    = 512 << 10
	defaultDiscoPackets = 32
	// maxControl bounds queued frames of the connection's own business. A
	// relay may have to tell one client of many peers that left at once.
	defaultControlFrames = 4096
	defaultControlBytes  = 256 << 10
	// discoBytes: genuine messages are smaller than 2 KiB. For more messages
	// than defaultDiscoPackets it is more.
	discoBytes = 128 << 10
)

// Conn frames a byte stream for either side of the protocol. Reading gives
// whole frames in place, as many as one read of the stream brought. Writing
// goes through bounded queues that WriteLoop empties in batches, so that no
// sender ever waits for a slow connection.
//
// One goroutine may read; any may enqueue; one runs WriteLoop or WritePending.
type Conn struct {
	nc  net.Conn
	cfg ConnConfig
	in  reader
	out *Gather // under the TLS of nc; nil if there is none

	wake chan struct{} // capacity 1; tells a waiting WriteLoop that there is work
	call func()        // does so instead; nil = WriteLoop runs
	done chan struct{} // closed by Close

	mu     sync.Mutex // guards what follows
	queues [3]queue   // by Priority
	pong   [PingLen]byte
	// pongDue says that pong is to be sent. Only one is outstanding: the
	// flood of pings that makes this matter deserves no more.
	pongDue bool
	idle    bool // nothing is queued, and whoever writes has to be woken
	closed  bool

	// batch and bufs are of WriteLoop alone.
	batch []*chunk
	bufs  net.Buffers
}

// Priority says which queue a frame takes. Smaller ones overtake.
type Priority int

// The priorities of queued frames.
const (
	Control Priority = iota // the protocol's own frames
	Disco                   // path discovery messages
	Data                    // everything else
)

// PacketPriority returns the priority of a packet by its content.
func PacketPriority(packet []byte) Priority {
	if IsDisco(packet) {
		return Disco
	}
	return Data
}

// NewConn returns a Conn over nc, which it owns from now on. early holds bytes
// that were already read from nc; it is copied.
func NewConn(nc net.Conn, early []byte, cfg ConnConfig) *Conn {
	c := &Conn{
		nc:   nc,
		in:   newReader(nc, early),
		out:  gatherUnder(nc),
		wake: make(chan struct{}, 1),
		done: make(chan struct{}),
		call: cfg.Wake,
		idle: cfg.Wake != nil,
	}
	if cfg.Fair {
		c.queues[Data].shares = make(map[[identity.KeyLen]byte]*keyShare)
	}
	c.SetLimits(cfg)
	return c
}

// SetLimits replaces the limits that NewConn was given, but not Fair nor Wake. It must
// be called before WriteLoop.
func (c *Conn) SetLimits(cfg ConnConfig) {
	if cfg.WriteTimeout <= 0 {
		cfg.WriteTimeout = DefaultWriteTimeout
	}
	num := func(n *int, def int) {
		if *n <= 0 {
			*n = def
		}
	}
	num(&cfg.DataPackets, defaultDataPackets)
	num(&cfg.DataBytes, defaultDataBytes)
	num(&cfg.DiscoPackets, defaultDiscoPackets)
	num(&cfg.ControlFrames, defaultControlFrames)
	num(&cfg.ControlBytes, defaultControlBytes)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cfg = cfg
	limit := func(p Priority, frames, bytes int) {
		c.queues[p].maxFrames, c.queues[p].maxBytes = frames, bytes
	}
	limit(Control, cfg.ControlFrames, cfg.ControlBytes)
	limit(Disco, cfg.DiscoPackets, discoBytes*max(1, cfg.DiscoPackets/defaultDiscoPackets))
	limit(Data, cfg.DataPackets, max(cfg.DataBytes, FrameHeaderLen+2*identity.KeyLen+MaxPacket))
}

// ReadFrame returns the next frame, waiting for it if need be. The payload is
// valid until the next ReadFrame. The payload of a frame of unknown type may
// be left out. An error is final: io.EOF between frames, io.ErrUnexpectedEOF
// inside one, one that matches ErrFrameTooLarge, or that of the connection.
func (c *Conn) ReadFrame() (Frame, error) { return c.in.frame() }

// Buffered returns the next frame if it has already been received completely,
// without invalidating the payloads returned since the last ReadFrame.
func (c *Conn) Buffered() (Frame, bool) { return c.in.buffered() }

// SetReadDeadline bounds the wait of ReadFrame.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.nc.SetReadDeadline(t) }

// WriteFrame writes a frame at once, past the queues. It is for the login,
// before WriteLoop runs.
func (c *Conn) WriteFrame(t FrameType, payload ...[]byte) error {
	_, err := c.nc.Write(AppendFrame(nil, t, payload...))
	return err
}

// EnqueueControl queues a frame of the protocol's own business. It reports
// whether something was dropped for it.
func (c *Conn) EnqueueControl(t FrameType, payload []byte) (full bool) {
	return c.enqueue(Control, t, nil, nil, payload)
}

// EnqueuePackets queues frames of type t (SendPacket or RecvPacket), each of
// key and one packet, and makes room by dropping the oldest of this priority.
// It copies the packets. Packets must not be longer than MaxPacket. It reports
// whether something was dropped.
func (c *Conn) EnqueuePackets(p Priority, t FrameType, key identity.NodePublic, packets ...[]byte) (full bool) {
	raw := key.Bytes()
	return c.enqueue(p, t, &raw, nil, packets...)
}

// EnqueueForward queues ForwardPacket frames as EnqueuePackets does: each of
// the sender's and the receiver's key and one packet.
func (c *Conn) EnqueueForward(p Priority, src, dst identity.NodePublic, packets ...[]byte) (full bool) {
	from, to := src.Bytes(), dst.Bytes()
	return c.enqueue(p, FrameForwardPacket, &from, &to, packets...)
}

// enqueue queues frames of type t, each of the keys that there are and one
// payload.
func (c *Conn) enqueue(p Priority, t FrameType, key, second *[identity.KeyLen]byte, payloads ...[]byte) (full bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	q := &c.queues[p]
	before := q.dropped
	for _, b := range payloads {
		q.pushTo(t, key, second, b)
	}
	c.wakeLocked()
	return q.dropped != before
}

// EnqueuePong queues the answer to a ping unless one is still waiting to go.
func (c *Conn) EnqueuePong(data [PingLen]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.pongDue && !c.closed {
		c.pong, c.pongDue = data, true
		c.wakeLocked()
	}
}

func (c *Conn) wakeLocked() {
	if !c.idle {
		return
	}
	c.idle = false
	if c.call != nil {
		c.call()
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Dropped returns how many queued packets were dropped to make room.
func (c *Conn) Dropped() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.queues[Disco].dropped + c.queues[Data].dropped
}

// maxBatch is about how many bytes one turn of WriteLoop takes: enough to make
// system calls cheap, little enough that path discovery is not kept waiting.
const maxBatch = 64 << 10

// take moves the next batch into c.batch; empty means that the queues are.
func (c *Conn) take() []*chunk {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pongDue {
		c.pongDue = false
		c.queues[Control].push(FramePong, nil, c.pong[:])
	}
	c.batch = c.batch[:0]
	room := maxBatch
	for i := range c.queues {
		c.batch = c.queues[i].take(c.batch, &room)
	}
	c.idle = len(c.batch) == 0
	return c.batch
}

// WriteLoop writes what was queued, in batches, and a KeepAlive frame now and
// then if so configured, until Close (it returns nil) or until a write fails
// or takes longer than the write timeout (the error).
func (c *Conn) WriteLoop() error {
	var keepAlive <-chan time.Time
	if c.cfg.KeepAlive > 0 {
		t := time.NewTicker(c.cfg.KeepAlive)
		defer t.Stop()
		keepAlive = t.C
	}
	defer c.drain()
	for {
		batch := c.take()
		if len(batch) == 0 {
			select {
			case <-c.wake:
			case <-keepAlive:
				c.EnqueueControl(FrameKeepAlive, nil)
			case <-c.done:
				return nil
			}
			continue
		}
		if err := c.writeOut(batch); err != nil {
			return err
		}
		if c.closing() {
			return nil
		}
	}
}

// WritePending writes what is queued, in batches, until nothing is. It returns
// nil then and after Close, and otherwise as WriteLoop does.
func (c *Conn) WritePending() (err error) {
	for err == nil && !c.closing() {
		batch := c.take()
		if len(batch) == 0 {
			return nil
		}
		err = c.writeOut(batch)
	}
	c.drain()
	return err
}

// pending reports whether something is queued or being written.
func (c *Conn) pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.idle && !c.closed
}

// writeOut sends a batch and frees it.
func (c *Conn) writeOut(batch []*chunk) error {
	err := c.write(batch)
	for _, k := range batch {
		k.free()
	}
	if err == nil || c.closing() {
		return nil
	}
	return fmt.Errorf("write: %w", err)
}

// write sends a batch: with one system call where the connection is bare TCP or
// has a Gather, and otherwise chunk by chunk, for which chunks have the size of
// a TLS record.
func (c *Conn) write(batch []*chunk) error {
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		c.bufs = c.bufs[:0]
		for _, k := range batch {
			c.bufs = append(c.bufs, k.bytes())
		}
		all := c.bufs
		tcp.SetWriteDeadline(time.Now().Add(c.cfg.WriteTimeout))
		_, err := c.bufs.WriteTo(tcp)
		c.bufs = all
		return err
	}
	gather := c.out != nil && len(batch) > 1
	if gather {
		c.out.hold()
	}
	for i, k := range batch {
		if i == 0 || !gather {
			c.nc.SetWriteDeadline(time.Now().Add(c.cfg.WriteTimeout))
		}
		if _, err := c.nc.Write(k.bytes()); err != nil {
			return err
		}
	}
	if gather {
		return c.out.release()
	}
	return nil
}

// drain gives the buffers of frames that will never be sent back.
func (c *Conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for i := range c.queues {
		c.queues[i].clear()
	}
}

// Close ends the connection at once; what is queued is lost. It waits for
// nobody, may be called at any time and repeatedly.
func (c *Conn) Close() error {
	c.mu.Lock()
	first := !c.closing()
	if first {
		close(c.done)
	}
	c.closed = true
	c.mu.Unlock()
	if !first {
		return nil
	}
	return abort(c.nc)
}

// Done is closed by Close.
func (c *Conn) Done() <-chan struct{} { return c.done }

func (c *Conn) closing() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// abort closes the connection below TLS: the polite way would first try to
// send an alert and so wait for a peer that may have stopped reading.
func abort(nc net.Conn) error {
	for { // TLS within the TLS of a proxy, at most
		t, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			return nc.Close()
		}
		nc = t.NetConn()
	}
}

// reader cuts a stream into frames, in place. A quiet connection holds a small
// buffer only; it borrows a large one while data comes in bulk.
type reader struct {
	r          io.Reader
	buf        []byte // small, or *big
	small      []byte
	big        *[bigBuffer]byte
	start, end int // received bytes not yet consumed are buf[start:end]
	skip       int // bytes still to discard of a frame that is not wanted
	lull       int // consecutive small reads into the large buffer
	err        error
}

const (
	smallBuffer = 4 << 10
	// bigBuffer holds one frame of the largest size that must be whole, and
	// dozens of ordinary ones.
	bigBuffer = 256 << 10
)

var bigBuffers = sync.Pool{New: func() any { return new([bigBuffer]byte) }}

func newReader(r io.Reader, early []byte) reader {
	small := make([]byte, smallBuffer)
	if len(early) > smallBuffer {
		small = make([]byte, len(early))
	}
	return reader{r: r, buf: small, small: small, end: copy(small, early)}
}

// buffered returns the next whole frame without touching the buffer's layout.
func (d *reader) buffered() (Frame, bool) {
	have := d.buf[d.start:d.end]
	if d.err != nil || d.skip > 0 || len(have) < FrameHeaderLen {
		return Frame{}, false
	}
	t, n, err := parseHeader(have)
	if err != nil || len(have)-FrameHeaderLen < n {
		return Frame{}, false // frame will say why
	}
	d.start += FrameHeaderLen + n
	return Frame{t, have[FrameHeaderLen : FrameHeaderLen+n : FrameHeaderLen+n]}, true
}

func (d *reader) frame() (Frame, error) {
	for d.err == nil {
		if f, ok := d.buffered(); ok {
			return f, nil
		}
		need := FrameHeaderLen
		if d.skip > 0 {
			n := min(d.skip, d.end-d.start)
			d.start += n
			d.skip -= n
			if d.skip == 0 {
				continue
			}
			need = 1
		} else if d.end-d.start >= FrameHeaderLen {
			t, n, err := parseHeader(d.buf[d.start:])
			if err != nil {
				d.err = err
				break
			}
			if n > maxForward {
				// Unknown and longer than we keep: consume the header, discard the rest.
				d.start += FrameHeaderLen
				d.skip = n
				return Frame{Type: t}, nil
			}
			need += n
		}
		d.fill(need)
	}
	// Ready for the garbage collector; returned payloads may still point there.
	d.big = nil
	return Frame{}, d.err
}

// fill reads more, making room for need bytes from start.
func (d *reader) fill(need int) {
	d.resize(need)
	n, err := d.r.Read(d.buf[d.end:])
	switch {
	case n < 0 || n > len(d.buf)-d.end:
		err = errors.New("invalid count from Read")
		n = 0
	case n > 0:
		err = nil // a real one comes again
	case err == nil:
		err = io.ErrNoProgress
	}
	if err == io.EOF && (d.end > d.start || d.skip > 0) {
		err = io.ErrUnexpectedEOF
	}
	if d.big != nil && n < smallBuffer/2 {
		d.lull++
	} else {
		d.lull = 0
	}
	d.end += n
	d.err = err
}

// resize chooses the buffer for the next read and moves the rest of a frame to
// its beginning.
func (d *reader) resize(need int) {
	held := d.buf[d.start:d.end]
	switch {
	case d.big == nil && (need > len(d.small) || d.end == len(d.small)):
		// Full or too small: data comes in bulk.
		d.big = bigBuffers.Get().(*[bigBuffer]byte)
		d.lull = 0
		d.end = copy(d.big[:], held)
		d.buf, d.start = d.big[:], 0
	case d.big != nil && d.lull >= 2 && need <= len(d.small) && len(held) <= len(d.small)/2:
		d.end = copy(d.small, held)
		d.buf, d.start = d.small, 0
		bigBuffers.Put(d.big)
		d.big = nil
	case len(held) == 0:
		d.start, d.end = 0, 0
	case need > len(d.buf)-d.start || len(d.buf)-d.end < len(d.buf)/4:
		d.end = copy(d.buf, held)
		d.start = 0
	}
}
