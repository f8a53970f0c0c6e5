package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

// Negative tests of a control plane's robustness, by their numbers in the list
// of goals. Others of the list: C 32 is TestStreamEnds and TestFrameBounds of
// package control (it is nodes that decompress), C 33 TestHostileFiles of
// package policy, C 34 TestPolicyVersions, C 41 the tests of package store on
// files, C 43 TestLoginPage and TestAdminRefusesBrowsers (nothing else is for
// browsers), C 42 also TestOlderCopyIsFound_C42 of package host, C 46 TestForeignMachine. C 44 needs tenants, of which there is one.

func long() bool { return os.Getenv("MESH_FULL") == "1" }

// publicRoutes are those that anybody may ask, with the reason.
var publicRoutes = map[string]string{
	"GET /key":          "the server's key, to be pinned",
	"/ts2021":           "the beginning of the encrypted channel, which proves a machine key",
	"GET /login/{code}": "who asks to log in, for whoever has the secret code",
	"GET /health":       "that the server lives",
	"GET /healthz":      "the same",
	"GET /readyz":       "whether it can do its work, and in a word what cannot",
}

// C 31: bodies without end, by length or in chunks, and too many headers, at
// every endpoint that needs no proof, cost no memory.
func TestEndlessRequests_C31(t *testing.T) {
	w := newWorld(t, withLogin)
	before := allocated()
	var sent atomic.Int64
	attack := func(head string, endless []byte) string {
		nc, err := w.dial(t.Context())
		if err != nil {
			t.Error(err)
			return ""
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		answer := make(chan string, 1)
		go func() {
			line, _ := bufio.NewReader(nc).ReadString('\n')
			answer <- strings.TrimSpace(line)
		}()
		if _, err = io.WriteString(nc, head); err == nil {
			for n := 0; n < 1<<30; n += len(endless) {
				k, err := nc.Write(endless)
				sent.Add(int64(k))
				if err != nil {
					break
				}
			}
		}
		return <-answer
	}
	chunk := []byte("8000\r\n" + strings.Repeat("x", 0x8000) + "\r\n")
	header := []byte(strings.Repeat("X-Header: "+strings.Repeat("x", 100)+"\r\n", 100))
	var wg sync.WaitGroup
	for route := range publicRoutes {
		_, path, _ := strings.Cut(route, " ")
		if path == "" {
			path = route
		}
		path = strings.ReplaceAll(path, "{code}", "x")
		for _, method := range []string{"GET", "POST"} {
			start := method + " " + path + " HTTP/1.1\r\nHost: control\r\n"
			for name, a := range map[string]struct {
				head    string
				endless []byte
			}{
				"length":  {start + "Content-Length: 1073741824\r\n\r\n", chunk},
				"chunks":  {start + "Transfer-Encoding: chunked\r\n\r\n", chunk},
				"upgrade": {start + "Upgrade: tailscale-control-protocol\r\nConnection: Upgrade\r\nX-Tailscale-Handshake: " + strings.Repeat("A", 8000) + "\r\nContent-Length: 1073741824\r\n\r\n", chunk},
				"headers": {start, header},
			} {
				wg.Go(func() {
					answer := attack(a.head, a.endless)
					if name == "headers" && answer != "" && !strings.Contains(answer, " 431 ") {
						t.Errorf("%s %s with headers without end: %q", method, path, answer)
					}
				})
			}
		}
	}
	wg.Wait()
	if n := sent.Load(); n > 256<<20 {
		t.Errorf("%d MB were taken", n>>20)
	}
	if n := allocated() - before; n > 64<<20 {
		t.Errorf("%d MB were allocated", n>>20)
	}
	// And it serves.
	w.machine().join(w.key(store.Key{}))
}

func allocated() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.TotalAlloc)
}

