package interop

import (
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// stockNode is a stock client in its own process.
type stockNode struct {
	*process
	Status stockStatus // of the last up

	args, env []string
}

// stockStatus is the part of a stock node's status that tests look at.
type stockStatus struct {
	BackendState string
	AuthURL      string
	TailscaleIPs []netip.Addr
	Self         stockPeer
	Peer         map[string]stockPeer // by node key
	User         map[string]struct{ LoginName, DisplayName string }
}

type stockPeer struct {
	ID           string
	PublicKey    string
	HostName     string
	DNSName      string
	UserID       int64
	TailscaleIPs []netip.Addr
	Tags         []string
	Online       bool
	CurAddr      string // direct address, "" when by relay
	Relay        string
	InMagicSock  bool // packets can be sent
	Expired      bool
	KeyExpiry    *time.Time
	CapMap       map[string][]json.RawMessage
}

// label is the first label of the peer's name.
func (p stockPeer) label() string {
	label, _, _ := strings.Cut(p.DNSName, ".")
	return label
}

// peer returns the peer with a name.
func (s stockStatus) peer(label string) (stockPeer, bool) {
	for _, p := range s.Peer {
		if p.label() == label {
			return p, true
		}
	}
	return stockPeer{}, false
}

// identity is what a stock node says of a peer.
type identity struct {
	Name  string
	User  string
	Tags  []string
	Caps  map[string][]json.RawMessage
	Addrs []netip.Prefix
}

// pingResult is a stock node's answer to a ping.
type pingResult struct {
	Err          string
	Endpoint     string // filled = direct
	DERPRegionID int    // filled = by relay
}

// httpResult is what a request of a stock node brought.
type httpResult struct {
	Status int
	Bytes  int64
	SHA256 string
	Body   string
}

// stock starts a stock node that is to join the control server at url; it is
// not up yet. Only flags of the stock program come in flags.
func stock(t testing.TB, name, url, authKey string, env []string, flags ...string) *stockNode {
	t.Helper()
	args := []string{"node", "-hostname", name, "-control", url, "-dir", filepath.Join(t.TempDir(), name)}
	if authKey != "" {
		args = append(args, "-authkey", authKey)
	}
	n := &stockNode{args: append(args, flags...), env: env}
	n.process = startStock(t, name, env, n.args...)
	return n
}

// again starts the node anew, in another process with the same state.
func (n *stockNode) again() {
	n.t.Helper()
	n.process = startStock(n.t, n.name, n.env, n.args...)
	n.up()
	n.services()
}

// up starts the node and waits until it runs.
func (n *stockNode) up() {
	n.t.Helper()
	n.do("up", nil, &n.Status)
}

// status asks for the present status.
func (n *stockNode) status() (st stockStatus) {
	n.t.Helper()
	n.do("status", nil, &st)
	return st
}

// label is the first label of the node's name.
func (n *stockNode) label() string { return n.name }

// at returns the node's address of a family.
func (n *stockNode) at(six bool) netip.Addr {
	for _, ip := range n.Status.TailscaleIPs {
		if ip.Is6() == six {
			return ip
		}
	}
	return netip.Addr{}
}

// services starts HTTP on port 80 and echoes on port 7 of TCP and UDP.
func (n *stockNode) services() {
	n.t.Helper()
	n.serve("http", 80)
	n.serve("echo", 7)
	n.serve("udp", 7)
}

// polls counts the map polls that the node began.
func (n *stockNode) polls() int { return n.logged("PollNetMap: stream=true") }

// knows reports whether the node could send packets to another.
func (n *stockNode) knows(label string) bool {
	p, ok := n.status().peer(label)
	return ok && p.InMagicSock && p.Relay != ""
}

// ping asks for the path to a peer, as `tailscale ping` does.
func (n *stockNode) ping(ip netip.Addr, kind string) (r pingResult, err error) {
	err = n.try("ping", map[string]any{"Addr": ip, "Type": kind}, &r)
	if err == nil && r.Err != "" {
		err = errors.New(r.Err)
	}
	return r, err
}

// pathTo tells how packets to a peer travel: "direct", "relay" or "".
func (n *stockNode) pathTo(other member) string {
	r, err := n.ping(other.at(false), "disco")
	switch {
	case err != nil:
		return ""
	case r.Endpoint != "":
		return "direct"
	case r.DERPRegionID != 0:
		return "relay"
	}
	return ""
}

// fetch makes an HTTP request, a POST of bytes of the pattern if there are any.
func (n *stockNode) fetch(url string, post int64) (r httpResult, err error) {
	err = n.try("http", map[string]any{"URL": url, "Post": post, "Seconds": seconds}, &r)
	return r, err
}

// echo sends bytes of the pattern to an echo service by TCP and returns the sum
// of what came back.
func (n *stockNode) echo(addr string, size int64) (sum string, err error) {
	if err := n.try("open", map[string]any{"Name": addr, "Addr": addr, "Seconds": seconds}, nil); err != nil {
		return "", err
	}
	if err := n.try("exchange", map[string]any{"Name": addr, "Bytes": size, "Seconds": seconds}, &sum); err != nil {
		return "", err
	}
	return sum, n.try("shut", map[string]any{"Name": addr}, nil)
}

// datagram sends a datagram until an answer comes.
func (n *stockNode) datagram(addr, text string, tries int) (answer string, err error) {
	err = n.try("udp", map[string]any{"Addr": addr, "Text": text, "Tries": tries}, &answer)
	return answer, err
}

// whois asks for the identity behind a mesh address.
func (n *stockNode) whois(ip netip.Addr) (id identity) {
	n.t.Helper()
	n.do("whois", map[string]any{"Addr": netip.AddrPortFrom(ip, 1).String()}, &id)
	return id
}

// serve starts a service: "http", "echo" or "udp".
func (n *stockNode) serve(kind string, port int) {
	n.t.Helper()
	n.do("serve", map[string]any{"Kind": kind, "Port": port}, nil)
}

// get makes an HTTP request.
func (n *stockNode) get(url string) (r httpResult) {
	n.t.Helper()
	n.do("http", map[string]any{"URL": url}, &r)
	return r
}
