package interop

import (
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"mesh"
	"mesh/internal/meshtest"
)

// stockServers are the stock test control server, relay and STUN in a process.
type stockServers struct {
	*process
	url string
}

// serveStock starts stock servers until the test ends. Only flags of the stock
// program come in flags.
func serveStock(t testing.TB, flags ...string) *stockServers {
	t.Helper()
	s := &stockServers{process: startStock(t, "servers", nil, append([]string{"servers"}, flags...)...)}
	var info struct{ ControlURL string }
	s.do("info", nil, &info)
	s.url = info.ControlURL
	return s
}

// node returns one of our nodes on the stock servers; it is not up yet.
func (s *stockServers) node(name string, options ...func(*mesh.Node)) *mesh.Node {
	s.t.Helper()
	n := &mesh.Node{
		Hostname: name, ControlURL: s.url, Dir: filepath.Join(s.t.TempDir(), name),
		Logger: meshtest.Logger(s.t).Named(name),
	}
	for _, o := range options {
		o(n)
	}
	s.t.Cleanup(func() { n.Close() })
	return n
}

// ours starts one of our nodes and waits for it.
func (s *stockServers) ours(name string, options ...func(*mesh.Node)) *mesh.Node {
	s.t.Helper()
	n := s.node(name, options...)
	meshtest.Up(s.t, n)
	return n
}

// stocks starts a stock node and waits for it.
func (s *stockServers) stocks(name, authKey string, env ...string) *stockNode {
	s.t.Helper()
	n := stock(s.t, name, s.url, authKey, env)
	n.up()
	return n
}

// known is what the servers have of a node; members are as they send them.
type known struct {
	ID                int64
	StableID          string
	Name              string
	User              int64
	Key               string
	DiscoKey          string
	Addresses         []netip.Prefix
	AllowedIPs        []netip.Prefix
	Endpoints         []netip.AddrPort `json:",omitempty"`
	HomeDERP          int              `json:",omitempty"`
	Hostinfo          json.RawMessage
	Cap               int
	MachineAuthorized bool
	KeyExpiry         *time.Time `json:",omitempty"`

	IsJailed            bool       `json:",omitempty"`
	UnsignedPeerAPIOnly bool       `json:",omitempty"`
	Expired             bool       `json:",omitempty"`
	Online              *bool      `json:",omitempty"`
	LastSeen            *time.Time `json:",omitempty"`

	SelfNodeV4MasqAddrForThisPeer *netip.Addr `json:",omitempty"`
}

// nodes returns all nodes that the servers know.
func (s *stockServers) nodes() (list []known) {
	s.t.Helper()
	s.do("nodes", nil, &list)
	return list
}

// find waits until the servers know all of what a node should tell them, and
// returns that.
func (s *stockServers) find(key string) (k known) {
	s.t.Helper()
	meshtest.Until(s.t, "the servers to know node "+key, func() bool {
		list := s.nodes()
		i := slices.IndexFunc(list, func(k known) bool { return k.Key == key })
		if i < 0 {
			return false
		}
		k = list[i]
		return k.HomeDERP != 0
	})
	return k
}

func (s *stockServers) findOurs(n *mesh.Node) known {
	return s.find(n.Status().Self.Key.String())
}

func (s *stockServers) findStock(n *stockNode) known { return s.find(n.status().Self.PublicKey) }

// push sends a node a map message by the server's own means; see stock.push.
func (s *stockServers) push(to known, message map[string]any) {
	s.t.Helper()
	s.do("push", map[string]any{"NodeKey": to.Key, "Map": message}, nil)
}

// raw sends a node a map message of any shape.
func (s *stockServers) raw(to known, message any) {
	s.t.Helper()
	s.do("raw", map[string]any{"NodeKey": to.Key, "Map": message}, nil)
}

// rawUntilNoticed sends a message and waits until the node has read it: what
// follows it in the same stream has had its effect.
func (s *stockServers) rawAndSeen(n *mesh.Node, to known, message any) {
	s.t.Helper()
	s.raw(to, message)
	s.seen(n, to)
}

