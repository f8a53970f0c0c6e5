package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

func TestPublicRoutes(t *testing.T) {
	w := newWorld(t, nil)
	h := w.s.Handler()
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/key?v=131", 200},
		{"GET", "/key", 400},
		{"GET", "/key?v=x", 400},
		{"GET", "/key?v=50", 400},
		{"POST", "/key?v=131", 405},
		{"GET", "/health", 200},
		{"POST", "/ts2021", 400}, // no upgrade
		{"GET", "/ts2021", 400},
		{"POST", "/machine/register", 404}, // only inside the Noise channel
		{"POST", "/machine/map", 404},
		{"POST", "/machine/relay", 404},
		{"GET", "/v1/status", 404}, // only on the admin socket
		{"GET", "/v1/keys", 404},
		{"GET", "/", 404},
		{"GET", "/login/x", 404},
		{"GET", "/login/", 404},
		{"POST", "/login/x", 405},
	} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(c.method, c.path, strings.NewReader(strings.Repeat("x", 1<<20))))
		if rec.Code != c.want {
			t.Errorf("%s %s: status %d, want %d", c.method, c.path, rec.Code, c.want)
		}
	}
}

func TestInnerRoutes(t *testing.T) {
	w := newWorld(t, nil)
	m := w.machine()
	for path, want := range map[string]int{
		"/machine/set-dns": 501, "/machine/feature/query": 501, "/machine/id-token": 501, "/machine/audit-log": 501,
		"/machine/set-device-attr": 501, "/machine/update-health": 501, "/machine/tka/init/begin": 404, "/machine/whoami": 404,
		"/machine/ssh/action/1/to/2": 404, "/machine/nothing": 404, "/key": 404, "/v1/status": 404, "/login/x": 404,
	} {
		resp, err := m.post(context.Background(), path, struct{}{})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", path, resp.StatusCode, want)
		}
	}
	for _, path := range []string{"/machine/register", "/machine/map", "/machine/relay"} {
		for name, body := range map[string]string{"nothing": "", "nonsense": "x", "wrong type": `[1]`, "deep": strings.Repeat("[", 100000), "bad key": `{"Version":131,"NodeKey":"nodekey:zz"}`} {
			resp, err := m.http.Post("http://control"+path, "", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 400 {
				t.Errorf("%s with %s: status %d, want 400", path, name, resp.StatusCode)
			}
		}
		resp, err := m.http.Post("http://control"+path, "", io.LimitReader(zeros{}, 64<<20))
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != http.StatusRequestEntityTooLarge {
				t.Errorf("%s with 64 MiB: status %d, want 413", path, resp.StatusCode)
			}
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestSlowBodyIsCut(t *testing.T) {
	bubble(t, nil, func(t *testing.T, w *world) {
		m := w.machine()
		r, wr := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				if _, err := wr.Write([]byte(" ")); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		defer func() {
			r.Close()
			<-done
		}()
		started := time.Now()
		resp, err := m.http.Post("http://control/machine/register", "", r)
		if err == nil {
			resp.Body.Close()
		}
		if d := time.Since(started); d > time.Minute {
			t.Errorf("a byte a second was read for %v", d)
		}
	})
}

func TestIdleConnectionIsCut(t *testing.T) {
	bubble(t, func(c *Config) { c.MaxUnknown = 1 }, func(t *testing.T, w *world) {
		key := w.key(store.Key{Reusable: true})
		m := w.machine().join(key) // known: does not count
		idle := w.machine()
		idle.refused(idle.registerRequest(""), wire.CodeNeedsLogin)
		third := w.machine()
		if _, err := third.register(third.registerRequest(key)); err == nil || !strings.Contains(err.Error(), "503") {
			t.Errorf("one stranger too many: %v, want 503", err)
		}
		m.lite(nil)
		time.Sleep(3 * time.Minute)
		third.join(key)
	})
}

func TestEndpointsAndHostinfoAreBounded(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	key := w.key(store.Key{Reusable: true})
	a, b := w.machine().join(key), w.machine().join(key)
	na, id := a.poll(nil), b.poll(nil).self.ID
	var eps []netip.AddrPort
	for i := range 1000 {
		eps = append(eps, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 1))
	}
	for _, bad := range []string{"0.0.0.0:1", "224.0.0.1:1", "169.254.1.1:1", "255.255.255.255:1", "[::]:1", "[ff02::1]:1", "192.0.2.1:0"} {
		eps = append([]netip.AddrPort{netip.MustParseAddrPort(bad)}, eps...)
	}
	b.lite(func(r *wire.MapRequest) {
		r.Endpoints = eps
		r.Hostinfo.OS = strings.Repeat("ä", 10000)
		for range 1000 {
			r.Hostinfo.Services = append(r.Hostinfo.Services, wire.Service{Proto: "tcp", Description: strings.Repeat("x", 100)})
		}
	})
	na.until(t, "the report", func() bool { return na.peers[id] != nil && len(na.peers[id].Endpoints) > 0 })
	p := na.peers[id]
	if len(p.Endpoints) != maxEndpoints || p.Endpoints[0] != eps[7] || len(p.Hostinfo.Services) != maxServices || len(p.Hostinfo.OS) > maxText {
		t.Errorf("%d endpoints from %v, %d services, %d bytes of text", len(p.Endpoints), p.Endpoints[0], len(p.Hostinfo.Services), len(p.Hostinfo.OS))
	}
}

func TestAddresses(t *testing.T) {
	pool, err := newAddressPool(netip.MustParsePrefix("100.64.0.0/10"))
	if err != nil {
		t.Fatal(err)
	}
	if want := uint32(1<<22 - 2 - 256 - 512); pool.size != want {
		t.Errorf("%d addresses, want %d", pool.size, want)
	}
	for _, i := range []uint32{0, 1, pool.size / 2, pool.size - 1} {
		if j, ok := pool.index(pool.at(i)); !ok || j != i {
			t.Errorf("index %d became %d", i, j)
		}
	}
	for _, a := range []string{"100.64.0.0", "100.127.255.255", "100.100.100.100", "100.100.100.0", "100.100.100.255", "100.115.92.0", "100.115.93.255", "10.0.0.1", "100.63.255.255"} {
		if _, ok := pool.index(netip.MustParseAddr(a)); ok {
			t.Errorf("%s would be handed out", a)
		}
	}
	for _, p := range []string{"fd00::/64", "10.0.0.0/31", "10.0.0.0/4", "100.100.100.0/24"} {
		if _, err := newAddressPool(netip.MustParsePrefix(p)); err == nil {
			t.Errorf("%s was accepted", p)
		}
	}
}

func TestAddressesRunOutAndReturn(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.IPv4 = netip.MustParsePrefix("100.64.0.0/29") }) // six
	key := w.key(store.Key{Reusable: true})
	seen := map[netip.Prefix]int{}
	join := func() *wire.Node {
		n := w.machine().join(key).poll(nil).self
		seen[n.Addresses[0]]++
		if want := "fd7a:115c:a1e0::6440"; !strings.HasPrefix(n.Addresses[1].String(), want) {
			t.Errorf("IPv6 address %v, want %s…", n.Addresses[1], want)
		}
		return n
	}
	// Removed addresses come last: six different ones first.
	for range 5 {
		if err := w.s.RemoveNode(context.Background(), "test", join().StableID); err != nil {
			t.Fatal(err)
		}
	}
	w.stop()
	w.start(func(c *Config) { c.IPv4 = netip.MustParsePrefix("100.64.0.0/29") })
	for range 6 {
		join()
	}
	if len(seen) != 6 {
		t.Errorf("%d different addresses in the first six, want 6: %v", len(seen), seen)
	}
	m := w.machine()
	m.refused(m.registerRequest(key), wire.CodeAddressesUsedUp)
	w.machine().refused(m.registerRequest(key), wire.CodeAddressesUsedUp)
}

