package derp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func header(t FrameType, n uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{byte(t)}, n)
}

// readAll returns the frames of a stream, with copies of the payloads made
// only at the end of each batch: they must still be intact then.
func readAll(r io.Reader, early []byte) (frames []Frame, err error) {
	d := newReader(r, early)
	for {
		f, err := d.frame()
		if err != nil {
			return frames, err
		}
		batch := []Frame{f}
		for {
			f, ok := d.buffered()
			if !ok {
				break
			}
			batch = append(batch, f)
		}
		for _, f := range batch {
			frames = append(frames, Frame{f.Type, bytes.Clone(f.Payload)})
		}
	}
}

func TestReaderSplits(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var stream []byte
	var want []Frame
	for i := range 400 {
		n := rng.IntN(1500)
		switch i % 40 {
		case 7:
			n = MaxFrame
		case 13:
			n = 0
		case 20:
			n = smallBuffer - FrameHeaderLen + rng.IntN(3) - 1
		}
		payload := make([]byte, n)
		for j := range payload {
			payload[j] = byte(rng.Uint32())
		}
		typ := []FrameType{FrameSendPacket, FrameRecvPacket, 0x77}[i%3]
		stream = AppendFrame(stream, typ, payload)
		want = append(want, Frame{typ, payload})
	}
	readers := map[string]func() (io.Reader, []byte){
		"whole":         func() (io.Reader, []byte) { return bytes.NewReader(stream), nil },
		"halves":        func() (io.Reader, []byte) { return iotest.HalfReader(bytes.NewReader(stream)), nil },
		"bytes":         func() (io.Reader, []byte) { return iotest.OneByteReader(bytes.NewReader(stream)), nil },
		"data with EOF": func() (io.Reader, []byte) { return iotest.DataErrReader(bytes.NewReader(stream)), nil },
		"early": func() (io.Reader, []byte) {
			return bytes.NewReader(stream[9000:]), stream[:9000]
		},
		"records": func() (io.Reader, []byte) { return &recordReader{r: bytes.NewReader(stream)}, nil },
	}
	for name, mk := range readers {
		t.Run(name, func(t *testing.T) {
			r, early := mk()
			got, err := readAll(r, early)
			if err != io.EOF {
				t.Fatalf("error %v, want EOF", err)
			}
			if len(got) != len(want) {
				t.Fatalf("%d frames, want %d", len(got), len(want))
			}
			for i := range want {
				if got[i].Type != want[i].Type || !bytes.Equal(got[i].Payload, want[i].Payload) {
					t.Fatalf("frame %d differs", i)
				}
			}
		})
	}
}

// recordReader alternates bulk with single small reads, as TLS does, so that
// the buffer is exchanged all the time.
type recordReader struct {
	r io.Reader
	n int
}

func (r *recordReader) Read(b []byte) (int, error) {
	r.n++
	size := []int{16384, 16384, 16384, 100, 30, 1}[r.n%6]
	return r.r.Read(b[:min(size, len(b))])
}

func TestReaderTruncated(t *testing.T) {
	stream := AppendFrame(nil, FrameRecvPacket, make([]byte, 100))
	stream = AppendFrame(stream, FrameKeepAlive)
	ends := map[int]bool{0: true, FrameHeaderLen + 100: true, len(stream): true}
	for n := range len(stream) + 1 {
		_, err := readAll(bytes.NewReader(stream[:n]), nil)
		want := io.ErrUnexpectedEOF
		if ends[n] {
			want = io.EOF
		}
		if err != want {
			t.Errorf("cut after %d bytes: %v, want %v", n, err, want)
		}
	}
}

