package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mesh"
	"mesh/control/admin"
	"mesh/control/host"
	"mesh/derp"
	"mesh/identity"
	"mesh/internal/actor"
	"mesh/internal/meshtest"
)

// relayDoor is how a node reaches relays: it notes which one it reached last,
// and keeps it from one.
type relayDoor struct {
	control string
	mu      sync.Mutex // guards what follows
	last    string
	shut    string
}

func (d *relayDoor) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	shut := d.shut == addr
	d.mu.Unlock()
	if shut {
		return nil, errors.New("this node is kept from there")
	}
	c, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err == nil && addr != d.control {
		d.mu.Lock()
		d.last = addr
		d.mu.Unlock()
	}
	return c, err
}

func (d *relayDoor) at() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

func (d *relayDoor) keepFrom(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shut = addr
}

// talk is a connection on which numbers go there and back, one after the other.
type talk struct {
	stop chan struct{}
	end  chan error
	mu   sync.Mutex // guards what follows
	last time.Time
	gap  time.Duration
}

func startTalk(t testing.TB, from *mesh.Node, addr string) *talk {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	c, err := actor.Open(ctx, from, addr)
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{stop: make(chan struct{}), end: make(chan error, 1), last: time.Now()}
	go func() {
		defer c.Close()
		buf := make([]byte, 1000)
		for i := uint64(0); ; i++ {
			select {
			case <-k.stop:
				k.end <- nil
				return
			case <-time.After(5 * time.Millisecond):
			}
			c.SetDeadline(time.Now().Add(meshtest.Patience))
			binary.BigEndian.PutUint64(buf, i)
			_, err := c.Write(buf)
			if err == nil {
				_, err = io.ReadFull(c, buf)
			}
			if err == nil && binary.BigEndian.Uint64(buf) != i {
				err = fmt.Errorf("%d came back", binary.BigEndian.Uint64(buf))
			}
			if err != nil {
				k.end <- fmt.Errorf("number %d: %w", i, err)
				return
			}
			k.mu.Lock()
			k.gap, k.last = max(k.gap, time.Since(k.last)), time.Now()
			k.mu.Unlock()
		}
	}()
	return k
}

// worst returns the longest silence since the last call, once something came
// after now.
func (k *talk) worst(t testing.TB) time.Duration {
	t.Helper()
	asked := time.Now()
	meshtest.Until(t, "the connection to go on", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.last.After(asked)
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	gap := k.gap
	k.gap = 0
	return gap
}

func (k *talk) close(t testing.TB) {
	t.Helper()
	close(k.stop)
	if err := <-k.end; err != nil {
		t.Errorf("the connection: %v", err)
	}
}

// echo makes a node answer at a port as actor.Open expects.
func echo(t testing.TB, n *mesh.Node) {
	t.Helper()
	l, err := n.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				p, _ := mesh.PeerOf(c)
				fmt.Fprintln(c, p.Name)
				io.Copy(struct{ io.Writer }{c}, c)
			})
		}
	})
	t.Cleanup(func() {
		n.Close()
		wg.Wait()
	})
}

