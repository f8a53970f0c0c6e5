package interop

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/internal/meshtest"
)

// state waits until the stock node's backend is in a state.
func (n *stockNode) state(want string) {
	n.t.Helper()
	until(n.t, n.name+" to be "+want, func() bool { return n.status().BackendState == want })
}

// echoConn opens a connection of ours to the echo service of a member and sees
// to it that it works.
func echoConn(t testing.TB, from *agent, to member) net.Conn {
	t.Helper()
	c, err := from.Dial(t.Context(), "tcp", port(to, false, 7))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if sum, err := echoOver(c, 1000); err != nil || sum != sumOf(1000) {
		t.Fatalf("echo of %s: %v", to.label(), err)
	}
	return c
}

// cutOff waits for the end of a connection on which nothing comes.
func cutOff(t testing.TB, c net.Conn) error {
	t.Helper()
	c.SetDeadline(time.Now().Add(meshtest.Patience))
	_, err := c.Read(make([]byte, 1))
	if err == nil || timeout(err) {
		t.Fatalf("the connection is still open: %v", err)
	}
	return err
}

// keyForStock makes one-time keys for tag:s.
func keyForStock(m *meshtest.Mesh) string { return m.Key(admin.KeyCreate{Tags: []string{"tag:s"}}) }

// A stock node that logs in again gets another node key and stays the same node
// for everybody.
func TestStockRotatesItsKey(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, phone, ours)
	talk(t, laptop, ours, false)
	before := laptop.status().Self
	c := echoConn(t, ours, laptop)

	laptop.do("login", map[string]any{"AuthKey": keyForStock(m)}, nil)
	until(t, "the stock node to have another key", func() bool {
		st := laptop.status()
		return st.BackendState == "Running" && st.Self.PublicKey != before.PublicKey
	})
	now := laptop.status().Self
	if now.ID != before.ID || !slices.Equal(now.TailscaleIPs, before.TailscaleIPs) || now.DNSName != before.DNSName {
		t.Errorf("after the rotation it is %+v, before it was %+v", now, before)
	}
	for _, peer := range []member{ours, phone} {
		until(t, peer.label()+" to know the new key", func() bool {
			switch p := peer.(type) {
			case *agent:
				who, _ := p.peer("laptop")
				return who.Key.String() == now.PublicKey
			case *stockNode:
				who, _ := p.status().peer("laptop")
				return who.PublicKey == now.PublicKey
			}
			return false
		})
	}
	know(t, laptop, phone, ours)
	talk(t, laptop, ours, false)
	talk(t, ours, laptop, false)
	talk(t, phone, laptop, true)
	// What was open goes on under the new key.
	if sum, err := echoOver(c, 1000); err != nil || sum != sumOf(1000) {
		t.Errorf("the connection from before the rotation: %v", err)
	}
}

// A stock node that logs out is out for its peers, and back after a login.
func TestStockLogsOut(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	before := laptop.status().Self
	c := echoConn(t, ours, laptop)
	laptop.do("logout", nil, nil)
	laptop.state("NeedsLogin")
	t.Logf("the connection ended with: %v", cutOff(t, c))
	n, err := m.Admin.Node(t.Context(), "laptop")
	if err != nil || !n.Expired {
		t.Errorf("after the logout the server has %+v, %v", n, err)
	}
	if _, err := ours.fetch("http://"+port(laptop, false, 80)+"/whois", 0); err == nil {
		t.Error("the node that logged out was reached")
	}
	laptop.do("login", map[string]any{"AuthKey": keyForStock(m)}, nil)
	laptop.state("Running")
	know(t, laptop, ours)
	if now := laptop.status().Self; !slices.Equal(now.TailscaleIPs, before.TailscaleIPs) || now.ID != before.ID {
		t.Logf("it is another node now: %v, was %v", now.TailscaleIPs, before.TailscaleIPs)
		laptop.up()
	}
	whoAmI(t, ours, laptop, false)
	whoAmI(t, laptop, ours, false)
}

// approve lets in the machine of a stock node, which shows a login URL.
func (n *stockNode) approve(m *meshtest.Mesh, owner admin.NodeOwner) {
	n.t.Helper()
	var l admin.Login
	until(n.t, n.name+" to ask for a login", func() bool {
		logins, err := m.Admin.Logins(n.t.Context())
		i := slices.IndexFunc(logins, func(l admin.Login) bool { return l.Hostname == n.name })
		if err != nil || i < 0 {
			return false
		}
		l = logins[i]
		return true
	})
	until(n.t, n.name+" to show the login URL", func() bool { return n.said("login", l.URL) })
	if !strings.Contains(l.URL, l.Code) {
		n.t.Errorf("the login shows as %+v", l)
	}
	if _, err := m.Admin.ApproveLogin(n.t.Context(), l.Code, owner); err != nil {
		n.t.Fatal(err)
	}
}

