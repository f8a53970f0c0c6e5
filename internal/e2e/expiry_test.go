package e2e

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/meshtest"
)

const userPolicy = `{
	"tagOwners": {"tag:a": []},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}`

// approve lets in who waits at the URL.
func approve(t *testing.T, m *meshtest.Mesh, login *mesh.NeedsLoginError, owner admin.NodeOwner) {
	t.Helper()
	for _, l := range logins(t, m) {
		if l.URL == login.URL {
			if _, err := m.Admin.ApproveLogin(t.Context(), l.Code, owner); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no login at %s", login.URL)
}

func logins(t *testing.T, m *meshtest.Mesh) []admin.Login {
	t.Helper()
	list, err := m.Admin.Logins(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// A node without an auth key says at once where to log in, waits for that in
// the background, and comes up without being started again.
func TestLogin(t *testing.T) {
	m := meshtest.Start(t, userPolicy)
	other := m.Node("other", []string{"tag:a"})
	meshtest.Up(t, other)
	n := m.Node("laptop", nil)
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	_, err := n.Up(ctx)
	var login *mesh.NeedsLoginError
	if !errors.Is(err, mesh.ErrNeedsLogin) || !errors.As(err, &login) || !strings.HasPrefix(login.URL, m.Host.URL()+"/login/") {
		t.Fatalf("up: %v", err)
	}
	url := login.URL
	for what, try := range map[string]func() error{
		"dial":   func() error { _, err := n.Dial(ctx, "tcp", "other:1"); return err },
		"listen": func() error { _, err := n.Listen("tcp", ":1"); return err },
	} {
		if err := try(); !errors.As(err, &login) || login.URL != url {
			t.Errorf("%s: %v", what, err)
		}
	}
	if st := n.Status(); st.Running || st.LoginURL != url || !strings.Contains(st.Control, url) {
		t.Errorf("status %+v", st)
	}
	short, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if _, err := n.Up(short); !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &login) || login.URL != url {
		t.Errorf("waiting for it too briefly: %v", err)
	}
	up := make(chan error, 1)
	go func() {
		_, err := n.Up(ctx)
		up <- err
	}()
	approve(t, m, login, admin.NodeOwner{Tags: []string{"tag:a"}})
	if err := <-up; err != nil {
		t.Fatalf("up: %v", err)
	}
	if st := n.Status(); !st.Running || st.LoginURL != "" || st.Control != "" {
		t.Errorf("status %+v", st)
	}
	out, in := connect(t, n, other)
	if err := exchange(out, in, 1<<16); err != nil {
		t.Error(err)
	}
	out.Close()
	in.Close()
	// Next time it is known.
	dir := n.Dir
	n.Close()
	again := m.Node("laptop", nil, func(n *mesh.Node) { n.Dir = dir })
	meshtest.Up(t, again)
}

// Who is turned away hears so.
func TestLoginRejected(t *testing.T) {
	m := meshtest.Start(t, userPolicy)
	n := m.Node("laptop", nil)
	var login *mesh.NeedsLoginError
	if _, err := n.Up(t.Context()); !errors.As(err, &login) {
		t.Fatal(err)
	}
	if err := m.Admin.RejectLogin(t.Context(), logins(t, m)[0].Code); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	if _, err := n.Up(ctx); err == nil || ctx.Err() != nil || errors.As(err, &login) && login.URL != "" && !strings.Contains(err.Error(), "login") {
		t.Errorf("up: %v", err)
	} else {
		t.Logf("rejected: %v", err)
	}
}

// A node that waits for a login can be closed at once.
func TestCloseWhileWaitingForLogin(t *testing.T) {
	m := meshtest.Start(t, userPolicy)
	n := m.Node("laptop", nil)
	if _, err := n.Up(t.Context()); !errors.Is(err, mesh.ErrNeedsLogin) {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := n.Up(t.Context())
		waiting <- err
	}()
	n.Close()
	if err := <-waiting; !errors.Is(err, net.ErrClosed) {
		t.Errorf("up: %v", err)
	}
}

// A peer's key expires while control is away: its flows end all the same, at
// both ends, and it cannot be dialled.
func TestPeerKeyExpiresWithoutControl(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", nil, func(n *mesh.Node) {
		n.AuthKey = m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, NodeExpiry: time.Hour})
	})
	meshtest.Up(t, a, b)
	know(t, a, b)
	toB, atB := connect(t, a, b)
	defer toB.Close()
	defer atB.Close()
	toA, atA := connect(t, b, a)
	defer toA.Close()
	defer atA.Close()
	// Both must know of the expiry before control goes.
	expires := time.Now().Add(4 * time.Second)
	if _, err := m.Admin.ExpireNode(t.Context(), "b", admin.NodeExpire{At: expires}); err != nil {
		t.Fatal(err)
	}
	third := m.Node("third", []string{"tag:a"})
	meshtest.Up(t, third) // what comes after it was heard
	know(t, a, b, third)
	m.Stop()
	ends := map[string]net.Conn{"dialling, stays": toB, "accepting, expired": atB, "dialling, expired": toA, "accepting, stays": atA}
	for name, c := range ends {
		err := readUntilError(c)
		if !errors.Is(err, mesh.ErrRevoked) && !(errors.Is(err, mesh.ErrKeyExpired) && strings.HasSuffix(name, "expired")) {
			t.Errorf("%s: %v", name, err)
		}
		if late := time.Since(expires); late < 0 || late > 10*time.Second {
			t.Errorf("%s: %v after the key expired: %v", name, late, err)
		}
		t.Logf("%s: %v after the key expired: %v", name, time.Since(expires).Round(time.Millisecond), err)
	}
	if _, err := a.Dial(t.Context(), "tcp", "b:1"); !errors.Is(err, mesh.ErrRevoked) || !strings.Contains(err.Error(), "its key expired") {
		t.Errorf("dial to it: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := b.Dial(ctx, "tcp", "a:1"); !errors.Is(err, mesh.ErrKeyExpired) {
		t.Errorf("dial by it: %v", err)
	}
	for _, p := range a.Status().Peers {
		if p.Expired != (p.ShortName() == "b") {
			t.Errorf("status: %+v", p)
		}
	}
}

