package server

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"mesh/control/admin"
	"mesh/control/wire"
)

func listenUnix(t testing.TB, path string) net.Listener {
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAdmin(t *testing.T) {
	logs, seen := observer.New(zap.DebugLevel)
	w := newWorld(t, func(c *Config) { c.Logger, c.BaseURL = zap.New(logs), "http://control.example.com" })
	c, ctx := w.admin(), context.Background()
	if st := must[admin.Status](t)(c.Status(ctx)); !st.DenyAll || st.Key != w.s.Key() || st.Domain != "mesh.internal" || st.URL == "" || st.Relays != 1 {
		t.Errorf("status: %+v", st)
	}
	if n := seen.FilterMessageSnippet("no policy").Len(); n != 1 {
		t.Errorf("%d warnings about the missing policy, want 1", n)
	}

	alice := must[admin.User](t)(c.CreateUser(ctx, "Alice@example.com"))
	if alice.Role != "owner" || alice.Name != "alice@example.com" {
		t.Errorf("first user: %+v", alice)
	}
	if bob := must[admin.User](t)(c.CreateUser(ctx, "bob")); bob.Role != "member" {
		t.Errorf("second user: %+v", bob)
	}
	if _, err := c.CreateUser(ctx, "ALICE@example.com"); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("same user again: %v", err)
	}
	for _, name := range []string{"", "a b", "tag:x", "a@", "@b", "x\n", "<script>", strings.Repeat("a", 300), "a@b@c"} {
		if _, err := c.CreateUser(ctx, name); !errors.Is(err, admin.ErrInvalid) {
			t.Errorf("user %q: %v, want ErrInvalid", name, err)
		}
	}

	for name, k := range map[string]admin.KeyCreate{
		"neither":         {},
		"both":            {User: "bob", Tags: []string{"tag:a"}},
		"unknown tag":     {Tags: []string{"tag:a"}},
		"relay with user": {Relay: true, User: "bob"},
		"negative":        {User: "bob", Expires: -1},
	} {
		if _, err := c.CreateKey(ctx, k); !errors.Is(err, admin.ErrInvalid) {
			t.Errorf("key with %s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := c.CreateKey(ctx, admin.KeyCreate{User: "carol"}); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("key of nobody: %v", err)
	}

	zero, one := int64(0), int64(1)
	if _, err := c.SetPolicy(ctx, admin.PolicySet{Text: `{"nonsense": 1}`}); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("invalid policy: %v", err)
	}
	text := `{"tagOwners":{"tag:a":["carol@example.com"]},"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:a:*"]}]}`
	if warn := must[[]string](t)(c.CheckPolicy(ctx, text)); len(warn) != 1 || !strings.Contains(warn[0], "carol") {
		t.Errorf("warnings %q", warn)
	}
	if p := must[admin.Policy](t)(c.Policy(ctx)); p.Version != 0 {
		t.Errorf("a check stored the policy: %+v", p)
	}
	if p := must[admin.Policy](t)(c.SetPolicy(ctx, admin.PolicySet{Text: text, Replaces: &zero})); p.Version != 1 {
		t.Errorf("policy: %+v", p)
	}
	if _, err := c.SetPolicy(ctx, admin.PolicySet{Text: text, Replaces: &zero}); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("stale policy: %v", err)
	}
	must[admin.Policy](t)(c.SetPolicy(ctx, admin.PolicySet{Text: text, Replaces: &one}))
	if p := must[admin.Policy](t)(c.Policy(ctx)); p.Text != text || p.Version != 2 {
		t.Errorf("policy: %+v", p)
	}

	k := must[admin.NewKey](t)(c.CreateKey(ctx, admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true, Expires: time.Hour}))
	rk := must[admin.NewKey](t)(c.CreateKey(ctx, admin.KeyCreate{Relay: true}))
	a, b := w.machine().join(k.Secret), w.machine().join(k.Secret)
	na := a.poll(nil)
	b.poll(nil)
	nodes := must[[]admin.Node](t)(c.Nodes(ctx))
	if len(nodes) != 2 || !nodes[0].Online || nodes[0].FullName != "agent.mesh.internal" || nodes[0].Tags[0] != "tag:a" {
		t.Errorf("nodes: %+v", nodes)
	}
	for _, name := range []string{"agent-1", "AGENT-1", "agent-1.mesh.internal", "agent-1.mesh.internal.", string(nodes[1].StableID), nodes[1].Addresses[0].String(), nodes[1].Addresses[1].String()} {
		n := must[admin.Node](t)(c.Node(ctx, name))
		if n.ID != nodes[1].ID || len(n.Peers) != 1 || n.Peers[0] != "agent" {
			t.Errorf("node %q: %+v", name, n)
		}
	}
	if _, err := c.Node(ctx, "nosuch/../x"); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
	if err := c.RemoveNode(ctx, "agent-1"); err != nil {
		t.Fatal(err)
	}
	na.until(t, "the removal", func() bool { return len(na.peers) == 0 })
	if st := must[admin.Status](t)(c.Status(ctx)); st.Nodes != 1 || st.Online != 1 || st.PolicyVersion != 2 || st.DenyAll {
		t.Errorf("status: %+v", st)
	}

	// A revoked key admits nobody, and a relay that uses it is cut off.
	feed, status, _ := w.machine().relay(relayRequest(rk.Secret, a.key.Public(), 901))
	if status != 200 {
		t.Fatal(status)
	}
	for _, id := range []int64{k.ID, rk.ID} {
		if got := must[admin.Key](t)(c.RevokeKey(ctx, id)); got.State != "revoked" {
			t.Errorf("revoked key: %+v", got)
		}
	}
	for feed.read() == nil {
	}
	if feed.code != wire.CodeRelayKeyUnknown {
		t.Errorf("relay with a revoked key: %q", feed.code)
	}
	m := w.machine()
	m.refused(m.registerRequest(k.Secret), wire.CodeAuthKeyRevoked)

	// No secret is in any list, in the record of changes, or in the log.
	secrets := []string{k.Secret, rk.Secret, k.Secret[len(k.Secret)-20:], rk.Secret[len(rk.Secret)-20:]}
	lists, err := json.Marshal([]any{
		must[[]admin.Key](t)(c.Keys(ctx)), must[[]admin.AuditEntry](t)(c.Audit(ctx, time.Time{}, 0)),
		must[[]admin.Node](t)(c.Nodes(ctx)), must[[]admin.User](t)(c.Users(ctx)), must[[]admin.Relay](t)(c.Relays(ctx)), seen.All(),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets {
		if strings.Contains(string(lists), s) {
			t.Error("a list or the log shows a secret")
		}
	}
	if !strings.Contains(string(lists), "node.remove") {
		t.Error("the removal is not on record")
	}

	if err := c.RemoveUser(ctx, "bob"); err != nil {
		t.Error(err)
	}
	if err := c.RemoveUser(ctx, "bob"); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("remove twice: %v", err)
	}
	if _, err := admin.NewClient(t.TempDir() + "/nothing").Status(ctx); err == nil || !strings.Contains(err.Error(), "is `mesh serve` running") {
		t.Errorf("no server: %v", err)
	}
}

func TestAdminRefusesBrowsers(t *testing.T) {
	w := newWorld(t, nil)
	for name, change := range map[string]func(*http.Request){
		"other host": func(r *http.Request) { r.Host = "evil.com" },
		"origin":     func(r *http.Request) { r.Host = admin.Host; r.Header.Set("Origin", "http://evil.com") },
	} {
		r := httptest.NewRequest("GET", "/v1/status", nil)
		change(r)
		rec := httptest.NewRecorder()
		w.s.AdminHandler().ServeHTTP(rec, r)
		if rec.Code != http.StatusForbidden {
			t.Errorf("%s: status %d", name, rec.Code)
		}
	}
}
