package e2e

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// Every way of starting that cannot work says why, at once, from Up, Dial and
// Listen alike.
func TestStartFailuresSayWhy(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	oneTime := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
	first := m.Node("first", nil, func(n *mesh.Node) { n.AuthKey = oneTime })
	meshtest.Up(t, first)
	expired := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, Expires: time.Nanosecond})
	revokedKey, err := m.Admin.CreateKey(t.Context(), admin.KeyCreate{Tags: []string{"tag:a"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Admin.RevokeKey(t.Context(), revokedKey.ID); err != nil {
		t.Fatal(err)
	}
	flip := func(s string) string { return s[:len(s)-1] + string(s[len(s)-1]^1) }
	closedPort := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return "http://" + l.Addr().String()
	}()
	damaged := t.TempDir()
	os.WriteFile(filepath.Join(damaged, "state.json"), []byte(`{"version":1,"mach`), 0o600)
	inUse := t.TempDir()
	owner, err := identity.OpenFileStore(inUse)
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close()
	otherPin := identity.NewMachine().Public()

	for name, test := range map[string]struct {
		set  func(*mesh.Node)
		is   error
		text string
	}{
		"no control URL":      {func(n *mesh.Node) { n.ControlURL = "" }, nil, "set Node.ControlURL or MESH_CONTROL_URL"},
		"malformed URL":       {func(n *mesh.Node) { n.ControlURL = "ftp://x" }, nil, "want http://host[:port] or https://host[:port]"},
		"plain HTTP, no pin":  {func(n *mesh.Node) { n.ControlURL = "http://192.0.2.1:8080" }, nil, "plain HTTP does not prove who answers"},
		"nobody at URL":       {func(n *mesh.Node) { n.ControlURL = closedPort }, nil, "control server unreachable: dial tcp " + strings.TrimPrefix(closedPort, "http://") + ": connect: connection refused"},
		"no auth key":         {func(n *mesh.Node) { n.AuthKey = "" }, mesh.ErrNeedsLogin, "login needed"},
		"unknown auth key":    {func(n *mesh.Node) { n.AuthKey = "mesh-auth-77-x" }, mesh.ErrAuthKeyUnknown, "unknown auth key"},
		"wrong secret":        {func(n *mesh.Node) { n.AuthKey = flip(oneTime) }, mesh.ErrAuthKeyUnknown, "unknown auth key"},
		"wrong of expired":    {func(n *mesh.Node) { n.AuthKey = flip(expired) }, mesh.ErrAuthKeyUnknown, "unknown auth key"},
		"wrong of revoked":    {func(n *mesh.Node) { n.AuthKey = flip(revokedKey.Secret) }, mesh.ErrAuthKeyUnknown, "unknown auth key"},
		"truncated auth key":  {func(n *mesh.Node) { n.AuthKey = oneTime[:len(oneTime)-3] }, mesh.ErrAuthKeyUnknown, "unknown auth key"},
		"used auth key":       {func(n *mesh.Node) { n.AuthKey = oneTime }, mesh.ErrAuthKeyUsed, "auth key already used"},
		"expired auth key":    {func(n *mesh.Node) { n.AuthKey = expired }, mesh.ErrAuthKeyExpired, "auth key expired"},
		"revoked auth key":    {func(n *mesh.Node) { n.AuthKey = revokedKey.Secret }, mesh.ErrAuthKeyRevoked, "auth key revoked"},
		"tag of another key":  {func(n *mesh.Node) { n.Tags = []string{"tag:b"} }, nil, "tag not allowed"},
		"malformed tag":       {func(n *mesh.Node) { n.Tags = []string{"b"} }, nil, `want "tag:NAME"`},
		"wrong pin":           {func(n *mesh.Node) { n.ControlKey = otherPin.String() }, nil, "the pinned key is " + otherPin.Short()},
		"malformed pin":       {func(n *mesh.Node) { n.ControlKey = "mkey:12" }, identity.ErrBadKey, "Node.ControlKey or MESH_CONTROL_KEY"},
		"damaged state":       {func(n *mesh.Node) { n.Dir = damaged }, identity.ErrBadState, "delete it to enrol this node anew"},
		"directory in use":    {func(n *mesh.Node) { n.Dir = inUse }, identity.ErrStoreInUse, "give each node its own directory"},
		"directory is a file": {func(n *mesh.Node) { n.Dir = filepath.Join(damaged, "state.json") }, nil, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			n := m.Node("n", []string{"tag:a"}, test.set)
			ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
			defer cancel()
			check := func(err error) {
				t.Helper()
				if err == nil {
					t.Fatal("it started")
				}
				if !strings.Contains(err.Error(), test.text) {
					t.Errorf("error %q does not say %q", err, test.text)
				}
				if test.is != nil && !errors.Is(err, test.is) {
					t.Errorf("error %q is not %v", err, test.is)
				}
				if strings.Contains(err.Error(), oneTime) || strings.Contains(err.Error(), expired) || ctx.Err() != nil {
					t.Errorf("a secret or a timeout in %q", err)
				}
			}
			_, err := n.Up(ctx)
			check(err)
			_, err = n.Dial(ctx, "tcp", "first:1")
			check(err)
			_, err = n.Listen("tcp", ":1")
			check(err)
		})
	}
	if b, _ := os.ReadFile(filepath.Join(damaged, "state.json")); string(b) != `{"version":1,"mach` {
		t.Error("damaged state was overwritten")
	}
}

