package server

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
)

func online(p *wire.Node) bool { return p != nil && p.Online != nil && *p.Online }

func TestOfflineAfterGrace(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		a, b := w.machine().join(key), w.machine().join(key)
		na, nb := a.poll(nil), b.poll(nil)
		id := nb.self.ID
		na.until(t, "b online", func() bool { return online(na.peers[id]) })
		gone := time.Now()
		nb.cancel()
		na.until(t, "b offline", func() bool { return !online(na.peers[id]) })
		if d := time.Since(gone); d < 10*time.Second || d > 11*time.Second {
			t.Errorf("offline after %v, want 10 s", d)
		}
		if p := na.peers[id]; p.LastSeen == nil || p.LastSeen.Sub(gone).Abs() > time.Second {
			t.Errorf("last seen %v, want %v", p.LastSeen, gone)
		}
		// A reconnect within the grace is not worth a word.
		nb = b.poll(nil)
		na.until(t, "b online again", func() bool { return online(na.peers[id]) })
		nb.cancel()
		time.Sleep(5 * time.Second)
		b.poll(nil)
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if n := w.s.nodes.byID[id]; n.online != presenceOnline {
			t.Error("a stale disconnect overrode the newer session")
		}
	})
}

func TestEphemeralRemoval(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true, Ephemeral: true})
		a, b, c := w.machine().join(w.key(store.Key{})), w.machine().join(key), w.machine().join(key)
		na, nb := a.poll(nil), b.poll(nil)
		id := nb.self.ID
		gone := time.Now()
		nb.cancel()
		na.until(t, "b removed", func() bool { return na.peers[id] == nil })
		if d := time.Since(gone); d < 120*time.Second || d > 122*time.Second {
			t.Errorf("removed after %v, want 120 s", d)
		}
		if status, code := b.lite(nil); status != 404 || code != wire.CodeNodeUnknown {
			t.Errorf("removed node: %d %s", status, code)
		}
		// c has never polled: it is not counted yet.
		nc := c.poll(nil)
		na.until(t, "c online", func() bool { return online(na.peers[nc.self.ID]) })
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(w.s.deadline) > 2 {
			t.Errorf("%d deadlines for 2 nodes", len(w.s.deadline))
		}
		if len(w.s.nodes.byID) != 2 {
			t.Errorf("%d nodes, want the connected ephemeral one to stay", len(w.s.nodes.byID))
		}
	})
}

func TestKeyExpires(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		u, err := w.store.CreateUser(context.Background(), "test", "alice", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		w.s.users[u.ID] = u
		a, b := w.machine().join(w.key(store.Key{Reusable: true})), w.machine().join(w.key(store.Key{User: u.ID}))
		na := a.poll(nil)
		nb := b.poll(nil)
		id := nb.self.ID
		if d := time.Until(nb.self.KeyExpiry); d < 89*24*time.Hour || d > 90*24*time.Hour {
			t.Errorf("key expires in %v, want 90 days", d)
		}
		if got := na.users[u.ID].LoginName; got != "alice" {
			na.until(t, "alice's name", func() bool { return na.users[u.ID].LoginName == "alice" })
		}
		// An earlier expiry may be wished for.
		at := time.Now().Add(time.Hour).UTC()
		req := b.registerRequest("")
		req.Expiry = at
		if resp, err := b.register(req); err != nil || !resp.MachineAuthorized {
			t.Fatalf("%+v %v", resp, err)
		}
		na.until(t, "the earlier expiry", func() bool { return na.peers[id].KeyExpiry.Equal(at) })
		done := make(chan wire.ErrorCode, 1)
		go func() { done <- nb.end(t) }()
		na.until(t, "b's expiry", func() bool { return na.peers[id].Expired })
		if d := time.Since(at); d < 0 || d > time.Second {
			t.Errorf("expired %v after its time", d)
		}
		if code := <-done; code != wire.CodeNodeKeyExpired {
			t.Errorf("stream ended with %q", code)
		}
		if w.s.Admit(b.key.Public()) {
			t.Error("an expired node is still a member")
		}
	})
}

func TestKeepAlive(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		for _, compress := range []string{"zstd", ""} {
			m := w.machine().join(w.key(store.Key{}))
			n := m.poll(func(r *wire.MapRequest) { r.Compress = compress })
			for n.last.Node != nil || !n.last.KeepAlive { // what came with the start
				before := time.Now()
				if err := n.read(); err != nil {
					t.Fatal(err)
				}
				if d := time.Since(before); n.last.KeepAlive && (d < 50*time.Second || d > 60*time.Second) {
					t.Errorf("keep-alive after %v", d)
				}
			}
			n.cancel()
		}
	})
}

// A stream that is woken for nothing, time and again, is kept alive all the same.
func TestKeepAliveAmongIdleWakes(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		m := w.machine().join(w.key(store.Key{}))
		n := m.poll(nil)
		n.until(t, "a keep-alive", func() bool { return n.last.KeepAlive })
		stop := make(chan struct{})
		woken := make(chan struct{})
		go func() {
			defer close(woken)
			for range 60 {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Second):
				}
				w.s.mu.Lock()
				st := w.s.nodes.byKey[m.key.Public()].stream
				w.s.mu.Unlock()
				select {
				case st.wake <- struct{}{}:
				default:
				}
			}
		}()
		before := time.Now()
		if err := n.read(); err != nil || !n.last.KeepAlive {
			t.Errorf("%+v, %v", n.last, err)
		}
		if d := time.Since(before); d > 60*time.Second {
			t.Errorf("keep-alive after %v", d)
		}
		close(stop)
		<-woken
	})
}

