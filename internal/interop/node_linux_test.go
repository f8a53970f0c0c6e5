package interop

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"testing"
	"time"
)

// stockNode is a stock client in its own process.
type stockNode struct {
	*process
	Status stockStatus // of the last up
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
	Expired      bool
	KeyExpiry    *time.Time
	CapMap       map[string][]json.RawMessage
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
	return &stockNode{process: startStock(t, name, env, append(args, flags...)...)}
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

// ip returns the node's IPv4 address.
func (n *stockNode) ip() netip.Addr { return n.Status.TailscaleIPs[0] }

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
