package interop

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"mesh"
	"mesh/control"
	"mesh/internal/meshtest"
)

// ask makes an HTTP request from one of our nodes and returns the answer.
func ask(t testing.TB, n *mesh.Node, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), meshtest.Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.HTTPClient().Do(req)
	if err != nil {
		t.Fatalf("%s: %v", n.Hostname, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %s: %v", n.Hostname, url, err)
	}
	return string(b)
}

func http4(a netip.Addr) string { return "http://" + netip.AddrPortFrom(a, 80).String() }

// path returns how n reaches the peer with that key.
func path(n *mesh.Node, key string) mesh.PeerStatus {
	for _, p := range n.Status().Peers {
		if p.Key.String() == key {
			return p
		}
	}
	return mesh.PeerStatus{}
}

// Two of our nodes and a stock one on the stock servers talk HTTP, TCP and UDP
// over both families, all ways; directly where they may, else by the stock
// relay.
func TestOnStockTalk(t *testing.T) {
	for _, relayOnly := range []bool{false, true} {
		name, env := "direct", []string(nil)
		if relayOnly {
			name, env = "relay", []string{"TS_DEBUG_NEVER_DIRECT_UDP=1"}
		}
		t.Run(name, func(t *testing.T) {
			s := serveStock(t)
			mode := func(n *mesh.Node) { n.RelayOnly = relayOnly }
			a, b := s.ours("a", mode), s.ours("b", mode)
			laptop := s.stocks("laptop", "", env...)
			for _, n := range []*mesh.Node{a, b} {
				serveHTTP(t, n, "80")
				echo(t, n, "7")
				serveUDP(t, n, "9")
			}
			laptop.serve("http", 80)
			laptop.serve("echo", 7)
			laptop.serve("udp", 9)
			laptopKey := s.findStock(laptop).Key
			for _, n := range []*mesh.Node{a, b} {
				s.findOurs(n)
				waitFor(t, n, laptopKey)
			}
			waitFor(t, a, b.Status().Self.Key.String())
			waitFor(t, b, a.Status().Self.Key.String())

			for _, from := range []*mesh.Node{a, b} {
				to := map[*mesh.Node]*mesh.Node{a: b, b: a}[from]
				for i, ip := range to.Status().Self.Addresses {
					if got := ask(t, from, http4(ip)); got != from.Hostname {
						t.Errorf("%s at %v was taken for %q", from.Hostname, ip, got)
					}
					dialEcho(t, from, netip.AddrPortFrom(ip, 7).String())
					askUDP(t, from, netip.AddrPortFrom(ip, 9).String())
					if got := laptop.get(http4(ip)); !strings.HasPrefix(got.Body, "laptop") {
						t.Errorf("the stock node was taken for %q", got.Body)
					}
					var text string
					laptop.do("udp", map[string]any{"Addr": netip.AddrPortFrom(ip, 9).String(), "Text": "ping"}, &text)
					if text != "ping" {
						t.Errorf("the stock node's datagram came back as %q", text)
					}
					stream := to.Hostname + string(rune('0'+i))
					laptop.do("open", map[string]any{"Name": stream, "Addr": netip.AddrPortFrom(ip, 7).String()}, nil)
					laptop.do("exchange", map[string]any{"Name": stream, "Bytes": 1 << 20}, nil)
				}
				for _, ip := range laptop.Status.TailscaleIPs {
					var who identity
					if err := json.Unmarshal([]byte(ask(t, from, http4(ip)+"/whois")), &who); err != nil || !strings.HasPrefix(who.Name, from.Hostname) {
						t.Errorf("the stock node sees %+v, %v", who, err)
					}
					dialEcho(t, from, netip.AddrPortFrom(ip, 7).String())
					askUDP(t, from, netip.AddrPortFrom(ip, 9).String())
				}
				want := "direct"
				if relayOnly {
					want = "relay"
				}
				for _, key := range []string{laptopKey, to.Status().Self.Key.String()} {
					meshtest.Until(t, want+" path from "+from.Hostname, func() bool {
						askUDP(t, from, netip.AddrPortFrom(path(from, key).Addresses[0], 9).String())
						return path(from, key).Path.Kind == want
					})
				}
			}
		})
	}
}

// waitFor waits until n knows the node with that key, and where to reach it.
func waitFor(t testing.TB, n *mesh.Node, key string) {
	t.Helper()
	meshtest.Until(t, n.Hostname+" to know "+key, func() bool { return path(n, key).Key.String() == key })
}