var marks int64

// seen waits until a node has followed all that was sent to it before: it sends
// a peer that exists for this alone.
func (s *stockServers) seen(n *mesh.Node, to known) {
	s.t.Helper()
	marks++
	p := fakePeer(7_000_000+marks, "mark")
	there := func() bool {
		return slices.ContainsFunc(n.Status().Peers, func(q mesh.PeerStatus) bool { return q.Key.String() == p.Key })
	}
	// The server may send its own list of all peers right behind, which takes
	// this one away before it was noticed: then once more.
	var sent time.Time
	meshtest.Until(s.t, "a map message to be followed", func() bool {
		if time.Since(sent) > time.Second {
			s.raw(to, map[string]any{"PeersChanged": []known{p}})
			sent = time.Now()
		}
		return there()
	})
	s.raw(to, map[string]any{"PeersRemoved": []int64{p.ID}})
	meshtest.Until(s.t, "a map message to be followed", func() bool { return !there() })
}

// requests tells how many requests came so far, by "METHOD path"; map polls are
// of method POLL.
func (s *stockServers) requests() (count map[string]int) {
	s.t.Helper()
	s.do("requests", nil, &count)
	return count
}

// fault makes the next requests to a path fail.
func (s *stockServers) fault(path string, polls bool, status, times int, retryAfter string) {
	s.t.Helper()
	s.do("fault", map[string]any{"Path": path, "Stream": polls, "Status": status, "Times": times, "RetryAfter": retryAfter, "Body": "as the test wants it"}, nil)
}

// fakePeer is a peer that nobody is.
func fakePeer(id int64, name string) known {
	ip := netip.AddrFrom4([4]byte{100, 80, byte(id >> 8), byte(id)})
	return known{
		ID: id, StableID: name + "-stable-" + time.Duration(id).String(), Name: name + ".stock.test.", User: 1, Cap: 131, MachineAuthorized: true,
		Key: hexKey("nodekey:", id), DiscoKey: hexKey("discokey:", id),
		Addresses: []netip.Prefix{netip.PrefixFrom(ip, 32)}, AllowedIPs: []netip.Prefix{netip.PrefixFrom(ip, 32)},
		Hostinfo: json.RawMessage(`{}`),
	}
}

// hexKey is a public key of its own for each id.
func hexKey(prefix string, id int64) string {
	const digits = "0123456789abcdef"
	b := []byte(prefix)
	for i := range 64 {
		b = append(b, digits[(id>>(4*(i%16))+int64(i))&15])
	}
	return string(b)
}

// echo answers each TCP connection with what it says, until the test ends.
func echo(t testing.TB, n *mesh.Node, port string) {
	t.Helper()
	ln, err := n.Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

// line sends some bytes over a connection to an echo service and expects them
// back.
type line struct {
	t testing.TB
	c io.ReadWriteCloser
}

func dialEcho(t testing.TB, n *mesh.Node, addr string) *line {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatalf("%s: dial %s: %v", n.Hostname, addr, err)
	}
	c.SetDeadline(time.Now().Add(2 * meshtest.Patience))
	t.Cleanup(func() { c.Close() })
	l := &line{t, c}
	l.works("at first")
	return l
}

func (l *line) works(when string) {
	l.t.Helper()
	want := "hello " + when
	if _, err := io.WriteString(l.c, want); err != nil {
		l.t.Fatalf("%s: write: %v", when, err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(l.c, got); err != nil || string(got) != want {
		l.t.Fatalf("%s: read %q, %v", when, got, err)
	}
}

// ends waits until the connection has failed.
func (l *line) ends(why string) {
	l.t.Helper()
	if _, err := l.c.Read(make([]byte, 1)); err == nil {
		l.t.Errorf("after %s there is more to read", why)
	} else {
		l.t.Logf("after %s: %v", why, err)
	}
}
