package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"time"

	"go.uber.org/zap"

	"mesh/control/wire"
)

// ErrStreamEnded reports that the control server ended a stream without giving
// a reason: it restarts, or the node polls twice.
var ErrStreamEnded = errors.New("control server ended the stream")

// maxRestart bounds what a control server may ask for when it goes away for a
// moment.
const maxRestart = time.Minute

// restartError is an ErrStreamEnded of a server that will be back.
type restartError struct{ after time.Duration }

// newRestartError chooses a moment within so many milliseconds.
func newRestartError(within int) *restartError {
	return &restartError{rand.N(time.Duration(min(within, int(maxRestart/time.Millisecond))) * time.Millisecond)}
}

func (e *restartError) Error() string { return ErrStreamEnded.Error() + " and will be back" }

func (e *restartError) Unwrap() error { return ErrStreamEnded }

// pingTime bounds the answer to a ping request.
const pingTime = 15 * time.Second

// Stream runs one map poll: it asks with what req returns once there is a
// connection, and hands each message to handle, keep-alives only if they tell
// the time. It returns when ctx ends, when handle fails (with that error), or
// with a reason to start another poll; IsFatal tells for which there is no use
// in that. It never returns nil.
func (c *Client) Stream(ctx context.Context, req func() wire.MapRequest, handle func(*wire.MapResponse) error) error {
	ctx, cancel := c.during(ctx, 0)
	defer cancel(nil)
	if _, err := c.connect(ctx); err != nil {
		return fmt.Errorf("map stream: %w", err)
	}
	r := req()
	if r.Version == 0 {
		r.Version = wire.CapabilityVersion
	}
	r.Stream, r.OmitPeers, r.KeepAlive, r.Compress = true, false, true, "zstd"
	r.MeshReports, r.MeshMapVersion = true, 0 // which this stream has not named yet
	r.MeshInstance = c.cfg.Instance
	p := pinger{c: c}
	defer p.wait()
	defer cancel(nil)
	err := c.stream(ctx, "/machine/map", r, true, wire.MaxMapFrame, wire.MaxMapMessage, func(f *frameReader) error {
		var m wire.MapResponse
		if err := f.next(&m); err != nil {
			return err
		}
		if err := m.MeshCode.Err(); err != nil {
			return err
		}
		c.noteHeard()
		if m.MeshRetryWithin > 0 {
			return newRestartError(m.MeshRetryWithin)
		}
		if m.PingRequest != nil {
			p.answer(ctx, m.PingRequest)
		}
		if m.KeepAlive && m.ControlTime == nil {
			return nil
		}
		if err := handle(&m); err != nil {
			return handleError{err}
		}
		return nil
	})
	return fmt.Errorf("map stream: %w", err)
}

// Relay announces a relay, and hands what the control server says about its
// members to handle. It ends as Stream does.
func (c *Client) Relay(ctx context.Context, req wire.RelayRequest, handle func(*wire.RelayUpdate) error) error {
	ctx, cancel := c.during(ctx, 0)
	defer cancel(nil)
	if req.Version == 0 {
		req.Version = wire.CapabilityVersion
	}
	err := c.stream(ctx, "/machine/relay", req, false, maxRelayFrame, maxRelayFrame, func(f *frameReader) error {
		var u wire.RelayUpdate
		if err := f.next(&u); err != nil {
			return err
		}
		if err := u.MeshCode.Err(); err != nil {
			return err
		}
		if u.KeepAlive {
			return nil
		}
		if err := handle(&u); err != nil {
			return handleError{err}
		}
		return nil
	})
	return fmt.Errorf("relay stream: %w", err)
}

// handleError marks an error that is the caller's own.
type handleError struct{ error }

func (e handleError) Unwrap() error { return e.error }

