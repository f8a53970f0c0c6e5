package portmap

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test against a real gateway runs in a child of its own, which is the
// host of a home network: its only way out is the router, another network
// namespace. Nothing of it reaches the machine's network, and all of it is gone
// when the child is.
const labVariable = "MESH_PORTMAP_LAB"

// patience is how long real daemons may take.
const patience = 60 * time.Second

// The system's tables of routes are those of the main thread's namespace, which
// must stay: tests run on other threads.
func init() { runtime.LockOSThread() }

func TestMiniupnpd(t *testing.T) {
	if os.Getenv(labVariable) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root, to make network namespaces")
		}
		for _, tool := range []string{"miniupnpd", "nft", "ip", "unshare", "mount"} {
			if _, err := exec.LookPath(tool); err != nil {
				t.Skip(err)
			}
		}
		cmd := exec.CommandContext(t.Context(), "unshare", "-n", "-m", "--", os.Args[0], "-test.run=^TestMiniupnpd$", "-test.v", "-test.timeout=5m")
		cmd.Env = append(os.Environ(), labVariable+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	lab := newLab(t)
	t.Run("all", lab.testAll)
	t.Run("NAT-PMP", lab.testPMP)
	t.Run("UPnP", lab.testUPnP)
	t.Run("reboot", lab.testReboot)
	t.Run("double NAT", lab.testDoubleNAT)
}

// lab is a home network. The addresses of its internet belong to somebody, but
// the daemon maps nothing with addresses for documentation, and nobody hears.
type lab struct {
	t   *testing.T
	dir string
}

const (
	labRouter   = "192.168.77.1"
	labHost     = "192.168.77.2"
	labExternal = "11.22.33.1"
	labPeer     = "11.22.33.2"
)

func newLab(t *testing.T) *lab {
	l := &lab{t, t.TempDir()}
	l.run("mount", "-t", "tmpfs", "none", "/run")
	l.run("mkdir", "/run/netns")
	for _, line := range strings.Split(`
link set lo up
netns add router
netns add internet
link add eth0 type veth peer name lan netns router
link add wan netns router type veth peer name eth0 netns internet
addr add `+labHost+`/24 dev eth0
link set eth0 up
-n router addr add `+labRouter+`/24 dev lan
-n router addr add `+labExternal+`/24 dev wan
-n router link set lo up
-n router link set lan up
-n router link set wan up
-n internet addr add `+labPeer+`/24 dev eth0
-n internet link set lo up
-n internet link set eth0 up
route add default via `+labRouter, "\n") {
		if line != "" {
			l.run("ip", strings.Fields(line)...)
		}
	}
	l.run("ip", "netns", "exec", "router", "sysctl", "-qw", "net.ipv4.ip_forward=1")
	l.rules()
	return l
}

func (l *lab) run(name string, args ...string) string {
	l.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// rules are those of a home router, with the chains that the daemon fills.
func (l *lab) rules() {
	l.t.Helper()
	file := filepath.Join(l.dir, "rules.nft")
	err := os.WriteFile(file, []byte(`flush ruleset
table inet filter {
	chain input {
		type filter hook input priority 0; policy accept;
		iifname "wan" ct state established,related accept
		iifname "wan" drop
	}
	chain miniupnpd { }
	chain forward {
		type filter hook forward priority 0; policy drop;
		iifname "lan" accept
		ct state established,related accept
		jump miniupnpd
	}
	chain prerouting_miniupnpd { }
	chain postrouting_miniupnpd { }
	chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
	chain postrouting {
		type nat hook postrouting priority 100;
		jump postrouting_miniupnpd
		oifname "wan" masquerade
	}
}
`), 0o600)
	if err != nil {
		l.t.Fatal(err)
	}
	l.run("ip", "netns", "exec", "router", "nft", "-f", file)
}

// daemon runs miniupnpd until the test ends or stop is called.
func (l *lab) daemon(t *testing.T, options ...string) (stop func()) {
	t.Helper()
	conf := filepath.Join(l.dir, "miniupnpd.conf")
	text := strings.Join(append([]string{
		"ext_ifname=wan", "listening_ip=lan", "http_port=0", "secure_mode=yes", "system_uptime=no",
		"notify_interval=600", "uuid=11111111-2222-3333-4444-555555555555", "ipv6_disable=yes",
		"allow 1024-65535 192.168.77.0/24 1024-65535", "deny 0-65535 0.0.0.0/0 0-65535"}, options...), "\n") + "\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := exec.Command("ip", "netns", "exec", "router", "miniupnpd", "-d", "-f", conf, "-P", filepath.Join(l.dir, "pid"))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("the daemon: %s\n%s", log.String(), l.run("ip", "netns", "exec", "router", "nft", "list", "ruleset"))
		}
	}
	t.Cleanup(stop)
	return stop
}

