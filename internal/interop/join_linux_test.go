package interop

import (
	"net/netip"
	"slices"
	"testing"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/meshtest"
)

const openPolicy = `{"tagOwners": {"tag:a": [], "tag:s": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`

// stockOf starts a stock node with a one-time key for the tags on a mesh of
// ours, waits until it runs and starts its services.
func stockOf(t testing.TB, m *meshtest.Mesh, name string, tags []string, env []string, flags ...string) *stockNode {
	t.Helper()
	n := stock(t, name, m.Host.URL(), m.Key(admin.KeyCreate{Tags: tags}), env, flags...)
	n.up()
	n.services()
	return n
}

// A stock node joins our control server with an enrolment key, uses our relay
// and STUN, goes direct, and talks HTTP, TCP and UDP over both families with a
// node of ours and with another stock node, in both directions.
func TestStockJoinsWithKey(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, phone, ours)
	for _, six := range []bool{false, true} {
		talk(t, laptop, ours, six)
		talk(t, ours, laptop, six)
		talk(t, laptop, phone, six)
		talk(t, phone, laptop, six)
	}
	for _, pair := range [][2]member{{laptop, ours}, {ours, laptop}, {laptop, phone}} {
		until(t, pair[0].label()+" to go direct to "+pair[1].label(), func() bool {
			talk(t, pair[0], pair[1], false)
			return pair[0].pathTo(pair[1]) == "direct"
		})
	}
	// What STUN and relay told the stock node is what the server knows of it.
	n, err := m.Admin.Node(t.Context(), "laptop")
	if err != nil {
		t.Fatal(err)
	}
	if n.HomeRelay == 0 {
		t.Error("the stock node reports no home relay")
	}
	// Stock nodes have loopback among their endpoints only if STUN says so.
	if !slices.ContainsFunc(n.Endpoints, func(a netip.AddrPort) bool { return a.Addr().IsLoopback() }) {
		t.Errorf("no endpoint by STUN among %v", n.Endpoints)
	}
	if n.OS != "linux" || !n.Online || n.Ephemeral || !slices.Equal(n.Tags, []string{"tag:s"}) {
		t.Errorf("the stock node shows as %+v", n)
	}
}

// A key of a user makes nodes of that user.
func TestStockJoinsForUser(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	if _, err := m.Admin.CreateUser(t.Context(), "ann@example.com"); err != nil {
		t.Fatal(err)
	}
	key := func() string { return m.Key(admin.KeyCreate{User: "ann@example.com"}) }
	laptop := stock(t, "laptop", m.Host.URL(), key(), nil)
	laptop.up()
	laptop.services()
	ours := startAgent(t, m, "agent", nil, func(n *mesh.Node) { n.AuthKey = key() })
	know(t, laptop, ours)
	if id := whoAmI(t, laptop, ours, false); id.User != "ann@example.com" || len(id.Tags) != 0 {
		t.Errorf("ours took the stock node for %+v", id)
	}
	if id := whoAmI(t, ours, laptop, false); id.User != "ann@example.com" || len(id.Tags) != 0 {
		t.Errorf("the stock node took ours for %+v", id)
	}
	st := laptop.status()
	if u := st.User[userKey(st.Self.UserID)]; u.LoginName != "ann@example.com" {
		t.Errorf("the stock node believes to belong to %+v", u)
	}
}

// An ephemeral stock node is forgotten when it leaves.
func TestStockEphemeral(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	brief := stock(t, "brief", m.Host.URL(), m.Key(admin.KeyCreate{Tags: []string{"tag:s"}, Ephemeral: true}), nil, "-ephemeral")
	brief.up()
	brief.services()
	know(t, brief, ours)
	talk(t, ours, brief, false)
	brief.stop()
	until(t, "the ephemeral node to be forgotten", func() bool {
		_, seen := ours.peer("brief")
		nodes, err := m.Admin.Nodes(t.Context())
		return err == nil && len(nodes) == 1 && !seen
	})
}

// Keys that are no good are refused with a reason that the stock node shows.
func TestStockRefusedKeys(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	revoked, err := m.Admin.CreateKey(t.Context(), admin.KeyCreate{Tags: []string{"tag:s"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Admin.RevokeKey(t.Context(), revoked.ID); err != nil {
		t.Fatal(err)
	}
	once := m.Key(admin.KeyCreate{Tags: []string{"tag:s"}})
	first := stock(t, "first", m.Host.URL(), once, nil)
	first.up()
	for name, c := range map[string]struct {
		key  string
		want error
	}{
		"revoked": {revoked.Secret, mesh.ErrAuthKeyRevoked},
		"used":    {once, mesh.ErrAuthKeyUsed},
		"unknown": {"mesh-auth-nonsense", mesh.ErrAuthKeyUnknown},
	} {
		s := stock(t, "refused-"+name, m.Host.URL(), c.key, nil)
		err := s.try("up", nil, nil)
		if err == nil || !contains(err, c.want) {
			t.Errorf("%s key: the stock node says %v, want %q", name, err, c.want)
		}
	}
}