func TestReaderLengthFields(t *testing.T) {
	const unknown = FrameType(0x77)
	tests := []struct {
		typ FrameType
		n   uint32
		ok  bool
	}{
		{FrameRecvPacket, 0, true}, {FrameRecvPacket, 1, true},
		{FrameRecvPacket, MaxFrame - 1, true}, {FrameRecvPacket, MaxFrame, true},
		{FrameRecvPacket, MaxFrame + 1, false}, {FrameRecvPacket, 1 << 31, false},
		{FrameRecvPacket, 1<<32 - 1, false},
		{unknown, 0, true}, {unknown, 1, true}, {unknown, MaxFrame + 1, true},
		{unknown, MaxUnknownFrame, true}, {unknown, MaxUnknownFrame + 1, false},
		{unknown, 1 << 31, false}, {unknown, 1<<32 - 1, false},
	}
	for _, tt := range tests {
		stream := header(tt.typ, tt.n)
		if tt.ok {
			stream = append(stream, make([]byte, tt.n)...)
			stream = AppendFrame(stream, FramePong, []byte("12345678"))
		}
		frames, err := readAll(bytes.NewReader(stream), nil)
		if !tt.ok {
			if !errors.Is(err, ErrFrameTooLarge) || !errors.Is(err, ErrProtocol) || len(frames) != 0 {
				t.Errorf("%#x %d: %v after %d frames", tt.typ, tt.n, err, len(frames))
			}
			continue
		}
		if err != io.EOF || len(frames) != 2 || string(frames[1].Payload) != "12345678" {
			t.Errorf("%#x %d: %d frames, %v: what follows is lost", tt.typ, tt.n, len(frames), err)
		}
		// The same without what follows: an end inside the frame.
		_, err = readAll(bytes.NewReader(stream[:FrameHeaderLen+max(int(tt.n), 1)-1]), nil)
		if tt.n > 0 && err != io.ErrUnexpectedEOF {
			t.Errorf("%#x %d cut: %v", tt.typ, tt.n, err)
		}
	}
}

func TestReaderMemory(t *testing.T) {
	// A quiet connection goes back to the small buffer after bulk.
	var stream bytes.Buffer
	for range 100 {
		stream.Write(AppendFrame(nil, FrameRecvPacket, make([]byte, 1400)))
	}
	bulk := stream.Len()
	for range 10 {
		stream.Write(AppendFrame(nil, FrameKeepAlive))
	}
	sizes := &sizeReader{r: &stream, bulk: bulk}
	if _, err := readAll(sizes, nil); err != io.EOF {
		t.Fatal(err)
	}
	if sizes.first != smallBuffer || sizes.largest < 64<<10 || sizes.last > smallBuffer {
		t.Errorf("reads of %d at first, %d in bulk, %d when quiet", sizes.first, sizes.largest, sizes.last)
	}
}

type sizeReader struct {
	r                    io.Reader
	bulk                 int
	first, largest, last int
}

func (r *sizeReader) Read(b []byte) (int, error) {
	if r.first == 0 {
		r.first = len(b)
	}
	r.largest, r.last = max(r.largest, len(b)), len(b)
	if r.bulk <= 0 {
		b = b[:min(len(b), FrameHeaderLen)]
	} else {
		b = b[:min(len(b), r.bulk)]
	}
	n, err := r.r.Read(b)
	r.bulk -= n
	return n, err
}

func TestQueueAgainstModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	key := [identity.KeyLen]byte{9}
	for range 50 {
		q := queue{maxFrames: 1 + rng.IntN(40), maxBytes: FrameHeaderLen + MaxFrame + rng.IntN(200<<10)}
		var model [][]byte
		var dropped uint64
		size := func() (n int) {
			for _, m := range model {
				n += len(m)
			}
			return n
		}
		for range 500 {
			if rng.IntN(20) == 0 {
				room := rng.IntN(100 << 10)
				var got []byte
				var taken []*chunk
				for _, k := range q.take(taken, &room) {
					got = append(got, k.bytes()...)
					k.free()
				}
				for len(got) > 0 {
					if len(model) == 0 || !bytes.HasPrefix(got, model[0]) {
						t.Fatal("queue gave other frames than went in")
					}
					got, model = got[len(model[0]):], model[1:]
				}
			} else {
				body := make([]byte, rng.IntN(2000))
				if rng.IntN(50) == 0 {
					body = make([]byte, MaxPacket)
				}
				rng := uint32(rng.Uint32())
				for i := range body {
					body[i] = byte(rng) + byte(i)
				}
				f := AppendFrame(nil, FrameRecvPacket, key[:], body)
				for len(model) > 0 && (len(model) >= q.maxFrames || size()+len(f) > q.maxBytes) {
					model = model[1:]
					dropped++
				}
				model = append(model, f)
				q.push(FrameRecvPacket, &key, body)
			}
			if q.frames != len(model) || q.bytes != size() || q.dropped != dropped {
				t.Fatalf("queue says %d frames %d bytes %d dropped, model %d %d %d",
					q.frames, q.bytes, q.dropped, len(model), size(), dropped)
			}
			held := 0
			for _, k := range q.chunks {
				held += cap(k.b)
			}
			if held > 2*q.maxBytes+2*chunkLen {
				t.Fatalf("holds %d bytes for a bound of %d", held, q.maxBytes)
			}
		}
	}
}