// A stock node without a key asks for a login, and is in as soon as an
// administrator approves it: for a user, or with tags.
func TestStockJoinsByURL(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	if _, err := m.Admin.CreateUser(t.Context(), "ann@example.com"); err != nil {
		t.Fatal(err)
	}
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	for name, owner := range map[string]admin.NodeOwner{
		"laptop": {User: "ann@example.com"},
		"server": {Tags: []string{"tag:s"}},
	} {
		s := stock(t, name, m.Host.URL(), "", nil)
		s.do("start", nil, nil)
		s.approve(m, owner)
		s.up()
		s.services()
		know(t, s, ours)
		if id := whoAmI(t, s, ours, false); id.User != owner.User || !slices.Equal(id.Tags, owner.Tags) {
			t.Errorf("%s is %+v, want %+v", name, id, owner)
		}
		whoAmI(t, ours, s, true)
	}
}

// The key of a stock node expires. The node hears it, its peers cut it off, and
// it comes back as the same node, by an enrolment key or by a login URL.
func TestStockExpires(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"key", "URL"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			m := meshtest.Start(t, openPolicy)
			key := ""
			if by == "key" {
				key = keyForStock(m)
			}
			laptop := stock(t, "laptop", m.Host.URL(), key, nil)
			laptop.do("start", nil, nil)
			if by == "URL" {
				laptop.approve(m, admin.NodeOwner{Tags: []string{"tag:s"}})
			}
			laptop.up()
			laptop.services()
			ours := startAgent(t, m, "agent", []string{"tag:a"})
			know(t, laptop, ours)
			before := laptop.status().Self
			c := echoConn(t, ours, laptop)

			n, err := m.Admin.ExpireNode(t.Context(), "laptop", admin.NodeExpire{In: 3 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			until(t, "the stock node to know the hour", func() bool {
				e := laptop.status().Self.KeyExpiry
				return e != nil && e.Sub(n.Expires).Abs() < time.Second
			})
			laptop.state("NeedsLogin") // some ten seconds late
			t.Logf("the connection ended with: %v", cutOff(t, c))
			if _, err := ours.Dial(t.Context(), "tcp", port(laptop, false, 7)); err == nil {
				t.Error("a node with an expired key was reached")
			}

			if by == "key" {
				laptop.do("login", map[string]any{"AuthKey": keyForStock(m)}, nil)
			} else {
				laptop.do("login", nil, nil)
				laptop.approve(m, admin.NodeOwner{Tags: []string{"tag:s"}})
			}
			laptop.state("Running")
			know(t, laptop, ours)
			now := laptop.status().Self
			if now.ID != before.ID || !slices.Equal(now.TailscaleIPs, before.TailscaleIPs) || now.PublicKey == before.PublicKey {
				t.Errorf("it came back as %+v, was %+v", now, before)
			}
			// A stock client takes no handshake of a peer that it does not talk to
			// itself until ten seconds after it last heard of it: here, before its
			// key expired.
			until(t, "the stock node to answer again", func() bool {
				_, err := ours.fetch("http://"+port(laptop, false, 80)+"/whois", 0)
				return err == nil
			})
			talk(t, ours, laptop, false)
			talk(t, laptop, ours, true)
		})
	}
}

// A stock node that is removed hears it, and its peers cut it off, stock and
// ours.
func TestStockIsRemoved(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
	phone := stockOf(t, m, "phone", []string{"tag:s"}, nil)
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, phone, ours)
	c := echoConn(t, ours, laptop)
	laptop.do("open", map[string]any{"Name": "out", "Addr": port(ours, false, 7)}, nil)
	if err := m.Admin.RemoveNode(t.Context(), "laptop"); err != nil {
		t.Fatal(err)
	}
	if err := cutOff(t, c); !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("our connection ended with %v", err)
	}
	laptop.state("NeedsLogin")
	until(t, "peers to forget it", func() bool {
		_, here := phone.status().peer("laptop")
		_, there := ours.peer("laptop")
		return !here && !there
	})
	talk(t, phone, ours, false)
	// It may ask again.
	laptop.do("login", map[string]any{"AuthKey": keyForStock(m)}, nil)
	laptop.state("Running")
	laptop.up()
	know(t, laptop, phone, ours)
	whoAmI(t, laptop, ours, false)
}

