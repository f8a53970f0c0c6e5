package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// world is a mesh of processes: a control server, a relay and nodes.
type world struct {
	t       testing.TB
	dir     string
	config  actor.ControlConfig
	ready   actor.ControlReady
	control *actor.Process
	relay   *actor.Process
	admin   *admin.Client
}

func startWorld(t testing.TB, policy string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	w.config.DataDir = filepath.Join(w.dir, "control")
	w.config.Listen = "127.0.0.1:0"
	w.config.Policy = filepath.Join(w.dir, "policy")
	if err := os.WriteFile(w.config.Policy, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	w.startControl()
	w.config.Policy = "" // it is stored now, and may be changed
	key := w.key(admin.KeyCreate{Relay: true})
	w.relay = actor.Start(t, "relay", "relay", actor.RelayConfig{
		DataDir: filepath.Join(w.dir, "relay"), ControlURL: w.ready.URL, RelayKey: key,
		Listen: "127.0.0.1:0", STUN: "127.0.0.1:0",
	}, nil)
	return w
}

// startControl starts the control server, again where it was if it was before.
func (w *world) startControl() {
	w.t.Helper()
	w.control = actor.Start(w.t, "control", "control", w.config, &w.ready)
	w.config.Listen = w.ready.Addr
	w.admin = admin.NewClient(w.ready.Socket)
}

func (w *world) key(k admin.KeyCreate) string {
	w.t.Helper()
	key, err := w.admin.CreateKey(w.t.Context(), k)
	if err != nil {
		w.t.Fatal(err)
	}
	return key.Secret
}

// node starts a node process with a state directory of its name; with enrol it
// has an auth key, else it must be there already.
func (w *world) node(name string, relayOnly, enrol bool) *actor.Process {
	w.t.Helper()
	c := actor.NodeConfig{Hostname: name, ControlURL: w.ready.URL, Dir: filepath.Join(w.dir, name), RelayOnly: relayOnly}
	if enrol {
		c.AuthKey = w.key(admin.KeyCreate{Tags: []string{"tag:a"}})
	}
	return actor.Start(w.t, "node", name, c, nil)
}

// awaitPath makes calls until they take the path.
func (w *world) awaitPath(from *actor.Process, to string, path string) {
	w.t.Helper()
	meshtest.Until(w.t, from.Name()+"'s path to "+to+" to be "+path, func() bool {
		from.Must("get", to+":7", nil)
		return pathIn(from, to) == path
	})
}

func status(p *actor.Process) (st mesh.Status) {
	p.T().Helper()
	p.Must("status", nil, &st)
	return st
}

func pathIn(from *actor.Process, to string) string {
	from.T().Helper()
	for _, p := range status(from).Peers {
		if p.ShortName() == to {
			return p.Path.Kind
		}
	}
	return "unknown peer"
}

func count(p *actor.Process, what string) (n int64) {
	p.T().Helper()
	p.Must(what, nil, &n)
	return n
}

// Two agents in two processes move random data in both directions at once,
// directly and by relay; the control server is killed while they do.
func TestProcessTransfer(t *testing.T) {
	size := int64(256 << 20)
	switch {
	case raceEnabled && testing.Short():
		size = 16 << 20
	case raceEnabled || testing.Short():
		size = 64 << 20
	case full():
		size = 1 << 30
	}
	for _, test := range []struct {
		name      string
		relayOnly bool
	}{{"direct", false}, {"relay", true}} {
		t.Run(test.name, func(t *testing.T) {
			w := startWorld(t, openPolicy)
			a, b := w.node("a", test.relayOnly, true), w.node("b", test.relayOnly, true)
			b.Must("serve", 7, nil)
			w.awaitPath(a, "b", test.name)
			b.Must("listen", 5432, nil)

			// As long as it takes, if it goes on.
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			type end struct {
				actor.Transferred
				err error
			}
			run := func(p *actor.Process, args actor.Transfer) chan end {
				ch := make(chan end, 1)
				go func() {
					var e end
					e.err = p.Call(ctx, "exchange", args, &e.Transferred)
					ch <- e
				}()
				return ch
			}
			atB := run(b, actor.Transfer{Port: 5432, Size: size, Seed: 1})
			atA := run(a, actor.Transfer{Addr: "b:5432", Size: size, Seed: 2})
			meshtest.Until(t, "the transfer to be under way", func() bool {
				return count(a, "received") > size/16 && count(b, "received") > size/16
			})
			w.control.Kill()
			if got := count(a, "received") + count(b, "received"); got >= 2*size {
				t.Fatal("the transfer was over before the control server was killed")
			} else {
				t.Logf("control server killed after %d of %d MiB", got>>20, 2*size>>20)
			}
			ra, rb := <-atA, <-atB
			if ra.err != nil || rb.err != nil {
				t.Fatalf("a: %v; b: %v", ra.err, rb.err)
			}
			if ra.Sent != rb.Received || rb.Sent != ra.Received || ra.Sent == rb.Sent {
				t.Errorf("a sent %s, b received %s; b sent %s, a received %s", ra.Sent, rb.Received, rb.Sent, ra.Received)
			}
			t.Logf("%d MiB each way at once in %.1f s: %.0f MB/s each way", size>>20, ra.Seconds, float64(size)/1e6/ra.Seconds)
			if got := pathIn(a, "b"); got != test.name {
				t.Errorf("the path ended as %q", got)
			}
			// What the outage takes nothing from: a new connection, by relay too.
			meshtest.Until(t, "the outage to show", func() bool { return status(a).Control != "" })
			a.Must("get", "b:7", nil)
			a.Stop()
			b.Stop()
			w.relay.Stop()
		})
	}
}

// Goal 11. The control server is away, for ten minutes in the full form: what
// is open goes on, new connections are made, a node starts again from what it
// saved; when it is back nodes join, and policy reaches them.
func TestControlOutageInRealTime(t *testing.T) {
	length := 2 * time.Second
	if full() {
		length = 10 * time.Minute
	}
	w := startWorld(t, openPolicy)
	a, b, c := w.node("a", false, true), w.node("b", false, true), w.node("c", true, true)
	all := []*actor.Process{a, b, c}
	for _, p := range all {
		p.Must("serve", 7, nil)
	}
	w.awaitPath(a, "b", "direct")
	w.awaitPath(c, "b", "relay")
	a.Must("flow", "b:7", nil)
	c.Must("flow", "b:7", nil)

	w.control.Kill()
	over := time.After(length)
	meshtest.Until(t, "the outage to show", func() bool { return status(a).Control != "" && status(b).Control != "" })
	for waiting := true; waiting; {
		fa, fc := count(a, "rounds"), count(c, "rounds")
		for _, p := range [][2]string{{"a", "b"}, {"b", "c"}, {"c", "a"}} {
			all[p[0][0]-'a'].Must("get", p[1]+":7", nil)
		}
		meshtest.Until(t, "the open connections to go on", func() bool { return count(a, "rounds") > fa && count(c, "rounds") > fc })
		select {
		case <-over:
			waiting = false
		case <-time.After(length / 50):
		}
	}
	c.Must("endflow", nil, nil)
	c.Stop()
	c = w.node("c", true, false)
	c.Must("serve", 7, nil)
	if st := status(c); len(st.Peers) != 2 || st.Control == "" {
		t.Errorf("after a start without control: %+v", st)
	}
	c.Must("get", "a:7", nil)
	c.Must("get", "b:7", nil)
	a.Must("get", "c:7", nil)
	b.Must("get", "c:7", nil)

	w.startControl()
	back := time.Now()
	d := w.node("d", false, true)
	d.Must("serve", 7, nil)
	// Each hears of the new node when it has found the server again.
	for _, p := range [][2]*actor.Process{{d, c}, {a, d}, {b, d}} {
		meshtest.Until(t, p[0].Name()+" to reach "+p[1].Name(), func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
			defer cancel()
			return p[0].Call(ctx, "get", p[1].Name()+":7", nil) == nil
		})
	}
	t.Logf("a new node joined and was reached %v after the control server was back", time.Since(back))
	p, err := w.admin.SetPolicy(t.Context(), admin.PolicySet{Text: `{
		"tagOwners": {"tag:a": []},
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:7"]}],
	}`})
	if err != nil {
		t.Fatal(err)
	}
	changed := time.Now()
	meshtest.Until(t, "the new policy to be in force", func() bool {
		for _, n := range []*actor.Process{a, b, c, d} {
			if st := status(n); st.PolicyVersion != p.Version || st.Control != "" {
				return false
			}
		}
		return true
	})
	t.Logf("a new policy was in force everywhere after %v", time.Since(changed))
	a.Must("get", "b:7", nil)
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	if err := a.Call(ctx, "get", "b:8", nil); err == nil || !strings.Contains(err.Error(), "refused tcp port 8: not allowed by policy") {
		t.Errorf("what the new policy does not allow: %v", err)
	}
	a.Must("endflow", nil, nil) // the connection of before the outage
	for _, n := range []*actor.Process{a, b, c, d} {
		n.Stop()
	}
	w.relay.Stop()
	w.control.Stop()
}
