package e2e

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"mesh"
	"mesh/control/admin"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// G 80: odd names of state directories mean themselves, and a host name never
// leads out of the directory that all states are in.
func TestStateDirectoryNames_G80(t *testing.T) {
	m := meshtest.Start(t, openPolicy)
	base := t.TempDir()
	names := []string{"a b", "a#b", "a?b", "a%20b", "a%", "a\nb", "a'b\"", "a;b&c", "ünï", "-rf", "~", "$HOME", "a\\b", "a:b"}
	if runtime.GOOS == "windows" {
		names = []string{"a b", "a#b", "a%20b", "ünï", "$HOME"}
	}
	for _, name := range names {
		dir := filepath.Join(base, name)
		n := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = dir })
		meshtest.Up(t, n)
		n.Close()
		if _, err := os.Stat(filepath.Join(dir, "state.json")); err != nil {
			t.Errorf("state in %q: %v", name, err)
		}
	}
	entries, err := os.ReadDir(base)
	if err != nil || len(entries) != len(names) {
		t.Errorf("%d directories for %d names, %v: %v", len(entries), len(names), err, entries)
	}
	// A name that is no state directory of ours.
	file := filepath.Join(base, "file")
	os.WriteFile(file, nil, 0o600)
	for name, dir := range map[string]string{"a file": file, "below a file": filepath.Join(file, "x"), "a NUL": base + "/a\x00b"} {
		n := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = dir })
		if _, err := n.Up(t.Context()); err == nil {
			t.Errorf("%s was taken for a state directory", name)
		}
	}

	if runtime.GOOS != "linux" {
		return
	}
	home := t.TempDir()
	config := filepath.Join(home, "config")
	t.Setenv("XDG_CONFIG_HOME", config)
	for _, hostname := range []string{"../../up", "/etc/x", "..", ".", "a/b", "a\nb", "a#b", "A B", strings.Repeat("x", 300), "lock", "…"} {
		n := m.Node(hostname, nil, func(n *mesh.Node) {
			n.Dir = ""
			n.AuthKey = m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
		})
		ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
		_, err := n.Up(ctx)
		cancel()
		if err != nil {
			t.Errorf("%q: %v", hostname, err) // the server makes a name of anything
		}
		n.Close()
	}
	err = filepath.WalkDir(home, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(config, path)
		if err == nil && !d.IsDir() && (!strings.HasPrefix(rel, "mesh/") || strings.Count(rel, "/") != 2) {
			t.Errorf("a file at %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// faulty is a Store whose writes fail on demand.
type faulty struct {
	identity.MemoryStore
	mu     sync.Mutex // guards the fields below
	fail   error
	failed int
}

func (s *faulty) Write(name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		s.failed++
		return s.fail
	}
	return s.MemoryStore.Write(name, data)
}

func (s *faulty) breaks(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *faulty) failures() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// A node that cannot save its keys does not start, and uses up no key; one that
// runs goes on when its netmap can no longer be saved.
func TestFullStore(t *testing.T) {
	t.Parallel() // a map is saved some seconds after it came
	m := meshtest.Start(t, openPolicy)
	full := &faulty{}
	full.breaks(syscall.ENOSPC)
	key := m.Key(admin.KeyCreate{Tags: []string{"tag:a"}})
	set := func(n *mesh.Node) { n.Store, n.AuthKey = full, key }
	n := m.Node("n", nil, set)
	if _, err := n.Up(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("start with a full store: %v", err)
	}
	if nodes, err := m.Admin.Nodes(t.Context()); err != nil || len(nodes) != 0 {
		t.Errorf("nodes %v, %v", nodes, err)
	}
	full.breaks(nil)
	meshtest.Up(t, n) // the same Node, the same key
	full.breaks(syscall.ENOSPC)
	other := m.Node("other", []string{"tag:a"})
	meshtest.Up(t, other)
	know(t, n, other)
	meshtest.Until(t, "a write to fail", func() bool { return full.failures() > 1 })
	c1, c2 := connect(t, other, n)
	defer c1.Close()
	defer c2.Close()
	if err := exchange(c1, c2, 1<<20); err != nil {
		t.Error(err)
	}
	if st := n.Status(); !st.Running || st.Control != "" {
		t.Errorf("status %+v", st)
	}
}

// G 80: a state directory that cannot be written to.
func TestReadOnlyStateDirectory_G80(t *testing.T) {
	if runtime.GOOS == "windows" || os.Getuid() == 0 {
		t.Skip("permissions do not bind this user")
	}
	m := meshtest.Start(t, openPolicy)
	dir := t.TempDir()
	os.Chmod(dir, 0o500)
	defer os.Chmod(dir, 0o700)
	n := m.Node("n", []string{"tag:a"}, func(n *mesh.Node) { n.Dir = dir })
	if _, err := n.Up(t.Context()); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), dir) {
		t.Errorf("start: %v", err)
	}
}

// G 82: nodes of one process share nothing of their identities.
func TestTwoNodesInOneProcess_G82(t *testing.T) {
	m := meshtest.Start(t, `{
		"tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
		"acls": [
			{"action": "accept", "src": ["tag:a"], "dst": ["tag:c:1"]},
			{"action": "accept", "src": ["tag:b"], "dst": ["tag:c:2"]},
		]}`)
	a, b, c := m.Node("a", []string{"tag:a"}), m.Node("b", []string{"tag:b"}), m.Node("c", []string{"tag:c"})
	meshtest.Up(t, a, b, c)
	know(t, a, c)
	know(t, b, c)
	sa, sb := a.Status().Self, b.Status().Self
	if sa.ID == sb.ID || sa.Key == sb.Key || sa.Addresses[0] == sb.Addresses[0] || sa.Addresses[1] == sb.Addresses[1] {
		t.Errorf("%+v and %+v", sa, sb)
	}
	// Neither may see or be the other.
	for _, test := range []struct {
		n     *mesh.Node
		other string
	}{{a, "b"}, {b, "a"}} {
		if len(test.n.Status().Peers) != 1 {
			t.Errorf("%s sees %+v", test.n.Hostname, test.n.Status().Peers)
		}
		if _, err := test.n.Dial(t.Context(), "tcp", test.other+":1"); !errors.Is(err, mesh.ErrUnknownHost) {
			t.Errorf("%s dials %s: %v", test.n.Hostname, test.other, err)
		}
	}
	var addrs []string
	for port, test := range map[string]struct {
		may, not *mesh.Node
	}{":1": {a, b}, ":2": {b, a}} {
		l, err := c.Listen("tcp", port)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := test.not.Dial(t.Context(), "tcp", "c"+port); !errors.Is(err, mesh.ErrDenied) {
			t.Errorf("%s dials c%s: %v", test.not.Hostname, port, err)
		}
		out, err := test.may.Dial(t.Context(), "tcp", "c"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if p, _ := mesh.PeerOf(in); p.ID != test.may.Status().Self.ID || p.Key != test.may.Status().Self.Key {
			t.Errorf("c%s was called by %+v", port, p)
		}
		addrs = append(addrs, out.LocalAddr().String())
	}
	if addrs[0] == addrs[1] {
		t.Errorf("both called from %s", addrs[0])
	}
	// One that closes takes nothing from the other.
	a.Close()
	if _, err := b.Dial(t.Context(), "tcp", "c:2"); err != nil {
		t.Errorf("after the other closed: %v", err)
	}
}
