package portmap

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
)

const routes4 = `Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
wlan0	00000000	FE01A8C0	0003	0	0	600	00000000	0	0	0
eth0	00000000	0101A8C0	0003	0	0	100	00000000	0	0	0
tun0	00000000	00000000	0001	0	0	50	00000000	0	0	0
down0	00000000	0201A8C0	0002	0	0	10	00000000	0	0	0
eth0	0001A8C0	00000000	0001	0	0	100	00FFFFFF	0	0	0
bad	zz
`

const routes6 = `20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 20010db8000000000000000000000001 00000800 00000001 00000000 00000003     eth1
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
`

func TestRoutes(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 { // what the kernel prints is in its order
		r, ok := defaultRoute4(strings.NewReader(routes4))
		if want := (route{"eth0", netip.MustParseAddr("192.168.1.1"), 100}); !ok || r != want {
			t.Errorf("%+v, %v", r, ok)
		}
	}
	r, ok := defaultRoute6(strings.NewReader(routes6))
	if want := (route{"eth0", netip.MustParseAddr("fe80::1%eth0"), 0x400}); !ok || r != want {
		t.Errorf("%+v, %v", r, ok)
	}
	for _, text := range []string{"", "\n\n", "Iface\tDestination", strings.Repeat("x", 1<<20)} {
		if r, ok := defaultRoute4(strings.NewReader(text)); ok {
			t.Errorf("%.20q: %+v", text, r)
		}
		if r, ok := defaultRoute6(strings.NewReader(text)); ok {
			t.Errorf("%.20q: %+v", text, r)
		}
	}
}

func TestPickSelf(t *testing.T) {
	list := []netip.Prefix{
		netip.MustParsePrefix("10.0.0.5/24"), netip.MustParsePrefix("192.168.1.20/24"),
		netip.MustParsePrefix("fe80::5/64"), netip.MustParsePrefix("fd00::5/64"), netip.MustParsePrefix("2001:db8::5/64"),
	}
	for gw, want := range map[string]string{
		"192.168.1.1": "192.168.1.20", "10.0.0.1": "10.0.0.5", "10.0.0.5": "", "10.0.1.1": "",
		"fe80::1": "2001:db8::5", "2001:db8::1": "2001:db8::5", "2001:db9::1": "",
	} {
		got, ok := pickSelf(list, netip.MustParseAddr(gw))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v, %v", gw, got, ok)
		}
	}
}

func TestGuessGateway(t *testing.T) {
	for p, want := range map[string]string{
		"192.168.1.20/24": "192.168.1.1", "10.1.2.3/16": "10.1.0.1", "192.168.1.1/24": "", "192.168.1.20/32": "", "203.0.113.5/24": "", "fd00::5/64": "",
	} {
		got, ok := guessGateway(netip.MustParsePrefix(p))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v, %v", p, got, ok)
		}
	}
}

// What the system says is plausible, if it says anything.
func TestSystemGateway(t *testing.T) {
	gw, self, ok := SystemGateway()
	if ok && (!gw.IsValid() || !self.IsValid() || gw == self) {
		t.Errorf("%v, %v", gw, self)
	}
}

func FuzzRoutes(f *testing.F) {
	f.Add(routes4)
	f.Add(routes6)
	f.Fuzz(func(t *testing.T, text string) {
		if r, ok := defaultRoute4(strings.NewReader(text)); ok && !r.gateway.Is4() {
			t.Errorf("%+v", r)
		}
		if r, ok := defaultRoute6(strings.NewReader(text)); ok && !r.gateway.Is6() {
			t.Errorf("%+v", r)
		}
	})
}