// C 31: a byte a second, in the request line, in headers and in bodies, is cut.
func TestSlowRequests_C31(t *testing.T) {
	bubble(t, withLogin, func(t *testing.T, w *world) {
		for _, start := range []string{"", "GET /key?v=131 HTTP/1.1\r\nHost: x\r\n", "POST /ts2021 HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"} {
			nc, err := w.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, nc)
			began := time.Now()
			if _, err = io.WriteString(nc, start); err == nil {
				for err == nil && time.Since(began) < time.Hour {
					time.Sleep(time.Second)
					_, err = nc.Write([]byte("X"))
				}
			}
			if d := time.Since(began); d > time.Minute {
				t.Errorf("after %q a byte a second was read for %v", start, d)
			}
			nc.Close()
		}
	})
}

// C 35: half of those that poll never read. They are cut in bounded time, and
// the others are as up to date as if they were not there.
func TestHalfNeverRead_C35(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds; TestStalledReaderIsCut has one such reader")
	}
	count := 20
	if long() {
		count = 400
	}
	bubble(t, func(c *Config) { c.Gather, c.MaxUnknown = -1, 1<<20 }, func(t *testing.T, w *world) {
		w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:*"]}]}`)
		talker := w.tagged("tag:b", "talker")
		id := talker.fetch().self.ID
		key := w.key(store.Key{Reusable: true})
		var readers, stalled []*netmap
		for i := range count {
			n := w.machine().join(key).poll(func(r *wire.MapRequest) { r.Compress = "" })
			if i%2 == 0 {
				readers = append(readers, n)
			} else {
				stalled = append(stalled, n)
			}
		}
		const changes = 400
		var wg sync.WaitGroup
		var worst atomic.Int64
		var last atomic.Int64 // when the last change was made, in the bubble's time
		began := time.Now()
		for _, n := range readers {
			wg.Go(func() {
				n.until(t, "the last change", func() bool {
					p := n.peers[id]
					return p != nil && len(p.Hostinfo.Services) > 0 && p.Hostinfo.Services[0].Port == changes
				})
				if d := int64(time.Since(began)) - last.Load(); d > worst.Load() {
					worst.Store(d)
				}
			})
		}
		for i := range changes {
			last.Store(int64(time.Since(began)))
			talker.lite(wordy(i + 1))
			synctest.Wait()
		}
		wg.Wait()
		if d := time.Duration(worst.Load()); d > time.Second {
			t.Errorf("a reader was %v behind", d)
		}
		time.Sleep(time.Minute)
		w.s.mu.Lock()
		open := 0
		for _, n := range w.s.nodes.byID {
			if n.stream != nil {
				open++
			}
		}
		w.s.mu.Unlock()
		if open != len(readers) {
			t.Errorf("%d streams are open, want those of %d readers", open, len(readers))
		}
		for _, n := range stalled {
			n.cancel()
		}
	})
}

// C 36: all nodes come back at once after a restart, and all are served at the
// first attempt.
func TestReconnectStorm_C36(t *testing.T) {
	count, handshakes := 60, 8
	if long() {
		count, handshakes = 1000, 0 // the default
	}
	storm := func(c *Config) { c.MaxHandshakes = handshakes }
	w := newWorld(t, storm)
	w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:a:*"]}]}`)
	key := w.key(store.Key{Reusable: true})
	machines := make([]*machine, count)
	for i := range machines {
		machines[i] = w.machine().join(key)
	}
	w.stop()
	w.start(storm)
	began := time.Now()
	var wg sync.WaitGroup
	for _, m := range machines {
		wg.Go(func() {
			m.connect()
			n := m.poll(nil)
			n.until(t, "everybody", func() bool { return len(n.peers) == count-1 })
		})
	}
	wg.Wait()
	t.Logf("%d nodes in %v", count, time.Since(began))
}

