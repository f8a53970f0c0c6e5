package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAuditVerify(t *testing.T) {
	s := startServer(t).shell
	s.ok("user", "create", "alice")
	got := s.ok("audit", "verify")
	containsAll(t, "verify", got, "1 entries: none was edited", "head    1:")
	head := strings.TrimSpace(got[strings.Index(got, "1:"):])
	s.ok("user", "create", "bob")
	containsAll(t, "verify with anchor", s.ok("audit", "verify", "--anchor", head), "2 entries", "anchor  "+head, "head    2:")

	// What was exported verifies too, and not if it was touched.
	file := filepath.Join(t.TempDir(), "audit.json")
	text := s.ok("audit", "--json")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(text)
	containsAll(t, "verify a file", s.ok("audit", "verify", "--file", file, "--anchor", head), "2 entries", "anchor")
	write(strings.Replace(text, "alice", "mallory", 1))
	if r := s.run("audit", "verify", "--file", file); r.code != exitFail || !strings.Contains(r.stderr, "entry 1 was edited") {
		t.Errorf("an edited file: %+v", r)
	}
	if r := s.run("audit", "verify", "--anchor", "1:"+strings.Repeat("0", 64)); r.code != exitFail || !strings.Contains(r.stderr, "not the one that the anchor names") {
		t.Errorf("a wrong anchor: %+v", r)
	}
	if r := s.run("audit", "verify", "--anchor", "x"); r.code != exitUsage {
		t.Errorf("no anchor at all: %+v", r)
	}
}
