package server

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// relayFeed is a relay's stream of members.
type relayFeed struct {
	body    io.ReadCloser
	members map[identity.NodePublic]bool
	code    wire.ErrorCode
}

func (f *relayFeed) read() error {
	b, err := readFrame(f.body, false)
	if err != nil {
		return err
	}
	var u wire.RelayUpdate
	if err := json.Unmarshal(b, &u); err != nil {
		return err
	}
	if u.Full {
		clear(f.members)
	}
	for _, k := range u.Members {
		f.members[k] = true
	}
	for _, k := range u.Removed {
		delete(f.members, k)
	}
	if u.MeshCode != "" {
		f.code = u.MeshCode
	}
	return nil
}

func (f *relayFeed) until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		if err := f.read(); err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

func relayRequest(key string, node identity.NodePublic, region int) *wire.RelayRequest {
	return &wire.RelayRequest{Version: wire.CapabilityVersion, RelayKey: key, NodeKey: node, Region: &wire.DERPRegion{
		RegionID: region, RegionCode: "r", Nodes: []*wire.DERPNode{{Name: "r", HostName: "relay.example.com", DERPPort: 443}},
	}}
}

// relay opens a relay's stream, or returns status and code of the refusal.
func (m *machine) relay(req *wire.RelayRequest) (*relayFeed, int, wire.ErrorCode) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	m.t.Cleanup(cancel)
	resp, err := m.post(ctx, "/machine/relay", req)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		return nil, resp.StatusCode, wire.ErrorCode(resp.Header.Get(wire.ErrorHeader))
	}
	f := &relayFeed{body: resp.Body, members: map[identity.NodePublic]bool{}}
	if err := f.read(); err != nil {
		m.t.Fatal(err)
	}
	return f, 200, ""
}

func TestRelayStream(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a := w.machine().join(key)
	na := a.poll(nil)
	rk := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
	relayKey := identity.NewNode().Public()
	m := w.machine()
	f, status, _ := m.relay(relayRequest(rk, relayKey, 901))
	if status != 200 || len(f.members) != 1 || !f.members[a.key.Public()] {
		t.Fatalf("status %d, members %v", status, f)
	}
	na.until(t, "the relay in the map", func() bool { return na.derp.Regions[901] != nil && na.derp.Regions[900] != nil })
	b := w.machine().join(key)
	f.until(t, "b", func() bool { return f.members[b.key.Public()] })
	if err := w.s.RemoveNode(context.Background(), "test", "agent-1"); err != nil {
		t.Fatal(err)
	}
	f.until(t, "b's removal", func() bool { return !f.members[b.key.Public()] })

	// The relay comes back: the newer stream replaces the older.
	f2, _, _ := w.machine().relay(relayRequest(rk, relayKey, 901))
	if err := f.read(); err != io.EOF {
		t.Errorf("older stream: %v, want its end", err)
	}
	// Others cannot take its place, nor that of the server's own relay.
	other := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
	for _, region := range []int{900, 901} {
		if _, status, _ := w.machine().relay(relayRequest(other, identity.NewNode().Public(), region)); status != http.StatusConflict {
			t.Errorf("region %d taken over: status %d", region, status)
		}
	}
	for name, bad := range map[string]*wire.RelayRequest{
		"region 0":     relayRequest(rk, relayKey, 0),
		"region 70000": relayRequest(rk, relayKey, 70000),
		"no key":       relayRequest(rk, identity.NodePublic{}, 902),
		"no region":    {RelayKey: rk, NodeKey: relayKey},
	} {
		if _, status, _ := w.machine().relay(bad); status != http.StatusBadRequest {
			t.Errorf("%s: status %d, want 400", name, status)
		}
	}
	for name, key := range map[string]string{"auth key": key, "nonsense": "mesh-relay-1-x", "none": ""} {
		if _, status, code := w.machine().relay(relayRequest(key, relayKey, 903)); status != 403 || code != wire.CodeRelayKeyUnknown {
			t.Errorf("%s: %d %s", name, status, code)
		}
	}
	// Kept over a restart, until it is removed.
	f2.body.Close()
	na.cancel()
	w.stop()
	w.start(nil)
	a.connect()
	na = a.poll(nil)
	if na.derp.Regions[901] == nil {
		t.Error("relay forgotten over a restart")
	}
	m.connect()
	f, _, _ = m.relay(relayRequest(rk, relayKey, 901))
	c := w.admin()
	if err := c.RemoveRelay(context.Background(), "901"); err != nil {
		t.Fatal(err)
	}
	for f.read() == nil {
	}
	if f.code != wire.CodeRelayKeyUnknown {
		t.Errorf("removed relay's stream ended with %q", f.code)
	}
	na.until(t, "the relay to leave the map", func() bool { return na.derp.Regions[901] == nil })
}

// admin serves the admin API on a unix socket and returns a client.
func (w *world) admin() *admin.Client {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "s")
	srv := &http.Server{Handler: w.s.AdminHandler()}
	l := listenUnix(w.t, path)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(l)
	}()
	w.t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return admin.NewClient(path)
}
