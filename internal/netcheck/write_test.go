package netcheck

import (
	"bytes"
	"encoding/json"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"mesh/internal/stun"
)

func TestWrite(t *testing.T) {
	is := func(b bool) *bool { return &b }
	r := &Report{
		Time: time.Unix(1e9, 0).UTC(), Full: true, UDP: is(true), NAT: is(true), MappingVaries: is(false), Hairpin: is(false),
		IPv4:        Family{true, is(true), netip.MustParseAddrPort("203.0.113.7:41641")},
		PortMapping: &PortMapping{PCP: true, UPnP: true, External: netip.MustParseAddr("203.0.113.7")}, Preferred: 901,
		Regions: []Region{{ID: 901, Code: "lon", Name: "London", V4: Latency(12345 * time.Microsecond)}, {ID: 902, Code: "\x1b[31m"}},
	}
	const want = `udp             works
ipv4            works, seen as 203.0.113.7:41641
ipv6            none: no interface has an address that leads anywhere
nat             yes, and it maps alike for all destinations: direct paths are easy
hairpin         does not work: hosts behind this NAT do not reach each other by its public address
port mapping    PCP, UPnP, external address 203.0.113.7
captive portal  not known: no relay offers the check
home relay      901 London (lon), 12.3 ms

RELAY  CODE   NAME    IPV4     IPV6
901    lon    London  12.3 ms  -
902    ?[31m  -       -        -
`
	var b bytes.Buffer
	if err := r.Write(&b); err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil || !reflect.DeepEqual(&back, r) {
		t.Errorf("%v: %s", err, text)
	}
	for _, part := range []string{`"udp":true`, `"ipv4Milliseconds":12.345`, `"global":"203.0.113.7:41641"`, `"preferredRelay":901`, `"natPMP":false`} {
		if !strings.Contains(string(text), part) {
			t.Errorf("no %s in %s", part, text)
		}
	}
	// The same network without UDP, and without a network.
	for _, test := range []struct {
		r    Report
		want []string
	}{
		{Report{UDP: is(false), IPv4: Family{true, is(false), netip.AddrPort{}}, Regions: []Region{{ID: 1, HTTPS: 1e7}}},
			[]string{"udp             blocked:", "ipv4            no answer by UDP\n", "NAME  IPV4  IPV6  HTTPS\n", "10.0 ms\n"}},
		{Report{UDP: is(false), Regions: []Region{{ID: 1, Error: "refused"}}}, []string{"udp             no answer, nor by HTTPS", "none: no relay answered", "refused\n"}},
		{Report{NAT: is(false), CaptivePortal: is(true)}, []string{"hairpin         not needed", "nat             none", "captive portal  yes"}},
		{Report{Preferred: 7, Regions: []Region{{ID: 7}}, PortMapping: &PortMapping{}}, []string{"home relay      7, which does not answer now", "port mapping    none: the gateway speaks"}},
	} {
		var b bytes.Buffer
		test.r.Write(&b)
		for _, part := range test.want {
			if !strings.Contains(b.String(), part) {
				t.Errorf("no %q in\n%s", part, b.String())
			}
		}
	}
	for _, bad := range []string{"-1", "1e300", `"x"`} {
		if err := json.Unmarshal([]byte(bad), new(Latency)); err == nil {
			t.Errorf("latency %s", bad)
		}
	}
	if err := r.Write(failing{}); err == nil {
		t.Error("no error of the writer")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// What comes to the sockets is from anybody.
func FuzzDatagram(f *testing.F) {
	tx := stun.TxID{1}
	server := netip.MustParseAddrPort("192.0.2.1:3478")
	f.Add(stun.AppendRequest(nil, tx))
	f.Add(stun.AppendResponse(nil, tx, netip.MustParseAddrPort("203.0.113.7:1")))
	f.Add(stun.AppendResponse(nil, tx, netip.MustParseAddrPort("[2001:db8::1]:1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &socket{}
		c := &check{news: make(chan struct{}, 1), pending: map[stun.TxID]asked{tx: {key: key{region: 1}, to: server, sock: s}},
			answers: map[key]answer{}, mapped: map[netip.AddrPort]netip.AddrPort{}, hairpin: map[stun.TxID]bool{}}
		c.take(s, netip.MustParseAddrPort("192.0.2.2:3478"), b)
		c.take(&socket{}, server, b)
		if len(c.answers) != 0 {
			t.Error("an answer from elsewhere was taken")
		}
		c.take(s, server, b)
		c.take(s, server, b)
		if len(c.mapped) > 1 || c.global4.IsValid() && !usable(c.global4) {
			t.Errorf("%v", c.mapped)
		}
	})
}
