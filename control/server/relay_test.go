package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
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
	mesh    *wire.RelayMesh // as told last
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
	if u.Mesh != nil {
		f.mesh = u.Mesh
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
	patience := 20 * time.Second
	if m.w.pipes {
		patience = 2 * time.Hour // of virtual time
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
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

// others returns with whom a relay forwards, by name.
func (f *relayFeed) others() (names []string) {
	for _, p := range f.mesh.Peers {
		names = append(names, p.Node.Name)
	}
	return names
}

// inMap returns the relays of a region as a node has them.
func inMap(m *wire.DERPMap, region int) (names []string) {
	if r := m.Regions[region]; r != nil {
		for _, n := range r.Nodes {
			names = append(names, n.Name)
		}
	}
	return names
}

// Relays with one relay key serve a region together: the map names them all,
// and they learn of each other, with a secret that changes when one comes or
// goes and that no node ever sees.
func TestRegionOfSeveralRelays(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		allow(w)
		node := w.machine().join(w.key(store.Key{Reusable: true})).poll(nil)
		rk := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
		request := func(port int) *wire.RelayRequest {
			r := relayRequest(rk, identity.NewNode().Public(), 901)
			r.Region.Nodes[0].Name, r.Region.Nodes[0].DERPPort = "901a", port
			return r
		}
		mapIs := func(names ...string) {
			t.Helper()
			node.until(t, fmt.Sprint(names), func() bool { return slices.Equal(inMap(node.derp, 901), names) })
		}
		told := func(f *relayFeed, names ...string) {
			t.Helper()
			f.until(t, fmt.Sprint(names), func() bool { return slices.Equal(f.others(), names) })
		}
		ra, rb := request(1), request(2)
		a, _, _ := w.machine().relay(ra)
		if len(a.others()) > 0 || a.mesh.Key != "" {
			t.Errorf("alone, but told %+v", a.mesh)
		}
		mapIs("901a")
		b, _, _ := w.machine().relay(rb)
		mapIs("901a", "901b")
		told(a, "901b")
		told(b, "901a")
		key := a.mesh.Key
		if key != b.mesh.Key || len(key) != 64 || a.mesh.Peers[0].NodeKey != rb.NodeKey || a.mesh.Peers[0].Node.DERPPort != 2 {
			t.Errorf("a is told %+v, b %+v", a.mesh, b.mesh)
		}
		// One of another region is none of their business, nor they of its.
		other, status, _ := w.machine().relay(relayRequest(rk, identity.NewNode().Public(), 902))
		if status != 200 || len(other.others()) > 0 {
			t.Errorf("another region: %d %+v", status, other)
		}
		c, _, _ := w.machine().relay(request(3))
		told(a, "901b", "901c")
		told(b, "901a", "901c")
		if a.mesh.Key == key || a.mesh.Key != c.mesh.Key || b.mesh.Key != c.mesh.Key {
			t.Error("the secret is the same with another relay")
		}
		mapIs("901a", "901b", "901c")
		three := a.mesh.Key

		// It drains: out of the map at once, but still one of the mesh and told
		// of members; forgotten when it has gone.
		rb.Leaving = true
		leave := func(r *wire.RelayRequest) int {
			t.Helper()
			_, status, _ := w.machine().relay(r)
			return status
		}
		if status := leave(rb); status != 200 {
			t.Fatalf("status %d", status)
		}
		mapIs("901a", "901c")
		late := w.machine().join(w.key(store.Key{Reusable: true}))
		b.until(t, "members while it drains", func() bool { return b.members[late.key.Public()] })
		b.body.Close()
		told(a, "901c")
		if a.mesh.Key == three || a.mesh.Key == key {
			t.Error("who left knows the secret")
		}
		if relays, _ := w.store.Relays(context.Background()); len(relays) != 3 {
			t.Errorf("%d relays stored", len(relays))
		}
		if status := leave(rb); status != 404 {
			t.Errorf("leaving twice: %d", status)
		}
		stranger := request(9)
		stranger.RelayKey, stranger.NodeKey, stranger.Leaving = w.key(store.Key{Kind: store.KeyRelay, Reusable: true}), ra.NodeKey, true
		if status := leave(stranger); status != 404 {
			t.Errorf("a relay made another one leave: %d", status)
		}

		// It is gone without a word: in the map for a while, then not, and at
		// its place when it is back.
		a.body.Close()
		began := time.Now()
		mapIs("901c")
		if d := time.Since(began); d < w.s.cfg.RelayLease || d > w.s.cfg.RelayLease+5*time.Second {
			t.Errorf("in the map for %v", d)
		}
		told(c)
		w.machine().relay(ra)
		mapIs("901a", "901c")
		told(c, "901a")
	})
}

// The last relay stays in the map: when it drains, since it may be restarted, and
// when it is silent, since it may be the server that is cut off.
func TestLastRelayStays(t *testing.T) {
	bubble(t, func(c *Config) { c.DERPMap = nil }, func(t *testing.T, w *world) {
		allow(w)
		rk := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
		ra := relayRequest(rk, identity.NewNode().Public(), 901)
		ra.Region.Nodes[0].Name = ""
		a, _, _ := w.machine().relay(ra)
		ra.Leaving = true
		w.machine().relay(ra)
		a.body.Close()
		time.Sleep(10 * w.s.cfg.RelayLease)
		node := w.machine().join(w.key(store.Key{Reusable: true})).poll(nil)
		if got := inMap(node.derp, 901); !slices.Equal(got, []string{"901a"}) {
			t.Fatalf("%q", got)
		}
		// A relay of the same address with another key replaces one that is away.
		rb := relayRequest(rk, identity.NewNode().Public(), 901)
		b, _, _ := w.machine().relay(rb)
		if len(b.others()) != 0 {
			t.Errorf("beside %q", b.others())
		}
		if relays, _ := w.store.Relays(context.Background()); len(relays) != 1 || relays[0].NodeKey != rb.NodeKey {
			t.Errorf("%+v", relays)
		}
	})
}

// A region has so many relays and no more; one that is gone makes place.
func TestRelaysAreBounded(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		rk := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
		open := func(i int) (*relayFeed, int) {
			r := relayRequest(rk, identity.NewNode().Public(), 901)
			r.Region.Nodes[0].Name, r.Region.Nodes[0].DERPPort = "", i+1
			f, status, _ := w.machine().relay(r)
			return f, status
		}
		var first *relayFeed
		for i := range maxRegionRelays {
			f, status := open(i)
			if status != 200 {
				t.Fatalf("relay %d: %d", i, status)
			}
			if i == 0 {
				first = f
			}
		}
		if _, status := open(100); status != http.StatusConflict {
			t.Errorf("one more: %d", status)
		}
		first.body.Close()
		time.Sleep(2 * w.s.cfg.RelayLease)
		if _, status := open(100); status != 200 {
			t.Errorf("in place of one that is gone: %d", status)
		}
		if n := len(w.s.relays.known); n != maxRegionRelays {
			t.Errorf("%d relays", n)
		}
	})
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
