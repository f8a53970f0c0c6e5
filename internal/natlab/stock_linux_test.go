package natlab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mesh/internal/actor"
)

// stockNode is a stock client on a host: the stock program of the modules below
// internal/interop, which set MESH_STOCK. One request at a time.
type stockNode struct {
	t    testing.TB
	name string
	ip   netip.Addr

	mu  sync.Mutex // guards what follows
	in  io.WriteCloser
	out *bufio.Reader
	id  int64
}

// stock starts a stock client on a host; it serves an echo at port 7.
func (w *world) stock(name string, h *Host) *stockNode {
	w.t.Helper()
	args := append(h.Wrap(), os.Getenv("MESH_STOCK"), "node", "-hostname", name, "-control", w.ready.URL,
		"-authkey", w.key, "-dir", filepath.Join(w.dir, name))
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "TS_NO_LOGS_NO_SUPPORT=true", "HOME="+w.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatalf("start the stock client: %v", err)
	}
	w.t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	n := &stockNode{t: w.t, name: name, in: in, out: bufio.NewReaderSize(out, 1<<20)}
	var st struct{ TailscaleIPs []netip.Addr }
	n.must("up", nil, &st)
	n.ip = st.TailscaleIPs[0]
	n.must("serve", map[string]any{"Kind": "echo", "Port": 7}, nil)
	return n
}

func (n *stockNode) try(op string, args, result any) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.id++
	line, err := json.Marshal(map[string]any{"ID": n.id, "Op": op, "Args": args})
	if err != nil {
		return err
	}
	if _, err := n.in.Write(append(line, '\n')); err != nil {
		return err
	}
	for {
		line, err := n.out.ReadBytes('\n')
		if err != nil {
			return err
		}
		var r struct {
			ID     int64
			Error  string
			Result json.RawMessage
		}
		switch {
		case json.Unmarshal(line, &r) != nil || r.ID != n.id: // an event, or some library's chatter
		case r.Error != "":
			return errors.New(r.Error)
		case result == nil || len(r.Result) == 0:
			return nil
		default:
			return json.Unmarshal(r.Result, result)
		}
	}
}

func (n *stockNode) must(op string, args, result any) {
	n.t.Helper()
	if err := n.try(op, args, result); err != nil {
		n.t.Fatalf("stock %s: %s: %v", n.name, op, err)
	}
}

// meet talks to another stock client for a while and tells the path, "direct"
// or "relay".
func (n *stockNode) meet(o *stockNode, limit time.Duration) string {
	conn := "to " + o.name
	if err := n.try("open", map[string]any{"Name": conn, "Addr": o.ip.String() + ":7"}, nil); err != nil {
		return "none: " + err.Error()
	}
	for begin := time.Now(); ; {
		if err := n.try("exchange", map[string]any{"Name": conn, "Bytes": 1000}, nil); err != nil {
			return "none: " + err.Error()
		}
		var p struct {
			Endpoint     string
			DERPRegionID int
		}
		if err := n.try("ping", map[string]any{"Addr": o.ip.String(), "Type": "disco"}, &p); err == nil && p.Endpoint != "" {
			return "direct"
		}
		if time.Since(begin) > limit {
			return "relay"
		}
	}
}

// Where two stock clients are direct, so are two nodes of ours on the same
// hosts.
func TestGridBesideStock(t *testing.T) {
	if os.Getenv("MESH_STOCK") == "" {
		t.Skip("no stock client: run `go test` in internal/interop/v102")
	}
	w := newWorld(t)
	chosen := []place{public, place(PortRestricted), place(Home), place(Bare), place(Symmetric), cgnat, place(UDPBlocked)}
	if testing.Short() {
		chosen = []place{public, place(Home), place(Symmetric), place(UDPBlocked)}
	}
	type side struct {
		ours  *actor.Process
		stock *stockNode
	}
	at := func(letter string) map[place]side {
		sides := make(map[place]side)
		for i, p := range chosen {
			h := w.at(p, fmt.Sprintf("%s%d", letter, i))
			sides[p] = side{w.node(fmt.Sprintf("ours-%s%d", letter, i), h), w.stock(fmt.Sprintf("stock-%s%d", letter, i), h)}
		}
		return sides
	}
	sideA, sideB := at("a"), at("b")
	var all []*actor.Process
	for _, p := range chosen {
		all = append(all, sideA[p].ours, sideB[p].ours)
	}
	w.await(all...)
	var mu sync.Mutex // guards lines
	var lines []string
	var wg sync.WaitGroup
	for i, pa := range chosen {
		wg.Go(func() { // a stock client does one thing at a time
			for _, pb := range chosen[i:] {
				var r actor.Beaten
				until := "direct"
				if outcome(pa, pb) == "R" {
					until = ""
				}
				sideA[pa].ours.Must("beat", actor.Beat{Addr: sideB[pb].ours.Name() + ":7", For: 10 * time.Second, Until: until, Still: 2 * time.Second}, &r)
				theirs := sideA[pa].stock.meet(sideB[pb].stock, 8*time.Second)
				mu.Lock()
				lines = append(lines, fmt.Sprintf("%-16s %-16s ours %-8s stock %s", pa, pb, r.Path, theirs))
				// Where it depends on who begins, and by less than the time that
				// packets take here, luck decides for both.
				if theirs == "direct" && r.Path != "direct" && outcome(pa, pb) != "o" {
					t.Errorf("%s and %s: the stock clients are direct, ours go by %q", pa, pb, r.Path)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(lines)
	t.Logf("\n%s", strings.Join(lines, "\n"))
}
