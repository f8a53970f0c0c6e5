package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"mesh/control/wire"
	"mesh/identity"
)

// following runs a map stream on the side, and returns what it hands over and
// how it ends.
func following(ctx context.Context, c *Client, handle func(*wire.MapResponse) error) <-chan error {
	end := make(chan error, 1)
	go func() {
		end <- c.Stream(ctx, func() wire.MapRequest { return wire.MapRequest{} }, handle)
	}()
	return end
}

func nothing(*wire.MapResponse) error { return nil }

func TestStream(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		var got []*wire.MapResponse
		mine := errors.New("enough")
		end := following(t.Context(), f.client(), func(r *wire.MapResponse) error {
			if got = append(got, r); len(got) == 3 {
				return mine
			}
			return nil
		})
		p := <-f.polls
		if p.req.Version != wire.CapabilityVersion || !p.req.Stream || p.req.Compress != "zstd" || !p.req.KeepAlive || p.req.OmitPeers {
			t.Errorf("request %+v", p.req)
		}
		now := time.Now()
		p.send(wire.MapResponse{Domain: "one"})
		p.send(wire.MapResponse{KeepAlive: true})
		p.send(wire.MapResponse{KeepAlive: true, ControlTime: &now})
		p.send(wire.MapResponse{Domain: strings.Repeat("long ", 1<<19)})
		if err := <-end; !errors.Is(err, mine) {
			t.Errorf("end: %v", err)
		}
		if len(got) != 3 || got[0].Domain != "one" || got[1].ControlTime == nil || len(got[2].Domain) < 1<<20 {
			t.Errorf("got %d messages", len(got))
		}
	})
}

func TestWatchdog(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		c := f.client()
		var un *UnreachableError

		// Keep-alives hold a stream up for hours; 120 s of silence end it.
		start := time.Now()
		end := following(t.Context(), c, nothing)
		p := <-f.polls
		for range 200 {
			time.Sleep(wire.KeepAliveInterval)
			p.send(wire.MapResponse{KeepAlive: true})
		}
		err := <-end
		if d := time.Since(start) - 200*wire.KeepAliveInterval; !errors.As(err, &un) || d != wire.Watchdog || !strings.Contains(err.Error(), "nothing was heard for 2m0s") {
			t.Errorf("after %v of silence: %v", d, err)
		}

		// It counts from the request on, though other requests go through.
		start = time.Now()
		err = <-following(t.Context(), c, nothing)
		if d := time.Since(start); !errors.As(err, &un) || d != wire.Watchdog {
			t.Errorf("without an answer, after %v: %v", d, err)
		}
		// And a connection on which that happened is not used again.
		if n := f.upgrades.Load(); n != 2 {
			t.Errorf("%d connections", n)
		}
	})
}

