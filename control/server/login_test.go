package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
	"mesh/identity"
)

const loginBase = "https://control.example.com"

func withLogin(c *Config) { c.BaseURL = loginBase }

// user adds a user.
func (w *world) user(name string) store.User {
	w.t.Helper()
	u, err := w.store.CreateUser(context.Background(), "test", name, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.users[u.ID] = u
	return u
}

// ask registers without a key and returns the URL to visit.
func (m *machine) ask(change func(*wire.RegisterRequest)) string {
	m.t.Helper()
	req := m.registerRequest("")
	if change != nil {
		change(req)
	}
	resp, err := m.register(req)
	if err != nil {
		m.t.Fatal(err)
	}
	if resp.Error != "" || resp.NodeKeyExpired || resp.MachineAuthorized || !strings.HasPrefix(resp.AuthURL, loginBase+"/login/") {
		m.t.Fatalf("ask: %+v", resp)
	}
	return resp.AuthURL
}

// answer is what a request that waits hears in the end.
type answer struct {
	*wire.RegisterResponse
	err error
}

// follow asks again with Followup, and waits in the background.
func (m *machine) follow(url string, change func(*wire.RegisterRequest)) chan answer {
	req := m.registerRequest("")
	req.Followup = url
	if change != nil {
		change(req)
	}
	out := make(chan answer, 1)
	go func() {
		resp, err := m.register(req)
		out <- answer{resp, err}
	}()
	return out
}

// waits wants that n requests wait for a login, in a bubble.
func (w *world) waits(n int) {
	w.t.Helper()
	synctest.Wait()
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	if have := w.s.logins.waiting; have != n {
		w.t.Fatalf("%d requests wait for a login, want %d", have, n)
	}
}

func TestLogin(t *testing.T) {
	w := newWorld(t, withLogin)
	allow(w)
	alice := w.user("alice")
	c := w.admin()
	m := w.machine()
	url := m.ask(nil)
	if again := m.ask(nil); again != url {
		t.Errorf("the same machine was sent to %s and to %s", url, again)
	}
	list := must[[]admin.Login](t)(c.Logins(t.Context()))
	if len(list) != 1 || list[0].URL != url || list[0].Hostname != "agent" || list[0].OS != "linux" || list[0].Machine != m.machine.Public() ||
		list[0].NodeKey != m.key.Public() || list[0].Waiting || list[0].From != "127.0.0.1" {
		t.Errorf("logins: %+v", list)
	}
	got := m.follow(url, nil)
	for !list[0].Waiting {
		list = must[[]admin.Login](t)(c.Logins(t.Context()))
	}
	if st := must[admin.Status](t)(c.Status(t.Context())); st.Pending != 1 {
		t.Errorf("status: %+v", st)
	}
	n := must[admin.Node](t)(c.ApproveLogin(t.Context(), list[0].Code, admin.NodeOwner{User: "alice"}))
	if n.User != "alice" || n.Name != "agent" || n.NodeKey != m.key.Public() || n.Expires.IsZero() {
		t.Errorf("approved: %+v", n)
	}
	a := <-got
	if a.err != nil || !a.MachineAuthorized || a.AuthURL != "" || a.Login.LoginName != "alice" {
		t.Fatalf("follow-up: %+v", a)
	}
	if self := m.poll(nil).self; self.ID != n.ID || self.User != alice.ID {
		t.Errorf("self: %+v", self)
	}
	if _, err := c.ApproveLogin(t.Context(), list[0].Code, admin.NodeOwner{User: "alice"}); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("approved twice: %v", err)
	}
	if err := c.RejectLogin(t.Context(), list[0].Code); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("rejected what was approved: %v", err)
	}
	if list := must[[]admin.Login](t)(c.Logins(t.Context())); len(list) != 0 {
		t.Errorf("logins after all: %+v", list)
	}
	var seen bool
	for _, e := range must[[]admin.AuditEntry](t)(c.Audit(t.Context(), time.Time{}, 0)) {
		seen = seen || e.Action == "node.approve" && e.Actor == localAdmin && e.Source == "unix socket" && strings.Contains(e.After, "alice")
		if strings.Contains(fmt.Sprint(e), list[0].Code) {
			t.Errorf("the code is on record: %+v", e)
		}
	}
	if !seen {
		t.Error("the approval is not on record")
	}
}

// The client may lose its connection, come back with another node key, or come
// back after the answer: only its machine key must stay.
func TestLoginOverReconnects(t *testing.T) { bubble(t, withLogin, testLoginOverReconnects) }

