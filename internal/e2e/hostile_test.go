package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"mesh"
	"mesh/derp"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// The negative tests of the reliability goals that need a whole mesh, by their
// numbers. Of the others, E 65 is internal/tunnel TestInitiationFlood and
// TestInitiationCheck, E 66 TestReplayedInitiation, TestHistory and
// TestReplayedData there; F 71 is derp/relay TestAdmission, TestRevoke,
// TestRevokeDuringAdmission and TestRecheck, F 72 TestDuplicateKey and
// TestDuplicateSwitchesUnderLoad, F 73 TestFlood, F 74 TestSlowReader and
// TestHalfOpen, F 75 TestViolations, TestForgedKey and TestBadLogins there and
// TestClientProtocolErrors in derp, F 76 TestEvilRelay_F76 and
// internal/tunnel TestBadNetwork and TestSourceMismatch. F 77 has no place: there are no mesh keys.

// Goals of the control plane, by their numbers: 11 TestControlOutage,
// TestControlOutageInRealTime, internal/engine TestAnHourWithoutControl; 12
// TestRemovedNodeIsCutOff, TestNarrowedPolicyCutsConnections,
// TestSuspendedUserIsCutOff, TestBothEndsHearOfWithdrawal; 13 TestRemovedWhileCutOff,
// TestMaxStale, TestSilentControl, TestPeerKeyExpiresWithoutControl; 14
// TestRelayCutsRemovedNode_F71; 18 TestReconnectStorm_C36 of control/server and
// internal/loadtest; 19 TestOneTimeKeyRace, 20 TestPolicyReachesEveryNode there; 23
// TestKillLosesNothingAcknowledged, TestTornLog, TestFullDisk of control/store; 27
// TestClockLeaps_C40 of control/server, TestClockPutBack of internal/tunnel,
// TestExpiryByWhichClock of internal/netmap.

const narrowPolicy = `{
	"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
	"acls": [
		{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:1000"]},
		{"action": "accept", "src": ["tag:c"], "dst": ["tag:b:*"]},
	],
}`

// D 52: TCP that begins no connection, from a peer without a rule for it, is
// dropped and gets no answer, no RST either.
func TestStrayTCPGetsNoAnswer_D52(t *testing.T) {
	m := meshtest.Start(t, narrowPolicy)
	b := m.Node("b", []string{"tag:b"})
	meshtest.Up(t, b)
	l, err := b.Listen("tcp", ":22")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := newRaw(t, m, "a", []string{"tag:a"})
	a.knows("b")
	to := b.Status().Self.Addresses[0]
	send := func(flags byte, port uint16) {
		a.engine.Out([][]byte{packet(protoTCP, netip.AddrPortFrom(a.addr(), 5), netip.AddrPortFrom(to, port), flags, "")})
	}
	// A connection attempt is refused by name. The first one makes the tunnel,
	// in which nothing overtakes; the last is answered after all in between.
	refusedAt := func(port uint16) func() bool {
		return func() bool {
			_, refused := a.seen()
			for _, err := range refused {
				var denied *mesh.DeniedError
				if errors.As(err, &denied) && denied.Port == port {
					return true
				}
			}
			send(syn, port)
			return false
		}
	}
	meshtest.Until(t, "the first refusal", refusedAt(24))
	for _, flags := range []byte{ack, psh | ack, fin | ack, rst, rst | ack, fin, 0, syn | ack} {
		send(flags, 22) // listened on
		send(flags, 23)
	}
	meshtest.Until(t, "the last refusal", refusedAt(25))
	packets, refused := a.seen()
	if len(packets) != 0 {
		t.Errorf("%d packets came", len(packets))
	}
	for _, err := range refused {
		if !errors.Is(err, mesh.ErrDenied) || strings.Contains(err.Error(), "port 22") || strings.Contains(err.Error(), "port 23") {
			t.Error(err)
		}
	}
	// What a rule does allow gets an answer: the test could see one.
	meshtest.Until(t, "an RST from a port that is allowed and closed", func() bool {
		send(syn, 1000)
		packets, _ := a.seen()
		return len(packets) > 0 && packets[0][20+13]&rst != 0
	})
}