func connectedRelays(t testing.TB, m *meshtest.Mesh) (n int) {
	t.Helper()
	relays, err := m.Admin.Relays(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range relays {
		if r.Connected && !r.Draining {
			n++
		}
	}
	return n
}

// Two relays serve one region, as processes, and nodes without direct paths are
// at different ones. One drains: connections hardly notice. One is killed:
// they go on within seconds. Nobody changes region.
func TestRelaysOfOneRegion(t *testing.T) {
	m := meshtest.Start(t, openPolicy, func(c *host.Config) { c.NoRelay = true })
	key := m.Key(admin.KeyCreate{Relay: true})
	dir := t.TempDir()
	start := func(name string) *actor.Process {
		return actor.Start(t, "relay", name, actor.RelayConfig{
			DataDir: filepath.Join(dir, name), ControlURL: m.Host.URL(), RelayKey: key,
			Listen: "127.0.0.1:0", STUN: "127.0.0.1:0", Region: 905, Drain: meshtest.Patience / 2,
		}, nil)
	}
	doors := map[string]*relayDoor{}
	node := func(name string) *mesh.Node {
		d := &relayDoor{control: m.Host.Addr()}
		doors[name] = d
		return m.Node(name, []string{"tag:a"}, func(n *mesh.Node) { n.RelayOnly, n.DialTCP = true, d.dial })
	}
	one := start("one")
	a := node("a")
	meshtest.Up(t, a)
	first := doors["a"].at()
	two := start("two")
	b := node("b")
	doors["b"].keepFrom(first)
	meshtest.Up(t, b)
	second := doors["b"].at()
	if first == second || first == "" {
		t.Fatalf("both at %q", first)
	}
	echo(t, a)
	echo(t, b)
	ab, ba := startTalk(t, a, "b:7"), startTalk(t, b, "a:7")
	both := func() time.Duration { return max(ab.worst(t), ba.worst(t)) }
	t.Logf("through two relays: longest silence %v", both())
	if got := doors["a"].at(); got != first {
		t.Fatalf("a moved to %s by itself", got)
	}

	began := time.Now()
	one.Stop() // returns when it has ended
	t.Logf("drained in %v: longest silence %v", time.Since(began), both())
	if got := doors["a"].at(); got != second {
		t.Errorf("a is at %s, the relay that stays is %s", got, second)
	}
	if n := connectedRelays(t, m); n != 1 {
		t.Errorf("%d relays", n)
	}

	one = start("one") // on another port
	meshtest.Until(t, "two relays", func() bool { return connectedRelays(t, m) == 2 })
	two.Kill()
	gap := both()
	t.Logf("killed: longest silence %v", gap)
	for name, d := range doors {
		if d.at() == second || d.at() == first {
			t.Errorf("%s is at a relay that is gone", name)
		}
	}
	for _, n := range []*mesh.Node{a, b} {
		for _, p := range n.Status().Peers {
			if p.Path.Relay != 905 {
				t.Errorf("%s reaches %s by relay %d", n.Hostname, p.Name, p.Path.Relay)
			}
		}
	}
	ab.close(t)
	ba.close(t)
	a.Close()
	b.Close()
	one.Stop()
}

// fleetRelay starts a relay in this process.
func fleetRelay(t testing.TB, dir, url, key, listen string) *host.Relay {
	t.Helper()
	r, err := host.StartRelay(host.RelayConfig{
		DataDir: dir, ControlURL: url, RelayKey: key, Listen: listen, STUN: "off", Region: 905, Logger: meshtest.Logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func dialFleet(t testing.TB, r *host.Relay, key identity.NodePrivate) (*derp.Client, error) {
	t.Helper()
	return derp.Dial(t.Context(), derp.ClientConfig{Key: key, Target: derp.Target{
		Region: 905, HostName: "127.0.0.1", Addr: r.Addr(), InsecureForTests: true,
	}})
}

// A node that is removed is cut at every relay, also where it came by another
// one's word; and a relay admits whom it knows while the control server is away,
// also after a restart of all, and nobody else.
func TestRelayFleetAdmission(t *testing.T) {
	m := meshtest.Start(t, openPolicy, func(c *host.Config) { c.NoRelay = true })
	key := m.Key(admin.KeyCreate{Relay: true})
	url := m.Host.URL()
	dirs := []string{t.TempDir(), t.TempDir()}
	var fleet [2]*host.Relay
	for i := range fleet {
		fleet[i] = fleetRelay(t, dirs[i], url, key, "127.0.0.1:0")
		<-fleet[i].Announced()
	}
	meshed := func() bool { return fleet[0].Stats().MeshPeers == 1 && fleet[1].Stats().MeshPeers == 1 }
	meshtest.Until(t, "the relays to find each other", meshed)
	bad, good := enrolRaw(t, m, "bad", []string{"tag:a"}), enrolRaw(t, m, "good", []string{"tag:a"})
	gone := make(chan time.Time, len(fleet))
	for _, r := range fleet {
		var c *derp.Client
		meshtest.Until(t, "the relay to know the node", func() (ok bool) {
			var err error
			c, err = dialFleet(t, r, bad.state.Node)
			return err == nil
		})
		defer c.Close()
		go func() {
			for {
				if _, err := c.Recv(); err != nil {
					gone <- time.Now()
					return
				}
			}
		}()
	}
	began := time.Now()
	if err := m.Admin.RemoveNode(t.Context(), "bad"); err != nil {
		t.Fatal(err)
	}
	for range fleet {
		select {
		case at := <-gone:
			t.Logf("cut off %v after the order", at.Sub(began))
		case <-time.After(meshtest.Patience):
			t.Fatal("a removed node stays connected")
		}
	}

	m.Stop()
	addrs := []string{fleet[0].Addr(), fleet[1].Addr()}
	for i := range fleet {
		fleet[i].Close()
		info, err := os.Stat(filepath.Join(dirs[i], "keys", "mesh.json"))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the secret of the region: %v %v", info, err)
		}
		fleet[i] = fleetRelay(t, dirs[i], url, key, addrs[i])
	}
	meshtest.Until(t, "the relays to find each other again", meshed)
	var clients []*derp.Client
	for _, r := range fleet {
		if _, err := dialFleet(t, r, bad.state.Node); !errors.Is(err, derp.ErrNotAdmitted) {
			t.Errorf("a removed node: %v", err)
		}
		if _, err := dialFleet(t, r, identity.NewNode()); !errors.Is(err, derp.ErrNotAdmitted) {
			t.Errorf("a stranger: %v", err)
		}
		c, err := dialFleet(t, r, good.state.Node)
		if err != nil {
			t.Fatalf("a member: %v", err)
		}
		clients = append(clients, c)
	}
	for _, c := range clients {
		c.Close()
	}

	// What it never heard, or cannot read, is nobody.
	spoilt := t.TempDir()
	if err := os.MkdirAll(filepath.Join(spoilt, "keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(spoilt, "keys", "members.json"), []byte(`["`+good.state.Node.Public().String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{t.TempDir(), spoilt} {
		r := fleetRelay(t, dir, url, key, "127.0.0.1:0")
		if _, err := dialFleet(t, r, good.state.Node); !errors.Is(err, derp.ErrNotAdmitted) || r.Members() != 0 {
			t.Errorf("a relay that never heard from control: %v, %d members", err, r.Members())
		}
	}
}