func serveUDP(t testing.TB, n *mesh.Node, port string) {
	t.Helper()
	pc, err := n.ListenPacket("udp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			k, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:k], from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
}

// askUDP sends datagrams until one comes back.
func askUDP(t testing.TB, n *mesh.Node, addr string) {
	t.Helper()
	c, err := n.Dial(t.Context(), "udp", addr)
	if err != nil {
		t.Fatalf("%s: %s: %v", n.Hostname, addr, err)
	}
	defer c.Close()
	buf := make([]byte, 100)
	for range 60 {
		if _, err := c.Write([]byte("datagram")); err != nil {
			t.Fatalf("%s: %s: %v", n.Hostname, addr, err)
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		if k, err := c.Read(buf); err == nil {
			if string(buf[:k]) != "datagram" {
				t.Fatalf("%s: %s answered %q", n.Hostname, addr, buf[:k])
			}
			return
		}
	}
	t.Fatalf("%s: no datagram came back from %s", n.Hostname, addr)
}

// An enrolment key lets in, another one does not; and a node that starts again
// is the one that it was, also where the server wants the key each time.
func TestOnStockKey(t *testing.T) {
	s := serveStock(t, "-authkey", "tskey-auth-right")
	wrong := s.node("wrong", func(n *mesh.Node) { n.AuthKey = "tskey-auth-wrong" })
	if _, err := wrong.Up(t.Context()); !errors.Is(err, mesh.ErrAuthKeyUnknown) || !strings.Contains(err.Error(), "invalid authkey") {
		t.Errorf("with a wrong key: %v", err)
	}
	keyless := s.node("keyless")
	if _, err := keyless.Up(t.Context()); err == nil {
		t.Error("came up without a key")
	}
	right := func(n *mesh.Node) { n.AuthKey = "tskey-auth-right" }
	n := s.node("agent", right)
	meshtest.Up(t, n)
	dir, before := n.Dir, n.Status().Self
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	again := s.node("agent", right, func(n *mesh.Node) { n.Dir = dir })
	meshtest.Up(t, again)
	if after := again.Status().Self; after.Key != before.Key || after.Addresses[0] != before.Addresses[0] {
		t.Errorf("it was %v and is %v", before, after)
	}
}

// Where a person must log in the node says where, and is up once that is done.
func TestOnStockLogin(t *testing.T) {
	s := serveStock(t, "-login")
	n := s.node("agent")
	_, err := n.Up(t.Context())
	var login *mesh.NeedsLoginError
	if !errors.As(err, &login) || !errors.Is(err, mesh.ErrNeedsLogin) || !strings.HasPrefix(login.URL, s.url+"/auth/") {
		t.Fatalf("up: %v", err)
	}
	s.do("complete", map[string]any{"URL": login.URL}, nil)
	meshtest.Up(t, n)
	laptop := stock(t, "laptop", s.url, "", nil)
	laptop.do("start", nil, nil)
	var url string
	if err := json.Unmarshal(laptop.event("login", 1), &url); err != nil {
		t.Fatal(err)
	}
	s.do("complete", map[string]any{"URL": url}, nil)
	laptop.up()
	serveHTTP(t, n, "80")
	if r := laptop.get(http4(n.Status().Self.Addresses[0])); r.Status != http.StatusOK {
		t.Errorf("got %+v", r)
	}
}

// Plain HTTP beyond this host proves nothing: without a pin the node does not
// even ask, with the right one it joins, with a wrong one it says so.
func TestOnStockPlainHTTP(t *testing.T) {
	s := serveStock(t, "-ip", "192.0.2.1")
	n := s.node("agent")
	if _, err := n.Up(t.Context()); !errors.Is(err, control.ErrUnproven) {
		t.Errorf("without a pin: %v", err)
	}
	var answer struct{ PublicKey string }
	resp, err := http.Get(s.url + "/key?v=131")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	other := s.node("other", func(n *mesh.Node) { n.ControlKey = hexKey("mkey:", 1) })
	if _, err := other.Up(t.Context()); !errors.Is(err, control.ErrServerKeyMismatch) {
		t.Errorf("with a wrong pin: %v", err)
	}
	if got := s.requests(); got["POST /machine/register"] != 0 {
		t.Errorf("told the server of itself: %v", got)
	}
	a := s.ours("a", func(n *mesh.Node) { n.ControlKey = answer.PublicKey })
	b := s.ours("b", func(n *mesh.Node) { n.ControlKey = answer.PublicKey; n.RelayOnly = true })
	serveHTTP(t, a, "80")
	waitFor(t, b, a.Status().Self.Key.String())
	if got := ask(t, b, http4(a.Status().Self.Addresses[0])); got != "b" {
		t.Errorf("was taken for %q", got)
	}
}