// D 54: a refusal comes within a round trip, is typed, and is the same whether
// or not anybody listens.
func TestDeniedDialSaysSo_D54(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			m := meshtest.Start(t, narrowPolicy)
			a, b, c := m.Node("a", []string{"tag:a"}, p.opt), m.Node("b", []string{"tag:b"}, p.opt), m.Node("c", []string{"tag:c"}, p.opt)
			meshtest.Up(t, a, b, c)
			know(t, a, b)
			know(t, b, c)
			l, err := b.Listen("tcp", ":2000")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			// A refusal that came only when the first packet is sent again,
			// after a second, would not let this end in time.
			ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
			defer cancel()
			for i := range 200 {
				port := 2000 + i%2
				_, err := a.Dial(ctx, "tcp", fmt.Sprintf("b:%d", port))
				var denied *mesh.DeniedError
				if !errors.As(err, &denied) || !errors.Is(err, mesh.ErrDenied) ||
					denied.Peer.ID != b.Status().Self.ID || int(denied.Port) != port || denied.Proto != "tcp" {
					t.Fatalf("dial port %d: %v", port, err)
				}
				want := fmt.Sprintf("dial tcp b:%d: b.mesh.internal refused tcp port %d: not allowed by policy (policy version %d)", port, port, b.Status().PolicyVersion)
				if err.Error() != want {
					t.Fatalf("got %q, want %q", err, want)
				}
			}
			// Nothing of it reached the listener: the first to come is c.
			go func() {
				if conn, err := c.Dial(ctx, "tcp", "b:2000"); err == nil {
					conn.Close()
				}
			}()
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if who, _ := mesh.PeerOf(conn); who.ShortName() != "c" {
				t.Errorf("%v was accepted", who)
			}
			// And who may not even be seen is not told apart from who is not.
			_, err1 := a.Dial(ctx, "tcp", "c:2000")
			_, err2 := a.Dial(ctx, "tcp", "x:2000")
			if !errors.Is(err1, mesh.ErrUnknownHost) || !errors.Is(err2, mesh.ErrUnknownHost) ||
				strings.ReplaceAll(err1.Error(), `"c"`, `"x"`) != strings.ReplaceAll(err2.Error(), "x:2000", "c:2000") {
				t.Errorf("an invisible peer: %v; nobody: %v", err1, err2)
			}
		})
	}
}

// D 55: a port that the policy allows and nobody listens on in the mesh is
// refused; it never leads to the host's loopback.
func TestHostLoopbackIsNotReached_D55(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a, b := pair(t, m, func(*mesh.Node) {}, "direct")
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	// The test's own call is the first and only one that the host sees.
	for _, where := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"} {
		host, err := net.Listen("tcp", where)
		if err != nil {
			t.Logf("%s: %v", where, err) // no IPv6 here
			continue
		}
		_, port, _ := net.SplitHostPort(host.Addr().String())
		dial := []string{"b:" + port, "b.mesh.internal:" + port, "a:" + port}
		for _, n := range []*mesh.Node{a, b} {
			for _, ip := range n.Status().Self.Addresses {
				dial = append(dial, net.JoinHostPort(ip.String(), port))
			}
		}
		for _, addr := range dial {
			if c, err := a.Dial(ctx, "tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: dial %s: %v", where, addr, err)
				if err == nil {
					c.Close()
				}
			}
		}
		for _, addr := range []string{"127.0.0.1:", "localhost:", "[::1]:", "[::ffff:127.0.0.1]:", "0.0.0.0:", "[::]:", "127.1:", "0x7f.1:", "2130706433:"} {
			if c, err := a.Dial(ctx, "tcp", addr+port); !errors.Is(err, mesh.ErrUnknownHost) {
				t.Errorf("%s: dial %s: %v", where, addr+port, err)
				if err == nil {
					c.Close()
				}
			}
		}
		probe, err := net.Dial("tcp", host.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		first, err := host.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if first.RemoteAddr().String() != probe.LocalAddr().String() {
			t.Errorf("%s: the host was called by %v", where, first.RemoteAddr())
		}
		first.Close()
		probe.Close()
		host.Close()
	}
}

