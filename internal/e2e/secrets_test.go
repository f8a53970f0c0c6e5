package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/identity"
	"mesh/internal/meshtest"
)

// tape keeps all that is said.
type tape struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (w *tape) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(b)
}

func (w *tape) Sync() error { return nil }

func (w *tape) logger() *zap.Logger {
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewDevelopmentEncoderConfig()), w, zap.DebugLevel),
		zap.AddCaller(), zap.AddStacktrace(zap.WarnLevel))
}

// say puts a value on the tape in the ways in which programs print values.
func (w *tape) say(v any) {
	fmt.Fprintf(w, "%v\n%+v\n%#v\n%x\n", v, v, v, fmt.Sprint(v))
	if b, err := json.Marshal(v); err == nil {
		w.Write(append(b, '\n'))
	}
	for err, ok := v.(error); ok && err != nil; err = errors.Unwrap(err) {
		fmt.Fprintf(w, "%T %+v\n", err, err)
	}
}

// G 81: whatever is logged at the lowest level, returned as an error or shown
// as status, no secret of a node, a server or a key to enrol is in it.
func TestSecretsAreNotTold_G81(t *testing.T) {
	var w tape
	m := meshtest.Start(t, openPolicy, quickOffline, func(c *host.Config) { c.Logger = w.logger() })
	secrets := map[string][]byte{} // by what they are
	key := func(what string, k admin.KeyCreate) string {
		s := m.Key(k)
		secrets[what] = []byte(s)
		// The part that is random says as much as the whole.
		secrets[what+", the random part"] = []byte(strings.SplitN(s, "-", 4)[3])
		return s
	}
	logged := func(n *mesh.Node) { n.Logger = w.logger().Named(n.Hostname) }
	relayKey := key("relay key", admin.KeyCreate{Relay: true})
	relayDir := t.TempDir()
	relay, err := host.StartRelay(host.RelayConfig{
		DataDir: relayDir, Listen: "127.0.0.1:0", STUN: "127.0.0.1:0",
		ControlURL: m.Host.URL(), RelayKey: relayKey, Logger: w.logger().Named("relay"),
		OnState: func(err error) { w.say(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	<-relay.Announced()
	if bad, err := host.StartRelay(host.RelayConfig{
		DataDir: filepath.Join(t.TempDir(), "bad"), Listen: "127.0.0.1:0", STUN: "off", ControlURL: m.Host.URL(),
		RelayKey: relayKey[:len(relayKey)-1], Logger: w.logger().Named("bad"),
	}); err == nil {
		w.say(<-bad.Failed())
		bad.Close()
	}

	// A life with everything in it: joins of all sorts, calls, refusals,
	// errors, an outage, removal.
	a := m.Node("a", nil, logged, func(n *mesh.Node) { n.AuthKey = key("auth key of a", admin.KeyCreate{Tags: []string{"tag:a"}}) })
	b := m.Node("b", nil, logged, func(n *mesh.Node) {
		n.RelayOnly = true
		n.AuthKey = key("auth key of b", admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true})
	})
	eph := m.Node("eph", nil, logged, func(n *mesh.Node) {
		n.Ephemeral, n.Store = true, new(identity.MemoryStore)
		n.AuthKey = key("auth key of eph", admin.KeyCreate{Tags: []string{"tag:a"}, Ephemeral: true})
	})
	meshtest.Up(t, a, b, eph)
	know(t, a, b, eph)
	out, in := connect(t, a, b)
	if err := exchange(out, in, 1<<20); err != nil {
		t.Error(err)
	}
	pin := identity.NewMachine().Public().String()
	expired := key("expired key", admin.KeyCreate{Tags: []string{"tag:a"}, Expires: 1})
	for name, set := range map[string]func(*mesh.Node){
		"used":    func(n *mesh.Node) { n.AuthKey = a.AuthKey },
		"expired": func(n *mesh.Node) { n.AuthKey = expired },
		"wrong":   func(n *mesh.Node) { n.AuthKey = b.AuthKey[:len(b.AuthKey)-1] },
		"pin":     func(n *mesh.Node) { n.AuthKey, n.ControlKey = b.AuthKey, pin },
		"badpin":  func(n *mesh.Node) { n.AuthKey, n.ControlKey = b.AuthKey, b.AuthKey },
		"url":     func(n *mesh.Node) { n.ControlURL, n.AuthKey = "http://127.0.0.1:1", b.AuthKey },
		"tag":     func(n *mesh.Node) { n.AuthKey, n.Tags = b.AuthKey, []string{"tag:z"} },
		"dir":     func(n *mesh.Node) { n.AuthKey, n.Dir = b.AuthKey, a.Dir },
		"mixedup": func(n *mesh.Node) { n.AuthKey, n.Tags = "tag:a", []string{b.AuthKey} },
	} {
		n := m.Node(name, nil, logged, set)
		_, err := n.Up(t.Context())
		if err == nil {
			t.Errorf("%s: started", name)
		}
		if name == "mixedup" || name == "badpin" {
			// A secret in the wrong place is quoted back to who put it there;
			// it is not looked for.
			continue
		}
		w.say(err)
		n.Close()
	}
	for _, addr := range []string{"nobody:1", "b:1", "b:0", "192.0.2.1:1", "::", ""} {
		_, err := a.Dial(t.Context(), "tcp", addr)
		w.say(err)
	}
	for _, c := range []net.Conn{out, in} {
		p, _ := mesh.PeerOf(c)
		w.say(p)
		w.say(c.RemoteAddr())
	}
	for _, n := range []*mesh.Node{a, b, eph} {
		w.say(*n.Status())
	}
	m.Stop()
	meshtest.Until(t, "the outage to show", func() bool { return a.Status().Control != "" })
	w.say(*a.Status())
	m.Restart()
	meshtest.Until(t, "its end", func() bool { return a.Status().Control == "" && b.Status().Control == "" })
	if err := m.Admin.RemoveNode(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	w.say(readUntilError(out))
	w.say(readUntilError(in))
	out.Close()
	in.Close()
	ctx := t.Context()
	st, err := m.Admin.Status(ctx)
	w.say(err)
	w.say(st)
	nodes, err := m.Admin.Nodes(ctx)
	w.say(err)
	w.say(nodes)
	keys, err := m.Admin.Keys(ctx)
	w.say(err)
	w.say(keys)
	relays, err := m.Admin.Relays(ctx)
	w.say(err)
	w.say(relays)
	_, err = m.Admin.Node(ctx, "nobody")
	w.say(err)

	// What must not be on the tape.
	addState := func(who string, s identity.Store) {
		t.Helper()
		st, err := identity.LoadState(s)
		if err != nil {
			t.Fatal(err)
		}
		node, machine := st.Node.Bytes(), st.Machine.Bytes()
		secrets[who+"'s node key"], secrets[who+"'s machine key"] = node[:], machine[:]
	}
	eph.Close()
	addState("eph", eph.Store)
	for _, n := range []*mesh.Node{a, b} {
		n.Close()
		s, err := identity.OpenFileStore(n.Dir)
		if err != nil {
			t.Fatal(err)
		}
		addState(n.Hostname, s)
		s.Close()
	}
	relay.Close()
	m.Stop()
	addFileSecrets(t, secrets, filepath.Dir(m.Host.Socket()))
	addFileSecrets(t, secrets, relayDir)
	if len(secrets) < 16 {
		t.Errorf("only %d secrets were found", len(secrets))
	}
	w.mu.Lock()
	text := w.b.Bytes()
	w.mu.Unlock()
	t.Logf("looked for %d secrets in %d KB", len(secrets), len(text)>>10)
	for what, secret := range secrets {
		for _, form := range forms(secret) {
			if i := bytes.Index(text, form); i >= 0 {
				line := text[bytes.LastIndexByte(text[:i], '\n')+1:]
				line, _, _ = bytes.Cut(line, []byte("\n"))
				t.Errorf("%s was told: %.300q", what, line)
				break
			}
		}
	}
}

var privateKey = regexp.MustCompile(`privkey:[0-9a-f]{64}`)

// addFileSecrets collects the keys in a server's files: text keys, of which
// one is in the database, and PEM.
func addFileSecrets(t *testing.T, secrets map[string][]byte, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i, k := range privateKey.FindAll(b, -1) {
			raw, err := hex.DecodeString(string(k[len("privkey:"):]))
			if err != nil {
				return err
			}
			secrets[fmt.Sprintf("private key %d of %s", i, path)] = raw
		}
		if p, _ := pem.Decode(b); p != nil && strings.Contains(p.Type, "PRIVATE KEY") {
			secrets["private key of "+path] = p.Bytes
			secrets["part of the private key of "+path] = p.Bytes[len(p.Bytes)/2-16 : len(p.Bytes)/2+16]
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// forms are the ways in which bytes get into text.
func forms(secret []byte) [][]byte {
	decimal := strings.Trim(fmt.Sprint(secret), "[]")
	out := [][]byte{
		secret,
		[]byte(hex.EncodeToString(secret)),
		[]byte(strings.ToUpper(hex.EncodeToString(secret))),
		[]byte(decimal),
		[]byte(strings.ReplaceAll(decimal, " ", ", ")),
		[]byte(strings.ReplaceAll(decimal, " ", ",")),
	}
	// Base64 depends on what stands before: look for what is common.
	for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for skip := range 3 {
			b := secret[skip:]
			out = append(out, []byte(e.EncodeToString(b[:len(b)/3*3])))
		}
	}
	return out
}
