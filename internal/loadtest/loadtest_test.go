package loadtest

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/pgserver"
)

func TestMain(m *testing.M) {
	if Served() {
		return
	}
	goleak.VerifyTestMain(m)
}

// serve starts a control server in this process.
func serve(t *testing.T) Config {
	dir, err := os.MkdirTemp("", "load") // short enough for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h, err := host.Start(host.Config{
		DataDir: dir, Listen: "127.0.0.1:0", NoRelay: true, STUN: "off", EphemeralTimeout: 3 * time.Second, OfflineGrace: 2 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return Config{URL: h.URL(), Key: h.Key(), Admin: admin.NewClient(h.Socket()), Resume: true, Log: t.Logf}
}

// TestPhases runs all phases with some nodes. Each phase compares what every
// node knows with what is.
func TestPhases(t *testing.T) {
	for _, test := range []struct {
		name         string
		nodes, group int
	}{
		{"all see all", 100, 0},
		{"groups", 200, 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			cfg := serve(t)
			cfg.Nodes, cfg.Group = test.nodes, test.group
			if testing.Short() && test.group == 0 {
				cfg.Nodes /= 2 // all see all: a quarter of the work
			}
			m, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			for _, phase := range []func() Phase{
				func() Phase { return m.Join(ctx) },
				func() Phase { return m.Endpoints(ctx, 4) },
				func() Phase { return m.Newcomers(ctx, 3) },
				func() Phase { return m.Policy(ctx) },
				func() Phase { return m.Reconnect(ctx) },
				func() Phase { return m.Churn(ctx, 20, time.Second, 100*time.Millisecond) },
				func() Phase { return m.Revoke(ctx, 3) },
			} {
				if p := phase(); p.Err != nil {
					t.Fatal(p.Name, p.Err)
				}
			}
		})
	}
}

// TestKill kills one of two replicas under some nodes.
func TestKill(t *testing.T) {
	if _, err := pgserver.Find(); err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	r, err := StartReplicas(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cfg := r.Config()
	cfg.Nodes, cfg.Log = 40, t.Logf
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, phase := range []func() Phase{
		func() Phase { return m.Join(ctx) },
		func() Phase { return m.Kill(ctx, r) },
		func() Phase { return m.Endpoints(ctx, 4) },
	} {
		p := phase()
		for _, note := range p.Notes {
			t.Log(note)
		}
		if p.Err != nil {
			t.Fatal(p.Name, p.Err)
		}
	}
}

// TestCheck shows that wrong views are found.
func TestCheck(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := serve(t)
	cfg.Nodes = 3
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if p := m.Join(ctx); p.Err != nil {
		t.Fatal(p.Err)
	}
	v, other := &m.nodes[0].view, m.nodes[1]
	id := other.view.id()
	for name, spoil := range map[string]func(p *peer){
		"missing": func(*peer) { delete(v.peers, id) },
		"foreign": func(*peer) { v.peers[99] = v.peers[id] },
		"offline": func(p *peer) { v.peers[id] = &peer{id: id, key: p.key, disco: p.disco, endpoints: p.endpoints} },
		"key":     func(p *peer) { v.peers[id] = &peer{id: id, disco: p.disco, endpoints: p.endpoints, online: true} },
		"old":     func(p *peer) { v.peers[id] = &peer{id: id, key: p.key, disco: p.disco, online: true} },
	} {
		v.mu.Lock()
		p := v.peers[id]
		spoil(p)
		v.mu.Unlock()
		if m.Check() == nil {
			t.Errorf("%s: not found", name)
		}
		v.mu.Lock()
		delete(v.peers, 99)
		v.peers[id] = p
		v.mu.Unlock()
	}
	if err := m.Check(); err != nil {
		t.Error(err)
	}
}

// FuzzMembers compares what is found in objects with what encoding/json finds.
func FuzzMembers(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"a":1,"b":[1,{"c":"}\""}],"d":null}`, `{"a":"\\"}`, ` { "x" : [ ] , "y" : "z" } `, `{"a":{}`, `{"a":1,}`, `{"a"}`, `[`, `{"a":}`, `{"a":"`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got := make(map[string]string)
		err := members(b, func(key, value []byte) error {
			if elements(value, func([]byte) error { return nil }) == nil && json.Valid(b) && value[0] != '[' && string(value) != "null" {
				return errors.New("elements of what is no array")
			}
			var k string
			if json.Unmarshal([]byte(`"`+string(key)+`"`), &k) == nil {
				got[k] = string(value)
			}
			return nil
		})
		var want map[string]json.RawMessage
		if json.Unmarshal(b, &want) != nil || want == nil {
			return // it only has to end
		}
		if err != nil || len(got) != len(want) {
			t.Fatalf("%q: %v: %d members, want %d", b, err, len(got), len(want))
		}
		for k, v := range want {
			if got[k] != string(v) {
				t.Fatalf("%q: %q is %q, want %q", b, k, got[k], v)
			}
		}
	})
}
