package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"mesh/control/admin"
)

const toolPolicy = `{
	"groups":    {"group:ops": ["alice@example.com"]},
	"tagOwners": {"tag:db": ["group:ops"], "tag:web": [], "tag:app": []},
	"hosts":     {"printer": "10.0.0.7"},
	"acls": [
		{"action": "accept", "src": ["group:ops"], "dst": ["tag:db:5432"]},
		{"action": "accept", "src": ["tag:app"], "dst": ["tag:web:80", "printer:*"]},
		{"action": "accept", "src": ["carol@example.com"], "dst": ["tag:web:80"]},
	],
	"tests": [{"src": "alice@example.com", "accept": ["tag:db:5432"], "deny": ["tag:web:80"]}],
}
`

const toolTopology = `{
	"users": [{"id": 1, "name": "alice@example.com", "role": "owner"}, {"id": 2, "name": "bob", "email": "bob@example.com"}],
	"nodes": {
		"laptop": {"user": "alice@example.com", "ipv4": "100.64.0.1", "ipv6": "fd7a:115c:a1e0::1"},
		"db":     {"tags": ["tag:db"], "ipv4": "100.64.0.2", "ipv6": "fd7a:115c:a1e0::2"},
		"web":    {"tags": ["tag:web"], "ipv4": "100.64.0.3", "routable_ips": ["10.0.0.0/8"], "approved_routes": ["10.0.0.0/8"]},
		"app":    {"tags": ["tag:app"], "ipv4": "100.64.0.4", "ipv6": "fd7a:115c:a1e0::4"}
	}}`

// toolFiles writes policy and topology.
func toolFiles(t *testing.T) (policy, topology string) {
	t.Helper()
	topology = filepath.Join(t.TempDir(), "topology.json")
	if err := os.WriteFile(topology, []byte(toolTopology), 0o600); err != nil {
		t.Fatal(err)
	}
	return writeFile(t, toolPolicy), topology
}

// containsAll reports a part that text lacks.
func containsAll(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s lacks %q: %q", what, p, text)
		}
	}
}

