// Package policytest makes up policies and nodes, for tests that compare what
// two readings of a policy say. What it makes is valid, small, and full of the
// cases that are easily read wrong: nodes with several tags, networks behind
// routers, ranges of ports that touch.
package policytest

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
)

// Node has the fields of policy.Node. This package does not import that one,
// whose own tests use it.
type Node struct {
	ID      int64
	User    string
	Email   string
	Role    string
	Tags    []string
	Addrs   []netip.Addr
	Routes  []netip.Prefix
	Offline bool
}

// Maker makes up policies and nodes. Its Rand decides all.
type Maker struct{ *rand.Rand }

// New returns a Maker that always makes the same of a seed.
func New(seed uint64) Maker { return Maker{rand.New(rand.NewPCG(seed, 1))} }

func (m Maker) pick(list ...string) string { return list[m.IntN(len(list))] }

func (m Maker) oneIn(n int) bool { return m.IntN(n) == 0 }

// Users are the login names that policies and nodes speak of.
var Users = []string{"alice@example.com", "bob", "carol", "dave", "ALICE@example.com"}

// sources and more that are selectors anywhere.
var (
	names = []string{"*", "alice@example.com", "bob@", "carol@example.com", "group:a", "group:b", "group:empty", "tag:x", "tag:y",
		"autogroup:member", "autogroup:tagged", "autogroup:admin", "user:*@example.com"}
	networks = []string{"100.64.0.3", "fd7a:115c:a1e0::4", "100.64.0.0/29", "lan", "10.1.2.0/24", "192.168.0.0/16", "ipset:some"}
)

// selector returns any selector, and "*" not too often.
func (m Maker) selector() string {
	if m.oneIn(2) {
		return m.pick(networks...)
	}
	return m.pick(names...)
}

// Ports returns ports as "acls" write them.
func (m Maker) Ports() string {
	return m.pick("*", "*", "22", "1-65535", "80,443", "22-80", "81-442", "1,65535", "443-444")
}

// withPorts are protocols that have ports.
func withPorts(proto string) bool {
	return proto == "" || proto == "tcp" || proto == "udp" || proto == "sctp"
}

// acl returns an entry of "acls".
func (m Maker) acl() string {
	var srcs, dsts []string
	for range m.IntN(4) {
		srcs = append(srcs, m.selector())
	}
	if m.oneIn(20) {
		srcs = append(srcs, "autogroup:danger-all")
	}
	proto := m.pick("", "", "tcp", "udp", "icmp", "sctp", "47")
	ports := func() string {
		if withPorts(proto) {
			return m.Ports()
		}
		return "*"
	}
	for range m.IntN(4) {
		dsts = append(dsts, m.selector()+":"+ports())
	}
	if m.oneIn(8) {
		dsts = append(dsts, "autogroup:internet:*")
	}
	if m.oneIn(4) {
		srcs = []string{m.pick("autogroup:member", "bob@", "*", "group:a", "autogroup:admin")}
		dsts = append(dsts, "autogroup:self:"+ports())
	}
	if proto != "" {
		return fmt.Sprintf(`{"action": "accept", "src": [%s], "dst": [%s], "proto": %q}`, quoted(srcs), quoted(dsts), proto)
	}
	return fmt.Sprintf(`{"action": "accept", "src": [%s], "dst": [%s]}`, quoted(srcs), quoted(dsts))
}

// grant returns an entry of "grants".
func (m Maker) grant() string {
	var srcs, dsts, ip []string
	for range m.IntN(4) {
		srcs = append(srcs, m.selector())
	}
	for range m.IntN(4) {
		dsts = append(dsts, m.selector())
	}
	for range 1 + m.IntN(3) {
		switch proto := m.pick("", "tcp", "udp", "icmp", "sctp", "47"); {
		case proto == "":
			ip = append(ip, m.Ports())
		case withPorts(proto):
			ip = append(ip, proto+":"+m.Ports())
		default:
			ip = append(ip, proto+":*")
		}
	}
	more := ""
	switch m.IntN(6) {
	case 0:
		srcs = []string{m.pick("autogroup:member", "bob@", "group:a", "autogroup:admin")}
		dsts = append(dsts, "autogroup:self")
	case 1:
		dsts = []string{m.pick("lan", "10.1.2.0/24", "192.168.0.0/16", "autogroup:internet", "tag:x")}
		more = fmt.Sprintf(`, "via": [%s]`, m.pick(`"tag:x"`, `"tag:y"`, `"tag:x", "tag:y"`))
	case 2:
		app := m.pick("example.com/cap/a", "example.com/cap/b", "tailscale.com/cap/drive", "tailscale.com/cap/relay")
		more = fmt.Sprintf(`, "app": {%q: [{"n": %d}]}`, app, m.IntN(3))
	}
	return fmt.Sprintf(`{"src": [%s], "dst": [%s], "ip": [%s]%s}`, quoted(srcs), quoted(dsts), quoted(ip), more)
}

