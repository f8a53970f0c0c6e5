// Package meshtest starts whole meshes for tests: a coordination server with a
// relay on loopback, and as many nodes as a test asks for.
package meshtest

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
)

// Patience is how long a test waits for what must happen. It is far more than
// anything takes, also on a loaded machine under the race detector.
const Patience = 60 * time.Second

// Mesh is a coordination server with its administrator.
type Mesh struct {
	Host  *host.Host
	Admin *admin.Client

	t   testing.TB
	cfg host.Config
}

// Start runs a coordination server with relay and STUN on free ports of
// loopback until the test ends. An empty policy text leaves the mesh without.
func Start(t testing.TB, policy string, options ...func(*host.Config)) *Mesh {
	t.Helper()
	m := &Mesh{t: t, cfg: host.Config{
		DataDir: filepath.Join(t.TempDir(), "control"),
		Listen:  "127.0.0.1:0",
		STUN:    "127.0.0.1:0",
		Logger:  Logger(t),
	}}
	for _, o := range options {
		o(&m.cfg)
	}
	m.Restart()
	t.Cleanup(func() { m.Host.Close() })
	if policy != "" {
		m.SetPolicy(policy)
	}
	return m
}

// Restart starts the server, again on the port it had if it was stopped.
func (m *Mesh) Restart() {
	m.t.Helper()
	h, err := host.Start(m.cfg)
	if err != nil {
		m.t.Fatalf("start coordination server: %v", err)
	}
	m.Host = h
	m.cfg.Listen = h.Addr()
	m.Admin = admin.NewClient(h.Socket())
}

// Stop stops the server and its relay.
func (m *Mesh) Stop() { m.Host.Close() }

// SetPolicy puts a policy in force.
func (m *Mesh) SetPolicy(text string) {
	m.t.Helper()
	if _, err := m.Admin.SetPolicy(m.t.Context(), admin.PolicySet{Text: text}); err != nil {
		m.t.Fatalf("set policy: %v", err)
	}
}

// Key creates an enrolment key.
func (m *Mesh) Key(k admin.KeyCreate) string {
	m.t.Helper()
	key, err := m.Admin.CreateKey(m.t.Context(), k)
	if err != nil {
		m.t.Fatalf("create key: %v", err)
	}
	return key.Secret
}

// Node returns a node with a one-time key for the tags, or with no key if there
// are none; it is closed when the test ends. It is not started; options may
// change it before it is.
func (m *Mesh) Node(name string, tags []string, options ...func(*mesh.Node)) *mesh.Node {
	m.t.Helper()
	n := &mesh.Node{
		Hostname:   name,
		ControlURL: m.Host.URL(),
		Dir:        filepath.Join(m.t.TempDir(), name),
		Logger:     Logger(m.t).Named(name),
	}
	if tags != nil {
		n.AuthKey = m.Key(admin.KeyCreate{Tags: tags})
	}
	for _, o := range options {
		o(n)
	}
	m.t.Cleanup(func() { n.Close() })
	return n
}

// Up starts nodes and waits until peers can reach them.
func Up(t testing.TB, nodes ...*mesh.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	for _, n := range nodes {
		if _, err := n.Up(ctx); err != nil {
			t.Fatalf("%s: %v", n.Hostname, err)
		}
	}
}

// Until waits until ok returns true.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(Patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited %v for %s", Patience, what)
		case <-tick.C:
		}
	}
}

// Logger writes to the test's log when it is verbose, and is silent otherwise.
func Logger(t testing.TB) *zap.Logger {
	if !testing.Verbose() {
		return zap.NewNop()
	}
	return testLogger(t)
}
