package server

import (
	"encoding/binary"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"mesh/control/wire"
)

// framer writes messages in the form of a map stream: a length, and JSON in so
// many bytes. Compressed messages are several zstd frames in a row, which is as
// good as one to whoever decompresses them: what others are sent too is a frame
// of its own, and made once.
type framer struct {
	w      http.ResponseWriter
	rc     *http.ResponseController
	zstd   bool
	shared *memo // frames that others are sent too
	stall  *time.Timer
	after  time.Duration
	sent   func(bytes int) // counts

	// Of the message that is being written; borrowed from buffers.
	out []byte // what leaves
	own []byte // JSON for this reader alone that is not in out yet
}

// newFramer returns a framer that ends the connection of c when its reader takes
// nothing for a time.
func (s *Server) newFramer(w http.ResponseWriter, compress string, c *client) *framer {
	f := &framer{w: w, rc: http.NewResponseController(w), zstd: compress == "zstd", shared: &s.shared, after: s.cfg.WriteTimeout, sent: s.meters.sent}
	if f.after > 0 {
		// A deadline for each write would cost more than the write.
		f.stall = time.AfterFunc(f.after, func() { c.Close() })
		f.stall.Stop()
	}
	return f
}

// close must be called at the end.
func (f *framer) close() {
	if f.stall != nil {
		f.stall.Stop()
	}
}

// buffers holds *[]byte.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// encoder is shared by all streams: EncodeAll is safe for that, and each
// message is a frame of its own.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(512<<10), zstd.WithEncoderCRC(false))
	if err != nil {
		panic("server: zstd: " + err.Error()) // the options are constants
	}
	return e
})

// send writes one message of any kind and sees to it that it leaves.
func (f *framer) send(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return f.message(func() error {
		f.own = append(f.own, b...)
		return nil
	})
}

// message writes what build puts together.
func (f *framer) message(build func() error) error {
	out, own := buffers.Get().(*[]byte), buffers.Get().(*[]byte)
	f.out, f.own = append((*out)[:0], 0, 0, 0, 0), (*own)[:0]
	defer func() {
		*out, *own = f.out, f.own
		f.out, f.own = nil, nil
		buffers.Put(out)
		buffers.Put(own)
	}()
	if err := build(); err != nil {
		return err
	}
	f.flush()
	binary.LittleEndian.PutUint32(f.out, uint32(len(f.out)-4))
	if f.stall != nil {
		f.stall.Reset(f.after)
		defer f.stall.Stop()
	}
	if _, err := f.w.Write(f.out); err != nil {
		return err
	}
	f.sent(len(f.out))
	return f.rc.Flush()
}

// flush moves what is the reader's own to the message.
func (f *framer) flush() {
	f.out = f.pack(f.out, f.own)
	f.own = f.own[:0]
}

// part adds JSON that other readers are sent too. It keeps nothing of b.
func (f *framer) part(b []byte) {
	if !f.zstd || len(b) < worthSharing {
		f.own = append(f.own, b...)
		return
	}
	f.flush()
	packed, ok := f.shared.get(b)
	if !ok {
		start := len(f.out)
		f.out = f.pack(f.out, b)
		f.shared.put(b, slices.Clone(f.out[start:]))
		return
	}
	f.out = append(f.out, packed...)
}

// worthSharing is how long a part must be for a frame of its own, and
// worthPacking for compressing what one reader gets.
const (
	worthSharing = 128
	worthPacking = 256
)

// pack appends b in the form of the stream.
func (f *framer) pack(out, b []byte) []byte {
	switch {
	case len(b) == 0:
		return out
	case !f.zstd:
		return append(out, b...)
	case len(b) < worthPacking:
		return appendStored(out, b)
	}
	return encoder().EncodeAll(b, out)
}

// appendStored appends b, of less than 256 bytes, as a zstd frame of one block
// that is not compressed (RFC 8878, sections 3.1.1 and 3.1.1.2.2).
func appendStored(out, b []byte) []byte {
	head := uint32(len(b))<<3 | 1 // last block, raw
	out = append(out, 0x28, 0xb5, 0x2f, 0xfd, 0x20, byte(len(b)), byte(head), byte(head>>8), byte(head>>16))
	return append(out, b...)
}

// memo remembers the compressed form of what several readers are sent. It holds
// what was used last, up to twice memoSize bytes and for at most twice memoLife.
type memo struct {
	mu         sync.RWMutex // guards the members below
	young, old map[string][]byte
	size       int       // of young
	turned     time.Time // when young was empty
}

