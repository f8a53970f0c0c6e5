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
	runs   []keyRun // whose frames these are, if the queue is fair
	run0   int      // runs before it were dropped
}

// keyRun is a row of frames of one key.
type keyRun struct {
	of            *keyShare
	frames, bytes int
}

// keyShare is what one key has in a queue.
type keyShare struct {
	key           [identity.KeyLen]byte
	frames, bytes int
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
		clear(k.runs) // the shares belong to the queue
		k.b, k.head, k.frames, k.runs, k.run0 = k.b[:0], 0, 0, k.runs[:0], 0
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

	// shares says what each key has in the queue, if it is to be fair; nil if not.
	shares map[[identity.KeyLen]byte]*keyShare
	last   *keyShare   // of the frame pushed last, while it has any
	spare  []*keyShare // for keys to come
}

// maxSpare bounds queue.spare.
const maxSpare = 16

// shareOf finds or makes the share of a key.
func (q *queue) shareOf(key *[identity.KeyLen]byte) *keyShare {
	if q.last != nil && q.last.key == *key {
		return q.last
	}
	s := q.shares[*key]
	if s == nil {
		if n := len(q.spare); n > 0 {
			s, q.spare = q.spare[n-1], q.spare[:n-1]
		} else {
			s = new(keyShare)
		}
		s.key = *key
		q.shares[*key] = s
	}
	q.last = s
	return s
}

// give takes a number of frames off a share, and forgets it when it is empty.
func (q *queue) give(s *keyShare, frames, bytes int) {
	s.frames -= frames
	s.bytes -= bytes
	if s.frames > 0 {
		return
	}
	delete(q.shares, s.key)
	if q.last == s {
		q.last = nil
	}
	if len(q.spare) < maxSpare {
		*s = keyShare{}
		q.spare = append(q.spare, s)
	}
}

// greedy reports whether a key has more than its equal part of a queue that it
// shares with others. One frame is never too much.
func (q *queue) greedy(s *keyShare) bool {
	n := len(q.shares)
	return n > 1 && s.frames > 1 && (s.frames*n > q.maxFrames || s.bytes*n > q.maxBytes)
}

// push appends a frame of an optional key and a body. In a fair queue that is
// full, it drops the frame instead if its key has more than its part: one busy
// peer does not push the packets of others out.
func (q *queue) push(t FrameType, key *[identity.KeyLen]byte, body []byte) {
	q.pushTo(t, key, nil, body)
}

// pushTo is push with a second key behind the first, to whose share the frame
// does not count.
func (q *queue) pushTo(t FrameType, key, to *[identity.KeyLen]byte, body []byte) {
	n := len(body)
	if to != nil {
		n += len(to)
	}
	if key != nil {
		n += len(key)
	}
	need := FrameHeaderLen + n
	var share *keyShare
	if key != nil && q.shares != nil {
		share = q.shareOf(key)
		share.frames++
		share.bytes += need
	}
	for q.frames > 0 && (q.frames >= q.maxFrames || q.bytes+need > q.maxBytes) {
		if share != nil && q.greedy(share) {
			q.give(share, 1, need)
			q.dropped++
			return
		}
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
	if to != nil {
		k.b = append(k.b, to[:]...)
	}
	k.b = append(k.b, body...)
	k.frames++
	q.frames++
	q.bytes += need
	if share != nil {
		if n := len(k.runs); n == k.run0 || k.runs[n-1].of != share {
			k.runs = append(k.runs, keyRun{of: share})
		}
		r := &k.runs[len(k.runs)-1]
		r.frames++
		r.bytes += need
	}
}

func (q *queue) dropOldest() {
	k := q.chunks[0]
	n := FrameHeaderLen + int(binary.BigEndian.Uint32(k.b[k.head+1:]))
	k.head += n
	k.frames--
	q.frames--
	q.bytes -= n
	q.dropped++
	if q.shares != nil {
		r := &k.runs[k.run0]
		r.frames--
		r.bytes -= n
		if r.frames == 0 {
			k.run0++
		}
		q.give(r.of, 1, n)
	}
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
		for _, r := range k.runs[k.run0:] {
			q.give(r.of, r.frames, r.bytes)
		}
		dst = append(dst, k)
		n++
	}
	if n > 0 {
		q.shift(n)
	}
	return dst
}

func (q *queue) clear() {
	for _, k := range q.chunks {
		k.free()
	}
	clear(q.chunks)
	q.chunks, q.frames, q.bytes = nil, 0, 0
	q.last, q.spare = nil, nil
	clear(q.shares)
}