// A failed start can be tried again on the same Node once the cause is gone.
func TestStartAgainAfterFailure(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	m.Stop()
	n := &mesh.Node{Hostname: "n", ControlURL: m.Host.URL(), Dir: t.TempDir()}
	defer n.Close()
	if _, err := n.Up(t.Context()); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Fatalf("without control: %v", err)
	}
	m.Restart()
	n.AuthKey = m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
	meshtest.Up(t, n)
}

// Of many nodes that use a one-time key at the same moment, one gets in.
func TestOneTimeKeyHasOneWinner(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	key := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for range cap(errs) {
		n := m.Node("racer", []string{"tag:a"}, func(n *mesh.Node) { n.AuthKey, n.Store = key, new(identity.MemoryStore) })
		wg.Go(func() {
			_, err := n.Up(t.Context())
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	won := 0
	for err := range errs {
		switch {
		case err == nil:
			won++
		case !errors.Is(err, mesh.ErrAuthKeyUsed):
			t.Errorf("a loser heard %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d nodes got in with a one-time key", won)
	}
}

// The same state is the same node; names that are taken get a suffix.
func TestIdentityAcrossRestarts(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	dir := t.TempDir()
	a := m.Node("agent", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = dir })
	b := m.Node("agent", []string{"tag:a"})
	meshtest.Up(t, a, b)
	if got := b.Status().Self.Name; got != "agent-1.mesh.internal" {
		t.Errorf("the second agent is %s", got)
	}
	before := a.Status().Self
	a.Close()
	again := m.Node("agent", []string{"tag:a"}, func(n *mesh.Node) { n.Dir, n.AuthKey = dir, "" })
	meshtest.Up(t, again)
	after := again.Status().Self
	if before.ID != after.ID || before.Key != after.Key || before.Name != after.Name || before.Addresses[0] != after.Addresses[0] {
		t.Errorf("was %+v, is %+v", before, after)
	}
	// Another machine with the same node key is refused.
	stolen := new(identity.MemoryStore)
	st := loadState(t, dir, again)
	st.Machine = identity.NewMachine()
	if err := st.Save(stolen); err != nil {
		t.Fatal(err)
	}
	thief := m.Node("thief", nil, func(n *mesh.Node) { n.Store, n.AuthKey = stolen, "" })
	if _, err := thief.Up(t.Context()); err == nil || !strings.Contains(err.Error(), "another machine") {
		t.Errorf("a stolen node key: %v", err)
	}
}

func loadState(t *testing.T, dir string, owner *mesh.Node) identity.State {
	t.Helper()
	owner.Close()
	s, err := identity.OpenFileStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := identity.LoadState(s)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestEphemeralNodeVanishesOnClose(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	other := m.Node("other", []string{"tag:a"})
	eph := m.Node("eph", nil, func(n *mesh.Node) {
		n.Ephemeral = true
		n.AuthKey = m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, Ephemeral: true})
	})
	meshtest.Up(t, other, eph)
	meshtest.Until(t, "the ephemeral node to be seen", func() bool { return len(other.Status().Peers) == 1 })
	eph.Close()
	meshtest.Until(t, "the ephemeral node to vanish", func() bool { return len(other.Status().Peers) == 0 })
	nodes, err := m.Admin.Nodes(t.Context())
	if err != nil || len(nodes) != 1 {
		t.Errorf("nodes %v, %v", nodes, err)
	}
	if _, err := other.Dial(t.Context(), "tcp", "eph:1"); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("dial: %v", err)
	}
}
