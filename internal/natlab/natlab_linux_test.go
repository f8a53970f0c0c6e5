package natlab

import (
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

func TestMain(m *testing.M) {
	actor.Perform()
	// Laboratories mostly wait.
	flag.Set("test.parallel", "6")
	Main(m)
}

// full tells whether the long forms of tests run, as in .ci/full.
func full() bool { return os.Getenv("MESH_FULL") == "1" }

const (
	openPolicy  = `{"tagOwners": {"tag:a": []}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`
	controlName = "control.test"
)

// world is a laboratory with a control server that is a relay as well, and the
// nodes that a test starts.
type world struct {
	*Lab
	dir     string
	host    *Host // of the control server
	control *actor.Process
	config  actor.ControlConfig
	ready   actor.ControlReady
	key     string // enrols nodes
}

func newWorld(t testing.TB, options ...func(*world)) *world {
	t.Helper()
	w := &world{Lab: New(t), dir: t.TempDir()}
	w.host = w.Public("control")
	w.Name(controlName, w.host)
	policy := filepath.Join(w.dir, "policy")
	if err := os.WriteFile(policy, []byte(openPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	w.config = actor.ControlConfig{
		DataDir: filepath.Join(w.dir, "control"), Listen: ":8080", STUN: ":3478",
		URL: "http://" + controlName + ":8080", Policy: policy, Relay: true,
	}
	for _, o := range options {
		o(w)
	}
	w.startControl()
	w.config.Policy = ""
	w.key = w.newKey(admin.KeyCreate{Tags: []string{"tag:a"}, Reusable: true})
	return w
}

func (w *world) startControl() {
	w.t.Helper()
	w.control = actor.Start(w.t, "control", "control", w.config, &w.ready, w.host.Wrap()...)
}

func (w *world) newKey(k admin.KeyCreate) string {
	w.t.Helper()
	key, err := admin.NewClient(w.ready.Socket).CreateKey(w.t.Context(), k)
	if err != nil {
		w.t.Fatal(err)
	}
	return key.Secret
}

// node starts a node on a host; it serves at port 7.
func (w *world) node(name string, h *Host) *actor.Process {
	w.t.Helper()
	p := actor.Start(w.t, "node", name, actor.NodeConfig{
		Hostname: name, ControlURL: w.ready.URL, ControlKey: w.ready.Key, AuthKey: w.key,
		Dir: filepath.Join(w.dir, name),
	}, nil, h.Wrap()...)
	p.Must("serve", 7, nil)
	return p
}

// relay starts a relay process on a public host of its own.
func (w *world) relay(region int) (*Host, func() *actor.Process) {
	w.t.Helper()
	name := fmt.Sprintf("relay%d", region)
	h := w.Public(name)
	c := actor.RelayConfig{
		DataDir: filepath.Join(w.dir, name), ControlURL: w.ready.URL, ControlKey: w.ready.Key,
		RelayKey: w.newKey(admin.KeyCreate{Relay: true}),
		Listen:   net.JoinHostPort(h.IPv4.String(), "443"), STUN: net.JoinHostPort(h.IPv4.String(), "3478"), Region: region,
	}
	return h, func() *actor.Process {
		w.t.Helper()
		return actor.Start(w.t, "relay", name, c, nil, h.Wrap()...)
	}
}

// await waits until nodes know each other.
func (w *world) await(nodes ...*actor.Process) {
	w.t.Helper()
	for _, n := range nodes {
		meshtest.Until(w.t, n.Name()+" to know the others", func() bool {
			var st mesh.Status
			n.Must("status", nil, &st)
			known := make(map[string]bool)
			for _, p := range st.Peers {
				known[p.ShortName()] = p.Online
			}
			for _, o := range nodes {
				if o != n && !known[o.Name()] {
					return false
				}
			}
			return true
		})
	}
}