// on calls f with the thread in another network namespace: sockets that it
// opens stay there.
func (l *lab) on(t *testing.T, ns string, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(home)
	away, err := unix.Open("/run/netns/"+ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(away)
	if err := unix.Setns(away, unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	f()
	if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
		panic(err) // this thread must not go on
	}
}

// labHostProgram is the program that wants to be reached.
type labHostProgram struct {
	*Client
	t       *testing.T
	conn    *net.UDPConn
	changed chan struct{}
}

func (l *lab) host(t *testing.T, change func(*Config)) *labHostProgram {
	t.Helper()
	conn, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	h := &labHostProgram{t: t, conn: conn, changed: make(chan struct{}, 100)}
	cfg := Config{
		LocalPort: func() uint16 { return uint16(conn.LocalAddr().(*net.UDPAddr).Port) },
		Changed:   func() { h.changed <- struct{}{} },
	}
	if change != nil {
		change(&cfg)
	}
	h.Client = New(cfg)
	t.Cleanup(func() {
		h.Close()
		conn.Close()
	})
	return h
}

// await waits until good is true of the status; the daemon may not be up yet.
func (h *labHostProgram) await(good func(Status) bool) Status {
	h.t.Helper()
	late := time.After(patience)
	again := time.NewTicker(2 * time.Second)
	defer again.Stop()
	for {
		if st := h.Status(); good(st) {
			return st
		}
		select {
		case <-h.changed:
		case <-again.C:
			// Nothing may be under way when this returns: where the threads
			// change namespaces, the routes of the moment may be others.
			if !good(h.Status()) {
				h.NetworkChanged()
			}
		case <-late:
			h.t.Fatalf("still %+v", h.Status())
		}
	}
}

func (h *labHostProgram) mapped(p Protocol) netip.AddrPort {
	h.t.Helper()
	st := h.await(func(st Status) bool { return st.Err == nil })
	a, ok := h.Mapping()
	if !ok || a != st.External || st.Protocol != p || st.Gateway.String() != labRouter || a.Addr().String() != labExternal {
		h.t.Fatalf("%v, %v, %+v; want one by %s", a, ok, st, p)
	}
	return a
}

// reach sends a datagram from the internet to the mapping and one back.
func (l *lab) reach(h *labHostProgram, to netip.AddrPort) {
	h.t.Helper()
	var peer *net.UDPConn
	l.on(h.t, "internet", func() {
		var err error
		if peer, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(labPeer)}); err != nil {
			h.t.Fatal(err)
		}
	})
	defer peer.Close()
	b := make([]byte, 100)
	for _, c := range []*net.UDPConn{peer, h.conn} {
		c.SetDeadline(time.Now().Add(patience))
	}
	if _, err := peer.WriteToUDPAddrPort([]byte("from outside"), to); err != nil {
		h.t.Fatal(err)
	}
	n, from, err := h.conn.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "from outside" || from.Addr().Unmap().String() != labPeer {
		h.t.Fatalf("%q from %v, %v", b[:n], from, err)
	}
	if _, err := h.conn.WriteToUDPAddrPort([]byte("from inside"), from); err != nil {
		h.t.Fatal(err)
	}
	n, from, err = peer.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "from inside" || netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to {
		h.t.Fatalf("%q from %v, %v", b[:n], from, err)
	}
}

// forwards reports whether the router has a rule for the port.
func (l *lab) forwards(port uint16) bool {
	return strings.Contains(l.run("ip", "netns", "exec", "router", "nft", "-n", "list", "chain", "inet", "filter", "prerouting_miniupnpd"), strconv.Itoa(int(port)))
}

func (l *lab) released(h *labHostProgram, port uint16) {
	h.t.Helper()
	if !l.forwards(port) {
		h.t.Error("the router has no rule for the mapping: the test proves nothing")
	}
	if err := h.Close(); err != nil {
		h.t.Error(err)
	}
	if l.forwards(port) {
		h.t.Error("the mapping was not released")
	}
}

