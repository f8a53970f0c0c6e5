package natlab

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/internal/actor"
)

// A relay that is told to end sends the nodes to another one before it goes, of
// another region or of its own: a relayed connection hardly notices, and none loses
// a byte. UDP is blocked, so that relays are what is left.
func TestRelayDrains(t *testing.T) {
	exe := filepath.Join(t.TempDir(), "mesh")
	if out, err := exec.Command("go", "build", "-o", exe, "mesh/cmd/mesh").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, regions := range map[string][2]int{"to another region": {901, 902}, "within its region": {905, 905}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			relayDrains(t, exe, regions)
		})
	}
}

func relayDrains(t *testing.T, exe string, regions [2]int) {
	const drain = 10 * time.Second
	w := newWorld(t, func(w *world) { w.config.Relay = false })
	key := w.newKey(admin.KeyCreate{Relay: true})
	relays := make(map[string]*meshRelay) // by address
	for i, name := range []string{"relayone", "relaytwo"} {
		h := w.Public(name)
		relays[h.IPv4.String()] = w.meshRelay(exe, h, key, regions[i], drain)
	}
	at := w.at(place(UDPBlocked), "a")
	a := w.node("na", at)
	b := w.node("nb", w.at(place(Home), "b"))
	w.await(a, b)
	var before actor.Beaten
	a.Must("beat", actor.Beat{Addr: "nb:7", For: actor.Patience / 2, Until: "relay"}, &before)
	if before.Path != "relay" {
		t.Fatalf("the path is %q; %+v", before.Path, before)
	}
	region := func() int {
		var st mesh.Status
		a.Must("status", nil, &st)
		for _, p := range st.Peers {
			if p.ShortName() == "nb" {
				return p.Path.Relay
			}
		}
		return 0
	}
	home := region()
	// The relay by which a is reached: the one that it is connected to, or in two
	// regions the one of its home.
	var ending *meshRelay
	for addr, r := range relays {
		if r.region == home && at.connectedTo(addr+":443") {
			ending = r
		}
	}
	if ending == nil {
		t.Fatalf("by relay %d", home)
	}
	a.Must("flow", "nb:7", nil)
	during := make(chan actor.Beaten, 1)
	go func() {
		var b actor.Beaten
		a.Must("beat", actor.Beat{Addr: "nb:7", For: drain + 10*time.Second, Still: drain + 5*time.Second, Until: "relay"}, &b)
		during <- b
	}()
	time.Sleep(500 * time.Millisecond) // so that the connection is under way
	began := time.Now()
	ending.terminate(t)
	took := time.Since(began)
	got := <-during
	if err := a.Call(t.Context(), "endflow", nil, nil); err != nil {
		t.Errorf("the other connection: %v", err)
	}
	if got.Error != "" {
		t.Errorf("the connection broke: %s", got.Error)
	}
	const goal = 300 * time.Millisecond
	if got.Gap > 10*goal {
		t.Errorf("it stood still for %v, more than ten times %v", got.Gap, goal)
	}
	for addr, r := range relays {
		if r != ending && (region() != r.region || !at.connectedTo(addr+":443")) {
			t.Errorf("by relay %d, and not the one that stays", region())
		}
	}
	if took >= drain {
		t.Errorf("the relay took %v to end: the nodes did not move", took)
	}
	t.Logf("relay %d ended after %v; the connection stood still for %v (goal %v), well after %v", home, took.Round(time.Millisecond), round(got.Gap), goal, round(got.Well))
}

// meshRelay is a process of the program `mesh relay`.
type meshRelay struct {
	cmd    *exec.Cmd
	region int
}

// meshRelay starts one on a host, and waits until the control server knows it.
func (w *world) meshRelay(exe string, h *Host, key string, region int, drain time.Duration) *meshRelay {
	w.t.Helper()
	args := append(h.Wrap(), exe, "relay", "--data", filepath.Join(w.dir, h.NS), "--listen", net.JoinHostPort(h.IPv4.String(), "443"),
		"--control", w.ready.URL, "--control-key", w.ready.Key, "--region", fmt.Sprint(region), "--drain", drain.String())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "MESH_RELAY_KEY="+key)
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "announced") {
			go io.Copy(io.Discard, out) // until the process ends
			return &meshRelay{cmd, region}
		}
	}
	w.t.Fatalf("mesh relay ended: %v", cmd.Wait())
	return nil
}

// terminate asks the process to end, and waits until it has.
func (r *meshRelay) terminate(t *testing.T) {
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("mesh relay: %v", err)
	}
}

// connectedTo reports whether the host has a TCP connection to an address.
func (h *Host) connectedTo(addr string) bool {
	out, err := exec.Command("ip", "netns", "exec", h.NS, "ss", "-Htn", "state", "established", "dst", addr).Output()
	return err == nil && len(bytes.TrimSpace(out)) > 0
}
