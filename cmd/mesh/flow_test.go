package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
)

const testPolicy = `{
	"tagOwners": {"tag:web": [], "tag:app": []},
	"acls": [{"action": "accept", "src": ["tag:app"], "dst": ["tag:web:80"]}],
}
`

// agent is a node as a user's program has it.
func (s *server) agent(name, key string) *mesh.Node {
	s.shell.t.Helper()
	n := &mesh.Node{Hostname: name, ControlURL: s.url, ControlKey: s.key, AuthKey: key, Dir: filepath.Join(s.shell.t.TempDir(), name)}
	s.shell.t.Cleanup(func() { n.Close() })
	ctx, cancel := context.WithTimeout(s.shell.t.Context(), patience)
	defer cancel()
	if _, err := n.Up(ctx); err != nil {
		s.shell.t.Fatalf("%s: %v", name, err)
	}
	return n
}

// echo answers connections to a node with what they send.
func echo(t *testing.T, n *mesh.Node, addr string) {
	t.Helper()
	l, err := n.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// say sends a word over a connection and expects it back.
func say(c net.Conn, word string) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	b := make([]byte, len(word))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != word {
		return errors.New("came back as " + string(b))
	}
	return nil
}

func dial(t *testing.T, n *mesh.Node, addr string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A user sets up a mesh and looks after it.
func TestFlow(t *testing.T) {
	s := startServer(t)
	if !strings.Contains(s.said(), "policy  none: nobody may reach anybody") || !strings.Contains(s.said(), "warn  there is no policy") {
		t.Errorf("no warning of the missing policy: %q", s.said())
	}
	if !strings.HasPrefix(s.key, "mkey:") {
		t.Errorf("key %q", s.key)
	}
	s.fails([]string{"policy", "get"}, "there is no policy: everything is denied")
	s.fails([]string{"key", "create", "--tag", "tag:web"}, `tag "tag:web" is not in the policy's tagOwners`)
	s.fails([]string{"key", "create", "--user", "alice"}, `user "alice": not found`)

	file := writeFile(t, testPolicy)
	if got := s.ok("policy", "set", file); got != "policy version 1 is in force\n" {
		t.Errorf("policy set: %q", got)
	}
	if got := s.ok("policy", "get"); got != testPolicy {
		t.Errorf("policy get: %q", got)
	}
	if r := s.run("policy", "set", writeFile(t, `{"acl": []}`)); r.code != exitFail || !strings.Contains(r.stderr, `:1:2: unknown member "acl"`) {
		t.Errorf("bad policy: %+v", r)
	}
	s.fails([]string{"policy", "set", "--expect", "7", file}, "its version is 1 by now, not 7")
	if p := decode[admin.Policy](t, s.ok("policy", "get", "--json")); p.Version != 1 || p.Text != testPolicy {
		t.Errorf("policy get --json: %+v", p)
	}

	// Flags stand before or after the arguments.
	if got := s.ok("user", "create", "alice@example.com", "--data", s.data); got != "user alice@example.com created, owner\n" {
		t.Errorf("user create: %q", got)
	}
	s.ok("user", "create", "--data", s.data, "--", "bob")
	s.fails([]string{"user", "create", "alice@example.com"}, "already")
	s.fails([]string{"user", "create", "not a name"}, "want a login name or an e-mail address")
	s.ok("user", "remove", "bob")
	if users := decode[[]admin.User](t, s.ok("user", "list", "--json")); len(users) != 1 || users[0].Name != "alice@example.com" {
		t.Errorf("user list: %+v", users)
	}
	if got := s.ok("user", "list"); !strings.Contains(got, "alice@example.com  owner  active  0") {
		t.Errorf("user list: %q", got)
	}

	webKey := s.ok("key", "create", "--tag", "tag:web")
	appKey := s.ok("key", "create", "--tag", "tag:app", "--expires", "30d", "--reusable")
	if strings.Count(webKey, "\n") != 1 || strings.Contains(webKey, " ") {
		t.Errorf("the key does not stand alone: %q", webKey)
	}
	webKey, appKey = strings.TrimSpace(webKey), strings.TrimSpace(appKey)
	keys := s.ok("key", "list", "--json")
	if list := decode[[]admin.Key](t, keys); len(list) != 2 || list[0].State != "valid" || !list[1].Reusable {
		t.Errorf("key list: %+v", list)
	}
	for _, text := range []string{keys, s.ok("key", "list"), s.said()} {
		if secret := webKey[len(webKey)-16:]; strings.Contains(text, secret) {
			t.Errorf("a secret in %q", text)
		}
	}

	web, app := s.agent("web", webKey), s.agent("app", appKey)
	echo(t, web, ":80")
	conn := dial(t, app, "web:80")
	if err := say(conn, "hello"); err != nil {
		t.Fatal(err)
	}

	nodes := decode[[]admin.Node](t, s.ok("node", "list", "--json"))
	if len(nodes) != 2 || nodes[0].Name != "web" || !nodes[0].Online || nodes[1].Tags[0] != "tag:app" {
		t.Errorf("node list: %+v", nodes)
	}
	if got := s.ok("node", "list"); !strings.Contains(got, "web   100.64.0.1  tag:web  online") {
		t.Errorf("node list: %q", got)
	}
	shown := decode[admin.Node](t, s.ok("node", "show", "web", "--json"))
	if shown.FullName != "web.mesh.internal" || len(shown.Peers) != 1 || shown.Peers[0] != "app" {
		t.Errorf("node show: %+v", shown)
	}
	for _, name := range []string{"web.mesh.internal", string(shown.StableID), "100.64.0.1"} {
		if got := s.ok("node", "show", name); !strings.Contains(got, "web.mesh.internal") || !strings.Contains(got, "tag:web") {
			t.Errorf("node show %s: %q", name, got)
		}
	}
	s.fails([]string{"node", "show", "nobody"}, `node "nobody": not found`)
	if got := s.ok("status"); !strings.Contains(got, "2, 2 online") || !strings.Contains(got, s.url) {
		t.Errorf("status: %q", got)
	}
	status := decode[struct {
		admin.Status
		RelayMap []admin.Relay
	}](t, s.ok("status", "--json"))
	if status.Nodes != 2 || status.DenyAll || len(status.RelayMap) != 1 || status.Key.String() != s.key {
		t.Errorf("status: %+v", status)
	}

	// A third node, only to look around; it is gone when it has looked.
	look := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_CONTROL_KEY="+s.key, "MESH_AUTHKEY="+appKey)
	if got := look.ok("status"); !strings.Contains(got, "mesh-status.mesh.internal") || !strings.Contains(got, "web.mesh.internal") {
		t.Errorf("status as a node: %q", got)
	}
	report := decode[nodeReport](t, look.ok("status", "--json", "--control", s.url))
	if len(report.Peers) != 1 || report.Peers[0].Name != "web.mesh.internal" || !report.Peers[0].Online || !report.Self.Online {
		t.Errorf("status as a node: %+v", report)
	}
	if nodes := decode[[]admin.Node](t, s.ok("node", "list", "--json")); len(nodes) != 2 {
		t.Errorf("the node of mesh status stays: %+v", nodes)
	}

	s.ok("key", "revoke", "2")
	if got := s.ok("key", "list"); !strings.Contains(got, "revoked") || !strings.Contains(got, "used") {
		t.Errorf("key list: %q", got)
	}
	look.fails([]string{"status"}, "auth key revoked")
	s.fails([]string{"key", "revoke", "77"}, "not found")

	// Removal cuts what is open.
	s.ok("node", "remove", "web")
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection to a removed node: %v", err)
	}
	s.fails([]string{"node", "remove", "web"}, `node "web": not found`)
	s.terminate()
}