// The stock nodes of a user who is suspended are cut off and reach nobody, and are
// back, as what they were, once that ends.
func TestStockUserIsSuspended(t *testing.T) {
	t.Parallel()
	m := meshtest.Start(t, openPolicy)
	if _, err := m.Admin.CreateUser(t.Context(), "ann@example.com"); err != nil {
		t.Fatal(err)
	}
	laptop := stock(t, "laptop", m.Host.URL(), m.Key(admin.KeyCreate{User: "ann@example.com"}), nil)
	laptop.up()
	laptop.services()
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	know(t, laptop, ours)
	before := laptop.status().Self
	c := echoConn(t, ours, laptop)
	if _, err := m.Admin.SuspendUser(t.Context(), "ann@example.com", 0); err != nil {
		t.Fatal(err)
	}
	if err := cutOff(t, c); !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("our connection ended with %v", err)
	}
	if _, err := ours.Dial(t.Context(), "tcp", port(laptop, false, 7)); err == nil {
		t.Error("a node of a suspended user was reached")
	}
	if _, err := m.Admin.ResumeUser(t.Context(), "ann@example.com"); err != nil {
		t.Fatal(err)
	}
	know(t, laptop, ours)                                    // it asks again within half a minute
	until(t, "the stock node to answer again", func() bool { // see TestStockExpires
		_, err := ours.fetch("http://"+port(laptop, false, 80)+"/whois", 0)
		return err == nil
	})
	talk(t, laptop, ours, true)
	if now := laptop.status().Self; now.ID != before.ID || now.PublicKey != before.PublicKey {
		t.Errorf("it came back as %+v, was %+v", now, before)
	}
}

// An ephemeral stock node that dies without a word is removed after a while.
func TestStockEphemeralDies(t *testing.T) {
	m := meshtest.Start(t, openPolicy, quickOffline, func(c *host.Config) { c.EphemeralTimeout = time.Second })
	ours := startAgent(t, m, "agent", []string{"tag:a"})
	brief := stock(t, "brief", m.Host.URL(), m.Key(admin.KeyCreate{Tags: []string{"tag:s"}, Ephemeral: true}), nil, "-ephemeral")
	brief.up()
	brief.services()
	know(t, brief, ours)
	whoAmI(t, ours, brief, false)
	brief.kill()
	until(t, "the dead node to be forgotten", func() bool {
		_, seen := ours.peer("brief")
		nodes, err := m.Admin.Nodes(t.Context())
		return err == nil && len(nodes) == 1 && !seen
	})
}

// A node of ours replaces its key while stock nodes talk to it: connections in
// either direction go on, and stock nodes begin new ones by the new key.
func TestOursReplacesItsKey(t *testing.T) {
	policy := func(expiry string) string {
		return `{
			"tagOwners": {"tag:a": [], "tag:s": []},
			"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
			"nodeAttrs": [{"target": ["tag:a"], "attr": ["key-expiry:` + expiry + `"]}],
		}`
	}
	for _, relayed := range []bool{false, true} {
		t.Run(map[bool]string{false: "direct", true: "by relay"}[relayed], func(t *testing.T) {
			m := meshtest.Start(t, policy("1h"))
			laptop := stockOf(t, m, "laptop", []string{"tag:s"}, nil)
			ours := startAgent(t, m, "agent", []string{"tag:a"}, func(n *mesh.Node) { n.RelayOnly = relayed })
			know(t, laptop, ours)
			talk(t, laptop, ours, false)
			c := echoConn(t, ours, laptop)
			for _, expiry := range []string{"3h", "10h"} {
				before := ours.Status().Self
				m.SetPolicy(policy(expiry))
				until(t, "our node to have another key", func() bool { return ours.Status().Self.Key != before.Key })
				now := ours.Status().Self
				until(t, "the stock node to know it", func() bool {
					p, _ := laptop.status().peer("agent")
					return p.PublicKey == now.Key.String()
				})
				begin := time.Now()
				if sum, err := echoOver(c, 1000); err != nil || sum != sumOf(1000) {
					t.Fatalf("the connection from before: %v", err)
				}
				t.Logf("an echo by the old connection took %v", time.Since(begin).Round(time.Millisecond))
				talk(t, laptop, ours, false)
				talk(t, ours, laptop, false)
				if now.ID != before.ID || now.Addresses[0] != before.Addresses[0] {
					t.Errorf("it is %v now, was %v", now, before)
				}
			}
		})
	}
}
