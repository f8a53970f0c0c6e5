package noise

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"mesh/identity"
)

const (
	maxFrame  = 4096 // with its header
	maxPlain  = maxFrame - frameHeader - tagLen
	batch     = 5              // records in one write to the connection below: what an HTTP/2 frame of 16 KiB needs
	maxEarly  = 1 << 20        // bytes of JSON in an early payload
	earlyHead = 5 + 4          // magic, length
	maxCount  = math.MaxUint64 // this nonce is never used
)

// earlyMagic starts an early payload. As the head of an HTTP/2 frame, which it
// precedes, it would be a frame longer than any that is legal.
var earlyMagic = []byte("\xff\xff\xffTS")

// ErrRecord reports a record that is malformed or not authentic. It ends the
// connection.
var ErrRecord = errors.New("bad noise record")

// writeBuffers holds *[]byte of batch frames.
var writeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, batch*maxFrame); return &b }}

// Conn is an encrypted and authenticated connection between a machine and a
// control server. Reads and Writes may run concurrently, like those of any
// net.Conn, and many at a time.
type Conn struct {
	conn    net.Conn
	peer    identity.MachinePublic
	version uint16

	rmu    sync.Mutex // guards the members below
	in     ahead      // of conn
	open   cipher.AEAD
	rcount uint64
	rnonce [chacha20poly1305.NonceSize]byte
	plain  []byte // what is left of the current record; lies in the buffer of in
	rerr   error  // fatal
	// wantEarly is true until the client knows whether there is an early
	// payload, of which head has come so far.
	wantEarly bool
	head      []byte
	early     []byte

	wmu    sync.Mutex // guards the members below
	seal   cipher.AEAD
	wcount uint64
	wnonce [chacha20poly1305.NonceSize]byte
	unsent []byte // sealed, but its write timed out; goes before anything else
	werr   error  // fatal

	deadline atomic.Int64 // of writes, Unix nanoseconds, 0 = none
}

// newConn takes over conn after a handshake. in reads from conn, and holds what
// was read too far.
func newConn(conn net.Conn, in io.Reader, peer identity.MachinePublic, version uint16, open, seal cipher.AEAD) *Conn {
	return &Conn{
		conn: conn, peer: peer, version: version, open: open, seal: seal,
		in: ahead{r: in},
	}
}

// Peer returns the proven key of the other side: at a server the machine key
// of the client.
func (c *Conn) Peer() identity.MachinePublic { return c.peer }

// Version returns the capability version that the client announced.
func (c *Conn) Version() int { return int(c.version) }

// EarlyPayload returns the JSON that the server sent ahead of its first bytes,
// or nil. A client knows it once its first Read returned.
func (c *Conn) EarlyPayload() []byte {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	return c.early
}