func TestLimiterIsBounded(t *testing.T) {
	var l limiter
	now := time.Now()
	l.init(1, 2, func() time.Time { return now })
	for i := range 3 * maxSources {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		l.failed(a)
		l.failed(a)
		if l.ok(a) {
			t.Fatal("burst was not counted")
		}
		if len(l.buckets) > maxSources {
			t.Fatalf("%d sources remembered", len(l.buckets))
		}
	}
	a := netip.MustParseAddr("2001:db8::1")
	l.failed(a)
	l.failed(a)
	if l.ok(netip.MustParseAddr("2001:db8::2")) || !l.ok(netip.MustParseAddr("2001:db8:0:1::1")) {
		t.Error("an IPv6 source is not its /64")
	}
	now = now.Add(time.Second)
	if !l.ok(a) {
		t.Error("the bucket does not fill")
	}
}

// fuzzMachine serves one request of one machine without network.
func fuzzMachine(f *testing.F) (*world, *client, identity.NodePublic) {
	w := newWorld(f, func(c *Config) { c.FailureBurst, c.BaseURL = 1<<30, loginBase })
	m := w.machine().join(w.key(store.Key{Reusable: true}))
	return w, &client{machine: m.machine.Public(), version: wire.CapabilityVersion, known: func() {}}, m.key.Public()
}