func TestInUse(t *testing.T) {
	s := startServer(t)
	free := []string{"--listen", "127.0.0.1:0", "--stun", "127.0.0.1:0"}
	s.fails(append([]string{"serve"}, free...), "already in use", "is another server running on this directory?")
	other := shortDir(t)
	s.fails([]string{"serve", "--data", other, "--listen", s.addr, "--stun", "off"}, "address already in use", "--listen")
	stun := s.line("relay   built in, STUN at ")
	s.fails([]string{"serve", "--data", other, "--listen", "127.0.0.1:0", "--stun", stun}, "address already in use", "--stun")
	// The one that runs took no harm.
	s.ok("status")
}

// What was acknowledged survives a kill, and nodes go on meanwhile.
func TestKill(t *testing.T) {
	s := startServer(t, "--policy", writeFile(t, testPolicy))
	if strings.Contains(s.said(), "no policy") {
		t.Errorf("a warning of a missing policy: %q", s.said())
	}
	s.ok("user", "create", "alice")
	web := s.agent("web", strings.TrimSpace(s.ok("key", "create", "--tag", "tag:web")))
	app := s.agent("app", strings.TrimSpace(s.ok("key", "create", "--tag", "tag:app")))
	echo(t, web, ":80")
	conn := dial(t, app, "web:80")
	before := []string{s.ok("user", "list", "--json"), s.ok("key", "list", "--json"), s.ok("policy", "get", "--json")}
	key := s.key

	s.kill()
	s.fails([]string{"node", "list"}, "no server answers at")
	if err := say(conn, "still there"); err != nil {
		t.Errorf("an old connection without server: %v", err)
	}
	if err := say(dial(t, app, "web:80"), "anew"); err != nil {
		t.Errorf("a new connection without server: %v", err)
	}

	s.listen(s.addr)
	if s.key != key {
		t.Errorf("the key changed from %s to %s", key, s.key)
	}
	after := []string{s.ok("user", "list", "--json"), s.ok("key", "list", "--json"), s.ok("policy", "get", "--json")}
	for i := range before {
		if before[i] != after[i] {
			t.Errorf("before the kill %s, after it %s", before[i], after[i])
		}
	}
	s.until("the nodes to be back", func(out string) bool { return strings.Count(out, "online ") == 2 }, "node", "list")
	if err := say(conn, "to the end"); err != nil {
		t.Errorf("an old connection after the restart: %v", err)
	}
	s.terminate()
}

