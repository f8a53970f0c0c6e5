package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

// registerSlowly sends a registration but for its last byte, which finish sends.
func (m *machine) registerSlowly(authKey string) (got chan error, finish func()) {
	b, err := json.Marshal(m.registerRequest(authKey))
	if err != nil {
		m.t.Fatal(err)
	}
	r, w := io.Pipe()
	got = make(chan error, 1)
	go func() {
		resp, err := m.http.Post("http://control/machine/register", "", r)
		if err == nil {
			var out wire.RegisterResponse
			if err = json.NewDecoder(resp.Body).Decode(&out); err == nil && !out.MachineAuthorized {
				err = fmt.Errorf("refused: %+v", out)
			}
			resp.Body.Close()
		}
		got <- err
	}()
	w.Write(b[:len(b)-1])
	return got, func() {
		w.Write(b[len(b)-1:])
		w.Close()
	}
}

// A server that goes away tells nodes to come back within a while, answers what
// it has begun, and takes nothing new.
func TestShutdown(t *testing.T) {
	bubble(t, withLogin, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		a := w.machine().join(key)
		na := a.poll(nil)
		b, late := w.machine(), w.machine()
		late.lite(nil) // it has its connection
		waiter := w.machine()
		resp, err := waiter.register(waiter.registerRequest(""))
		if err != nil || resp.AuthURL == "" {
			t.Fatalf("%+v %v", resp, err)
		}
		follow := waiter.registerRequest("")
		follow.Followup = resp.AuthURL
		waited := make(chan error, 1)
		go func() {
			_, err := waiter.register(follow)
			waited <- err
		}()
		// A registration that is being served while the end comes.
		got, finish := b.registerSlowly(key)
		synctest.Wait()
		down := make(chan error, 1)
		go func() { down <- w.s.Shutdown(t.Context()) }()
		for err == nil {
			err = na.read()
		}
		if !errors.Is(err, io.EOF) || na.last.MeshRetryWithin < 250 || na.code != "" {
			t.Errorf("the stream ended with %v, last message %+v", err, na.last)
		}
		if status, _ := late.lite(nil); status != 503 {
			t.Errorf("a request during the end: status %d", status)
		}
		if h := w.s.Health(t.Context()); h.Ready || h.Checks["server"] != "ends" {
			t.Errorf("ready all the same: %+v", h)
		}
		select {
		case err := <-down:
			t.Fatalf("Shutdown returned %v before all was answered", err)
		default:
		}
		finish()
		if err := <-got; err != nil {
			t.Errorf("the registration under way: %v", err)
		}
		if err := <-down; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-waited; err != nil {
			t.Errorf("who waits for a login is left without an answer: %v", err)
		}
	})
}

// What does not end is not waited for longer than said.
func TestShutdownHasALimit(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		key := w.key(store.Key{})
		got, finish := w.machine().registerSlowly(key)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := w.s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		finish()
		<-got
	})
}
