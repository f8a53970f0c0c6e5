package portmap

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func FuzzPMP(f *testing.F) {
	f.Add([]byte{0, 128, 0, 0, 0, 0, 0, 9, 203, 0, 113, 7})
	f.Add([]byte{0, 129, 0, 0, 0, 0, 0, 9, 0xa2, 0xa9, 0xa2, 0xa9, 0, 0, 0x1c, 0x20})
	f.Add([]byte{0, 129, 0, 2, 0, 0, 0, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parsePMP(b)
		if !ok {
			return
		}
		if a.result == pmpOK && a.op == pmpOpAddress && !a.address.Is4() || a.lifetime < 0 || (a.err() == nil) != (a.result == 0) {
			t.Errorf("%+v of % x", a, b)
		}
	})
}

func FuzzPCP(f *testing.F) {
	g := &fakeGateway{gw: gwAddr, self: selfAddr, external: extAddr, booted: time.Now(), table: map[uint16]mapping{}}
	f.Add(g.answerPCP(pcpRequest(pcpOpAnnounce, selfAddr, 0)))
	f.Add(g.answerPCP(pcpMapRequest(selfAddr, [12]byte{1}, 2, netip.MustParseAddrPort("203.0.113.7:3"), time.Hour)))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parsePCP(b)
		if !ok {
			return
		}
		if a.op == pcpOpMap && !a.external.Addr().IsValid() || a.lifetime < 0 || (a.err() == nil) != (a.result == 0) {
			t.Errorf("%+v of % x", a, b)
		}
	})
}

// What was asked for comes back as it was said.
func TestPCPRoundTrip(t *testing.T) {
	for _, self := range []string{"192.168.1.20", "2001:db8::5"} {
		self := netip.MustParseAddr(self)
		external := netip.AddrPortFrom(extAddr, 99)
		if self.Is6() {
			external = netip.AddrPortFrom(self, 99)
		}
		req := pcpMapRequest(self, [12]byte{7}, 41641, external, time.Hour)
		req[1] |= pcpResponse
		req[3] = 0
		a, ok := parsePCP(req)
		if !ok || a.nonce != [12]byte{7} || a.internal != 41641 || a.external != external || a.lifetime != time.Hour {
			t.Errorf("%v: %+v, %v", self, a, ok)
		}
		if len(req) != 60 || netip.AddrFrom16([16]byte(req[8:24])).Unmap() != self {
			t.Errorf("% x", req)
		}
	}
}

func FuzzSSDP(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nST: " + ssdpTargets[0] + "\r\nLOCATION: " + location + "\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nST: " + ssdpTargets[1] + "\r\nLOCATION: http://192.168.1.1/x?y\r\n"))
	f.Add([]byte("NOTIFY * HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if at, ok := parseSSDP(b, gwAddr); ok {
			checkEndpoint(t, at)
		}
	})
}

func checkEndpoint(t *testing.T, e endpoint) {
	if e.addr.Addr() != gwAddr || e.addr.Port() == 0 || !strings.HasPrefix(e.path, "/") || len(e.path) > maxURL || strings.ContainsAny(e.path, " \r\n") {
		t.Errorf("%+v", e)
	}
}

func FuzzDescription(f *testing.F) {
	f.Add([]byte(goodDescription))
	f.Add([]byte(`<?xml version="1.0" encoding="ISO-8859-1"?><root><URLBase>http://192.168.1.1:80</URLBase><service><serviceType>` + wanServices[2] + `</serviceType><controlURL>c</controlURL></service></root>`))
	f.Add([]byte(`<!DOCTYPE a [<!ENTITY b "c">]><root>&b;</root>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseDescription(b, endpoint{netip.AddrPortFrom(gwAddr, 5000), "/root.xml"})
		if err != nil && list != nil || len(list) > maxServices {
			t.Errorf("%d services, %v", len(list), err)
		}
		for _, s := range list {
			checkEndpoint(t, s.control)
			if !slices.Contains(wanServices, s.kind) {
				t.Errorf("%+v", s)
			}
		}
	})
}

func FuzzSOAP(f *testing.F) {
	f.Add(soapBody(wanServices[0], "AddPortMapping", []field{{"NewRemoteHost", ""}, {"NewProtocol", "<&>"}}))
	f.Add([]byte(`<s:Envelope><s:Body><s:Fault><detail><UPnPError><errorCode>718</errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		values, err := parseValues(b)
		if len(values) > maxValues {
			t.Errorf("%d values, %v", len(values), err)
		}
		for k, v := range values {
			if len(k) > maxValue || len(v) > maxValue {
				t.Errorf("%q: %q", k, v)
			}
		}
	})
}

func TestDescription(t *testing.T) {
	at := endpoint{netip.AddrPortFrom(gwAddr, 5000), "/dir/root.xml"}
	list, err := parseDescription([]byte(goodDescription), at)
	if err != nil || len(list) != 1 || list[0] != (service{wanServices[1], endpoint{at.addr, "/ctl/IPConn"}}) {
		t.Errorf("%+v, %v", list, err)
	}
	svc := func(kind, control string) string {
		return "<service><serviceType>" + kind + "</serviceType><controlURL> " + control + " </controlURL></service>"
	}
	both := "<?xml version='1.0' encoding='latin1'?><root><URLBase>http://192.168.1.1:81/b/</URLBase>" + svc(wanServices[2], "ppp") + svc(wanServices[0], "/ip2") + "</root>"
	list, err = parseDescription([]byte(both), at)
	if err != nil || len(list) != 2 || list[0].kind != wanServices[0] || list[1].control.String() != "http://192.168.1.1:81/b/ppp" {
		t.Errorf("%+v, %v", list, err)
	}
	if values, err := parseValues([]byte("<a><b>x</b><c>&lt;y&gt;</c><b>z</b></a>")); err != nil || values["b"] != "x" || values["c"] != "<y>" || len(values) != 2 {
		t.Errorf("%v, %v", values, err)
	}
}