func TestStreamEnds(t *testing.T) {
	bomb := pack(make([]byte, 10<<20))
	text := pack([]byte(`{"Domain":"x"}`))
	var st *StatusError
	for name, test := range map[string]struct {
		play  func(*poll)
		check func(error) bool
	}{
		"end":          {func(p *poll) {}, func(err error) bool { return errors.Is(err, ErrStreamEnded) }},
		"end later":    {func(p *poll) { p.send(wire.MapResponse{}) }, func(err error) bool { return errors.Is(err, ErrStreamEnded) }},
		"revoked":      {func(p *poll) { p.send(wire.MapResponse{MeshCode: wire.CodeNodeRevoked}) }, func(err error) bool { return errors.Is(err, wire.ErrNodeRevoked) && IsFatal(err) }},
		"cloned":       {func(p *poll) { p.send(wire.MapResponse{KeepAlive: true, MeshCode: wire.CodeCloned}) }, func(err error) bool { return errors.Is(err, wire.ErrCloned) && IsFatal(err) }},
		"unknown code": {func(p *poll) { p.send(wire.MapResponse{MeshCode: "later"}) }, func(err error) bool { return errors.Is(err, ErrStreamEnded) && !IsFatal(err) }},
		"status": {func(p *poll) { p.answer(status(404, "node not found")) }, func(err error) bool {
			return errors.As(err, &st) && st.Status == 404 && errors.Is(err, wire.ErrNodeUnknown)
		}},
		"other status": {func(p *poll) { p.answer(status(404, "no such page")) }, func(err error) bool { return errors.As(err, &st) && st.Status == 404 && !IsFatal(err) }},
		"oversize":     {func(p *poll) { p.raw([]byte{0xff, 0xff, 0xff, 0xff}) }, func(err error) bool { return strings.Contains(err.Error(), "too long") }},
		"cut head":     {func(p *poll) { p.raw([]byte{1, 0}) }, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		"cut body":     {func(p *poll) { p.raw(frame(text)[:10]) }, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		"plain JSON":   {func(p *poll) { p.raw(frame([]byte(`{}`))) }, func(err error) bool { return strings.Contains(err.Error(), "decompress") }},
		"bomb":         {func(p *poll) { p.raw(frame(bomb)) }, func(err error) bool { return strings.Contains(err.Error(), "no sense") }},
		"empty":        {func(p *poll) { p.raw(frame(nil)) }, func(err error) bool { return strings.Contains(err.Error(), "empty") }},
		"no JSON":      {func(p *poll) { p.raw(frame(pack([]byte("nonsense")))) }, func(err error) bool { return strings.Contains(err.Error(), "no sense") }},
	} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, f *fake) {
				end := following(t.Context(), f.client(), nothing)
				p := <-f.polls
				test.play(p)
				p.end()
				if err := <-end; err == nil || !test.check(err) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestStreamConnectionLost(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		c := f.client()
		end := following(t.Context(), c, nothing)
		(<-f.polls).send(wire.MapResponse{})
		synctest.Wait()
		f.cut()
		var un *UnreachableError
		if err := <-end; !errors.As(err, &un) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		end = following(ctx, c, nothing)
		<-f.polls
		mine := errors.New("node stops")
		cancel(mine)
		if err := <-end; !errors.Is(err, mine) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

func TestFrameBounds(t *testing.T) {
	bomb := pack(make([]byte, 1<<20))
	for name, test := range map[string]struct {
		in         []byte
		compressed bool
	}{
		"bomb":  {frame(bomb), true},
		"bombs": {frame(bytes.Repeat(pack(make([]byte, 900)), 2)), true},
		"plain": {frame(make([]byte, 1001)), false},
	} {
		r := newFrameReader(bytes.NewReader(test.in), test.compressed, 1000, 1000)
		var m wire.MapResponse
		if err := r.next(&m); err == nil || strings.Contains(err.Error(), "no sense") {
			t.Errorf("%s: %v", name, err)
		}
		r.close()
	}
	// A length that never comes takes no memory.
	r := newFrameReader(bytes.NewReader([]byte{0, 0, 0, 4, '{'}), false, wire.MaxMapFrame, wire.MaxMapMessage)
	var m wire.MapResponse
	if err := r.next(&m); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	if n := r.take().buf.Cap(); n > 1<<16 {
		t.Errorf("%d bytes of buffer stay", n)
	}
}

// TestQuietStreamKeepsNothing checks that what messages are unpacked with is there
// for the next of a burst, and gone after it.
func TestQuietStreamKeepsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		message := frame(pack([]byte(`{"Domain":"x"}`)))
		r := newFrameReader(bytes.NewReader(bytes.Repeat(message, 3)), true, wire.MaxMapFrame, wire.MaxMapMessage)
		spare := func() *unpacker {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.spare
		}
		var first *unpacker
		for i := range 3 {
			var m wire.MapResponse
			if err := r.next(&m); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				first = spare()
			} else if spare() != first {
				t.Errorf("message %d was unpacked with something else", i)
			}
			time.Sleep(keepUnpacker - 1)
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if spare() != nil {
			t.Error("it stays")
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add(append(frame([]byte(`{"KeepAlive":true}`)), frame([]byte(`{"Domain":"x"}`))...), false)
	f.Add(append(frame(pack([]byte(`{"KeepAlive":true}`))), frame(pack([]byte(`{"Domain":"x"}`)))...), true)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0}, true)
	f.Fuzz(func(t *testing.T, in []byte, compressed bool) {
		r := newFrameReader(bytes.NewReader(in), compressed, 1<<16, 1<<16)
		defer r.close()
		for {
			var m wire.MapResponse
			if err := r.next(&m); err != nil {
				break
			}
		}
		if !compressed {
			return
		}
		// What our own packer makes of it comes back.
		e, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		defer e.Close()
		b, _ := json.Marshal(string(in))
		if len(b) > 1<<16 {
			return
		}
		again := newFrameReader(bytes.NewReader(frame(e.EncodeAll(b, nil))), true, 1<<17, 1<<16)
		defer again.close()
		var s string
		if err := again.next(&s); err != nil {
			t.Errorf("%q: %v", b, err)
		}
	})
}

func TestPingRequests(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		end := following(t.Context(), f.client(), nothing)
		p := <-f.polls
		for _, r := range []wire.PingRequest{
			{URL: "http://control.test/ping?id=1"},
			{URL: "http://control.test/ping?id=1"}, // again
			{URL: "https://any/ping?id=2", URLIsNoise: true},
			{URL: "http://127.0.0.1/ping?id=3"},
			{URL: "http://control.test.evil/ping?id=4"},
			{URL: "https://control.test/ping?id=5"},
			{URL: "http://control.test:81/ping?id=6"},
			{URL: "http://user@control.test/ping?id=7"},
			{URL: "file:///ping"},
			{URL: "::"},
			{URL: ""},
			{URL: "http://control.test/ping?id=8", Types: "c2n"},
			{URL: "http://control.test/ping?id=9"},
		} {
			p.send(wire.MapResponse{KeepAlive: true, PingRequest: &r})
			synctest.Wait()
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if want := []string{"/ping?id=1", "inside /ping?id=2", "/ping?id=9"}; !slices.Equal(f.heads, want) {
			t.Errorf("asked for %q, want %q", f.heads, want)
		}
		p.end()
		<-end
	})
}

func TestRelay(t *testing.T) {
	inMemory(t, func(t *testing.T, f *fake) {
		c := f.client()
		key := identity.NewNode().Public()
		var got []wire.RelayUpdate
		end := make(chan error, 1)
		follow := func() {
			end <- c.Relay(t.Context(), wire.RelayRequest{RelayKey: "secret", NodeKey: key}, func(u *wire.RelayUpdate) error {
				got = append(got, *u)
				return nil
			})
		}
		go follow()
		p := <-f.polls
		if p.relay.NodeKey != key || p.relay.Version != wire.CapabilityVersion {
			t.Errorf("request %+v", p.relay)
		}
		p.send(wire.RelayUpdate{Full: true, Members: []wire.NodeKey{key}})
		for range 10 {
			time.Sleep(wire.KeepAliveInterval)
			p.send(wire.RelayUpdate{KeepAlive: true})
		}
		p.send(wire.RelayUpdate{Removed: []wire.NodeKey{key}})
		start := time.Now()
		var un *UnreachableError
		if err := <-end; !errors.As(err, &un) || time.Since(start) != wire.Watchdog {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		if len(got) != 2 || !got[0].Full || len(got[1].Removed) != 1 {
			t.Errorf("got %+v", got)
		}
		go follow()
		p = <-f.polls
		p.send(wire.RelayUpdate{MeshCode: wire.CodeRelayKeyUnknown})
		if err := <-end; !errors.Is(err, wire.ErrRelayKeyUnknown) || !IsFatal(err) {
			t.Errorf("got %v", err)
		}
		go follow()
		p = <-f.polls
		p.answer(status(http.StatusForbidden, "no", wire.ErrorHeader, string(wire.CodeRelayKeyUnknown)))
		p.end()
		if err := <-end; !errors.Is(err, wire.ErrRelayKeyUnknown) || strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("got %v", err)
		}
	})
}

// A server that says that it will be back is not asked at once, nor by all nodes
// at the same moment, nor after more time than it may ask for.
func TestRestartHint(t *testing.T) {
	for _, within := range []int{500, 1 << 40} {
		seen := map[time.Duration]bool{}
		for range 20 {
			err := error(fmt.Errorf("map stream: %w", newRestartError(within)))
			if !errors.Is(err, ErrStreamEnded) || IsFatal(err) {
				t.Fatalf("%v", err)
			}
			after := RetryAfter(err)
			if after < 0 || after >= min(time.Duration(within)*time.Millisecond, maxRestart) {
				t.Errorf("within %d: after %v", within, after)
			}
			seen[after] = true
		}
		if len(seen) < 2 {
			t.Errorf("within %d: always after the same time", within)
		}
	}
}