func testLoginOverReconnects(t *testing.T, w *world) {
	w.user("alice")
	ctx := context.Background()
	approve := func(url string) {
		t.Helper()
		if _, err := w.s.ApproveLogin(ctx, "test", url, "alice", nil); err != nil {
			t.Fatal(err)
		}
	}
	in := func(what string, a answer) {
		t.Helper()
		if a.err != nil || !a.MachineAuthorized {
			t.Errorf("%s: %+v", what, a)
		}
	}

	m := w.machine()
	url := m.ask(nil)
	sent := m.follow(url, nil)
	w.waits(1)
	second := m.clone()
	second.key = identity.NewNode()
	got := second.follow(url, nil)
	if a := <-sent; a.err != nil || a.AuthURL != url {
		t.Errorf("the first of two that wait: %+v", a)
	}
	w.waits(1)
	approve(url)
	in("a second connection with another key", <-got)

	// Nobody is there when it is approved; the node key is another afterwards.
	m = w.machine()
	url = m.ask(nil)
	approve(url)
	first := m.key
	m.key = identity.NewNode()
	in("after the approval", <-m.follow(url, nil))
	if w.s.Admit(first.Public()) || !w.s.Admit(m.key.Public()) {
		t.Error("the former key is the node's")
	}
	m.key = identity.NewNode()
	in("another key before the first poll, without the URL", <-m.follow("", nil))
	m.poll(nil)
	// Now it knows: from here on a new key is a new login.
	m.key = identity.NewNode()
	if again := m.ask(nil); again == url {
		t.Error("an old login serves again")
	}

	// Another machine that knows the URL gets one of its own.
	m = w.machine()
	url = m.ask(nil)
	thief := w.machine()
	thief.key = m.key
	if a := <-thief.follow(url, nil); a.err != nil || a.AuthURL == "" || a.AuthURL == url {
		t.Errorf("another machine: %+v", a)
	}
	approve(url)
	if a := <-thief.follow(url, nil); a.err != nil || a.MachineAuthorized {
		t.Errorf("another machine after the approval: %+v", a)
	}
	in("the right machine", <-m.follow(url, nil))

	// An auth key makes the login superfluous.
	m = w.machine()
	url = m.ask(nil)
	m.join(w.key(store.Key{}))
	if _, err := w.s.ApproveLogin(ctx, "test", url, "alice", nil); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("approve a machine that is in: %v", err)
	}
}

// Who asked to be let in need not ask again when the server has started again,
// and what was decided before stays decided.
func TestLoginOutlivesServer(t *testing.T) {
	w := newWorld(t, withLogin)
	w.user("alice")
	m, other := w.machine(), w.machine()
	url, rejected := m.ask(nil), other.ask(nil)
	if err := w.s.RejectLogin(t.Context(), "admin", rejected); err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.start(withLogin)
	m.connect()
	other.connect()
	if again := m.ask(nil); again != url {
		t.Errorf("sent to %s, and now to %s", url, again)
	}
	if _, err := w.s.ApproveLogin(t.Context(), "admin", url, "alice", nil); err != nil {
		t.Fatal(err)
	}
	if got := <-m.follow(url, nil); got.err != nil || !got.MachineAuthorized {
		t.Errorf("approved: %+v, %v", got.RegisterResponse, got.err)
	}
	if got := <-other.follow(rejected, nil); got.err != nil || got.MeshCode != wire.CodeLoginRejected {
		t.Errorf("rejected: %+v, %v", got.RegisterResponse, got.err)
	}
	// What is over is stored no longer.
	now := w.s.cfg.Now
	w.stop()
	w.start(func(c *Config) {
		withLogin(c)
		c.Now = func() time.Time { return now().Add(2 * loginLife) }
	})
	if err := w.s.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := must[[]store.Login](t)(w.store.Logins(t.Context())); len(left) != 0 {
		t.Errorf("still stored: %+v", left)
	}
}

func TestLoginRejected(t *testing.T) {
	bubble(t, withLogin, func(t *testing.T, w *world) {
		m := w.machine()
		url := m.ask(nil)
		got := m.follow(url, nil)
		w.waits(1)
		if err := w.s.RejectLogin(t.Context(), "test", url); err != nil {
			t.Fatal(err)
		}
		if a := <-got; a.err != nil || a.MeshCode != wire.CodeLoginRejected || a.Error != wire.ErrLoginRejected.Error() {
			t.Errorf("rejected: %+v", a)
		}
		if a := <-m.follow(url, nil); a.err != nil || a.MeshCode != wire.CodeLoginRejected {
			t.Errorf("asked again: %+v", a)
		}
		if err := w.s.RejectLogin(t.Context(), "test", url); !errors.Is(err, store.ErrConflict) {
			t.Errorf("rejected twice: %v", err)
		}
		if again := m.ask(nil); again == url {
			t.Error("a new wish has the old URL")
		}
	})
}