// Read implements net.Conn. Broken records give ErrRecord, now and for ever;
// an end amid a record gives io.ErrUnexpectedEOF. A timeout loses nothing.
func (c *Conn) Read(p []byte) (int, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(c.plain) == 0 {
		if c.rerr != nil {
			return 0, c.rerr
		}
		plain, err := c.readRecord()
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				c.rerr = err
			}
			return 0, err
		}
		c.plain = plain
		if c.wantEarly {
			if err := c.readEarly(); err != nil {
				c.rerr = err
				return 0, err
			}
		}
	}
	n := copy(p, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// readRecord returns the next record's plain text, which stays valid until the
// next call. An incomplete record stays in the buffer.
func (c *Conn) readRecord() ([]byte, error) {
	head, err := c.peek(frameHeader)
	if err != nil {
		return nil, err
	}
	typ, n := head[0], int(binary.BigEndian.Uint16(head[1:]))
	if frameHeader+n > maxFrame {
		return nil, fmt.Errorf("%w: %d bytes is too long", ErrRecord, n)
	}
	switch typ {
	case typeRecord:
	case typeError:
		frame, err := c.peek(frameHeader + n)
		if err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: unauthenticated error %q", ErrRecord, clip(frame[frameHeader:]))
	default:
		return nil, fmt.Errorf("%w: type %d", ErrRecord, typ)
	}
	if n < tagLen {
		return nil, fmt.Errorf("%w: %d bytes is too short", ErrRecord, n)
	}
	frame, err := c.peek(frameHeader + n)
	if err != nil {
		return nil, err
	}
	if c.rcount == maxCount {
		return nil, fmt.Errorf("%w: nonces used up", ErrRecord)
	}
	sealed := frame[frameHeader:]
	binary.BigEndian.PutUint64(c.rnonce[4:], c.rcount)
	plain, err := c.open.Open(sealed[:0], c.rnonce[:], sealed, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: not authentic", ErrRecord)
	}
	c.rcount++
	c.in.discard(len(frame))
	return plain, nil
}

// peek waits until n bytes are buffered.
func (c *Conn) peek(n int) ([]byte, error) {
	b, err := c.in.peek(n)
	if err == io.EOF && (len(b) > 0 || n > frameHeader) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// readEarly looks at the first plain text of a server: it takes an early
// payload out, and leaves anything else in c.plain.
func (c *Conn) readEarly() error {
	for len(c.plain) > 0 {
		want, err := c.earlyLen()
		if err != nil {
			return err
		}
		take := min(want-len(c.head), len(c.plain))
		c.head = append(c.head, c.plain[:take]...)
		c.plain = c.plain[take:]
		if m := min(len(c.head), len(earlyMagic)); !bytes.Equal(c.head[:m], earlyMagic[:m]) {
			c.plain = append(c.head, c.plain...)
			c.head, c.wantEarly = nil, false
			return nil
		}
		if want, err = c.earlyLen(); err != nil {
			return err
		}
		if len(c.head) == want {
			c.early = c.head[earlyHead:]
			c.head, c.wantEarly = nil, false
			return nil
		}
	}
	return nil
}

// earlyLen returns how long c.head must become, as far as that is known.
func (c *Conn) earlyLen() (int, error) {
	if len(c.head) < earlyHead {
		return earlyHead, nil
	}
	size := binary.BigEndian.Uint32(c.head[len(earlyMagic):])
	if size > maxEarly {
		return 0, fmt.Errorf("%w: early payload of %d bytes is too long", ErrRecord, size)
	}
	return earlyHead + int(size), nil
}

// Write implements net.Conn. What a Write that timed out had sealed already is
// counted as written, and leaves first when the next Write gets through. Any
// other error is for ever, because the other side cannot follow any more.
func (c *Conn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.werr != nil {
		return 0, c.werr
	}
	// Nothing is sealed when it is too late to send it.
	if d := c.deadline.Load(); d != 0 && time.Now().UnixNano() >= d {
		return 0, os.ErrDeadlineExceeded
	}
	if len(c.unsent) > 0 {
		if err := c.send(c.unsent); err != nil {
			return 0, err
		}
	}
	buf := writeBuffers.Get().(*[]byte)
	defer writeBuffers.Put(buf)
	done := 0
	for done < len(p) {
		out := (*buf)[:0]
		for range batch {
			n := min(len(p)-done, maxPlain)
			if n == 0 {
				break
			}
			var err error
			if out, err = c.appendRecord(out, p[done:done+n]); err != nil {
				return done, err
			}
			done += n
		}
		if err := c.send(out); err != nil {
			return done, err
		}
	}
	return done, nil
}

// appendRecord seals p, of maxPlain bytes at most, as one record.
func (c *Conn) appendRecord(out, p []byte) ([]byte, error) {
	if c.wcount == maxCount {
		c.werr = fmt.Errorf("%w: nonces used up", ErrRecord)
		return out, c.werr
	}
	binary.BigEndian.PutUint64(c.wnonce[4:], c.wcount)
	c.wcount++
	out = append(out, typeRecord)
	out = binary.BigEndian.AppendUint16(out, uint16(len(p)+tagLen))
	return c.seal.Seal(out, c.wnonce[:], p, nil), nil
}

// send writes sealed records. After a timeout the rest is kept in c.unsent;
// other errors are fatal.
func (c *Conn) send(b []byte) error {
	n, err := c.conn.Write(b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err == nil {
		c.unsent = nil
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && n >= 0 && n <= len(b) {
		c.unsent = append([]byte(nil), b[n:]...)
		return err
	}
	c.werr = err
	return err
}

// Close implements net.Conn. There is no close message: the other side sees
// the end of the connection below.
func (c *Conn) Close() error { return c.conn.Close() }

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	c.keepDeadline(t)
	return c.conn.SetDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.keepDeadline(t)
	return c.conn.SetWriteDeadline(t)
}

func (c *Conn) keepDeadline(t time.Time) {
	if t.IsZero() {
		c.deadline.Store(0)
		return
	}
	c.deadline.Store(max(1, t.UnixNano())) // long ago, not never
}

// clip makes text from outside fit for an error.
func clip(b []byte) string {
	const most = 200
	if len(b) > most {
		b = b[:most]
	}
	return string(bytes.TrimSpace(b))
}
