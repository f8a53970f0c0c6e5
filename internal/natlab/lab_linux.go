package natlab

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// labs counts laboratories, so that names of namespaces are unique.
var labs atomic.Int64

// Lab is one internet: a network of documentation addresses, 203.0.113.0/24 and
// 2001:db8::/64, to which public hosts and routers are attached.
type Lab struct {
	t     testing.TB
	name  string
	inet  string // namespace of the network in the middle
	next  int    // last address given out there
	sites int    // last private network given out
}

// New builds an internet that exists until the test ends. It skips the test
// where that cannot be.
func New(t testing.TB) *Lab {
	t.Helper()
	if why := missing(); why != "" {
		t.Skip("no laboratory of network namespaces: " + why)
	}
	l := &Lab{t: t, name: fmt.Sprintf("l%d", labs.Add(1)), next: 1}
	l.inet = l.namespace("inet")
	l.sh(l.inet, `
		ip link add br0 type bridge forward_delay 0
		ip addr add 203.0.113.1/24 dev br0
		ip addr add 2001:db8::1/64 dev br0 nodad
		ip link set br0 up
		echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
	`)
	return l
}

func (l *Lab) sh(ns, script string) {
	l.t.Helper()
	if err := sh(ns, script); err != nil {
		l.t.Fatalf("namespace %s: %v", ns, err)
	}
}

// namespace makes one that is removed when the test ends.
func (l *Lab) namespace(name string) string {
	l.t.Helper()
	ns := l.name + "-" + name
	l.sh("", "ip netns add "+ns)
	l.t.Cleanup(func() { sh("", "ip netns del "+ns) })
	// Bridged frames must not pass the filters of routed packets.
	l.sh(ns, `
		ip link set lo up
		for f in iptables ip6tables; do
			f=/proc/sys/net/bridge/bridge-nf-call-$f
			if [ -e $f ]; then echo 0 > $f; fi
		done
	`)
	return ns
}

// attach connects an interface of a namespace to the internet and gives it the
// next address.
func (l *Lab) attach(ns, dev string) netip.Addr {
	l.t.Helper()
	l.next++
	n := l.next
	if n > 250 {
		l.t.Fatal("natlab: too many hosts on one internet")
	}
	l.sh(ns, fmt.Sprintf(`
		ip link add %[1]s type veth peer name p%[2]d netns %[3]s
		ip -n %[3]s link set p%[2]d master br0 up
		ip addr add 203.0.113.%[2]d/24 dev %[1]s
		ip addr add 2001:db8::%[2]x/64 dev %[1]s nodad
		ip link set %[1]s up
		ip -6 route add default via 2001:db8::1
	`, dev, n, l.inet))
	return netip.AddrFrom4([4]byte{203, 0, 113, byte(n)})
}

// Name lets all hosts of the laboratory find a public host by a name.
func (l *Lab) Name(name string, h *Host) {
	l.t.Helper()
	f, err := os.OpenFile(hostsFile, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintf(f, "%s %s\n%s %s\n", h.IPv4, name, h.IPv6, name)
}

// Host is a computer: a network namespace with one interface, eth0.
type Host struct {
	lab  *Lab
	NS   string
	IPv4 netip.Addr // zero on a host without
	IPv6 netip.Addr // zero on a host without

	router *Router // that it is behind, nil on public hosts
}

// Public adds a host with public addresses.
func (l *Lab) Public(name string) *Host {
	l.t.Helper()
	h := &Host{lab: l, NS: l.namespace(name)}
	h.IPv4 = l.attach(h.NS, "eth0")
	h.IPv6 = publicIPv6(h.IPv4)
	return h
}

// IPv6Only adds a public host without IPv4.
func (l *Lab) IPv6Only(name string) *Host {
	l.t.Helper()
	h := l.Public(name)
	h.Sh("ip addr flush dev eth0 scope global\nip addr add " + h.IPv6.String() + "/64 dev eth0 nodad\nip -6 route replace default via 2001:db8::1")
	h.IPv4 = netip.Addr{}
	return h
}

// publicIPv6 is the address that attach gave together with an IPv4 one.
func publicIPv6(v4 netip.Addr) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", v4.As4()[3]))
}

// Sh runs a shell script on the host.
func (h *Host) Sh(script string) {
	h.lab.t.Helper()
	h.lab.sh(h.NS, script)
}

// Wrap is the command that starts a process on the host, for actor.Start.
func (h *Host) Wrap() []string { return []string{"ip", "netns", "exec", h.NS} }

// Router connects a private network to the internet or to another router's
// private network.
type Router struct {
	lab  *Lab
	NS   string
	Kind Kind
	WAN  netip.Addr // its address outside
	up   *Router    // the router it is behind, nil for the internet
	net  string     // of its LAN, "192.168.7."
	last int        // last host address given out
}

// Router adds a router to the internet.
func (l *Lab) Router(name string, kind Kind) *Router {
	l.t.Helper()
	r := &Router{lab: l, NS: l.namespace(name), Kind: kind}
	r.WAN = l.attach(r.NS, "wan")
	r.start(fmt.Sprintf("192.168.%d.", l.site()))
	return r
}

// Router adds a router behind this one, as in homes of a carrier that
// translates addresses itself.
func (r *Router) Router(name string, kind Kind) *Router {
	r.lab.t.Helper()
	inner := &Router{lab: r.lab, NS: r.lab.namespace(name), Kind: kind, up: r}
	inner.WAN = r.join(inner.NS, "wan")
	inner.start(fmt.Sprintf("172.16.%d.", r.lab.site()))
	return inner
}

func (l *Lab) site() int { l.sites++; return l.sites }

// start gives the router its LAN and its rules.
func (r *Router) start(net string) {
	r.lab.t.Helper()
	r.net, r.last = net, 1
	r.Sh(fmt.Sprintf(`
		ip link add lan type bridge forward_delay 0
		ip addr add %s1/24 dev lan
		ip link set lan up
		echo 1 > /proc/sys/net/ipv4/ip_forward
	`, net))
	r.Sh("nft -f - <<'RULES'\n" + r.Kind.rules(r.WAN) + "\nRULES")
}

// join connects an interface of a namespace to the router's LAN.
func (r *Router) join(ns, dev string) netip.Addr {
	r.lab.t.Helper()
	r.last++
	addr := fmt.Sprintf("%s%d", r.net, r.last)
	r.lab.sh(ns, fmt.Sprintf(`
		ip link add %[1]s type veth peer name h%[2]d netns %[3]s
		ip -n %[3]s link set h%[2]d master lan up
		ip addr add %[4]s/24 dev %[1]s
		ip link set %[1]s up
		ip route add default via %[5]s1
	`, dev, r.last, r.NS, addr, r.net))
	return netip.MustParseAddr(addr)
}

// Host adds a host to the router's private network.
func (r *Router) Host(name string) *Host {
	r.lab.t.Helper()
	h := &Host{lab: r.lab, NS: r.lab.namespace(name), router: r}
	h.IPv4 = r.join(h.NS, "eth0")
	return h
}

// Sh runs a shell script on the router.
func (r *Router) Sh(script string) {
	r.lab.t.Helper()
	r.lab.sh(r.NS, strings.TrimSpace(script))
}
