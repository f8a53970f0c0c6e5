package control

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"mesh/control/wire"
)

// frameReader reads the messages of a map stream, or of a relay's stream. Each
// is a length in little endian and that many bytes of JSON, perhaps inside
// zstd. A large message is unpacked and decoded as it comes: neither its bytes
// nor its text are ever held as a whole, and nothing of it stays.
type frameReader struct {
	r          io.Reader
	compressed bool
	maxWire    int
	maxJSON    int
	heard      func() // called when a message has come; nil = nobody cares

	mu     sync.Mutex  // guards what follows
	spare  *unpacker   // nil while a message is read, when none came for a while, and after a large one
	forget *time.Timer // nil before the first message
}

const (
	// smallFrame is how much of a message is read before it is decoded. zstd
	// unpacks what is in memory without a window of its own.
	smallFrame = 64 << 10
	// keepText bounds the messages whose memory is used again for the next.
	keepText = 256 << 10
	// maxWindow bounds the window of zstd that a server may choose for large
	// messages. RFC 8878 asks for 8 MB.
	maxWindow = 32 << 20
)

func newFrameReader(r io.Reader, compressed bool, maxWire, maxJSON int) *frameReader {
	return &frameReader{r: r, compressed: compressed, maxWire: maxWire, maxJSON: maxJSON}
}

// unpacker is what reading a message takes, beside the message.
type unpacker struct {
	buf  bytes.Buffer  // a small message
	zstd *zstd.Decoder // nil until needed
}

// keepUnpacker is how long it is kept for the next message.
const keepUnpacker = time.Second

// take returns what is there to read a message with.
func (f *frameReader) take() *unpacker {
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.spare
	f.spare = nil
	if u == nil {
		u = new(unpacker)
	}
	return u
}

// keep keeps it for a while.
func (f *frameReader) keep(u *unpacker) {
	u.buf.Reset()
	if u.zstd != nil && u.zstd.Reset(nil) != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spare = u
	if f.forget == nil {
		f.forget = time.AfterFunc(keepUnpacker, f.close)
	} else {
		f.forget.Reset(keepUnpacker)
	}
}

// close gives back what is kept.
func (f *frameReader) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spare = nil
	if f.forget != nil {
		f.forget.Stop()
	}
}

// next decodes the next message into msg. It returns io.EOF at the end of the
// stream, and io.ErrUnexpectedEOF if that is amid a message.
func (f *frameReader) next(msg any) error {
	var head [4]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return err
	}
	n := int64(binary.LittleEndian.Uint32(head[:]))
	if n > int64(f.maxWire) {
		return fmt.Errorf("message of %d bytes is too long", n)
	}
	u := f.take()
	frame := &exactly{r: f.r, left: n}
	var in io.Reader = frame
	if n <= smallFrame {
		if _, err := u.buf.ReadFrom(frame); err != nil {
			return err
		}
		in = &u.buf
	}
	if f.compressed {
		var err error
		if in, err = u.unpack(in, f.maxJSON); err != nil {
			return fmt.Errorf("decompress message: %w", err)
		}
	}
	text := &atMost{r: in, left: int64(f.maxJSON)}
	err := decodeWhole(text, msg)
	if err == nil {
		// What zstd has not looked at is no message.
		_, err = io.Copy(io.Discard, frame)
	}
	read := int64(f.maxJSON) - text.left
	if read <= keepText {
		f.keep(u)
	}
	switch {
	case err == nil:
	case frame.err != nil:
		return frame.err
	case text.err != nil:
		return text.err
	case read == 0:
		return errors.New("empty message")
	default:
		return fmt.Errorf("message makes no sense: %w", err)
	}
	if f.heard != nil {
		f.heard()
	}
	return nil
}

// unpack returns what is in a message in zstd, most bytes at most.
func (u *unpacker) unpack(in io.Reader, most int) (io.Reader, error) {
	if u.zstd == nil {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxMemory(uint64(most)), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		u.zstd = d
	}
	return u.zstd, u.zstd.Reset(in)
}

// exactly reads so many bytes; an end before that is io.ErrUnexpectedEOF.
type exactly struct {
	r    io.Reader
	left int64
	err  error // why r ended
}

func (e *exactly) Read(b []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(b[:min(int64(len(b)), e.left)])
	if e.left -= int64(n); e.left > 0 && err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		e.err = err
		return n, err
	}
	return n, nil
}

// atMost reads the text of a message, and fails where it is too long.
type atMost struct {
	r    io.Reader
	left int64
	err  error // why it is no text
}

func (a *atMost) Read(b []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	n, err := a.r.Read(b)
	if int64(n) > a.left {
		n, a.err = int(a.left), errors.New("message is too long")
		a.left = 0
		return n, a.err
	}
	a.left -= int64(n)
	if err != nil && err != io.EOF {
		a.err = fmt.Errorf("decompress message: %w", err)
		err = a.err
	}
	return n, err
}

// decodeWhole decodes a text that is one value of JSON. It is what
// json.Unmarshal makes of it, but the nodes of a map are decoded one by one.
func decodeWhole(text io.Reader, msg any) error {
	d := json.NewDecoder(text)
	var err error
	if m, ok := msg.(*wire.MapResponse); ok {
		err = decodeMap(d, m)
	} else {
		err = d.Decode(msg)
	}
	if err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is more than one")
	}
	return nil
}

func decodeMap(d *json.Decoder, m *wire.MapResponse) error {
	switch t, err := d.Token(); {
	case err != nil:
		return err
	case t == nil:
		return nil // null
	case t != json.Delim('{'):
		return fmt.Errorf("it begins with %v", t)
	}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return err
		}
		name, _ := t.(string) // what else a name may be is an error above
		switch {
		case strings.EqualFold(name, "Peers"):
			err = decodeNodes(d, &m.Peers)
		case strings.EqualFold(name, "PeersChanged"):
			err = decodeNodes(d, &m.PeersChanged)
		default:
			err = decodeMember(d, name, m)
		}
		if err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

func decodeNodes(d *json.Decoder, into *[]*wire.Node) error {
	switch t, err := d.Token(); {
	case err != nil:
		return err
	case t == nil:
		*into = nil
		return nil
	case t != json.Delim('['):
		return fmt.Errorf("list of nodes begins with %v", t)
	}
	list := []*wire.Node{}
	for d.More() {
		var n *wire.Node
		if err := d.Decode(&n); err != nil {
			return err
		}
		list = append(list, n)
	}
	*into = list
	_, err := d.Token()
	return err
}

// decodeMember decodes a member as part of an object that has no other.
func decodeMember(d *json.Decoder, name string, m *wire.MapResponse) error {
	var value json.RawMessage
	if err := d.Decode(&value); err != nil {
		return err
	}
	key, err := json.Marshal(name)
	if err != nil {
		return err
	}
	object := make([]byte, 0, len(key)+len(value)+3)
	object = append(append(append(append(object, '{'), key...), ':'), value...)
	return json.Unmarshal(append(object, '}'), m)
}

// maxRelayFrame bounds the messages of a relay's stream, which are lists of
// keys.
const maxRelayFrame = wire.MaxMapFrame