// stream posts req and calls next until something fails. A silence of
// wire.Watchdog is a failure too, from the request on.
func (c *Client) stream(ctx context.Context, path string, req any, compressed bool, maxWire, maxJSON int, next func(*frameReader) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := &UnreachableError{c.base, fmt.Errorf("nothing was heard for %v", wire.Watchdog)}
	watchdog := time.AfterFunc(wire.Watchdog, func() { cancel(silence) })
	defer watchdog.Stop()

	resp, conn, err := c.post(ctx, path, req)
	if err != nil {
		if conn != nil && errors.Is(err, silence) {
			c.drop(conn)
		}
		return err
	}
	defer resp.Body.Close()
	f := newFrameReader(resp.Body, compressed, maxWire, maxJSON)
	defer f.close()
	f.heard = func() { watchdog.Reset(wire.Watchdog) }
	for {
		err := next(f)
		if err == nil {
			continue
		}
		var own handleError
		if errors.As(err, &own) {
			return own.error
		}
		if ctx.Err() != nil {
			if cause := context.Cause(ctx); cause == error(silence) {
				c.drop(conn) // it is as dead as the stream
			}
			return c.because(ctx, err)
		}
		if err == io.EOF {
			return c.because(ctx, ErrStreamEnded)
		}
		if conn.Err() != nil {
			c.drop(conn)
			return c.unreachable(ctx, fmt.Errorf("connection lost: %w", err))
		}
		return err
	}
}

// pinger answers the control server's ping requests, one at a time.
type pinger struct {
	c    *Client
	wg   sync.WaitGroup
	busy sync.Mutex // held while a request is answered
	last string     // URL of the last one; used by the stream's goroutine alone
}

func (p *pinger) wait() { p.wg.Wait() }

// answer shows that the node lives. It asks for no URL but those of the control
// server itself, so that nobody can make the node send requests elsewhere. What
// else a ping request may ask for is not offered.
func (p *pinger) answer(ctx context.Context, r *wire.PingRequest) {
	if r.Types != "" || r.URL == "" || r.URL == p.last {
		return
	}
	u, err := url.Parse(r.URL)
	if err != nil || !r.URLIsNoise && (u.Scheme != p.c.here().url.Scheme || u.Host != p.c.here().host) || u.User != nil {
		p.c.log.Debug("ping request to a URL that is not the control server's")
		return
	}
	if !p.busy.TryLock() {
		return
	}
	p.last = r.URL
	p.wg.Go(func() {
		defer p.busy.Unlock()
		ctx, cancel := context.WithTimeoutCause(ctx, pingTime, fmt.Errorf("no answer within %v", pingTime))
		defer cancel()
		if err := p.c.head(ctx, u, r.URLIsNoise); err != nil {
			p.c.log.Debug("ping request", zap.Error(err))
		}
	})
}

// head asks for the head of a URL of the control server.
func (c *Client) head(ctx context.Context, u *url.URL, inside bool) error {
	if !inside {
		req, err := http.NewRequestWithContext(ctx, http.MethodHead, u.String(), nil)
		if err != nil {
			return err
		}
		_, done, err := c.plain(req)
		if err != nil {
			return c.because(ctx, err)
		}
		done()
		return nil
	}
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, "https://"+c.here().host+u.RequestURI(), nil)
	if err != nil {
		return err
	}
	resp, err := conn.RoundTrip(req)
	if err != nil {
		return c.because(ctx, err)
	}
	return resp.Body.Close()
}

// probeTime is how long a living connection takes to show it.
const probeTime = 5 * time.Second

// Probe asks whether the connection, if there is one, still works, and closes
// it if not: what goes on over it ends with an *UnreachableError, and whatever
// comes next dials anew. Call it when the network has changed. It reports whether
// there was an answer.
func (c *Client) Probe(ctx context.Context) bool {
	conn := c.current()
	if conn == nil {
		return false
	}
	ctx, cancel := c.during(ctx, probeTime)
	defer cancel(nil)
	// Any answer will do, and servers have one for every path.
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, "https://"+c.here().host+"/machine/whoami", nil)
	if err != nil {
		return false
	}
	resp, err := conn.RoundTrip(req)
	if err == nil {
		resp.Body.Close()
		return true
	}
	var un *UnreachableError
	if ctx.Err() == nil || errors.As(context.Cause(ctx), &un) {
		c.log.Debug("connection to the control server is dead", zap.Error(c.because(ctx, err)))
		c.drop(conn)
	}
	return false
}