// C 38: what the policy hides from a node is in nothing that it is sent, at any
// moment, error or not.
func TestNothingOfOthers_C38(t *testing.T) {
	w := newWorld(t, withLogin)
	w.setPolicy(`{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:*"]},{"action":"accept","src":["tag:c"],"dst":["tag:c:*"]}]}`)
	var mu sync.Mutex
	var heard bytes.Buffer // all that a was sent
	note := func(b []byte) {
		mu.Lock()
		defer mu.Unlock()
		heard.Write(b)
	}
	a := w.tagged("tag:a", "watcher")
	na := a.poll(func(r *wire.MapRequest) { r.Compress = "" })
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			b, err := readFrame(na.body, false)
			if err != nil {
				return
			}
			note(b)
		}
	})
	ask := func(path string, v any) {
		t.Helper()
		resp, err := a.post(t.Context(), path, v)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		note(b)
		for k, v := range resp.Header {
			note([]byte(k + fmt.Sprint(v)))
		}
	}
	hidden := w.tagged("tag:c", "canaryname")
	user := w.user("canaryuser")
	owned := w.machine().join(w.key(store.Key{User: user.ID, Tags: []string{}}))
	var nodes []*wire.Node
	for _, m := range []*machine{hidden, owned} {
		endpoint := netip.MustParseAddrPort("203.0.113.77:7777")
		m.lite(func(r *wire.MapRequest) {
			r.Endpoints, r.Hostinfo.OS, r.Hostinfo.Hostname = []netip.AddrPort{endpoint}, "canaryos", "canaryname"
		})
		nodes = append(nodes, m.poll(nil).self)
	}
	for range 2 {
		w.tagged("tag:c", "canaryname") // which takes another name
	}
	if err := w.s.RenameNode(t.Context(), "test", string(nodes[0].StableID), "canaryrenamed"); err != nil {
		t.Fatal(err)
	}
	w.tagged("tag:b", "seen")
	// It pretends to be them, and asks for them.
	for _, m := range []*machine{hidden, owned} {
		req := a.mapRequest()
		req.NodeKey = m.key.Public()
		ask("/machine/map", req)
		reg := a.registerRequest("")
		reg.NodeKey = m.key.Public()
		ask("/machine/register", reg)
		reg.NodeKey, reg.OldNodeKey = identity.NewNode().Public(), m.key.Public()
		ask("/machine/register", reg)
	}
	taken := a.registerRequest(w.key(store.Key{}))
	taken.NodeKey, taken.Hostinfo.Hostname = identity.NewNode().Public(), "another"
	ask("/machine/register", taken)
	if err := w.s.RemoveNode(t.Context(), "test", string(nodes[0].StableID)); err != nil {
		t.Fatal(err)
	}
	last := w.tagged("tag:b", "last")
	until(t, "a to hear the rest", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return bytes.Contains(heard.Bytes(), []byte(last.key.Public().String()))
	})
	na.cancel()
	reading.Wait()
	if len(nodes) != 2 || len(nodes[0].Addresses) != 2 {
		t.Fatalf("%+v", nodes)
	}
	canaries := []string{"canary", "203.0.113.77", "7777"}
	for i, m := range []*machine{hidden, owned} {
		canaries = append(canaries, m.disco.Public().String(), m.machine.Public().String(), string(nodes[i].StableID))
		for _, p := range nodes[i].Addresses {
			canaries = append(canaries, p.Addr().String()+`/`)
		}
	}
	for _, c := range canaries {
		if i := bytes.Index(heard.Bytes(), []byte(c)); i >= 0 {
			t.Errorf("it heard %q: …%s…", c, heard.Bytes()[max(0, i-200):min(heard.Len(), i+200)])
		}
	}
}