// A node whose key expires gets a new one with its auth key while it runs: it
// stays who it was, its listeners stay, only connections end.
func TestOwnKeyRenewedByAuthKey(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", nil, func(n *mesh.Node) { n.AuthKey = m.Key(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true}) })
	meshtest.Up(t, a, b)
	know(t, a, b)
	before := b.Status().Self
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := a.Dial(t.Context(), "tcp", "b:80")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := m.Admin.ExpireNode(t.Context(), "b", admin.NodeExpire{}); err != nil {
		t.Fatal(err)
	}
	if err := readUntilError(in); !errors.Is(err, mesh.ErrKeyExpired) && !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("its end: %v", err)
	}
	if err := readUntilError(out); !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("the other end: %v", err)
	}
	meshtest.Until(t, "the new key", func() bool { st := b.Status(); return st.Running && st.Self.Key != before.Key })
	meshtest.Up(t, b)
	after := b.Status().Self
	if after.ID != before.ID || after.Name != before.Name || after.Addresses[0] != before.Addresses[0] || after.Key == before.Key {
		t.Errorf("was %+v, is %+v", before, after)
	}
	know(t, a, b)
	out2, err := a.Dial(t.Context(), "tcp", "b:80")
	if err != nil {
		t.Fatal(err)
	}
	in2, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := exchange(out2, in2, 1<<16); err != nil {
		t.Error(err)
	}
	out2.Close()
	in2.Close()
	out2, in2 = connect(t, b, a)
	if err := exchange(out2, in2, 1<<16); err != nil {
		t.Error(err)
	}
	out2.Close()
	in2.Close()
}

// Without an auth key a person has to log in again; that is said, and who is
// let in goes on as who it was.
func TestOwnKeyRenewedByLogin(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	a := m.Node("a", []string{"tag:a"})
	b := m.Node("b", nil)
	meshtest.Up(t, a)
	var login *mesh.NeedsLoginError
	if _, err := b.Up(t.Context()); !errors.As(err, &login) {
		t.Fatal(err)
	}
	approve(t, m, login, admin.NodeOwner{Tags: []string{"tag:a"}})
	meshtest.Up(t, b)
	know(t, a, b)
	before := b.Status().Self
	out, in := connect(t, b, a)
	defer out.Close()
	defer in.Close()
	if _, err := m.Admin.ExpireNode(t.Context(), "b", admin.NodeExpire{}); err != nil {
		t.Fatal(err)
	}
	if err := readUntilError(out); !errors.Is(err, mesh.ErrKeyExpired) && !errors.Is(err, mesh.ErrRevoked) {
		t.Errorf("its end: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	meshtest.Until(t, "the URL", func() bool { return b.Status().LoginURL != "" })
	_, err := b.Dial(ctx, "tcp", "a:1")
	if !errors.Is(err, mesh.ErrKeyExpired) || !errors.As(err, &login) {
		t.Errorf("dial: %v", err)
	}
	if _, err = b.Up(ctx); !errors.Is(err, mesh.ErrKeyExpired) || !errors.As(err, &login) || b.Status().Running {
		t.Fatalf("up: %v", err)
	}
	l, err := b.Listen("tcp", ":80") // for when it is back
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	approve(t, m, login, admin.NodeOwner{Tags: []string{"tag:a"}})
	if _, err := b.Up(ctx); err != nil {
		t.Fatal(err)
	}
	if after := b.Status().Self; after.ID != before.ID || after.Name != before.Name || after.Addresses[0] != before.Addresses[0] {
		t.Errorf("was %+v, is %+v", before, after)
	}
	know(t, a, b)
	c, err := a.Dial(ctx, "tcp", "b:80")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
