package interop

import (
	"encoding/json"
	"reflect"
	"slices"
	"testing"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/meshtest"
)

// Each side sees names, users, tags and application capabilities of the other
// in its own WhoIs, and a stock node sees of a node of ours what it sees of a
// stock node in the same place.
func TestWhoIs(t *testing.T) {
	m := meshtest.Start(t, `{
		"tagOwners": {"tag:a": [], "tag:s": []},
		"groups": {"group:dev": ["ann@example.com"]},
		"grants": [
			{"src": ["group:dev"], "dst": ["*"], "ip": ["*"], "app": {"example.com/cap/tools": [{"role": "writer"}]}},
			{"src": ["tag:a", "tag:s"], "dst": ["*"], "ip": ["*"], "app": {"example.com/cap/level": [{"n": 1}, {"n": 2}]}},
		]}`)
	if _, err := m.Admin.CreateUser(t.Context(), "ann@example.com"); err != nil {
		t.Fatal(err)
	}
	laptop := stock(t, "laptop", m.Host.URL(), m.Key(admin.KeyCreate{User: "ann@example.com"}), nil)
	laptop.up()
	laptop.services()
	tagged := stockOf(t, m, "tagged", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, tagged, ours)

	type who struct {
		user string
		tags []string
		caps map[string]string
	}
	want := map[string]who{
		"laptop": {"ann@example.com", nil, map[string]string{"example.com/cap/tools": `[{"role":"writer"}]`}},
		"tagged": {"", []string{"tag:s"}, map[string]string{"example.com/cap/level": `[{"n":1},{"n":2}]`}},
		"agent":  {"", []string{"tag:a"}, map[string]string{"example.com/cap/level": `[{"n":1},{"n":2}]`}},
	}
	check := func(where, name string, id identity) {
		t.Helper()
		w := want[name]
		caps := make(map[string]string)
		for c, values := range id.Caps {
			b, _ := json.Marshal(values)
			caps[c] = string(b)
		}
		if label(id.Name) != name || !slices.Equal(id.Tags, w.tags) || !reflect.DeepEqual(caps, w.caps) {
			t.Errorf("%s: %s is %+v with %v, want %+v", where, name, id, caps, w)
		}
		// Stock nodes give tagged nodes a made-up user.
		if w.user != "" && id.User != w.user {
			t.Errorf("%s: %s belongs to %q, want %q", where, name, id.User, w.user)
		}
	}
	for _, to := range []member{laptop, tagged, ours} {
		for _, from := range []member{laptop, tagged, ours} {
			if from != to {
				check("the service of "+to.label(), from.label(), whoAmI(t, from, to, false))
				check("the service of "+to.label()+" over IPv6", from.label(), whoAmI(t, from, to, true))
			}
		}
	}
	check("WhoIs of laptop", "agent", laptop.whois(ours.at(false)))
	check("WhoIs of laptop", "tagged", laptop.whois(tagged.at(true)))
	if a, b := laptop.whois(ours.at(false)).User, laptop.whois(tagged.at(false)).User; a != b {
		t.Errorf("tagged nodes have users %q and %q", a, b)
	}

	// PeerOf at ours has more: the groups and the rule.
	ln := ours.listen(":81")
	accepted := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			p, ok := mesh.PeerOf(c)
			if !ok || p.User != "ann@example.com" || !slices.Equal(p.Groups, []string{"group:dev"}) || p.Rule.Name != "grants[0]" {
				t.Errorf("PeerOf: %+v, %v", p, ok)
			}
			c.Close()
		}
		accepted <- err
	}()
	t.Cleanup(func() { ln.Close() })
	laptop.do("open", map[string]any{"Name": "peerof", "Addr": port(ours, false, 81)}, nil)
	if err := <-accepted; err != nil {
		t.Error(err)
	}
}
