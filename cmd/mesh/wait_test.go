package main

import (
	"strings"
	"testing"
)

// Who withdraws something with --wait hears when it is in force everywhere.
func TestWait(t *testing.T) {
	s := startServer(t, "--policy", writeFile(t, ownersPolicy))
	s.ok("user", "create", "alice")
	key := func(args ...string) string {
		return strings.TrimSpace(s.ok(append([]string{"key", "create"}, args...)...))
	}
	web := s.agent("web", key("--tag", "tag:web"))
	reusable := key("--tag", "tag:app", "--reusable")
	app := s.agent("app", reusable)
	s.agent("app2", reusable)
	mine := s.agent("mine", key("--user", "alice"))
	for name, n := range map[string]interface{ Close() error }{"web": web, "app": app, "mine": mine} {
		_ = n
		s.until(name+" to be online", func(out string) bool {
			for _, line := range strings.Split(out, "\n") {
				if strings.HasPrefix(line, name+" ") && strings.Contains(line, "online") {
					return true
				}
			}
			return false
		}, "node", "list")
	}
	containsAll(t, "node remove --wait", s.ok("node", "remove", "app", "--wait"), "node app removed\n", "in force at 1 peer, the slowest after", ": web\n")
	containsAll(t, "key revoke --nodes", s.ok("key", "revoke", "2", "--nodes", "--wait"), "key 2 revoked, and 1 node removed: app2\n", "in force at 1 peer")
	containsAll(t, "user suspend", s.ok("user", "suspend", "alice", "--wait"), "user alice suspended, with 1 node\n", "no connected peer had to hear of it")
	containsAll(t, "user list", s.ok("user", "list"), "suspended just now")
	containsAll(t, "user resume", s.ok("user", "resume", "alice"), "user alice is active, with 1 node\n")
	containsAll(t, "node expire --wait", s.ok("node", "expire", "mine", "--wait"), "no connected peer")
	s.fails([]string{"user", "suspend", "bob"}, `user "bob": not found`)
	if r := s.run("key", "revoke", "1", "--wait"); r.code != exitUsage {
		t.Errorf("--wait for a key alone: %+v", r)
	}
}