// startConn returns a Conn whose WriteLoop runs, its other end, and what
// WriteLoop returns.
func startConn(t *testing.T, cfg ConnConfig) (*Conn, net.Conn, chan error) {
	a, b := net.Pipe()
	c := NewConn(a, nil, cfg)
	done := make(chan error, 1)
	go func() { done <- c.WriteLoop() }()
	t.Cleanup(func() { c.Close(); b.Close() })
	return c, b, done
}

func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, peer, done := startConn(t, ConnConfig{KeepAlive: time.Minute})
		r := newReader(peer, nil)
		start := time.Now()
		for i := range 3 {
			f, err := r.frame()
			if err != nil || f.Type != FrameKeepAlive {
				t.Fatal(f, err)
			}
			if d := time.Since(start); d != time.Duration(i+1)*time.Minute {
				t.Errorf("keep-alive %d after %v", i, d)
			}
		}
		c.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, done := startConn(t, ConnConfig{WriteTimeout: 2 * time.Second})
		start := time.Now()
		c.EnqueuePackets(Data, FrameRecvPacket, identity.NodePublic{}, []byte("nobody reads this"))
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("WriteLoop = %v", err)
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("gave up after %v", d)
		}
		// Nothing is queued any more.
		c.EnqueuePackets(Data, FrameRecvPacket, identity.NodePublic{}, []byte("late"))
		c.EnqueueControl(FrameHealth, nil)
		c.EnqueuePong([8]byte{})
		if len(c.take()) != 0 {
			t.Error("queue grows after the end")
		}
	})
}

func TestPrioritiesAndBounds(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := NewConn(a, nil, ConnConfig{DataPackets: 3, DiscoPackets: 2})
	defer c.Close()
	disco := func(i int) []byte { return append([]byte("TS💬"), fmt.Sprintf("%60d", i)...) }
	for i := range 5 {
		c.EnqueuePackets(Data, FrameRecvPacket, identity.NodePublic{}, fmt.Appendf(nil, "data %d", i))
		if p := PacketPriority(disco(i)); p != Disco {
			t.Fatal("disco not recognised")
		}
		c.EnqueuePackets(Disco, FrameRecvPacket, identity.NodePublic{}, disco(i))
		c.EnqueuePong([8]byte{byte(i)})
	}
	c.EnqueueControl(FrameHealth, []byte("x"))
	var stream []byte
	for _, k := range c.take() {
		stream = append(stream, k.bytes()...)
	}
	frames, _ := readAll(bytes.NewReader(stream), nil)
	var got []string
	for _, f := range frames {
		switch _, body, _ := SplitKey(f.Payload); f.Type {
		case FrameRecvPacket:
			got = append(got, string(bytes.TrimPrefix(bytes.ReplaceAll(body, []byte(" "), nil), []byte("TS💬"))))
		default:
			got = append(got, fmt.Sprintf("%#x:%x", byte(f.Type), f.Payload))
		}
	}
	want := "[0x14:78 0x13:0000000000000000 3 4 data2 data3 data4]"
	if fmt.Sprint(got) != want {
		t.Errorf("order %v, want %v", got, want)
	}
	if c.Dropped() != 5 {
		t.Errorf("dropped %d, want 5", c.Dropped())
	}
}