func TestLoginTags(t *testing.T) {
	w := newWorld(t, withLogin)
	w.setPolicy(tagPolicy)
	w.user("alice@example.com")
	w.user("olga@example.com")
	c := w.admin()
	m := w.machine()
	asks := func(tags ...string) func(*wire.RegisterRequest) {
		return func(r *wire.RegisterRequest) { r.Hostinfo.RequestTags = tags }
	}
	plainURL := m.ask(nil)
	url := m.ask(asks("tag:a"))
	if url == plainURL {
		t.Error("what an administrator has seen of a login changed")
	}
	if _, err := w.s.ApproveLogin(t.Context(), "test", plainURL, "alice@example.com", nil); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the superseded login: %v", err)
	}
	for name, owner := range map[string]admin.NodeOwner{
		"user who may not":   {User: "olga@example.com"},
		"tag it did not ask": {Tags: []string{"tag:b"}},
		"unknown tag":        {Tags: []string{"tag:zzz"}},
		"nobody":             {},
		"both":               {User: "alice@example.com", Tags: []string{"tag:a"}},
	} {
		if _, err := c.ApproveLogin(t.Context(), url[strings.LastIndex(url, "/")+1:], owner); !errors.Is(err, admin.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.ApproveLogin(t.Context(), url[strings.LastIndex(url, "/")+1:], admin.NodeOwner{User: "carol"}); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("unknown user: %v", err)
	}
	if _, err := c.ApproveLogin(t.Context(), url[strings.LastIndex(url, "/")+1:], admin.NodeOwner{User: "alice@example.com"}); err != nil {
		t.Fatal(err)
	}
	// Who follows up does not describe itself.
	if a := <-m.follow(url, asks("tag:a", "tag:b")); a.err != nil || !a.MachineAuthorized {
		t.Fatalf("%+v", a)
	}
	if self := m.poll(nil).self; fmt.Sprint(self.Tags) != "[tag:a]" || self.User != wire.TaggedUser || !self.KeyExpiry.IsZero() {
		t.Errorf("self: %+v", self)
	}
	for _, tags := range [][]string{{"x"}, {"tag:\x1b[31m"}, make([]string, 100)} {
		req := w.machine().registerRequest("")
		req.Hostinfo.RequestTags = tags
		resp, err := m.register(req)
		if err != nil || resp.MeshCode != wire.CodeTagNotAllowed && len(tags) < 100 || resp.MachineAuthorized {
			t.Errorf("tags %q: %+v %v", tags, resp, err)
		}
	}
}

func TestLoginExpires(t *testing.T) {
	bubble(t, withLogin, func(t *testing.T, w *world) {
		m := w.machine()
		url := m.ask(nil)
		begin := time.Now()
		a := <-m.follow(url, nil)
		if a.err != nil || a.AuthURL == "" || a.AuthURL == url {
			t.Errorf("after its time: %+v", a)
		}
		if d := time.Since(begin); d != loginLife {
			t.Errorf("waited %v, want %v", d, loginLife)
		}
		if w.s.viewLogin(url) != nil {
			t.Error("the page is still there")
		}
		// The server ends who waits when it closes.
		m.follow(a.AuthURL, nil)
		synctest.Wait()
	})
}

