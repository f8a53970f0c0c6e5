package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const chunk = 64 << 10

// sink receives streams and checks every byte.
type sink struct {
	mu      sync.Mutex // guards the fields below
	done    int
	failed  []string
	changed chan struct{} // closed at the next end of a stream
}

func (s *sink) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done++
	if err != nil {
		s.failed = append(s.failed, err.Error())
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// take reads a stream to its end and answers with its length.
func take(c net.Conn) error {
	defer c.Close()
	buf := make([]byte, 4*chunk)
	var n int64
	for {
		k, err := c.Read(buf)
		if verr := verify(buf[:k], n); verr != nil {
			return verr
		}
		n += int64(k)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
	}
	_, err := fmt.Fprintf(c, "%20d", n)
	return err
}

// give sends a stream until the time is up or size bytes are sent, and waits
// until all of it was received and checked.
func give(ctx context.Context, n Node, addr string, size int64, until time.Time) (int64, error) {
	c, err := n.Dial(ctx, addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var sent int64
	for (size == 0 || sent < size) && (size > 0 || time.Now().Before(until)) {
		k := chunk - 64
		if size > 0 {
			k = int(min(int64(k), size-sent))
		}
		m, err := c.Write(at(sent, k))
		sent += int64(m)
		if err != nil {
			return sent, fmt.Errorf("after %d bytes: %w", sent, err)
		}
	}
	h, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return sent, fmt.Errorf("%T has no CloseWrite", c)
	}
	if err := h.CloseWrite(); err != nil {
		return sent, err
	}
	var answer [20]byte
	c.SetReadDeadline(time.Now().Add(Patience))
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return sent, fmt.Errorf("no receipt for %d bytes: %w", sent, err)
	}
	var got int64
	if _, err := fmt.Sscan(string(answer[:]), &got); err != nil || got != sent {
		return sent, fmt.Errorf("sent %d bytes, of which %q arrived", sent, answer)
	}
	return sent, nil
}

// StreamArgs tell to send to a sink.
type StreamArgs struct {
	Node, Addr string
	Streams    int
	Seconds    float64
	Bytes      int64 // of each, instead of Seconds
}

// Streamed is what was moved and checked.
type Streamed struct {
	Bytes   int64
	Seconds float64
	Lost    []string // errors of streams
}

func (a *agent) stream(ctx context.Context, s StreamArgs) (any, error) {
	var to []string
	for range s.Streams {
		to = append(to, s.Addr)
	}
	return give1(ctx, a.node(s.Node), to, s.Bytes, s.Seconds)
}

// SpreadArgs tell to send to several sinks at once.
type SpreadArgs struct {
	Node  string
	Addrs []string
	Bytes int64 // to each
}

func (a *agent) spread(ctx context.Context, s SpreadArgs) (any, error) {
	return give1(ctx, a.node(s.Node), s.Addrs, s.Bytes, 0)
}

// give1 sends a stream to each address.
func give1(ctx context.Context, n Node, to []string, size int64, seconds float64) (any, error) {
	begin := time.Now()
	until := begin.Add(time.Duration(seconds * float64(time.Second)))
	var (
		mu  sync.Mutex // guards out
		out Streamed
		wg  sync.WaitGroup
	)
	for _, addr := range to {
		wg.Go(func() {
			k, err := give(ctx, n, addr, size, until)
			mu.Lock()
			defer mu.Unlock()
			out.Bytes += k
			if err != nil {
				out.Lost = append(out.Lost, err.Error())
			}
		})
	}
	wg.Wait()
	out.Seconds = time.Since(begin).Seconds()
	return out, nil
}

// Sunk is what a sink saw.
type Sunk struct {
	Done   int
	Failed []string
}

// sunk tells how the streams ended that the process received.
func (a *agent) sunk(context.Context, None) (any, error) {
	var out Sunk
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.sinks {
		s.mu.Lock()
		out.Done += s.done
		out.Failed = append(out.Failed, s.failed...)
		s.mu.Unlock()
	}
	return out, nil
}