func TestIsDisco(t *testing.T) {
	good := append([]byte("TS💬"), make([]byte, 56)...)
	for name, tt := range map[string]struct {
		b    []byte
		want bool
	}{
		"shortest": {good, true}, "too short": {good[:61], false}, "empty": {nil, false},
		"wireguard": {append([]byte{4, 0, 0, 0}, make([]byte, 100)...), false},
	} {
		if IsDisco(tt.b) != tt.want {
			t.Errorf("%s: %v", name, !tt.want)
		}
	}
}

func TestEnqueueDoesNotAllocate(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := NewConn(a, nil, ConnConfig{DataPackets: 64})
	defer c.Close()
	packets := [][]byte{make([]byte, 1300), make([]byte, 1300)}
	key := identity.NewNode().Public()
	for range 100 {
		c.EnqueuePackets(Data, FrameSendPacket, key, packets...)
	}
	n := testing.AllocsPerRun(200, func() {
		c.EnqueuePackets(Data, FrameSendPacket, key, packets...)
	})
	if n > 0.5 { // the pool may be emptied by a garbage collection
		t.Errorf("%v allocations", n)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(AppendFrame(AppendFrame(nil, FrameServerKey, []byte(Magic)), FramePing, make([]byte, 8)), uint8(3))
	f.Add(append(header(FrameRecvPacket, 1<<32-1), 1, 2, 3), uint8(1))
	f.Add(append(header(0x77, MaxUnknownFrame), 1, 2, 3), uint8(7))
	f.Fuzz(func(t *testing.T, stream []byte, step uint8) {
		want, wantErr := readAll(bytes.NewReader(stream), nil)
		cut := min(int(step), len(stream))
		got, gotErr := readAll(&stepReader{stream[cut:], int(step%50) + 1}, stream[:cut])
		if fmt.Sprint(wantErr) != fmt.Sprint(gotErr) || len(got) != len(want) {
			t.Fatalf("%d frames, %v; in steps %d frames, %v", len(want), wantErr, len(got), gotErr)
		}
		var again []byte
		whole := true // no frame's payload was left out
		for i := range want {
			if got[i].Type != want[i].Type || !bytes.Equal(got[i].Payload, want[i].Payload) {
				t.Fatalf("frame %d differs", i)
			}
			if whole = whole && (want[i].Type.known() || len(want[i].Payload) > 0); whole {
				again = AppendFrame(again, want[i].Type, want[i].Payload)
			}
		}
		if !bytes.HasPrefix(stream, again) {
			t.Fatal("frames are not what was sent")
		}
	})
}

type stepReader struct {
	b    []byte
	step int
}

func (r *stepReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.b[:min(r.step, len(r.b))])
	r.b = r.b[n:]
	return n, nil
}

func TestFairQueue(t *testing.T) {
	a, b := net.Pipe() // nobody reads: the writer stands still
	defer b.Close()
	c := NewConn(a, nil, ConnConfig{DataPackets: 100, Fair: true})
	defer c.Close()
	busy, quiet := identity.NewNode().Public(), identity.NewNode().Public()
	c.EnqueuePackets(Data, FrameSendPacket, quiet, []byte("early"))
	for range 1000 {
		c.EnqueuePackets(Data, FrameSendPacket, busy, []byte("x"), []byte("y"))
	}
	for range 20 {
		c.EnqueuePackets(Data, FrameSendPacket, quiet, []byte("late"))
	}
	count := map[string]int{}
	for _, k := range c.take() {
		for b := k.bytes(); len(b) > 0; {
			_, n, err := parseHeader(b)
			if err != nil {
				t.Fatal(err)
			}
			count[string(b[FrameHeaderLen+identity.KeyLen:FrameHeaderLen+n])]++
			b = b[FrameHeaderLen+n:]
		}
	}
	if count["late"] != 20 || count["x"]+count["y"] < 50 {
		t.Errorf("%v", count)
	}
	if d := c.Dropped(); d != 2000+21-100 {
		t.Errorf("%d dropped", d)
	}
	// Alone it may have all.
	for range 1000 {
		c.EnqueuePackets(Data, FrameSendPacket, busy, []byte("x"))
	}
	n := 0
	for _, k := range c.take() {
		n += k.frames
	}
	if n != 100 {
		t.Errorf("%d frames of the only peer", n)
	}
}