// quoted makes a JSON list without brackets.
func quoted(list []string) string {
	for i := range list {
		list[i] = fmt.Sprintf("%q", list[i])
	}
	return strings.Join(list, ", ")
}

// Policy returns the text of a valid policy with up to about ten rules.
func (m Maker) Policy() string {
	var acls, grants []string
	for range m.IntN(6) {
		acls = append(acls, m.acl())
	}
	for range m.IntN(5) {
		grants = append(grants, m.grant())
	}
	return `{
"groups": {"group:a": ["alice@example.com", "bob@"], "group:b": ["carol@example.com"], "group:empty": []},
"tagOwners": {"tag:x": ["group:a"], "tag:y": ["tag:x", "autogroup:admin"]},
"hosts": {"lan": "10.1.0.0/16"},
"ipsets": {"ipset:some": ["100.64.0.5", "add lan", "remove 10.1.2.0/24"]},
"autoApprovers": {"routes": {"10.0.0.0/8": ["tag:x"]}, "exitNode": ["tag:y"]},
"nodeAttrs": [{"target": ["` + m.selector() + `"], "attr": ["example.com/attr/one"]}],
"acls": [` + strings.Join(acls, ",\n") + `],
"grants": [` + strings.Join(grants, ",\n") + "]}"
}

// Node returns a node with addresses that its ID tells: 100.64.0.ID and
// fd7a:115c:a1e0::ID. IDs are less than 256.
func (m Maker) Node(id int) Node {
	n := Node{ID: int64(id)}
	switch m.IntN(4) {
	case 0:
		n.Tags = []string{m.pick("tag:x", "tag:y")}
		if m.oneIn(3) {
			n.Tags = []string{"tag:x", "tag:y"}
		}
		n.User = m.pick("", "bob")
	case 1:
		n.User, n.Email = "carol", "carol@example.com"
		n.Role = m.pick("", "admin")
	default:
		n.User = m.pick("alice@example.com", "bob", "dave", "ALICE@example.com")
		if strings.HasPrefix(n.User, "alice") {
			n.Role = "admin"
		}
	}
	n.Addrs = []netip.Addr{
		netip.AddrFrom4([4]byte{100, 64, 0, byte(id)}),
		netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 15: byte(id)}),
	}
	if m.oneIn(2) {
		n.Routes = append(n.Routes, netip.MustParsePrefix(m.pick("10.1.0.0/16", "10.1.2.0/24", "192.168.1.0/24", "10.0.0.0/8", "0.0.0.0/0")))
	}
	n.Offline = m.oneIn(8)
	return n
}

// Packet is what a filter judges.
type Packet struct {
	Src, Dst netip.Addr
	Proto    int
	Port     uint16 // of the destination
}

// Packet returns a packet for one of the nodes, or for something behind it, from
// a node or somewhere else.
func (m Maker) Packet(nodes []Node, to Node) Packet {
	from := nodes[m.IntN(len(nodes))]
	i := m.IntN(2)
	p := Packet{Src: from.Addrs[i], Dst: to.Addrs[i]}
	if i == 0 {
		if m.oneIn(4) {
			p.Src = netip.MustParseAddr(m.pick("10.1.2.9", "10.1.3.9", "192.168.1.1", "100.64.0.3", "100.115.92.1", "100.115.94.0", "8.8.8.8"))
		}
		if m.oneIn(4) {
			p.Dst = netip.MustParseAddr(m.pick("10.1.2.9", "10.1.3.9", "192.168.1.1", "8.8.8.8"))
		}
	}
	p.Proto = []int{6, 6, 17, 132, 47, 1, 58}[m.IntN(7)]
	p.Port = []uint16{0, 1, 21, 22, 23, 79, 80, 81, 442, 443, 444, 445, 65534, 65535}[m.IntN(14)]
	return p
}