func serve(w *world, c *client, path string, body []byte) *httptest.ResponseRecorder {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := httptest.NewRequestWithContext(ctx, "POST", path, bytes.NewReader(body))
	rec := httptest.NewRecorder()
	w.s.serveMachine(oneMessage{rec, cancel}, r, c)
	return rec
}

// oneMessage ends a stream after its first message.
type oneMessage struct {
	*httptest.ResponseRecorder
	cancel func()
}

func (w oneMessage) Flush() { w.cancel() }

func FuzzMapRequest(f *testing.F) {
	w, c, key := fuzzMachine(f)
	for _, r := range []*wire.MapRequest{
		{Version: 131, NodeKey: key, OmitPeers: true, Hostinfo: &wire.Hostinfo{Hostname: "x", Services: []wire.Service{{Proto: "tcp"}}, NetInfo: &wire.NetInfo{PreferredDERP: -1}}},
		{Version: 131, NodeKey: key, Stream: true, Compress: "zstd"},
		{Version: 131, NodeKey: key},
		{Version: 131},
	} {
		b, _ := json.Marshal(r)
		f.Add(b)
	}
	f.Add([]byte(fmt.Sprintf(`{"Version":131,"NodeKey":%q,"OmitPeers":true,"Endpoints":["1.2.3.4:5","[fe80::1%%x]:1",""],"Hostinfo":null}`, key)))
	f.Fuzz(func(t *testing.T, body []byte) {
		if rec := serve(w, c, "/machine/map", body); rec.Code >= 500 {
			t.Errorf("status %d: %s", rec.Code, rec.Body)
		}
	})
}

func FuzzRegisterRequest(f *testing.F) {
	w, c, key := fuzzMachine(f)
	good := w.key(store.Key{Reusable: true})
	for _, r := range []*wire.RegisterRequest{
		{Version: 131, NodeKey: key},
		{Version: 131, NodeKey: key, Expiry: wire.LogoutExpiry},
		{Version: 131, NodeKey: identity.NewNode().Public(), Auth: &wire.RegisterAuth{AuthKey: good}, Hostinfo: &wire.Hostinfo{Hostname: "x", RequestTags: []string{"tag:a"}}},
		{Version: 131, NodeKey: identity.NewNode().Public(), OldNodeKey: key},
		{Version: 131, NodeKey: identity.NewNode().Public(), Followup: loginBase + "/login/x", Hostinfo: &wire.Hostinfo{RequestTags: []string{"tag:a"}}},
		{Version: 1},
	} {
		b, _ := json.Marshal(r)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		rec := serve(w, c, "/machine/register", body)
		if rec.Code >= 500 {
			t.Errorf("status %d: %s", rec.Code, rec.Body)
		}
		if rec.Code == 200 {
			var resp wire.RegisterResponse
			if err := json.Unmarshal(rec.Body.Bytes(), &resp); err != nil {
				t.Errorf("answer %q: %v", rec.Body, err)
			}
		}
	})
}

func FuzzRelayRequest(f *testing.F) {
	w, c, _ := fuzzMachine(f)
	key := w.key(store.Key{Kind: store.KeyRelay, Reusable: true})
	b, _ := json.Marshal(relayRequest(key, identity.NewNode().Public(), 901))
	f.Add(b)
	f.Add([]byte(fmt.Sprintf(`{"RelayKey":%q,"Region":{"RegionID":1,"Nodes":[null]}}`, key)))
	f.Fuzz(func(t *testing.T, body []byte) {
		if rec := serve(w, c, "/machine/relay", body); rec.Code >= 500 {
			t.Errorf("status %d: %s", rec.Code, rec.Body)
		}
	})
}
