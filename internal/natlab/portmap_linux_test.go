package natlab

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mesh"
	"mesh/internal/meshtest"
)

// outside is where a router of kind Mapped forwards ports: the daemon maps
// nothing with addresses for documentation, of which the internet here is made.
// Nobody elsewhere hears of it.
var outside = netip.MustParsePrefix("11.22.33.0/24")

// MapPorts runs miniupnpd on a router until the test ends. Routers that are to
// reach what it maps need KnowOutside.
func (r *Router) MapPorts(dir string) {
	t := r.lab.t
	t.Helper()
	r.Sh("ip addr add 11.22.33.1/24 dev wan")
	conf := filepath.Join(dir, "miniupnpd.conf")
	text := strings.Join([]string{
		"ext_ifname=wan", "ext_ip=11.22.33.1", "listening_ip=lan", "http_port=0", "secure_mode=yes", "system_uptime=no",
		"enable_natpmp=yes", "enable_upnp=yes", "notify_interval=600", "ipv6_disable=yes",
		"uuid=11111111-2222-3333-4444-555555555555",
		fmt.Sprintf("allow 1024-65535 %s0/24 1024-65535", r.net), "deny 0-65535 0.0.0.0/0 0-65535",
	}, "\n") + "\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := exec.Command("ip", "netns", "exec", r.NS, "miniupnpd", "-d", "-f", conf, "-P", filepath.Join(dir, "miniupnpd.pid"))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Log("miniupnpd:\n" + log.String())
		}
	})
}

// KnowOutside gives a router a route to what others map.
func (r *Router) KnowOutside() {
	r.lab.t.Helper()
	r.Sh("ip route add " + outside.String() + " dev wan")
}

// forwards tells whether a router forwards any port.
func (r *Router) forwards() bool {
	out, err := exec.Command("ip", "netns", "exec", r.NS, "nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd").Output()
	return err == nil && strings.Contains(string(out), "dnat")
}

// Two nodes that could only meet at a relay are direct if the router of one maps
// ports; and it does not any more when the node has left.
func TestPortMapping(t *testing.T) {
	if _, err := exec.LookPath("miniupnpd"); err != nil {
		t.Skip(err)
	}
	t.Parallel()
	w := newWorld(t)
	mapping, other := w.Router("mapping", Mapped), w.Router("other", PortRestricted)
	mapping.MapPorts(t.TempDir())
	other.KnowOutside()
	a, b := w.node("na", mapping.Host("a")), w.node("nb", other.Host("b"))
	w.await(a, b)
	t.Log(meet(t, "A first", "D", a, b))
	meshtest.Until(t, "the path to lead through the mapping", func() bool {
		var st mesh.Status
		b.Must("status", nil, &st)
		return len(st.Peers) == 1 && outside.Contains(st.Peers[0].Path.Endpoint.Addr())
	})
	if !mapping.forwards() {
		t.Error("the router forwards nothing")
	}
	a.Stop()
	if mapping.forwards() {
		t.Error("the router forwards a port to a node that has left")
	}
}