// In a fair queue each key keeps its order, the shares always add up to what is
// in the queue, and who takes little loses nothing to those who flood.
func TestFairQueueAgainstModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 30 {
		q := queue{maxFrames: 20 + rng.IntN(80), maxBytes: FrameHeaderLen + MaxFrame + rng.IntN(200<<10),
			shares: make(map[[identity.KeyLen]byte]*keyShare)}
		var seen, next [6]uint32 // by key: the last number taken, and the next to push
		var taken, pushed uint64
		drain := func(room int) {
			for _, k := range q.take(nil, &room) {
				for b := k.bytes(); len(b) > 0; taken++ {
					_, n, err := parseHeader(b)
					if err != nil {
						t.Fatal(err)
					}
					body := b[FrameHeaderLen+identity.KeyLen:]
					id, seq := b[FrameHeaderLen], binary.BigEndian.Uint32(body)
					if seq <= seen[id] {
						t.Fatalf("number %d of key %d after %d", seq, id, seen[id])
					}
					seen[id] = seq
					b = b[FrameHeaderLen+n:]
				}
				k.free()
			}
		}
		for step := range 3000 {
			id := rng.IntN(len(next))
			if step%3 != 0 {
				id = step / 500 % len(next) // one that floods
			}
			next[id]++
			pushed++
			body := make([]byte, 4+rng.IntN(2000))
			if rng.IntN(200) == 0 {
				body = make([]byte, MaxPacket)
			}
			binary.BigEndian.PutUint32(body, next[id])
			q.push(FrameRecvPacket, &[identity.KeyLen]byte{byte(id)}, body)
			if rng.IntN(60) == 0 {
				drain(rng.IntN(100 << 10))
			}
			frames, bytes := 0, 0
			for key, s := range q.shares {
				if s.frames <= 0 || s.key != key {
					t.Fatalf("share %+v of key %d", s, key[0])
				}
				frames += s.frames
				bytes += s.bytes
			}
			if frames != q.frames || bytes != q.bytes || q.frames > q.maxFrames || q.bytes > q.maxBytes {
				t.Fatalf("shares of %d frames %d bytes, queue has %d and %d", frames, bytes, q.frames, q.bytes)
			}
		}
		drain(1 << 30)
		if taken+q.dropped != pushed || len(q.shares) != 0 {
			t.Errorf("%d taken, %d dropped of %d; %d shares left", taken, q.dropped, pushed, len(q.shares))
		}
	}
}

// Who sends little loses nothing, however fast the writer lets the others push.
func TestFairQueueWhileDraining(t *testing.T) {
	q := queue{maxFrames: 512, maxBytes: 512 << 10, shares: make(map[[identity.KeyLen]byte]*keyShare)}
	busy, quiet := [identity.KeyLen]byte{1}, [identity.KeyLen]byte{2}
	got := 0
	for range 200 {
		q.push(FrameRecvPacket, &quiet, []byte("quiet"))
		for range 300 {
			q.push(FrameRecvPacket, &busy, make([]byte, 1300))
		}
		room := maxBatch
		for _, k := range q.take(nil, &room) {
			got += bytes.Count(k.bytes(), []byte("quiet"))
			k.free()
		}
	}
	room := 1 << 30
	for _, k := range q.take(nil, &room) {
		got += bytes.Count(k.bytes(), []byte("quiet"))
		k.free()
	}
	if got < 190 {
		t.Errorf("%d of 200 packets came through", got)
	}
}