func TestSecondPollReplacesFirst(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		a := w.machine().join(key)
		n1 := a.poll(nil)
		n2 := a.poll(nil)
		if code := n1.end(t); code != "" {
			t.Errorf("replaced over the same connection: %q, want no reason", code)
		}
		// Another connection means that somebody runs a copy.
		twin := a.clone()
		n3 := twin.poll(nil)
		if code := n2.end(t); code != wire.CodeCloned {
			t.Errorf("replaced by another connection: %q, want %q", code, wire.CodeCloned)
		}
		// The newest works on, and the end of the others does not count.
		w.machine().join(key)
		n3.until(t, "a new peer", func() bool { return len(n3.peers) == 1 })
		time.Sleep(time.Minute)
		synctest.Wait()
		if w.s.nodes.byKey[a.key.Public()].online != presenceOnline {
			t.Error("node counts as offline")
		}
		// Copies that chase each other are slowed down.
		limited := false
		for i := range 30 {
			m := a
			if i%2 == 1 {
				m = twin
			}
			req := m.mapRequest()
			req.Stream = true
			resp, err := m.post(t.Context(), "/machine/map", req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode == http.StatusTooManyRequests && resp.Header.Get("Retry-After") != "" {
				limited = true
			}
		}
		if !limited {
			t.Error("nothing limits how often a poll changes hands")
		}
	})
}

// wordy makes the n-th of many changes that are too long for a patch.
func wordy(n int) func(*wire.MapRequest) {
	return func(r *wire.MapRequest) {
		for i := range maxServices {
			r.Hostinfo.Services = append(r.Hostinfo.Services, wire.Service{Proto: "tcp", Port: uint16(n), Description: fmt.Sprintf("%0*d", maxText, i)})
		}
	}
}

func TestSlowReader(t *testing.T) {
	bubble(t, func(c *Config) { c.Gather = -1 }, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		a, b := w.machine().join(key), w.machine().join(key)
		na := a.poll(func(r *wire.MapRequest) { r.Compress = "" })
		id := b.poll(nil).self.ID
		// a does not read while b changes again and again. What does not fit
		// on the way is not kept: only the newest state is.
		const changes = 600
		for i := range changes {
			b.lite(wordy(i + 1))
			synctest.Wait() // each is a message of its own, as long as there is room
		}
		w.s.mu.Lock()
		if p := w.s.nodes.byKey[a.key.Public()].stream.pending; len(p.peers) != 1 {
			t.Errorf("%d peers are pending for a reader that stopped, want 1", len(p.peers))
		}
		w.s.mu.Unlock()
		messages := 0
		na.until(t, "the newest state", func() bool {
			messages++
			p := na.peers[id]
			return p != nil && len(p.Hostinfo.Services) > 0 && p.Hostinfo.Services[0].Port == changes
		})
		if messages >= changes {
			t.Errorf("%d messages for %d changes", messages, changes)
		}
	})
}

func TestStalledReaderIsCut(t *testing.T) {
	bubble(t, func(c *Config) { c.Gather = -1 }, func(t *testing.T, w *world) {
		allow(w)
		key := w.key(store.Key{Reusable: true})
		a, b := w.machine().join(key), w.machine().join(key)
		na := a.poll(func(r *wire.MapRequest) { r.Compress = "" })
		nb := b.poll(nil)
		for i := range 500 {
			b.lite(wordy(i + 1))
			synctest.Wait()
		}
		stalled := time.Now()
		nb.until(t, "a to be offline", func() bool { p := nb.peers[na.self.ID]; return p != nil && p.Online != nil && !*p.Online })
		if d := time.Since(stalled); d > time.Minute {
			t.Errorf("a reader that takes nothing was kept for %v", d)
		}
	})
}

func TestRestart(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	a.lite(func(r *wire.MapRequest) { r.Hostinfo.NetInfo = &wire.NetInfo{PreferredDERP: 900} })
	na := a.poll(nil)
	serverKey := w.s.Key()
	w.stop()
	if err := na.read(); err == nil {
		for err == nil {
			err = na.read()
		}
	}
	w.start(nil)
	if w.s.Key() != serverKey {
		t.Fatal("server has another key after a restart")
	}
	a.connect()
	b.connect()
	if resp, err := b.register(b.registerRequest("")); err != nil || !resp.MachineAuthorized {
		t.Fatalf("restarted node: %+v %v", resp, err)
	}
	nb := b.poll(nil)
	p := nb.peers[na.self.ID]
	if p == nil || p.Key != a.key.Public() || p.DiscoKey != a.disco.Public() || p.HomeDERP != 900 || p.Addresses[0] != na.self.Addresses[0] {
		t.Errorf("peer after a restart: %+v", p)
	}
	if p.Online != nil {
		t.Errorf("online is %v right after a restart, want unknown", *p.Online)
	}
	if nb.policy != 1 {
		t.Errorf("policy %d, want 1", nb.policy)
	}
}