// A relay of its own goes on with the members it knows, also after a restart,
// while the control server is dead.
func TestRelay(t *testing.T) {
	s := startServer(t, "--no-relay", "--policy", writeFile(t, testPolicy))
	key := strings.TrimSpace(s.ok("key", "create", "--relay"))
	relay := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_CONTROL_KEY="+s.key, "MESH_RELAY_KEY="+key)
	args := []string{"relay", "--data", filepath.Join(shortDir(t), "relay"), "--stun", "127.0.0.1:0"}
	p := relay.start(append(args, "--listen", "127.0.0.1:0", "--region", "950")...)
	addr, _, _ := strings.Cut(p.line("relay "), ",")
	p.line("announced to " + s.url)
	if relays := decode[[]admin.Relay](t, s.ok("relay", "list", "--json")); len(relays) != 1 || relays[0].Region != 950 || !relays[0].Connected {
		t.Errorf("relay list: %+v", relays)
	}
	relay.fails(append(args, "--listen", "127.0.0.1:0"), "in use")
	second := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_RELAY_KEY=mesh-relay-9-nothing")
	q := second.start("relay", "--data", shortDir(t), "--listen", "127.0.0.1:0", "--stun", "off", "--region", "951")
	if code := q.end(); code != exitFail || !strings.Contains(q.said(), "unknown relay key") || strings.Contains(q.said(), "nothing") {
		t.Errorf("a relay with a wrong key: status %d, %q", code, q.said())
	}

	web := s.agent("web", strings.TrimSpace(s.ok("key", "create", "--tag", "tag:web")))
	n := &mesh.Node{Hostname: "app", ControlURL: s.url, AuthKey: strings.TrimSpace(s.ok("key", "create", "--tag", "tag:app")),
		Dir: t.TempDir(), RelayOnly: true} // so that nothing can go around the relay
	defer n.Close()
	echo(t, web, ":80")
	conn := dial(t, n, "web:80")
	if err := say(conn, "by relay"); err != nil {
		t.Fatal(err)
	}

	s.kill()
	p.line("mesh relay: going on with 2 known members: ")
	if err := say(conn, "without control"); err != nil {
		t.Errorf("an old connection without control: %v", err)
	}
	p.terminate()
	p = relay.start(append(args, "--listen", addr, "--region", "950")...)
	if got := p.line("members "); got != "2 known" {
		t.Errorf("a restarted relay without control: %q", got)
	}
	// Both nodes have to find their way back to the relay first.
	if err := say(conn, "through another relay process"); err != nil {
		t.Errorf("a connection over the restart of the relay: %v", err)
	}
	if err := say(dial(t, n, "web:80"), "anew"); err != nil {
		t.Errorf("a new connection without control: %v", err)
	}

	s.listen(s.addr)
	p.line("announced to " + s.url)
	s.ok("relay", "remove", "950")
	if code := p.end(); code != exitFail || !strings.Contains(p.said(), "unknown relay key") {
		t.Errorf("a relay that was removed: status %d, %q", code, p.said())
	}
}