// D 56: packets from an address that is not the sender's own are dropped.
func TestSpoofedSourceIsDropped_D56(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	other := m.Node("other", []string{"tag:a"})
	meshtest.Up(t, other)
	evil, victim := newRaw(t, m, "evil", []string{"tag:a"}), newRaw(t, m, "victim", []string{"tag:a"})
	evil.knows("victim")
	victim.knows("evil")
	victim.knows("other")
	to := netip.AddrPortFrom(victim.addr(), 80)
	var spoofed [][]byte
	for _, from := range []netip.Addr{
		other.Status().Self.Addresses[0], // another peer's
		victim.addr(),                    // the victim's own
		netip.MustParseAddr("127.0.0.1"),
		netip.MustParseAddr("169.254.1.1"),
		netip.MustParseAddr("224.0.0.1"),
		netip.MustParseAddr("255.255.255.255"),
		netip.MustParseAddr("0.0.0.0"),
		netip.MustParseAddr("10.0.0.1"),
		netip.MustParseAddr("100.100.100.100"),
		evil.addr().Next(),
	} {
		if from == evil.addr() {
			continue
		}
		spoofed = append(spoofed,
			packet(protoTCP, netip.AddrPortFrom(from, 5), to, syn, ""),
			packet(protoTCP, netip.AddrPortFrom(from, 5), to, ack, "x"),
			packet(protoUDP, netip.AddrPortFrom(from, 5), to, 0, "x"))
	}
	for _, p := range spoofed {
		evil.engine.Out([][]byte{p})
	}
	evil.engine.Out(spoofed)
	honest := packet(protoUDP, netip.AddrPortFrom(evil.addr(), 5), to, 0, "honest")
	meshtest.Until(t, "the honest packet", func() bool {
		evil.engine.Out([][]byte{honest}) // UDP; and the first ones may be lost
		packets, _ := victim.seen()
		return len(packets) > 0
	})
	packets, _ := victim.seen()
	for _, p := range packets {
		if !strings.HasSuffix(string(p), "honest") {
			t.Errorf("from %v came %q", netip.AddrFrom4([4]byte(p[12:16])), p[20:])
		}
	}
}

// F 71: the relay lets in who is a member, nobody else, and cuts off at once
// who is removed.
func TestRelayCutsRemovedNode_F71(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	watcher := newRaw(t, m, "watcher", []string{"tag:a"})
	relay := watcher.engine.Map().DERPMap().Regions[watcher.engine.HomeRegion()].Nodes[0]
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	dial := func(key identity.NodePrivate) (*derp.Client, error) {
		return derp.Dial(ctx, derp.ClientConfig{Key: key, Target: derp.Target{
			Region: relay.RegionID, Name: relay.Name, HostName: relay.HostName, CertName: relay.CertName,
			Addr: m.Host.Addr(),
		}})
	}
	if c, err := dial(identity.NewNode()); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("a stranger: %v", err)
		if err == nil {
			c.Close()
		}
	}
	member := enrolRaw(t, m, "member", []string{"tag:a"})
	c, err := dial(member.state.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	gone := make(chan time.Time, 1)
	go func() {
		for {
			if _, err := c.Recv(); err != nil {
				gone <- time.Now()
				return
			}
		}
	}()
	if _, err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := m.Admin.RemoveNode(t.Context(), "member"); err != nil {
		t.Fatal(err)
	}
	select {
	case at := <-gone:
		t.Logf("cut off %v after the order", at.Sub(begin))
	case <-ctx.Done():
		t.Fatal("a removed node stays connected to the relay")
	}
	if c, err := dial(member.state.Node); !errors.Is(err, derp.ErrNotAdmitted) {
		t.Errorf("a removed node: %v", err)
		if err == nil {
			c.Close()
		}
	}
}
