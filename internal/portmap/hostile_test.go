package portmap

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Only the gateway's own address and port, the right nonce and the right port
// are believed.
func TestForgery(t *testing.T) {
	evil := netip.MustParseAddr("192.168.1.66")
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t)
		g.forge = func(b []byte) (out []forged) {
			fake := newGateway(t, PCP, PMP, UPnP)
			fake.external = netip.MustParseAddr("198.51.100.66")
			fake.location = "http://192.168.1.66:5000/root.xml"
			for _, port := range []uint16{gatewayPort, 1900} {
				for _, r := range fake.datagram(netip.AddrPortFrom(gwAddr, port), b) {
					out = append(out, forged{netip.AddrPortFrom(evil, r.from.Port()), r.data})                       // another host
					out = append(out, forged{netip.AddrPortFrom(gwAddr, 9), r.data})                                 // another port
					out = append(out, forged{netip.AddrPortFrom(gwAddr, gatewayPort), append([]byte{9}, r.data...)}) // garbage
					out = append(out, forged{netip.AddrPortFrom(gwAddr, gatewayPort), r.data[:len(r.data)/2]})       // a part
				}
			}
			return out
		}
		c := start(t, g.config())
		c.want("none")
		if st := c.Status(); !errors.Is(st.Err, errNothing) {
			t.Errorf("%+v", st)
		}
		if len(g.dials) != 0 {
			t.Errorf("we were sent to %q", g.dials)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PCP)
		g.forge = func(b []byte) []forged {
			if len(b) != 60 || b[0] != pcpVersion {
				return nil
			}
			// Somebody in between who did not see the nonce, and a stale answer.
			fake := newGateway(t, PCP)
			fake.external = netip.MustParseAddr("198.51.100.66")
			wrong := bytes.Clone(b)
			wrong[30] ^= 1
			old := bytes.Clone(b)
			old[40] ^= 1
			return []forged{{netip.AddrPortFrom(gwAddr, gatewayPort), fake.answerPCP(wrong)}, {netip.AddrPortFrom(gwAddr, gatewayPort), fake.answerPCP(old)}}
		}
		c := start(t, g.config())
		c.want("203.0.113.7:41641")
	})
	// Another host answers first, in all of NAT-PMP and with our own port.
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, PMP)
		g.forge = func(b []byte) []forged {
			if b[0] != pmpVersion {
				return nil
			}
			fake := newGateway(t, PMP)
			fake.external, fake.firstExt = netip.MustParseAddr("198.51.100.66"), 6666
			lie := fake.answerPMP(b)
			return []forged{{netip.AddrPortFrom(evil, gatewayPort), lie}, {netip.AddrPortFrom(gwAddr, 5350), lie}}
		}
		c := start(t, g.config())
		c.want("203.0.113.7:41641")
	})
}

// A gateway cannot send us anywhere else, nor keep us busy.
func TestHostileUPnP(t *testing.T) {
	for _, at := range []string{
		"http://192.168.1.2:5000/root.xml", "http://127.0.0.1:5000/root.xml", "http://localhost:5000/", "http://example.com/",
		"https://192.168.1.1:5000/", "file:///etc/passwd", "http://user@192.168.1.1:5000/", "http://192.168.1.1.example.com:5000/",
		"http://192.168.1.1:0/", "http://192.168.1.1:99999/", "//192.168.1.1/", "/root.xml", "", "http://192.168.1.1:5000/" + strings.Repeat("a", 2000),
		"http://169.254.169.254/latest/meta-data", "http://3232235777:5000/root.xml", "http://0xc0a80101:5000/",
	} {
		if e, err := gatewayURL(at, nil, gwAddr); err == nil {
			t.Errorf("location %q was taken: %v", at, e)
		}
	}
	base := endpoint{netip.AddrPortFrom(gwAddr, 5000), "/a/root.xml?x"}
	for text, want := range map[string]string{
		"ctl": "http://192.168.1.1:5000/a/ctl", "/ctl": "http://192.168.1.1:5000/ctl", "http://192.168.1.1:80/x": "http://192.168.1.1:80/x",
		"http://[::ffff:192.168.1.1]:7/x": "http://192.168.1.1:7/x", "?y": "http://192.168.1.1:5000/a/root.xml?y",
		"//evil/x": "", "http://evil/": "", "https://192.168.1.1/": "",
	} {
		got, err := gatewayURL(text, &base, gwAddr)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	desc := func(control string) string { return strings.Replace(goodDescription, "/ctl/IPConn", control, 1) }
	redirect := func(nc net.Conn) {
		io.ReadFull(nc, make([]byte, 10))
		go io.Copy(io.Discard, nc)
		io.WriteString(nc, "HTTP/1.1 302 Found\r\nLocation: http://192.168.1.66:5000/\r\nContent-Length: 0\r\n\r\n")
	}
	flood := func(nc net.Conn) {
		go io.Copy(io.Discard, nc)
		io.WriteString(nc, "HTTP/1.1 200 OK\r\n\r\n<a>")
		for chunk := strings.Repeat("<b/>", 1000); ; {
			if _, err := io.WriteString(nc, chunk); err != nil {
				return
			}
		}
	}
	heads := func(nc net.Conn) {
		go io.Copy(io.Discard, nc)
		for {
			if _, err := io.WriteString(nc, "HTTP/1.1 200 OK\r\nA: b\r\nC: d\r\n"[17:]); err != nil {
				return
			}
		}
	}
	trickle := func(nc net.Conn) {
		go io.Copy(io.Discard, nc)
		io.WriteString(nc, "HTTP/1.1 200 OK\r\n\r\n")
		for {
			if _, err := io.WriteString(nc, " "); err != nil {
				return
			}
			time.Sleep(time.Second)
		}
	}
	for name, change := range map[string]func(*fakeGateway){
		"control elsewhere": func(g *fakeGateway) { g.describe = desc("http://192.168.1.66:5000/ctl") },
		"base elsewhere":    func(g *fakeGateway) { g.describe = desc("//192.168.1.66/ctl") },
		"redirect":          func(g *fakeGateway) { g.raw = redirect },
		"flood":             func(g *fakeGateway) { g.raw = flood },
		"endless head":      func(g *fakeGateway) { g.raw = heads },
		"trickle":           func(g *fakeGateway) { g.raw = trickle },
		"silence":           func(g *fakeGateway) { g.raw = func(nc net.Conn) { io.Copy(io.Discard, nc) } },
		"hang up":           func(g *fakeGateway) { g.raw = func(net.Conn) {} },
		"not XML":           func(g *fakeGateway) { g.describe = "<root><service>" },
		"deep":              func(g *fakeGateway) { g.describe = strings.Repeat("<a>", 30000) },
		"no service":        func(g *fakeGateway) { g.describe = "<root/>" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGateway(t, UPnP)
				change(g)
				cfg := g.config()
				cfg.LocalPort = nil
				c := New(cfg)
				defer c.Close()
				began := time.Now()
				r, err := c.Probe(t.Context())
				if err != nil || r.UPnP {
					t.Errorf("%+v, %v", r, err)
				}
				if d := time.Since(began); d > discoverTime+httpTime+time.Second {
					t.Errorf("it took %v", d)
				}
				for _, d := range g.dials {
					if d != "192.168.1.1:5000" {
						t.Errorf("we were sent to %s", d)
					}
				}
				time.Sleep(2 * time.Second) // until the gateway sees that nobody listens
			})
		})
	}
}