// The socket is for its owner, and nothing but its clients gets an answer
// (reliability 2.2, negative test 78).
func TestAdminSocket(t *testing.T) {
	s := startServer(t)
	socket := filepath.Join(s.data, "mesh.sock")
	if runtime.GOOS != "windows" {
		fi, err := os.Stat(socket)
		if err != nil {
			t.Fatal(err)
		}
		if perm := fi.Mode().Perm(); perm != 0o600 {
			t.Errorf("the socket's mode is %04o", perm)
		}
		if fi, err = os.Stat(s.data); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("the data directory's mode: %v, %v", fi, err)
		}
		open := shortDir(t)
		if err := os.Chmod(open, 0o777); err != nil {
			t.Fatal(err)
		}
		s.fails([]string{"serve", "--data", open, "--listen", "127.0.0.1:0", "--stun", "off"}, "others may write to it (mode 0777)")
	}

	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	client := &http.Client{Transport: tr}
	get := func(c *http.Client, url, host, header, value string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		if header != "" {
			req.Header.Set(header, value)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, body := get(client, "http://x/v1/status", admin.Host, "", ""); code != 200 {
		t.Errorf("a client as it should be: %d %s", code, body)
	}
	for _, test := range []struct{ host, header, value string }{
		{"evil.com", "", ""},
		{"localhost", "", ""},
		{"127.0.0.1:8080", "", ""},
		{admin.Host + ".evil.com", "", ""},
		{admin.Host, "Origin", "http://evil.com"},
		{admin.Host, "Origin", "null"},
	} {
		if code, body := get(client, "http://x/v1/users", test.host, test.header, test.value); code != 403 || strings.Contains(body, "[") {
			t.Errorf("host %q, %s %q: %d %s", test.host, test.header, test.value, code, body)
		}
	}
	// The port for nodes has no such API, whatever the request says.
	tcp := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, path := range []string{"/v1/status", "/v1/users", "/v1/keys", "//v1/nodes"} {
		if code, body := get(tcp, s.url+path, admin.Host, "", ""); code != 404 {
			t.Errorf("%s at the port for nodes: %d %s", path, code, body)
		}
	}
	// A leftover socket of a server that was killed is no obstacle.
	s.kill()
	s.listen(s.addr)
	s.ok("status")
	s.terminate()
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
