package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control"
	"mesh/control/admin"
	"mesh/control/wire"
	"mesh/identity"
)

const ownersPolicy = `{
	"tagOwners": {"tag:web": [], "tag:app": ["alice@"], "tag:db": []},
	"acls": [
		{"action": "accept", "src": ["tag:app"], "dst": ["tag:web:80"]},
		{"action": "accept", "src": ["alice@"], "dst": ["tag:db:80"]},
	],
}
`

// sees waits until a node knows a peer for which ok holds.
func sees(t *testing.T, n *mesh.Node, what string, ok func(mesh.PeerStatus) bool) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !slices.ContainsFunc(n.Status().Peers, ok) {
		select {
		case <-late:
			t.Fatalf("waited %v for %s: %+v", patience, what, n.Status().Peers)
		case <-tick.C:
		}
	}
}

// An administrator changes nodes that run; they and their peers follow.
func TestNodeChanges(t *testing.T) {
	s := startServer(t, "--policy", writeFile(t, ownersPolicy))
	s.ok("user", "create", "alice")
	key := func(args ...string) string {
		return strings.TrimSpace(s.ok(append([]string{"key", "create"}, args...)...))
	}
	web := s.agent("web", key("--tag", "tag:web"))
	app := s.agent("app", key("--user", "alice", "--node-expiry", "30d"))
	if got := s.ok("key", "list"); !strings.Contains(got, "expire after 30d") || !strings.Contains(got, "default") {
		t.Errorf("key list: %q", got)
	}
	if got := s.ok("node", "list"); !strings.Contains(got, "in 30d") || !strings.Contains(got, "never") {
		t.Errorf("node list: %q", got)
	}
	echo(t, web, ":80")

	// app is alice's and may not reach web; with the tag it may.
	if got := s.ok("node", "tag", "app", "tag:app"); got != "node app belongs to tag:app now\n" {
		t.Errorf("node tag: %q", got)
	}
	sees(t, app, "web", func(p mesh.PeerStatus) bool { return p.Name == "web.mesh.internal" })
	conn := dial(t, app, "web:80")
	if err := say(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if n := decode[admin.Node](t, s.ok("node", "show", "app", "--json")); n.User != "" || len(n.Tags) != 1 || !n.Expires.IsZero() {
		t.Errorf("tagged: %+v", n)
	}

	if got := s.ok("node", "rename", "web", "Front"); got != "node web is front.mesh.internal now\n" {
		t.Errorf("node rename: %q", got)
	}
	sees(t, app, "the new name", func(p mesh.PeerStatus) bool { return p.Name == "front.mesh.internal" })
	if err := say(dial(t, app, "front:80"), "under its new name"); err != nil {
		t.Error(err)
	}
	if err := say(conn, "still there"); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
	if got := s.ok("node", "show", "front"); !strings.Contains(got, "given by an administrator (host: web)") {
		t.Errorf("node show: %q", got)
	}
	s.fails([]string{"node", "rename", "front", "app"}, `there is a node "app" already`)
	s.fails([]string{"node", "rename", "front", "a b"}, "want letters, digits and dashes")
	s.fails([]string{"node", "rename", "web", "x"}, `node "web": not found`)
	if got := s.ok("node", "rename", "front", "--reset"); got != "node front is web.mesh.internal now\n" {
		t.Errorf("node rename --reset: %q", got)
	}

	// Given back to alice, what the tag allowed ends.
	if got := s.ok("node", "tag", "app", "--user", "alice"); got != "node app belongs to alice now\n" {
		t.Errorf("node tag --user: %q", got)
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("the connection ended without an error")
	}
	s.fails([]string{"node", "tag", "app", "tag:nosuch"}, `tag "tag:nosuch" is not in the policy's tagOwners`)
	s.fails([]string{"node", "tag", "app", "--user", "bob"}, `user "bob": not found`)

	if got := s.ok("node", "expire", "app", "--in", "72h"); got != "the key of node app expires in 3d\n" {
		t.Errorf("node expire --in: %q", got)
	}
	if got := s.ok("node", "expire", "app", "--never"); got != "the key of node app expires never\n" {
		t.Errorf("node expire --never: %q", got)
	}
	s.fails([]string{"node", "expire", "app", "--at", "3000-01-01"}, "more than 100 years")
	if got := s.ok("node", "expire", "app"); got != "the key of node app has expired\n" {
		t.Errorf("node expire: %q", got)
	}
	if got := s.ok("node", "list"); !strings.Contains(got, "key expired") {
		t.Errorf("node list: %q", got)
	}
	if n := decode[admin.Node](t, s.ok("node", "show", "app", "--json")); !n.Expired {
		t.Errorf("expired: %+v", n)
	}
}

// A machine without a key asks, and an administrator answers.
func TestLogin(t *testing.T) {
	s := startServer(t, "--policy", writeFile(t, ownersPolicy), "--node-expiry", "10d")
	s.ok("user", "create", "alice")
	ask := func(name string, tags ...string) (*control.Client, wire.RegisterRequest) {
		t.Helper()
		c, err := control.New(control.Config{URL: s.url, Machine: identity.NewMachine()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		req := wire.RegisterRequest{NodeKey: identity.NewNode().Public(), Hostinfo: &wire.Hostinfo{Hostname: name, OS: "linux", RequestTags: tags}}
		_, err = c.Register(t.Context(), req)
		var needs *control.NeedsLoginError
		if !errors.As(err, &needs) || !strings.HasPrefix(needs.URL, s.url+"/login/") {
			t.Fatalf("register: %v", err)
		}
		req.Followup = needs.URL
		return c, req
	}
	c, req := ask("laptop")
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Get(req.Followup)
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	code := loginCode(req.Followup)
	if err != nil || resp.StatusCode != 200 || !strings.Contains(string(page), "mesh node approve "+code+" --user NAME") {
		t.Errorf("page: %d %v %s", resp.StatusCode, err, page)
	}
	if got := s.ok("node", "pending"); !strings.Contains(got, code+"  laptop  linux") {
		t.Errorf("node pending: %q", got)
	}
	if got := s.ok("node", "list"); !strings.Contains(got, "1 more to be let in: see mesh node pending") {
		t.Errorf("node list: %q", got)
	}
	if got := s.ok("status"); !strings.Contains(got, "0, 0 online, 1 more to be let in") {
		t.Errorf("status: %q", got)
	}
	logins := decode[[]admin.Login](t, s.ok("node", "pending", "--json"))
	if len(logins) != 1 || logins[0].URL != req.Followup || logins[0].NodeKey != req.NodeKey {
		t.Errorf("node pending --json: %+v", logins)
	}
	done := make(chan error, 1)
	go func() {
		_, err := c.Register(context.WithoutCancel(t.Context()), req)
		done <- err
	}()
	s.fails([]string{"node", "approve", code, "--user", "bob"}, `user "bob": not found`)
	s.fails([]string{"node", "approve", "nonsense", "--user", "alice"}, `login "nonsense": not found`)
	if got := s.ok("node", "approve", req.Followup, "--user", "alice"); got != "node laptop (100.64.0.1) is in, owner alice\n" {
		t.Errorf("node approve: %q", got)
	}
	if err := <-done; err != nil {
		t.Errorf("follow-up: %v", err)
	}
	s.fails([]string{"node", "approve", code, "--user", "alice"}, "approved already")
	if n := decode[admin.Node](t, s.ok("node", "show", "laptop", "--json")); n.User != "alice" || time.Until(n.Expires) > 10*24*time.Hour || time.Until(n.Expires) < 9*24*time.Hour {
		t.Errorf("node: %+v", n)
	}

	// Tags that a user may not give need the administrator's own word.
	c, req = ask("db", "tag:db")
	s.fails([]string{"node", "approve", loginCode(req.Followup), "--user", "alice"}, "the machine asks for tag:db", "approve it with --tag tag:db")
	if got := s.ok("node", "approve", loginCode(req.Followup), "--tag", "tag:db"); !strings.Contains(got, "is in, owner tag:db") {
		t.Errorf("node approve --tag: %q", got)
	}
	if _, err := c.Register(t.Context(), req); err != nil {
		t.Errorf("follow-up: %v", err)
	}
	c, req = ask("stranger")
	if got := s.ok("node", "reject", loginCode(req.Followup)); got != "rejected\n" {
		t.Errorf("node reject: %q", got)
	}
	if _, err := c.Register(t.Context(), req); !errors.Is(err, wire.ErrLoginRejected) {
		t.Errorf("after the rejection: %v", err)
	}
	if got := s.ok("node", "pending"); strings.Count(got, "\n") != 1 {
		t.Errorf("node pending: %q", got)
	}
}
