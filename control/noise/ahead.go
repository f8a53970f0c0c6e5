package noise

import (
	"io"
	"sync"
)

// ahead reads from r more than is asked for. While nothing comes it has a small
// buffer only, for most of many connections are quiet most of the time, and
// borrows a large one when that is full or too small.
type ahead struct {
	r          io.Reader
	large      *[readAhead]byte // nil = small is in use
	full       bool             // the last read filled large
	start, end int              // received and not discarded yet
	small      [smallAhead]byte
}

const (
	// readAhead is at least one whole frame.
	readAhead = 2 * maxFrame
	// smallAhead holds a keep-alive message in its record.
	smallAhead = 192
)

var largeBuffers = sync.Pool{New: func() any { return new([readAhead]byte) }}

func (a *ahead) buf() []byte {
	if a.large != nil {
		return a.large[:]
	}
	return a.small[:]
}

// peek waits until there are n bytes, at most readAhead, and returns them. They
// are valid until the next call. If the error is not nil there are fewer.
func (a *ahead) peek(n int) ([]byte, error) {
	for empty := 0; a.end-a.start < n; {
		a.makeRoom(n)
		buf := a.buf()
		got, err := a.r.Read(buf[a.end:])
		if got < 0 || got > len(buf)-a.end {
			panic("noise: reader returned an invalid count")
		}
		a.end += got
		a.full = a.large != nil && a.end == len(buf)
		if err != nil && a.end-a.start < n {
			return buf[a.start:a.end], err
		}
		if got > 0 {
			empty = 0
		} else if empty++; empty == 100 {
			return buf[a.start:a.end], io.ErrNoProgress
		}
	}
	return a.buf()[a.start : a.start+n], nil
}

// discard takes n bytes away that peek returned. They stay valid until the next
// peek.
func (a *ahead) discard(n int) { a.start += n }

// makeRoom makes room for n bytes from start and chooses the buffer for them.
func (a *ahead) makeRoom(n int) {
	if a.start == a.end {
		a.start, a.end = 0, 0
		if a.large != nil && !a.full {
			largeBuffers.Put(a.large)
			a.large = nil
		}
	}
	held := a.buf()[a.start:a.end]
	if a.large == nil && (n > len(a.small) || a.end == len(a.small)) {
		a.large = largeBuffers.Get().(*[readAhead]byte)
		a.end = copy(a.large[:], held)
		a.start = 0
		return
	}
	if a.start > 0 {
		a.end = copy(a.buf(), held)
		a.start = 0
	}
}
