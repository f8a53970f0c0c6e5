package main

import (
	"strings"
	"testing"
)

func TestPingWrongUse(t *testing.T) {
	s := newShell(t)
	for args, want := range map[string]string{
		"ping":                               "missing argument: NAME",
		"ping a b":                           `unexpected argument "b"`,
		"ping a --count 0":                   "--count: want a number",
		"status --data a --ping":             "give one of the two",
		"status --ping --data a --control x": "give one of the two",
	} {
		if r := s.run(strings.Fields(args)...); r.code != exitUsage || !strings.Contains(r.stderr, want) {
			t.Errorf("mesh %s: %+v", args, r)
		}
	}
	s.fails([]string{"ping", "a", "--control", "http://127.0.0.1:1"}, "set MESH_AUTHKEY")
}

// A user watches a path become direct.
func TestPing(t *testing.T) {
	s := startServer(t)
	s.ok("policy", "set", writeFile(t, testPolicy))
	s.agent("web", strings.TrimSpace(s.ok("key", "create", "--tag", "tag:web")))
	key := strings.TrimSpace(s.ok("key", "create", "--tag", "tag:app", "--reusable", "--ephemeral"))
	look := newShell(t, "MESH_CONTROL_URL="+s.url, "MESH_CONTROL_KEY="+s.key, "MESH_AUTHKEY="+key)

	lines := strings.Split(strings.TrimSpace(look.ok("ping", "web", "--until-direct", "--count", "60")), "\n")
	for i, l := range lines {
		if !strings.HasPrefix(l, "pong from web (100.64.0.1) via ") || !strings.HasSuffix(l, " ms") {
			t.Errorf("line %d: %q", i, l)
		}
		if direct := !strings.Contains(l, "via relay "); direct != (i == len(lines)-1) {
			t.Errorf("line %d of %d: %q", i, len(lines), l)
		}
	}
	r := decode[pingReport](t, look.ok("ping", "web.mesh.internal", "--json", "--until-direct", "--count", "60"))
	if r.Name != "web.mesh.internal" || !r.Direct || r.Sent < len(r.Pongs) || len(r.Pongs) == 0 || r.Pongs[len(r.Pongs)-1].Path != "direct" {
		t.Errorf("%+v", r)
	}
	look.fails([]string{"ping", "nobody"}, "unknown host")

	st := decode[nodeReport](t, look.ok("status", "--ping", "--json"))
	if len(st.Peers) != 1 || st.Peers[0].Path == "" || st.Peers[0].LatencyMS == 0 || st.Peers[0].Since.IsZero() {
		t.Errorf("%+v", st)
	}
	if got := look.ok("status", "--ping"); !strings.Contains(got, "ROUND TRIP") || !strings.Contains(got, " ms") {
		t.Errorf("status: %q", got)
	}
}
