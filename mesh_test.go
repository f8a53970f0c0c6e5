package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mesh/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSplitAddr(t *testing.T) {
	for addr, want := range map[string]struct {
		host string
		port uint16
		bad  bool
	}{
		"db:5432": {host: "db", port: 5432}, "db.mesh.internal.:80": {host: "db.mesh.internal.", port: 80},
		":80": {port: 80}, "db:": {host: "db"}, "db:0": {host: "db"}, "[fd7a::1]:80": {host: "fd7a::1", port: 80},
		"100.64.0.1:65535": {host: "100.64.0.1", port: 65535}, "db:http": {host: "db", port: 80},
		"db": {bad: true}, "": {bad: true}, "db:65536": {bad: true}, "db:-1": {bad: true}, "fd7a::1:80": {bad: true},
		"db:no-such-service": {bad: true}, "db:80 ": {bad: true},
	} {
		host, port, err := splitAddr("tcp", addr)
		if (err != nil) != want.bad || err == nil && (host != want.host || port != want.port) {
			t.Errorf("%q: %q, %d, %v", addr, host, port, err)
		}
	}
}

func TestSplitNetwork(t *testing.T) {
	for network, want := range map[string]string{"tcp": "tcp ", "tcp4": "tcp 4", "udp6": "udp 6", "unix": " ", "tcp5": " ", "TCP": " ", "": " ", "ip4": " "} {
		proto, family, err := splitNetwork(network)
		if got := proto + " " + family; got != want || (err != nil) != (proto == "") {
			t.Errorf("%q: %q, %v", network, got, err)
		}
	}
}

func TestDirName(t *testing.T) {
	for hostname, want := range map[string]string{"db": "db", "DB": "db", "my-db_2": "my-db_2", "": "node"} {
		if got := dirName(hostname); got != want {
			t.Errorf("%q: %q", hostname, got)
		}
	}
	seen := map[string]string{}
	for _, hostname := range []string{"a.b", "a-b", "a/b", "../a", "..", ".", "/", "-", "日本", "中国", "a b", "a\x00b", strings.Repeat("x", 63), strings.Repeat("x", 64), strings.Repeat("x", 300)} {
		got := dirName(hostname)
		if got != filepath.Base(got) || got == "." || got == ".." || len(got) > 80 || strings.ContainsAny(got, `./\: `) {
			t.Errorf("%q: %q is no plain file name", hostname, got)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q share %q", hostname, other, got)
		}
		seen[got] = hostname
	}
}

