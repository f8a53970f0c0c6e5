package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/meshtest"
)

// grantPolicy lets clients use port 2000; all else takes a grant.
const grantPolicy = `{
	"tagOwners": {"tag:client": [], "tag:server": []},
	"acls": [{"action": "accept", "src": ["tag:client"], "dst": ["tag:server:2000"]}]}`

// The end of a grant cuts, at both ends, what it alone allowed, and nothing
// else: when its time is over, when it is revoked, and when the server was
// restarted in between.
func TestEndOfGrantCutsConnections(t *testing.T) {
	for _, tc := range []struct {
		name string
		life time.Duration
		end  func(t *testing.T, m *meshtest.Mesh, g admin.Grant)
	}{
		{"revoked", time.Hour, func(t *testing.T, m *meshtest.Mesh, g admin.Grant) {
			if _, err := m.Admin.RevokeGrant(t.Context(), g.ID); err != nil {
				t.Error(err)
			}
		}},
		// It waits for the time itself, which is counted from then on.
		{"over", 8 * time.Second, func(_ *testing.T, _ *meshtest.Mesh, g admin.Grant) { time.Sleep(time.Until(g.Until)) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := meshtest.Start(t, grantPolicy)
			client, server := m.Node("client", []string{"tag:client"}), m.Node("server", []string{"tag:server"})
			meshtest.Up(t, client, server)
			know(t, client, server)
			other := open(t, client, server, "2000")
			g, err := m.Admin.AddGrant(t.Context(), admin.GrantAdd{
				Src: []string{"client"}, Dst: []string{"tag:server"}, IP: []string{"tcp:1000", "udp:1000"}, For: tc.life, Reason: "test",
			})
			if err != nil {
				t.Fatal(err)
			}
			meshtest.Until(t, "the grant to be in force", func() bool {
				// Refused by the stack, since nobody listens, and not by policy.
				c, err := client.Dial(t.Context(), "tcp4", "server:1000")
				if err == nil {
					c.Close()
				}
				return err != nil && !errors.Is(err, mesh.ErrDenied)
			})
			f := open(t, client, server, "1000")
			if p, ok := mesh.PeerOf(f.accepted["tcp4"]); !ok || p.Rule.Name != fmt.Sprintf("temp[%d]", g.ID) {
				t.Errorf("admitted by %+v", p.Rule)
			}
			for name, err := range f.ended(t, func() { tc.end(t, m, g) }) {
				if !errors.Is(err, mesh.ErrRevoked) || !strings.Contains(err.Error(), "no longer allows it") {
					t.Errorf("%s: %v", name, err)
				}
			}
			if _, err := client.Dial(t.Context(), "tcp4", "server:1000"); !errors.Is(err, mesh.ErrDenied) {
				t.Errorf("dial after the end: %v", err)
			}
			for _, network := range []string{"tcp4", "tcp6"} {
				if err := exchange(other.dialled[network], other.accepted[network], 1<<16); err != nil {
					t.Errorf("what the policy allows: %s: %v", network, err)
				}
			}
			for _, network := range []string{"udp4", "udp6"} {
				if _, err := other.dialled[network].Write([]byte("x")); err != nil {
					t.Errorf("what the policy allows: %s: %v", network, err)
				}
			}
		})
	}
}

// A candidate beside the policy hears of what nodes really try.
func TestShadowReport(t *testing.T) {
	m := meshtest.Start(t, grantPolicy)
	client, server := m.Node("client", []string{"tag:client"}), m.Node("server", []string{"tag:server"})
	meshtest.Up(t, client, server)
	know(t, client, server)
	if _, err := m.Admin.SetShadow(t.Context(), strings.Replace(grantPolicy, "2000", "3000", 1)); err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen("tcp", ":2000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var report admin.ShadowReport
	meshtest.Until(t, "the report", func() bool {
		if c, err := client.Dial(t.Context(), "tcp", "server:2000"); err == nil {
			c.Close()
		} else {
			t.Error(err) // the candidate decides nothing
		}
		if _, err := client.Dial(t.Context(), "tcp", "server:3000"); !errors.Is(err, mesh.ErrDenied) {
			t.Errorf("port 3000: %v", err)
		}
		time.Sleep(50 * time.Millisecond) // each report covers some
		report, err = m.Admin.ShadowReport(t.Context())
		return err == nil && len(report.Pairs) == 2
	})
	for i, want := range []admin.ShadowPair{{Port: 2000}, {Port: 3000, Allowed: true}} {
		p := report.Pairs[i]
		if p.Src != "tag:client" || p.Dst != "tag:server" || p.Proto != 6 || p.Port != want.Port || p.Allowed != want.Allowed || p.Attempts == 0 || len(p.Rules) != 1 {
			t.Errorf("%d: %+v", i, p)
		}
	}
}