func (l *lab) testAll(t *testing.T) {
	l.daemon(t, "enable_natpmp=yes", "enable_upnp=yes")
	h := l.host(t, nil)
	a := h.mapped(PCP)
	l.reach(h, a)
	r, err := h.Probe(t.Context())
	want := Result{PCP: true, PMP: true, UPnP: true, Gateway: netip.MustParseAddr(labRouter), External: netip.MustParseAddr(labExternal)}
	if err != nil || r != want {
		t.Errorf("probe: %+v, %v", r, err)
	}
	// A second program on the host has its own.
	h2 := l.host(t, nil)
	a2 := h2.mapped(PCP)
	if a2 == a {
		t.Errorf("both have %v", a)
	}
	l.reach(h2, a2)
	l.released(h, a.Port())
	l.reach(h2, a2)
	l.released(h2, a2.Port())
}

// withoutPCP drops what would be PCP.
type withoutPCP struct{ net.PacketConn }

func (c withoutPCP) WriteTo(b []byte, to net.Addr) (int, error) {
	if b[0] == pcpVersion {
		return len(b), nil
	}
	return c.PacketConn.WriteTo(b, to)
}

func (l *lab) testPMP(t *testing.T) {
	l.daemon(t, "enable_natpmp=yes", "enable_upnp=no")
	h := l.host(t, func(c *Config) {
		c.ListenUDP = func(ctx context.Context, network, addr string) (net.PacketConn, error) {
			pc, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
			return withoutPCP{pc}, err
		}
	})
	a := h.mapped(PMP)
	l.reach(h, a)
	l.released(h, a.Port())
}

func (l *lab) testUPnP(t *testing.T) {
	l.daemon(t, "enable_natpmp=no", "enable_upnp=yes")
	h := l.host(t, nil)
	a := h.mapped(UPnP)
	l.reach(h, a)
	// Renewed, it is still the same.
	before := h.Status().Expires
	h.NetworkChanged()
	h.await(func(st Status) bool { return st.Expires.After(before) })
	if b := h.mapped(UPnP); b != a {
		t.Errorf("%v, then %v", a, b)
	}
	l.reach(h, a)
	r, err := h.Probe(t.Context())
	if err != nil || r.PCP || r.PMP || !r.UPnP {
		t.Errorf("probe: %+v, %v", r, err)
	}
	// A port that another program has is not taken from it.
	other := l.host(t, nil)
	b := other.mapped(UPnP)
	l.reach(other, b)
	l.reach(h, a)
	l.released(other, b.Port())
	l.released(h, a.Port())
}

// A router that restarts has forgotten its mappings; the next look mends that.
func (l *lab) testReboot(t *testing.T) {
	stop := l.daemon(t, "enable_natpmp=yes", "enable_upnp=yes")
	h := l.host(t, nil)
	a := h.mapped(PCP)
	l.reach(h, a)
	stop()
	l.rules()
	if l.forwards(a.Port()) {
		t.Fatal("the router has not forgotten")
	}
	l.daemon(t, "enable_natpmp=yes", "enable_upnp=yes")
	before := h.Status().Expires
	h.await(func(st Status) bool { return st.Err == nil && st.Expires.After(before) })
	a = h.mapped(PCP)
	l.reach(h, a)
	l.released(h, a.Port())
}

// Behind a router that has itself a private address there is nothing to
// publish; whether the daemon maps or refuses, we say why.
func (l *lab) testDoubleNAT(t *testing.T) {
	l.run("ip", "-n", "router", "addr", "add", "10.99.0.2/24", "dev", "wan")
	l.run("ip", "-n", "router", "addr", "del", labExternal+"/24", "dev", "wan")
	defer func() {
		l.run("ip", "-n", "router", "addr", "add", labExternal+"/24", "dev", "wan")
		l.run("ip", "-n", "router", "addr", "del", "10.99.0.2/24", "dev", "wan")
	}()
	l.daemon(t, "enable_natpmp=yes", "enable_upnp=yes")
	h := l.host(t, nil)
	st := h.await(func(st Status) bool {
		return st.DoubleNAT || st.Err != nil && st.Err != errLooking && st.Err != errNothing
	})
	if a, ok := h.Mapping(); ok {
		t.Errorf("mapping %v, %+v", a, st)
	}
	t.Logf("%+v", st)
}