func TestConfigure(t *testing.T) {
	for _, v := range []string{"CONTROL_URL", "CONTROL_KEY", "AUTHKEY", "HOSTNAME", "STATE_DIR", "EPHEMERAL", "TAGS"} {
		t.Setenv("MESH_"+v, "")
	}
	pin := identity.NewMachine().Public()
	for _, tc := range []struct {
		name string
		node *Node
		env  map[string]string
		want string // hostname, url, key, ephemeral, tags
		err  string
	}{
		{name: "nothing", node: &Node{}, err: "set Node.ControlURL or MESH_CONTROL_URL"},
		{name: "fields", node: &Node{Hostname: "db", ControlURL: "http://x", AuthKey: "k", Tags: []string{"tag:a"}, Ephemeral: true}, want: "db http://x k true [tag:a]"},
		{name: "environment", node: &Node{}, env: map[string]string{"HOSTNAME": "db", "CONTROL_URL": " http://x\n", "AUTHKEY": "k\n", "EPHEMERAL": "1", "TAGS": "tag:a, tag:b,,"}, want: "db http://x k true [tag:a tag:b]"},
		{name: "fields first", node: &Node{Hostname: "db", ControlURL: "http://x", AuthKey: "k", Tags: []string{}}, env: map[string]string{"HOSTNAME": "no", "CONTROL_URL": "http://no", "AUTHKEY": "no", "EPHEMERAL": "false", "TAGS": "tag:no"}, want: "db http://x k false []"},
		{name: "program's name", node: &Node{ControlURL: "http://x"}, want: strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe") + " http://x  false []"},
		{name: "pin", node: &Node{Hostname: "db", ControlURL: "http://x", ControlKey: pin.String()}, want: "db http://x  false []"},
		{name: "bad pin", node: &Node{ControlURL: "http://x"}, env: map[string]string{"CONTROL_KEY": "mkey:123"}, err: "Node.ControlKey or MESH_CONTROL_KEY"},
		{name: "bad flag", node: &Node{ControlURL: "http://x"}, env: map[string]string{"EPHEMERAL": "maybe"}, err: `MESH_EPHEMERAL: want true or false, got "maybe"`},
		{name: "bad tag", node: &Node{ControlURL: "http://x"}, env: map[string]string{"TAGS": "web"}, err: `tag "web": want "tag:NAME"`},
		{name: "empty tag", node: &Node{ControlURL: "http://x", Tags: []string{"tag:"}}, err: `want "tag:NAME"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for k, v := range tc.env {
				t.Setenv("MESH_"+k, v)
			}
			c, err := tc.node.configure()
			if err != nil || tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v", err)
				}
				return
			}
			if got := fmt.Sprintf("%s %s %s %v %v", c.Hostname, c.ControlURL, c.AuthKey, c.Ephemeral, c.Tags); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
			if tc.node.ControlKey != "" && c.ControlKey != pin {
				t.Errorf("pin %v", c.ControlKey)
			}
		})
	}
}

func TestWhereStateIs(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("MESH_STATE_DIR", filepath.Join(dir, "env"))
	own := new(identity.MemoryStore)
	for _, tc := range []struct {
		node *Node
		want string // the directory that is made, "" for none
	}{
		{&Node{}, "env"},
		{&Node{Dir: filepath.Join(dir, "field")}, "field"},
		{&Node{Dir: filepath.Join(dir, "never"), Ephemeral: true}, ""},
		{&Node{Dir: filepath.Join(dir, "never"), Store: own}, ""},
	} {
		tc.node.ControlURL = "http://x"
		c, err := tc.node.configure()
		if err != nil {
			t.Fatal(err)
		}
		store, closeStore, err := c.OpenStore()
		if err != nil {
			t.Fatal(err)
		}
		if (store == own) != (tc.node.Store != nil) {
			t.Errorf("store %T", store)
		}
		if _, err := os.Stat(filepath.Join(dir, tc.want)); err != nil {
			t.Error(err)
		}
		if tc.want != "" {
			if _, _, err := c.OpenStore(); err == nil {
				t.Error("two nodes share a directory")
			}
		}
		if err := closeStore(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "never")); err == nil {
		t.Error("a node that keeps nothing made a directory")
	}
}

// wrapper is a connection in another, as *tls.Conn is.
type wrapper struct{ net.Conn }

func (w *wrapper) NetConn() net.Conn { return w.Conn }

func TestPeerOf(t *testing.T) {
	who := identity.Peer{Name: "db", Key: identity.NewNode().Public()}
	c := &Conn{peer: who}
	loop := new(wrapper)
	loop.Conn = loop
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	for name, tc := range map[string]struct {
		c    net.Conn
		want bool
	}{
		"plain": {c, true}, "TLS": {tls.Client(c, &tls.Config{ServerName: "db"}), true},
		"twice": {&wrapper{tls.Server(&wrapper{c}, new(tls.Config))}, true},
		"nil":   {nil, false}, "empty": {&wrapper{nil}, false}, "foreign": {pipe, false}, "loop": {loop, false},
	} {
		p, ok := PeerOf(tc.c)
		if ok != tc.want || ok && p.Key != who.Key {
			t.Errorf("%s: %v, %v", name, p, ok)
		}
		p, ok = PeerFromContext(ConnContext(context.Background(), tc.c))
		if ok != tc.want || ok && p.Key != who.Key {
			t.Errorf("%s in context: %v, %v", name, p, ok)
		}
	}
	if _, ok := PeerFromContext(context.Background()); ok {
		t.Error("a peer out of nothing")
	}
}

func TestAddrPortOf(t *testing.T) {
	ap := netip.MustParseAddrPort("100.64.0.1:53")
	for _, a := range []net.Addr{&Addr{AddrPort: ap}, net.UDPAddrFromAddrPort(ap)} {
		if got, ok := addrPortOf(a); !ok || got != ap {
			t.Errorf("%v: %v, %v", a, got, ok)
		}
	}
	for _, a := range []net.Addr{nil, (*Addr)(nil), (*net.UDPAddr)(nil), &net.UnixAddr{}, nameAddr{"udp", "x:1"}} {
		if _, ok := addrPortOf(a); ok {
			t.Errorf("%T is an address of the mesh", a)
		}
	}
}

// nowhere is a node whose control server cannot be reached; it dials through
// dial.
func nowhere(t *testing.T, dial func(ctx context.Context, network, addr string) (net.Conn, error)) *Node {
	n := &Node{Hostname: "x", ControlURL: "http://127.0.0.1:9", Store: new(identity.MemoryStore), DialTCP: dial}
	t.Cleanup(func() { n.Close() })
	return n
}

func refuse(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }

func hang(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// What cannot work is refused before anything starts.
func TestBadCallsStartNothing(t *testing.T) {
	n := nowhere(t, func(context.Context, string, string) (net.Conn, error) {
		t.Error("the control server was dialled")
		return nil, syscall.ECONNREFUSED
	})
	for _, c := range []struct{ network, addr string }{
		{"unix", "db:80"}, {"tcp", "db"}, {"tcp", ":80"}, {"tcp", "db:0"}, {"tcp", "db:"}, {"tcp", "db:x"}, {"ip", "db:1"},
	} {
		_, err := n.Dial(t.Context(), c.network, c.addr)
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "dial" || op.Addr.String() != c.addr {
			t.Errorf("dial %v: %v", c, err)
		}
	}
	for _, c := range []struct{ network, addr string }{{"udp", ":80"}, {"tcp", "80"}, {"tcp", ":x"}} {
		if _, err := n.Listen(c.network, c.addr); err == nil {
			t.Errorf("listen %v", c)
		}
	}
	if _, err := n.ListenPacket("tcp", ":80"); err == nil {
		t.Error("datagrams over TCP")
	}
	if st := n.Status(); st.Running || st.Control != "not started" {
		t.Errorf("status %+v", st)
	}
	if _, ok := n.WhoIs(netip.MustParseAddrPort("100.64.0.1:1")); ok {
		t.Error("who is who before the start")
	}
}

func TestFailedStartMayBeRepeated(t *testing.T) {
	n := nowhere(t, refuse)
	for range 3 {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := n.Listen("tcp", ":80"); !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "control server unreachable") {
					t.Errorf("listen: %v", err)
				}
			})
		}
		wg.Wait()
	}
}

func TestDeadlineSaysWhatItWaitedFor(t *testing.T) {
	n := nowhere(t, hang)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err := n.Dial(ctx, "tcp", "db:80")
	var timeout net.Error
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() || !strings.Contains(err.Error(), "waiting for control server http://127.0.0.1:9") {
		t.Errorf("dial: %v", err)
	}
	if st := n.Status(); st.Control != "starting" {
		t.Errorf("status %+v", st)
	}
}

// Close while everything waits for a start that hangs.
func TestCloseWhileStarting(t *testing.T) {
	dialling := make(chan struct{}, 10)
	n := nowhere(t, func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialling <- struct{}{}
		return hang(ctx, network, addr)
	})
	errs := make(chan error)
	go func() { _, err := n.Up(context.Background()); errs <- err }()
	go func() { _, err := n.Dial(context.Background(), "tcp", "db:80"); errs <- err }()
	go func() { _, err := n.Listen("tcp", ":80"); errs <- err }()
	go func() { _, err := n.HTTPClient().Get("http://db/"); errs <- err }()
	<-dialling
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := n.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
	for range 4 {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("ended with %v", err)
		}
	}
	wg.Wait()
	checkClosed(t, n)
}

func TestCloseBeforeStart(t *testing.T) {
	n := new(Node)
	for range 2 {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	checkClosed(t, n)
}

func checkClosed(t *testing.T, n *Node) {
	t.Helper()
	ctx := context.Background()
	_, err1 := n.Up(ctx)
	_, err2 := n.Dial(ctx, "tcp", "db:80")
	_, err3 := n.Listen("tcp", ":80")
	_, err4 := n.ListenPacket("udp", ":80")
	_, err5 := n.HTTPClient().Get("http://db/")
	for i, err := range []error{err1, err2, err3, err4, err5} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("call %d after close: %v", i+1, err)
		}
	}
	if st := n.Status(); st.Running || st.Control != net.ErrClosed.Error() {
		t.Errorf("status %+v", st)
	}
}

// The HTTP client knows no proxy: it would leave the mesh.
func TestHTTPClientHasNoProxy(t *testing.T) {
	tr, ok := new(Node).HTTPClient().Transport.(*http.Transport)
	if !ok || tr.Proxy != nil || tr.DialContext == nil {
		t.Errorf("transport %+v", tr)
	}
}

func TestPeerOfflineError(t *testing.T) {
	err := error(&PeerOfflineError{Peer: identity.Peer{Name: "db"}, LastSeen: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)})
	if !errors.Is(err, ErrPeerOffline) || err.Error() != "db is offline, last seen 2026-05-01T12:00:00Z" {
		t.Errorf("%v", err)
	}
	if err := (&PeerOfflineError{Peer: identity.Peer{Name: "db"}}).Error(); err != "db is offline" {
		t.Error(err)
	}
}
