package main

import (
	"strings"
	"testing"
)

func TestHelp(t *testing.T) {
	s := newShell(t)
	overview := s.ok("help")
	for _, args := range [][]string{{"-h"}, {"--help"}, {"help", "-h"}} {
		if got := s.ok(args...); got != overview {
			t.Errorf("mesh %q: %q", args, got)
		}
	}
	if r := s.run(); r.code != exitUsage || r.stdout != "" || r.stderr != overview {
		t.Errorf("mesh: %+v", r)
	}
	for _, cmd := range commands() {
		if !strings.Contains(overview, "  "+cmd.name) {
			t.Errorf("the overview lacks %q", cmd.name)
		}
		words := strings.Fields(cmd.name)
		got := s.ok(append([]string{"help"}, words...)...)
		if !strings.Contains(got, "Usage: mesh "+cmd.name) {
			t.Errorf("help %s: %q", cmd.name, got)
		}
		for _, flag := range []string{"-h", "--help"} {
			if h := s.ok(append(words, flag)...); h != got {
				t.Errorf("%s %s: %q", cmd.name, flag, h)
			}
		}
		for _, line := range strings.Split(got, "\n") {
			if len([]rune(line)) > 92 {
				t.Errorf("help %s has a line of %d characters: %q", cmd.name, len([]rune(line)), line)
			}
		}
	}
	for _, word := range []string{"key", "user", "node", "policy", "grant"} {
		if got := s.ok("help", word); got != s.ok(word, "--help") || !strings.Contains(got, "  "+word+" ") {
			t.Errorf("help %s: %q", word, got)
		}
	}
}

func TestWrongUse(t *testing.T) {
	s := newShell(t)
	for _, test := range []struct {
		args string
		want string
	}{
		{"frobnicate", `unknown command "frobnicate"`},
		{"help frobnicate", `unknown command "frobnicate"`},
		{"serve --database mysql://x@y/z", "want postgres://USER@HOST/NAME"},
		{"key", "mesh key: what to do with it is missing or unknown"},
		{"node move a", "mesh node: what to do with it is missing or unknown"},
		{"node show", "mesh node show: missing argument: NAME"},
		{"node rename a", "give the new name, or --reset"},
		{"node rename a b --reset", "give the new name, or --reset"},
		{"node rename a b c", `unexpected argument "c"`},
		{"node tag a", "give tags, or --user, and not both"},
		{"node tag a tag:b --user c", "give tags, or --user, and not both"},
		{"node tag a b", `tag "b": want "tag:NAME"`},
		{"node expire a --in 1h --never", "give one of --at, --in and --never"},
		{"node expire a --in soon", "want a time like 90m"},
		{"node expire a --at 10", "want a time like 2027-01-31"},
		{"node expire a --never=false", "takes no value"},
		{"node approve x", "give --user or --tag"},
		{"node approve x --user a --tag tag:b", "give --user or --tag, and not both"},
		{"node reject", "missing argument: CODE"},
		{"key create --user a --node-expiry soon", "want a time like"},
		{"key create --relay --node-expiry 1h", "a relay key has no user"},
		{"node list x", `mesh node list: unexpected argument "x"`},
		{"relay x", `mesh relay: unexpected argument "x"`},
		{"user list --color", "mesh user list: flag provided but not defined: -color"},
		{"policy compile x", "give --topology"},
		{"policy compile --topology - -", "cannot both be standard input"},
		{"policy explain --from a", "give --from and --to"},
		{"policy explain --from a --to b", `"b": want NAME:PORT`},
		{"policy explain --from a --to b:http", "want a port between 0 and 65535"},
		{"policy explain --from a --to fd7a::1:22", "brackets around an IPv6 address"},
		{"policy explain --from a --to b:1 --proto x", `--proto "x": want tcp`},
		{"policy rollback x", `"x": want the number of a version`},
		{"policy get --version -1", "versions count from 1"},
		{"policy check f --live --topology t", "give --topology or --live, and not both"},
		{"policy shadow", "mesh policy: what to do with it is missing or unknown"},
		{"grant add --src a --dst b:1", "give --for"},
		{"grant add --dst b:1 --for 1h", "give --src and --dst"},
		{"grant add --src a --dst b --for 1h", `"b": want NAME:PORT`},
		{"grant add --src a --dst b:1 --dst c:2 --for 1h", "need the same ports"},
		{"grant add --src a --dst b:1 --for soon", "want a time like"},
		{"grant revoke x", `"x": want the number of a grant`},
		{"node routes a --approve 10.0.0.1/8", "want a network such as"},
		{"audit --since -1h", "--since: want a time such as 1h"},
		{"key create", "give --user or --tag"},
		{"key create --user a --tag tag:b", "give --user or --tag, and not both"},
		{"key create --tag db", `want "tag:NAME"`},
		{"key create --tag tag:db --expires soon", "want a time like"},
		{"key create --tag tag:db --expires -1h", "want a time like"},
		{"key create --relay --user a", "a relay key has no user"},
		{"key revoke mesh-auth-1-hush", "want the number of a key"},
		{"relay --region 70000", "--region: want a number between 1 and 65535"},
		{"serve --tls-cert a", "--tls-cert and --tls-key need each other"},
		{"status --data a --control http://127.0.0.1:1", "give one of the two"},
	} {
		r := s.run(strings.Fields(test.args)...)
		if r.code != exitUsage || r.stdout != "" || !strings.Contains(r.stderr, test.want) || !strings.Contains(r.stderr, "\nUsage: mesh") {
			t.Errorf("mesh %s: %+v; want status 2, %q and the usage on stderr", test.args, r, test.want)
		}
		if strings.Contains(r.stderr, "hush") {
			t.Errorf("mesh %s repeats what may be a secret: %q", test.args, r.stderr)
		}
	}
}

