package server

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"mesh/control/admin"
	"mesh/control/store"
	"mesh/control/wire"
)

// mark changes something that everybody hears of, and returns how many messages
// each node got up to that one, which counts.
func (w *world) mark(region int, nodes ...*netmap) (messages []int) {
	w.t.Helper()
	before := make([]int, len(nodes))
	for i, n := range nodes {
		before[i] = n.count
	}
	// Twice, since the first may overtake what is on its way.
	for _, id := range []int{region, region + 1000} {
		w.s.SetDERPMap(&wire.DERPMap{Regions: map[int]*wire.DERPRegion{id: {RegionID: id, Nodes: []*wire.DERPNode{{Name: "x", RegionID: id, HostName: "127.0.0.1"}}}}})
		for _, n := range nodes {
			n.until(w.t, "the mark", func() bool { return n.derp.Regions[id] != nil })
		}
	}
	for i, n := range nodes {
		messages = append(messages, n.count-before[i]-1)
	}
	return messages
}

// A policy edit is heard by those whose filter, peers, routes or attributes
// change. Nobody else gets a byte.
func TestEditWakesOnlyWhomItConcerns(t *testing.T) {
	w := newWorld(t, nil)
	text := func(port int, extra string) string {
		return fmt.Sprintf(`{%s, "groups": {"group:ops": [%s]}, "acls": [
			{"action":"accept","src":["tag:a"],"dst":["tag:b:%d"]},
			{"action":"accept","src":["tag:c"],"dst":["tag:c:22"]},
			{"action":"accept","src":["group:ops"],"dst":["tag:c:23"]}]}`, owners, extra, port)
	}
	w.setPolicy(text(80, ""))
	alice := w.user("alice")
	na, nb, nc := w.tagged("tag:a", "a").poll(nil), w.tagged("tag:b", "b").poll(nil), w.tagged("tag:c", "c").poll(nil)
	nc2 := w.tagged("tag:c", "c2").poll(nil)
	nd := w.machine().join(w.key(store.Key{User: alice.ID})).poll(nil)
	nc.until(t, "its peer", func() bool { return len(nc.peers) == 1 })
	w.mark(1, na, nb, nc, nc2, nd)

	for i, test := range []struct {
		policy string
		want   []int // messages to a, b, c, c2, d, the mark included
	}{
		{text(443, ""), []int{1, 2, 1, 1, 1}},                                 // a port: the receiver only
		{text(443, "") + "\n// a comment", []int{1, 1, 1, 1, 1}},              // no meaning
		{"\n\n" + text(443, ""), []int{1, 1, 1, 1, 1}},                        // other lines
		{text(443, `"bob@example.com"`), []int{1, 1, 1, 1, 1}},                // a group that concerns nobody here
		{strings.Replace(text(443, ""), "22", "24", 1), []int{1, 1, 2, 2, 1}}, // those of tag:c
	} {
		w.setPolicy(test.policy)
		if got := w.mark(i+2, na, nb, nc, nc2, nd); fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("edit %d: messages %v, want %v", i, got, test.want)
		}
	}
	// Alice joins the group: she sees tag:c, tag:c sees her and her groups, and
	// a and b hear nothing.
	w.setPolicy(text(443, `"alice@"`))
	got := w.mark(100, na, nb)
	if fmt.Sprint(got) != "[1 1]" {
		t.Errorf("the others got %v messages", got)
	}
	nd.until(t, "tag:c", func() bool { return len(nd.peers) == 2 })
	nc.until(t, "alice in her group", func() bool { return fmt.Sprint(nc.users[alice.ID].Groups) == "[group:ops]" })
	nd.until(t, "her own group", func() bool { return fmt.Sprint(nd.users[alice.ID].Groups) == "[group:ops]" })
}

// Allowed and denied in turn, what counts in the end is the last (negative test
// 60).
func TestPolicyBackAndForth(t *testing.T) {
	w := newWorld(t, nil)
	const wide, narrow = `{` + owners + `,"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:*"]}]}`, `{` + owners + `,"acls":[]}`
	w.setPolicy(narrow)
	nb := w.tagged("tag:b", "b").poll(nil)
	w.tagged("tag:a", "a")
	for range 100 {
		w.setPolicy(wide)
		w.setPolicy(narrow)
	}
	w.mark(5, nb)
	if len(nb.filter)+len(nb.peers) != 0 {
		t.Errorf("after the last policy: filter %v, peers %v", nb.filter, nb.peers)
	}
}

// Every version is kept, edits that cross are noticed, and an old version comes
// back as a new one, after the same checks.
func TestPolicyVersions(t *testing.T) {
	w := newWorld(t, nil)
	c := w.admin()
	ctx := t.Context()
	set := func(text string, expect int64) (admin.Policy, error) {
		return c.SetPolicy(ctx, admin.PolicySet{Text: text, Replaces: &expect})
	}
	const open = `{"tagOwners":{"tag:a":[],"tag:b":[]},"acls":[{"action":"accept","src":["tag:a"],"dst":["tag:b:80"]}]}`
	const tested = `{"tagOwners":{"tag:a":[],"tag:b":[]},"acls":[],"tests":[{"src":"tag:a","deny":["tag:b:80"]}]}`
	must[admin.Policy](t)(set(open, 0))
	must[admin.Policy](t)(set(tested, 1))
	if _, err := set(open, 1); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("an edit of version 1 over version 2: %v", err)
	}
	failing := strings.Replace(open, `}]}`, `}],"tests":[{"src":"tag:a","deny":["tag:b:80"]}]}`, 1)
	if _, err := set(failing, 2); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "tests[0]") {
		t.Errorf("a policy whose tests fail: %v", err)
	}
	two := int64(2)
	p := must[admin.Policy](t)(c.RollbackPolicy(ctx, admin.PolicyRollback{Version: 1, Replaces: &two}))
	if p.Version != 3 || p.Text != open || p.Note != "rollback to version 1" {
		t.Errorf("rolled back: %+v", p)
	}
	if _, err := c.RollbackPolicy(ctx, admin.PolicyRollback{Version: 1, Replaces: &two}); !errors.Is(err, admin.ErrConflict) {
		t.Errorf("a rollback that crossed: %v", err)
	}
	if _, err := c.RollbackPolicy(ctx, admin.PolicyRollback{Version: 9}); !errors.Is(err, admin.ErrNotFound) {
		t.Errorf("a rollback to nowhere: %v", err)
	}
	if p := must[admin.Policy](t)(c.PolicyVersion(ctx, 2)); p.Text != tested || p.Version != 2 {
		t.Errorf("version 2: %+v", p)
	}
	history := must[[]admin.Policy](t)(c.PolicyHistory(ctx))
	if len(history) != 3 || history[0].Version != 3 || history[2].Version != 1 || history[0].Author == "" || history[0].Text != "" {
		t.Errorf("history: %+v", history)
	}
	// One that would leave nobody anybody needs to be meant (negative test 34).
	w.tagged("tag:a", "a")
	w.tagged("tag:b", "b")
	if _, err := c.SetPolicy(ctx, admin.PolicySet{Text: tested, Guard: true}); !errors.Is(err, admin.ErrInvalid) || !strings.Contains(err.Error(), "nobody could reach anybody") {
		t.Errorf("a policy that cuts everything: %v", err)
	}
	if p := must[admin.Policy](t)(c.SetPolicy(ctx, admin.PolicySet{Text: tested})); p.Version != 4 {
		t.Errorf("meant so: %+v", p)
	}
	must[admin.Policy](t)(c.SetPolicy(ctx, admin.PolicySet{Text: tested + "\n", Guard: true})) // no worse than before
}
