package derp

import (
	"encoding/binary"
	"sync"

	"mesh/identity"
)

// chunkLen is the payload of a TLS record: one write of a chunk is one record
// and one system call.
const chunkLen = 16 << 10

// chunk holds whole frames as they go on the wire.
type chunk struct {
	b      []byte
	head   int // frames before it were dropped
	frames int
	pooled bool
}

var chunks = sync.Pool{New: func() any {
	return &chunk{b: make([]byte, 0, chunkLen), pooled: true}
}}

func newChunk(need int) *chunk {
	if need > chunkLen {
		return &chunk{b: make([]byte, 0, need)}
	}
	return chunks.Get().(*chunk)
}

func (k *chunk) bytes() []byte { return k.b[k.head:] }

func (k *chunk) free() {
	if k.pooled {
		k.b, k.head, k.frames = k.b[:0], 0, 0
		chunks.Put(k)
	}
}

// queue holds frames in the order they came, ready to be written, bounded in
// number and bytes. It drops the oldest to make room: a late packet is worth
// less than a fresh one. An empty queue holds no memory.
type queue struct {
	maxFrames, maxBytes int

	chunks  []*chunk // oldest first; none is empty
	frames  int
	bytes   int
	dropped uint64

	// pushed counts frames by key since the last take, if the queue is to be
	// fair; nil if not.
	pushed map[[identity.KeyLen]byte]int
}

// share returns which packets for key may be pushed: none if the queue is full
// and this key had more than half of it since something was taken, while others
// had some. One busy peer thus does not push the packets of others out.
func (q *queue) share(key *[identity.KeyLen]byte, packets [][]byte) [][]byte {
	if q.pushed == nil {
		return packets
	}
	had := q.pushed[*key]
	if had == 0 && len(q.pushed) >= q.maxFrames {
		clear(q.pushed)
	}
	q.pushed[*key] = had + len(packets)
	need := 0
	for _, b := range packets {
		need += FrameHeaderLen + len(key) + len(b)
	}
	full := q.frames+len(packets) > q.maxFrames || q.bytes+need > q.maxBytes
	if !full || len(q.pushed) < 2 || had <= q.maxFrames/2 {
		return packets
	}
	q.dropped += uint64(len(packets))
	return nil
}

// push appends a frame of an optional key and a body.
func (q *queue) push(t FrameType, key *[identity.KeyLen]byte, body []byte) {
	n := len(body)
	if key != nil {
		n += len(key)
	}
	need := FrameHeaderLen + n
	for q.frames > 0 && (q.frames >= q.maxFrames || q.bytes+need > q.maxBytes) {
		q.dropOldest()
	}
	var k *chunk
	if len(q.chunks) > 0 {
		k = q.chunks[len(q.chunks)-1]
	}
	if k == nil || cap(k.b)-len(k.b) < need {
		k = newChunk(need)
		q.chunks = append(q.chunks, k)
	}
	k.b = appendHeader(k.b, t, n)
	if key != nil {
		k.b = append(k.b, key[:]...)
	}
	k.b = append(k.b, body...)
	k.frames++
	q.frames++
	q.bytes += need
}

func (q *queue) dropOldest() {
	k := q.chunks[0]
	n := FrameHeaderLen + int(binary.BigEndian.Uint32(k.b[k.head+1:]))
	k.head += n
	k.frames--
	q.frames--
	q.bytes -= n
	q.dropped++
	if k.frames == 0 {
		q.shift(1)
		k.free()
	}
}

// shift forgets the first n chunks.
func (q *queue) shift(n int) {
	rest := copy(q.chunks, q.chunks[n:])
	clear(q.chunks[rest:])
	q.chunks = q.chunks[:rest]
}

// take moves the oldest chunks to dst until room is used up; the last one may
// exceed it.
func (q *queue) take(dst []*chunk, room *int) []*chunk {
	n := 0
	for n < len(q.chunks) && *room > 0 {
		k := q.chunks[n]
		*room -= len(k.bytes())
		q.bytes -= len(k.bytes())
		q.frames -= k.frames
		dst = append(dst, k)
		n++
	}
	if n > 0 {
		q.shift(n)
		clear(q.pushed)
	}
	return dst
}

func (q *queue) clear() {
	for _, k := range q.chunks {
		k.free()
	}
	clear(q.chunks)
	q.chunks, q.frames, q.bytes = nil, 0, 0
}
