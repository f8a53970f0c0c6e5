package store

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"mesh/control/wire"
)

func TestGrants(t *testing.T) { onEach(t, testGrants) }

func testGrants(t *testing.T, open func() Store) {
	s := open()
	add := func(reason string, until time.Time) Grant {
		return must[Grant](t)(s.AddGrant(ctx, Grant{
			ID: 7, Src: []string{"alice@"}, Dst: []string{"100.64.0.1"}, IP: []string{"tcp:22"}, Asked: [3][]string{{"alice"}, {"db"}, {"tcp:22"}},
			Nodes: []wire.NodeID{3}, Reason: reason, Author: "admin", Created: start, Until: until, Ended: start,
		}, start))
	}
	a, b := add("repair", start.Add(time.Hour)), add("", start.Add(2*time.Hour))
	if a.ID != 1 || b.ID != 2 || !a.Ended.IsZero() {
		t.Fatalf("grants %+v, %+v", a, b)
	}
	s.Close()
	s = open()
	if got := must[[]Grant](t)(s.Grants(ctx, true, 10)); !reflect.DeepEqual(got, []Grant{a, b}) {
		t.Errorf("after a restart:\n got %+v\nwant %+v", got, []Grant{a, b})
	}
	ended := must[Grant](t)(s.EndGrant(ctx, "server", 1, "over", start.Add(time.Hour)))
	if ended.Why != "over" || ended.EndedBy != "server" || !ended.Ended.Equal(start.Add(time.Hour)) {
		t.Errorf("ended: %+v", ended)
	}
	if _, err := s.EndGrant(ctx, "admin", 1, "revoked", start); !errors.Is(err, ErrConflict) {
		t.Errorf("ended twice: %v", err)
	}
	if _, err := s.EndGrant(ctx, "admin", 9, "revoked", start); !errors.Is(err, ErrNotFound) {
		t.Errorf("no such grant: %v", err)
	}
	if got := must[[]Grant](t)(s.Grants(ctx, false, 10)); len(got) != 1 || got[0].ID != 2 {
		t.Errorf("in force: %+v", got)
	}
	if got := must[[]Grant](t)(s.Grants(ctx, true, 0)); len(got) != 1 {
		t.Errorf("with none of the past: %+v", got)
	}
	var log []string
	for _, e := range must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 100)) {
		log = append(log, e.Actor+" "+e.Action+" "+e.Object+" "+e.Detail)
	}
	want := []string{
		"admin grant.add 1 alice may reach db at tcp:22 until 2026-11-23T13:00:00Z: repair",
		"admin grant.add 2 alice may reach db at tcp:22 until 2026-11-23T14:00:00Z",
		"server grant.end 1 over: alice may reach db at tcp:22",
	}
	if !reflect.DeepEqual(log, want) {
		t.Errorf("on record %q, want %q", log, want)
	}
}

func TestPolicyVersionsAndShadow(t *testing.T) { onEach(t, testPolicyVersionsAndShadow) }

func testPolicyVersionsAndShadow(t *testing.T, open func() Store) {
	s := open()
	for i, text := range []string{"{}", `{"acls":[]}`, "{}"} {
		note := ""
		if i == 2 {
			note = "rollback to version 1"
		}
		must[Policy](t)(s.SetPolicy(ctx, "alice", text, note, -1, start))
	}
	if p := must[Policy](t)(s.PolicyVersion(ctx, 2)); p.Text != `{"acls":[]}` || p.Author != "alice" || !p.Created.Equal(start) {
		t.Errorf("version 2: %+v", p)
	}
	if _, err := s.PolicyVersion(ctx, 4); !errors.Is(err, ErrNotFound) {
		t.Errorf("version 4: %v", err)
	}
	list := must[[]Policy](t)(s.Policies(ctx, 2))
	if len(list) != 2 || list[0].Version != 3 || list[0].Note != "rollback to version 1" || list[0].Text != "" || list[1].Version != 2 {
		t.Errorf("versions: %+v", list)
	}
	if _, err := s.Shadow(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("no shadow: %v", err)
	}
	must[Policy](t)(s.SetShadow(ctx, "alice", "{}", start))
	must[Policy](t)(s.SetShadow(ctx, "bob", "{ }", start))
	if p := must[Policy](t)(s.Shadow(ctx)); p.Text != "{ }" || p.Author != "bob" {
		t.Errorf("shadow: %+v", p)
	}
	must[Policy](t)(s.SetShadow(ctx, "bob", "", start))
	if _, err := s.Shadow(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("cleared shadow: %v", err)
	}
}

func TestApprovedRoutes(t *testing.T) { onEach(t, testApprovedRoutes) }

func testApprovedRoutes(t *testing.T, open func() Store) {
	s := open()
	n := must[Node](t)(s.AdmitNode(ctx, "admin", testNode(1), start))
	routes := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::/0")}
	if err := s.ApproveRoutes(ctx, "admin", n.ID, routes, start); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open()
	if got := must[[]Node](t)(s.Nodes(ctx))[0].Routes; !reflect.DeepEqual(got, routes) {
		t.Errorf("routes %v, want %v", got, routes)
	}
	if err := s.ApproveRoutes(ctx, "admin", 99, nil, start); !errors.Is(err, ErrNotFound) {
		t.Errorf("of no node: %v", err)
	}
	log := must[[]AuditEntry](t)(s.Audit(ctx, time.Time{}, 0, 100))
	if e := log[len(log)-1]; e.Action != "node.routes" || e.After != "10.0.0.0/8 ::/0" {
		t.Errorf("on record %+v", e)
	}
}