// until waits for something that another goroutine does.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// C 39: an address that was another node's belongs, at every moment and in every
// map, to one node at most, and the former one is gone before the new one comes.
func TestAddressOfAnother_C39(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.IPv4 = netip.MustParsePrefix("100.64.0.0/29") }) // six
	allow(w)
	key := w.key(store.Key{Reusable: true})
	watcher := w.machine().join(key)
	nw := watcher.poll(nil)
	owner := map[netip.Prefix]wire.NodeID{}
	used := map[netip.Prefix]int{}
	for range 12 {
		m := w.machine().join(key)
		self := m.fetch().self
		addr := self.Addresses[0]
		used[addr]++
		before := owner[addr]
		nw.until(t, "the new node", func() bool {
			holders := 0
			for _, p := range nw.peers {
				if slices.Contains(p.Addresses, addr) {
					holders++
				}
			}
			if holders > 1 || before != 0 && nw.peers[before] != nil && nw.peers[self.ID] != nil {
				t.Fatalf("%v has two owners", addr)
			}
			return nw.peers[self.ID] != nil
		})
		if self.ID == before || nw.peers[self.ID].Key != m.key.Public() {
			t.Errorf("%v is of node %d with another key", addr, self.ID)
		}
		owner[addr] = self.ID
		if err := w.s.RemoveNode(t.Context(), "test", string(self.StableID)); err != nil {
			t.Fatal(err)
		}
	}
	again := 0
	for _, n := range used {
		again += n - 1
	}
	if again == 0 {
		t.Error("no address was used again: nothing was tested")
	}
}

// C 40: the server's clock leaps ahead and back. A key that was good is good
// again when the clock is; one that expired stays so; none lives longer.
func TestClockLeaps_C40(t *testing.T) {
	for _, leap := range []time.Duration{25 * time.Hour, 10 * 365 * 24 * time.Hour, -time.Hour, -10 * 365 * 24 * time.Hour} {
		t.Run(leap.String(), func(t *testing.T) {
			var off atomic.Int64
			now := func() time.Time { return time.Now().Add(time.Duration(off.Load())) }
			bubble(t, func(c *Config) { c.Now = now }, func(t *testing.T, w *world) {
				allow(w)
				user := w.user("alice")
				key := w.key(store.Key{User: user.ID, Tags: []string{}, Reusable: true, Created: now(), NodeExpiry: 24 * time.Hour})
				short := w.key(store.Key{Reusable: true, Created: now(), Expires: now().Add(24 * time.Hour)})
				m := w.machine().join(key)
				expires := m.fetch().self.KeyExpiry
				live := m.poll(nil)
				off.Store(int64(leap))
				if leap > 0 {
					began := time.Now()
					for live.read() == nil {
					}
					if d := time.Since(began); live.code != wire.CodeNodeKeyExpired || d > 10*time.Second {
						t.Errorf("the live stream ended with %q %v after the key", live.code, d)
					}
				}
				time.Sleep(90 * time.Minute) // whatever is due then is looked at within an hour
				if leap > 0 {
					if status, code := m.lite(nil); code != wire.CodeNodeKeyExpired {
						t.Errorf("after its end the key is accepted: %d %s", status, code)
					}
					x := w.machine()
					x.refused(x.registerRequest(short), wire.CodeAuthKeyExpired)
				} else if status, code := m.lite(nil); status != 200 {
					t.Errorf("a clock that is behind: %d %s", status, code)
				}
				off.Store(0)
				time.Sleep(90 * time.Minute)
				if status, code := m.lite(nil); status != 200 {
					t.Errorf("the clock is right again: %d %s", status, code)
				}
				if again := m.fetch().self.KeyExpiry; !again.Equal(expires) {
					t.Errorf("the key expires at %v, before the leap it was %v", again, expires)
				}
				if !w.s.Admit(m.key.Public()) {
					t.Error("relays do not admit it any more")
				}
				w.machine().join(short)
				time.Sleep(time.Until(expires) + time.Second)
				if status, code := m.lite(nil); code != wire.CodeNodeKeyExpired {
					t.Errorf("after its end the key is accepted: %d %s", status, code)
				}
				if w.s.Admit(m.key.Public()) {
					t.Error("relays admit it after its end")
				}
			})
		})
	}
}