const (
	memoSize = 16 << 20
	memoLife = 30 * time.Second
)

// age forgets what nobody was sent for long. To be called now and then.
func (m *memo) age(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.turned) >= memoLife && len(m.young)+len(m.old) > 0 {
		m.young, m.old, m.size, m.turned = make(map[string][]byte), m.young, 0, now
	}
}

func (m *memo) get(b []byte) ([]byte, bool) {
	m.mu.RLock()
	packed, ok := m.young[string(b)]
	if ok {
		m.mu.RUnlock()
		return packed, true
	}
	packed, ok = m.old[string(b)]
	m.mu.RUnlock()
	if ok {
		m.put(b, packed)
	}
	return packed, ok
}

func (m *memo) put(b, packed []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.young[string(b)]; ok {
		return
	}
	if m.young == nil || m.size > memoSize {
		m.young, m.old, m.size = make(map[string][]byte), m.young, 0
	}
	m.young[string(b)] = packed
	m.size += len(b) + len(packed)
}

// response is a MapResponse whose peers and filter are encoded already: none of
// them is in the MapResponse itself.
type response struct {
	wire.MapResponse
	full    bool    // whole is all there is
	whole   []*view // in order of their IDs
	patches [][]byte
	filter  []byte // rules; nil = as before
}

// sendMap writes one message of a map stream.
func (f *framer) sendMap(m *response) error {
	return f.message(func() error {
		seq := m.Seq
		m.Seq = 0 // which nobody else has
		rest, err := json.Marshal(&m.MapResponse)
		if err != nil {
			return err
		}
		rest = rest[:len(rest)-1]
		if seq != 0 {
			f.own = strconv.AppendInt(append(f.own, `{"Seq":`...), seq, 10)
			if rest[0] = ','; len(rest) == 1 {
				rest = rest[:0]
			}
		}
		if len(rest) < worthPacking {
			// Most changes are the same for all who hear of them.
			all := buffers.Get().(*[]byte)
			defer buffers.Put(all)
			*all = append((*all)[:0], rest...)
			if m.small(all) {
				f.part(*all)
				return nil
			}
		}
		f.own = append(f.own, rest...)
		m.list(f)
		return nil
	})
}

// mostSmall is how many peers a message names at most for it to be shared as a
// whole.
const mostSmall = 8

// small completes the message in b, if that is short.
func (m *response) small(b *[]byte) bool {
	if m.full || len(m.whole)+len(m.patches) > mostSmall || len(m.filter) > 4096 {
		return false
	}
	g := &framer{own: *b} // which packs nothing
	m.list(g)
	*b = g.own
	return true
}

// list adds the lists to a message that ends before its closing brace.
func (m *response) list(f *framer) {
	member := func(name string) {
		if last := len(f.own) - 1; last < 0 || f.own[last] != '{' {
			f.own = append(f.own, ',')
		}
		f.own = append(f.own, '"')
		f.own = append(f.own, name...)
		f.own = append(f.own, '"', ':')
	}
	if m.filter != nil {
		member("PacketFilters")
		f.own = append(f.own, `{"base":`...)
		f.own = append(f.own, m.filter...)
		f.own = append(f.own, '}')
	}
	if len(m.patches) > 0 {
		member("PeersChangedPatch")
		for i, p := range m.patches {
			f.own = append(f.own, "[,"[min(i, 1)])
			f.own = append(f.own, p...)
		}
		f.own = append(f.own, ']')
	}
	if len(m.whole) > 0 {
		name := "PeersChanged"
		if m.full {
			name = "Peers"
		}
		member(name)
		f.own = append(f.own, '[')
		f.peers(m.whole)
		f.own = append(f.own, ']')
	}
	f.own = append(f.own, '}')
}

// peers adds nodes in parts that others who see the same nodes get, too. Where
// a part ends depends on the node there alone, so that lists that differ in one
// node differ in one part.
func (f *framer) peers(list []*view) {
	part := buffers.Get().(*[]byte)
	defer buffers.Put(part)
	b := (*part)[:0]
	for i, v := range list {
		b = append(b, v.encoded()...)
		if i < len(list)-1 {
			b = append(b, ',')
		}
		if uint32(v.node.ID)*2654435761>>27 == 0 {
			f.part(b)
			b = b[:0]
		}
	}
	f.part(b)
	*part = b
}
