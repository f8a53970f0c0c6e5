package control

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"mesh/control/wire"
)

// frameReader reads the messages of a map stream, or of a relay's stream. Each
// is a length in little endian and that many bytes of JSON, perhaps inside
// zstd.
type frameReader struct {
	r       io.Reader
	zstd    *zstd.Decoder // nil = plain JSON
	buf     bytes.Buffer
	maxWire int
	maxJSON int
	heard   func() // called when a message has come; nil = nobody cares
}

func newFrameReader(r io.Reader, compressed bool, maxWire, maxJSON int) (*frameReader, error) {
	f := &frameReader{r: r, maxWire: maxWire, maxJSON: maxJSON}
	if compressed {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(uint64(maxJSON)))
		if err != nil {
			return nil, err
		}
		f.zstd = d
	}
	return f, nil
}

func (f *frameReader) close() {
	if f.zstd != nil {
		f.zstd.Close()
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
	// The buffer grows with what really comes, and does not stay big.
	if f.buf.Cap() > 1<<20 {
		f.buf = bytes.Buffer{}
	}
	f.buf.Reset()
	if _, err := io.CopyN(&f.buf, f.r, n); err != nil {
		if err == io.EOF {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	if f.heard != nil {
		f.heard()
	}
	text := f.buf.Bytes()
	if f.zstd != nil {
		var err error
		if text, err = f.zstd.DecodeAll(text, nil); err != nil {
			return fmt.Errorf("decompress message: %w", err)
		}
	}
	if len(text) > f.maxJSON {
		return fmt.Errorf("message of %d bytes is too long", len(text))
	}
	if len(text) == 0 {
		return errors.New("empty message")
	}
	if err := json.Unmarshal(text, msg); err != nil {
		return fmt.Errorf("message makes no sense: %w", err)
	}
	return nil
}

// maxRelayFrame bounds the messages of a relay's stream, which are lists of
// keys.
const maxRelayFrame = wire.MaxMapFrame