// C 42: an older copy of the database is found by what nodes know.
func TestOlderCopyIsFound_C42(t *testing.T) {
	w := newWorld(t, nil)
	allow(w)
	m := w.machine().join(w.key(store.Key{}))
	restored := func() (n int) {
		log, err := w.store.Audit(t.Context(), time.Time{}, 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range log {
			if e.Action == "store.restored" {
				n++
			}
		}
		return n
	}
	newest := w.s.PolicyState().Version
	m.lite(func(r *wire.MapRequest) { r.MeshApplied = newest })
	if n := restored(); n != 0 {
		t.Errorf("%d restores on record, and there was none", n)
	}
	for range 2 {
		m.lite(func(r *wire.MapRequest) { r.MeshApplied = newest + 1 })
	}
	if n := restored(); n != 1 {
		t.Errorf("%d restores on record", n)
	}
}

// C 45: every route that the source names is one that needs a proof, or one of
// the few that do not. A new one fails until somebody has decided.
func TestEveryRouteIsDecided_C45(t *testing.T) {
	w := newWorld(t, withLogin)
	var public, inner, administrative []string
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	adminRoute := regexp.MustCompile(`"((?:GET|POST|PUT|PATCH|DELETE) /v1/[^"]*)":`)
	muxRoute := regexp.MustCompile(`\.Handle(?:Func)?\("([^"]+)"`)
	machineRoute := regexp.MustCompile(`"(/machine/[^"]+)"`)
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		source, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		for re, list := range map[*regexp.Regexp]*[]string{adminRoute: &administrative, muxRoute: &public, machineRoute: &inner} {
			for _, m := range re.FindAllStringSubmatch(string(source), -1) {
				*list = append(*list, m[1])
			}
		}
	}
	if len(public) < len(publicRoutes) || len(inner) < 3 || len(administrative) < 30 {
		t.Fatalf("found only %q, %q, %q", public, inner, administrative)
	}
	for _, route := range public {
		if publicRoutes[route] == "" {
			t.Errorf("route %q: may anybody ask it? If so, say why in publicRoutes", route)
		}
	}
	h := w.s.Handler()
	concrete := strings.NewReplacer("{name}", "x", "{id}", "1", "{code}", "x", "{version}", "1").Replace
	for _, route := range administrative {
		method, path, _ := strings.Cut(concrete(route), " ")
		if code, body := request(h, method, path); code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
			t.Errorf("%s in public: %d %s", route, code, body)
		}
		r := httptest.NewRequest(method, path, nil)
		r.Host = "127.0.0.1:8080"
		rec := httptest.NewRecorder()
		w.s.AdminHandler().ServeHTTP(rec, r)
		if rec.Code != http.StatusForbidden && rec.Code != http.StatusUnauthorized {
			t.Errorf("%s from another host: %d", route, rec.Code)
		}
	}
	for _, path := range inner {
		for _, method := range []string{"GET", "POST"} {
			if code, _ := request(h, method, path); code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
				t.Errorf("%s %s outside of the channel: %d", method, path, code)
			}
		}
		// In it, a machine that nobody knows, with the key of nobody.
		m := w.machine()
		for name, body := range map[string]any{
			"map": m.mapRequest(), "stream": &wire.MapRequest{Version: m.version, Stream: true, NodeKey: m.key.Public()},
			"relay": relayRequest("mesh-relay-1-x", m.key.Public(), 950),
		} {
			resp, err := m.post(t.Context(), path, body)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK && path != "/machine/register" || strings.Contains(string(b), `"MachineAuthorized":true`) {
				t.Errorf("%s with the body of a %s, of a stranger: %d %s", path, name, resp.StatusCode, b)
			}
		}
	}
}

// C 47: of users that are made at once, one is the owner.
func TestOneOwner_C47(t *testing.T) {
	for range 3 {
		w := newWorld(t, nil)
		c := w.admin()
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				if _, err := c.CreateUser(t.Context(), fmt.Sprintf("u%d", i)); err != nil && !errors.Is(err, admin.ErrConflict) {
					t.Error(err)
				}
				// The same name at once, too.
				c.CreateUser(context.Background(), "same")
			})
		}
		wg.Wait()
		users, err := w.store.Users(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		owner := 0
		for _, u := range users {
			if u.Role == store.RoleOwner {
				owner++
			}
		}
		if owner != 1 || len(users) != 21 {
			t.Errorf("%d owners among %d users", owner, len(users))
		}
	}
}