func TestLoginsAreBounded(t *testing.T) {
	now := time.Now()
	var g logins
	g.init()
	made := uint32(0)
	ask := func(from netip.Addr) (*login, error) {
		made++
		var k [identity.KeyLen]byte
		binary.BigEndian.PutUint32(k[:], made)
		return g.ask(enrolment{machine: identity.MachinePublicFrom(k), info: &wire.Hostinfo{}}, source(from), false, now)
	}
	one := netip.MustParseAddr("192.0.2.1")
	for range maxLoginsBySource {
		if _, err := ask(one); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ask(one); !errors.Is(err, errTooManyLogins) {
		t.Errorf("one more from one source: %v", err)
	}
	// An IPv6 source is its network.
	v6 := func(i int) netip.Addr { return netip.AddrFrom16([16]byte{0x20, 1, 15: byte(i)}) }
	for i := range maxLoginsBySource {
		if _, err := ask(v6(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ask(v6(200)); !errors.Is(err, errTooManyLogins) {
		t.Errorf("one more from one network: %v", err)
	}
	first := g.order.Front().Value.(*login)
	first.waiter = make(chan struct{})
	for i := range 2 * maxLogins {
		if _, err := ask(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})); err != nil {
			t.Fatal(err)
		}
	}
	if len(g.byCode) != maxLogins || g.order.Len() != maxLogins || len(g.byMachine) != maxLogins {
		t.Errorf("%d logins, want %d", len(g.byCode), maxLogins)
	}
	if g.find(first.code, now) != first {
		t.Error("a login that somebody waits for was dropped")
	}
	g.prune(now.Add(loginLife))
	if len(g.byCode)+len(g.byMachine)+len(g.bySource)+g.order.Len() != 0 {
		t.Errorf("left over: %d %d %d %d", len(g.byCode), len(g.byMachine), len(g.bySource), g.order.Len())
	}
}

// A flood from one place is told to wait, and does not keep others out.
func TestLoginFlood(t *testing.T) {
	w := newWorld(t, withLogin)
	var err error
	for range maxLoginsBySource + 1 {
		m := w.machine()
		_, err = m.register(m.registerRequest(""))
		m.close()
	}
	if err == nil || !strings.Contains(err.Error(), "429") {
		t.Errorf("the last one: %v, want 429", err)
	}
	w.machine().join(w.key(store.Key{}))
}

func TestLoginPage(t *testing.T) {
	w := newWorld(t, withLogin)
	w.user("alice")
	m := w.machine()
	url := m.ask(func(r *wire.RegisterRequest) {
		r.Hostinfo.Hostname = `<script>alert("x")</script>`
		r.Hostinfo.OS = "lin<b>ux\u202e\x1b[31m"
	})
	h := w.s.Handler()
	get := func(path string) (*http.Response, string) {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		resp := rec.Result()
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
			"Content-Type": "text/html; charset=utf-8", "X-Frame-Options": "DENY", "Content-Security-Policy": "default-src 'none'; style-src 'sha256-",
		} {
			if got := resp.Header.Get(name); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s %q, want %q", path, name, got, want)
			}
		}
		return resp, rec.Body.String()
	}
	path := strings.TrimPrefix(url, loginBase)
	resp, body := get(path)
	code := strings.TrimPrefix(path, "/login/")
	for _, want := range []string{"mesh node approve " + code + " --user NAME", "script-alert-x-script", "lin&lt;b&gt;ux[31m",
		m.key.Public().String()[:24], m.machine.Public().String()[:21]} {
		if resp.StatusCode != 200 || !strings.Contains(body, want) {
			t.Errorf("page: %d, no %q in %s", resp.StatusCode, want, body)
		}
	}
	if strings.Contains(body, "<script") || strings.Contains(body, "<b>") || strings.ContainsAny(body, "\x1b\u202e") {
		t.Errorf("page: %s", body)
	}
	for _, p := range []string{"/login/", "/login/x", path + "x", "/login/" + strings.Repeat("a", codeLen), "/login/%2e%2e"} {
		if resp, body := get2(h, p); resp != 404 || strings.Contains(body, "approve") {
			t.Errorf("%s: %d %s", p, resp, body)
		}
	}
	if code, _ := post(h, path); code != 405 {
		t.Errorf("POST to the page: %d", code)
	}
	if _, err := w.s.ApproveLogin(t.Context(), "test", url, "alice", nil); err != nil {
		t.Fatal(err)
	}
	if _, body := get(path); !strings.Contains(body, "let in") || strings.Contains(body, "approve") {
		t.Errorf("page after the approval: %s", body)
	}
}

func get2(h http.Handler, path string) (int, string) { return request(h, "GET", path) }
func post(h http.Handler, path string) (int, string) { return request(h, "POST", path) }

func request(h http.Handler, method, path string) (int, string) {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(method, path, nil))
	return rec.Code, rec.Body.String()
}

// An expired node logs in again and is the node that it was, with and without
// a word of its former key.
func TestLoginAgain(t *testing.T) {
	for _, say := range []bool{true, false} {
		bubble(t, withLogin, func(t *testing.T, w *world) { testLoginAgain(t, w, say) })
	}
}