// Policies are checked, compiled, explained and compared without a server.
func TestPolicyTools(t *testing.T) {
	s := newShell(t)
	file, topology := toolFiles(t)

	r := s.run("policy", "check", "--topology", topology, file)
	if r.code != exitDone || r.stdout != file+" is valid\n" || r.stderr != file+`: warning: 8:32: unknown user "carol@example.com"`+"\n" {
		t.Errorf("check: %+v", r)
	}
	other := writeFile(t, strings.Replace(toolPolicy, `tag:db:5432"]}`, `tag:db:22"]}`, 1))
	r = s.run("policy", "check", "--topology", topology, other)
	if r.code != exitFail || r.stdout != "" || !strings.Contains(r.stderr, other+":10: tests[0] at line 10: ") {
		t.Errorf("failing tests: %+v", r)
	}
	if r := s.run("policy", "compile", "--topology", topology, other); r.code != exitFail || r.stdout != "" || !strings.Contains(r.stderr, "tests[0]") {
		t.Errorf("compiled: %+v", r)
	}

	got := decode[map[string]compiledNode](t, s.ok("policy", "compile", "--topology", topology, file))
	if len(got) != 4 || len(got["laptop"].Filter) != 0 || got["laptop"].Filter == nil || len(got["db"].Filter) != 1 {
		t.Errorf("compiled: %+v", got)
	}
	web := got["app"].Peers["web"]
	if len(got["app"].Peers) != 1 || len(web.AllowedIPs) != 2 || len(web.PrimaryRoutes) != 1 || web.PrimaryRoutes[0].String() != "10.0.0.0/8" {
		t.Errorf("app's peers: %+v", got["app"].Peers)
	}

	explain := func(args ...string) string {
		t.Helper()
		return s.ok(append([]string{"policy", "explain", "--policy", file, "--topology", topology}, args...)...)
	}
	for _, test := range []struct{ from, to, want string }{
		{"laptop", "db:5432", "laptop to db, tcp port 5432: allowed\n  by acls[0] at line 6: group:ops may reach tag:db:5432\n    alice@example.com is in group:ops\n    db (tag:db) carries tag:db\n"},
		{"laptop", "db:22", "denied\n  nearest is acls[0] at line 6: it opens port 5432, not 22\n"},
		{"bob@", "db:5432", "denied\n  nearest is acls[0] at line 6: bob@example.com is not among its sources: group:ops\n"},
		{"app", "10.0.0.7:22", "printer is 10.0.0.7 in \"hosts\"\n  10.0.0.7 lies behind web (tag:web)\n"},
		{"100.64.0.4", "web.mesh.internal:80", "allowed\n  by acls[1] at line 7"},
		{"tag:app", "tag:web:80", "allowed\n  by acls[1] at line 7"},
		{"laptop", "[fd7a:115c:a1e0::2]:5432", "allowed\n  by acls[0] at line 6"},
	} {
		containsAll(t, test.from+" to "+test.to, explain("--from", test.from, "--to", test.to), test.want)
	}
	containsAll(t, "udp", explain("--from", "app", "--to", "web:80", "--proto", "udp"), "udp port 80: allowed")
	containsAll(t, "icmp", explain("--from", "app", "--to", "tag:web", "--proto", "icmp"), "app to tag:web, icmp: allowed")
	containsAll(t, "sctp", explain("--from", "app", "--to", "web:80", "--proto", "sctp"), "denied")
	e := decode[explanation](t, explain("--from", "laptop", "--to", "db:5432", "--json"))
	if !e.Allowed || len(e.Rules) != 1 || e.Rules[0].Rule != "acls[0]" || e.Rules[0].Line != 6 || e.Rules[0].SrcBy != "alice@example.com is in group:ops" {
		t.Errorf("explain --json: %+v", e)
	}
	e = decode[explanation](t, explain("--from", "laptop", "--to", "db:1", "--json"))
	if e.Allowed || e.Nearest == nil || e.Nearest.Rule != "acls[0]" || e.Missing != "it opens port 5432, not 1" {
		t.Errorf("explain --json: %+v", e)
	}
	s.fails([]string{"policy", "explain", "--policy", file, "--topology", topology, "--from", "nobody", "--to", "db:1"}, `"nobody" is no node, user, tag or address`)

	diff := s.ok("policy", "diff", file, other, "--topology", topology)
	containsAll(t, "diff", diff, "- alice@example.com → tag:db: tcp, udp 5432 (acls[0] at line 6)\n", "+ alice@example.com → tag:db: tcp, udp 22 (acls[0] at line 6)\n")
	if got := s.ok("policy", "diff", file, file, "--topology", topology); got != "nobody gains or loses anything\n" {
		t.Errorf("no difference: %q", got)
	}
	d := decode[differences](t, s.ok("policy", "diff", "--json", file, other, "--topology", topology))
	if !d.Complete || len(d.Changes) != 2 || d.Changes[0].Gained == d.Changes[1].Gained || d.Changes[0].Dst != "tag:db" {
		t.Errorf("diff --json: %+v", d)
	}
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte(`{"nodes": {"a": {"id": 1, "ipv4": "x"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.fails([]string{"policy", "compile", "--topology", bad, file}, "topology "+bad+": ")
}

// An administrator edits the policy of a running mesh, gives access for a time,
// tries a candidate, and reads who did what.
func TestPolicyLife(t *testing.T) {
	s := startServer(t)
	s.ok("user", "create", "alice@example.com")
	s.ok("user", "create", "carol@example.com")
	file, _ := toolFiles(t)
	s.ok("policy", "set", "--expect", "0", file)
	edited := strings.Replace(toolPolicy, "tag:web:80\", \"printer", "tag:web:443\", \"printer", 1)
	s.fails([]string{"policy", "set", "--expect", "0", writeFile(t, edited)}, "its version is 1 by now, not 0")
	s.ok("policy", "set", "--expect", "1", writeFile(t, edited))
	failing := writeFile(t, strings.Replace(toolPolicy, `tag:db:5432"]}`, `tag:db:22"]}`, 1))
	s.fails([]string{"policy", "set", failing}, failing+": tests[0] at line 10: ", "can not reach tag:db:5432")
	containsAll(t, "diff of versions", s.ok("policy", "diff", "1", "2"), "- tag:app → tag:web: tcp, udp 80", "+ tag:app → tag:web: tcp, udp 443")
	containsAll(t, "diff with what is in force", s.ok("policy", "diff", file), "+ tag:app → tag:web: tcp, udp 80")
	if got := s.ok("policy", "rollback", "1"); got != "policy version 3 is in force, with the text of version 1\n" {
		t.Errorf("rollback: %q", got)
	}
	s.fails([]string{"policy", "rollback", "1", "--expect", "2"}, "its version is 3 by now, not 2")
	s.fails([]string{"policy", "rollback", "9"}, "policy version 9: not found")
	if got := s.ok("policy", "get"); got != toolPolicy {
		t.Errorf("after the rollback: %q", got)
	}
	if got := s.ok("policy", "get", "--version", "2"); got != edited {
		t.Errorf("version 2: %q", got)
	}
	containsAll(t, "history", s.ok("policy", "history"), "in force, rollback to version 1", "local admin")
	if h := decode[[]admin.Policy](t, s.ok("policy", "history", "--json")); len(h) != 3 || h[0].Version != 3 || h[0].Note != "rollback to version 1" {
		t.Errorf("history --json: %+v", h)
	} else if runtime.GOOS == "linux" && !strings.HasPrefix(h[0].Author, "local admin ") {
		t.Errorf("set by %q, want the name of the user", h[0].Author)
	}
	if got := s.ok("policy", "check", "--live", file); got != file+" is valid\n" {
		t.Errorf("check --live: %q", got)
	}

	containsAll(t, "grant", s.ok("grant", "add", "--src", "alice@example.com", "--dst", "tag:web:443", "--proto", "tcp", "--for", "1h", "--reason", "repair"),
		"grant 1: alice@example.com may reach tag:web:443 tcp until ")
	s.fails([]string{"grant", "add", "--src", "tag:nobody", "--dst", "tag:web:443", "--for", "1h"}, `undefined tag "tag:nobody"`)
	containsAll(t, "explanation", s.ok("policy", "explain", "--from", "alice@example.com", "--to", "tag:web:443"),
		"allowed\n  by temp[1]: ", "which ends in ", ": repair\n", "as of policy version 3")
	containsAll(t, "grants", s.ok("grant", "list"), "alice@example.com may reach tag:web:443 tcp", "repair")
	containsAll(t, "history", s.ok("policy", "history"), "beside it are grants for a time, 1")
	if g := decode[[]admin.Grant](t, s.ok("grant", "list", "--json")); len(g) != 1 || g[0].ID != 1 || g[0].Reason != "repair" {
		t.Errorf("grant list --json: %+v", g)
	}
	containsAll(t, "revoke", s.ok("grant", "revoke", "1"), "grant 1 is over")
	s.fails([]string{"grant", "revoke", "1"}, "it has ended already (revoked)")
	containsAll(t, "all grants", s.ok("grant", "list", "--all"), "revoked just now")
	containsAll(t, "explanation", s.ok("policy", "explain", "--from", "alice@example.com", "--to", "tag:web:443"), "denied")

	s.fails([]string{"policy", "shadow", "report"}, "there is no candidate")
	s.fails([]string{"policy", "shadow", "get"}, "there is no candidate")
	s.fails([]string{"policy", "shadow", "set", writeFile(t, `{"acl": []}`)}, `:1:2: unknown member "acl"`)
	s.ok("policy", "shadow", "set", writeFile(t, edited))
	if got := s.ok("policy", "shadow", "get"); got != edited {
		t.Errorf("candidate: %q", got)
	}
	containsAll(t, "report", s.ok("policy", "shadow", "report"), "0 attempts since ")
	if r := decode[admin.ShadowReport](t, s.ok("policy", "shadow", "report", "--json")); r.Pairs == nil || r.Since.IsZero() {
		t.Errorf("report --json: %+v", r)
	}
	s.ok("policy", "shadow", "clear")

	topology := filepath.Join(t.TempDir(), "live.json")
	if err := os.WriteFile(topology, []byte(s.ok("policy", "topology")), 0o600); err != nil {
		t.Fatal(err)
	}
	s.ok("policy", "compile", "--topology", topology, file)

	containsAll(t, "audit", s.ok("audit", "--since", "1h"), "policy.set", "grant.add", "grant.end", "policy.shadow.set", "policy.shadow.clear", "local admin", "repair")
	var entries []admin.AuditEntry
	if err := json.Unmarshal([]byte(s.ok("audit", "--json")), &entries); err != nil || len(entries) != 9 {
		t.Errorf("audit --json: %d entries, %v", len(entries), err)
	}
	if got := s.ok("audit", "--json", "--since", "1ns"); got != "[]\n" {
		t.Errorf("audit of nothing: %q", got)
	}
}
