package interop

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// headscaleEnv names a Headscale program. The tests with it run only where
// somebody has set it: the program is not of this tree.
const headscaleEnv = "MESH_HEADSCALE"

const privateIP = "10.99.0.1"

// headscale is a Headscale server in a process, whose relay and STUN are the
// stock ones.
type headscale struct {
	t       testing.TB
	program string
	dir     string
	addr    string
	cmd     *exec.Cmd
	key     string // its public key, as anybody may ask for it
}

// startHeadscale runs Headscale at an address that is not of loopback.
func startHeadscale(t testing.TB) *headscale {
	t.Helper()
	h := &headscale{t: t, program: os.Getenv(headscaleEnv), dir: t.TempDir()}
	if h.program == "" {
		t.Skip("no Headscale: set " + headscaleEnv + " to its program")
	}
	var info struct {
		DERPMap struct {
			Regions map[string]struct{ Nodes []map[string]any }
		}
	}
	// Beyond loopback, so that keys have to be pinned; but private, since stock
	// clients come back to public servers by HTTPS alone.
	if out, err := exec.Command("ip", "addr", "replace", privateIP+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v: %s", err, out)
	}
	serveStock(t, "-ip", privateIP).do("info", nil, &info)
	relay := info.DERPMap.Regions["900"].Nodes[0]

	ln, err := net.Listen("tcp", privateIP+":0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = ln.Addr().String()
	ln.Close()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(h.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("relays.yaml", fmt.Sprintf(`regions:
  900:
    regionid: 900
    regioncode: test
    regionname: Test
    nodes:
      - {name: 900a, regionid: 900, hostname: %[1]s, ipv4: %[1]s, ipv6: none, derpport: %[2]v, stunport: %[3]v, stuntestip: %[1]s, insecurefortests: true}
`, privateIP, relay["DERPPort"], relay["STUNPort"]))
	write("config.yaml", fmt.Sprintf(`server_url: http://%[1]s
listen_addr: %[1]s
metrics_listen_addr: ""
noise: {private_key_path: %[2]s/noise.key}
prefixes: {v4: 100.64.0.0/10, v6: "fd7a:115c:a1e0::/48"}
derp: {server: {enabled: false}, urls: [], paths: [%[2]s/relays.yaml], auto_update_enabled: false}
disable_check_updates: true
database: {type: sqlite, sqlite: {path: %[2]s/db.sqlite}}
dns: {magic_dns: true, base_domain: hs.test, override_local_dns: false}
policy: {mode: file, path: %[2]s/policy.hujson}
unix_socket: %[2]s/cli.sock
`, h.addr, h.dir))
	h.policy(openACL)
	h.start()
	t.Cleanup(h.stop)
	h.cli(nil, "users", "create", "alice")
	return h
}

const openACL = `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`

// policy writes the policy file, and says so to a server that runs.
func (h *headscale) policy(text string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.dir, "policy.hujson"), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	if h.cmd != nil {
		h.cmd.Process.Signal(syscall.SIGHUP)
	}
}

func (h *headscale) url() string { return "http://" + h.addr }

func (h *headscale) start() {
	h.t.Helper()
	h.cmd = exec.Command(h.program, "serve", "-c", filepath.Join(h.dir, "config.yaml"))
	log, err := os.OpenFile(filepath.Join(logDir(h.t), "headscale.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	h.cmd.Stdout, h.cmd.Stderr = log, log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := h.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	until(h.t, "Headscale", func() bool {
		resp, err := http.Get(h.url() + "/health")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	var answer struct{ PublicKey string }
	resp, err := http.Get(h.url() + "/key?v=131")
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		h.t.Fatal(err)
	}
	h.key = answer.PublicKey
}

func (h *headscale) stop() {
	if h.cmd != nil {
		h.cmd.Process.Kill()
		h.cmd.Wait()
		h.cmd = nil
	}
}

// cli runs a command of the administrator and decodes what it prints.
func (h *headscale) cli(result any, args ...string) {
	h.t.Helper()
	cmd := exec.Command(h.program, append(args, "-c", filepath.Join(h.dir, "config.yaml"), "-o", "json", "--force")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		h.t.Fatalf("headscale %v: %v: %s%s", args, err, out, stderr.Bytes())
	}
	if result != nil {
		if err := json.Unmarshal(out, result); err != nil {
			h.t.Fatalf("headscale %v: %v in %s", args, err, out)
		}
	}
}

// enrolKey creates an enrolment key.
func (h *headscale) enrolKey(flags ...string) string {
	h.t.Helper()
	var key struct{ Key string }
	h.cli(&key, append([]string{"preauthkeys", "create", "-u", "1"}, flags...)...)
	return key.Key
}

// id returns the number of a node.
func (h *headscale) id(name string) string {
	h.t.Helper()
	var list []struct {
		ID   json.Number
		Name string
	}
	h.cli(&list, "nodes", "list")
	for _, n := range list {
		if n.Name == name {
			return n.ID.String()
		}
	}
	h.t.Fatalf("Headscale does not know %s: %+v", name, list)
	return ""
}

// agent starts one of our nodes by the recipe for an existing Headscale: its
// URL and a key, and since the URL is plain HTTP the pin.
func (h *headscale) agent(name string, options ...func(*mesh.Node)) *agent {
	h.t.Helper()
	a := &agent{&mesh.Node{
		Hostname: name, ControlURL: h.url(), ControlKey: h.key, AuthKey: h.enrolKey(),
		Dir: filepath.Join(h.t.TempDir(), name), Logger: meshtest.Logger(h.t).Named(name),
	}, h.t}
	for _, o := range options {
		o(a.Node)
	}
	h.t.Cleanup(func() { a.Close() })
	meshtest.Up(h.t, a.Node)
	a.services()
	return a
}

// Our nodes and a stock node on Headscale: both paths, both families, much
// data, a server that restarts meanwhile, policy, expiry, deletion.
func TestOnHeadscale(t *testing.T) {
	h := startHeadscale(t)
	wrong := &mesh.Node{Hostname: "wrong", ControlURL: h.url(), ControlKey: h.key, AuthKey: "hskey-auth-wrong", Ephemeral: true}
	defer wrong.Close()
	if _, err := wrong.Up(t.Context()); err == nil || errors.Is(err, t.Context().Err()) {
		t.Errorf("with a wrong key: %v", err)
	} else {
		t.Log("with a wrong key:", err)
	}
	a, b := h.agent("a"), h.agent("b", func(n *mesh.Node) { n.RelayOnly = true })
	laptop := stock(t, "laptop", h.url(), h.enrolKey(), nil)
	laptop.up()
	laptop.services()
	all := []member{a, b, laptop}
	know(t, all...)
	for _, six := range []bool{false, true} {
		for _, from := range all {
			for _, to := range all {
				if from != to {
					talk(t, from, to, six)
				}
			}
		}
	}
	until(t, "a direct path", func() bool { return a.pathTo(laptop) == "direct" && laptop.pathTo(a) == "direct" })
	if p := b.pathTo(laptop); p != "relay" {
		t.Errorf("the path of a node that stays on relays is %q", p)
	}
	size := int64(64 << 20)
	if testing.Short() {
		size = 4 << 20
	}
	transfer(t, a, laptop, size)
	transfer(t, laptop, a, size)
	transfer(t, b, a, size)
	transfer(t, laptop, b, size)
	if who := whoAmI(t, laptop, a, false); who.User != "alice" && !strings.HasPrefix(who.User, "alice@") {
		t.Errorf("the stock node is %+v to ours", who)
	}

	line := dialEcho(t, a.Node, port(b, false, 7))
	h.stop()
	until(t, "the outage to be noticed", func() bool { return a.Status().Control != "" && b.Status().Control != "" })
	line.works("while Headscale is away")
	talk(t, b, laptop, false)
	h.start()
	until(t, "Headscale to be back", func() bool { return a.Status().Control == "" && b.Status().Control == "" })
	line.works("after Headscale was away")
	late := h.agent("late")
	know(t, late, a, b)
	talk(t, late, a, false)

	// A node that starts again is the one that it was.
	before := late.Status().Self
	late.Close()
	again := &agent{&mesh.Node{Hostname: "late", ControlURL: h.url(), ControlKey: h.key, Dir: late.Dir, Logger: late.Logger}, t}
	defer again.Close()
	meshtest.Up(t, again.Node)
	if after := again.Status().Self; after.Key != before.Key || after.Addresses[0] != before.Addresses[0] {
		t.Errorf("it was %+v and is %+v", before, after)
	}
	again.services()
	know(t, again, a)

	// Policy: b no longer reaches a, and sees it no more.
	h.policy(fmt.Sprintf(`{"hosts": {"a": "%s/32", "laptop": "%s/32"}, "acls": [{"action": "accept", "src": ["a", "laptop"], "dst": ["*:*"]}]}`, a.at(false), laptop.at(false)))
	until(t, "the new policy to hide late from b", func() bool { _, ok := b.peer("late"); return !ok })
	talk(t, a, laptop, false)
	if _, err := b.Dial(t.Context(), "tcp", port(again, false, 7)); !errors.Is(err, mesh.ErrUnknownHost) {
		t.Errorf("b dials a peer that it may not see: %v", err)
	}
	if _, err := b.Dial(t.Context(), "tcp", port(a, false, 7)); !errors.Is(err, mesh.ErrDenied) {
		t.Errorf("b dials a peer that may only dial it: %v", err)
	}
	h.policy(openACL)
	until(t, "the old policy", func() bool { _, ok := b.peer("late"); return ok })
	talk(t, b, a, false)

	// Expiry: nobody talks with late any more, and it hears why.
	cut := dialEcho(t, a.Node, port(again, false, 7))
	h.cli(nil, "nodes", "expire", "-i", h.id("late"))
	until(t, "the expired node to end", func() bool {
		_, err := again.Dial(t.Context(), "tcp", port(a, false, 7))
		return errors.Is(err, mesh.ErrKeyExpired)
	})
	cut.ends("the expiry of its peer")

	// Deletion: peers drop the node at once. It hears of that only when it says
	// or asks something, for Headscale keeps its stream; and then stays out.
	cut = dialEcho(t, a.Node, port(b, false, 7))
	h.cli(nil, "nodes", "delete", "-i", h.id("b"))
	until(t, "the deleted node to be gone at a", func() bool { _, ok := a.peer("b"); return !ok })
	cut.ends("the deletion of its peer")
	h.stop()
	h.start()
	until(t, "the deleted node to end", func() bool { _, err := b.Up(t.Context()); return errors.Is(err, mesh.ErrNeedsLogin) })
	until(t, "a to be back", func() bool { return a.Status().Control == "" })
	know(t, a, laptop)
	talk(t, a, laptop, true)
	laptop.stop()
	h.stop()
}