func testLoginAgain(t *testing.T, w *world, say bool) {
	allow(w)
	alice := w.user("alice")
	b := w.machine().join(w.key(store.Key{}))
	nb := b.poll(nil)
	m := w.machine()
	m.join(w.key(store.Key{User: alice.ID}))
	n := m.poll(nil)
	was := n.self
	nb.until(t, "the node", func() bool { return nb.peers[was.ID] != nil })
	if err := w.s.RenameNode(t.Context(), "test", string(was.StableID), "mine-"+fmt.Sprint(was.ID)); err != nil {
		t.Fatal(err)
	}
	if err := w.s.ExpireNode(t.Context(), "test", string(was.StableID), time.Now()); err != nil {
		t.Fatal(err)
	}
	if code := n.end(t); code != wire.CodeNodeKeyExpired {
		t.Errorf("stream ended with %q", code)
	}
	nb.until(t, "its expiry", func() bool { return nb.peers[was.ID].Expired })
	old := m.key.Public()
	if resp, err := m.register(m.registerRequest("")); err != nil || !resp.NodeKeyExpired || resp.AuthURL != "" {
		t.Fatalf("with the expired key: %+v %v", resp, err)
	}
	m.key = identity.NewNode()
	with := func(r *wire.RegisterRequest) {
		if say {
			r.OldNodeKey = old
		}
	}
	url := m.ask(with)
	list := must[any](t)(w.s.adminLogins(nil)).([]admin.Login)
	if renews := list[len(list)-1].Renews; (renews != "") != say {
		t.Errorf("login of the former %q", renews)
	}
	got := m.follow(url, with)
	w.waits(1)
	if _, err := w.s.ApproveLogin(t.Context(), "test", url, "alice", nil); err != nil {
		t.Fatal(err)
	}
	if a := <-got; a.err != nil || !a.MachineAuthorized {
		t.Fatalf("%+v", a)
	}
	self := m.poll(nil).self
	if self.ID != was.ID || self.StableID != was.StableID || self.Addresses[0] != was.Addresses[0] || self.Expired || !self.KeyExpiry.After(time.Now()) {
		t.Errorf("came back as %+v, was %+v", self, was)
	}
	if self.Name != fmt.Sprintf("mine-%d.mesh.internal.", was.ID) {
		t.Errorf("came back as %s", self.Name)
	}
	nb.until(t, "its return", func() bool {
		p := nb.peers[was.ID]
		return !p.Expired && p.Key == m.key.Public() && online(p)
	})
}

// A node that an administrator removed hears so; it may ask to be let in as
// another one.
func TestLoginAfterRemoval(t *testing.T) {
	w := newWorld(t, withLogin)
	w.user("alice")
	m := w.machine()
	url := m.ask(nil)
	id := must[wire.NodeID](t)(w.s.ApproveLogin(t.Context(), "test", url, "alice", nil))
	m.join("")
	if err := w.s.RemoveNode(t.Context(), "test", "agent"); err != nil {
		t.Fatal(err)
	}
	m.refused(m.registerRequest(""), wire.CodeNodeRevoked)
	old := m.key.Public()
	m.key = identity.NewNode()
	again := m.ask(func(r *wire.RegisterRequest) { r.OldNodeKey = old })
	if again == url {
		t.Error("the URL that was approved serves again")
	}
	if other := must[wire.NodeID](t)(w.s.ApproveLogin(t.Context(), "test", again, "alice", nil)); other == id {
		t.Error("the removed node came back")
	}
	m.join("")
}

func FuzzLoginCode(f *testing.F) {
	w := newWorld(f, withLogin)
	url := w.machine().ask(nil)
	code := url[strings.LastIndex(url, "/")+1:]
	h := w.s.Handler()
	for _, s := range []string{"", "/", code, url, url + "/", code[1:], strings.ToUpper(code), "../" + code, code + "\x00", strings.Repeat("a", codeLen), "ä" + code} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, ok := loginCode(s)
		if ok && (len(got) != codeLen || !strings.HasSuffix(s, got)) {
			t.Errorf("%q became %q", s, got)
		}
		if l := w.s.viewLogin(s); l != nil && !strings.HasSuffix(s, code) {
			t.Errorf("%q found a login", s)
		}
		r := httptest.NewRequest("GET", "/login/x", nil)
		r.URL.Path, r.URL.RawPath = "/login/"+s, ""
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code >= 500 || rec.Code == 200 && !strings.HasSuffix(s, code) {
			t.Errorf("%q: status %d", s, rec.Code)
		}
	})
}