// What fails says so in one line.
func TestFailures(t *testing.T) {
	s := newShell(t)
	for _, test := range []struct {
		args string
		want string
	}{
		{"user list", "mesh user list: no server answers at"},
		{"status", "is `mesh serve` running with this --data directory?"},
		{"serve --database postgres://127.0.0.1:1/x --listen 127.0.0.1:0", "database cannot be reached"},
		{"serve --listen nonsense", "mesh serve: listen for nodes: "},
		{"serve --listen 0.0.0.0:0 --stun off", "give --url"},
		{"serve --url ftp://x --listen 127.0.0.1:0 --stun off", `URL "ftp://x": want http://`},
		{"serve --policy /does/not/exist --listen 127.0.0.1:0 --stun off", "policy: open /does/not/exist"},
		{"serve --tls-cert /nope --tls-key /nope --listen 127.0.0.1:0 --stun off", "/nope"},
		{"policy check /does/not/exist", "open /does/not/exist"},
		{"relay", "give --control or set MESH_CONTROL_URL"},
		{"relay --control http://127.0.0.1:1", "set MESH_RELAY_KEY or give --key-file"},
		{"relay --control http://127.0.0.1:1 --key-file /nope", "/nope"},
		{"relay --control http://127.0.0.1:1 --control-key x", "--control-key: "},
		{"status --control http://127.0.0.1:1", "set MESH_AUTHKEY"},
	} {
		s.fails(strings.Fields(test.args), test.want)
	}
	s = newShell(t, "MESH_AUTHKEY=mesh-auth-1-verysecret")
	s.fails([]string{"status", "--control", "http://127.0.0.1:1"}, "control server unreachable", "connection refused")

	// Without a home there is no place for data by default.
	s.env = []string{"PATH=/bin"}
	s.fails([]string{"serve"}, "give --data")
}

// A policy is checked without a server, and errors look like a compiler's.
func TestPolicyCheck(t *testing.T) {
	s := newShell(t)
	good := writeFile(t, `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`)
	if got := s.ok("policy", "check", good); got != good+" is valid\n" {
		t.Errorf("valid: %q", got)
	}
	bad := writeFile(t, "{\n\t\"tagOwners\": {\"tag:a\": []},\n\t\"acl\": [],\n\t\"acls\": [{\"action\": \"accept\", \"src\": [\"tag:b\"], \"dst\": [\"tag:a:80\"]}],\n}\n")
	want := bad + `:3:2: unknown member "acl": did you mean "acls"?` + "\n" + bad + `:4:40: undefined tag "tag:b": did you mean "tag:a"?` + "\n"
	if r := s.run("policy", "check", bad); r.code != exitFail || r.stdout != "" || r.stderr != want {
		t.Errorf("invalid: %+v; want %q", r, want)
	}
	checkFailure(t, s.pipe("{", "policy", "check", "-"), []string{"policy", "check", "-"}, "<stdin>:1:2: ")
	s.fails([]string{"serve", "--data", shortDir(t), "--listen", "127.0.0.1:0", "--stun", "off", "--policy", bad},
		"policy "+bad+":3:2: unknown member", "(and 1 more: see `mesh policy check "+bad+"`)")
	big := writeFile(t, strings.Repeat(" ", 2<<20))
	s.fails([]string{"policy", "check", big}, "at most 1048576 bytes")
}
